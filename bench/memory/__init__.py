"""The largest batch and the longest sequence that fit."""

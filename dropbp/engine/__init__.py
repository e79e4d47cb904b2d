"""Applies masks: the functions that run around the modules of an enabled model."""

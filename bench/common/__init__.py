"""Shared by all parts: records of runs, options, processes, models and the ways to train them."""

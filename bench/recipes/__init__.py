"""Compiled graphs and launches on the simulated HPU."""

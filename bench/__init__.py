"""Benchmark harness: one set-up feeds speed and memory, one JSON file per run, tables and plots from those alone."""

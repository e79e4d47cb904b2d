"""Faults injected, inputs tried, cycles and long runs: fast in the tests, in full by `python -m tests.reliability`."""

"""Faults injected, inputs tried, long runs: a part in the tests, all by `python -m tests.campaigns.reliability`."""

"""Fault injection, hostile inputs and long runs. The tests run a part; `python -m tests.campaigns.reliability` runs
all.
"""

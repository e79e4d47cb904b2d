"""The matrix of docs/compatibility.md: every cell is a real run of a few steps. `python -m tests.compatibility`."""

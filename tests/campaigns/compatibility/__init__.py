"""The matrix of docs/compatibility.md: each cell is a run of a few steps. `python -m tests.campaigns.compatibility`."""

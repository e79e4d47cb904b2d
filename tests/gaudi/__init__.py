"""Tests that need the second environment, with optimum-habana: `make test-gaudi`."""

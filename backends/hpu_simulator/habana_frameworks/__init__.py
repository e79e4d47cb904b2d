"""Stand-in for Gaudi's Python package: what training code touches, on the simulated HPU."""

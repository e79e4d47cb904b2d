"""Several devices at once: not simulated."""

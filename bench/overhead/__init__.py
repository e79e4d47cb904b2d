"""Cost of the bookkeeping per step, and of the callback per event."""

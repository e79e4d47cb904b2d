"""What the bookkeeping costs in each step, and the callback in each of its events."""

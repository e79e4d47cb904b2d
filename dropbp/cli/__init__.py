"""The command `dropbp`."""

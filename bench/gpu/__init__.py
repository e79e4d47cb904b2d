"""The most valuable measurements on a borrowed GPU."""

"""What devices that compile recorded graphs need."""

"""What a borrowed GPU is worth its minutes for."""

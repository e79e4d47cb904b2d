"""Models, data and reference algorithms that tests share."""

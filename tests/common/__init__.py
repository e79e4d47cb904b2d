"""Models, data and reference algorithms shared by the tests."""

"""The activation cache: rows of data seen before start at the border below which nothing trains any more."""

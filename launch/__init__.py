"""Scripts that start Handloop, and servers of what it makes."""

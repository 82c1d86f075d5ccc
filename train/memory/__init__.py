"""What fits on a device: sizes, cost, time, and the search for a plan."""

"""The commands of `handloop`."""

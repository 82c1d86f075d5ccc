"""What a run folder says of its run: a page for one or several, and a list of all."""

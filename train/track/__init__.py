"""Who is told about a run."""

"""One script for each figure that README and docs/ quote."""

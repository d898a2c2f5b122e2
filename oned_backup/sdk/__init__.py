"""What the author of a driver imports."""

"""Long-context tasks that need no download, and readers and metrics for published ones."""

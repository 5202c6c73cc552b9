"""Is the attribution true? Retraining on subsets, and the metrics that compare it with the scores."""

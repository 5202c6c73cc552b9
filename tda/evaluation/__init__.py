"""Whether attributions are true: retraining on subsets, and how well scores predict what it does."""

"""Bayesian influence: chains around a checkpoint, the losses along them, and their covariances."""

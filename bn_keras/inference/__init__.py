"""Prepares a trained network for inference (Section 3.1): measures population statistics, folds normalizations away."""

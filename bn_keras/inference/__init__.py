"""A trained network at inference (Section 3.1): population statistics, and normalizations folded away."""

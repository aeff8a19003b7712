"""A checkpoint understood: every stored tensor tied to canonical ones, codes told from weights, scales that it brings along."""

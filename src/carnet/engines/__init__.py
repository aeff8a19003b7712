"""What inference engines say of the weights that they hold: their digests, their names for a parameter of a rank, their endpoints."""

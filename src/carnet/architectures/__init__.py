"""Architectures: one file a family, with what it fixes about a model and the rows and config fields that are its own."""

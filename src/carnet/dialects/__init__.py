"""Dialects: how a program names, folds, shares and configures any model. Nothing here opens a file or knows an architecture."""

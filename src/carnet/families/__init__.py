"""Families: which tensors an architecture has, and how each program names, folds and configures them. Nothing here opens a file."""

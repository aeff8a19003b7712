"""Formats: how bytes lie in files. A format never sees an architecture."""

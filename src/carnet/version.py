"""The release of carnet, which documents name."""

__version__ = "0.1.0"

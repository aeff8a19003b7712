"""Benchmarks: what a crossing costs next to copying the same bytes. README.md says how to read them."""

"""Megatron: rows of its one GPT model, the table of its arguments, and what its releases make of them."""

"""In place of megatron-core's own."""

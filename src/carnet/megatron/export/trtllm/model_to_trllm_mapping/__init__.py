"""Names; the spelling is Megatron's."""

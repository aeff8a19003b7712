"""Of a HybridModel."""

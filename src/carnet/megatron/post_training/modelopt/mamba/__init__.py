"""Of a MambaModel, as a HybridModel was called."""

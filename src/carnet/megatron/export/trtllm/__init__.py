"""For TensorRT-LLM."""

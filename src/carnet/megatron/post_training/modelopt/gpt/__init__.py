"""Of a GPTModel."""

"""The model: one neutral description of a decoder, its canonical tensors and its named axes. It knows no program."""

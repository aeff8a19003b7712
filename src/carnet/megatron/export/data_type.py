"""Element types."""

from carnet.megatron.export.words import Word


class DataType(Word):
    """The element type of the weights of the inference."""

    bfloat16 = 1
    float16 = 2
    float32 = 3

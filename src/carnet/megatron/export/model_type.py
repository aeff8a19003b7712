"""Kinds of models."""

from carnet.megatron.export.words import Word


class ModelType(Word):
    """The kind of a model, which says what TensorRT-LLM calls it."""

    gpt = 1
    gptnext = 2
    llama = 3
    falcon = 4
    starcoder = 5
    mixtral = 6
    gemma = 7
    nemotron_nas = 8

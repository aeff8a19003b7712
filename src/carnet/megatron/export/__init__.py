"""What ``megatron.core.export`` offers, at the same places, on carnet's tables: a script changes the prefix of its imports alone.

It works without tensorrt_llm, whose configs are then carnet's own records with the same fields; with it, configs are of its classes and
engines are built.
"""

"""What needs megatron-core: its export interface on carnet's layouts, and the specs of post-training that accept old weights."""

from importlib import import_module
from importlib.util import find_spec

if find_spec("megatron") is None or find_spec("megatron.core") is None:
    raise ModuleNotFoundError("carnet.megatron works with megatron-core: pip install 'carnet[megatron]'", name="megatron.core")

if find_spec("triton") is None:  # what of megatron-core asks for it is imported there, beside something that stands in for it
    import_module("carnet.megatron.hybrids")

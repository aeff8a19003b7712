"""What SGLang's ranks hold, a file a rank: the state after loading, which ``sharded_state`` copies into a model that is packed already.

SGLang took over vLLM's layers, and their names and cuts with them (sglang 0.5.23 srt/layers/linear.py, vocab_parallel_embedding.py,
srt/models/llama.py, qwen2.py, qwen3.py, mixtral.py, qwen3_moe.py), but no module is registered twice, experts stand a level higher, and
the scales of a cache are no buffers. Weights of dense layers stay as they are loaded.
"""

from dataclasses import replace

from carnet.dialects import vllm
from carnet.dialects.kinds import KINDS
from carnet.dialects.rows import Dialect

# classes of srt/models whose modules and parameters were read there
READ = frozenset(f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe"))


def dialect(folder: Dialect, spelling: vllm.Spelling) -> Dialect | None:  # noqa: ARG001  what vLLM registers twice, SGLang does not
    """Return how SGLang stores a family, from how a Hugging Face folder does; None where nobody has looked at its class."""
    if folder.architecture not in READ:
        return None
    made = vllm.dialect(folder, vllm.LLAMA)
    rows = tuple(replace(each, name=each.name.replace(".routed_experts.", ".")) for each in made.rows)
    return replace(made, kind=KINDS["sglang"], rows=rows, constants={}, dropped=folder.dropped)

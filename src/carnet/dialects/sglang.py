"""What SGLang's ranks hold, a file a rank: the state after loading, which ``sharded_state`` copies into a model that is packed already.

SGLang took over vLLM's layers, and their names and cuts with them (sglang 0.5.23 srt/layers/linear.py, vocab_parallel_embedding.py,
srt/models/llama.py, qwen2.py, qwen3.py), but no module is registered twice, and the scales of a cache are no buffers. Weights of dense
layers stay as they are loaded. What a backend reorders or packs, experts and codes, has no one layout, and so no rows here.
"""

from dataclasses import replace

from carnet.dialects import vllm
from carnet.dialects.kinds import KINDS
from carnet.dialects.rows import Dialect


def dialect(folder: Dialect, spelling: vllm.Spelling) -> Dialect | None:
    """Return how SGLang stores a family, from how a Hugging Face folder does; None where it is not dense, or has names of its own."""
    if spelling != vllm.LLAMA:
        return None
    made = vllm.dialect(folder, spelling)
    return replace(made, kind=KINDS["sglang"], constants={}, dropped=folder.dropped)

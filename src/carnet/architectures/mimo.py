"""MiMo-7B: Qwen2 with layers that predict further tokens, whose projection takes the hidden state before the embedding.

transformers has no class: the hub's modeling_mimo.py is Qwen2's with the further layers. Their names: vLLM's models/mimo_mtp.py,
Megatron-Bridge's mimo_bridge.py and mbridge's mimo.py, which exchange the halves of the projection.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, windows
from carnet.dialects.configs import place
from carnet.dialects.further import HIDDEN_FIRST
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import fuse, row

FURTHER = (
    row(LAYER + "token_layernorm.weight", "hidden", "mtp.embed_norm"),
    row(LAYER + "hidden_layernorm.weight", "hidden", "mtp.hidden_norm"),
    fuse(LAYER + "input_proj.weight", "hidden *", HIDDEN_FIRST),
    row(LAYER + "final_layernorm.weight", "hidden", "mtp.final_norm"),
)

MIMO = Family(
    name="mimo",
    traits={**LLAMA_TRAITS, "qkv_bias": True},
    hf=hf.dialect(
        "MiMoForCausalLM",
        "mimo",
        (*hf.LLAMA_ROWS, *FURTHER),
        (*hf.LLAMA_FIELDS, hf.TIED, *windows.USED, place("mtp", "num_nextn_predict_layers", default=0)),
        absent={"num_key_value_heads": 32, "sliding_window": 4096},
        # what the published models say of all of the class
        fixed={"attention_bias": True},
        guards={"use_mrope": (False,)},
        further=(LAYER, "mtp_" + LAYER),
    ),
    trtllm=None,
)

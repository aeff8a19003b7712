"""StableLM 2: LayerNorm with bias, a gated MLP, which may stand beside the attention, a quarter of each head rotated.

transformers: modeling_stablelm.py, whose norms of queries and keys are a module for each head.
"""

from carnet.architectures.family import Family
from carnet.dialects import hf, vllm
from carnet.dialects.configs import Choice, place
from carnet.dialects.rows import row
from carnet.model.model import head_share

STABLELM = Family(
    name="stablelm",
    vllm=vllm.EVERYWHERE,
    traits={"norm": "layer", "gated": True, "position": "rope"},
    hf=hf.dialect(
        "StableLmForCausalLM",
        "stablelm",
        (
            *(*hf.LLAMA_ROWS, *hf.NORM_BIASES),
            row(hf.LAYER + "self_attn.q_layernorm.norms.{kv rep}.weight", "dim", "attention.q_heads_norm"),
            row(hf.LAYER + "self_attn.k_layernorm.norms.{kv}.weight", "dim", "attention.k_heads_norm"),
        ),
        (
            *(field for field in hf.SIZES if field.field != "head_dim"),
            place("head_dim", default=head_share),
            place("norm_eps", "layer_norm_eps", default=1e-5),
            place("activation", "hidden_act", default="silu", words=hf.ACTIVATIONS),
            *(*hf.ROPE, hf.rope_percent(0.25)),
            place("qk_norm", "qk_layernorm", default="none", words=(("none", False), ("heads", True)), omit=True),
            place("qkv_bias", "use_qkv_bias", default=False),
            Choice(
                ("parallel_residual", "one_norm"),
                (("use_parallel_residual", False),),
                (((False, False), (False,)), ((True, True), (True,))),
            ),
            *(hf.TIED, hf.DTYPE, *hf.TOKENS),
        ),
        absent={"num_key_value_heads": 32},
    ),
    trtllm=None,
)

"""Phi-3 and Phi-4: Llama whose projections are joined, query, key and value in one tensor, gate and up in another.

transformers: modeling_phi3.py. Positions that are stretched by lists of factors (longrope) are refused.
"""

from carnet.families import hf
from carnet.families.family import Family
from carnet.families.fields import place
from carnet.families.hf import LAYER
from carnet.families.llama import TIED, TRAITS
from carnet.families.rows import fuse, row

QKV = {"attention.q": "kv rep dim", "attention.k": "kv dim", "attention.v": "kv dim"}

PHI3 = Family(
    name="phi3",
    traits=TRAITS,
    hf=hf.dialect(
        "Phi3ForCausalLM",
        "phi3",
        (
            *(hf.EMBED, *hf.NORMS),
            fuse(LAYER + "self_attn.qkv_proj.weight", "* hidden", QKV),
            row(LAYER + "self_attn.o_proj.weight", "hidden (kv rep dim)", "attention.o"),
            fuse(LAYER + "mlp.gate_up_proj.weight", "* hidden", {"mlp.gate": "ffn", "mlp.up": "ffn"}),
            row(LAYER + "mlp.down_proj.weight", "hidden ffn", "mlp.down"),
            *(hf.FINAL_NORM, hf.HEAD),
        ),
        (
            *hf.SIZES_WITHOUT_HEAD,
            place("norm_eps", "rms_norm_eps", default=1e-5),
            place("activation", "hidden_act", default="silu", words=hf.ACTIVATIONS),
            place("rope_theta", "rope_theta", "rope_parameters.rope_theta", default=10000.0),
            place(
                "rope_percent",
                "partial_rotary_factor",
                "rope_parameters.partial_rotary_factor",
                "rope_scaling.partial_rotary_factor",
                default=1.0,
                omit=True,
            ),
            *hf.rope("rope_scaling", "rope_parameters", types=("default",)),
            place("window", "sliding_window", default=None),
            TIED,
            hf.DTYPE,
            *hf.TOKENS,
        ),
        guards={"attention_bias": (False,), "mlp_bias": (False,), "lm_head_bias": (False,)},
        # the sequence before stretching means nothing where nothing is stretched
        ignored="embd_pdrop original_max_position_embeddings full_attn_mod interpolate_factor",
    ),
    trtllm=None,
)

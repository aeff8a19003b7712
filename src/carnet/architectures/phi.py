"""Phi-3 and Phi-4: Llama whose projections are joined, query, key and value in one tensor, gate and up in another.

transformers: modeling_phi3.py. TensorRT-LLM: tensorrt_llm/models/phi3/config.py, convert.py, model.py.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, longrope, trtllm, vllm
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.longrope import LONGROPE, rotated
from carnet.dialects.rows import fuse, row
from carnet.dialects.senses import expect
from carnet.model.fields import Config, Value
from carnet.model.model import real


def _checked(said: int | None, config: Config) -> Value:
    expect(said in {None, rotated(config)}, "the same part of a head")
    return real(config, "rope_percent")


PHI3 = Family(
    name="phi3",
    vllm=vllm.LLAMA,
    traits=LLAMA_TRAITS,
    hf=hf.dialect(
        "Phi3ForCausalLM",
        "phi3",
        (
            *(hf.EMBED, *hf.NORMS),
            fuse(LAYER + "self_attn.qkv_proj.weight", "* hidden", trtllm.QKV),
            row(LAYER + "self_attn.o_proj.weight", "hidden (kv rep dim)", "attention.o"),
            *hf.JOINED_MLP,
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
            # transformers takes the outer one whatever the inner says: modeling_rope_utils.py standardize_rope_params
            place("rope_original", "original_max_position_embeddings", default=4096),
            *hf.rope("rope_scaling", "rope_parameters", types=("default", "longrope"), called=("type", "rope_type")),
            place(
                "rope_original",
                "rope_scaling.original_max_position_embeddings",
                "rope_parameters.original_max_position_embeddings",
                default=lambda c: c["rope_original"],
                only=LONGROPE,
                omit=True,
            ),
            place("window", "sliding_window", default=None),
            hf.TIED,
            hf.DTYPE,
            *hf.TOKENS,
        ),
        written=hf.NO_PADDING,
        guards={"attention_bias": (False,), "mlp_bias": (False,), "lm_head_bias": (False,)},
        ignored="embd_pdrop full_attn_mod interpolate_factor",
    ),
    # One tensor holds a rank's up rows, then its gate rows. NVIDIA's split_weights.py halves the joined tensor instead, so that one of
    # two ranks has all up rows and no gate: its class then computes no Phi-3, and carnet writes the ranks with which it does.
    trtllm=trtllm.dialect(
        "Phi3ForCausalLM",
        (fuse(LAYER + "mlp.fc.weight", "* hidden", {"mlp.up": "ffn", "mlp.gate": "ffn"}, cut="ffn"),),
        (
            *(field for field in trtllm.SIZES if field is not trtllm.ROTATED),
            *trtllm.ONE_STAGE,
            place("rope_theta", "rotary_base", default=10000.0),
            place("rope_percent", "rotary_pct", default=1.0, omit=True),
            Spread("rope_percent", "rotary_embedding_dim", int, _checked, lambda c: (rotated(c),)),
            place(
                "rope_type",
                "position_embedding_type",
                default="default",
                words=(("default", "rope_gpt_neox"), ("longrope", "long_rope")),
            ),
            place("rope_original", "original_max_position_embeddings", only=LONGROPE),
            place("rope_original", "original_max_position_embeddings", default=None, only={"rope_type": "default"}),
            longrope.factors("rope_short", "longrope_scaling_short_factors"),
            longrope.factors("rope_long", "longrope_scaling_long_factors"),
            place("rope_attention", default=longrope.by_rule, only=LONGROPE),
            place("activation", "hidden_act", words=trtllm.GATED),
            place("tied", "tie_word_embeddings", default=False, omit=True),
        ),
        fixed={"position_embedding_type": "rope_gpt_neox"},
        written={"rotary_scaling": None},
        guards={"rotary_scaling": ()},  # which the class's layers do not read
    ),
)

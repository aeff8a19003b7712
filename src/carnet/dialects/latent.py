"""Latent attention under Hugging Face's names: keys and values, and queries where they are, go through a narrow stream.

transformers: modeling_deepseek_v3.py, whose class the later ones take over.
"""

from carnet.dialects import hf
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import fuse, row
from carnet.dialects.senses import expect
from carnet.dialects.yarn import YARN
from carnet.model.fields import Config
from carnet.model.model import number

ATTENTION = (
    row(LAYER + "self_attn.q_proj.weight", "(kv qk) hidden", "mla.q"),
    row(LAYER + "self_attn.q_a_proj.weight", "q_lora hidden", "mla.q_a"),
    row(LAYER + "self_attn.q_a_layernorm.weight", "q_lora", "mla.q_a_norm"),
    row(LAYER + "self_attn.q_b_proj.weight", "(kv qk) q_lora", "mla.q_b"),
    fuse(LAYER + "self_attn.kv_a_proj_with_mqa.weight", "* hidden", {"mla.kv_a": "kv_lora", "mla.k_rope": "rope"}),
    row(LAYER + "self_attn.kv_a_layernorm.weight", "kv_lora", "mla.kv_a_norm"),
    fuse(LAYER + "self_attn.kv_b_proj.weight", "(kv *) kv_lora", {"mla.k_b": "nope", "mla.v_b": "v"}),
    row(LAYER + "self_attn.o_proj.weight", "hidden (kv v)", "mla.o"),
)


def compressed(said: int | None, _: Config) -> int:
    """Return the width of the compressed queries; null where they are not compressed, and transformers takes 0 for a width."""
    expect(said is None or said > 0, "a width")
    return said or 0


FIELDS: tuple[Field, ...] = (
    place("layers", "num_hidden_layers"),
    place("hidden", "hidden_size"),
    place("heads", "num_attention_heads"),
    place("kv_heads", "num_key_value_heads", default=lambda c: c["heads"]),
    Spread("q_lora", "q_lora_rank", int, compressed, lambda c: (number(c, "q_lora") or None,)),
    place("kv_lora", "kv_lora_rank"),
    place("nope_dim", "qk_nope_head_dim"),
    place("rope_dim", "qk_rope_head_dim"),
    place("v_dim", "v_head_dim"),
    place("head_dim", default=lambda c: number(c, "nope_dim") + number(c, "rope_dim")),
    place("ffn", "intermediate_size"),
    place("vocab", "vocab_size"),
    place("positions", "max_position_embeddings"),
    place("norm_eps", "rms_norm_eps", default=1e-6),
    place("activation", "hidden_act", default="silu", words=hf.ACTIVATIONS),
    place("rope_theta", "rope_theta", "rope_parameters.rope_theta", default=10000.0),
    *hf.rope("rope_scaling", "rope_parameters", types=("default", "yarn")),
    # of the scores, and of no other attention
    place("rope_mscale_all", "rope_scaling.mscale_all_dim", "rope_parameters.mscale_all_dim", default=0.0, only=YARN),
    # their classes' own, whatever rms_norm_eps says
    place("latent_norm_eps", default=1e-6),
)

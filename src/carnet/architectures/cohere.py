"""Command R and Command A: LayerNorm without a bias, attention and MLP beside each other behind one norm, logits scaled.

Neighbouring dimensions are rotated together; of the later class only in layers with the window. transformers: modeling_cohere.py,
modeling_cohere2.py.
"""

from collections.abc import Iterator
from math import inf, nextafter

from carnet.architectures.family import Family
from carnet.dialects import hf, vllm, windows
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.rows import row
from carnet.dialects.senses import expect
from carnet.model.fields import Config
from carnet.model.model import real

TRAITS: Config = {
    "norm": "centred",
    "gated": True,
    "position": "rope",
    "rope_interleaved": True,
    "parallel_residual": True,
    "one_norm": True,
}
QK_NORMS = (
    row(hf.LAYER + "self_attn.q_norm.weight", "(kv rep) dim", "attention.q_heads_norm"),
    row(hf.LAYER + "self_attn.k_norm.weight", "kv dim", "attention.k_heads_norm"),
)
ROWS = (hf.EMBED, hf.NORMS[0], *hf.ATTENTION, *hf.GATED_MLP, hf.FINAL_NORM, hf.HEAD)


def _divisor(scale: float | None, _: Config) -> float:
    expect(scale is not None and scale > 0, "a factor")
    assert scale is not None
    return 1 / scale


def _scales(config: Config) -> Iterator[float]:
    """Yield the factor, and its neighbours: a number is not always one over one over itself."""
    factor = 1 / real(config, "logits_divisor")
    yield from (round(factor, 6), factor, nextafter(factor, inf), nextafter(factor, 0))


FIELDS: tuple[Field, ...] = (
    *hf.SIZES_WITHOUT_HEAD,
    place("norm_eps", "layer_norm_eps", default=1e-5),
    place("activation", "hidden_act", default="silu", words=hf.ACTIVATIONS),
    *hf.ATTENTION_BIASES,
    Spread("logits_divisor", "logit_scale", float, _divisor, _scales),
    place("tied", "tie_word_embeddings", default=True),
    *(hf.DTYPE, *hf.TOKENS),
)
# what configs on the hub say of all models of the class
GUARDS: dict[str, tuple[object, ...]] = {
    "layer_norm_bias": (False,),
    "position_embedding_type": ("rope_gptj",),
    "rotary_pct": (1.0,),
    **dict.fromkeys(("use_embedding_sharing", "use_gated_activation", "use_parallel_block"), (True,)),
}

COHERE = Family(
    name="cohere",
    vllm=vllm.HEADLESS,
    traits=TRAITS,
    hf=hf.dialect(
        "CohereForCausalLM",
        "cohere",
        (*ROWS, *QK_NORMS),
        (
            *FIELDS,
            *hf.ROPE,
            place("qk_norm", "use_qk_norm", default="none", words=(("none", False), ("heads", True)), omit=True),
        ),
        absent={"logit_scale": 0.0625, "rope_theta": 500000.0},
        guards=GUARDS,
        ignored="model_max_length",  # a tokenizer's
    ),
    trtllm=None,
)

COHERE2 = Family(
    name="cohere2",
    vllm=vllm.HEADLESS,
    traits=TRAITS,
    hf=hf.dialect(
        "Cohere2ForCausalLM",
        "cohere2",
        ROWS,
        (
            *(*FIELDS, *hf.ROPE),
            place("window_every", "sliding_window_pattern", "_sliding_window_pattern", default=4, omit=True),
            *(*windows.STEPPED, windows.ROTATED),
        ),
        absent={"logit_scale": 0.0625},
        guards={
            **GUARDS,
            "use_qk_norm": (False,),
            "order_of_interleaved_layers": ("local_attn_first",),
            "use_parallel_embedding": (True, False),
        },
        ignored="cache_implementation layer_switch",
    ),
    trtllm=None,
)

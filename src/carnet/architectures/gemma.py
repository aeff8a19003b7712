"""Gemma, Gemma 2 and Gemma 3 (text): norms stored less one, an embedding scaled by the root of its width, a gated tanh GELU.

Gemma 2 norms what comes out of the attention and the MLP too, caps scores and logits and gives every second layer a window; Gemma 3
norms queries and keys as well. transformers: modeling_gemma.py, modeling_gemma2.py, modeling_gemma3.py. TensorRT-LLM:
tensorrt_llm/models/gemma/config.py, which ties the head and shares the embedding by rows wherever there are several ranks.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, trtllm
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import row
from carnet.model.fields import Config, Value
from carnet.model.model import number

GEMMA_TRAITS: dict[str, Value] = {**LLAMA_TRAITS, "embed_root": True}
# configuration_gemma.py and TensorRT-LLM take "gelu" for the tanh form
TANH = (("gelu_tanh", "gelu_pytorch_tanh"), ("gelu_tanh", "gelu"), ("gelu_tanh", "gelu_new"), ("gelu_tanh", "gelu_fast"))
CAUSAL: dict[str, tuple[object, ...]] = {"use_bidirectional_attention": (False,)}

FIELDS: tuple[Field, ...] = (
    # the classes have sizes of their own where a config is silent, 256 for a head: they must be said
    *hf.SAID_SIZES,
    place("norm_eps", "rms_norm_eps", default=1e-6),
    *hf.ATTENTION_BIASES,
    place("tied", "tie_word_embeddings", default=True),
    hf.DTYPE,
    *hf.TOKENS,
)
TRTLLM_FIELDS: tuple[Field, ...] = (
    *trtllm.SIZES,
    *trtllm.ROPE,
    place("activation", "hidden_act", words=TANH),
    place("qkv_bias", "attn_bias", default=False),
    place("out_bias", "attn_bias", default=False),
    place("mlp_bias", "mlp_bias", default=False),
    place("tied", default=True),
)

GEMMA = Family(
    name="gemma",
    traits=GEMMA_TRAITS,
    hf=hf.dialect(
        "GemmaForCausalLM",
        "gemma",
        hf.LLAMA_ROWS,
        (*FIELDS, *hf.ROPE, place("activation", "hidden_act", default="gelu_tanh", words=TANH)),
        guards={**CAUSAL, "hidden_activation": ("gelu_pytorch_tanh",)},
        zero_centred=True,
    ),
    trtllm=trtllm.dialect(
        "GemmaForCausalLM",
        trtllm.GATED_MLP,
        TRTLLM_FIELDS,
        fixed={"position_embedding_type": "rope_gpt_neox", "inter_layernorms": False},
        written={"rotary_scaling": None},
        guards={trtllm.SHARED: (True, False)},
        embedding="rows",
    ),
)


def _said(kinds: list[str] | None, config: Config) -> tuple[int, ...]:
    """Return a mark for each layer that has the window: those that a config lists, or all but every n-th."""
    if kinds is None:
        every = number(config, "window_every")
        return tuple(int((layer + 1) % every > 0) for layer in range(number(config, "layers")))
    return hf.marks_of(kinds, config)


def _listed(config: Config) -> list[list[str]]:
    return hf.kinds_of(config, "window_layers")


WINDOWS = (
    place("window", "sliding_window", "sliding_window_size"),
    Spread("window_layers", "layer_types", list[str], _said, _listed),
)
SANDWICH: dict[str, Value] = {**GEMMA_TRAITS, "norm_after": True}
ROWS = (
    hf.EMBED,
    row(LAYER + "input_layernorm.weight", "hidden", "attention_norm"),
    row(LAYER + "post_attention_layernorm.weight", "hidden", "attention_out_norm"),
    row(LAYER + "pre_feedforward_layernorm.weight", "hidden", "mlp_norm"),
    row(LAYER + "post_feedforward_layernorm.weight", "hidden", "mlp_out_norm"),
    *(*hf.ATTENTION, *hf.GATED_MLP, hf.FINAL_NORM, hf.HEAD),
)
# modeling_gemma2.py looks at hidden_activation alone
ACTIVATION = place("activation", "hidden_activation", default="gelu_tanh", words=hf.ACTIVATIONS)
OTHER_ACTIVATION: dict[str, tuple[object, ...]] = {"hidden_act": ("gelu_pytorch_tanh", "gelu")}


CAPS = (
    place("softcap_attention", "attn_logit_softcapping", default=None),
    place("softcap_logits", "final_logit_softcapping", default=None),
)


GEMMA2 = Family(
    name="gemma2",
    traits=SANDWICH,
    hf=hf.dialect(
        "Gemma2ForCausalLM",
        "gemma2",
        ROWS,
        (
            *FIELDS,
            *hf.ROPE,
            ACTIVATION,
            place("attention_root", "query_pre_attn_scalar", default=256),
            *CAPS,
            place("window_every", default=2),
            *WINDOWS,
        ),
        absent={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        guards={**CAUSAL, **OTHER_ACTIVATION},
        ignored="cache_implementation",
        zero_centred=True,
    ),
    # NVIDIA's class takes the window when it runs and has no words for it: carnet's own say one that no published Gemma 2 has
    trtllm=trtllm.dialect(
        "Gemma2ForCausalLM",
        (
            *trtllm.GATED_MLP,
            row(LAYER + "post_layernorm.weight", "hidden", "attention_out_norm"),
            row(LAYER + "pre_feedforward_layernorm.weight", "hidden", "mlp_norm"),
            row(LAYER + "post_feedforward_layernorm.weight", "hidden", "mlp_out_norm"),
        ),
        (
            *TRTLLM_FIELDS,
            place("attention_root", "query_pre_attn_scalar"),
            *CAPS,
            place("window", "sliding_window", default=4096, omit=True),
            place("window_every", default=2),
            Spread("window_layers", "layer_types", list[str], _said, lambda c: [None, *_listed(c)]),
        ),
        fixed={"position_embedding_type": "rope_gpt_neox", "inter_layernorms": True},
        written={"rotary_scaling": None},
        guards={trtllm.SHARED: (True, False)},
        embedding="rows",
        common=trtllm.WITHOUT_POST_NORM,
    ),
)

GEMMA3 = Family(
    name="gemma3",
    traits={**SANDWICH, "qk_norm": "head"},
    hf=hf.dialect(
        "Gemma3ForCausalLM",
        "gemma3_text",
        (*ROWS, *hf.QK_NORMS),
        (
            *FIELDS,
            # what stretches the angles does so in layers without the window only
            place("rope_theta", "rope_theta", "rope_parameters.full_attention.rope_theta", default=1000000.0),
            place("rope_local_theta", "rope_local_base_freq", "rope_parameters.sliding_attention.rope_theta", default=10000.0),
            *hf.rope("rope_scaling", "rope_parameters.full_attention"),
            ACTIVATION,
            place("attention_root", "query_pre_attn_scalar", default=256),
            *CAPS,
            # layer_types says it where it is there
            place("window_every", "sliding_window_pattern", "_sliding_window_pattern", default=6, omit=True),
            *WINDOWS,
        ),
        guards={**CAUSAL, **OTHER_ACTIVATION, "rope_parameters.sliding_attention.rope_type": ("default",)},
        ignored="cache_implementation",
        zero_centred=True,
    ),
    trtllm=None,
    without="NVIDIA's later classes know it, in a form that carnet does not write",
)

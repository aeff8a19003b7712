"""Gemma 1 to 4 (text): an embedding scaled by the root of its width, a gated tanh GELU, norms stored less one up to Gemma 3.

Gemma 2 norms what comes out of the attention and the MLP too, caps scores and logits and gives every second layer a window; Gemma 3
norms queries and keys as well, Gemma 4 values, and its layers without the window have heads, and KV heads, of their own.
transformers: modeling_gemma.py, modeling_gemma2.py, modeling_gemma3.py, modeling_gemma4.py. TensorRT-LLM:
tensorrt_llm/models/gemma/config.py, which ties the head and shares the embedding by rows wherever there are several ranks.
"""

from collections.abc import Mapping
from dataclasses import replace

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, trtllm, vllm, windows
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.heterogeneous import record, size
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import fuse, row
from carnet.dialects.senses import Kind, Senseless, expect
from carnet.model.fields import MIXED, Config, Value
from carnet.model.model import number, several, value

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
    vllm=vllm.EVERYWHERE,
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


SANDWICH: dict[str, Value] = {**GEMMA_TRAITS, "norm_after": True}
ROWS = (
    hf.EMBED,
    row(LAYER + "input_layernorm.weight", "hidden", "attention_norm"),
    hf.OUT_NORMS[0],
    row(LAYER + "pre_feedforward_layernorm.weight", "hidden", "mlp_norm"),
    hf.OUT_NORMS[1],
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
    vllm=vllm.HEADLESS,
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
            *windows.STEPPED,
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
            Spread("window_layers", "layer_types", list[str], windows.by_step, lambda c: [None, *windows.listed(c)]),
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
    vllm=vllm.EVERYWHERE,
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
            *windows.STEPPED,
        ),
        guards={**CAUSAL, **OTHER_ACTIVATION, "rope_parameters.sliding_attention.rope_type": ("default",)},
        ignored="cache_implementation",
        zero_centred=True,
    ),
    trtllm=None,
    without="NVIDIA's later classes know it, in a form that carnet does not write",
)


def _ending(kinds: list[str] | None, config: Config) -> tuple[int, ...]:
    """Return a mark for each layer that has the window, which the last has not: Gemma4TextConfig."""
    *before, last = windows.by_step(kinds, config)
    expect(kinds is None or not last, "a last layer that sees all")
    return (*before, 0)


Own = tuple[int | None, Mapping[str, object] | None]  # of layers without the window; a record for each layer that differs
WIDE = 512  # a head where nothing is said


def _own(field: str, key: str, said: Own, config: Config) -> tuple[int, ...] | None:
    """Return a size of every layer; transformers saves it as records: integrations/heterogeneity/configuration_utils.py."""
    wide, records = said
    usual, windows = number(config, field), value(config, "window_layers")
    if not isinstance(windows, tuple) or None not in said:
        raise Senseless("one of them, and layers with and without a window")
    found = [usual if mark or wide is None else size(wide) for mark in windows]
    if records is not None:
        each = {name.lstrip("0") or "0": record(records, name) for name in records}
        numbers = [str(layer) for layer in range(len(windows))]
        known = {*each} <= {*numbers} and {key for own in each.values() for key in own} <= {*RECORDED}
        expect(known, f"{' and '.join(RECORDED)} of layers")
        found = [size(each.get(name, {}).get(key, usual)) for name in numbers]
    return tuple(found) if {*found} != {usual} else None


def _head_dim(said: Own, config: Config) -> tuple[int, ...] | None:
    wide, records = said
    return _own("head_dim", "head_dim", (WIDE if said == (None, None) else wide, records), config)


def _kv_heads(said: Own, config: Config) -> tuple[int, ...] | None:
    """Return the KV heads of every layer: others where keys are values too."""
    wide, records = said
    found = _own("kv_heads", "num_key_value_heads", (wide if value(config, "value_layers") else None, records), config)
    expect(all(number(config, "heads") % kv == 0 for kv in found or ()), "whole groups of query heads")
    return found


def _last(many: str, usual: str, config: Config) -> int:
    """Return the size of the last layer: of all that have no window."""
    each = several(config, many)
    return number(config, usual) if each is None else each[-1]


def _experts(said: tuple[int | None, bool], _: Config) -> int:
    count, mixed = said
    return size(count) if mixed else 0


RECORDED = ("head_dim", "num_key_value_heads")
RECORDS: tuple[Kind, ...] = (int, dict[str, object])
DENSE, BOTH = {"mlp": "dense"}, {"mlp": "moe"}
# a mixture, and what is the MLP of other layers beside it
MIXTURE = (
    row(LAYER + "pre_feedforward_layernorm.weight", "hidden", "shared.norm"),
    row(LAYER + "pre_feedforward_layernorm_2.weight", "hidden", "mlp_norm", when=BOTH),
    row(LAYER + "post_feedforward_layernorm_1.weight", "hidden", "shared.out_norm"),
    row(LAYER + "post_feedforward_layernorm_2.weight", "hidden", "moe.out_norm"),
    *hf.gated("mlp", "shared", "shared_ffn"),
    *hf.stacked("", "router.proj"),
    row(LAYER + "router.scale", "hidden", "moe.router_norm"),
    row(LAYER + "router.per_expert_scale", "expert", "moe.expert_scale"),
)
FULL, SLIDING = "rope_parameters.full_attention.", "rope_parameters.sliding_attention."

# vllm 0.32 model_executor/models/gemma4.py: keys that are values too stand twice
TWICE = (("attention.q", "kv rep dim"), ("attention.k", "kv dim"), ("attention.k", "kv dim"))
ENGINE = vllm.Spelling(
    everywhere=vllm.AROUND,
    rows=(
        fuse(LAYER + "self_attn.qkv_proj.weight", "* hidden", trtllm.QKV, cut="kv"),
        fuse(LAYER + "self_attn.qkv_proj.weight", "* hidden", TWICE, cut="kv", when={"own_values": False}),
    ),
)

GEMMA4 = Family(
    name="gemma4",
    vllm=ENGINE,
    traits={**SANDWICH, "qk_norm": "head", "v_norm": True, "layer_scale": True, "attention_scale": 1.0},
    hf=hf.dialect(
        "Gemma4ForCausalLM",
        "gemma4_text",
        (
            *(replace(each, when=DENSE) if each.name.endswith("pre_feedforward_layernorm.weight") else each for each in ROWS),
            *(*hf.QK_NORMS, *MIXTURE),
            row(LAYER + "layer_scalar", "one", "layer_scale"),
        ),
        (
            *FIELDS,
            place("rope_theta", FULL + "rope_theta", default=1000000.0),
            place("rope_local_theta", SLIDING + "rope_theta", default=10000.0),
            place("rope_type", FULL + "rope_type", words=tuple((name, name) for name in ("default", "proportional"))),
            place("rope_percent", FULL + "partial_rotary_factor", only={"rope_type": "proportional"}),
            ACTIVATION,
            CAPS[1],
            place("window", "sliding_window"),
            place("window_every", default=6),
            Spread("window_layers", "layer_types", list[str], _ending, windows.listed),
            Spread(
                *("value_layers", "attention_k_eq_v", False),
                lambda same, c: value(c, "window_layers") if same else None,
                lambda c: (bool(value(c, "value_layers")),),
            ),
            Spread(
                *("layer_head_dim", "global_head_dim", RECORDS, _head_dim),
                lambda c: ((_last("layer_head_dim", "head_dim", c), None),),
                more=("per_layer_config",),
            ),
            Spread(
                *("layer_kv_heads", "num_global_key_value_heads", RECORDS, _kv_heads),
                lambda c: ((None, None), (_last("layer_kv_heads", "kv_heads", c), None)),
                more=("per_layer_config",),
            ),
            Spread(
                *("experts", "num_experts", (int, False), _experts),
                lambda c: ((value(c, "experts") or None, bool(value(c, "experts"))),),
                more=("enable_moe_block",),
            ),
            place("topk", "top_k_experts", only=MIXED),
            place("moe_ffn", "moe_intermediate_size", only=MIXED),
            place("shared_ffn", "intermediate_size", only=MIXED),
            *(place(name, default=True, only=MIXED) for name in ("shared_norms", "router_norm", "expert_scale")),
        ),
        absent={"hidden_size_per_layer_input": 256},
        fixed={"num_kv_shared_layers": 0, SLIDING + "rope_type": "default"},
        written={"hidden_size_per_layer_input": 0},
        guards={
            **OTHER_ACTIVATION,
            "hidden_size_per_layer_input": (0,),
            "use_double_wide_mlp": (False, True),  # of layers that share keys and values
            "use_bidirectional_attention": ("vision",),  # of what an image became
        },
        ignored="vocab_size_per_layer_input",
    ),
    trtllm=None,
    without="NVIDIA's later classes know it, in a form that carnet does not write",
)

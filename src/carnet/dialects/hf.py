"""What Hugging Face dialects share: the rows and config fields of a Llama-shaped decoder, and the fields that mean nothing here.

Names as in transformers' modeling_llama.py; every family says what it does differently.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from carnet.dialects import longrope, yarn
from carnet.dialects.configs import Place, Spread, Table, place
from carnet.dialects.configs import Row as Field
from carnet.dialects.kinds import KINDS
from carnet.dialects.rows import Dialect, Row, fuse, row
from carnet.dialects.senses import expect
from carnet.dialects.yarn import YARN
from carnet.errors import BadCheckpoint
from carnet.model.fields import Config
from carnet.model.model import head_share, marks, number, several, value

LAYER = "layers.{layer}."
LAYER_TYPES = ("full_attention", "sliding_attention")  # of a layer in layer_types: without the window and with it
Kinds = tuple[str, str]

EMBED = row("embed_tokens.weight", "vocab hidden", "embed")
FINAL_NORM = row("norm.weight", "hidden", "final_norm")
HEAD = row("/lm_head.weight", "vocab hidden", "head")
NORMS = (
    row(LAYER + "input_layernorm.weight", "hidden", "attention_norm"),
    row(LAYER + "post_attention_layernorm.weight", "hidden", "mlp_norm"),
)
ATTENTION = (
    row(LAYER + "self_attn.q_proj.weight", "(kv rep dim) hidden", "attention.q"),
    row(LAYER + "self_attn.k_proj.weight", "(kv dim) hidden", "attention.k"),
    row(LAYER + "self_attn.v_proj.weight", "(kv dim) hidden", "attention.v"),
    row(LAYER + "self_attn.o_proj.weight", "hidden (kv rep dim)", "attention.o"),
    row(LAYER + "self_attn.q_proj.bias", "(kv rep dim)", "attention.q_bias"),
    row(LAYER + "self_attn.k_proj.bias", "(kv dim)", "attention.k_bias"),
    row(LAYER + "self_attn.v_proj.bias", "(kv dim)", "attention.v_bias"),
    row(LAYER + "self_attn.o_proj.bias", "hidden", "attention.o_bias"),
)
QK_NORMS = (
    row(LAYER + "self_attn.q_norm.weight", "dim", "attention.q_norm"),
    row(LAYER + "self_attn.k_norm.weight", "dim", "attention.k_norm"),
)
WHOLE_QK_NORMS = (
    row(LAYER + "self_attn.q_norm.weight", "(kv rep dim)", "attention.q_whole_norm"),
    row(LAYER + "self_attn.k_norm.weight", "(kv dim)", "attention.k_whole_norm"),
)
OUT_NORMS = (
    row(LAYER + "post_attention_layernorm.weight", "hidden", "attention_out_norm"),
    row(LAYER + "post_feedforward_layernorm.weight", "hidden", "mlp_out_norm"),
)
NORM_BIASES = (
    row(LAYER + "input_layernorm.bias", "hidden", "attention_norm_bias"),
    row(LAYER + "post_attention_layernorm.bias", "hidden", "mlp_norm_bias"),
    row("norm.bias", "hidden", "final_norm_bias"),
)


def gated(at: str, part: str, width: str) -> tuple[Row, ...]:
    """Write the weights of an MLP with a gate, so many wide, at the module ``at``."""
    return (
        row(f"{LAYER}{at}.gate_proj.weight", f"{width} hidden", f"{part}.gate"),
        row(f"{LAYER}{at}.up_proj.weight", f"{width} hidden", f"{part}.up"),
        row(f"{LAYER}{at}.down_proj.weight", f"hidden {width}", f"{part}.down"),
    )


GATED_MLP = (
    *gated("mlp", "mlp", "ffn"),
    row(LAYER + "mlp.gate_proj.bias", "ffn", "mlp.gate_bias"),
    row(LAYER + "mlp.up_proj.bias", "ffn", "mlp.up_bias"),
    row(LAYER + "mlp.down_proj.bias", "hidden", "mlp.down_bias"),
)

JOINED_MLP = (
    fuse(LAYER + "mlp.gate_up_proj.weight", "* hidden", {"mlp.gate": "ffn", "mlp.up": "ffn"}),
    row(LAYER + "mlp.down_proj.weight", "hidden ffn", "mlp.down"),
)

ACTIVATIONS = (
    ("silu", "silu"),
    ("silu", "swish"),
    ("gelu_tanh", "gelu_pytorch_tanh"),
    ("gelu_tanh", "gelu_new"),
    ("gelu_tanh", "gelu_fast"),
    ("gelu", "gelu"),
)
LLAMA_ROWS = (EMBED, *NORMS, *ATTENTION, *GATED_MLP, FINAL_NORM, HEAD)


def experts(
    at: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj", router: str = "gate"
) -> tuple[Row, ...]:
    """Write the rows of a mixture whose experts have tensors of their own, below the module ``at``."""
    top = f"{LAYER}{at}." if at else LAYER
    each = f"{top}experts.{{expert}}."
    return (
        row(f"{top}{router}.weight", "expert hidden", "moe.router"),
        row(f"{each}{gate}.weight", "moe_ffn moe_hidden", "moe.gate"),
        row(f"{each}{up}.weight", "moe_ffn moe_hidden", "moe.up"),
        row(f"{each}{down}.weight", "moe_hidden moe_ffn", "moe.down"),
    )


def stacked(at: str = "mlp", router: str = "gate") -> tuple[Row, ...]:
    """Write those of one whose experts are one tensor, and where they are coded a module each, as engines look for it."""
    top = f"{LAYER}{at}." if at else LAYER
    one = {"coded": False}
    return (
        *(replace(each, written={"coded": True}) if "{expert}" in each.name else each for each in experts(at, router=router)),
        fuse(f"{top}experts.gate_up_proj", "expert * moe_hidden", {"moe.gate": "moe_ffn", "moe.up": "moe_ffn"}, written=one),
        row(f"{top}experts.down_proj", "expert moe_hidden moe_ffn", "moe.down", written=one),
    )


DTYPES = (("bf16", "bfloat16"), ("f16", "float16"), ("f32", "float32"))

SIZES = (
    place("layers", "num_hidden_layers"),
    place("hidden", "hidden_size"),
    place("heads", "num_attention_heads"),
    place("kv_heads", "num_key_value_heads", default=lambda c: c["heads"]),
    place("head_dim", "head_dim", default=head_share),
    place("ffn", "intermediate_size"),
    place("vocab", "vocab_size"),
    place("positions", "max_position_embeddings"),
)
# of classes with defaults of their own, which must be said
SAID_SIZES = tuple(replace(field, default=...) if field.field in ("kv_heads", "head_dim") else field for field in SIZES)
# of classes that have no key for the width of a head, though their models read one
SIZES_WITHOUT_HEAD = tuple(replace(field, omit=True) if field.field == "head_dim" else field for field in SIZES)
# one flag gives the four projections of the attention a bias
ATTENTION_BIASES = tuple(place(name, "attention_bias", default=False) for name in ("qkv_bias", "out_bias"))
TOKENS = (
    place("bos", "bos_token_id", default=None),
    place("eos", "eos_token_id", default=None),
    place("pad", "pad_token_id", default=None),
)
NO_PADDING = {"pad_token_id": None}  # of classes that have one past many a vocabulary where a config is silent
TIED = place("tied", "tie_word_embeddings", default=False)
DTYPE = place("dtype", "torch_dtype", "dtype", default="f32", words=DTYPES)


def rope(
    *tops: str,
    types: tuple[str, ...] = ("default", "linear", "llama3", "yarn"),
    called: tuple[str, str] = ("rope_type", "type"),
) -> tuple[Place | Spread, ...]:
    """Write the rows of rotary scaling below the key that is written, and the others that are read; the type is ``called`` so there."""
    llama3 = {"rope_type": "llama3"}
    type_keys = tuple(f"{top}.{name}" for top in tops for name in called)
    older = (("longrope", "su"),) if "longrope" in types else ()

    def keys(name: str) -> tuple[str, ...]:
        return tuple(f"{top}.{name}" for top in tops)

    return (
        place("rope_type", *type_keys, default="default", words=(*((name, name) for name in types), *older), omit=True),
        place("rope_factor", *keys("factor"), only={"rope_type": "linear"}),
        place("rope_factor", *keys("factor"), only=llama3),
        place("rope_low", *keys("low_freq_factor"), only=llama3),
        place("rope_high", *keys("high_freq_factor"), only=llama3),
        place("rope_original", *keys("original_max_position_embeddings"), default=lambda c: c["positions"], only=llama3),
        place("rope_original", *keys("original_max_position_embeddings"), default=lambda c: c["positions"], only=YARN),
        place("rope_factor", *keys("factor"), default=lambda c: number(c, "positions") / number(c, "rope_original"), only=YARN),
        place("rope_beta_fast", *keys("beta_fast"), default=32.0, only=YARN),
        place("rope_beta_slow", *keys("beta_slow"), default=1.0, only=YARN),
        yarn.hf(*tops),
        place("rope_truncated", *keys("truncate"), default=True, only=YARN, omit=True),
        *longrope.hf(*tops),
    )


ROPE = (
    # transformers 5 writes the base among the other rope_parameters
    place("rope_theta", "rope_theta", "rope_parameters.rope_theta", default=10000.0),
    *rope("rope_scaling", "rope_parameters"),
)


def _sections(said: tuple[list[int] | None, bool | None], _: Config) -> tuple[int, ...] | None:
    """Return the sections; transformers takes turns of them whatever the config says, vLLM where it says so."""
    expect(said[1] is not False, "sections that take turns")
    expect(said[0] is None or len(said[0]) == 3, "three sections")
    return tuple(said[0]) if said[0] else None


# as transformers 5 writes all of it, and models are published that have places for images
ROPE_PARAMETERS = (
    place("rope_theta", "rope_parameters.rope_theta", "rope_theta", default=10000.0),
    *rope("rope_parameters", "rope_scaling"),
    Spread(
        *("rope_sections", "rope_parameters.mrope_section", (list[int], bool), _sections),
        lambda c: ((value(c, "rope_sections"), True if value(c, "rope_sections") else None),),
        more=("rope_parameters.mrope_interleaved",),
    ),
)


def rope_percent(default: float) -> Place:
    """Write the row of the part of a head that is rotated, which a class takes for so much where nothing is said."""
    return place("rope_percent", "partial_rotary_factor", "rope_parameters.partial_rotary_factor", default=default)


# What a config.json may say of how texts are generated, and its neutral value: transformers takes it over where a folder has no
# generation_config.json (GenerationConfig.from_model_config). It says nothing about the weights.
GENERATION: Mapping[str, object] = {
    **dict.fromkeys("bad_words_ids begin_suppress_tokens decoder_start_token_id exponential_decay_length_penalty".split()),
    **dict.fromkeys("forced_bos_token_id forced_eos_token_id suppress_tokens".split()),
    **dict.fromkeys("do_sample early_stopping output_attentions output_hidden_states output_scores".split(), False),
    **dict.fromkeys("remove_invalid_values return_dict_in_generate".split(), False),
    **dict.fromkeys("encoder_no_repeat_ngram_size min_length no_repeat_ngram_size".split(), 0),
    **dict.fromkeys("num_beam_groups num_beams num_return_sequences".split(), 1),
    **dict.fromkeys("length_penalty repetition_penalty temperature top_p typical_p".split(), 1.0),
    "diversity_penalty": 0.0,
    "max_length": 20,
    "top_k": 50,
}
# any class sees what comes later, too, where this says so: create_causal_mask of masking_utils.py
CAUSAL: Mapping[str, tuple[object, ...]] = {"is_causal": (True,)}
# Fields of transformers' PretrainedConfig that every family has and that nothing depends on which a model computes or generates.
IDLE = frozenset(
    """
    _name_or_path _attn_implementation_autoset _attn_implementation add_cross_attention architectures attention_dropout auto_map
    chunk_size_feed_forward cross_attention_hidden_size finetuning_task hidden_dropout id2label initializer_range is_decoder
    is_encoder_decoder label2id model_type name_or_path prefix pretraining_tp problem_type resid_pdrop return_dict sep_token_id
    task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torchscript transformers_version use_bfloat16
    unsloth_version
    """.split()
)
IGNORED = IDLE | GENERATION.keys()


def marks_of(said: Sequence[str], config: Config, kinds: Kinds = LAYER_TYPES) -> tuple[int, ...]:
    """Return a mark a layer of ``layer_types``, 1 where it is the second kind; raise Senseless where there is not a kind a layer."""
    expect(len(said) == number(config, "layers") and set(said) <= set(kinds), f"for each layer {' or '.join(kinds)}")
    return tuple(kinds.index(kind) for kind in said)


def kinds_of(config: Config, field: str, kinds: Kinds = LAYER_TYPES) -> list[list[str]]:
    """Return the one ``layer_types`` that says a mark a layer, none where all layers are alike."""
    found = several(config, field)
    return [] if found is None else [[kinds[mark] for mark in found]]


def mixed(dense: Sequence[int] | None, step: int, config: Config) -> list[bool]:
    """Return a mark a layer: every step-th layer is a mixture, but for those that are listed: Qwen's rule."""
    expect(step > 0, "a step")
    return [layer not in (dense or ()) and (layer + 1) % step == 0 for layer in range(number(config, "layers"))]


def dense(config: Config) -> list[int]:
    """Return the numbers of the layers that are no mixture."""
    return [layer for layer, mark in enumerate(marks(config)) if not mark]


def every(step: int, count: int) -> tuple[int, ...]:
    """Return a mark a layer, 1 for each step-th."""
    expect(step > 0, "a step")
    return tuple(int((layer + 1) % step == 0) for layer in range(count))


def _rotated(said: tuple[list[int] | None, int], config: Config) -> tuple[int, ...] | None:
    """Return a mark a layer, 0 for each without positions; None where all have them."""
    listed, interval = said
    count = number(config, "layers")
    expect(not listed or (len(listed) >= count and set(listed) <= {0, 1}), "one mark a layer")
    found = tuple(listed[:count]) if listed else tuple(1 - mark for mark in every(interval, count))
    return found if 0 in found else None


def rotated_layers(config: Config) -> list[int]:
    """Return a mark a layer, 1 for each with rotary positions."""
    return [*(several(config, "rope_layers") or [1] * number(config, "layers"))]


# layers without positions: those with a 0 in the list, or every fourth
ROPE_LAYERS = Spread(
    *("rope_layers", "no_rope_layers", (list[int], 4), _rotated, lambda c: ((rotated_layers(c), 4),)),
    more=("no_rope_layer_interval",),
)


def generation(config: Mapping[str, object]) -> dict[str, object]:
    """Return what a config.json says of generating texts."""
    return {key: config[key] for key, neutral in GENERATION.items() if config.get(key, neutral) not in (None, neutral)}


def said_once(raw: Mapping[str, object], where: str) -> None:
    """Refuse a config that says positions twice and differently: rope_scaling alone is read then, a base among the others lost.

    modeling_rope_utils.py: convert_rope_params_to_dict. Records of several kinds of layers are read together.
    """
    tops = ("rope_parameters", "rope_scaling")
    one, other = (raw.get(top) for top in tops)
    if not (isinstance(one, Mapping) and isinstance(other, Mapping) and one and other):
        return
    if one != other and not any(isinstance(inner, Mapping) for inner in one.values()):
        said = ((f"{top}.{key}", value) for top, each in zip(tops, (one, other), strict=True) for key, value in each.items())
        facts = {"where": where, **{key: f"{value!r}"[:80] for key, value in said}}
        raise BadCheckpoint("the config contradicts itself", facts, remedy=f"leave one: {tops[0]} is not read beside {tops[1]}")


DROPPED = {
    "*.rotary_emb.inv_freq": "rotary buffer",
    "*.attn.masked_bias": "causal mask",
    "*.attn.bias": "causal mask",
}

# what a Llama-shaped config.json says, but for biases and ties
LLAMA_FIELDS: tuple[Field, ...] = (
    *SIZES,
    place("norm_eps", "rms_norm_eps", default=1e-6),
    place("activation", "hidden_act", default="silu", words=ACTIVATIONS),
    *ROPE,
    DTYPE,
    *TOKENS,
)


def dialect(
    architecture: str,
    model_type: str,
    rows: tuple[Row, ...],
    fields: tuple[Field, ...],
    *,
    fixed: Mapping[str, object] | None = None,
    written: Mapping[str, object] | None = None,
    absent: Mapping[str, object] | None = None,
    guards: Mapping[str, tuple[object, ...]] | None = None,
    ignored: str = "",
    prefixes: tuple[str, ...] = ("model.", ""),
    zero_centred: bool = False,
    pads: Mapping[str, Callable[[Config], int]] | None = None,
    dropped: Mapping[str, str] | None = None,
    further: tuple[str, ...] = ("", ""),
) -> Dialect:
    """Write the Hugging Face dialect of a family; ``ignored`` names keys that say nothing about the weights.

    ``absent`` is the default of transformers' config class where the rows say another of a key that is null.
    """
    return Dialect(
        kind=KINDS["hf"],
        architecture=architecture,
        prefixes=prefixes,
        rows=rows,
        stacked=False,
        writes_tied=False,
        further=further,
        zero_centred=zero_centred,
        embedding="none",
        table=Table(
            fields,
            fixed={"model_type": model_type, **(fixed or {})},
            written={"architectures": [architecture], "use_cache": True, **(written or {})},
            absent=absent or {},
            guards={**CAUSAL, **(guards or {})},
            ignored=IGNORED | frozenset(ignored.split()),
        ),
        dropped={**DROPPED, **(dropped or {})},
        optional={},
        pads=pads or {},
    )

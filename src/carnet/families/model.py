"""The *model*: one neutral description of a decoder, from which every dialect's tensors follow.

A model is a set of fields (the canonical config). Which canonical tensors exist is decided by those fields alone: a gated MLP has
a gate, a LayerNorm has a bias, a tied model has no head of its own. A family fixes some fields (its traits) and names the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType

Value = str | int | float | bool | tuple[int, ...] | None
Config = Mapping[str, Value]  # field name -> value; a field that is absent has its neutral value


@dataclass(frozen=True, slots=True)
class Field:
    """One fact about a model."""

    name: str
    kind: type[int] | type[float] | type[bool] | type[str]  # what its value must be
    neutral: Value | EllipsisType  # the value of a model that knows nothing of it; ``...`` where every model must say it
    remark: str  # what it means
    soft: bool = False  # says nothing about the weights' meaning: a target without a place for it may leave it out
    least: int | None = 1  # of an integer, the smallest that makes sense
    many: bool = False  # may be several integers
    remedy: str | None = None  # what a person can do where no config says it


FIELDS = (
    Field("layers", int, ..., "decoder layers"),
    Field("hidden", int, ..., "width of the residual stream"),
    Field("heads", int, ..., "query heads"),
    Field("kv_heads", int, ..., "key and value heads"),
    Field("head_dim", int, ..., "width of one head"),
    Field("ffn", int, ..., "width inside the MLP"),
    Field("vocab", int, ..., "true size of the vocabulary, without padding", remedy="name it with --vocab-size"),
    Field("positions", int, ..., "longest sequence; rows of a learned position table"),
    Field("norm", str, ..., "rms or layer (mean removed, with a bias)"),
    Field("norm_eps", float, ..., "added to the variance"),
    Field("activation", str, ..., "silu, gelu (exact), gelu_tanh"),
    Field("gated", bool, ..., "the MLP multiplies its activation with a second projection"),
    Field("position", str, ..., "rope or learned"),
    Field("rope_theta", float, 10000.0, "base of the rotary frequencies"),
    Field("rope_type", str, "default", "how rotary frequencies are stretched: default, linear, llama3"),
    Field("rope_factor", float, 1.0, "by how much"),
    Field("rope_low", float, None, "llama3: wavelengths above original / low are stretched fully"),
    Field("rope_high", float, None, "llama3: wavelengths below original / high are left alone"),
    Field("rope_original", int, None, "sequence length before stretching"),
    Field("rope_percent", float, 1.0, "part of a head that is rotated"),
    Field("qkv_bias", bool, False, "query, key and value projections have a bias"),
    Field("out_bias", bool, False, "the attention's output projection has a bias"),
    Field("mlp_bias", bool, False, "the MLP's projections have a bias"),
    Field("tied", bool, False, "the output head is the embedding"),
    Field("dtype", str, ..., "element type of the weights, in carnet's words"),
    Field("bos", int, None, "id of the first token of a text", soft=True, least=None, many=True),
    Field("eos", int, None, "id of the last token of a text, or of several", soft=True, least=None, many=True),
    Field("pad", int, None, "id of the padding token", soft=True, least=None, many=True),
    Field("padded_vocab", int, None, "rows that are stored for the vocabulary", soft=True),
    Field("tp", int, 1, "ranks that share every layer", soft=True),
    Field("pp", int, 1, "stages that share the layers", soft=True),
    Field("world", int, 1, "ranks in all", soft=True),
    Field("embedding", str, "none", "how ranks share the embedding: none (a copy each), rows, columns", soft=True),
)
BY_NAME = {field.name: field for field in FIELDS}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One canonical tensor."""

    name: str  # ``layers.{layer}.`` stands before those of a layer
    axes: str  # named axes, outermost first
    when: Mapping[str, Value]  # the fields that a model must have for it to exist
    stage: str  # "first", "last" or "layer": the pipeline stage that holds it


def _layer(name: str, axes: str, **when: Value) -> Tensor:
    return Tensor(f"layers.{{layer}}.{name}", axes, when, "layer")


TENSORS = (
    Tensor("embed", "vocab hidden", {}, "first"),
    Tensor("position", "position hidden", {"position": "learned"}, "first"),
    _layer("attention_norm", "hidden"),
    _layer("attention_norm_bias", "hidden", norm="layer"),
    _layer("attention.q", "kv rep dim hidden"),
    _layer("attention.k", "kv dim hidden"),
    _layer("attention.v", "kv dim hidden"),
    _layer("attention.o", "hidden kv rep dim"),
    _layer("attention.q_bias", "kv rep dim", qkv_bias=True),
    _layer("attention.k_bias", "kv dim", qkv_bias=True),
    _layer("attention.v_bias", "kv dim", qkv_bias=True),
    _layer("attention.o_bias", "hidden", out_bias=True),
    _layer("mlp_norm", "hidden"),
    _layer("mlp_norm_bias", "hidden", norm="layer"),
    _layer("mlp.gate", "ffn hidden", gated=True),
    _layer("mlp.up", "ffn hidden"),
    _layer("mlp.down", "hidden ffn"),
    _layer("mlp.gate_bias", "ffn", gated=True, mlp_bias=True),
    _layer("mlp.up_bias", "ffn", mlp_bias=True),
    _layer("mlp.down_bias", "hidden", mlp_bias=True),
    Tensor("final_norm", "hidden", {}, "last"),
    Tensor("final_norm_bias", "hidden", {"norm": "layer"}, "last"),
    Tensor("head", "vocab hidden", {"tied": False}, "last"),
)
TIED = {"head": "embed"}  # what a tied model stores under the first name is the second


def value(config: Config, name: str) -> Value:
    """Return a field's value, its neutral one where the config does not say it."""
    if name in config:
        return config[name]
    neutral = BY_NAME[name].neutral
    assert not isinstance(neutral, EllipsisType), f"a config without {name!r} was never completed"
    return neutral


def number(config: Config, name: str) -> int:
    """Return the value of a field that is an integer."""
    found = value(config, name)
    assert isinstance(found, int), f"{name} is {found!r}"
    return found


def tensors(config: Config) -> dict[str, Tensor]:
    """Return the canonical tensors that a model has, by name (with ``{layer}`` open)."""
    return {t.name: t for t in TENSORS if all(value(config, field) == wanted for field, wanted in t.when.items())}


def sizes(config: Config) -> dict[str, int]:
    """Return the true length of every named axis."""
    return {
        "layer": number(config, "layers"),
        "hidden": number(config, "hidden"),
        "kv": number(config, "kv_heads"),
        "rep": number(config, "heads") // number(config, "kv_heads"),
        "dim": number(config, "head_dim"),
        "ffn": number(config, "ffn"),
        "vocab": number(config, "vocab"),
        "position": number(config, "positions"),
    }

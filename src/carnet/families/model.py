"""The *model*: one neutral description of a decoder, from which every dialect's tensors follow.

A model is a set of fields (the canonical config). Which canonical tensors exist is decided by those fields alone: a gated MLP has
a gate, a LayerNorm has a bias, a tied model has no head of its own. A family fixes some fields (its traits) and names the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
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
    storage: bool = False  # says how weights are stored, nothing about the model
    soft: bool = False  # says nothing about the weights' meaning: a target without a place for it may leave it out
    least: int | None = 1  # of an integer, the smallest that makes sense
    most: int | None = None  # of an integer, the largest that a machine can list
    many: bool = False  # may be several integers
    remedy: str | None = None  # what a person can do where no config says it


FIELDS = (
    Field("layers", int, ..., "decoder layers", most=1 << 16),
    Field("hidden", int, ..., "width of the residual stream"),
    Field("heads", int, ..., "query heads"),
    Field("kv_heads", int, ..., "key and value heads"),
    Field("head_dim", int, ..., "width of one head"),
    Field("ffn", int, ..., "width inside the MLP"),
    Field("vocab", int, ..., "true size of the vocabulary, without padding", remedy="name it with --vocab-size"),
    Field("positions", int, ..., "longest sequence; rows of a learned position table"),
    Field("norm", str, ..., "rms or layer (mean removed, with a bias)"),
    Field("norm_eps", float, ..., "added to the variance"),
    Field("activation", str, ..., "silu, gelu (exact), gelu_tanh, gelu_quick (x sigmoid(1.702 x)), relu2 (a ReLU, squared)"),
    Field("gated", bool, ..., "the MLP multiplies its activation with a second projection"),
    Field("position", str, ..., "rope, learned or alibi (a bias on the scores that grows with distance)"),
    Field("rope_theta", float, 10000.0, "base of the rotary frequencies"),
    Field("rope_type", str, "default", "how rotary frequencies are stretched: default, linear, llama3, yarn"),
    Field("rope_factor", float, 1.0, "by how much"),
    Field("rope_beta_fast", float, 32.0, "yarn: rotations above which frequencies are left alone"),
    Field("rope_beta_slow", float, 1.0, "yarn: rotations below which frequencies are stretched fully"),
    Field("rope_mscale", float, 1.0, "yarn: scale of the attention"),
    Field("rope_mscale_all", float, 0.0, "yarn: scale of the attention, all dimensions"),
    Field("rope_low", float, None, "llama3: wavelengths above original / low are stretched fully"),
    Field("rope_high", float, None, "llama3: wavelengths below original / high are left alone"),
    Field("rope_original", int, None, "sequence length before stretching"),
    Field("rope_percent", float, 1.0, "part of a head that is rotated"),
    Field("qkv_bias", bool, False, "query, key and value projections have a bias"),
    Field("out_bias", bool, False, "the attention's output projection has a bias"),
    Field("mlp_bias", bool, False, "the MLP's projections have a bias"),
    Field(
        "qk_norm",
        str,
        "none",
        "query and key are normed: none, head (each head for itself), whole (all heads at once), plain (each head, no weight)",
    ),
    Field("window", int, None, "a token sees that many before it; None for all"),
    Field(
        "window_layers",
        int,
        None,
        "1 for each layer that has the window, 0 for each that sees all; None where all are alike",
        many=True,
    ),
    Field("window_every", int, None, "a config's word: every n-th layer has no window", storage=True),
    Field("rope_local_theta", float, None, "base of the rotary frequencies in layers with the window; None for the same"),
    Field("norm_before", bool, True, "what goes into the attention and into the MLP is normed"),
    Field("norm_after", bool, False, "what comes out of them is normed, before it is added"),
    Field("embed_root", bool, False, "the embedding is multiplied by the square root of its width"),
    Field("embed_scale", float, 1.0, "factor on the embedding"),
    Field("residual_scale", float, 1.0, "factor on what a layer adds"),
    Field("logits_divisor", float, 1.0, "the logits are divided by it"),
    Field("attention_scale", float, None, "factor on the attention scores; None for one over the root of a head's width"),
    Field("attention_root", int, None, "the attention scores are divided by its square root; None for a head's width"),
    Field("softcap_attention", float, None, "attention scores x become c tanh(x / c)"),
    Field("softcap_logits", float, None, "logits x become c tanh(x / c)"),
    Field("parallel_residual", bool, False, "attention and MLP read the same stream, and both are added to it at once"),
    Field("one_norm", bool, False, "the norm before the attention serves the MLP too"),
    Field("new_decoder", bool, False, "Falcon's newer decoder, which says how many KV heads it has"),
    Field("experts", int, 0, "experts of a mixture, 0 for none", least=0),
    Field(
        "moe_layers",
        int,
        None,
        "1 for each layer that is a mixture, 0 for each that is not; None where all are alike",
        many=True,
    ),
    Field("moe_ffn", int, None, "width inside one expert"),
    Field("topk", int, None, "experts that a token goes to"),
    Field("shared_ffn", int, 0, "width of the shared experts together, 0 for none", least=0),
    Field("shared_gate", bool, False, "the shared expert is weighed by a gate of its own"),
    Field("router_score", str, "softmax", "how the router scores: softmax or sigmoid"),
    Field("router_bias", bool, False, "a bias chooses experts and does not weigh them"),
    Field("router_normed", bool, True, "the weights of the chosen experts sum to one"),
    Field("router_scale", float, 1.0, "factor on the routed experts' sum"),
    Field("router_groups", int, 1, "groups that the experts are chosen from"),
    Field("router_group_topk", int, 1, "groups that a token may use"),
    Field("router_group_best", int, None, "a group counts as much as so many of its best experts together"),
    Field("router_shift", bool, False, "the router has a bias that weighs, as of any linear layer"),
    Field("router_on_input", bool, False, "the weight of an expert is a factor on what goes into it"),
    Field("moe_bias", bool, False, "the projections of every expert have a bias"),
    Field("glu_offset", float, 0.0, "added to what the gate multiplies"),
    Field("glu_limit", float, None, "the gate is cut off above it, what it multiplies on both sides; None for never"),
    Field("sinks", bool, False, "each query head has a score that goes to no token"),
    Field("rope_interleaved", bool, False, "neighbouring dimensions of a head are rotated together, not halves of it"),
    Field("rope_layers", int, None, "1 for each layer with rotary positions, 0 for each without; None for all", many=True),
    Field("rope_truncated", bool, True, "yarn: the dimensions between which frequencies are stretched partly are rounded"),
    Field("chunk", int, None, "a token sees those of its own chunk of so many alone; None for all"),
    Field("chunk_layers", int, None, "1 for each layer that has the chunks; None where all are alike", many=True),
    Field("temperature", bool, False, "layers without positions sharpen the attention of late tokens"),
    Field("temperature_floor", int, None, "tokens after which they do"),
    Field("temperature_scale", float, None, "by how much"),
    Field("latent", bool, False, "keys and values are kept compressed (multi-head latent attention)"),
    Field("kv_lora", int, 0, "latent attention: width of the compressed keys and values", least=0),
    Field("q_lora", int, 0, "latent attention: width of the compressed queries, 0 where they are not", least=0),
    Field("nope_dim", int, 0, "latent attention: width of a head that is not rotated", least=0),
    Field("rope_dim", int, 0, "latent attention: width of a head that is rotated", least=0),
    Field("v_dim", int, 0, "latent attention: width of a value head", least=0),
    Field("mtp", int, 0, "layers that predict further tokens, after the others", least=0),
    Field("tied", bool, False, "the output head is the embedding"),
    Field("dtype", str, ..., "element type of the weights, in carnet's words", storage=True),
    Field("bos", int, None, "id of the first token of a text", soft=True, least=None, many=True),
    Field("eos", int, None, "id of the last token of a text, or of several", soft=True, least=None, many=True),
    Field("pad", int, None, "id of the padding token", soft=True, least=None, many=True),
    Field("zero_centred", bool, False, "norms are stored less one", storage=True),
    Field("padded_vocab", int, None, "rows that are stored for the vocabulary", storage=True),
    Field("tp", int, 1, "ranks that share every layer", storage=True),
    Field("pp", int, 1, "stages that share the layers", storage=True),
    Field("ep", int, 1, "ranks that share the experts instead of each expert", storage=True),
    Field("moe_tp", int, 1, "ranks that share each expert", storage=True),
    Field("world", int, 1, "ranks in all", storage=True),
    Field("embedding", str, "none", "how ranks share the embedding: none (a copy each), rows, columns", storage=True),
)
BY_NAME = {field.name: field for field in FIELDS}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One canonical tensor."""

    name: str  # ``layers.{layer}.`` stands before those of a layer
    axes: str  # named axes, outermost first
    when: Mapping[str, Value]  # the fields, and what the layer is, that must hold for it to exist
    stage: str  # "first", "last" or "layer": the pipeline stage that holds it
    is_norm: bool = False  # some dialects store it less one


def _layer(name: str, axes: str, **when: Value) -> Tensor:
    return Tensor(f"layers.{{layer}}.{name}", axes, when, "layer", name.endswith("norm"))


GQA: dict[str, Value] = {"mixer": "attention"}
MLA: dict[str, Value] = {"mixer": "mla"}
DENSE: dict[str, Value] = {"mlp": "dense"}
MOE: dict[str, Value] = {"mlp": "moe"}
SHARED: dict[str, Value] = {"mlp": "moe", "shared": True}

TENSORS = (
    Tensor("embed", "vocab hidden", {}, "first"),
    Tensor("position", "position hidden", {"position": "learned"}, "first"),
    _layer("mtp.embed_norm", "hidden", is_mtp=True),
    _layer("mtp.hidden_norm", "hidden", is_mtp=True),
    _layer("mtp.project", "hidden two hidden_in", is_mtp=True),
    _layer("attention_norm", "hidden", norm_before=True),
    _layer("attention_norm_bias", "hidden", norm="layer"),
    _layer("attention.q", "kv rep dim hidden", **GQA),
    _layer("attention.k", "kv dim hidden", **GQA),
    _layer("attention.v", "kv dim hidden", **GQA),
    _layer("attention.o", "hidden kv rep dim", **GQA),
    _layer("attention.q_bias", "kv rep dim", qkv_bias=True, **GQA),
    _layer("attention.k_bias", "kv dim", qkv_bias=True, **GQA),
    _layer("attention.v_bias", "kv dim", qkv_bias=True, **GQA),
    _layer("attention.o_bias", "hidden", out_bias=True, **GQA),
    _layer("attention.sinks", "kv rep", sinks=True, **GQA),
    _layer("attention.q_norm", "dim", qk_norm="head", **GQA),
    _layer("attention.k_norm", "dim", qk_norm="head", **GQA),
    _layer("attention.q_whole_norm", "kv rep dim", qk_norm="whole", **GQA),
    _layer("attention.k_whole_norm", "kv dim", qk_norm="whole", **GQA),
    _layer("attention_out_norm", "hidden", norm_after=True),
    _layer("mla.q", "kv qk hidden", q_compressed=False, **MLA),
    _layer("mla.q_a", "q_lora hidden", q_compressed=True, **MLA),
    _layer("mla.q_a_norm", "q_lora", q_compressed=True, **MLA),
    _layer("mla.q_b", "kv qk q_lora", q_compressed=True, **MLA),
    _layer("mla.kv_a", "kv_lora hidden", **MLA),
    _layer("mla.k_rope", "rope hidden", **MLA),
    _layer("mla.kv_a_norm", "kv_lora", **MLA),
    _layer("mla.k_b", "kv nope kv_lora", **MLA),
    _layer("mla.v_b", "kv v kv_lora", **MLA),
    _layer("mla.o", "hidden kv v", **MLA),
    _layer("mlp_norm", "hidden", norm_before=True, one_norm=False),
    _layer("mlp_norm_bias", "hidden", norm="layer", one_norm=False),
    _layer("mlp.gate", "ffn hidden", gated=True, **DENSE),
    _layer("mlp.up", "ffn hidden", **DENSE),
    _layer("mlp.down", "hidden ffn", **DENSE),
    _layer("mlp.gate_bias", "ffn", gated=True, mlp_bias=True, **DENSE),
    _layer("mlp.up_bias", "ffn", mlp_bias=True, **DENSE),
    _layer("mlp.down_bias", "hidden", mlp_bias=True, **DENSE),
    _layer("mlp_out_norm", "hidden", norm_after=True),
    _layer("moe.router", "expert hidden", **MOE),
    _layer("moe.router_bias", "expert", router_bias=True, **MOE),
    _layer("moe.gate", "expert moe_ffn hidden", gated=True, **MOE),
    _layer("moe.up", "expert moe_ffn hidden", **MOE),
    _layer("moe.down", "expert hidden moe_ffn", **MOE),
    _layer("moe.router_shift", "expert", router_shift=True, **MOE),
    _layer("moe.gate_bias", "expert moe_ffn", gated=True, moe_bias=True, **MOE),
    _layer("moe.up_bias", "expert moe_ffn", moe_bias=True, **MOE),
    _layer("moe.down_bias", "expert hidden", moe_bias=True, **MOE),
    _layer("shared.gate", "shared_ffn hidden", gated=True, **SHARED),
    _layer("shared.up", "shared_ffn hidden", **SHARED),
    _layer("shared.down", "hidden shared_ffn", **SHARED),
    _layer("shared.weigh", "hidden", shared_gate=True, **SHARED),
    _layer("mtp.final_norm", "hidden", is_mtp=True),
    Tensor("final_norm", "hidden", {}, "last", is_norm=True),
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


def marks(config: Config) -> tuple[int, ...]:
    """Return 1 for each layer that is a mixture of experts, 0 for each that is not."""
    found = value(config, "moe_layers")
    return found if isinstance(found, tuple) else (int(number(config, "experts") > 0),) * number(config, "layers")


def layers(config: Config) -> Sequence[Config]:
    """Return what each layer is, the layers that predict further tokens last; layers that are alike share one record.

    A record is the config with ``mixer`` (attention, mla), ``mlp`` (dense, moe), ``shared``, ``q_compressed`` and ``is_mtp`` added.
    """
    common: dict[str, Value] = {
        **config,
        "mixer": "mla" if value(config, "latent") else "attention",
        "q_compressed": bool(value(config, "q_lora")),
        "shared": bool(value(config, "shared_ffn")),
        "is_mtp": False,
    }
    dense, mixture = {**common, "mlp": "dense"}, {**common, "mlp": "moe"}
    found = [mixture if mixed else dense for mixed in marks(config)]
    return found + [{**found[-1], "is_mtp": True}] * number(config, "mtp")


def tensors(config: Config, layer: Config) -> dict[str, Tensor]:
    """Return the canonical tensors that a model has outside its layers, or those of a layer, by name (with ``{layer}`` open)."""
    inside = layer is not config
    found = (t for t in TENSORS if (t.stage == "layer") == inside)
    return {t.name: t for t in found if all(said(layer, field) == wanted for field, wanted in t.when.items())}


def said(config: Config, name: str) -> Value:
    """Return a field's value, or what a layer is."""
    return value(config, name) if name in BY_NAME else config[name]


def canonical(config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield every canonical tensor of a model, layers written out: (name, tensor)."""
    top = tensors(config, config)
    yield from ((name, tensor) for name, tensor in top.items() if tensor.stage == "first")
    kinds: dict[int, dict[str, Tensor]] = {}
    for index, layer in enumerate(layers(config)):
        known = kinds.setdefault(id(layer), tensors(config, layer))
        yield from ((name.replace("{layer}", str(index)), tensor) for name, tensor in known.items())
    yield from ((name, tensor) for name, tensor in top.items() if tensor.stage == "last")


def sizes(config: Config) -> dict[str, int]:
    """Return the true length of every named axis; 0 for those that the model does not have."""
    number_of = {name: found for name in BY_NAME if isinstance(found := _neutral_or(config, name), int)}
    return {
        "layer": number_of["layers"],
        "hidden": number_of["hidden"],
        "kv": number_of["kv_heads"],
        "rep": number_of["heads"] // number_of["kv_heads"],
        "dim": number_of["head_dim"],
        "ffn": number_of["ffn"],
        "vocab": number_of["vocab"],
        "position": number_of["positions"],
        "expert": number_of["experts"],
        "moe_ffn": number_of.get("moe_ffn", 0),
        "shared_ffn": number_of["shared_ffn"],
        "kv_lora": number_of["kv_lora"],
        "q_lora": number_of["q_lora"],
        "nope": number_of["nope_dim"],
        "rope": number_of["rope_dim"],
        "qk": number_of["nope_dim"] + number_of["rope_dim"],
        "v": number_of["v_dim"],
        "two": 2,  # the embedding and the hidden state that a further layer joins
        "hidden_in": number_of["hidden"],
    }


def _neutral_or(config: Config, name: str) -> object:
    return config[name] if name in config else BY_NAME[name].neutral

"""The *model*: one neutral description of a decoder, from which every dialect's tensors follow.

A model is a set of fields (the canonical config). Which canonical tensors exist is decided by those fields alone: a gated MLP has
a gate, a LayerNorm has a bias, a tied model has no head of its own. A family fixes some fields (its traits) and names the rest.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType

from carnet.families.words import BY_NAME, SET, Condition, Config, Value


@dataclass(frozen=True, slots=True)
class Tensor:
    """One canonical tensor."""

    name: str  # ``layers.{layer}.`` stands before those of a layer
    axes: str  # named axes, outermost first
    when: Condition  # what must hold for it to exist
    stage: str  # "first", "last" or "layer": the pipeline stage that holds it
    is_norm: bool = False  # a norm that some dialects store less one


def _layer(name: str, axes: str, **when: object) -> Tensor:
    # the norm inside a Mamba mixer is mamba_ssm's, which knows nothing of less one: megatron/core/ssm/mamba_mixer.py ExtendedRMSNorm
    return Tensor(f"layers.{{layer}}.{name}", axes, when, "layer", name.endswith("norm") and name != "mamba.gated_norm")


GQA: dict[str, Value] = {"mixer": "attention"}
MAMBA: dict[str, Value] = {"mixer": "mamba"}
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
    _layer("attention_norm", "hidden", norm_before=True, mixer=SET),
    _layer("attention_norm_bias", "hidden", norm="layer", mixer=SET),
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
    _layer("mamba.z", "group head wide hidden", **MAMBA),
    _layer("mamba.x", "group head wide hidden", **MAMBA),
    _layer("mamba.b", "group state hidden", **MAMBA),
    _layer("mamba.c", "group state hidden", **MAMBA),
    _layer("mamba.dt", "group head hidden", **MAMBA),
    _layer("mamba.conv_x", "group head wide conv", **MAMBA),
    _layer("mamba.conv_b", "group state conv", **MAMBA),
    _layer("mamba.conv_c", "group state conv", **MAMBA),
    _layer("mamba.conv_x_bias", "group head wide", ssm_conv_bias=True, **MAMBA),
    _layer("mamba.conv_b_bias", "group state", ssm_conv_bias=True, **MAMBA),
    _layer("mamba.conv_c_bias", "group state", ssm_conv_bias=True, **MAMBA),
    _layer("mamba.dt_bias", "group head", **MAMBA),
    _layer("mamba.a_log", "group head", **MAMBA),
    _layer("mamba.d", "group head", **MAMBA),
    _layer("mamba.gated_norm", "group head wide", **MAMBA),
    _layer("mamba.o", "hidden group head wide", **MAMBA),
    _layer("linear_mixer", "hidden hidden_in", mixer="linear"),
    _layer("mlp_norm", "hidden", norm_before=True, one_norm=False, mlp=SET),
    _layer("mlp_norm_bias", "hidden", norm="layer", one_norm=False, mlp=SET),
    _layer("linear_mlp", "hidden hidden_in", mlp="linear"),
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


MIXERS = {"*": "attention", "M": "mamba", "L": "linear"}
MLPS = {"-": "dense", "E": "moe", "l": "linear"}
WIDTHS = {"kv_heads": "layer_kv_heads", "ffn": "layer_ffn"}  # field -> the field that says it for every layer


def blocks(config: Config) -> list[str]:
    """Return what each layer is, in the letters of the field of this name."""
    found = value(config, "blocks")
    alike = "*E" if number(config, "experts") else "*-"
    return found.split() if isinstance(found, str) else [alike] * number(config, "layers")


def marks(config: Config) -> tuple[int, ...]:
    """Return 1 for each layer that is a mixture of experts, 0 for each that is not."""
    return tuple(int("E" in word) for word in blocks(config))


def concerns(config: Config, name: str) -> bool:
    """Say whether a model has anything that a field is about: heads mean nothing where no layer attends."""
    about = BY_NAME[name].of
    found = value(config, "blocks")
    return not about or not isinstance(found, str) or any(letter in found for letter in about)


def matters(config: Config, name: str) -> bool:
    """Say whether a field's value changes what a model computes."""
    moot = BY_NAME[name].moot
    return concerns(config, name) and not (moot is not None and moot(config))


def mixtures(found: Sequence[int]) -> str | None:
    """Return the blocks of a model that has a mixture where the mark is set, and a plain MLP elsewhere."""
    return None if all(found) else " ".join("*E" if mark else "*-" for mark in found)


def layers(config: Config) -> Sequence[Config]:
    """Return what each layer is, the layers that predict further tokens last; layers that are alike share one record.

    A record is the config with ``mixer`` (attention, mla, mamba, linear or nothing), ``mlp`` (dense, moe, linear or nothing),
    ``shared``, ``q_compressed`` and ``is_mtp`` added, and with the sizes of this layer where they differ.
    """
    common: dict[str, Value] = {
        **config,
        "q_compressed": bool(value(config, "q_lora")),
        "shared": bool(value(config, "shared_ffn")),
        "is_mtp": False,
    }
    attention = "mla" if value(config, "latent") else "attention"
    known: dict[tuple[object, ...], Config] = {}
    found: list[Config] = []
    for layer, word in enumerate(blocks(config)):
        own = {field: each[layer] for field, many in WIDTHS.items() if isinstance(each := value(config, many), tuple)}
        key = (word, *own.values())
        if key not in known:
            mixer = next((MIXERS[letter] for letter in word if letter in MIXERS), "")
            mlp = next((MLPS[letter] for letter in word if letter in MLPS), "")
            known[key] = {**common, **own, "mixer": attention if mixer == "attention" else mixer, "mlp": mlp}
        found.append(known[key])
    return found + [{**found[-1], "is_mtp": True}] * number(config, "mtp")


def tensors(config: Config, layer: Config) -> dict[str, Tensor]:
    """Return the canonical tensors that a model has outside its layers, or those of a layer, by name (with ``{layer}`` open)."""
    inside = layer is not config
    found = (t for t in TENSORS if (t.stage == "layer") == inside)
    return {t.name: t for t in found if holds(t.when, layer)}


def holds(when: Condition, config: Config) -> bool:
    """Say whether a condition holds for a model or a layer."""
    found = ((value(config, name) if name in BY_NAME else config[name], wanted) for name, wanted in when.items())
    return all(bool(value) if wanted is SET else value == wanted for value, wanted in found)


def canonical(config: Config) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Yield every canonical tensor of a model, layers written out: (name, tensor, shape)."""
    top = list(_sized(config, config))
    yield from (each for each in top if each[1].stage == "first")
    kinds: dict[int, list[tuple[str, Tensor, tuple[int, ...]]]] = {}
    for index, layer in enumerate(layers(config)):
        if id(layer) not in kinds:
            kinds[id(layer)] = list(_sized(config, layer))
        yield from ((name.replace("{layer}", str(index)), tensor, shape) for name, tensor, shape in kinds[id(layer)])
    yield from (each for each in top if each[1].stage == "last")


def norms(config: Config) -> frozenset[str]:
    """Return the names of the canonical tensors that scale a norm."""
    return frozenset(name for name, tensor, _ in canonical(config) if tensor.is_norm)


def canonical_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return every canonical tensor of a model, layers written out, with its shape."""
    return {name: shape for name, _, shape in canonical(config)}


def _sized(config: Config, layer: Config) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    size = sizes(layer)
    for name, tensor in tensors(config, layer).items():
        yield name, tensor, tuple(size[axis] for axis in tensor.axes.split())


def sizes(config: Config) -> dict[str, int]:
    """Return the true length of every named axis of a model, or of a layer; 0 for those that it does not have."""
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
        "group": number_of["ssm_groups"],
        "head": number_of["ssm_heads"] // max(1, number_of["ssm_groups"]),
        "wide": number_of["ssm_head_dim"],
        "state": number_of["ssm_state"],
        "conv": number_of["ssm_conv"],
        "qk": number_of["nope_dim"] + number_of["rope_dim"],
        "v": number_of["v_dim"],
        "two": 2,  # the embedding and the hidden state that a further layer joins
        "hidden_in": number_of["hidden"],
    }


def _neutral_or(config: Config, name: str) -> object:
    return config[name] if name in config else BY_NAME[name].neutral

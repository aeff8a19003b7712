"""Heterogeneous stacks, as NVIDIA's Puzzle makes them: a record a layer, ``{"attention": {...}, "ffn": {...}}``.

Either part may be ``no_op`` or ``replace_with_linear``. A Hugging Face config holds the list as ``block_configs``, Megatron's arguments
the text of such a config: block_config.py beside nvidia/Llama-3_3-Nemotron-Super-49B-v1 and in NVIDIA's ModelOpt,
megatron/core/transformer/heterogeneous/heterogeneous_config.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carnet.algebra.layout import round_up
from carnet.dialects.configs import Json, Spread
from carnet.dialects.senses import Kind, Senseless, expect, of_kind
from carnet.errors import NotSupported
from carnet.model.fields import Condition, Config, Value
from carnet.model.model import layers, number, value


@dataclass(frozen=True, slots=True)
class Layer:
    """What a config says of one layer."""

    word: str  # as in the field ``blocks``
    group: int  # query heads that share a KV head, 0 where none is
    ffn: int  # width inside the MLP, 0 where none is


Read = Callable[[Any, Config], Sequence[Layer]]  # a key's value, of several a tuple -> the layers; none where all are alike

# the fields that follow from the layers; the sizes of the whole model are those of the first layer that has them, as Megatron wants
MEANINGS: Mapping[str, Callable[[Sequence[Layer], Config], Value]] = {
    "blocks": lambda each, _: " ".join(layer.word for layer in each) or None,
    "layer_kv_heads": lambda each, c: tuple(_kv_heads(layer, c) for layer in each) or None,
    "layer_ffn": lambda each, _: tuple(layer.ffn or 1 for layer in each) or None,
    "kv_heads": lambda each, c: next((_kv_heads(layer, c) for layer in each if layer.group), 1),
    "ffn": lambda each, _: next((layer.ffn for layer in each if layer.ffn), 1),
}


def spread(
    name: str, keys: Mapping[str, Kind], read: Read, spelled: Callable[[Config], object], only: Condition | None = None
) -> Spread:
    """Write the row of a field of ``MEANINGS``, whose keys are of some kinds, read by ``read`` and written by ``spelled``."""
    key, *more = keys
    absent = tuple(keys.values()) if more else keys[key]
    return Spread(name, key, absent, lambda s, c: MEANINGS[name](read(s, c), c), lambda c: (spelled(c),), only or {}, (*more,))


# keys that the classes know beside those that are read, with the values that change nothing
IDLE: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "attention": {
        **dict.fromkeys(("sparsify", "window_length", "num_sink_tokens", "mamba", "llama4"), (None,)),
        **dict.fromkeys(("unshifted_sink", "use_prefill_window_in_sink_attention"), (None, False)),
        "weights_precision": (None, "bf16"),
    },
    "ffn": {
        "sparsify": (None,),
        "moe": (None,),
        "gated": (None, True),
        "hidden_act": (None, "silu"),
        "weights_precision": (None, "bf16"),
    },
}
TEXT = 4 << 20  # characters that describe the layers: of 200 layers they are 50,000
KIND = ("no_op", "replace_with_linear")
SAID = {"attention": {*KIND, "n_heads_in_group"}, "ffn": {*KIND, "ffn_mult", "intermediate_size"}}


def read_blocks(blocks: Sequence[Json] | None, config: Config) -> list[Layer]:
    """Return the layers of a list of ``block_configs``, one for each layer of the model."""
    blocks = blocks or []
    expect(len(blocks) == number(config, "layers"), "a record a layer")
    return [_layer(at, block, number(config, "hidden")) for at, block in enumerate(blocks)]


def _layer(at: int, block: Json, hidden: int) -> Layer:
    parts = {part: record(block, part) for part in IDLE}
    said = {
        f"{part}.{key}": value for part, held in parts.items() for key, value in held.items() if not _idle(part, key, value)
    }
    said |= {key: value for key, value in block.items() if key not in parts and value is not None}
    for key, found in said.items():
        facts = {"key": f"block_configs[{at}].{key}", "found": f"{found!r}"[:80]}
        raise NotSupported("the config says of a layer what carnet cannot carry over", facts)
    attention, mlp = parts.values()
    mixer, after = _kind(attention, "*", "L"), _kind(mlp, "-", "l")
    group = size(attention.get("n_heads_in_group")) if mixer == "*" else 0
    return Layer(mixer + after or ".", group, _width(mlp, hidden) if after == "-" else 0)


def record(said: Json, key: str) -> dict[str, Any]:
    """Return what stands under a key of a record, if it is a record."""
    found = said.get(key)
    if not isinstance(found, dict):
        raise Senseless(f"a record {key!r}")
    return found


def size(found: object) -> int:
    """Return an integer of JSON that is a size."""
    if type(found) is not int or found < 1:
        raise Senseless("a size")
    return found


def _idle(part: str, key: str, said: object) -> bool:
    return key in SAID[part] or (key in IDLE[part] and said in IDLE[part][key])


def _kind(part: Json, usual: str, linear: str) -> str:
    """Return the letter of a block, none for one that does nothing."""
    no_op, replaced = (part.get(key, False) for key in KIND)
    expect({type(no_op), type(replaced)} == {bool} and not (no_op and replaced), "one kind of block")
    return "" if no_op else linear if replaced else usual


def _width(mlp: Json, hidden: int) -> int:
    """Return the width of an MLP: two thirds of a multiple of the hidden size, rounded up to 256; newer configs say it outright.

    The multiple is rounded to six digits before: block_config.py FFNConfig.
    """
    said = mlp.get("intermediate_size")
    multiple = mlp.get("ffn_mult")
    if multiple is None:
        return size(said)
    width = size(round_up(int(2 * round(of_kind(float, multiple), 6) * hidden / 3), 256))
    expect(said is None or said == width, "one width")
    return width


def _kv_heads(layer: Layer, config: Config) -> int:
    """Return the KV heads of a layer, 1 where it has no attention."""
    expect(not layer.group or number(config, "heads") % layer.group == 0, "whole groups of query heads")
    return number(config, "heads") // layer.group if layer.group else 1


def spelled_blocks(config: Config) -> list[dict[str, object]]:
    """Return the ``block_configs`` of a model; widths that are no multiple of 256 come out as others."""
    heads, hidden = number(config, "heads"), number(config, "hidden")
    return [
        {
            "attention": _part(layer["mixer"], "n_heads_in_group", heads // number(layer, "kv_heads")),
            "ffn": _part(layer["mlp"], "ffn_mult", round(3 * number(layer, "ffn") / (2 * hidden), 6)),
        }
        for layer in layers(config)
    ]


def _part(kind: Value, key: str, width: float) -> dict[str, object]:
    return {key: width if kind in {"attention", "dense"} else None, "no_op": not kind, "replace_with_linear": kind == "linear"}


def read_text(said: tuple[str | None, str | None], config: Config) -> Sequence[Layer]:
    """Return the layers that Megatron's arguments describe, none where all are alike: the text of a config, and its path."""
    text, path = said
    if not text:
        if path:
            raise NotSupported(
                "the training arguments name a file that describes the layers, and do not hold its text",
                {"heterogeneous_layers_config_path": path},
                remedy="put the text under 'heterogeneous_layers_config_encoded_json'",
            )
        return ()
    expect(len(text) <= TEXT, "the text of a config")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise Senseless("the text of a config") from None
    expect(isinstance(found, dict), "the text of a config")
    return read_blocks(of_kind(list[dict[str, object]], found.get("block_configs")), config)


def spelled_text(config: Config) -> tuple[object, ...]:
    """Return what Megatron's arguments say of the layers: the text with what Megatron compares with its other arguments, no path.

    megatron/training/arguments.py validate_model_config_args_from_heterogeneous_config; megatron/core asks whether there is a path.
    """
    if not value(config, "layer_ffn"):
        return None, None
    stretched = value(config, "rope_type") != "default"
    described: dict[str, object] = {
        "block_configs": spelled_blocks(config),
        "hidden_act": "silu",  # the only one that it takes
        "hidden_size": value(config, "hidden"),
        "num_attention_heads": value(config, "heads"),
        "num_hidden_layers": value(config, "layers"),
        "rope_scaling": {"rope_type": value(config, "rope_type"), "factor": value(config, "rope_factor")}
        if stretched
        else None,
        "rope_theta": value(config, "rope_theta"),
        "tie_word_embeddings": value(config, "tied"),
    }
    return json.dumps(described, sort_keys=True), ""

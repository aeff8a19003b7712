"""What Megatron's arguments say of single layers: a pattern of letters, a step, a mark a layer, or a text that describes each.

megatron/core/models/gpt/gpt_layer_specs.py, megatron/core/models/hybrid/hybrid_layer_allocation.py.
"""

import re
from collections.abc import Callable, Iterator
from itertools import accumulate, product
from typing import Any

from carnet.dialects.heterogeneous import MEANINGS, read_text, spelled_text
from carnet.dialects.megatron.releases import PATTERNS
from carnet.dialects.senses import Kind, expect
from carnet.model.fields import Config, Value
from carnet.model.model import blocks, concerns, marks, mixtures, number, value


def letters(said: tuple[Any, ...]) -> str | None:
    """Return the pattern of a hybrid: empty where all layers are Mamba-2, None where the model is not a hybrid."""
    old, new, spec, flag, *ratios = said
    patterns = {str(each).replace("|", "") for each in (old, new) if each is not None}  # a bar is where a pipeline stage ends
    expect(len(patterns) < 2, "one pattern")
    if patterns:
        return patterns.pop()
    if not flag and "mamba" not in str(spec):
        return None
    expect(not any(ratios), "a pattern beside ratios")
    return ""


def blocks_of(said: tuple[Any, ...], config: Config) -> str | None:
    """Return what each layer is: as a pattern or a text says, or every n-th is a mixture, or those with a 1 in the list."""
    full, often, *hybrid, text, path, latent = said
    pattern, count = letters((*hybrid,)), number(config, "layers")
    described = MEANINGS["blocks"](read_text((text, path), config), config)
    if described is not None:
        expect(pattern is None and not number(config, "experts"), "layers that are described once")
        return str(described)
    if pattern is not None:
        words = ["".join(found) for found in WORD.findall(pattern or count * "M")]
        sizes, known = {len(words), len("".join(words))}, "M-EG" + "*+"[bool(latent)]
        expect(count in sizes and set("".join(words)) <= set(known), "a letter a layer")
        expect(all(len(word) == 1 or WHOLE.fullmatch(word) for word in words), "what mixes tokens, and an MLP, in brackets")
        return " ".join(words).replace("+", "*")
    step = 1 if often is None else often
    mixed = each(step, lambda layer, step: layer % step == 0, count) if number(config, "experts") else [0] * count
    every = value(config, "variant") == "gdn"
    delta = each(full, lambda layer, step: (layer + 1) % step > 0, count) if every else [0] * count
    alike = not number(config, "experts") and not any(delta)
    return None if alike else mixtures(mixed, "".join("*G"[mark] for mark in delta))


def joined(config: Config) -> dict[str, Value] | None:
    """Return a model whose blocks stand in pairs, what mixes tokens and an MLP, with both in one layer; None where they do not.

    It computes the same. What is said of each block counts where it mixes tokens: layer_number in
    megatron/core/models/hybrid/hybrid_block.py.
    """
    text = " ".join(blocks(config)) if value(config, "hybrid") else ""
    words = PAIR.sub(r"\1\2", text).split()
    if "M" in text or all(len(word) == 1 for word in words):
        return None
    places = (*(range(len(words)) if len(words) == number(config, "layers") else accumulate(map(len, words[:-1]), initial=0)),)
    found = {name: said for name, said in config.items() if concerns(config, name)}
    for name in found.keys() & MARKED:
        said = config[name]
        found[name] = picked if isinstance(said, tuple) and 0 in (picked := tuple(said[at] for at in places)) else None
    alike = len({*words}) == 1 and "*" in text
    kind = "gdn" if "G" in text else "none"
    found |= {"hybrid": False, "halves": max(map(len, text.split())) == 1, "layers": len(words), "variant": kind}
    return found | {"blocks": None if alike else " ".join(words)}


def each(said: int | list[int] | None, rule: Callable[[int, int], bool], count: int) -> list[int]:
    """Return a mark a layer: those of the list, or what a rule makes of a step."""
    if isinstance(said, int):
        expect(said, "a step")
        return [int(rule(layer, said)) for layer in range(count)]
    found = said or []
    expect(len(found) == count and set(found) <= {0, 1}, "one mark a layer")
    return found


HYBRID_KEYS = (
    *PATTERNS,
    "spec",
    "is_hybrid_model",
    "hybrid_attention_ratio",
    "hybrid_mlp_ratio",
)
NO_HYBRID = (str, str, str | list[str], False, 0.0, 0.0)
WORD = re.compile(r"\[([^][]+)\]|(.)")  # a layer of a pattern: what brackets hold together, or a letter
WHOLE = re.compile(r"[M*+G][-E]")  # what they can hold
PAIR = re.compile(r"([*G]) ([-E])")  # two layers that are one of another model
MARKED = frozenset({"window_layers", "rope_layers"})  # fields with a mark a layer
DESCRIBED: dict[str, Kind] = {"heterogeneous_layers_config_encoded_json": str, "heterogeneous_layers_config_path": str}
MARKS: Kind = int | list[int]  # a step, or a mark a layer
HYBRID_SPEC = ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]


def hybrid(config: Config) -> tuple[object, ...]:
    """Return what says that a model is a hybrid, or that it is none."""
    pattern = "".join(blocks(config)).replace("*", "*+"[bool(value(config, "latent"))]) if value(config, "hybrid") else None
    return pattern, pattern, HYBRID_SPEC if pattern else None, False, 0.0, 0.0


def frequencies(config: Config) -> Iterator[tuple[object, ...]]:
    """Yield what says which layers are what: a step where that does, and a mark a layer."""
    delta = ["G" in word for word in blocks(config)]
    steps = [delta.index(False) + 1] if any(delta) and not all(delta) else []  # one number where that says the same
    full = (*steps, [*map(int, delta)]) if value(config, "variant") == "gdn" else (None,)
    alike = () if value(config, "index_layers") else (1,)  # by a list Megatron numbers the layers
    for freq, often in product(full, (*alike, [*marks(config)])):
        yield freq, often, *hybrid(config), *spelled_text(config), (value(config, "hybrid") and value(config, "latent")) or None


def window(said: list[int] | None, _: Config) -> int | None:
    """Return how many tokens a token sees, itself included; Megatron counts those before it."""
    if said is None or said in ([-1, 0], [-1, -1]):
        return None
    expect(len(said) == 2 and said[0] >= 0 and said[1] == 0, "tokens before this one")
    return said[0] + 1


def window_said(config: Config) -> list[int] | None:
    """Return how many tokens to the left and to the right a token sees."""
    return [number(config, "window") - 1, 0] if value(config, "window") else None


def windowed(said: int | list[int] | None, config: Config) -> tuple[int, ...] | None:
    """Return a mark a layer: all but every n-th have the window, or those with a 1 in the list."""
    return None if said is None else tuple(each(said, lambda layer, step: (layer + 1) % step > 0, number(config, "layers")))


def listed(config: Config, name: str, *, turned: bool = False) -> list[int] | None:
    """Return a field that is a mark a layer as a list, or with each mark the other one."""
    found = value(config, name)
    return [mark ^ turned for mark in found] if isinstance(found, tuple) else None


def rotated(said: int | list[int] | None, config: Config) -> tuple[int, ...] | None:
    """Return a mark a layer, 0 where positions are not rotated: in every n-th, or where the list has a 1."""
    without = each(said, lambda layer, step: (layer + 1) % step == 0, number(config, "layers")) if said else []
    return tuple(1 - mark for mark in without) if any(without) else None

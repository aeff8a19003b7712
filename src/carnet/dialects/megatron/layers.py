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
from carnet.model.model import blocks, concerns, further_blocks, marks, mixtures, number, several, unlike_last, value


def letters(said: tuple[Any, ...]) -> str | None:
    """Return the pattern of a hybrid up to its first stroke: empty where all layers are Mamba-2, None where it is no hybrid."""
    old, new, spec, flag, *ratios = said
    patterns: set[str] = {
        each.replace("|", "").split("/")[0] for each in (old, new) if each is not None
    }  # a bar ends a pipeline stage
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
        words = words_of(pattern or count * "M", _attends(config, latent=latent))
        expect(count in {len(words), len("".join(words))}, "a letter a layer")
        return " ".join(words)
    step = 1 if often is None else often
    mixed = each(step, lambda layer, step: layer % step == 0, count) if number(config, "experts") else [0] * count
    every = value(config, "variant") == "gdn"
    delta = each(full, lambda layer, step: (layer + 1) % step > 0, count) if every else [0] * count
    alike = not number(config, "experts") and not any(delta)
    return None if alike else mixtures(mixed, "".join("*G"[mark] for mark in delta))


def words_of(pattern: str, attends: str) -> list[str]:
    """Return the layers of a pattern, a word each, in the letters of ``blocks``; ``attends`` is the letter of its attention."""
    words = ["".join(found) for found in WORD.findall(pattern)]
    expect(set("".join(words)) <= set("M-EG" + attends), "a letter a layer")
    expect(all(len(word) == 1 or WHOLE.fullmatch(word) for word in words), "what mixes tokens, and an MLP, in brackets")
    return [word.replace(attends, "*") for word in words]


def _attends(config: Config, *, latent: bool | None) -> str:
    """Return the letter of a hybrid's attention: without the word for it, what reads an indexer would not be normed.

    megatron/core/transformer/mla_qk_norm_config.py.
    """
    return "*" if not latent else "D" if value(config, "variant") == "dsa" else "+"


MOST = 1 << 10  # layers that predict further tokens, far beyond any model's


def further_said(said: tuple[Any, ...]) -> tuple[int, str]:
    """Return how many further tokens are predicted, and the pattern of the layers for one; "" where nothing says it.

    A pattern has them after strokes, alike: parse_hybrid_pattern; Megatron-Bridge has them apart until the model is built. Layers that
    serve for every token again are stored once: megatron/core/transformer/multi_token_prediction.py.
    """
    count, repeated, apart, *patterns = said
    expect(0 <= (count or 0) <= MOST, f"at most {MOST} layers")
    hybrid = [each.split("/")[1:] for each in patterns if each is not None]
    parts = {(*each,) for each in (*hybrid, [apart or ""] * (count or 0)) if any(each)}
    expect(len(parts) < 2, "one pattern for every further token")
    found = parts.pop() if parts else ()
    expect(len({*found}) < 2 and (not found or count in {None, len(found)}), "the same pattern for every further token")
    number = len(found) if hybrid or found else count or 0
    return (min(number, 1) if repeated else number), "".join(found[:1])


def further_blocks_of(said: tuple[Any, ...], config: Config) -> str | None:
    """Return what the layers for one further token are."""
    *others, latent = said
    number, pattern = further_said((*others,))
    return unlike_last(words_of(pattern, _attends(config, latent=latent)), config) if number and pattern else None


def further_spelled(config: Config) -> tuple[object, ...]:
    """Return what says it: the number, and the pattern's end in a hybrid."""
    return value(config, "mtp") or None, None, None, *hybrid(config)[:2]


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
    kind = "gdn" if "G" in text else "dsa" if value(config, "variant") == "dsa" else "none"
    further = PAIR.sub(r"\1\2", " ".join(further_blocks(config))).split() if number(config, "mtp") else words[-1:]
    found |= {"hybrid": False, "halves": max(map(len, text.split())) == 1, "layers": len(words), "variant": kind}
    found |= {"blocks": None if alike else " ".join(words)}
    return found | {"mtp_blocks": unlike_last(further, found)}


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
WHOLE = re.compile(r"[M*+DG][-E]")  # what they can hold
PAIR = re.compile(r"([*G]) ([-E])")  # two layers that are one of another model
MARKED = frozenset({"window_layers", "rope_layers", "index_layers"})  # fields with a mark a layer
FURTHER_KEYS = ("mtp_num_layers", "mtp_use_repeated_layer", "mtp_hybrid_override_pattern", *PATTERNS)
NO_FURTHER = (int, False, str, str, str)
DESCRIBED: dict[str, Kind] = {"heterogeneous_layers_config_encoded_json": str, "heterogeneous_layers_config_path": str}
MARKS: Kind = int | list[int]  # a step, or a mark a layer
HYBRID_SPEC = ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]


def hybrid(config: Config) -> tuple[object, ...]:
    """Return what says that a model is a hybrid, or that it is none."""
    if not value(config, "hybrid"):
        return None, None, None, False, 0.0, 0.0
    parts = ["".join(blocks(config)), *["".join(further_blocks(config))] * number(config, "mtp")]
    pattern = "/".join(parts).replace("*", _attends(config, latent=bool(value(config, "latent"))))
    return pattern, pattern, HYBRID_SPEC, False, 0.0, 0.0


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
    found = several(config, name)
    return None if found is None else [mark ^ turned for mark in found]


def rotated(said: int | list[int] | None, config: Config) -> tuple[int, ...] | None:
    """Return a mark a layer, 0 where positions are not rotated: in every n-th, or where the list has a 1."""
    without = each(said, lambda layer, step: (layer + 1) % step == 0, number(config, "layers")) if said else []
    return tuple(1 - mark for mark in without) if any(without) else None

"""The *model*: one neutral description of a decoder, from which every dialect's tensors follow.

A model is a set of fields (the canonical config). Which canonical tensors exist is decided by those fields alone: a gated MLP has
a gate, a LayerNorm has a bias, a tied model has no head of its own. A family fixes some fields (its traits) and names the rest.
"""

from collections.abc import Collection, Sequence
from itertools import accumulate
from types import EllipsisType

from carnet.model import adapters
from carnet.model.fields import BY_NAME, SET, Condition, Config, Value
from carnet.model.tensors import AXES, RANK, TENSORS, Canonical, Tensor
from carnet.model.tower import tower


def value(config: Config, name: str) -> Value:
    """Return a field's value, its neutral one where the config does not say it; raise KeyError where there is none."""
    neutral = BY_NAME[name].neutral
    return config[name] if name in config or isinstance(neutral, EllipsisType) else neutral


def number(config: Config, name: str) -> int:
    """Return the value of a field that is an integer; raise KeyError where there is none."""
    found = value(config, name)
    if not isinstance(found, int):
        raise KeyError(name)
    return found


def real(config: Config, name: str) -> float:
    """Return the value of a field that is a float; raise KeyError where there is none."""
    found = value(config, name)
    if not isinstance(found, float):
        raise KeyError(name)
    return found


def several(config: Config, name: str) -> tuple[int, ...] | None:
    """Return the value of a field that is several integers, None where there is none."""
    found = value(config, name)
    return tuple(map(int, found)) if isinstance(found, tuple) else None


def head_share(config: Config) -> int:
    """Return how wide a head is where all of them share the model's width."""
    return number(config, "hidden") // number(config, "heads")


MIXERS = {"*": "attention", "M": "mamba", "S": "s6", "G": "gdn", "L": "linear"}
MLPS = {"-": "dense", "E": "moe", "l": "linear"}
# what a layer has of its own -> the field that says it for every layer
OWN = {
    "kv_heads": "layer_kv_heads",
    "head_dim": "layer_head_dim",
    "own_values": "value_layers",
    "ffn": "layer_ffn",
    "indexed": "index_layers",
}


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


def mixtures(found: Sequence[int], mixers: str = "") -> str | None:
    """Return the blocks of a model that has a mixture where the mark is set, and a plain MLP elsewhere; attention but for ``mixers``.

    >>> mixtures([1, 0], "G*"), mixtures([1, 1])
    ('GE *-', None)
    """
    words = [mixer + "-E"[mark] for mixer, mark in zip(mixers or "*" * len(found), found, strict=True)]
    return None if set(words) == {"*E"} else " ".join(words)


def layers(config: Config) -> Sequence[Config]:
    """Return what each layer is, the layers that predict further tokens last; layers that are alike share one record.

    A record is the config with ``mixer`` (attention, mla, mamba, s6, gdn, linear or nothing), ``mlp`` (dense, moe, linear or nothing),
    ``shared``, ``q_compressed``, ``indexed``, ``own_values``, ``paired`` (the first layer of a head that guesses tokens), ``is_mtp``,
    ``mtp_first`` and ``mtp_last`` (of those for one token) added, and with the sizes of this layer where they differ.
    """
    common: dict[str, Value] = {
        **config,
        "q_compressed": bool(value(config, "q_lora")),
        "shared": bool(value(config, "shared_ffn")),
        "indexed": bool(value(config, "index_heads")),
        "own_values": True,
        **dict.fromkeys(("paired", "is_mtp", "mtp_first", "mtp_last"), False),
    }
    attention = "mla" if value(config, "latent") else "attention"
    known: dict[tuple[object, ...], Config] = {}
    found: list[Config] = []
    for layer, word in enumerate(blocks(config)):
        own: dict[str, Value] = {
            field: each[layer] for field, many in OWN.items() if isinstance(each := value(config, many), tuple)
        }
        own["paired"] = layer == 0 and bool(value(config, "aux"))
        key = (word, *own.values())
        if key not in known:
            known[key] = {**common, **own, **_of_word(word, attention)}
        found.append(known[key])
    # further layers begin anew: the first has an indexer of its own, whoever shares
    words, like = further_blocks(config), {**found[-1], "indexed": common["indexed"], "is_mtp": True}
    ends = [(at == 0, at == len(words) - 1) for at in range(len(words))]
    further = [
        {**like, **_of_word(word, attention), "mtp_first": first, "mtp_last": last}
        for word, (first, last) in zip(words, ends, strict=True)
    ]
    every = found + further * number(config, "mtp")
    return adapters.beside(config, every) if config.get(adapters.FIELD) else every


def _of_word(word: str, attention: str) -> dict[str, Value]:
    mixer = next((MIXERS[letter] for letter in word if letter in MIXERS), "")
    mlp = next((MLPS[letter] for letter in word if letter in MLPS), "")
    return {"mixer": attention if mixer == "attention" else mixer, "mlp": mlp}


def further_blocks(config: Config) -> list[str]:
    """Return what each layer for one further token is, in the letters of ``blocks``."""
    said = value(config, "mtp_blocks")
    return said.split() if isinstance(said, str) else blocks(config)[-1:]


def unlike_last(words: Sequence[str], config: Config) -> str | None:
    """Return the field ``mtp_blocks`` of layers for one further token, None where there is one like the last of the others."""
    return None if [*words] == blocks(config)[-1:] else " ".join(words)


def further(config: Config) -> range:
    """Return the numbers of all layers that predict further tokens."""
    count = number(config, "layers")
    return range(count, count + number(config, "mtp") * len(further_blocks(config)))


def stored_at(config: Config) -> list[tuple[int, int]]:
    """Return under which numbers the two halves of each layer are stored: its own, but where each half counts as a layer.

    >>> stored_at({"layers": 3, "blocks": "*- - *E", "halves": True})
    [(0, 1), (2, 2), (3, 4)]
    """
    return _places(blocks(config), config)


def further_at(config: Config) -> list[tuple[int, tuple[int, int]]]:
    """Return which further token each layer after the others is for, and under which numbers its halves are stored among those."""
    return [(token, at) for token in range(number(config, "mtp")) for at in _places(further_blocks(config), config)]


def _places(words: Sequence[str], config: Config) -> list[tuple[int, int]]:
    if not value(config, "halves"):
        return [(layer, layer) for layer in range(len(words))]
    ends = accumulate(len(word.strip(".")) for word in words)
    return [(end - len(word), end - 1) for end, word in zip(ends, words, strict=True)]


def tensors(config: Config, layer: Config) -> dict[str, Tensor]:
    """Return the canonical tensors that a model has outside its layers, or those of a layer, by their names within it."""
    inside = layer is not config
    found = (t for t in TENSORS if (t.stage == "layer") == inside)
    base = {t.part: t for t in found if holds(t.when, layer)}
    return adapters.added(base, layer, inside=inside) if config.get(adapters.FIELD) else base


def holds(when: Condition, config: Config) -> bool:
    """Say whether a condition holds for a model or a layer."""
    found = ((value(config, name) if name in BY_NAME else config[name], wanted) for name, wanted in when.items())
    return all(bool(value) if wanted is SET else value == wanted for value, wanted in found)


def canonical_shapes(config: Config, parts: Collection[str] = ()) -> dict[Canonical, tuple[int, ...]]:
    """Return every canonical tensor of a model, those of all layers and of a tower, with its shape.

    ``parts`` are those that the rows of a program have: what it holds computed is there then, in the place of what that is computed of.
    """
    top = _sized(config, config, parts)
    found = {tensor.at(): shape for tensor, shape in top if tensor.stage == "first"}
    kinds: dict[int, list[tuple[Tensor, tuple[int, ...]]]] = {}
    for index, layer in enumerate(layers(config)):
        if id(layer) not in kinds:
            kinds[id(layer)] = _sized(config, layer, parts)
        found |= {tensor.at(index): shape for tensor, shape in kinds[id(layer)]}
    found |= {tensor.at(): shape for tensor, shape in top if tensor.stage == "last"}
    found |= {each.tensor: each.shape for each in tower(config)}
    kept = [(name, shape) for name, shape in found.items() if name.trained]
    return found | {name.on(plane): shape for plane in planes(config) for name, shape in kept}


def planes(config: Config) -> list[str]:
    """Return what an optimizer keeps of each weight, in words of its own."""
    return str(value(config, "planes")).split()


def _sized(config: Config, layer: Config, parts: Collection[str]) -> list[tuple[Tensor, tuple[int, ...]]]:
    size, known = sizes(layer), tensors(config, layer).values()
    inside = {part for tensor in known if tensor.part in parts for part in tensor.operands}
    held = [tensor for tensor in known if tensor.part in parts or not (tensor.function or tensor.part in inside)]
    own = ((tensor, size | {RANK: adapters.rank(layer, tensor)} if tensor.of else size) for tensor in held)
    return [(tensor, tuple(size[axis] for axis in tensor.axes)) for tensor, size in own]


def sizes(config: Config) -> dict[str, int]:
    """Return the true length of every named axis of a model, or of a layer; 0 for those that it does not have."""

    def field(name: str) -> int:
        found = config[name] if name in config else BY_NAME[name].neutral
        return found if isinstance(found, int) else 0

    return {axis.name: axis.length(field) for axis in AXES.values()}

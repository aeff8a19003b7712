"""*Adapters* (LoRA, DoRA): what was learned beside the weights of linear layers, W + alpha / rank * B A.

Which weights have one, in which layers, how wide and under which alpha is a field of the model, and so which tensors exist: beside
``attention.q`` there is ``attention.q.a`` (rank | inputs), ``attention.q.b`` (outputs | rank), of DoRA ``attention.q.magnitude``. A
trainer that joins weights may have one A for all of them: then the first's stands for the others', as an embedding for a tied head.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from carnet.errors import BadCheckpoint
from carnet.model.fields import BY_NAME, Config, Value
from carnet.model.tensors import ADAPTERS, BY_PART, MAGNITUDE, A, Canonical, Tensor

FIELD, ONE, ALONE = "adapters", "adapters_one", "adapters_alone"  # fields of the model
DORA, TARGETS = "dora", "targets"
Group = tuple[str, ...]  # weights whose adapters have one A; the first's


@dataclass(frozen=True, slots=True)
class Adapter:
    """What is said of the adapter beside one weight of one layer."""

    rank: int
    alpha: float  # the factor is alpha / rank, whatever the words of a config


Found = Mapping[tuple[str, int], Adapter]  # weight, layer -> its adapter


def described(found: Found, where: Mapping[str, Sequence[int]], *, dora: bool) -> str:
    """Return the field that says these adapters; ``where`` has the layers of each weight, of which some may have none."""
    said: dict[str, object] = {}
    for part in ADAPTERS:
        each = [found.get((part, layer)) for layer in where.get(part, ())]
        if any(each):
            pairs = [(0, 0.0) if one is None else (one.rank, one.alpha) for one in each]
            said[part] = (
                [*pairs[0]]
                if len({*pairs}) == 1
                else {str(layer): [*pair] for layer, pair in zip(where[part], pairs, strict=True) if pair[0]}
            )
    return json.dumps({TARGETS: said, **({DORA: True} if dora else {})}) if said else ""


@cache
def _parsed(text: str) -> Mapping[str, Mapping[str, tuple[int, float]]]:
    """Return what the field says: weight -> layer ("" for all) -> rank and alpha; raise BadCheckpoint where it makes no sense."""
    try:
        said = json.loads(text)[TARGETS]
        every = {part: each if isinstance(each, dict) else {"": each} for part, each in said.items() if part in ADAPTERS}
        return {
            part: {layer: (int(rank), float(alpha)) for layer, (rank, alpha) in each.items()} for part, each in every.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadCheckpoint("what is said of the adapters makes no sense", {"found": text[:80]}) from None


def of_layer(text: str, layer: int) -> Mapping[str, Adapter]:
    """Return the adapters of one layer: weight -> what is said of it."""
    each = {part: said.get(str(layer), said.get("")) for part, said in _parsed(text).items()}
    return {part: Adapter(*pair) for part, pair in each.items() if pair is not None}


def is_uniform(config: Config) -> bool:
    """Say whether all layers that have a weight have an adapter beside it, or none, and alike."""
    return all("" in said for said in _parsed(str(config[FIELD])).values())


def is_dora(config: Config) -> bool:
    """Say whether the adapters are DoRA's."""
    return f'"{DORA}": true' in str(config.get(FIELD, ""))


def groups(config: Config) -> Sequence[Group]:
    """Return the weights whose adapters have one A."""
    return _groups(str(config.get(ONE) or "[]"))


@cache
def _groups(text: str) -> Sequence[Group]:
    return tuple(tuple(each) for each in json.loads(text))


def together(found: Iterable[Group]) -> str:
    """Return the field that says which weights' adapters have one A."""
    listed = sorted({*found})
    return json.dumps(listed) if listed else ""


def beside(config: Config, layers: Sequence[Config]) -> list[Config]:
    """Return what each layer is, with its own adapters; layers that are alike share one record."""
    known: dict[tuple[int, str], Config] = {}
    found = []
    for at, layer in enumerate(layers):
        own = json.dumps({part: [one.rank, one.alpha] for part, one in of_layer(str(config[FIELD]), at).items()})
        found.append(
            known.setdefault(
                (id(layer), own),
                {**layer, FIELD: json.dumps({TARGETS: json.loads(own), **({DORA: True} if is_dora(config) else {})})},
            )
        )
    return found


def added(base: Mapping[str, Tensor], layer: Config, *, inside: bool) -> dict[str, Tensor]:
    """Return the tensors of a layer, or of the model outside of them, with those of its adapters, each behind its weight."""
    alone = bool(layer.get(ALONE))
    here = of_layer(str(layer[FIELD]), 0) if inside else {}
    found: dict[str, Tensor] = {}
    for part, tensor in base.items():
        found |= {} if alone else {part: tensor}
        for own in ADAPTERS[part] if part in here else ():
            if (own.part == stands_for(layer, own.part)) and (is_dora(layer) or not own.part.endswith(MAGNITUDE)):
                found[own.part] = own
    return found


def stands_for(config: Config, part: str) -> str:
    """Return the part of an adapter that is the one of this name, too: the A of the first of those that have one."""
    weight, _, end = part.rpartition(".")
    group = next((each for each in groups(config) if weight in each), None) if end == A else None
    return part if group is None else f"{group[0]}.{A}"


def is_one(config: Config, weights: Group) -> bool:
    """Say whether the adapters of some weights have one A."""
    return len({stands_for(config, f"{weight}.{A}") for weight in weights}) == 1


def adapter_of(layer: Config, weight: str) -> Adapter | None:
    """Return what is said of a weight's adapter in a layer, None where it has none."""
    return of_layer(str(layer[FIELD]), 0).get(weight) if layer.get(FIELD) else None


def rank(layer: Config, tensor: Tensor) -> int:
    """Return how wide a part of an adapter is in a layer; 0 where it is not there."""
    found = adapter_of(layer, tensor.of)
    return 0 if found is None else found.rank


def scale(config: Config, name: Canonical) -> float:
    """Return the factor of the product B A beside a weight: alpha / rank."""
    found = None if name.layer is None else of_layer(str(config[FIELD]), name.layer).get(str(name.tensor.part))
    assert found is not None, f"{name!r} has no adapter"
    return found.alpha / found.rank


def parts_of(name: Canonical, config: Config) -> tuple[Canonical, ...]:
    """Return the parts of a weight's adapter, as the model stores them: A, B, and of DoRA the magnitudes; none where it has none."""
    if not config.get(FIELD) or name.layer is None or name.tensor.part not in of_layer(str(config[FIELD]), name.layer):
        return ()
    a, b, magnitude = (BY_PART[stands_for(config, each.part)].at(name.layer) for each in ADAPTERS[name.tensor.part])
    return (a, b, magnitude) if is_dora(config) else (a, b)


def in_words(config: Config) -> dict[str, str]:
    """Return in a line what adapters a model has, none where it has none.

    >>> in_words({"adapters": described({("mlp.up", 0): Adapter(8, 16.0)}, {"mlp.up": [0, 1]}, dora=False)})
    {'adapters': 'LoRA of rank 8 and alpha 16, beside their model: mlp.up in 1 layer'}
    """
    if not config.get(FIELD):
        return {}
    parsed, alike = _parsed(str(config[FIELD])), dict[tuple[int, float], list[str]]()
    for part, said in parsed.items():
        some = "" if "" in said else f" in {len(said)} layer{'s'[: len(said) > 1]}"
        for pair in {*said.values()}:
            alike.setdefault(pair, []).append(f"{part}{some}")
    kind, where = "DoRA" if is_dora(config) else "LoRA", "without" if config.get(ALONE) else "beside"
    lines = (
        f"rank {rank} and alpha {alpha:g}, {where} their model: {', '.join(parts)}" for (rank, alpha), parts in alike.items()
    )
    return {"adapters": f"{kind} of " + "; ".join(lines)}


def bare(config: Config) -> dict[str, Value]:
    """Return a model without its adapters."""
    return {name: value for name, value in config.items() if name not in (FIELD, ONE, ALONE)}


assert {FIELD, ONE, ALONE} <= BY_NAME.keys()

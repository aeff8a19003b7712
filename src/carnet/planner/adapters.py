"""What stands beside adapters in a target: PEFT's adapter_config.json, or the section of Megatron-Bridge's run_config.yaml."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from carnet.architectures.family import Family
from carnet.architectures.known import dialect_of
from carnet.dialects.adapters import BRIDGE as BRIDGE_NAMES
from carnet.dialects.adapters import PEFT, PEFT_TOP, RENAMED
from carnet.dialects.entries import entries
from carnet.dialects.entry import Entry
from carnet.dialects.rows import Dialect
from carnet.errors import BadRequest, NotSupported
from carnet.formats.adapters import BASE
from carnet.formats.adapters import BRIDGE as SECTION
from carnet.inventory.adapter_configs import CLASSES, parameter_of
from carnet.inventory.adapters import check_in_order
from carnet.model import adapters
from carnet.model.adapters import FIELD, Adapter
from carnet.model.fields import Config
from carnet.model.model import canonical_shapes
from carnet.model.tensors import ADAPTER, A, Canonical

WAYS_OUT = (
    "--to peft writes the adapters alone; --adapter own adds them to their weights; --drop '*.adapter.*' leaves them behind"
)


def check(source: Config, target: Dialect) -> None:
    """Refuse a target that has no place for the adapters of a source, and one for adapters where there are none."""
    if target.kind.alone and not source.get(FIELD):
        raise BadRequest("the checkpoint holds no adapters", {"to": target.name}, remedy="--to hf writes the model")
    if source.get(FIELD) and not target.kind.adapters:
        alone = bool(source.get(adapters.ALONE))
        what = "the folder holds adapters without their model" if alone else "the checkpoint holds adapters beside its weights"
        remedy = (
            "--adapter with this folder, and the base model as the checkpoint, adds them to its weights" if alone else WAYS_OUT
        )
        raise NotSupported(f"{what}, and {target.name} has no place for them", remedy=remedy)


def check_placed(source: Config, wanted: Sequence[Entry], target: Dialect, ranks: int) -> None:
    """Refuse adapters that a target's names cannot say: what it joins has one A, and these are not equal."""
    if not source.get(FIELD):
        return
    placed = {name for entry in wanted for name in entry.names}
    check_in_order(target.kind, {name.tensor.of for name in placed}, ranks)
    lost = [name for name in canonical_shapes(source) if name.tensor.role == ADAPTER and name not in placed]
    if lost:
        facts = {"tensor": lost[0], "others": len(lost) - 1, "to": target.name}
        raise NotSupported(f"{target.name} cannot say the adapter {lost[0]!r}: it joins this weight with others", facts)


def peft_config(family: Family, config: Config, wanted: Sequence[Entry], base: str | None) -> dict[str, object]:
    """Return what adapter_config.json says of the adapters that a folder holds."""
    found: dict[str, Adapter] = {}
    parameters, apart = set[str](), defaultdict[str, dict[str, Adapter]](dict)
    for entry in wanted:
        if entry.name.endswith(PEFT.a):
            name = entry.names[0]
            weight = entry.like.pattern.parts[0][0].removesuffix(f".{A}")
            module = entry.name.removesuffix(PEFT.a).removeprefix(PEFT_TOP)
            parameter = parameter_of(module, gated=bool(entry.like.joined))
            parameters |= {parameter}
            found[parameter or module] = one = _of(config, name, weight)
            if weight.startswith("moe.") and not parameter:
                apart[module.partition(EXPERTS)[0] + EXPERTS][weight] = one
    plain = adapters.bare(config)
    modules = [entry.name.removesuffix(".weight") for entry in entries(dialect_of(family, "hf", plain), plain, None)]
    parameters -= {""}
    # peft makes one parameter of the experts' gates and what they multiply, and takes the usual rank for theirs
    usual = [one for module, one in found.items() if ".experts." in module] or [*found.values()]
    rank, alpha = Counter((one.rank, one.alpha) for one in usual).most_common(1)[0][0]
    pair = rank, alpha
    ranks, alphas = (_patterns({module: each[at] for module, each in _pairs(found).items()}, pair[at]) for at in (0, 1))
    for times, made in _stacked(apart):
        for at, patterns in enumerate((ranks, alphas)):
            patterns |= _patterns({name: each[at] for name, each in _pairs(made).items()}, times * pair[at], 2)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        BASE: base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "target_modules": _targets(found.keys() - parameters, modules),
        **({"target_parameters": sorted({".".join(each.split(".")[-2:]) for each in parameters})} if parameters else {}),
        "rank_pattern": ranks,
        "alpha_pattern": {pattern: _number(each) for pattern, each in alphas.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": adapters.is_dora(config),
        "modules_to_save": None,
        "layers_to_transform": None,
    }


EXPERTS = ".experts."


def _stacked(apart: Mapping[str, Mapping[str, Adapter]]) -> Iterator[tuple[int, dict[str, Adapter]]]:
    """Yield the adapters of the parameters that peft makes of experts' modules, and how many times the usual numbers it gives them.

    It reads no pattern of those modules, and makes one of a gate and what it multiplies that has the ranks of both:
    src/peft/utils/transformers_weight_conversion.py of peft 0.21. Raises NotSupported where they have not one factor.
    """
    one, two = dict[str, Adapter](), dict[str, Adapter]()
    for module, of in apart.items():
        top, gate, up, down = module.replace(*RENAMED), *(of.get(f"moe.{part}") for part in ("gate", "up", "down"))
        if gate and up:
            both = Adapter(gate.rank + up.rank, gate.alpha + up.alpha)
            if len({each.alpha / each.rank for each in (gate, up, both)}) > 1:
                facts = {"module": module, "gate": f"{gate}", "up": f"{up}"}
                raise NotSupported(
                    "peft has one factor for the adapters of a gate and what it multiplies, and these have two", facts
                )
            two[f"{top}gate_up_proj"] = both
        elif up and not gate:
            one[f"{top}up_proj"] = up
        if down:
            one[f"{top}down_proj"] = down
    yield from ((1, one), (2, two))


def _pairs(found: Mapping[str, Adapter]) -> dict[str, tuple[float, float]]:
    return {name: (one.rank, one.alpha) for name, one in found.items()}


def _of(config: Config, name: Canonical, weight: str) -> Adapter:
    found = adapters.of_layer(str(config[FIELD]), name.layer or 0)
    return found[weight]


def _last(module: str, parts: int = 1) -> str:
    return ".".join(module.split(".")[-parts:])


def _targets(found: Collection[str], modules: Sequence[str]) -> list[str]:
    """Return the modules that have adapters: by their last names, or by whole ones where others of a last name have none."""
    lasts = {_last(module) for module in found}
    others = [module for module in modules if _last(module) in lasts and module not in found]
    return sorted(found) if others else sorted(lasts)


def _patterns(values: Mapping[str, float], usual: float, parts: int = 1) -> dict[str, float]:
    """Return the values that are unusual, by the last names of modules where all of one are alike, or by so many of them."""
    alike = defaultdict[str, set[float]](set)
    for module, value in values.items():
        alike[_last(module, parts)].add(value)
    named = {
        _last(module, parts) if len(alike[_last(module, parts)]) == 1 else module: value for module, value in values.items()
    }
    return {name: value for name, value in named.items() if value != usual}


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def bridge_section(config: Config, wanted: Sequence[Entry], base: str | None) -> dict[str, object]:
    """Return what run_config.yaml says of the adapters of a store: of which class of Megatron-Bridge's they are, and how made.

    Raises NotSupported where no class makes them: each has one rank, one alpha, and the same modules in every layer.
    """
    if not config.get(FIELD):
        return {}
    every = {
        name: one
        for name in canonical_shapes(config)
        if name.tensor.role == ADAPTER
        for one in [_of(config, name, name.tensor.of)]
    }
    dense = {one.rank for name, one in every.items() if not name.tensor.each_expert}
    few = {one.rank for name, one in every.items() if name.tensor.each_expert}
    topk = config.get("topk")
    normal = isinstance(topk, int) and {rank * topk for rank in few} == dense
    ranks, alphas = dense if normal else dense | few, {one.alpha for one in every.values()}
    for what, values in (("rank", ranks), ("alpha", alphas)):
        if len(values) > 1:
            facts = {"found": ", ".join(map(str, sorted(values))), "to": "megatron"}
            raise NotSupported(f"Megatron-Bridge has one {what} for all adapters, and these have several", facts)
    if not adapters.is_uniform(config):
        raise NotSupported("Megatron stores the adapters of all layers together, and not every layer has them here")
    apart = [entry.name for entry in wanted if re.search(r"\.adapter\.adapter_\w+\.", entry.name)]
    joined = [
        entry.name for entry in wanted if len(entry.like.parts) > 1 and ".adapter." in entry.name and not _of_experts(entry)
    ]
    if apart and (joined or adapters.is_dora(config)):
        facts = {"joined": joined[0] if joined else "-", "apart": apart[0]}
        raise NotSupported("Megatron-Bridge has no class that makes these adapters", facts)
    modules = {_module(entry.name) for entry in wanted if ".adapter." in entry.name}
    if apart and "linear_fc1" in modules:  # of experts, who have one for both in every class: canonical_lora.py
        modules = modules - {"linear_fc1"} | {"linear_fc1_up", "linear_fc1_gate"}
    kind = CLASSES[2] if apart else CLASSES[1] if adapters.is_dora(config) else CLASSES[0]
    alpha, rank = _number(alphas.pop()), ranks.pop()
    said = {"_target_": kind, "dim": rank, "alpha": alpha, "dropout": 0.0, "target_modules": sorted(modules)}
    experts = {"normalize_moe_lora": normal, "share_expert_adapters": False} if few else {}
    return {SECTION: {**said, **experts, **({BASE: base} if base else {})}}


def _of_experts(entry: Entry) -> bool:
    return any(name.tensor.each_expert for name in entry.names)


PARTS = {
    "adapter_q": "linear_q",
    "adapter_k": "linear_k",
    "adapter_v": "linear_v",
    "adapter_up": "linear_fc1_up",
    "adapter_gate": "linear_fc1_gate",
}


def _module(name: str) -> str:
    """Return what Megatron-Bridge calls a module that has an adapter."""
    module, _, rest = name.partition(".adapter.")
    return PARTS.get(rest.partition(".")[0], _last(module))


assert {part[1:] for part in BRIDGE_NAMES.parts.values()} == PARTS.keys()

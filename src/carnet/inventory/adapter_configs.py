"""What stands beside adapters: their alpha, in the words of PEFT's adapter_config.json or of Megatron-Bridge's run_config.yaml."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from carnet.dialects.adapters import PEFT_TOP
from carnet.dialects.kinds import Kind
from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.formats.adapters import BRIDGE, SAID
from carnet.model.adapters import Adapter
from carnet.model.keys import equal

Json = Mapping[str, object]
OPTION = "--adapter-alpha"
# huggingface/peft 0.21 src/peft/tuners/lora/config.py: keys of LoraConfig that say nothing of what the weights mean ...
IDLE = frozenset(
    """
    auto_mapping base_model_name_or_path ensure_weight_tying exclude_modules inference_mode layers_pattern layers_to_transform
    lora_dropout megatron_core modules_to_save peft_version qalora_group_size revision target_modules target_parameters task_type
    eva_config fan_in_fan_out loftq_config
    """.split()
)
# ... that are read, and those that carnet carries over with these values alone
READ = frozenset("r lora_alpha rank_pattern alpha_pattern".split())
GUARDS: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False,),
    # others change the base model's weights before they are learned beside: convert with path_initial_model_for_weight_conversion
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),
    "use_rslora": (True, False),
    "use_dora": (True, False),
    "use_qalora": (False,),
    "layer_replication": (),
    "trainable_token_indices": (),
    "megatron_config": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
}
CHANGED = "peft's save_pretrained with path_initial_model_for_weight_conversion writes them as an ordinary adapter"
# of Megatron-Bridge's LoRA, DoRA and CanonicalLoRA: src/megatron/bridge/peft/{lora,dora,canonical_lora}.py
CLASSES = (
    "megatron.bridge.peft.lora.LoRA",
    "megatron.bridge.peft.dora.DoRA",
    "megatron.bridge.peft.canonical_lora.CanonicalLoRA",
)
# module around a parameter of all experts -> that parameter's name, which patterns match, without and with a gate
PARAMETERS = (
    (".experts.base_layer", (".experts.up_proj", ".experts.gate_up_proj")),
    (".experts", (".experts.down_proj", ".experts.down_proj")),
)
# of a pattern of peft's, which is a regular expression: one that is quick to match. Nothing repeats that has other than one
# character, and what can be tried in turn is bounded: repeats, and the product of the alternatives of all groups
PLAIN = re.compile(r"(?:\((?:\?:)?|[\w.^$|)-]|\\[.dw-]|\[[\w.-]+\]|(?<=[\w.\]])[*+?])*")
REPEAT, GROUP = re.compile(r"(?<!\()[*+?]"), re.compile(r"\(([^()]*)\)")
REPEATS, WAYS = 3, 64


@dataclass(frozen=True, slots=True)
class Words:
    """What is said of adapters."""

    alpha: float
    rank: int | None  # None where shapes alone say it
    ranks: Mapping[str, int]  # pattern of module -> its own
    alphas: Mapping[str, float]
    rooted: bool  # the factor is alpha over the root of the rank
    dora: bool | None  # None where nothing says it
    end: re.Pattern[str]  # what the name of an A has behind that of its module
    parameters: frozenset[str] = frozenset()  # ends of the names of those that have adapters, not being modules' weights

    def adapter(self, name: str, rank: int, where: str, *, gated: bool) -> Adapter:
        """Return the adapter whose A is called so and is so wide; raise BadCheckpoint where another rank is said.

        It may be that of a gate, too.
        """
        module = self.end.sub("", name).removeprefix(PEFT_TOP)
        module = parameter_of(module, gated=gated) or module
        said = _own(self.ranks, module, self.rank)
        if said is not None and said != rank:
            facts = {"where": where, "tensor": name, "expected": f"{said}, as the config says", "found": rank}
            raise BadCheckpoint(f"the rank of {name!r} contradicts the config", facts)
        if rank < 1:
            raise BadCheckpoint(f"{name!r} has no rank", {"where": where})
        alpha = _own(self.alphas, module, self.alpha)
        assert alpha is not None
        return Adapter(rank, alpha * sqrt(rank) if self.rooted else alpha)

    def check_parameters(self, names: Sequence[str], where: str) -> None:
        """Refuse adapters of experts of whose parameters the names say others than the config.

        peft names the adapter of the only parameter, or of the last, by their module, whichever it is: ParamWrapper.
        """
        modules = {self.end.sub("", name).removeprefix(PEFT_TOP): name for name in names}
        for module in [module for module in modules if module.endswith(".experts")]:
            inside = f"{module}.base_layer"
            first = any(_is_end(self.parameters, parameter_of(inside, gated=gated)) for gated in (False, True))
            if first != (inside in modules) or not _is_end(self.parameters, parameter_of(module, gated=False)):
                facts = {
                    "where": where,
                    "tensor": modules[module],
                    "target_parameters": ", ".join(sorted(self.parameters))[:80],
                }
                remedy = "merge them with peft's merge_and_unload, or train those of down_proj, too"
                raise NotSupported(
                    "adapters of experts are read of both parameters, or of down_proj alone", facts, remedy=remedy
                )


def _is_end(ends: Collection[str], name: str) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def parameter_of(module: str, *, gated: bool) -> str:
    """Return the parameter of all experts that a module is around, which may be that of a gate, too; "" for any other module."""
    return next((module.removesuffix(end) + names[gated] for end, names in PARAMETERS if module.endswith(end)), "")


def words_of(config: Json, kind: Kind, where: str) -> Words:
    """Return what a checkpoint says of its adapters."""
    return _of_peft(config.get(SAID), where) if kind.alone else _of_bridge(config.get(BRIDGE), where)


def _of_bridge(section: object, where: str) -> Words:
    said = section if isinstance(section, Mapping) else {}
    target, alpha = said.get("_target_"), said.get("alpha")
    if target is not None and target not in CLASSES:
        facts = {"where": where, "found": f"{target!r}"[:80], "known": ", ".join(CLASSES)}
        raise NotSupported("the adapters are of a class that carnet does not know", facts)
    if said.get("experts_shared_outer_loras"):
        what = "adapters of experts of which one half is shared have no place in any layout that carnet writes"
        raise NotSupported(what, {"where": where, "said by": "run_config.yaml, peft.experts_shared_outer_loras"})
    if alpha is None:
        remedy = f"name it with {OPTION}: the factor of the adapters is alpha over their rank"
        raise BadRequest(
            "nothing says the alpha of the adapters",
            {"where": where, "looked for": "run_config.yaml, peft.alpha"},
            remedy=remedy,
        )
    dora = None if target is None else target == CLASSES[1]
    return Words(_number("peft.alpha", alpha, where), None, {}, {}, False, dora, re.compile(r"\Z"))


def _of_peft(raw: object, where: str) -> Words:
    said = raw if isinstance(raw, Mapping) else {}
    for key, value in said.items():
        _check(key, value, where)
    rank = said.get("r")
    if type(rank) is not int:
        raise BadCheckpoint("adapter_config.json says no rank", {"where": where, "key": "r", "found": f"{rank!r}"[:80]})
    ranks, alphas = (_patterns(said, key, where) for key in ("rank_pattern", "alpha_pattern"))
    alpha = _number("lora_alpha", said.get("lora_alpha", 8), where)
    rooted, dora = (bool(said.get(key)) for key in ("use_rslora", "use_dora"))
    broken = next((key for key, each in ranks.items() if not each.is_integer()), None)
    if broken is not None:
        raise BadCheckpoint(
            f"adapter_config.json says a rank that is no whole number for {broken!r}", {"where": where, "found": ranks[broken]}
        )
    parameters = said.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(each, str) for each in parameters):
        raise BadCheckpoint(
            "adapter_config.json has no list 'target_parameters'", {"where": where, "found": f"{parameters!r}"[:80]}
        )
    own, end = {key: int(each) for key, each in ranks.items()}, re.compile(r"\.lora_A\.weight\Z")
    return Words(alpha, rank, own, alphas, rooted, dora, end, frozenset(parameters))


def _check(key: str, value: object, where: str) -> None:
    if key in GUARDS:
        if value is not None and not any(equal(value, each) for each in GUARDS[key]):
            facts = {"where": where, "found": f"{value!r}"[:80], "expected": " or ".join(map(repr, GUARDS[key])) or "not set"}
            remedy = CHANGED if key == "init_lora_weights" else None
            raise NotSupported(
                f"adapter_config.json sets {key!r} to a value that carnet cannot carry over", facts, remedy=remedy
            )
    elif key not in READ | IDLE and value:
        facts = {"where": where, "found": f"{value!r}"[:80]}
        raise NotSupported(f"adapter_config.json sets {key!r}, which carnet does not know", facts)


def _patterns(said: Json, key: str, where: str) -> dict[str, float]:
    """Return the numbers of some modules; raise NotSupported for a pattern that is more than names and alternatives."""
    found = said.get(key) or {}
    if not isinstance(found, Mapping):
        raise BadCheckpoint(f"adapter_config.json has no table {key!r}", {"where": where, "found": f"{found!r}"[:80]})
    for pattern in found:
        if not _is_quick(pattern):
            remedy = f"write out the names, or use . \\d [...] | and at most {REPEATS} of * + ?"
            raise NotSupported(
                f"carnet does not match modules by {pattern[:80]!r}", {"where": where, "key": key}, remedy=remedy
            )
    return {pattern: _number(f"{key}.{pattern}", value, where) for pattern, value in found.items()}


def _is_quick(pattern: str) -> bool:
    """Say whether a pattern is one that is matched soon, whatever the name.

    >>> _is_quick(r".*\\.layers\\.(0|1)\\.(?:q|k)_proj"), _is_quick("(a*)*"), _is_quick("(.|.|.)" * 4)
    (True, False, False)
    """
    if not PLAIN.fullmatch(pattern) or len(REPEAT.findall(pattern)) > REPEATS:
        return False
    ways, left = 1, pattern
    while ways <= WAYS and (inner := GROUP.search(left)):
        ways *= inner[1].count("|") + 1
        left = left[: inner.start()] + left[inner.end() :]
    try:
        return ways <= WAYS and bool(re.compile(pattern))
    except (re.error, RecursionError):
        return False


def _number(key: str, value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise BadCheckpoint(f"what is said of the adapters has no number {key!r}", {"where": where, "found": f"{value!r}"[:80]})
    return float(value)


def _own(patterns: Mapping[str, float], module: str, otherwise: float | None) -> float | None:
    """Return the number of a module: the first pattern that is the end of its name counts, as in peft's get_pattern_key."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), otherwise)

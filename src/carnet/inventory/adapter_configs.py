"""What stands beside adapters: their alpha, in the words of PEFT's adapter_config.json or of Megatron-Bridge's run_config.yaml."""

import re
from collections.abc import Mapping
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
    arrow_config fan_in_fan_out loftq_config
    """.split()
)
# ... that are read, and those that carnet carries over with these values alone
READ = frozenset("peft_type r lora_alpha rank_pattern alpha_pattern use_rslora use_dora".split())
GUARDS: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False,),
    # others change the base model's weights before they are learned beside: convert with path_initial_model_for_weight_conversion
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "use_qalora": (False,),
    "layer_replication": (),
    "trainable_token_indices": (),
    "megatron_config": (),
    "alora_invocation_tokens": (),
}
CHANGED = "peft's save_pretrained with path_initial_model_for_weight_conversion writes them as an ordinary adapter"
# of Megatron-Bridge's LoRA, DoRA and CanonicalLoRA: src/megatron/bridge/peft/{lora,dora,canonical_lora}.py
CLASSES = (
    "megatron.bridge.peft.lora.LoRA",
    "megatron.bridge.peft.dora.DoRA",
    "megatron.bridge.peft.canonical_lora.CanonicalLoRA",
)
# module around a parameter of all experts -> that parameter's name, which patterns match
PARAMETERS = ((".experts.base_layer", ".experts.gate_up_proj"), (".experts", ".experts.down_proj"))
PLAIN = re.compile(
    r"(?:\.\*)?[\w.^\\|()-]*"
)  # of a pattern of peft's, which is a regular expression: one that is quick to match


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

    def adapter(self, name: str, rank: int, where: str) -> Adapter:
        """Return the adapter whose A is called so and is so wide; raise BadCheckpoint where another rank is said."""
        module = self.end.sub("", name).removeprefix(PEFT_TOP)
        module = parameter_of(module) or module
        said = _own(self.ranks, module, self.rank)
        if said is not None and said != rank:
            facts = {"where": where, "tensor": name, "expected": f"{said}, as the config says", "found": rank}
            raise BadCheckpoint(f"the rank of {name!r} contradicts the config", facts)
        if rank < 1:
            raise BadCheckpoint(f"{name!r} has no rank", {"where": where})
        alpha = _own(self.alphas, module, self.alpha)
        assert alpha is not None
        return Adapter(rank, alpha * sqrt(rank) if self.rooted else alpha)


def parameter_of(module: str) -> str:
    """Return the parameter of all experts that a module is around, "" for any other module."""
    return next((module.removesuffix(end) + name for end, name in PARAMETERS if module.endswith(end)), "")


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
    return Words(
        alpha, rank, {key: int(each) for key, each in ranks.items()}, alphas, rooted, dora, re.compile(r"\.lora_A\.weight\Z")
    )


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
        try:
            fits = bool(PLAIN.fullmatch(pattern) and re.compile(pattern))
        except re.error:
            fits = False
        if not fits:
            raise NotSupported(f"carnet does not match modules by {pattern[:80]!r}", {"where": where, "key": key})
    return {pattern: _number(f"{key}.{pattern}", value, where) for pattern, value in found.items()}


def _number(key: str, value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise BadCheckpoint(f"what is said of the adapters has no number {key!r}", {"where": where, "found": f"{value!r}"[:80]})
    return float(value)


def _own(patterns: Mapping[str, float], module: str, otherwise: float | None) -> float | None:
    """Return the number of a module: the first pattern that is the end of its name counts, as in peft's get_pattern_key."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), otherwise)

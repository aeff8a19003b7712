"""Every family that carnet knows, and how one is recognised."""

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from itertools import product

from carnet.architectures.cohere import COHERE, COHERE2
from carnet.architectures.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32
from carnet.architectures.dots import DOTS1
from carnet.architectures.eagle import EAGLE3
from carnet.architectures.ernie import ERNIE4_5, ERNIE4_5_MOE
from carnet.architectures.exaone import EXAONE4
from carnet.architectures.falcon import FALCON
from carnet.architectures.family import Family
from carnet.architectures.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA4
from carnet.architectures.glm import GLM4, GLM4_MOE, GLM4_MOE_LITE, GLM_MOE_DSA
from carnet.architectures.gpt import NEMOTRON, STARCODER2
from carnet.architectures.gpt2 import GPT2
from carnet.architectures.gpt_neox import GPT_NEOX
from carnet.architectures.gpt_oss import GPT_OSS
from carnet.architectures.granite import GRANITE
from carnet.architectures.hunyuan import HUNYUAN_V1_DENSE, HUNYUAN_V1_MOE
from carnet.architectures.ling import BAILING_MOE_V2
from carnet.architectures.llama import LLAMA, MISTRAL
from carnet.architectures.llama4 import LLAMA4
from carnet.architectures.mamba import FAMILY as MAMBA
from carnet.architectures.mimo import MIMO
from carnet.architectures.minimax import MINIMAX_M2
from carnet.architectures.ministral import MINISTRAL3
from carnet.architectures.mixtral import MIXTRAL
from carnet.architectures.nemotron_h import MAMBA2, NEMOTRON_H
from carnet.architectures.nemotron_nas import NEMOTRON_NAS
from carnet.architectures.olmo import OLMO2, OLMO3
from carnet.architectures.olmoe import OLMOE
from carnet.architectures.phi import PHI3
from carnet.architectures.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from carnet.architectures.qwen3_next import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from carnet.architectures.seed_oss import SEED_OSS
from carnet.architectures.smollm import SMOLLM3
from carnet.architectures.stablelm import STABLELM
from carnet.architectures.wrappers import WHOLE, WRAPPERS, text_inside, unwrapped, wrapped, wrapper_of
from carnet.dialects import sglang, vllm
from carnet.dialects.adapters import adapted, of_peft
from carnet.dialects.configs import NONE, canonical, lookup, read, strange, unsaid
from carnet.dialects.entries import stored_as
from carnet.dialects.hf import said_once
from carnet.dialects.kinds import KINDS, Kind
from carnet.dialects.megatron.layers import joined
from carnet.dialects.megatron.needs import NEEDS
from carnet.dialects.megatron.programs import Heard, hear, program
from carnet.dialects.megatron.providers import lacked, provided
from carnet.dialects.megatron.pruned import PRUNED
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.rows import Dialect
from carnet.dialects.writing import Misfit, misfits
from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.model.adapters import FIELD
from carnet.model.fields import BY_NAME, Config, Value
from carnet.model.keys import left_out
from carnet.model.model import OWN, blocks, concerns, holds, marks, value

FAMILIES = (
    LLAMA,
    GPT2,
    MISTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    MIXTRAL,
    DEEPSEEK_V3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA4,
    PHI3,
    OLMO2,
    GRANITE,
    QWEN2_MOE,
    OLMOE,
    DEEPSEEK_V2,
    LLAMA4,
    GPT_OSS,
    STARCODER2,
    GPT_NEOX,
    NEMOTRON,
    FALCON,
    MAMBA,
    MAMBA2,
    NEMOTRON_H,
    NEMOTRON_NAS,
    QWEN3_NEXT,
    QWEN3_5,
    QWEN3_5_MOE,
    MINIMAX_M2,
    GLM4,
    GLM4_MOE,
    GLM4_MOE_LITE,
    DEEPSEEK_V32,
    GLM_MOE_DSA,
    SEED_OSS,
    SMOLLM3,
    ERNIE4_5,
    OLMO3,
    EXAONE4,
    COHERE,
    COHERE2,
    STABLELM,
    DOTS1,
    MINISTRAL3,
    MIMO,
    BAILING_MOE_V2,
    HUNYUAN_V1_DENSE,
    HUNYUAN_V1_MOE,
    ERNIE4_5_MOE,
    EAGLE3,
)


Spells = Callable[[Family], Dialect | None]  # how a program spells a family, None where it cannot


def _engine(dialect: Callable[[Dialect, vllm.Spelling], Dialect | None]) -> Spells:
    """Return how an engine spells families, each made when it is asked for, once."""
    made = cache(lambda: {each.name: None if each.vllm is None else dialect(each.hf, each.vllm) for each in FAMILIES})
    return lambda family: made()[family.name]


SPELLED: Mapping[str, Spells] = {  # by kind
    "megatron": lambda family: family.megatron,
    "hf": lambda family: family.hf,
    "trtllm": lambda family: family.trtllm,
    "vllm": _engine(vllm.dialect),
    "sglang": _engine(sglang.dialect),
    "peft": lambda family: of_peft(family.hf),
}


def _because(family: Family, name: str) -> str:
    """Say why a program is no place for a family."""
    if not KINDS[name].releases:
        return family.without
    known = ", ".join(each.name for each in FAMILIES if SPELLED[name](each) is not None)
    return f"carnet does not know what the engine's class of it stores: it knows those of {known}"


def dialect_of(family: Family, name: str, config: Config = NONE, names: Collection[str] = ()) -> Dialect:
    """Return how a program spells a family, in the class that a model is inside of; ``names`` are those of a checkpoint of the kind."""
    found = SPELLED[name](family)
    if found is None:
        raise NotSupported(f"{name} is no place for the family {family.name!r}", {"because": _because(family, name)})
    made = wrapped(found, config, names)
    return adapted(made, family.hf if made.kind.alone else made) if made.kind.adapters and config.get(FIELD) else made


def without(kind: Kind, raw: Mapping[str, object], names: Collection[str], drop: Collection[str]) -> Mapping[str, object]:
    """Return a config that no longer says what is optional and left behind: all tensors of it have names like those to drop."""
    left = {name for name in names if any(fnmatchcase(name, pattern) for pattern in drop)}
    said = dict(raw)
    for pattern, keys in MEGATRON.optional.items() if left and kind.arguments else ():
        among = {name for name in names if fnmatchcase(name, pattern)}
        if among and among <= left:
            said |= {key: become(said[key]) for key, become in keys.items() if said.get(key) is not None}
    return said


def hear_config(kind: Kind, raw: Mapping[str, object], where: str, writer: str, era: str, accept: Sequence[str]) -> Heard:
    """Return training arguments as their program computed with them; a family's own config without what a person accepts.

    Raises NotSupported where the config names a class that carnet does not know, before anything else is looked at.
    """
    accept = [name for name in accept if name != NEEDS and not (kind.arguments and name == PRUNED)]  # neither is an argument
    if names_none(kind, raw):
        return hear(raw, where, written_by=program(writer, "--written-by") if writer else None, era=era, accept=accept)
    spoken = KINDS["hf"] if kind.arguments else KINDS[kind.spoken or kind.name]
    own = {key: said for key, said in raw.items() if not (kind.arguments and key in STORAGE)}
    found = strange(dialect_of(_named(spoken, own, where), spoken.name).table, own)
    accepted = {key for key in found for name in accept if key == name or key.startswith(f"{name}.")}
    for name in accept:
        if not any(key == name or key.startswith(f"{name}.") for key in accepted):
            facts = {"where": where, "option": "--accept", "not known": ", ".join(found) or "nothing"}
            raise BadRequest(f"the config sets no {name!r} that carnet does not know", facts)
    idle = {key: f"{said!r}: carnet does not know it" for key, said in found.items() if not (said or key in accepted)}
    return Heard(left_out(raw, accepted), idle, {key: f"{found[key]!r}: carnet does not know it" for key in accepted})


def of_class(architecture: str) -> Family:
    """Return the family of a Hugging Face class that carnet knows."""
    return next(family for family in FAMILIES if family.hf.architecture == architecture)


def text_of(raw: Mapping[str, object], where: str) -> tuple[Mapping[str, object], str]:
    """Return the config of a text model, and what surrounds it where the class also sees or hears: the field ``wrapper``."""
    wrapper = wrapper_of(raw)
    if wrapper is None:
        return raw, ""
    family = of_class(wrapper.text)
    inner, known = lookup(raw, f"{wrapper.key}.model_type"), (*types_of(family.hf), *wrapper.types)
    if inner is not None and inner not in known:
        facts = {"where": where, "class": wrapper.architecture, "known": ", ".join(map(str, known))}
        raise NotSupported(f"carnet does not know the text model {inner!r} inside of a class that also sees or hears", facts)
    storage = {key: raw[key] for key in STORAGE if key in raw}
    text, rest = unwrapped(left_out(raw, STORAGE), types_of(family.hf)[0], where)
    return {**text, **storage}, rest


def recognise(
    dialect: str, raw: Mapping[str, object], where: str, given: Config, asked: str | None = None
) -> tuple[Family, dict[str, Value]]:
    """Return the family of a config and its canonical fields; ``given`` stands over what the config says.

    Megatron's arguments name no family: it is the one that is ``asked`` for, or the first whose traits they have and whose own
    config can say the rest. Raises BadRequest where a config names another family than is asked for.
    """
    kind = KINDS[KINDS[dialect].spoken or dialect]
    if names_none(kind, raw):
        raw = provided(raw)
        arguments = {**raw, **{MEGATRON_KEYS[name]: said for name, said in given.items()}}
        config = read(MEGATRON.table, arguments, where, canonical(lacked(raw), where))
        _check(config, where)
        return _that_says(config, where, asked)
    if kind.arguments:
        # a Hugging Face config given in place of the training arguments; how norms are stored is for the checkpoint to say
        stored = [raw[key] for key in STORAGE if raw.get(key) is not None]
        family, config = recognise("hf", {key: said for key, said in raw.items() if key not in STORAGE}, where, given, asked)
        return family, {**config, "zero_centred": any(stored) if stored else bool(family.hf.zero_centred)}
    family = _named(kind, raw, where)
    if asked is not None and family is not named(asked):
        facts = {"where": where, "asked": asked, "named": family.name}
        raise BadRequest("the config names another family than --as", facts, remedy="leave out --as")
    spelled = dialect_of(family, kind.name, given)
    said_once(raw, where)
    raw = {**raw, WHOLE: given["wrapper"]} if given.get("wrapper") else raw
    try:
        config = {**family.traits, **read(spelled.table, raw, where), **given}
        _check(config, where)
    except BadCheckpoint as error:
        missing = ", ".join(f"{key}, which is {taken!r} then" for key, taken in unsaid(spelled.table, raw).items())
        error.facts |= {"not there": missing} if missing else {}
        raise
    return family, config


def _check(config: Config, where: str) -> None:
    """Refuse sizes that do not go together, a list that has not a number a layer, and mixtures of nothing."""
    for many in OWN.values():
        listed = value(config, many)
        if isinstance(listed, tuple) and len(listed) != value(config, "layers"):
            facts = {"where": where, "found": len(listed), "expected": f"{value(config, 'layers')}, a number a layer"}
            raise BadCheckpoint(f"{many!r} has another length than the model has layers", facts)
    for many, few, what in SHARING:
        heads, groups = value(config, many), value(config, few)
        if isinstance(heads, int) and isinstance(groups, int) and groups and heads % groups and concerns(config, many):
            raise BadCheckpoint(f"the {what}", {"where": where, many: heads, few: groups})
    if any(marks(config)) and not value(config, "experts"):
        raise BadCheckpoint("layers are mixtures, and there are no experts", {"where": where, "blocks": blocks(config)})


SHARING = (  # heads -> those that they divide among
    ("heads", "kv_heads", "query heads do not divide among the KV heads"),
    ("gdn_values", "gdn_keys", "value heads do not divide among the key heads"),
)
STORAGE = ("layernorm_zero_centered_gamma", "apply_layernorm_1p")  # arguments about storage, whatever the model is
MEGATRON_KEYS = {"vocab": "vocab_size"}


def _named(kind: Kind, raw: Mapping[str, object], where: str) -> Family:
    said, model_type = lookup(raw, kind.class_key), lookup(raw, "model_type")
    if said and kind.class_type is list and not isinstance(said, list):
        facts = {"where": where, "found": repr(said)[:80], "expected": 'a list of names: ["LlamaForCausalLM"]'}
        raise BadCheckpoint(f"the config's {kind.class_key!r} is not a list", facts)
    names = said if isinstance(said, list) else [said] if said else []
    found = list[tuple[Family, Mapping[str, object]]]()
    for family in FAMILIES:
        spelled = SPELLED[kind.name](family)
        if spelled is None:
            continue
        if spelled.architecture in names or (not names and model_type and model_type in types_of(spelled)):
            found.append((family, spelled.table.fixed))
    # NVIDIA's class of Mamba-1 is that of Mamba-2: what one of them has fixed tells them apart
    agreed = [each for each, fixed in found if all(lookup(raw, key) in (None, fixed[key]) for key in fixed)]
    if found:
        return agreed[0] if agreed else found[0][0]
    spoken = " or ".join(repr(each)[:80] for each in names or [model_type] if each)
    what = f"carnet does not know the architecture {spoken}" if spoken else "the config names no architecture"
    raise NotSupported(what, {"where": where, "known": _known(kind)})


def types_of(dialect: Dialect) -> tuple[object, ...]:
    """Return what a class may be called in a config, the name that is written first; nothing where configs do not say it."""
    table, key = dialect.table, "model_type"
    return table.guards.get(key, (table.fixed[key],) if key in table.fixed else ())


def padded(dialect: Dialect, config: Config) -> Config:
    """Return the fields as a dialect's config says them, its padding included."""
    return {**config, **{name: pad(config) for name, pad in dialect.pads.items() if value(config, name)}}


def _known(kind: Kind) -> str:
    spelled = [SPELLED[kind.name](family) for family in FAMILIES]
    around = WRAPPERS if kind.companions else ()
    return ", ".join((*(dialect.architecture for dialect in spelled if dialect is not None), *around))


def names_none(kind: Kind, raw: Mapping[str, object]) -> bool:
    """Say whether a config names no family: Megatron's arguments."""
    return kind.arguments and not lookup(raw, KINDS["hf"].class_key)


def named(name: str) -> Family:
    """Return the family of a name; raise BadRequest where there is none."""
    found = {family.name: family for family in FAMILIES}
    if name not in found:
        raise BadRequest(f"there is no family {name!r}", {"option": "--as", "known": ", ".join(found)})
    return found[name]


def others(family: Family, config: Config, where: str) -> dict[str, bool]:
    """Return the other families whose own config could say a model: whether their files have the same tensors."""
    own = stored_as(family.hf, config)  # the classes that they are inside of put the same before all names
    could = [other for other in FAMILIES if other is not family and not _against(other, config, where)[1]]
    return {other.name: stored_as(other.hf, config) == own for other in could}


def _against(family: Family, config: Config, where: str) -> tuple[bool, dict[str, str]]:
    """Return whether a model is of another kind than a family's, and in which fields it differs from what that can say."""
    fixed = [name for name, wanted in family.traits.items() if not _has(config, name, wanted)]
    alien = fixed + [name for name, wanted in family.needs.items() if not holds({name: wanted}, config)]
    alien += [] if text_inside(config) in ("", family.hf.architecture) else ["wrapper"]
    names = alien or [name for misfit in _unsaid(family, config, where) for name in misfit.fields]
    return bool(alien), {name: _told(name, config) for name in names}


def _unsaid(family: Family, config: Config, where: str) -> list[Misfit]:
    """Return what the config of a family cannot say of a model, in the class that it is inside of."""
    spelled = dialect_of(family, "hf", config)
    return misfits(spelled.table, padded(spelled, config), family.traits, where)


def _that_says(config: dict[str, Value], where: str, asked: str | None) -> tuple[Family, dict[str, Value]]:
    """Return the first family that can say a model, and the model: of a hybrid whose blocks stand in pairs, that with both in one."""
    against: dict[str, tuple[bool, list[str]]] = {}
    further = ""  # the first family that lacks nothing but these layers
    forms = [form for form in (joined(config), config) if form is not None]
    for family, form in product(FAMILIES if asked is None else (named(asked),), forms):
        alien, found = _against(family, form, where)
        if not found:
            return family, form
        if form is forms[0]:
            against[family.name] = alien, [*found.values()]
        if [*found] == ["mtp"]:
            further = further or family.name
    if further:
        raise NotSupported(
            f"the family {further!r} has no layers that predict further tokens, and the training arguments say that there are",
            {"where": where, "nearest": further, "against it": _told("mtp", config)},
            remedy="--drop 'mtp.*' leaves them behind; what the others compute stays the same",
        )
    nearest, (_, reasons) = min(against.items(), key=lambda item: (item[1][0], len(item[1][1])))
    facts: dict[str, object] = {
        "where": where,
        "nearest": nearest,
        "against it": reasons[0],
        **dict(zip(("and", "and also"), reasons[1:3], strict=False)),
    }
    if len(reasons) > 3:
        facts["others"] = len(reasons) - 3
    raise NotSupported(
        "no known family has the features that the training arguments describe"
        if asked is None
        else f"no model of the family {asked!r} has the features that the training arguments describe",
        facts,
        remedy="name the config.json of the model's own class with --config, if docs/families.md has that class",
    )


def _has(config: Config, name: str, wanted: Value) -> bool:
    return value(config, name) == wanted or not concerns(config, name)


def _told(name: str, config: Config) -> str:
    """Return a field in words: its value, and what it says."""
    return f"{name} {value(config, name)!r} ({BY_NAME[name].remark})"

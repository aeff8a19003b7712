"""The programs that write Megatron's checkpoints and load them: what each makes of the arguments that one holds.

A *program* is named as a requirement: ``megatron-lm``, ``megatron-lm==0.17``, ``megatron-bridge``, ``nemo``. These two build from their
own config, whose fields megatron-core honours, and so does whoever builds a model of ``megatron-core`` himself; Megatron-LM hands some
arguments on, which ones by release: releases.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from carnet.dialects.configs import read
from carnet.dialects.megatron.providers import CALLED, unknown
from carnet.dialects.megatron.releases import (
    ACCEPTABLE,
    ARGUMENTS,
    BY_NAME,
    IDLE,
    MARKS,
    NEVER,
    RELEASES,
    STOPS,
    Argument,
    Arguments,
    Idle,
)
from carnet.dialects.megatron.rows import MEGATRON
from carnet.errors import BadOption, BadRequest, CarnetError, NotSupported, shown
from carnet.model.keys import equal

LM, BRIDGE, NEMO, CORE = "megatron-lm", "megatron-bridge", "nemo", "megatron-core"
PROGRAMS = (LM, BRIDGE, NEMO, CORE)
RELEASED = (LM, CORE)  # of the others every release honours what its config says
UNKNOWN = "another program"


@dataclass(frozen=True, slots=True)
class Program:
    """A program, as a person or a checkpoint names it."""

    name: str  # one of PROGRAMS
    release: str = ""  # of Megatron-LM or megatron-core, one of RELEASES; "" where it is not said


@dataclass(frozen=True, slots=True)
class Heard:
    """Arguments as the program computed with them, or the config of a family."""

    said: dict[str, object]  # without what it did not use, and what is accepted
    unused: Mapping[
        str, str
    ]  # argument -> what it says, and what the model has; key that nobody knows -> what asks for nothing
    accepted: Mapping[str, str]  # argument or key -> what it says, and what a person does without


AS_IT_STANDS = Heard({}, {}, {})


def program(word: str, option: str) -> Program:
    """Return the program that a person means; raise BadOption where there is none.

    >>> program("megatron-lm==0.17.1", "--written-by")
    Program(name='megatron-lm', release='0.17')
    """
    name, is_release, version = word.partition("==")
    if name not in PROGRAMS:
        raise BadOption(f"no program is called {name!r}", {"option": option, "known": ", ".join(PROGRAMS)})
    if not is_release or name not in RELEASED:
        return Program(name)
    release = release_of(version)
    if not release:
        known = f"{RELEASES[0]} and older, {', '.join(RELEASES[1:])}"
        raise BadOption(f"carnet knows no release {version!r} of {name}", {"option": option, "known": known})
    return Program(name, release)


def release_of(version: str) -> str:
    """Return the release that a version of Megatron-LM or megatron-core is of; "" where carnet knows none.

    >>> release_of("core_v0.17.1"), release_of("0.9.0"), release_of("1.0")
    ('0.17', '0.15', '')
    """
    numbers = version.removeprefix("core_").removeprefix("v").split(".")
    older = len(numbers) > 1 and all(number.isdigit() for number in numbers[:2]) and [*map(int, numbers[:2])] < [0, 15]
    release = RELEASES[0] if older else ".".join(numbers[:2])
    return release if release in RELEASES else ""


def hear(raw: Arguments, where: str, *, written_by: Program | None = None, era: str = "", accept: Sequence[str] = ()) -> Heard:
    """Return the arguments of a checkpoint as the program that wrote it computed with them.

    ``written_by`` is what a person or the checkpoint says of that program, ``era`` what the files' form says of the release of
    Megatron-LM ("<0.19" or ">=0.19"), or the job that runs ("==0.16"), or ""; the names of the arguments say more. ``accept`` are those
    of ACCEPTABLE that a person does without.
    Raises BadRequest where releases compute different models and nothing tells which one wrote this.
    """
    strange = {name: f"carnet does not know that {CALLED[name]}" for name in unknown(raw)}
    for name in accept:
        if name not in {*ACCEPTABLE, *CALLED}:
            raise BadRequest(
                f"nobody can do without {name!r}", {"option": "--accept", "known": ", ".join((*ACCEPTABLE, *CALLED))}
            )
    told = {name: value for name, value in raw.items() if value is not None or name in BY_NAME}
    given_up = {**ACCEPTABLE, **strange}
    accepted = {name: f"{raw[name]!r}: {given_up[name]}" for name in accept if name in given_up and _is_set(raw.get(name))}
    told = {name: value for name, value in told.items() if name not in accepted}
    if written_by is not None and written_by.name != LM:
        outcomes = {written_by.name: honoured(told, written_by.release or known_release("", era))}
    else:
        outcomes = {release: used(told, release) for release in _releases(told, written_by, era)}
        if written_by is None and any(_is_foreign(name) for name, value in raw.items() if value is not None):
            outcomes[UNKNOWN] = honoured(told, known_release("", era))
    found = _one(raw, outcomes, where)
    _refuse_others(found, where)
    unused = {
        name: f"{value!r}, the model has {found[name]!r}" if _is_set(found.get(name)) else f"{value!r}, the model has none"
        for name, value in told.items()
        if name in BY_NAME and _is_set(value) and not equal(found.get(name), value) and not equal(value, BY_NAME[name].default)
    }
    return Heard(found, unused, accepted)


def known_release(writer: str, era: str) -> str:
    """Return the release that a requirement or a job names, "" where neither does."""
    named = program(writer, "--written-by").release if writer else ""
    return named or (era.removeprefix("==") if era.startswith("==") else "")


def _is_set(value: object) -> bool:
    return value is not None and value is not False


def _is_foreign(name: str) -> bool:
    return name in BY_NAME and BY_NAME[name].since == NEVER


def _releases(told: Arguments, written_by: Program | None, era: str) -> Iterable[str]:
    """Return the releases of Megatron-LM that may have written arguments: one that has a name wrote it, none need have all."""
    if written_by is not None and written_by.release:
        return (written_by.release,)
    known = [row for row in (*ARGUMENTS, *MARKS) if row.name in told and row.since != NEVER]
    low = max((RELEASES.index(row.since) for row in known), default=0)
    high = min((RELEASES.index(row.until) for row in known), default=len(RELEASES) - 1)
    # a name from before comes along where a run took its arguments from an older checkpoint
    within = RELEASES[low : high + 1] if low <= high else RELEASES[low:]
    border = era.lstrip("<>=")
    if era == f"=={border}":
        return (border,)
    # arguments of a later run may have been saved once more by an older megatron-core: their names say more than the store's form
    return [release for release in within if not era or (release < border) == era.startswith("<")] or within


def used(told: Arguments, release: str) -> dict[str, object] | None:
    """Return the arguments that a release of Megatron-LM uses; None where it builds nothing, or what no other program computes."""
    has = {name: value for name, value in told.items() if _has(BY_NAME.get(name), release)}
    return _but_idle(told, has, [idle for idle in IDLE if idle.since <= release <= idle.until])


def stopped(told: Arguments, release: str) -> str:
    """Name the argument with which a release of Megatron-LM builds nothing that another program computes."""
    stops = (idle for idle in IDLE if idle.instead is STOPS and idle.since <= release <= idle.until)
    return next(idle.name for idle in stops if told.get(idle.name) is not None and idle.when(told))


def honoured(told: Arguments, release: str) -> dict[str, object] | None:
    """Return what a release of megatron-core ("" for any) uses of arguments that all reach it."""
    return _but_idle(told, told, [idle for idle in IDLE if idle.core and idle.since <= (release or RELEASES[-1]) <= idle.until])


def _but_idle(told: Arguments, has: Arguments, idle: Iterable[Idle]) -> dict[str, object] | None:
    """Return arguments without what does not reach the model; None where there is no model."""
    found = dict(has)
    for row in idle:
        if found.get(row.name) is None or not row.when(told):
            continue
        if row.instead is STOPS:
            return None
        found[row.name] = row.instead
    return found


def _has(row: Argument | None, release: str) -> bool:
    return row is None or (row.since != NEVER and row.since <= release <= row.until)


def _one(raw: Arguments, outcomes: Mapping[str, dict[str, object] | None], where: str) -> dict[str, object]:
    """Return what all releases make of the arguments; refuse where some make something else of them."""
    found = {release: one for release, one in outcomes.items() if one is not None}
    if not found:
        remedy = f"name the program that trained it: --written-by {BRIDGE}"
        stops = {name: raw[name] for name in (stopped(raw, release) for release in outcomes if release in RELEASES)}
        why = {f"{name} {value!r}": "builds nothing here, or what no other program computes" for name, value in stops.items()}
        raise BadRequest(f"no release of {LM} computes with these arguments", {"where": where, **why}, remedy=remedy)
    first = next(iter(found))
    if all(one == found[first] for one in found.values()):
        return found[first]
    models = {release: model_of(one) for release, one in found.items()}
    if all(model == models[first] for model in models.values()):
        return found[first]
    facts: dict[str, object] = {"where": where}
    for name, value in raw.items():
        meant: dict[str, list[str]] = {}
        for release, one in found.items():
            has = one.get(name)
            word = "used" if equal(has, value) else f"{has!r} instead" if _is_set(has) else "not used"
            meant.setdefault(word, []).append(release)
        if len(meant) > 1:
            facts[f"{name} {value!r}"] = "; ".join(f"{', '.join(releases)}: {what}" for what, releases in meant.items())
    words = [BRIDGE if release == UNKNOWN else f"{LM}=={release}" for release in (first, [*found][-1])]
    remedy = f"say which one trained it: --written-by {words[0]}, or --written-by {words[1]}"
    raise BadRequest(f"releases of {LM} compute different models with these arguments", facts, remedy=remedy)


def model_of(said: Arguments) -> object:
    """Return the model that arguments describe, or why they describe none."""
    try:
        return read(MEGATRON.table, {**said, "vocab_size": said.get("vocab_size") or 1}, "")
    except CarnetError as error:
        return error.what, dict(error.facts)


def _refuse_others(found: Arguments, where: str) -> None:
    """Refuse what makes another model of the same weights, and says so itself; and what may."""
    for name, strange in unknown(found).items():
        facts = {"where": where, name: shown(strange)}
        remedy = (
            f"--accept {name}, if the config's other words say all of the model; or --config FILE that names what carnet knows"
        )
        raise NotSupported(f"carnet does not know this {CALLED[name]}, which may make another model", facts, remedy=remedy)
    for name, what in ACCEPTABLE.items():
        if _is_set(found.get(name)):
            facts = {"where": where, name: repr(found[name]), "there": what}
            remedy = f"--accept {name}, if the target may do without it"
            raise NotSupported(f"the model computes with {name!r}, and no target would", facts, remedy=remedy)

"""Everything that lies in a target's folder is accounted for, whoever put it there.

The files that the examination itself reads (weights, their config and index) are compared in what they mean. Of all others someone who
is not the target must know what they hold: a plan, a folder of a tokenizer, the source, at last the target's own document. What is left
over is a finding where a loader would take weights from it or execute it, and is named where nobody can say what it must be.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from carnet.errors import CarnetError, shown
from carnet.examiner.compare import Finding
from carnet.formats.files import digest_file
from carnet.formats.jsons import read_object
from carnet.formats.side_files import UNKNOWN, Kind, kind_of
from carnet.storage.protocol import FILE, Folder, walk

WORDS = "tokenizer"  # along with it goes what a target by another program may have, and nobody can compare
MACHINERY = {"journal.jsonl", "journal.jsonl.new"}  # what a run that was killed at its last moment leaves behind
MAP = "auto_map"  # of a config: loading it runs code
# so does an implementation that is a repository (transformers/integrations/hub_kernels.py fetches and imports it)
KERNELS = ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")
RESAVED = "transformers_version"  # what transformers changes whenever it saves a config again


@dataclass(frozen=True, slots=True)
class Known:
    """Someone who says what files must hold: by their digests, or as a folder that has them."""

    who: str  # "the plan", "the source", "the carnet"
    files: Mapping[str, str] = field(default_factory=dict)  # path below the target -> digest
    folder: Folder | None = None
    whole: bool = False  # the target holds nothing else
    accused: bool = False  # the target itself: it can contradict a file, and nobody else has said that a file is right


@dataclass(frozen=True, slots=True)
class Account:
    """What was found in a folder."""

    findings: tuple[Finding, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)  # digest of every file that is accounted for and holds no tensors
    beside: tuple[str, ...] = ()  # what no program reads
    unsure: tuple[str, ...] = ()  # what a program reads, and nobody says what it must be


def account(
    base: Folder, *, data: Collection[str], read: Collection[str], known: Sequence[Known], own: Collection[str]
) -> Account:
    """Account for every file below a folder.

    ``data`` are the files that hold tensors, ``read`` the others whose meaning was compared, ``own`` those that are carnet's.
    Who comes first in ``known`` is believed first; those who have a folder say nothing of what was read.
    """
    findings: list[Finding] = []
    files, beside, unsure, seen = dict[str, str](), list[str](), list[str](), set[str]()
    strict, planned = any(each.whole for each in known), any(each.whole and not each.accused for each in known)
    for name, there in walk(base):
        label, kind = shown(name), _kind(name)
        seen.add(name)
        if there != FILE and not (there == "a link" and not strict and base.kind(name) == FILE):
            findings.append(Finding("not a file", label, label, f"{there}; a target is made of files"))
        elif name in data or name in own:
            continue
        else:
            digest = digest_file(base, name)[1]
            problem, told = _compared(base, name, digest, known, meant=name in read)
            if problem is not None:
                findings.append(problem)
            elif (
                any(not each.accused for each in told) or (told and not kind.loaded) or (name in read and (told or not strict))
            ):
                files[name] = digest
            elif not kind.loaded or name in MACHINERY:
                beside.append(label)
            elif name in read or planned or kind.along != WORDS or (strict and not told):
                findings.append(Finding(*_unknown(label, kind, known, told)))
            elif added := _executed(base, name):
                findings.append(
                    Finding(f"{added} was added", label, label, "loading it executes code that the source does not name")
                )
            else:
                unsure.append(label)
                files[name] = digest
    findings += [
        Finding("missing", shown(name), shown(name), f"{each.who} names it, the target lacks it")
        for each in known
        for name in sorted(each.files)
        if name not in seen  # a folder of that name is not the file
    ]
    return Account(tuple(findings), files, tuple(beside), tuple(unsure))


def _kind(name: str) -> Kind:
    """Return what a file is; what nobody loads at the top is loaded by nobody in a folder that no row names either."""
    kind, last = kind_of(name), kind_of(name.rsplit("/", 1)[-1])
    return last if kind is UNKNOWN and not last.loaded else kind


def _compared(
    base: Folder, name: str, digest: str, known: Sequence[Known], *, meant: bool
) -> tuple[Finding | None, list[Known]]:
    """Return what is wrong with a file, and who said what it must hold."""
    told = list[Known]()
    for each in known:
        expected = each.files.get(name)
        if expected is not None and expected != digest:
            label = shown(name)
            return Finding("file differs", label, label, f"{each.who} has {expected}, found {digest}"), []
        if expected is not None:
            told.append(each)
        if each.folder is None or meant or told or each.folder.kind(name) != FILE:
            continue
        theirs = digest_file(each.folder, name)[1]
        if theirs != digest and not _same_json(each.folder, base, name):
            return Finding("file differs", shown(name), shown(name), _detail(each.who, name, digest, theirs, known)), []
        told.append(each)
    return None, told


def _detail(who: str, name: str, digest: str, theirs: str, known: Sequence[Known]) -> str:
    knows = any(each.files.get(name) == digest for each in known)
    hint = "; the carnet has it so: if it was brought from elsewhere, --tokenizer DIR" if knows else ""
    return f"{who} has {theirs}, found {digest}{hint}"


def _same_json(ours: Folder, theirs: Folder, name: str) -> bool:
    """Say whether two JSON files say the same, however they are written."""
    if not name.endswith(".json"):
        return False
    try:
        a, b = (read_object(root, name) for root in (ours, theirs))
    except CarnetError:
        return False
    a.pop(RESAVED, None)
    b.pop(RESAVED, None)
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _unknown(label: str, kind: Kind, known: Sequence[Known], told: Sequence[Known]) -> tuple[str, str, str, str]:
    who = next((each.who for each in known if each.whole and each not in told), "the source")
    hint = "; its carnet alone names it: if it was brought from elsewhere, --tokenizer DIR" if told else ""
    return f"not in {who}", label, label, f"{kind.what}: a loader may read or execute it{hint}"


def _executed(base: Folder, name: str) -> str:
    """Return the key by which a config names code, "" where it names none."""
    if not name.endswith(".json"):
        return ""
    try:
        return min((key for key, _ in executed(read_object(base, name))), default="")
    except CarnetError:
        return ""


def executed(data: object) -> set[tuple[str, str]]:
    """Return what loading a config executes, however deep: (key, the code that it names, as JSON); a part of a map may go along."""
    if not isinstance(data, Mapping):
        return {found for each in data for found in executed(each)} if isinstance(data, list) else set()
    named = data.get(MAP, {})
    parts = [(MAP, part) for part in (named.items() if isinstance(named, Mapping) else [named])]
    parts += [(key, data[key]) for key in KERNELS if "/" in json.dumps(data.get(key))]
    return {(key, json.dumps(part)) for key, part in parts}.union(*(executed(each) for key, each in data.items() if key != MAP))

"""Everything that lies in a target's folder is accounted for, whoever put it there.

The files that the examination itself reads (weights, their config and index) are compared in what they mean. Of all others someone who
is not the target must know what they hold: a plan, a folder of a tokenizer, the source, at last the target's own document. What is left
over is a finding where a loader would take weights from it or execute it, and is named where nobody can say what it must be.
"""

import json
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from carnet.errors import CarnetError, MachineFailed
from carnet.examiner.compare import Finding
from carnet.examiner.frames import file_digest
from carnet.formats.files import shown
from carnet.formats.jsons import read_object
from carnet.formats.side_files import UNKNOWN, Kind, kind_of

HUB = re.compile(r"(\.\./)+blobs/[0-9a-f]{40,64}")  # where the files of a snapshot in the Hugging Face cache lead
WORDS = "tokenizer"  # along with it goes what a target by another program may have, and nobody can compare
MACHINERY = {"journal.jsonl", "journal.jsonl.new"}  # what a run that was killed at its last moment leaves behind
SPECIAL = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
MAP = "auto_map"  # of a config: loading it runs code
# so does an implementation that is a repository (transformers/integrations/hub_kernels.py fetches and imports it)
KERNELS = ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")
RESAVED = "transformers_version"  # what transformers changes whenever it saves a config again


@dataclass(frozen=True, slots=True)
class Known:
    """Someone who says what files must hold: by their digests, or as a folder that has them."""

    who: str  # "the plan", "the source", "the carnet"
    files: Mapping[str, str] = field(default_factory=dict)  # path below the target -> digest
    folder: Path | None = None
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
    base: Path, *, data: Collection[str], read: Collection[str], known: Sequence[Known], own: Collection[str]
) -> Account:
    """Account for every file below a folder.

    ``data`` are the files that hold tensors, ``read`` the others whose meaning was compared, ``own`` those that are carnet's.
    Who comes first in ``known`` is believed first; those who have a folder say nothing of what was read.
    """
    findings: list[Finding] = []
    files, beside, unsure, seen = dict[str, str](), list[str](), list[str](), set[str]()
    strict, planned = any(each.whole for each in known), any(each.whole and not each.accused for each in known)
    for name, odd in _walk(base):
        label, kind = shown(name), _kind(name)
        seen.add(name)
        if odd and not (odd == "a link" and not strict and os.path.isfile(base / name)):
            findings.append(Finding("not a file", label, label, f"{odd}; a target is made of files"))
        elif name in data or name in own:
            continue
        else:
            digest = file_digest(base, name)
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


def _walk(base: Path) -> Iterator[tuple[str, str]]:
    """Yield the path below a folder of everything in it, and what it is, where it is no plain file; links are not followed."""
    left = [""]
    while left:
        folder = left.pop()
        try:
            found = sorted(os.scandir(base / folder), key=lambda each: each.name)
        except OSError as error:
            raise MachineFailed("a folder cannot be listed", {"where": base / folder, "reason": error.strerror}) from error
        for each in found:
            name = f"{folder}/{each.name}" if folder else each.name
            if each.is_dir(follow_symlinks=False):
                left.append(name)
            elif each.is_symlink():
                yield name, "" if HUB.fullmatch(os.readlink(each.path)) and os.path.isfile(each.path) else "a link"
            else:
                yield name, SPECIAL.get(stat.S_IFMT(each.stat(follow_symlinks=False).st_mode), "")


def _compared(base: Path, name: str, digest: str, known: Sequence[Known], *, meant: bool) -> tuple[Finding | None, list[Known]]:
    """Return what is wrong with a file, and who said what it must hold."""
    told = list[Known]()
    for each in known:
        expected = each.files.get(name)
        if expected is not None and expected != digest:
            label = shown(name)
            return Finding("file differs", label, label, f"{each.who} has {expected}, found {digest}"), []
        if expected is not None:
            told.append(each)
        if each.folder is None or meant or told or not os.path.isfile(each.folder / name):
            continue
        theirs = file_digest(each.folder, name)
        if theirs != digest and not _same_json(each.folder, base, name):
            return Finding("file differs", shown(name), shown(name), _detail(each.who, name, digest, theirs, known)), []
        told.append(each)
    return None, told


def _detail(who: str, name: str, digest: str, theirs: str, known: Sequence[Known]) -> str:
    knows = any(each.files.get(name) == digest for each in known)
    hint = "; the carnet has it so: if it was brought from elsewhere, --tokenizer DIR" if knows else ""
    return f"{who} has {theirs}, found {digest}{hint}"


def _same_json(ours: Path, theirs: Path, name: str) -> bool:
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


def _executed(base: Path, name: str) -> str:
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

"""What a target's document claims, held against what the examination found: the document is not believed, it is compared.

Claims that steer a comparison (a cast, a size of the vocabulary, what was left behind) come first: a person who left out an option that
they crossed with is told which one.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from math import isclose

from carnet.dialects.kinds import STORE
from carnet.examiner.asked import COMPARED, words
from carnet.examiner.compare import Finding
from carnet.examiner.document import PROVEN, SELF, SHA256, WORDS, text, vocabulary_data
from carnet.formats.side_files import DOCUMENT, KINDS, UNKNOWN
from carnet.inventory.survey import Inventory
from carnet.model.model import number, value

Json = Mapping[str, object]
UNSEEN = {
    "carnet",
    "versions",
    "digest",
    "state",
    "request",
    SELF,
}  # keys of a document that are not held against what was found
SIDE_FILES = {kind.what for kind in (*KINDS, UNKNOWN)}
# of files their folder tells, a folder may be moved, and a size may be named though the source says it
ELSEWHERE = {"target.files", "source.name", "source.fingerprint", "vocabulary.because", "merge.names"}


def check_claims(said: Json, now: Json, source: Inventory, target: Inventory, *, whole: bool) -> Iterator[Finding]:
    """Yield what a document says otherwise than the one that would be written now.

    ``whole`` says that the examination found nothing else: only then is compared what it says of tensors and of the proof, for a
    weight that is damaged has its own finding.
    """
    now = json.loads(text(now))
    if is_of_another(said, now):
        yield from _differences("target", said.get("target"), now["target"]) if whole else ()
        return
    claimed, asked = said.get("request"), now.get("request")
    if not isinstance(claimed, Mapping) or not isinstance(asked, Mapping):
        yield Finding("the carnet claims otherwise", "request", DOCUMENT, "it names no request")
        return
    words_agree = all(said.get(key) == now.get(key) for key in WORDS)
    other = [
        name
        for name in COMPARED
        if not _means_the_same(name, claimed.get(name), asked.get(name), said, source, target)
        and not (name in ("written_by", "read_by", "accept") and words_agree)
    ]
    for name in other:
        yield Finding("the carnet names another request", f"request.{name}", DOCUMENT, _hint(name, claimed, asked))
    for name, expected in shown(source, target).items():
        if claimed.get(name) is not None and claimed[name] != expected:
            detail = f"it says {claimed[name]!r}, the target is {expected!r}"
            yield Finding("the carnet claims otherwise", f"request.{name}", DOCUMENT, detail)
    skipped = {"config", "vocabulary"} if {"config", "vocab_size", "tokens"} & {*other} else set[str]()  # then it has been said
    skipped |= {"dropped"} if said.get("state") != PROVEN else set()  # a plan knows of scales that it leaves behind
    for key in (
        now.keys() - UNSEEN - skipped
        if whole and said.get("state") == PROVEN
        else {"family", "config", "vocabulary"} & said.keys() - skipped
    ):
        if key == "dropped":
            yield from _dropped(said.get(key), now[key], same="drop" not in other and claimed.get("drop") == asked.get("drop"))
        else:
            yield from _differences(key, said.get(key), now.get(key))


def is_of_another(said: Json, now: Json) -> bool:
    """Say whether a document tells of a crossing from another source: its tensors have other names, types or shapes."""
    if said.get("state") != PROVEN:
        return False
    theirs, ours = (_kinds(each.get("source")) for each in (said, now))
    more = [merge.get("sources") for each in (said, now) if isinstance(merge := each.get("merge"), Mapping)]
    others = [{place: _kinds(side) for place, side in each.items()} for each in more if isinstance(each, Mapping)]
    return theirs != ours or (len(others) == 2 and others[0] != others[1])


def _kinds(source: object) -> object:
    if not isinstance(source, Mapping) or not isinstance(tensors := source.get("tensors"), Mapping):
        return None
    kinds = {label: [facts.get("dtype"), facts.get("shape")] for label, facts in tensors.items() if isinstance(facts, Mapping)}
    return source.get("dialect"), kinds


def shown(source: Inventory, target: Inventory) -> dict[str, object]:
    """Return the words of a request that a target itself shows; of codes that are the source's own, none."""
    ranks = () if target.dialect.kind.files == STORE else ("tp", "pp", "ep")
    found: dict[str, object] = {"to": target.dialect.name, **{name: number(target.config, name) for name in ranks}}
    if target.dialect.ranked:
        found["parallel_embedding"] = value(target.config, "embedding")
    recipe = None if target.said is None or target.said == source.said else target.said.recipe
    if recipe is not None:
        found |= {"quantize": recipe.scheme, "style": recipe.style}
    return found


def _means_the_same(name: str, claimed: object, asked: object, said: Json, source: Inventory, target: Inventory) -> bool:
    """Say whether a claim changes nothing: an option that says what the source says by itself."""
    if _plain(claimed) == _plain(asked):
        return True
    either = [each for each in (claimed, asked) if each is not None]
    if name == "dtype":
        own = {source.checkpoint.tensors[key].dtype for key in source.entries if key not in source.coded}
        return (own | ({str(value(source.config, "dtype"))} if source.coded else set())) == set(either)
    if name == "vocab_size":
        return either == [number(source.config, "vocab")]
    if name == "tokens":
        return said.get("vocabulary") in (None, vocabulary_data(source.vocabulary))
    if name == "drop":
        return _names(said.get("dropped")) == _names(source.dropped)
    if name == "digest":
        return True  # one that is not asked for now is compared by `carnet verify OUT` alone
    if name == "adapter":
        return None not in (claimed, asked)  # it may lie elsewhere now; the digests of its tensors are compared
    if name == "config":
        return bool(said.get("config") == json.loads(json.dumps(source.config)))
    return target.said is None or not (target.said.static or target.said.cache)  # scales that --amax and --kv-scale are about


def _plain(value: object) -> object:
    """Return what a claim is compared by: of a file its digest, of several patterns the set."""
    if isinstance(value, Mapping):
        return value.get("digest")
    return sorted(map(str, value)) or None if isinstance(value, list | tuple) else value


def _names(dropped: object) -> set[str]:
    tensors = _of_tensors(dropped)
    groups: Collection[object] = tensors.values() if isinstance(tensors, Mapping) else ()
    return {str(name) for names in groups if isinstance(names, list | tuple) for name in names}


def _of_tensors(dropped: object) -> object:
    """Return what was left behind without the files: which of them a target has may change."""
    if not isinstance(dropped, Mapping):
        return dropped
    return {reason: names for reason, names in dropped.items() if reason not in SIDE_FILES}


def _hint(name: str, claimed: Json, asked: Json) -> str:
    theirs, ours = (" ".join(words({name: each.get(name)})) for each in (claimed, asked))
    if not theirs:
        return f"it says nothing of {COMPARED[name]}, and this comparison was asked for {ours}"
    return f"it says {theirs}, which this comparison was not asked for; if the crossing was, repeat {theirs}"


def _dropped(said: object, now: object, *, same: bool) -> Iterator[Finding]:
    """Compare what was left behind; under which words only where the same was asked for."""
    if same:
        yield from _differences("dropped", _of_tensors(said), _of_tensors(now))
    elif _names(said) != _names(now):
        odd = sorted(_names(said) ^ _names(now))
        yield Finding(
            "the carnet claims otherwise", "dropped", DOCUMENT, f"{odd[0]} is left behind on one side alone, in all {len(odd)}"
        )


def _differences(where: str, said: object, now: object) -> Iterator[Finding]:
    """Yield the places at which two values differ."""
    if where in ELSEWHERE:
        return
    if isinstance(said, Mapping) and isinstance(now, Mapping):
        for key in sorted(said.keys() | now.keys()):
            if key == SHA256 and not (key in said and key in now):
                continue
            if f"{where}.{key}" not in ELSEWHERE and (key not in said or key not in now):
                lacking = "it does not say this" if key not in said else "it names what is not there"
                yield Finding("the carnet claims otherwise", f"{where}.{key}", DOCUMENT, lacking)
            elif key in said and key in now:
                yield from _differences(f"{where}.{key}", said[key], now[key])
    elif said != now and not _is_close(where, said, now):
        yield Finding("the carnet claims otherwise", where, DOCUMENT, f"it says {said!r}, found {now!r}"[:400])


def _is_close(where: str, said: object, now: object) -> bool:
    """Say whether two sums of floating point are the same but for their order."""
    if not where.startswith("proof.codes"):
        return False
    if isinstance(said, list) and isinstance(now, list) and len(said) == len(now):
        return all(next(_differences(where, a, b), None) is None for a, b in zip(said, now, strict=True))
    return isinstance(said, float) and isinstance(now, float) and isclose(said, now, rel_tol=1e-6, abs_tol=0.002)

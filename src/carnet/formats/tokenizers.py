"""What a tokenizer's folder says in numbers: how many tokens there are, and the ids that begin, end and fill a text.

Only what is sure is said: where code or a list of ranks has the last word, the number of tokens stays open.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from carnet.errors import BadCheckpoint
from carnet.formats.json_stream import leaves
from carnet.formats.jsons import read_object
from carnet.formats.side_files import check_asset
from carnet.storage.protocol import File, Folder, names_in, read_at

Ids = tuple[int, ...]
SMALL = 64 << 20  # bytes of a config
ENDS = ("bos", "eos", "pad")
GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a folder says of its tokens."""

    count: int | None  # how many there are, as transformers counts them; None where that is not sure
    reach: int  # one more than the largest id that is named; 0 where none is
    ids: Mapping[str, Mapping[str, Ids]]  # "eos" -> who says it -> the ids


def tokens_of(root: Folder) -> Tokens:
    """Read a folder's tokenizer and the configs beside it."""
    names = set(names_in(root))
    said: dict[str, dict[str, object]] = {
        name: _table(root, name) for name in ("tokenizer_config.json", "special_tokens_map.json") if name in names
    }
    special = {end: _text_of(said, f"{end}_token") for end in ENDS}
    added = said.get("tokenizer_config.json", {}).get("added_tokens_decoder")
    named = [*_vocabulary(root, names, {text for text in special.values() if text is not None})]
    if isinstance(added, Mapping):
        named += [(number, _text(token)) for key, token in added.items() if (number := _number(key)) is not None]
    where = {text: number for number, text in named if text is not None}
    voices = generation_ids(root), _config_ids(root)
    ids = {end: {who: found for said in voices for who, found in said.get(end, {}).items()} for end in ENDS}
    for end, text in special.items():
        ids[end] |= {"the tokenizer": (where[text],)} if text is not None and text in where else {}
    numbers = {number for number, _ in named}
    reach = max(numbers, default=-1) + 1
    # a special token that no file has an id for is added while it loads
    sure = numbers and len(numbers) == reach and all(text in where for text in special.values() if text is not None)
    return Tokens(reach if sure else None, reach, ids)


def generation_ids(root: Folder) -> dict[str, dict[str, Ids]]:
    """Return the ids that a folder's generation config says: "eos" -> who says it -> the ids."""
    return _said_ids(root, GENERATION)


def generation_eos(root: Folder) -> Ids | None:
    """Return the ids that end a text by a folder's generation config; None where it says none, or cannot be read."""
    try:
        return next(iter(generation_ids(root).get("eos", {}).values()), None)
    except BadCheckpoint:
        return None


def _config_ids(root: Folder) -> dict[str, dict[str, Ids]]:
    """Return the ids of a tokenizer folder's config.json, which is no part of the tokenizer and may be anything."""
    try:
        return _said_ids(root, "config.json")
    except BadCheckpoint:
        return {}


def _said_ids(root: Folder, name: str) -> dict[str, dict[str, Ids]]:
    table = _table(root, name) if name in names_in(root) else {}
    return {end: {name: ids} for end in ENDS if (ids := _ids(table.get(f"{end}_token_id")))}


def _table(root: Folder, name: str) -> dict[str, object]:
    check_asset(root, name)
    return read_object(root, name, SMALL)


def _text_of(said: Mapping[str, Mapping[str, object]], key: str) -> str | None:
    return next((text for table in said.values() if (text := _text(table.get(key))) is not None), None)


def _text(token: object) -> str | None:
    """Return a token's text: it stands alone, or in an object with what else is said of it."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None


def _number(found: object) -> int | None:
    """Return an id, which may be a key of JSON.

    >>> _number("17"), _number(17), _number("x"), _number(True)
    (17, 17, None, None)
    """
    if isinstance(found, str) and found.isdecimal() and len(found) < 12:
        return int(found)
    return found if type(found) is int and 0 <= found < 1 << 32 else None


def _ids(found: object) -> Ids:
    """Return the ids in a config: one, or several.

    >>> _ids(2), _ids([2, 3]), _ids(None), _ids(True), _ids([])
    ((2,), (2, 3), (), (), ())
    """
    each = [_number(one) for one in (found if isinstance(found, list) else [found])]
    return tuple(one for one in each if one is not None) if None not in each else ()


def _vocabulary(root: Folder, names: set[str], wanted: set[str]) -> Iterator[tuple[int, str | None]]:
    """Yield the id of every token that the first of these files names, with its text where that is wanted."""
    for name, read in (
        ("tokenizer.json", _fast),
        ("tekken.json", _tekken),
        ("vocab.json", _plain),
        ("tokenizer.model", _pieces),
    ):
        if name in names:
            check_asset(root, name)
            yield from ((number, text if text in wanted else None) for number, text in read(root, name))
            if name in ("vocab.json", "tokenizer.model") and "added_tokens.json" in names:
                check_asset(root, "added_tokens.json")
                yield from ((number, text) for number, text in _plain(root, "added_tokens.json"))
            return


def _fast(root: Folder, name: str) -> Iterator[tuple[int, str | None]]:
    """Read tokenizer.json: an object text -> id, or a list of [text, score]; then tokens that were added."""
    added: dict[object, dict[object, object]] = {}
    for way, value in leaves(root, name, skip=("model", "merges")):
        match way:
            case ("model", "vocab", str(text)) if (number := _number(value)) is not None:
                yield number, text
            case ("model", "vocab", int(at), 0):
                yield at, value if isinstance(value, str) else None
            case ("added_tokens", int(at), "id" | "content" as key):
                added.setdefault(at, {})[key] = value
            case _:
                pass
    for token in added.values():
        if (number := _number(token.get("id"))) is not None:
            yield number, _text(token)


def _plain(root: Folder, name: str) -> Iterator[tuple[int, str | None]]:
    for way, value in leaves(root, name):
        if len(way) == 1 and (number := _number(value)) is not None:
            yield number, str(way[0])


def _tekken(root: Folder, name: str) -> Iterator[tuple[int, str | None]]:
    """Read tekken.json, which names more tokens than it uses: mistral_common/tokens/tokenizers/tekken.py."""
    said = {way[1]: value for way, value in leaves(root, name, skip=("vocab",)) if way[0] == "config" and len(way) == 2}
    size = _number(said.get("default_vocab_size"))
    yield from ((number, None) for number in range(min(size or 0, 1 << 24)))


def _pieces(root: Folder, name: str) -> Iterator[tuple[int, str | None]]:
    """Read a SentencePiece model, a protobuf whose field 1 is a piece: sentencepiece_model.proto."""
    file = root.open(name)
    if file.stamp.nbytes == 0 or read_at(file, 0, 1) != b"\n":
        return  # tiktoken's list of ranks, which leaves the special tokens to code
    at, piece = 0, 0
    while at < file.stamp.nbytes:
        tag, at = _varint(file, at)
        if tag & 7 != 2:
            raise BadCheckpoint(f"{name} is not a SentencePiece model", {"where": root})
        length, at = _varint(file, at)
        if tag >> 3 == 1:
            yield piece, _piece_text(read_at(file, at, min(length, 1 << 16)))
            piece += 1
        at += length


def _piece_text(data: bytes) -> str | None:
    """Return the text of a piece: its own field 1."""
    return data[2 : 2 + data[1]].decode("utf-8", "replace") if data[:1] == b"\n" and len(data) > 1 and data[1] < 128 else None


def _varint(file: File, at: int) -> tuple[int, int]:
    """Return a number in base 128 and where it ends."""
    data = read_at(file, at, min(10, file.stamp.nbytes - at))
    value = 0
    for place, byte in enumerate(data):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise BadCheckpoint(f"{file.stamp.file} is not a SentencePiece model", {"where": file.where})

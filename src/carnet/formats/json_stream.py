"""Read the leaves of a JSON file of any size in little memory, each with the path to it: a tokenizer has a million.

It follows the text and checks only what it needs for that: a file that is no JSON may pass, what it says is then of no worth.
"""

import codecs
import json
import re
from collections.abc import Iterator

from carnet.errors import MADE_AGAIN, BadCheckpoint, shown
from carnet.storage.protocol import File, Folder, read_at

Way = tuple[str | int, ...]
LIMIT = 512 << 20  # bytes of a file
CHUNK = 1 << 18
LONGEST = 8 << 20  # bytes of one text in it
DEEPEST = 16
LEXEME = re.compile(r'\s*("[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\],:]|[^\s"{}\[\],:]+)', re.DOTALL)


def leaves(root: Folder, name: str, skip: Way = ()) -> Iterator[tuple[Way, object]]:
    """Yield every text, number, bool and null of a file with its path; an empty object or list yields nothing.

    Nothing below ``skip`` is yielded.
    """
    path: list[str | int] = []
    kinds: list[str] = []
    key: str | None = None
    for lexeme in _lexemes(root, name):
        match lexeme:
            case "{" | "[":
                if len(kinds) == DEEPEST:
                    raise BadCheckpoint(f"{shown(name)} is nested too deeply", {"where": root}, remedy=MADE_AGAIN)
                kinds.append(lexeme)
                path.append("" if lexeme == "{" else 0)
                key = None
            case "}" | "]":
                if not kinds:
                    raise _broken(root, name)
                kinds.pop()
                path.pop()
                key = None
            case ",":
                if kinds and kinds[-1] == "[":
                    path[-1] = int(path[-1]) + 1
                key = None
            case ":":
                if key is None or not kinds:
                    raise _broken(root, name)
                path[-1], key = key, ""
            case _:
                named = key is None and bool(kinds) and kinds[-1] == "{"
                if skip and not named and tuple(path[: len(skip)]) == skip:
                    continue
                try:
                    value: object = json.loads(lexeme)
                except ValueError:
                    raise _broken(root, name) from None
                if named:
                    key = str(value)
                else:
                    yield tuple(path), value
    if kinds:
        raise _broken(root, name)


def _broken(root: Folder, name: str) -> BadCheckpoint:
    return BadCheckpoint(f"{shown(name)} is not valid JSON", {"where": root}, remedy=MADE_AGAIN)


def _lexemes(root: Folder, name: str) -> Iterator[str]:
    file = root.open(name)
    if file.stamp.nbytes > LIMIT:
        facts = {"where": root, "expected": f"at most {LIMIT} bytes", "found": f"{file.stamp.nbytes} bytes"}
        raise BadCheckpoint(f"{shown(name)} is too large for what it should hold", facts, remedy=MADE_AGAIN)
    rest = ""
    for piece in _pieces(file):
        text, at = rest + piece, 0
        while (found := LEXEME.match(text, at)) is not None and found.end() < len(text):
            yield found[1]
            at = found.end()
        rest = text[at:]  # what the end of the piece cuts through
        if len(rest) > LONGEST:
            raise BadCheckpoint(f"{shown(name)} holds a text that is too long", {"where": root}, remedy=MADE_AGAIN)
    found = LEXEME.match(rest)
    if found is not None:
        yield found[1]
    if rest[0 if found is None else found.end() :].strip():
        raise _broken(root, name)


def _pieces(file: File) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for offset in range(0, file.stamp.nbytes, CHUNK):
        yield decoder.decode(read_at(file, offset, min(CHUNK, file.stamp.nbytes - offset)))

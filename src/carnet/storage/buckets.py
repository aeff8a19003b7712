"""What the library of an object store is asked for: objects by their keys, read by ranges, written whole, listed below a prefix.

A *bucket* holds objects; no object changes in place, and none is there before its last byte is. Each library has a module with a
bucket of its own: obstore (``obstores``) and NVIDIA's Multi-Storage Client (``multistorage``).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from carnet.errors import BadCheckpoint, BadRequest, MachineFailed, shown

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Object:
    """What a store says of an object."""

    key: str
    nbytes: int
    version: str  # etag; where the store has none, the time of its writing


class Upload(Protocol):
    """An object that is being written, from its first byte to its last; it is not there before ``close``."""

    def write(self, data: Buffer) -> None:
        """Add bytes; they may be used again when this returns."""

    def close(self) -> None:
        """Have the object there."""

    def abandon(self) -> None:
        """Write no more, and leave no object."""


class Bucket(Protocol):
    """The objects of a store; errors are those of this module."""

    @property
    def url(self) -> str:
        """Return where it is: what comes before a key and its slash."""

    def find(self, key: str) -> Object | None:
        """Return an object, None where there is none."""

    def below(self, prefix: str) -> tuple[list[str], list[Object]]:
        """Return the names of what is like a folder directly below a prefix ("" or with a slash at its end), and the objects there."""

    def every(self, prefix: str) -> Iterator[Object]:
        """Yield all objects below a prefix."""

    def read(self, key: str, begin: int, nbytes: int, version: str | None) -> tuple[Object | None, memoryview]:
        """Return bytes of an object, fewer where it ends before, and what it is now; that may be None where a version is given.

        Raise Changed where it is known to have another one, Past where it has no byte there.
        """

    def put(self, key: str, data: bytes, marks: Mapping[str, str], *, new: bool = False) -> None:
        """Write a small object; ``new`` raises Taken where there is one, if the store can."""

    def upload(self, key: str, marks: Mapping[str, str], nbytes: int) -> Upload:
        """Begin to write an object of this size."""

    def look(self, key: str) -> tuple[Object, Mapping[str, str]] | None:
        """Return an object and what it was marked with (nothing where the store keeps no marks), None where there is none."""

    def remove(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is not there is none."""


class Missing(Exception):
    """There is no such object, or no such bucket."""


class Changed(Exception):
    """An object is no longer the one that was looked at."""


class Past(Changed):
    """An object has no byte where one was wanted: it is empty, or has become shorter."""


class Short(Exception):
    """A store gives other bytes of an object than it says that it has."""


class Taken(Exception):
    """There is an object already."""


class Refused(Exception):
    """The store does not let carnet do it: the credentials are missing, wrong or too narrow."""


class Broken(Exception):
    """The store failed, and the library has tried again as often as it does."""


@contextmanager
def told(what: str, where: str, name: str = "") -> Iterator[None]:
    """Explain what a store refuses within."""
    try:
        yield
    except Missing as error:
        facts = {"where": where, "reason": shown(str(error))}
        if name:
            remedy = "bring it back, or copy the whole folder again"
            raise BadCheckpoint(f"{shown(name)} is missing", facts, remedy=remedy) from error
        raise BadRequest(f"{what}: there is no such bucket", facts, remedy="make it, or name another one") from error
    except Changed as error:
        facts = {"where": where, "file": shown(name), "reason": shown(str(error))}
        raise BadCheckpoint("a file changed while it was used", facts, remedy="wait until nobody writes to it") from error
    except Short as error:
        facts = {"where": where, "reason": shown(str(error))}
        remedy = "copy the checkpoint again; where that does not help, see what the store's log says"
        raise BadCheckpoint(
            f"the store does not give what it says that it has of {shown(name)}", facts, remedy=remedy
        ) from error
    except Refused as error:
        remedy = "give credentials that may do this, where the store's own tools look for them: the environment, profiles"
        raise MachineFailed(
            f"{what}: the store refuses it", {"where": where, "reason": shown(str(error))}, remedy=remedy
        ) from error
    except Broken as error:
        remedy = "see whether the store can be reached there, in this region, and run the same command again: it resumes"
        raise MachineFailed(
            f"{what}: the store failed", {"where": where, "reason": shown(str(error))}, remedy=remedy
        ) from error

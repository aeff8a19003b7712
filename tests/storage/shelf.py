"""A store of nothing but a dict, by the protocol alone: ``shelf://NAME/...`` stands for its files."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from carnet.errors import BadCheckpoint, BadRequest
from carnet.storage.protocol import FILE, FOLDER, Crossing, Folder, Part, Stamp

FILES: dict[str, bytearray] = {}  # URL -> content


@dataclass(frozen=True)
class ShelfFile:
    where: str
    stamp: Stamp

    def read_into(self, offset: int, into: memoryview) -> None:
        held = FILES[f"{self.where}/{self.stamp.file}"]
        if offset + len(into) > len(held):
            raise BadCheckpoint(f"{self.stamp.file} ends too early")
        into[:] = held[offset : offset + len(into)]

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        assert all(offset >= 0 and nbytes > 0 for offset, nbytes in ranges)


@dataclass(frozen=True)
class ShelfTarget:
    url: str

    def write(self, offset: int, data: memoryview) -> None:
        assert offset + len(data) <= len(FILES[self.url])
        FILES[self.url][offset : offset + len(data)] = data

    def copy(self, source: object, begin: int, end: int, nbytes: int) -> int:
        return 0


@dataclass(frozen=True)
class ShelfDraft:
    out: str
    names: frozenset[str]
    done: frozenset[int] = frozenset()
    fresh: bool = True
    whole: bool = False
    in_order: bool = False
    kept: tuple[str, ...] = ()
    flushed: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"{self.out}.draft"

    @property
    def measured(self) -> dict[int, float]:
        return {}

    @property
    def parts(self) -> int:
        return 0

    def measured_by_all(self) -> dict[int, float]:
        return {}

    @property
    def ready(self) -> bool:
        return False

    def share(self) -> None:
        """Remember nothing."""

    def note(self, job: int, found: float | None = None) -> None:
        """Remember nothing: an interrupted run begins anew."""

    def settle(self) -> None:
        """Remember nothing."""

    def restart(self) -> None:
        self.discard()

    def size(self, name: str) -> int | None:
        held = FILES.get(f"{self.where}/{name}")
        return None if held is None else len(held)

    def reserve(self, sizes: Iterable[tuple[str, int]]) -> None:
        assert {name for name, _ in sizes} <= self.names

    def create(self, name: str, nbytes: int, parts: Iterable[tuple[int, bytes]]) -> None:
        held = FILES[f"{self.where}/{name}"] = bytearray(nbytes)
        for offset, data in parts:
            held[offset : offset + len(data)] = data

    def open(self, name: str) -> ShelfTarget:
        return ShelfTarget(f"{self.where}/{name}")

    def complete(self, name: str) -> None:
        """Do nothing: what was created is zeros."""

    def put(self, name: str, chunks: Iterable[bytes], *, sync: bool = False) -> None:
        FILES[f"{self.where}/{name}"] = bytearray(b"".join(chunks))

    def flush(self, name: str) -> None:
        self.flushed.append(name)

    def discard(self) -> None:
        for url in [url for url in FILES if url.startswith(f"{self.where}/")]:
            del FILES[url]

    def publish(self) -> None:
        assert set(self.flushed) >= self.names
        for url in [url for url in FILES if url.startswith(f"{self.where}/")]:
            FILES[self.out + url.removeprefix(self.where)] = FILES.pop(url)


@dataclass(frozen=True)
class ShelfFolder:
    url: str
    far: bool = False

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Self:
        return type(self)(f"{self.url}/{name}")

    def kind(self, name: str = "") -> str:
        url = f"{self.url}/{name}" if name else self.url
        return FILE if url in FILES else FOLDER if any(each.startswith(f"{url}/") for each in FILES) else ""

    def entries(self) -> list[tuple[str, str]]:
        below = [url.removeprefix(f"{self.url}/") for url in FILES if url.startswith(f"{self.url}/")]
        return sorted({(name.split("/")[0], FOLDER if "/" in name else FILE) for name in below})

    def holds(self, name: str) -> bool:
        return True

    def open(self, name: str) -> ShelfFile:
        held = FILES.get(f"{self.url}/{name}")
        if held is None:
            raise BadCheckpoint(f"{name} is missing", {"where": self})
        return ShelfFile(self.url, Stamp(name, len(held), str(hash(bytes(held)))))

    def put(self, name: str, chunks: Iterable[bytes]) -> None:
        FILES[f"{self.url}/{name}"] = bytearray(b"".join(chunks))

    @contextmanager
    def owned(
        self, names: Collection[str], crossing: Crossing, source: Folder | None, part: Part | None = None
    ) -> Iterator[ShelfDraft]:
        assert part is None
        if self.kind():
            raise BadRequest(f"{self} exists")
        draft = ShelfDraft(self.url, frozenset(names))
        yield draft
        draft.discard()

    def cleared(self) -> list[str]:
        raise BadRequest("an interrupted run leaves nothing")

    def meanwhile(self) -> Self:
        return self

    def joined(self) -> Callable[[str], ShelfTarget]:
        return lambda name: ShelfTarget(f"{self.url}.draft/{name}")

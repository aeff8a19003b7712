"""Buckets of Amazon's S3 and what speaks like it, of Google and of Azure, through obstore: the Rust crate object_store.

Credentials, endpoints and regions are as obstore reads them from the environment, and so are its retries with back-off.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import ObjectStore, from_url

from carnet.storage.buckets import Broken, Buffer, Changed, Missing, Object, Past, Refused, Short, Taken
from carnet.storage.uploads import PIECE, StreamedUpload

if TYPE_CHECKING:  # obstore's types are in its stubs alone
    from obstore import GetOptions, ObjectMeta
    from obstore.store import RetryConfig

PARTS = 9_000  # of an upload; S3 takes 10,000
AT_ONCE = 4  # parts of an upload on their way
TIMED = "time "  # before a version that is no etag
# what lasts is told after two minutes; how long a request may take is in the environment, or obstore's 30 s
RETRIES: "RetryConfig" = {"max_retries": 8, "retry_timeout": timedelta(minutes=2)}
# obstore's own errors, and what it has none for, by words of the answer
KINDS: tuple[tuple[type[Exception], type[Exception]], ...] = (
    (FileNotFoundError, Missing),
    (PreconditionError, Changed),
    (AlreadyExistsError, Taken),
    (PermissionDeniedError, Refused),
    (UnauthenticatedError, Refused),
)
ANSWERS = {
    # of the machine itself, which object_store asks for credentials where it was given none (src/aws/builder.rs, src/gcp/credential.rs)
    "http://169.254.169.254": Refused,
    "http://metadata": Refused,
    "status code: 403 ": Refused,
    "status code: 401 ": Refused,
    "status code: 404 ": Missing,
    "status code: 416 ": Past,
    "error: Requested ": Short,  # object_store/src/client/get.rs GetResultError::UnexpectedRange
}


@dataclass(frozen=True, slots=True)
class ObstoreBucket:
    """A bucket, or a container of Azure's."""

    url: str
    store: ObjectStore

    @classmethod
    def at(cls, url: str) -> "ObstoreBucket":
        """Return the bucket of a URL that names nothing else."""
        with heard():
            return cls(url, from_url(url, retry_config=RETRIES))

    def find(self, key: str) -> Object | None:
        """Return an object, None where there is none."""
        try:
            with heard():
                return _object(obstore.head(self.store, key))
        except Missing:
            return None

    def below(self, prefix: str) -> tuple[list[str], list[Object]]:
        """Return what lies directly below a prefix."""
        with heard():
            found = obstore.list_with_delimiter(self.store, prefix or None)
        folders = [each.rstrip("/").rsplit("/", 1)[-1] for each in found["common_prefixes"]]
        return folders, [_object(each) for each in found["objects"]]

    def every(self, prefix: str) -> Iterator[Object]:
        """Yield all objects below a prefix."""
        with heard():
            for some in obstore.list(self.store, prefix or None):
                yield from map(_object, some)

    def read(self, key: str, begin: int, nbytes: int, version: str | None) -> tuple[Object, memoryview]:
        """Return bytes of an object, with what it is now."""
        options: GetOptions = {"range": (begin, begin + nbytes)}
        if version and not version.startswith((TIMED, "W/")):  # a time is no etag, and a weak one matches nothing
            options["if_match"] = version
        with heard():
            got = obstore.get(self.store, key, options=options)
            return _object(got.meta), memoryview(got.bytes())

    def put(self, key: str, data: bytes, marks: Mapping[str, str], *, new: bool = False) -> None:
        """Write a small object."""
        with heard():
            obstore.put(
                self.store, key, data, attributes=dict(marks), mode="create" if new else "overwrite", use_multipart=False
            )

    def upload(self, key: str, marks: Mapping[str, str], nbytes: int) -> StreamedUpload:
        """Begin to write an object."""
        part, kept = -(-max(PIECE, nbytes // PARTS) >> 20) << 20, dict(marks)

        def send(pieces: Iterator[Buffer]) -> None:
            with heard():
                obstore.put(
                    self.store, key, pieces, attributes=kept, use_multipart=True, chunk_size=part, max_concurrency=AT_ONCE
                )

        return StreamedUpload(send)

    def look(self, key: str) -> tuple[Object, Mapping[str, str]] | None:
        """Return an object and what it was marked with."""
        try:
            with heard():
                found = obstore.get(self.store, key, options={"head": True})
                return _object(found.meta), cast("Mapping[str, str]", found.attributes)
        except Missing:
            return None

    def remove(self, keys: Iterable[str]) -> None:
        """Remove objects."""
        if some := list(keys):
            with heard():
                obstore.delete(self.store, some)


def _object(found: "ObjectMeta") -> Object:
    etag = (found["e_tag"] or "").strip('"')
    version = found["e_tag"] if etag else TIMED + found["last_modified"].isoformat()
    return Object(found["path"], found["size"], str(version))


@contextmanager
def heard() -> Iterator[None]:
    """Raise what obstore says as an error of buckets."""
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        said = str(error).split("\n\n", 1)[0]
        kind = next((kind for theirs, kind in KINDS if isinstance(error, theirs)), None)
        if kind is None:
            kind = next((kind for words, kind in ANSWERS.items() if words in said), Broken)
        raise kind(_reason(said)) from error


def _reason(said: str) -> str:
    """Return what was answered and by whom, without how it was asked.

    >>> _reason("Generic S3 error: Error performing GET http://host:1/b in 2ms - 404 Not Found: <Error><Code>NoSuchKey</Code>")
    'http://host:1: 404 Not Found: NoSuchKey'
    """
    asked, _, answer = said.split("\n", 1)[0].rpartition(" - ")
    answer = answer.removeprefix("Server returned non-2xx status code: ").partition(": <")[0]
    told = [found[1] for name in ("Code", "Message") if (found := re.search(f"<{name}>([^<]*)</{name}>", said))]
    return ": ".join([*re.findall(r"https?://[^/ ]+", asked)[:1], answer, *told])

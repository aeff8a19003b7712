"""Buckets behind the profiles of NVIDIA's Multi-Storage Client, as Megatron's users have them: ``msc://PROFILE/...``.

The profile says which store it is and how it is reached; the client reads it from its own configuration, and tries again by itself.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from multistorageclient import StorageClient, StorageClientConfig
from multistorageclient.types import ObjectMetadata, PreconditionFailedError, Range

from carnet.storage.buckets import Broken, Buffer, Changed, Missing, Object, Past, Refused

# what its providers' errors say, of which each has its own kind
WORDS = {"403": Refused, "401": Refused, "AccessDenied": Refused, "ermission": Refused, "NoSuchBucket": Missing, "416": Past}


@dataclass(frozen=True, slots=True)
class MscUpload:
    """An object that is kept on this machine until it is whole: the client sends files, and what is given up must not be sent."""

    file: "tempfile._TemporaryFileWrapper[bytes]"
    send: Callable[[str], None]  # takes a path

    def write(self, data: Buffer) -> None:
        """Add bytes."""
        self.file.write(data)

    def close(self) -> None:
        """Have the client send it."""
        self.file.flush()
        with heard(), self.file:
            self.send(self.file.name)

    def abandon(self) -> None:
        """Leave no object."""
        self.file.close()


@dataclass(frozen=True, slots=True)
class MscBucket:
    """What a profile names."""

    url: str
    client: StorageClient

    @classmethod
    def at(cls, url: str) -> "MscBucket":
        """Return what a profile names."""
        with heard():
            return cls(url, StorageClient(StorageClientConfig.from_file(profile=url.removeprefix("msc://"))))

    def find(self, key: str) -> Object | None:
        """Return an object, None where there is none."""
        try:
            with heard():
                found = self.client.info(key)
        except Missing:
            return None
        return None if found.type == "directory" else _object(found)

    def below(self, prefix: str) -> tuple[list[str], list[Object]]:
        """Return what lies directly below a prefix."""
        folders, files = list[str](), list[Object]()
        with heard():
            for found in self.client.list(prefix, include_directories=True):
                if found.type == "directory":
                    folders.append(found.key.rstrip("/").rsplit("/", 1)[-1])
                else:
                    files.append(_object(found))
        return folders, files

    def every(self, prefix: str) -> Iterator[Object]:
        """Yield all objects below a prefix."""
        with heard():
            yield from map(_object, self.client.list(prefix))

    def read(self, key: str, begin: int, nbytes: int, version: str | None) -> tuple[Object | None, memoryview]:
        """Return bytes of an object, and what it is now where that was not known."""
        with heard():
            found = _object(self.client.info(key)) if version is None else None
            size = nbytes if found is None else min(nbytes, found.nbytes - begin)
            return found, memoryview(self.client.read(key, Range(begin, size)) if size > 0 else b"")

    def put(self, key: str, data: bytes, marks: Mapping[str, str], *, new: bool = False) -> None:  # noqa: ARG002  it has no such request
        """Write a small object."""
        with heard():
            self.client.write(key, data, dict(marks) or None)

    def upload(self, key: str, marks: Mapping[str, str], nbytes: int) -> MscUpload:  # noqa: ARG002  the client cuts as it likes
        """Begin to write an object."""
        made = tempfile.NamedTemporaryFile(prefix="carnet-")  # noqa: SIM115  closed by the upload
        return MscUpload(made, lambda path: self.client.upload_file(key, path, attributes=dict(marks) or None))

    def look(self, key: str) -> tuple[Object, Mapping[str, str]] | None:
        """Return an object and what it was marked with."""
        try:
            with heard():
                found = self.client.info(key)
        except Missing:
            return None
        return _object(found), {name: str(value) for name, value in (found.metadata or {}).items()}

    def remove(self, keys: Iterable[str]) -> None:
        """Remove objects."""
        with heard():
            self.client.delete_many(list(keys))


def _object(found: ObjectMetadata) -> Object:
    return Object(found.key.strip("/"), found.content_length, found.etag or found.last_modified.isoformat())


@contextmanager
def heard() -> Iterator[None]:
    """Raise what the client says as an error of buckets; its providers raise errors of many kinds."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise Missing(str(error)) from error
    except PreconditionFailedError as error:
        raise Changed(str(error)) from error
    except PermissionError as error:
        raise Refused(str(error)) from error
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        said = str(error).split("\n", 1)[0]
        raise next((kind for word, kind in WORDS.items() if word in said), Broken)(said) from error

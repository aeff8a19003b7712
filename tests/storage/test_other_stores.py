"""Another store needs the protocol and a row in ``SCHEMES``: nothing else of carnet knows where files are."""

from pathlib import Path

import pytest

import carnet
from carnet.errors import BadRequest
from carnet.storage import schemes
from tests.storage.shelf import FILES, ShelfFolder

MEGATRON = Path(__file__).parents[1] / "goldens/megatron"


@pytest.fixture(autouse=True)
def _shelf(monkeypatch):
    monkeypatch.setitem(schemes.SCHEMES, "shelf", ShelfFolder)
    FILES.clear()


def upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            FILES[f"{url}/{path.relative_to(folder).as_posix()}"] = bytearray(path.read_bytes())


def below(url: str) -> dict[str, bytes]:
    return {name.removeprefix(f"{url}/"): bytes(held) for name, held in FILES.items() if name.startswith(f"{url}/")}


def on_disk(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("golden", ["llama_tp2pp2", "llama_legacy"])
@pytest.mark.parametrize("to", [{"to": "hf"}, {"to": "trtllm", "tp": 2}, {"to": "megatron", "pp": 2}], ids=str)
def test_a_crossing_between_stores_writes_the_bytes_that_a_disk_gets(golden, to, tmp_path):
    upload(MEGATRON / golden, "shelf://a/source")
    seen = carnet.inspect("shelf://a/source")
    assert seen.checkpoint.tensors == carnet.inspect(MEGATRON / golden).checkpoint.tensors
    assert carnet.cross("shelf://a/source", "shelf://b/out", **to).equal
    assert carnet.cross(MEGATRON / golden, tmp_path / "out", **to).equal
    found, expected = below("shelf://b/out"), on_disk(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= {"carnet.json"}  # it names its source
    assert not below("shelf://b/out.draft")
    assert carnet.verify("shelf://a/source", "shelf://b/out").equal
    assert carnet.verify("shelf://b/out").equal


def test_damage_and_what_is_there_are_told_of_another_store_too(tmp_path):
    assert carnet.cross(MEGATRON / "llama_tp2pp2", "shelf://b/out", to="hf").equal
    with pytest.raises(BadRequest, match="shelf://b/out exists"):
        carnet.cross(MEGATRON / "llama_tp2pp2", "shelf://b/out", to="hf")
    FILES["shelf://b/out/model.safetensors"][-1] ^= 1
    assert not carnet.verify(MEGATRON / "llama_tp2pp2", "shelf://b/out").equal
    assert not carnet.verify("shelf://b/out").equal

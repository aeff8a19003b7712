"""The bytes of targets are what they were: digests of every file of many crossings, recorded before the code was moved about.

That a recorded target is right is said elsewhere, by the programs that load it; here it is only the same. What is *meant* to change
is recorded anew by ``python -m tests.test_recorded_bytes``, and the difference of the record is read before it is committed. Live
crossings are held against these (tests/live/test_live.py): every rank gets the bytes of the crossing of files.
"""

import hashlib
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest
from safetensors.numpy import save_file

import carnet
from carnet.errors import CarnetError
from carnet.quantize.recipes import RECIPES
from tests.families import samples
from tests.referees import roomy

HERE = Path(__file__).parent
GOLDENS, RECORD = HERE / "goldens", HERE / "recorded_bytes.json"
PLAIN = {
    "hf": {"to": "hf"},
    "hf f32": {"to": "hf", "dtype": "f32", "shard_size": 100_000},
    "megatron te": {"to": "megatron", "tp": 2},
    "megatron local": {"to": "megatron", "spelling": "local", "pp": 2},
    "trtllm": {"to": "trtllm", "tp": 2},
    "trtllm rows": {"to": "trtllm", "pp": 2, "parallel_embedding": "rows"},
}
CODED = {
    recipe.name: {"to": "hf", "quantize": recipe.scheme, "style": recipe.style}
    for recipe in RECIPES
    if recipe.style != "trtllm"
} | {
    "trtllm/fp8": {"to": "trtllm", "quantize": "fp8"},
    "modelopt/fp8, cache": {"to": "hf", "quantize": "fp8", "kv_cache": "fp8"},
}
STATIC = ("fp8", "nvfp4")  # schemes that store a scale of activations
SOURCES = [
    *(f"megatron/{path.parent.name}" for path in sorted(GOLDENS.glob("megatron/*/reference.safetensors"))),
    *(
        f"trtllm/{path.parent.name}/{path.name}"
        for path in sorted(GOLDENS.glob("trtllm/*/*"))
        if (path / "config.json").exists()
    ),
]
FAMILIES = list(samples.SAMPLES)


def source(name, folder):
    """Return a golden, or a model of a family whose sizes the blocks of every scheme divide."""
    if name not in samples.SAMPLES:
        return GOLDENS / name
    roomy_enough = samples.Model(samples.family_of(name).name, roomy.fields(name), 1)
    model = samples.draw(name, Random(1)) if name == "nemotron_nas" else roomy_enough
    return samples.save(model, folder / "made", "hf", Random(1), {}, finite=True)


def calibrated(path, file):
    """Write that every module with a weight saw inputs, keys and values of up to 3."""
    modules = [name.removesuffix(".weight") for name in samples.load(path) if name.endswith(".weight")]
    amax = {f"{module}.{what}_amax": np.array(3, np.float32) for module in modules for what in ("input", "k", "v")}
    save_file(amax, file)
    return file


def crossed(path, out, options):
    """Return the digest of every file of a target but its document, or that it is refused."""
    try:
        carnet.run(carnet.plan(path, **options), out)
    except CarnetError as error:
        return type(error).__name__
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.name != "carnet.json"
    }


def found(name):
    """Return the digests of all crossings of a source."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = source(name, folder)
        made = {kind: crossed(path, folder / kind, options) for kind, options in PLAIN.items()}
        if name not in samples.SAMPLES:
            return made
        amax = calibrated(path, folder / "amax.safetensors")
        for kind, options in CODED.items():
            coded = folder / kind.replace("/", " ")
            made[kind] = crossed(path, coded, options | ({"amax": amax} if options["quantize"] in STATIC else {}))
            if coded.exists():
                made[f"{kind}, and back"] = crossed(coded, folder / f"{coded.name}, and back", {"to": "hf", "dtype": "bf16"})
        return made


@pytest.mark.parametrize("name", SOURCES + FAMILIES)
def test_every_file_is_what_it_was(name):
    recorded = json.loads(RECORD.read_text())[name]
    assert found(name) == recorded


def test_nothing_is_recorded_in_vain():
    recorded = json.loads(RECORD.read_text())
    assert recorded.keys() == {*SOURCES, *FAMILIES}
    assert all(any(isinstance(files, dict) for files in kinds.values()) for kinds in recorded.values())


if __name__ == "__main__":
    with ProcessPoolExecutor() as workers:
        made = dict(zip(SOURCES + FAMILIES, workers.map(found, SOURCES + FAMILIES), strict=True))
    RECORD.write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")

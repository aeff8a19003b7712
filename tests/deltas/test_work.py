"""Who works on a delta, and in how much memory."""

import json
import random
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from carnet import deltas, forks
from carnet.deltas.making import _shards
from carnet.errors import BadRequest, CarnetError
from tests.deltas.hand import SHARD, tensors

# the sum over the processes at work, of what each does not share
CHILD = """
import sys, threading, time
from pathlib import Path
from carnet import deltas

peak, over = 0, threading.Event()
def family(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(each for task in tasks for child in task.read_text().split() for each in family(int(child)))]
def sample():
    global peak
    while not over.wait(0.005):
        found = 0
        for pid in family("self"):
            try:
                said = Path(f"/proc/{pid}/smaps_rollup").read_text()
                found += int(said.split("Pss_Anon:")[1].split()[0]) * 1024
            except (OSError, IndexError):
                pass
        peak = max(peak, found)
thread = threading.Thread(target=sample)
thread.start()
a, b, out, memory = sys.argv[1:]
deltas.delta(a, b, f"{out}/delta", memory=memory)
deltas.apply(a, f"{out}/delta", f"{out}/next", memory=memory)
assert deltas.verify(a, f"{out}/delta", against=b, memory=memory)
over.set()
thread.join()
print(peak)
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_processes_do_what_threads_do(versions, tmp_path, monkeypatch, threads):
    deltas.delta(versions.a, versions.b, tmp_path / "threads")
    monkeypatch.setattr(forks, "WORTH", 0)
    deltas.delta(versions.a, versions.b, tmp_path / "processes", threads=threads)
    for path in (tmp_path / "threads").iterdir():
        assert (tmp_path / "processes" / path.name).read_bytes() == path.read_bytes()
    deltas.apply(versions.a, tmp_path / "processes", tmp_path / "out", threads=threads)
    assert tensors(tmp_path / "out") == tensors(versions.b)
    assert deltas.verify(versions.a, tmp_path / "processes", against=versions.b, threads=threads)
    with pytest.raises(BadRequest, match="the base is another one"):
        deltas.apply(versions.c, tmp_path / "processes", tmp_path / "none", threads=threads)


GB = 1 << 30


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([], []),
        ([5], [1]),
        ([GB, GB, 1, GB], [2, 2]),  # two gigabytes each
        ([5 * GB, 1, 1], [1, 2]),  # one that is larger has its own, and no number is left out
        ([GB] * 64, [4] * 16),  # of a large delta a sixteenth each
    ],
)
def test_shards_are_numbered_from_zero_without_a_gap(sizes, groups):
    frames = {f"{number:03d}": size for number, size in enumerate(sizes)}
    found = _shards(frames)
    assert [len(names) for _, names in found] == groups
    assert [file for file, _ in found] == [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(len(groups))]
    assert [name for _, names in found for name in names] == [*frames]


def write(folder, seed):
    """Write a folder of 140 MB with one large tensor, half of whose bytes another seed changes."""
    folder.mkdir()
    sizes = {"large": 88 << 20, **{f"layer.{n}": 8 << 20 for n in range(6)}}
    header, at = {}, 0
    for name, size in sizes.items():
        header[name] = {"dtype": "BF16", "shape": [size >> 12, 2048], "data_offsets": [at, at := at + size]}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name, size in sizes.items():
            numbers = np.random.default_rng(0).integers(0, 256, size, np.uint8)
            if name != "layer.3":
                numbers[::2] ^= np.random.default_rng(seed).integers(0, 256, size // 2, np.uint8)
            file.write(numbers.tobytes())
    (folder / "config.json").write_text('{"architectures": ["NobodyKnowsIt"]}')


def test_memory_stays_inside_the_budget_whatever_the_tensors(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        write(tmp_path / name, seed)
    words = [str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path), "120M"]
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 120_000_000
    assert (tmp_path / "next/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert (tmp_path / "delta" / SHARD).stat().st_size > 40 << 20


def test_a_byte_that_is_damaged_is_refused_or_does_no_harm(versions, tmp_path):
    deltas.delta(versions.a, versions.b, tmp_path / "good")
    expected, chance = tensors(versions.b), random.Random(0)
    for number in range(60):
        delta, out = tmp_path / f"delta-{number}", tmp_path / f"out-{number}"
        shutil.copytree(tmp_path / "good", delta)
        path = sorted(delta.iterdir())[number % 3]
        raw = bytearray(path.read_bytes())
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        path.write_bytes(raw[: len(raw) if number % 2 else chance.randrange(len(raw))])
        try:
            deltas.apply(versions.a, delta, out, threads=1)
        except CarnetError:
            assert not list(tmp_path.glob(f"{out.name}*"))
        else:
            assert tensors(out) == expected

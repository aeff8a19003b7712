"""An examination stays inside its budget and reads each byte a few times, whatever the cores and however wrong the target is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file, save_file

import carnet
from carnet import api
from carnet.algebra.box import Box
from carnet.examiner import tensor_files
from carnet.examiner.means import BLOCKS, choose_means
from carnet.examining import examine
from carnet.formats.stored import Chunk, Stored
from carnet.progress import Progress
from carnet.storage.protocol import Opened
from carnet.storage.schemes import folder_at
from tests.counting import calls_of
from tests.peak import SAMPLED

CHILD = f"""
{SAMPLED}
import os
os.sched_getaffinity = lambda pid: set(range(64))
from carnet import api
thread.start()
verdict = api.verify(sys.argv[1], sys.argv[2], memory=int(sys.argv[3]))
stop()
print(verdict.equal, peak)
"""


def llama(root: Path, *, layers: int, hidden: int, seed: int = 0, vocab: int = 64) -> Path:
    """Write a Llama of random weights as transformers does."""
    root.mkdir(parents=True)
    random = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return random.integers(0, 1 << 16, shape, np.uint16).view(np.float16)

    tensors = {
        "model.embed_tokens.weight": weight(vocab, hidden),
        "model.norm.weight": weight(hidden),
        "lm_head.weight": weight(vocab, hidden),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors |= {f"{at}self_attn.{part}_proj.weight": weight(hidden, hidden) for part in "qkvo"}
        tensors |= {f"{at}mlp.{part}_proj.weight": weight(hidden, hidden) for part in ("gate", "up", "down")}
        tensors |= {f"{at}{part}_layernorm.weight": weight(hidden) for part in ("input", "post_attention")}
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": hidden, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": layers,
        "vocab_size": vocab, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "torch_dtype": "float16", "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("budget", [72 << 20, 128 << 20, 512 << 20])
def test_the_peak_stays_inside_the_budget_with_64_cores(tmp_path, budget):
    source = llama(tmp_path / "a", layers=3, hidden=2048)  # 180 MB
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(source), str(budget)], capture_output=True, text=True, check=True
    )
    equal, peak = child.stdout.split()
    assert equal == "True"
    assert int(peak) <= budget, f"{int(peak) >> 20} MiB"


def test_a_target_that_is_wrong_everywhere_is_read_a_few_times(tmp_path, monkeypatch):
    counted = {}
    for layers in (8, 32):
        a, b = (llama(tmp_path / f"{name}{layers}", layers=layers, hidden=64, seed=seed) for seed, name in enumerate("ab"))
        read, count = os.preadv, [0]

        def preadv(fd, buffers, offset, count=count, read=read):
            count[0] += sum(map(len, buffers))
            return read(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)  # counts, and changes nothing
        verdict = api.verify(a, b)
        monkeypatch.undo()
        assert len(verdict.findings) > 8 * layers
        size = (a / "model.safetensors").stat().st_size
        counted[layers] = count[0] / size
    assert counted[32] < 1.3 * counted[8]
    assert counted[32] < 12


@pytest.mark.parametrize("cores", [1, 2, 8, 64, 512])
@pytest.mark.parametrize("budget", [72 << 20, 100 << 20, 512 << 20, 4 << 30])
def test_threads_and_blocks_follow_from_the_budget(cores, budget):
    found = choose_means(budget, 100, cores)
    assert 1 <= found.threads <= cores
    assert found.block in BLOCKS
    assert (64 << 20) + found.threads * ((2 << 20) + 20 * found.block) <= budget


@pytest.mark.parametrize("strides", [(1, 300), (300, 1), (7, 2100), (900, 3)])
def test_a_region_of_any_strides_is_what_lies_there(tmp_path, strides):
    data = np.random.default_rng(0).integers(0, 1 << 16, 2_000_000, np.uint16)
    data.tofile(tmp_path / "f")
    shape = (300, 900) if strides[0] < strides[1] else (900, 300)
    stored = Stored("", "w", "bf16", shape, (Chunk(Box((0, 0), shape), "f", 64, strides),))
    whole = np.lib.stride_tricks.as_strided(data[32:], shape, tuple(2 * step for step in strides))
    for box in (Box((0, 0), shape), Box((3, 5), (200, 290)), Box((10, 0), (1, shape[1])), Box((0, 7), (shape[0], 1))):
        found = tensor_files.region(tensor_files.TensorFiles(Opened(folder_at(tmp_path).open)), stored, box)
        cut = tuple(slice(start, start + size) for start, size in zip(box.start, box.shape, strict=True))
        assert (found == whole[cut]).all()


def test_progress_is_on_the_thread_that_called_with_one_total_that_is_reached(tmp_path):
    import threading

    source, seen = llama(tmp_path / "a", layers=2, hidden=64), []

    def progress(at: Progress) -> None:
        seen.append((threading.current_thread(), at.done, at.total))

    for arguments in ((source, source), (source, llama(tmp_path / "b", layers=2, hidden=64, seed=1))):
        seen.clear()
        api.verify(*arguments, progress=progress)
        assert {thread for thread, _, _ in seen} == {threading.main_thread()}
        assert len({total for _, _, total in seen[1:]}) == 1
        assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
        assert seen[-1][1] == seen[-1][2]
    api.cross(source, tmp_path / "out", to="hf")
    seen.clear()
    api.verify(tmp_path / "out", progress=progress)
    assert seen[0][1] == 0
    assert seen[-1][1] == seen[-1][2] > 0


def test_what_ends_at_once_waits_until_all_of_a_target_is_written(tmp_path):
    source, target, waited = llama(tmp_path / "a", layers=2, hidden=64), llama(tmp_path / "b", layers=2, hidden=64), []
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "architectures": ["Nobody"], "model_type": "nobody"}))
    request = carnet.plan(source, to="hf").request

    def order(needs):
        waited.append([*needs])
        return iter(())

    proof = examine(folder_at(source), folder_at(target), request, [], 1 << 30, 1, None, order=order)
    assert not proof.verdict
    assert waited == [[]]


def digests_of(folder: Path, ranks: bool) -> dict[str, str]:
    """Return the digest of every tensor's bytes, as the safetensors library reads them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        label = f"{file.stem}/" if ranks else ""
        found |= {label + name: xxhash.xxh3_128_hexdigest(tensor.tobytes()) for name, tensor in load_file(file).items()}
    return found


@pytest.mark.parametrize("memory", ["100M", "512M"])  # blocks that are smaller and larger than a tensor
@pytest.mark.parametrize(("to", "asked"), [("hf", {}), ("trtllm", {"tp": 2}), ("trtllm", {"dtype": "f32"})])
def test_digests_are_those_of_the_bytes_however_they_were_read(tmp_path, to, asked, memory):
    source, out = llama(tmp_path / "a", layers=2, hidden=256), tmp_path / "out"
    assert api.cross(source, out, to=to, memory=memory, **asked)
    said = json.loads((out / "carnet.json").read_text())
    for side, folder in (("source", source), ("target", out)):
        written = {name: each["digest"] for name, each in said[side]["tensors"].items()}
        assert written == digests_of(folder, ranks=side == "target" and to == "trtllm")


def test_a_block_is_put_together_in_as_many_calls_however_many_chunks_there_are(tmp_path):
    def calls(number):
        np.arange(number * 4, dtype=np.uint16).tofile(tmp_path / "f")
        chunks = tuple(Chunk(Box((at, 0), (1, 4)), "f", at * 8, (4, 1)) for at in range(number))
        held, stored = tensor_files.TensorFiles(Opened(folder_at(tmp_path).open)), Stored("", "w", "bf16", (number, 4), chunks)
        assert tensor_files.region(held, stored, Box((5, 1), (3, 2))).tolist() == [[21, 22], [25, 26], [29, 30]]
        count = calls_of(lambda: tensor_files.region(held, stored, Box((50, 1), (3, 2))))
        held.files.close()
        return count

    assert calls(100) == calls(10_000)

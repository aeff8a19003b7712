"""NVIDIA's own converters as referee: from the same Hugging Face folder carnet writes the same ranks, bit for bit."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import carnet
from carnet.errors import BadRequest

pytestmark = pytest.mark.referee

GOLDENS = Path(__file__).parents[1] / "goldens/trtllm"
CASES = (
    ("llama", "trtllm-tp1pp1", {}),
    ("llama", "trtllm-tp2pp2", {"tp": 2, "pp": 2}),
    ("llama_kv2", "trtllm-tp2pp2", {"tp": 2, "pp": 2}),
    ("llama_kv2", "trtllm-tp4", {"tp": 4}),  # two KV heads, each on two ranks
    ("llama_tied", "trtllm-tp2pp2", {"tp": 2, "pp": 2}),
    ("gpt2", "trtllm-tp2pp2", {"tp": 2, "pp": 2}),
    ("falcon_new", "trtllm-tp2pp2", {"tp": 2, "pp": 2}),  # a norm for each of two branches, heads grouped in one tensor
    ("mixtral", "trtllm-tp2pp2", {"tp": 2, "pp": 2}),  # every rank has a part of every expert
    ("mixtral", "trtllm-tp2ep2", {"tp": 2, "ep": 2}),  # a rank has half of the experts, whole
)
WHICH = pytest.mark.parametrize(("model", "made", "cut"), CASES, ids=[f"{model}-{made}" for model, made, _ in CASES])
# float32 tables that NVIDIA's save_checkpoint writes along and its loader does not ask for
BUFFERS = ("embed_positions", "embed_positions_for_gpt_attention", "rotary_inv_freq")

# NVIDIA keeps routers in float32, and so does a folder that is made of its ranks unless it is asked for one type
ASKED = {"mixtral": {"dtype": "bf16"}}
# transformers takes a width of heads that is not said for this one
SAID = {"mixtral": {"head_dim"}}


def weights(file):
    """Return name -> (dtype, shape, bytes), without the rotary buffers."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, tensor in load_file(file).items()
        if name.rsplit(".", 1)[-1] not in BUFFERS
    }


def config(folder):
    return json.loads((folder / "config.json").read_text())


@WHICH
def test_every_rank_holds_what_nvidia_s_converter_writes(model, made, cut, tmp_path):
    out = tmp_path / "ranks"
    assert carnet.cross(GOLDENS / model / "hf", out, to="trtllm", **cut).equal
    theirs = GOLDENS / model / made
    names = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert sorted(path.name for path in out.glob("*.safetensors")) == names
    assert names == [f"rank{rank}.safetensors" for rank in range(cut.get("tp", 1) * cut.get("pp", 1))]
    for name in names:
        ours, expected = weights(out / name), weights(theirs / name)
        assert ours.keys() == expected.keys()
        assert [tensor for tensor in expected if ours[tensor] != expected[tensor]] == []


@WHICH
def test_every_config_field_is_the_one_that_nvidia_s_converter_writes(model, made, cut, tmp_path):
    out = tmp_path / "ranks"
    assert carnet.cross(GOLDENS / model / "hf", out, to="trtllm", **cut).equal
    ours, theirs = config(out), config(GOLDENS / model / made)
    if model == "gpt2":
        # NVIDIA's GPT config has no such field; without it a head of its own could not be told from a tied one
        assert ours.pop("tie_word_embeddings") is True
    assert ours == theirs


@WHICH
def test_nvidia_s_ranks_come_back_as_the_folder_that_they_were_made_of(model, made, cut, tmp_path):
    out = tmp_path / "hf"
    assert carnet.cross(GOLDENS / model / made, out, to="hf", **ASKED.get(model, {})).equal
    assert weights(out / "model.safetensors") == weights(GOLDENS / model / "hf/model.safetensors")


@pytest.mark.parametrize("made", ["trtllm-tp2pp2", "trtllm-tp2ep2"])
def test_routers_come_back_as_wide_as_nvidia_keeps_them(made, tmp_path):
    assert carnet.cross(GOLDENS / "mixtral" / made, tmp_path / "hf", to="hf").equal
    ours, theirs = load_file(tmp_path / "hf/model.safetensors"), load_file(GOLDENS / "mixtral/hf/model.safetensors")
    wide = {name for name, tensor in ours.items() if tensor.dtype == torch.float32}
    assert wide == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(4)}
    assert all(torch.equal(ours[name], theirs[name].float()) for name in wide)


@WHICH
def test_nvidia_s_config_comes_back_as_the_one_that_it_was_made_of(model, made, cut, tmp_path):
    from transformers import AutoConfig

    out = tmp_path / "hf"
    assert carnet.cross(GOLDENS / model / made, out, to="hf").equal
    ours, theirs = AutoConfig.from_pretrained(out).to_dict(), AutoConfig.from_pretrained(GOLDENS / model / "hf").to_dict()
    if model == "gpt2":
        theirs["n_inner"] = 4 * theirs["n_embd"]  # modeling_gpt2.py: what null means
    different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert different - {"_name_or_path", "transformers_version"} == SAID.get(model, set())


@WHICH
def test_nvidia_s_ranks_are_verified_as_the_folder_that_they_were_made_of(model, made, cut):
    assert carnet.verify(GOLDENS / model / "hf", GOLDENS / model / made).findings == ()
    # NVIDIA stores the router of a mixture wider than the folder has it: the way back is a cast, and has to be asked for
    asked = {"dtype": "bf16"} if model == "mixtral" else {}
    assert carnet.verify(GOLDENS / model / made, GOLDENS / model / "hf", **asked).findings == ()


# --- tables of positions ---------------------------------------------------------------------------------------------------------


def changed(tmp_path, model, made, change):
    """Copy NVIDIA's ranks and change the tensors of the second; return what is found there, and what was not compared."""
    ranks = shutil.copytree(GOLDENS / model / made, tmp_path / "ranks")
    tensors = load_file(ranks / "rank1.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, ranks / "rank1.safetensors")
    verdict = carnet.verify(GOLDENS / model / "hf", ranks)
    return {(finding.stored, finding.what) for finding in verdict.findings}, verdict.unsure


def exchanged(table, first, second):
    table[0, [first, second]] = table[0, [second, first]]


TABLE = "embed_positions_for_gpt_attention"
DAMAGES = {
    "one element": ("embed_positions", lambda t: t["embed_positions"][0, 100].__setitem__(3, 0.5)),
    "the least that counts": (TABLE, lambda t: t[TABLE][0, 777:778].add_(2e-6)),
    "the last element": (TABLE, lambda t: t[TABLE][0, -1:].neg_()),
    "two positions exchanged": ("embed_positions", lambda t: exchanged(t["embed_positions"], 5, 6)),
    "sines before cosines": (TABLE, lambda t: t.update({TABLE: t[TABLE].reshape(-1, 2).flip(1).reshape(1, -1)})),
    "a table in the other's order": (TABLE, lambda t: t.update({TABLE: t["embed_positions"].reshape(1, -1).clone()})),
    "too short": ("embed_positions", lambda t: t.update(embed_positions=t["embed_positions"][:, :64])),
    "of another type": ("embed_positions", lambda t: t.update(embed_positions=t["embed_positions"].half())),
    "zeros": (TABLE, lambda t: t[TABLE].zero_()),
    "a frequency": ("rotary_inv_freq", lambda t: t["rotary_inv_freq"][1:2].mul_(1 + 1e-6)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("model", ["llama", "mixtral"])  # of two bases, of which NVIDIA's own embed_positions know nothing
def test_a_table_of_positions_that_nvidia_would_not_write_is_a_finding(model, damage, tmp_path):
    name, change = DAMAGES[damage]
    what = "rotary buffer" if name == "rotary_inv_freq" else "table of positions"
    assert changed(tmp_path, model, "trtllm-tp2pp2", change) == ({(f"rank1/{name}", f"{what}: wrong values")}, ())


def test_a_table_that_a_model_without_rotary_positions_has_is_named_as_not_compared(tmp_path):
    found, unsure = changed(tmp_path, "gpt2", "trtllm-tp2pp2", lambda tensors: tensors.update({TABLE: torch.zeros(1, 8)}))
    assert (found, unsure) == (set(), (f"rank1/{TABLE}",))
    with pytest.raises(BadRequest, match="what a tensor of the target must hold"):
        carnet.verify(GOLDENS / "gpt2/hf", tmp_path / "ranks", seal=True)


def stretched(said, base, width, kind):
    """Return frequencies one by one, as TensorRT-LLM's functional.py makes them; ``kind`` is what numpy takes a number of f32 for."""
    found = []
    for at in range(0, width, 2):
        plain = np.float32(1) / np.float32(base ** (at / width))
        if said["rope_type"] == "linear":
            found.append(np.float32(1 / said["factor"]) / np.float32(base ** (at / width)))
            continue
        wave = kind(2 * math.pi) / kind(plain)
        low, high, length = said["low_freq_factor"], said["high_freq_factor"], said["original_max_position_embeddings"]
        smooth = (kind(length) / wave - kind(low)) / kind(high - low)
        between = (kind(1) - smooth) * kind(plain) / kind(said["factor"]) + smooth * kind(plain)
        found.append(plain if wave < length / high else kind(plain) / kind(said["factor"]) if wave > length / low else between)
    return np.array(found, np.float32)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"rope_type": "linear", "factor": 3.0}, np.float64),
        ({**LLAMA3, "original_max_position_embeddings": 40}, np.float64),
        ({**LLAMA3, "original_max_position_embeddings": 40}, np.float32),
    ],
)
def test_tables_of_stretched_positions_are_compared_too(said, kind, tmp_path):
    source = shutil.copytree(GOLDENS / "llama/hf", tmp_path / "hf")
    written = config(source)
    rope = {"rope_theta": 10000.0, **said}
    (source / "config.json").write_text(json.dumps({**written, "rope_scaling": None, "rope_parameters": rope}))
    assert carnet.cross(source, tmp_path / "ranks", to="trtllm").equal
    (tmp_path / "ranks/carnet.json").unlink()
    inverse = stretched(said, 10000.0, 8, kind)
    angles = np.arange(128, dtype=np.float32)[:, None] * inverse
    table = np.stack([np.cos(angles), np.sin(angles)], -1).reshape(1, -1)
    tensors = load_file(tmp_path / "ranks/rank0.safetensors")
    for off in (0.0, 1e-5):
        tables = {"rotary_inv_freq": torch.from_numpy(inverse), TABLE: torch.from_numpy(table + np.float32(off))}
        save_file({**tensors, **tables}, tmp_path / "ranks/rank0.safetensors")
        found = carnet.verify(source, tmp_path / "ranks").findings
        assert {finding.what for finding in found} == ({"table of positions: wrong values"} if off else set())

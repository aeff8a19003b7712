"""Deltas of what lies in other layouts are those of the Hugging Face folders that it would cross to."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import carnet
from carnet import deltas
from carnet.cli import main
from carnet.deltas.sides import planned_side
from carnet.errors import BadCheckpoint, BadRequest
from tests.deltas.hand import INDEX, SHARD, tensors


@pytest.fixture(scope="module")
def ranks(versions, tmp_path_factory):
    """The first two versions as Megatron's stores and as TensorRT-LLM's ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in "ab":
        carnet.cross(getattr(versions, name), folder / f"megatron-{name}", to="megatron")
        carnet.cross(getattr(versions, name), folder / f"trtllm-{name}", to="trtllm", tp=2)
    return folder


MEGATRON = Path(__file__).parents[1] / "goldens" / "megatron"
PAIRS = [("hf", "megatron"), ("megatron", "hf"), ("megatron", "megatron"), ("trtllm", "hf"), ("trtllm", "megatron")]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_delta_does_not_depend_on_the_layouts(versions, ranks, tmp_path, one, other):
    places = [getattr(versions, v) if kind == "hf" else ranks / f"{kind}-{v}" for v, kind in (("a", one), ("b", other))]
    deltas.delta(versions.a, versions.b, tmp_path / "plain")
    deltas.delta(*places, tmp_path / "delta", vocab_size=96)
    for name in (INDEX, SHARD, "carnet.json"):
        assert (tmp_path / "delta" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize("name", ["llama_te_pp2_vpp", "gpt_te_tp2", "qwen2_tp2", "mixtral_ep2", "mamba_te_tp2"])
@pytest.mark.parametrize("window", [64, 500, 4096])
def test_tensors_are_assembled_by_windows_however_small(name, window, tmp_path):
    carnet.cross(MEGATRON / name, tmp_path / "out", to="hf")
    whole = tensors(tmp_path / "out")
    side = planned_side(carnet.plan(MEGATRON / name, to="hf"))
    assert side.tensors.keys() == whole.keys()
    with side.opened(window, lambda nbytes: None) as reader:
        for tensor in side.tensors.values():
            pieces = [reader.read(tensor.name, *piece).tobytes() for piece in tensor.pieces(window)]
            assert max(map(len, pieces)) <= window
            assert b"".join(pieces) == whole[tensor.name][2]


def test_a_delta_is_the_same_with_little_memory(versions, ranks, tmp_path):
    for name, memory in (("large", "512M"), ("small", "91M")):
        deltas.delta(ranks / "megatron-a", ranks / "trtllm-b", tmp_path / name, vocab_size=96, memory=memory, threads=1)
    assert (tmp_path / "large" / SHARD).read_bytes() == (tmp_path / "small" / SHARD).read_bytes()
    for memory in ("80M", "1M"):
        with pytest.raises(BadRequest, match="the memory budget is too small for this delta"):
            deltas.delta(ranks / "megatron-a", ranks / "trtllm-b", tmp_path / "none", vocab_size=96, memory=memory)


FAMILIES = {  # whose tensors or config Megatron's arguments alone do not tell
    "Mistral": {"sliding_window": None},
    "Phi3": {"pad_token_id": 0},
    "Mixtral": {"num_local_experts": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trainers_checkpoint_is_of_the_family_of_the_folder_beside_it(family, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    config = getattr(transformers, f"{family}Config")(num_key_value_heads=2, **sizes, **FAMILIES[family])
    getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron")
    for name, pair in (("1", ("hf", "megatron")), ("2", ("megatron", "hf"))):
        made = deltas.delta(*(tmp_path / each for each in pair), tmp_path / name, vocab_size=96)
        assert (made.changed, made.tensors) == (0, len(tensors(tmp_path / "hf")))


def test_a_cast_is_of_both_versions(versions, tmp_path):
    for name in "ab":
        carnet.cross(getattr(versions, name), tmp_path / f"f32-{name}", to="hf", dtype="f32")
    deltas.delta(tmp_path / "f32-a", tmp_path / "f32-b", tmp_path / "delta", dtype="bf16")
    deltas.apply(versions.a, tmp_path / "delta", tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(versions.b)


def test_another_type_is_no_version(versions, tmp_path):
    carnet.cross(versions.b, tmp_path / "b", to="hf", dtype="f32")
    with pytest.raises(BadRequest, match="two versions of one model have the same tensors"):
        deltas.delta(versions.a, tmp_path / "b", tmp_path / "out")


def test_copies_that_differ_stop_a_delta(versions, ranks, tmp_path):
    shutil.copytree(ranks / "trtllm-b", tmp_path / "b")
    path = tmp_path / "b" / "rank1.safetensors"
    raw = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    raw[begin + json.loads(raw[8:begin])["transformer.ln_f.weight"]["data_offsets"][0]] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BadCheckpoint, match="two copies of"):
        deltas.delta(versions.a, tmp_path / "b", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("base", "against"), [("hf", "hf"), ("megatron", "hf"), ("hf", "trtllm")])
def test_what_a_delta_makes_is_compared_with_a_version(versions, ranks, tmp_path, base, against):
    deltas.delta(versions.a, versions.b, tmp_path / "delta")
    at = {("hf", v): getattr(versions, v) for v in "ab"} | {
        (k, v): ranks / f"{k}-{v}" for k in ("megatron", "trtllm") for v in "ab"
    }
    words = {} if base == against == "hf" else {"vocab_size": 96}
    assert deltas.verify(at[base, "a"], tmp_path / "delta", against=at[against, "b"], **words)
    different = deltas.verify(at[base, "a"], tmp_path / "delta", against=at[against, "a"], **words)
    changed = json.loads((tmp_path / "delta" / INDEX).read_text())["weight_map"].keys()
    assert {finding.stored for finding in different.findings} == changed


def test_the_command_says_which_elements_differ(versions, tmp_path, capsys):
    deltas.delta(versions.a, versions.b, tmp_path / "delta")
    words = ["verify", str(versions.a), str(tmp_path / "delta"), "--against"]
    assert main.main([*words, str(versions.b)], prog_name="carnet", standalone_mode=False) == 0
    assert f"is {versions.b}" in capsys.readouterr().out
    assert main.main([*words, str(versions.c)], prog_name="carnet", standalone_mode=False) == 3
    assert "elements differ, the first at [" in capsys.readouterr().out


def test_a_base_that_is_not_that_of_the_delta_is_refused_before_anything_is_compared(versions, tmp_path):
    deltas.delta(versions.a, versions.b, tmp_path / "delta")
    with pytest.raises(BadRequest, match="the base is another one"):
        deltas.verify(versions.c, tmp_path / "delta", against=versions.b)

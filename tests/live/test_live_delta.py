"""A delta to tensors of this process is that to the folder that they would be saved as."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import carnet
from carnet import deltas, live
from carnet.errors import BadRequest
from tests.live.test_live import DENSE, as_tensor, held


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes)).to(torch.bfloat16)


def test_tensors_in_memory_have_the_delta_of_their_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        model.lm_head.weight[5:9] *= 1.01
    model.save_pretrained(tmp_path / "b")
    tensors = dict(model.state_dict())
    tensors["lm_head.weight"] = tensors["lm_head.weight"].t().contiguous().t()  # the same numbers, in another order
    made = live.delta(tmp_path / "a", tensors, tmp_path / "live", checksum="xxh3-128")
    assert (made.changed, made.version) == (1, "000001")
    deltas.delta(tmp_path / "a", tmp_path / "b", tmp_path / "files", checksum="xxh3-128")
    for path in (tmp_path / "files").iterdir():
        assert (tmp_path / "live" / path.name).read_bytes() == path.read_bytes()


def test_tensors_of_another_model_have_none(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    tensors = dict(model.state_dict())
    del tensors["lm_head.weight"]
    with pytest.raises(BadRequest, match=r"two versions of one model have the same tensors, and lm_head.weight is not"):
        live.delta(tmp_path / "a", tensors, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_round_of_ranks_brought_becomes_a_delta(world, tmp_path):
    found = world.run("cross", DENSE, {"tp": 2, "pp": 2}, {"ranks": (0,)}, "hf", str(tmp_path / "megatron"))
    tensors = {name: as_tensor(part) for name, part in found[0][0].items()}
    carnet.cross(tmp_path / "megatron", tmp_path / "base", to="hf")
    path = tmp_path / "base/model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-200:] = bytes(200)  # the version before
    path.write_bytes(raw)
    assert live.delta(tmp_path / "base", tensors, tmp_path / "delta").changed
    deltas.apply(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    assert held(tmp_path / "out/model.safetensors") == found[0][0]
    assert deltas.verify(tmp_path / "base", tmp_path / "delta", against=tmp_path / "megatron")

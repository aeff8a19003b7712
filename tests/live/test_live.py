"""Real models of megatron-core on four ranks go live to another cut: the same bytes as the crossing of their files."""

import json

import pytest
import torch
from safetensors import safe_open

import carnet

DENSE = {"layers": 4, "hidden": 32, "ffn": 48, "heads": 8, "kv": 4, "vocab": 97, "padded": 256}
MIXTURE = DENSE | {"experts": 4, "ffn": 24, "moe_ffn": 24}


def held(path):
    """Return the tensors of a file as the ranks return theirs."""
    found = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name).contiguous()
            found[name] = str(tensor.dtype), tuple(tensor.shape), tensor.view(-1).view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize(
    ("sizes", "cut", "target"),
    [
        (DENSE, {"tp": 2, "pp": 2}, {"tp": 4}),
        (DENSE, {"tp": 4}, {"ranks": (0,)}),
        (DENSE | {"tied": True}, {"tp": 2}, {"tp": 2, "pp": 2}),
        (MIXTURE, {"ep": 2}, {"tp": 2, "ranks": (1, 3)}),
    ],
)
def test_ranks_of_tensorrt_get_the_bytes_of_the_crossing_of_files(world, tmp_path, sizes, cut, target):
    found = world.run("cross", sizes, cut, target, "trtllm", str(tmp_path / "megatron"))
    sizes_of = {name: target.get(name, 1) for name in ("tp", "pp")}
    assert carnet.cross(tmp_path / "megatron", tmp_path / "out", to="trtllm", **sizes_of).equal
    for at, rank in enumerate(target.get("ranks", range(4))):
        assert found[rank][0] == held(tmp_path / f"out/rank{at}.safetensors")
        assert json.loads(found[rank][1]["config.json"]) == json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize(("sizes", "cut", "ranks"), [(DENSE, {"tp": 2, "pp": 2}, (0, 2)), (MIXTURE, {"tp": 2, "ep": 2}, (3,))])
def test_every_rank_of_an_engine_gets_the_whole_model(world, tmp_path, sizes, cut, ranks):
    found = world.run("cross", sizes, cut, {"ranks": ranks}, "hf", str(tmp_path / "megatron"))
    assert carnet.cross(tmp_path / "megatron", tmp_path / "out", to="hf").equal
    expected = held(tmp_path / "out/model.safetensors")
    assert [rank for rank in range(4) if found[rank][0]] == list(ranks)
    assert all(found[rank][0] == expected for rank in ranks)


# along which dimension transformers' own plans of tensor parallelism cut a projection
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head", "w1", "w3")
COLUMNS = ("o_proj", "down_proj", "w2")


@pytest.mark.parametrize(("sizes", "cut"), [(DENSE, {"pp": 4}), (MIXTURE, {"ep": 4}), (MIXTURE, {"tp": 2, "ep": 2, "etp": 1})])
def test_a_rank_of_an_engine_gets_its_part_under_the_names_of_hugging_face(world, tmp_path, sizes, cut):
    found = world.run("cross", sizes, cut, {"tp": 2}, "hf", str(tmp_path / "megatron"))
    whole = world.run("cross", sizes, cut, {"ranks": (0,)}, "hf", str(tmp_path / "again"))[0][0]
    for rank in range(4):
        assert found[rank][0].keys() == whole.keys()
        for name, part in found[rank][0].items():
            module = name.split(".")[-2]
            dim = 0 if module in ROWS else 1 if module in COLUMNS else None
            tensor = as_tensor(whole[name])
            if dim == 0 and len(tensor) % 2:
                tensor = torch.cat([tensor, torch.zeros_like(tensor[:1])])
            assert torch.equal(as_tensor(part), tensor if dim is None else tensor.chunk(2, dim)[rank % 2]), name


def as_tensor(part):
    dtype, shape, data = part
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype.removeprefix("torch."))).view(shape)

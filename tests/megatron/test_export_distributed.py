"""The converter of ranks, in a job of two: beside Megatron's own, and beside the whole model converted on one device."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import carnet
from carnet.megatron.export.data_type import DataType
from carnet.megatron.export.export_config import ExportConfig
from carnet.megatron.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT
from carnet.megatron.export.trtllm.records import Mapping
from carnet.megatron.export.trtllm.trtllm_weights_converter.single_device_trtllm_model_weights_converter import (
    SingleDeviceTRTLLMModelWeightsConverter,
)
from tests.megatron.export_models import assert_same

pytestmark = pytest.mark.referee

ROOT = Path(__file__).parents[2]
PATHS = (str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")]))
LAYERS = 4
BESIDE = ["gpt", "llama", "stages"]
DEVICE = "cuda" if torch.cuda.device_count() > 1 else "cpu"  # on two GPUs over NCCL, where there are such


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run the job, and return where each rank left what it found."""
    folder = tmp_path_factory.mktemp("ranks")
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("export_ranks.py")), str(folder), DEVICE]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"cases{rank}.pt", weights_only=False) for rank in range(2)]


def test_rows_of_a_vocabulary_come_to_the_rank_that_wants_them(folder):
    world = 4 if DEVICE == "cpu" else 2
    ranks = [torch.load(folder / f"tables{rank}.pt") for rank in range(world)]
    assert len(ranks[0]) == (6 if DEVICE == "cpu" else 3)
    for (rows, size), first in ranks[0].items():
        share = -(-size // world)
        numbers = torch.arange(1.0, 1 + world * rows)
        expected = torch.cat([numbers[:size], torch.zeros(world * share - size)])
        assert first.shape == (share, 2)
        assert torch.equal(torch.cat([rank[rows, size] for rank in ranks]), expected[:, None].expand(-1, 2))


@pytest.mark.parametrize("case", BESIDE)
def test_every_rank_has_what_megatrons_converter_gives_it(ranks, case):
    for rank in ranks:
        assert_same(rank[case]["ours"], rank[case]["theirs"])
        assert {tensor.dtype for tensor in rank[case]["ours"].values()} == {torch.bfloat16}


@pytest.mark.parametrize("case", ["gpt", "llama", "odd"])
def test_the_ranks_have_what_the_whole_model_gives_them_on_one_device(ranks, case):
    states, vocab = [rank[case]["state"] for rank in ranks], 17 if case == "odd" else 18
    gated = ranks[0][case]["config"]["gated_linear_unit"]
    whole = {name: gathered(name, [state[name] for state in states], gated, vocab) for name in states[0]}
    config = SimpleNamespace(
        **ranks[0][case]["config"],
        num_layers=LAYERS,
        num_attention_heads=4,
        num_query_groups=ranks[0][case]["said"]["num_kv_heads"],
        hidden_size=16,
        kv_channels=4,
        normalization="RMSNorm" if gated else "LayerNorm",
    )
    cut = ExportConfig(inference_tp_size=2, use_parallel_embedding=True)
    single = SingleDeviceTRTLLMModelWeightsConverter(cut, config, DataType.bfloat16)
    single.convert(whole, DEFAULT_CONVERSION_DICT)
    for number, rank in enumerate(ranks):
        place = Mapping(world_size=2, rank=number, tp_size=2)
        assert_same(rank[case]["ours"], single.get_local_model_weights_per_gpu(place, None))


def test_the_ranks_have_the_bytes_of_the_crossing_of_files(ranks, folder, tmp_path):
    cut = {"to": "trtllm", "tp": 2, "parallel_embedding": "rows"}
    assert carnet.cross(folder / "megatron", tmp_path / "out", **cut).equal
    for number, rank in enumerate(ranks):
        assert_same(rank["filed"], load_file(tmp_path / f"out/rank{number}.safetensors"))


def gathered(name, parts, gated, vocab):
    """Return a tensor of the whole model as megatron-core shares it."""
    match name.split(".")[-2:]:
        case ["word_embeddings" | "output_layer", _]:
            return torch.cat(parts)[:vocab]
        case ["linear_fc1", _] if gated:
            return torch.cat([half for each in zip(*(part.chunk(2) for part in parts), strict=True) for half in each])
        case ["linear_qkv" | "linear_fc1", _]:
            return torch.cat(parts)
        case ["linear_proj" | "linear_fc2", "weight"]:
            return torch.cat(parts, dim=1)
        case _:
            assert torch.equal(*parts)
            return parts[0]


def test_the_padding_of_the_vocabulary_is_gone_and_what_is_left_is_shared_evenly(ranks):
    for name, stored in {
        "transformer.vocab_embedding.weight": "embedding.word_embeddings.weight",
        "lm_head.weight": "output_layer.weight",
    }.items():
        padded = torch.cat([rank["odd"]["state"][stored] for rank in ranks]).bfloat16()
        found = [rank["odd"]["ours"][name] for rank in ranks]
        assert [len(part) for part in found] == [9, 9]
        assert torch.equal(torch.cat(found)[:17], padded[:17])
        assert torch.equal(found[1][8], torch.zeros(16, dtype=torch.bfloat16))


def test_a_stage_has_its_own_layers_and_its_own_end(ranks):
    first, last = (rank["stages"]["ours"] for rank in ranks)
    assert {name.split(".")[2] for name in first if ".layers." in name} == {"0", "1"}
    assert {name.split(".")[2] for name in last if ".layers." in name} == {"0", "1"}
    assert len(first["transformer.vocab_embedding.weight"]) == len(last["lm_head.weight"]) == 17
    assert "lm_head.weight" not in first
    assert "transformer.position_embedding.weight" not in last
    assert not torch.equal(first["transformer.layers.0.mlp.fc.weight"], last["transformer.layers.0.mlp.fc.weight"])


@pytest.mark.parametrize("case", [*BESIDE, "odd"])
def test_a_second_conversion_fills_the_same_memory(ranks, case):
    assert all(rank[case]["same place"] for rank in ranks)


def test_the_converter_knows_its_place(ranks):
    for number, rank in enumerate(ranks):
        common = {"num_kv_heads": 4, "storage_type": torch.bfloat16}
        tensor = {"inference_tp_size": 2, "inference_pp_size": 1, "tp_rank": number, "pp_rank": 0}
        assert rank["gpt"]["said"] == common | tensor
        assert rank["stages"]["said"] == common | {
            "inference_tp_size": 1,
            "inference_pp_size": 2,
            "tp_rank": 0,
            "pp_rank": number,
        }


FACTORS = [
    f"{module}.{what}_scaling_factor"
    for module in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
    for what in ("weights", "activation")
]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_fp8_comes_out_of_the_ranks_with_its_scales(ranks, weights, cache):
    for number, rank in enumerate(ranks):
        found = rank["fp8"][weights, cache]
        (made,), (config,) = found["ours"], found["configs"]
        assert (config["quantization"]["quant_algo"], config["quantization"]["kv_cache_quant_algo"]) == (
            "FP8" if weights else None,
            "FP8" if cache else None,
        )
        sizes = {"world_size": 2, "tp_size": 2, "pp_size": 1, "vocab_size": 18, "use_parallel_embedding": True, "rank": number}
        assert {key: config[key] for key in sizes} == sizes
        factors = {f"transformer.layers.{layer}.{name}" for layer in range(LAYERS) for name in FACTORS if weights}
        caches = {f"transformer.layers.{layer}.attention.kv_cache_scaling_factor" for layer in range(LAYERS) if cache}
        assert {name for name in made if name.endswith("scaling_factor")} == factors | caches
        assert {made[name].dtype for name in factors | caches} <= {torch.float32}
        assert {tuple(made[name].shape) for name in factors | caches} <= {(1,)}
        assert all(made[name].item() == 1 for name in caches)
        plain = {name: tensor for name, tensor in made.items() if name not in factors | caches}
        assert_same(plain, found["theirs"])
        if weights:
            assert made["transformer.layers.3.mlp.gate.weight"].dtype == torch.float8_e4m3fn
            assert made["transformer.layers.3.mlp.gate.weights_scaling_factor"].item() == 1 / 32
            assert made["transformer.layers.3.mlp.gate.activation_scaling_factor"].item() == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("chunks", "AssertionError", "Virtual parallelism is not supported in GPU Converter"),
        ("groups", "Exception", "Number of query groups of the models is 3. Please select tensor parallelism size that can "),
        ("experts", "ValueError", "transformer.layers.mlp.fc.weight.expert cannot be handled by GPU converter"),
        ("vocabulary", "BadCheckpoint", "the vocabulary is larger than the embedding"),
        ("no tensor", "AssertionError", "Expected a tensor for transformer.layers.0.mlp.proj.weight but got <class 'list'>"),
        ("no number", "AssertionError", "Layer number is None for decoder.layers.mlp.linear_fc2.weight"),
    ],
)
def test_what_no_rank_can_convert_is_refused_on_all(ranks, what, kind, says):
    for rank in ranks:
        kinds, found = rank["refusals"][what]
        assert kind in kinds
        assert "CarnetError" in kinds
        assert found.startswith(says)

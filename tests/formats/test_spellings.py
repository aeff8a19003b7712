"""What Megatron calls the same weights on disk: legacy grouped experts, halves of a gated MLP, plain torch.distributed.checkpoint."""

import argparse
import copy
import enum
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import carnet
from carnet.dialects.entries import entries
from carnet.dialects.megatron.rows import MEGATRON
from carnet.errors import BadCheckpoint
from carnet.formats.detect import open_checkpoint
from carnet.inventory.survey import take

HIDDEN, KV, REP, DIM, FFN, EXPERTS, VOCAB, LAYERS = 16, 2, 2, 4, 12, 4, 40, 2
State = dict[str, torch.Tensor]
REFEREE = pytest.mark.referee


def arguments(tensor: int = 1, expert: int = 1, **more: object) -> argparse.Namespace:
    said = {
        "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": KV * REP, "num_query_groups": KV,
        "group_query_attention": True, "kv_channels": DIM, "ffn_hidden_size": FFN, "vocab_size": VOCAB - 3,
        "padded_vocab_size": VOCAB, "max_position_embeddings": 64, "normalization": "RMSNorm", "layernorm_epsilon": 1e-6,
        "swiglu": True, "position_embedding_type": "rope", "rotary_base": 10000, "add_bias_linear": False,
        "untie_embeddings_and_output_weights": True, "params_dtype": torch.bfloat16, "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": 1, "expert_model_parallel_size": expert, "expert_tensor_parallel_size": tensor,
    }  # fmt: skip
    return argparse.Namespace(**said, **more)


MIXED = {"num_experts": EXPERTS, "moe_ffn_hidden_size": FFN, "moe_router_topk": 2}


def shapes(*, mixed: bool) -> dict[str, tuple[int, ...]]:
    """Return the module's names and shapes in one rank: Transformer Engine's spec, with TEGroupedMLP's experts."""
    found: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (VOCAB, HIDDEN),
        "decoder.final_layernorm.weight": (HIDDEN,),
        "output_layer.weight": (VOCAB, HIDDEN),
    }
    mlp: dict[str, tuple[int, ...]] = {
        "mlp.linear_fc1.layer_norm_weight": (HIDDEN,),
        "mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
        "mlp.linear_fc2.weight": (HIDDEN, FFN),
    }
    if mixed:
        mlp = {"pre_mlp_layernorm.weight": (HIDDEN,), "mlp.router.weight": (EXPERTS, HIDDEN)}
        mlp |= {f"mlp.experts.linear_fc1.weight{expert}": (2 * FFN, HIDDEN) for expert in range(EXPERTS)}
        mlp |= {f"mlp.experts.linear_fc2.weight{expert}": (HIDDEN, FFN) for expert in range(EXPERTS)}
    attention: dict[str, tuple[int, ...]] = {
        "self_attention.linear_qkv.layer_norm_weight": (HIDDEN,),
        "self_attention.linear_qkv.weight": (KV * (REP + 2) * DIM, HIDDEN),
        "self_attention.linear_proj.weight": (HIDDEN, KV * REP * DIM),
    }
    layers = range(LAYERS)
    return found | {f"decoder.layers.{at}.{name}": shape for at in layers for name, shape in {**attention, **mlp}.items()}


def random(*, mixed: bool) -> State:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes(mixed=mixed).items()}


def part(name: str, tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """Return a tensor-parallel rank's part of a weight that is not an expert's, cloned as a parameter of its own."""
    dim = {"embedding": 0, "output_layer": 0, "linear_qkv.weight": 0, "linear_proj.weight": 1}
    cut = next((at for word, at in dim.items() if word in name), None)
    return (tensor if cut is None else tensor.chunk(world, cut)[rank]).clone()


def crossed(root: Path, out: Path, **options: object) -> State:
    """Take a checkpoint to Hugging Face, examined, and return the tensors."""
    assert carnet.cross(root, out, to="hf", **options).equal
    return load_file(out / "model.safetensors")


def same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name].to(found[name].dtype))] == []


def plain(root: Path, state: dict[str, object]) -> Path:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(root), no_dist=True)
    return root


def legacy(root: Path, ranks: dict[str, tuple[argparse.Namespace | None, State]]) -> Path:
    for folder, (args, model) in ranks.items():
        (root / folder).mkdir(parents=True)
        state = {"checkpoint_version": 3.0, "iteration": 1, "model": model, **({} if args is None else {"args": args})}
        torch.save(state, root / folder / "model_optim_rng.pt")
    return root


def words(args: argparse.Namespace, file: Path) -> Path:
    """Write arguments as a config that a person names."""
    file.write_text(json.dumps(vars(args), default=str))
    return file


# --- GroupedMLP -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grouped():
    """Build megatron-core's GroupedMLP as one rank has it, its numbers random; grouped_gemm, its kernel, wants a GPU."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import experts

    def build(tensor: tuple[int, int], expert: tuple[int, int], *, gated: bool = True, seed: int = 0):
        config = TransformerConfig(
            num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=KV * REP, num_moe_experts=EXPERTS, gated_linear_unit=gated,
            moe_ffn_hidden_size=FFN, activation_func=torch.nn.functional.silu, add_bias_linear=False, params_dtype=torch.bfloat16,
            use_cpu_initialization=True, perform_initialization=False,
        )  # fmt: skip
        places = {"expt_tp": tensor, "ep": expert, "expt_dp": (0, 1)}
        # the stub knows another constructor only
        groups = SimpleNamespace(**{name: ProcessGroup(*at) for name, at in places.items()})  # type: ignore[call-arg]
        module = experts.GroupedMLP(EXPERTS // expert[1], config, groups)
        generator = torch.Generator().manual_seed(100 * seed + 10 * tensor[0] + expert[0])
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts.gg, "assert_grouped_gemm_is_available", lambda: None)
        yield build


def said(module, prefix: str, metadata: dict[str, object] | None = None):
    """Yield the global tensors that a module says it holds parts of: megatron's own words for what is in a view."""
    for factory in module.sharded_state_dict(prefix, metadata=metadata).values():
        waiting = [factory.build()] if hasattr(factory, "build") else []
        while waiting:
            found = waiting.pop()
            if isinstance(found, (dict, list)):
                waiting += found.values() if isinstance(found, dict) else found
            elif hasattr(found, "global_offset"):
                yield found


def whole(modules, prefix: str) -> State:
    """Put the global tensors together from what every rank says of its part."""
    made: State = {}
    for held in (held for module in modules for held in said(module, prefix)):
        at = tuple(slice(start, start + size) for start, size in zip(held.global_offset, held.local_shape, strict=True))
        made.setdefault(held.key, torch.full(held.global_shape, math.nan, dtype=held.data.dtype))[at] = held.data
    assert not any(tensor.isnan().any() for tensor in made.values())
    return made


@REFEREE
@pytest.mark.parametrize(("tensor", "expert"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_legacy_grouped_experts_are_what_megatron_says_they_are(tensor, expert, grouped, tmp_path):
    full = {name: value for name, value in random(mixed=True).items() if ".experts." not in name}
    ranks, modules = {}, {at: [] for at in range(LAYERS)}
    for t in range(tensor):
        for e in range(expert):
            model = {name: part(name, value, t, tensor) for name, value in full.items()}
            for at in range(LAYERS):
                module = grouped((t, tensor), (e, expert), seed=at)
                modules[at].append(module)
                model |= {f"decoder.layers.{at}.mlp.experts.{name}": value for name, value in module.state_dict().items()}
            folder = f"mp_rank_{t:02d}" + (f"_{e:03d}" if expert > 1 else "")
            ranks[folder] = (arguments(tensor, expert, **MIXED), model)
    found = crossed(legacy(tmp_path / "legacy", ranks), tmp_path / "hf")
    for at in range(LAYERS):
        prefix = f"decoder.layers.{at}.mlp.experts."
        expected = whole(modules[at], prefix)
        for number in range(EXPERTS):
            gate, up = expected[f"{prefix}experts.linear_fc1.weight"][number].chunk(2)
            down = expected[f"{prefix}experts.linear_fc2.weight"][number]
            named = f"model.layers.{at}.block_sparse_moe.experts.{number}."
            same({name: found[f"{named}{name}.weight"] for name in ("w1", "w2", "w3")}, {"w1": gate, "w2": down, "w3": up})


@REFEREE
@pytest.mark.parametrize(("tensor", "expert"), [(1, 1), (2, 2)])
def test_experts_without_a_gate_are_views_too(tensor, expert, grouped, tmp_path):
    args = arguments(tensor, expert, **MIXED)
    ranks, modules = {}, []
    for t in range(tensor):
        for e in range(expert):
            modules.append(grouped((t, tensor), (e, expert), gated=False))
            model = {f"decoder.layers.0.mlp.experts.{name}": value for name, value in modules[-1].state_dict().items()}
            ranks[f"mp_rank_{t:02d}" + (f"_{e:03d}" if expert > 1 else "")] = (args, model)
    checkpoint = open_checkpoint(legacy(tmp_path, ranks))
    config = {
        "layers": 1,
        "hidden": HIDDEN,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": DIM,
        "ffn": FFN,
        "vocab": VOCAB,
        "norm": "rms",
    }
    config |= {"positions": 64, "gated": False, "experts": EXPERTS, "moe_ffn": FFN, "topk": 2, "position": "rope", "mtp": 0}
    expected = whole(modules, "x.")
    up, down = expected["x.experts.linear_fc1.weight"], expected["x.experts.linear_fc2.weight"]
    made = {"layers.0.moe.up": torch.zeros_like(up), "layers.0.moe.down": torch.zeros_like(down)}
    for entry in entries(MEGATRON, config, checkpoint.tensors):
        stored = checkpoint.tensors[entry.unit, entry.name]
        assert entry.stored == stored.shape
        (chunk,) = stored.chunks
        raw = bytearray(Path(str(checkpoint.root), chunk.file).read_bytes()[chunk.offset :][: 2 * math.prod(stored.shape)])
        held = torch.frombuffer(raw, dtype=torch.bfloat16).reshape(entry.shape)
        (view,) = entry.views
        strides = [step * held.stride(dim) for dim, step in view.places]
        at = tuple(slice(start, start + size) for start, size in zip(view.box.start, view.box.shape, strict=True))
        made[view.tensor][at] = held.as_strided(view.box.shape, strides)
    same(made, {"layers.0.moe.up": up, "layers.0.moe.down": down})


def with_grouped(grouped) -> State:
    """Return the model of one rank with its experts in GroupedMLP's two parameters."""
    model = {name: value for name, value in random(mixed=True).items() if ".experts." not in name}
    for at in range(LAYERS):
        held = grouped((0, 1), (0, 1), seed=at).state_dict()
        model |= {f"decoder.layers.{at}.mlp.experts.{name}": value.detach() for name, value in held.items()}
    return model


@REFEREE
def test_grouped_experts_of_another_width_are_refused_with_both_shapes(grouped, tmp_path):
    said = arguments(**MIXED)
    said.moe_ffn_hidden_size = said.ffn_hidden_size = FFN // 2
    with pytest.raises(BadCheckpoint) as error:
        take(open_checkpoint(legacy(tmp_path, {"mp_rank_00": (said, with_grouped(grouped))})))
    assert error.value.what.endswith("mlp.experts.weight1' contradicts the config")
    assert (error.value.facts["expected"], error.value.facts["found"]) == ([HIDDEN, EXPERTS * FFN], [HIDDEN, EXPERTS * 2 * FFN])


# --- halves, and plain torch.distributed.checkpoint -----------------------------------------------------------------------


MORE = {
    "num_floating_point_operations_so_far": 1,
    "opt_param_scheduler": {"max_lr": 1.0},
    "rerun_state_machine": {"mode": "disabled", "sharded": {"x": torch.ones(2)}},
    "content_metadata": {"singleton_local_shards": False},
}


@pytest.fixture(scope="module")
def dtensors(grouped, tmp_path_factory):
    """Models that two real processes saved: name -> their folder, and the folder of one rank's file."""
    root = tmp_path_factory.mktemp("dtensors")
    models = {"llama": random(mixed=False), "mixtral": random(mixed=True), "grouped": with_grouped(grouped)}
    models["torch_dcp"] = models["mixtral"]
    args = {name: arguments(**({} if name == "llama" else MIXED)) for name in models}
    common = {"iteration": 1, "checkpoint_version": 3.0, **MORE}
    states = {
        str(root / name): (
            "torch_dcp" if name == "torch_dcp" else "fsdp_dtensor",
            {"args": args[name], "model": model, **common},
        )
        for name, model in models.items()
    }
    torch.save(states, root / "states.pt")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("two_ranks.py"))]
    given = [str(root / "meeting"), str(root / "states.pt")]
    ranks = [subprocess.Popen([*command, str(rank), *given], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    ends = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ends
    one = {name: legacy(root / f"{name} of one rank", {"mp_rank_00": (args[name], model)}) for name, model in models.items()}
    return {name: (root / name, one[name]) for name in models}


@REFEREE
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_uneven_dtensors_of_two_ranks_are_read_with_their_halves_joined(name, dtensors, tmp_path):
    folder, one = dtensors[name]
    checkpoint = open_checkpoint(folder)
    names = {name for _, name in checkpoint.tensors if name.startswith("model.")}
    assert {name[-2:] for name in names if "fc1.weight" in name} == {"_w", "_v"}
    assert {len(checkpoint.tensors["", name].chunks) for name in names} == {1, 2}
    same(crossed(folder, tmp_path / "two"), crossed(one, tmp_path / "one"))
    dropped = {name for names in take(checkpoint).dropped.values() for name in names}
    assert {name.split(".")[0] for name in dropped} == {"optimizer", "rng_state", *MORE}


@REFEREE
def test_even_dtensors_of_two_ranks_are_read(dtensors, tmp_path):
    folder, one = dtensors["torch_dcp"]
    chunks = open_checkpoint(folder).tensors["", "model.decoder.layers.1.mlp.router.weight"].chunks
    assert [chunk.box.shape for chunk in chunks] == [(2, HIDDEN), (2, HIDDEN)]
    same(crossed(folder, tmp_path / "two"), crossed(one, tmp_path / "one"))


@REFEREE
def test_legacy_grouped_experts_cut_into_rows_by_fsdp_are_read_too(dtensors, tmp_path):
    """Rows of the (hidden, E 2F) parameter go through experts: they are shared with no regard for the view."""
    folder, one = dtensors["grouped"]
    checkpoint = open_checkpoint(folder)
    key = ("", "model.module.decoder.layers.0.mlp.experts.weight1")
    stored, seen = checkpoint.tensors[key], take(checkpoint).checkpoint.tensors[key]
    assert (len(stored.chunks), stored.shape) == (2, (HIDDEN, EXPERTS * 2 * FFN))
    assert (len(seen.chunks), seen.shape) == (4, (EXPERTS, HIDDEN, 2 * FFN))
    same(crossed(folder, tmp_path / "two"), crossed(one, tmp_path / "one"))


@pytest.fixture(scope="module", params=[False, True], ids=["llama", "mixtral"])
def both(request, tmp_path_factory):
    """A model as one rank's legacy file, and what it is as Hugging Face has it."""
    root, model = tmp_path_factory.mktemp("both"), random(mixed=request.param)
    args = arguments(**(MIXED if request.param else {}))
    expected = crossed(legacy(root / "legacy", {"mp_rank_00": (args, model)}), root / "hf")
    first = model[f"decoder.layers.1.mlp.{'experts.linear_fc1.weight3' if request.param else 'linear_fc1.weight'}"]
    gate = "block_sparse_moe.experts.3.w1" if request.param else "mlp.gate_proj"
    assert torch.equal(expected[f"model.layers.1.{gate}.weight"], first[:FFN])
    return args, model, expected


@pytest.mark.parametrize("prefix", ["", "model.", "model.module.", "model.module.module."])
def test_torch_dcp_is_read_under_every_wrapper_s_prefix(both, prefix, tmp_path):
    args, model, expected = both
    state = {"args": args, "iteration": 1, "checkpoint_version": 3.0, "optimizer": {"state": {"x": torch.ones(2)}}}
    plain(tmp_path / "dcp", {**state, **{prefix + name: value for name, value in model.items()}})
    same(crossed(tmp_path / "dcp", tmp_path / "hf"), expected)


def test_torch_dcp_whose_enums_are_pickled_by_their_names_is_read(both, tmp_path, monkeypatch):
    """As Python 3.11.2 does, Debian 12's: one is in what describes each tensor."""
    monkeypatch.setattr(enum.Enum, "__reduce_ex__", lambda member, _: (getattr, (type(member), member.name)))
    args, model, expected = both
    plain(tmp_path / "dcp", {"args": args, **model})
    assert b"getattr" in (tmp_path / "dcp/.metadata").read_bytes()
    same(crossed(tmp_path / "dcp", tmp_path / "hf"), expected)


def test_torch_dcp_without_arguments_is_read_with_a_config(both, tmp_path):
    args, model, expected = both
    plain(tmp_path / "dcp", {"model": model})
    assert str(carnet.inspect(tmp_path / "dcp").refusal).startswith("the training arguments are missing")
    same(crossed(tmp_path / "dcp", tmp_path / "hf", config=words(args, tmp_path / "args.json")), expected)


def test_ranks_without_arguments_are_read_with_a_config(both, tmp_path):
    args, model, expected = both
    root = legacy(tmp_path / "legacy", {"mp_rank_00": (None, model)})
    same(crossed(root, tmp_path / "hf", config=words(args, tmp_path / "args.json")), expected)


def test_a_half_that_lacks_is_named(both, tmp_path):
    args, model, _ = both
    name = next(name for name in model if "linear_fc1.weight" in name)
    halves = dict(zip((f"{name}_w", f"{name}_v"), model[name].chunk(2), strict=True))
    state = {other: value for other, value in model.items() if other != name} | {f"{name}_w": halves[f"{name}_w"]}
    plain(tmp_path, {"args": args, "model": state})
    with pytest.raises(BadCheckpoint) as error:
        take(open_checkpoint(tmp_path))
    assert error.value.what in ("the checkpoint lacks 'layers.0.mlp.up'", "the checkpoint lacks 'layers.0.moe.up'")


@REFEREE
def test_singleton_shards_of_the_grouped_experts_are_read(grouped, tmp_path):
    """megatron-core's metadata {"singleton_local_shards": True}: an expert a tensor, the halves apart."""
    model = {name: value for name, value in random(mixed=True).items() if ".experts." not in name}
    modules = [grouped((0, 1), (0, 1), seed=at) for at in range(LAYERS)]
    view, alone = copy.copy(model), copy.copy(model)
    for at, module in enumerate(modules):
        prefix = f"decoder.layers.{at}.mlp.experts."
        view |= {prefix + name: value.detach() for name, value in module.state_dict().items()}
        alone |= {held.key: held.data for held in said(module, prefix, {"singleton_local_shards": True})}
    assert "decoder.layers.1.mlp.experts.experts.3.linear_fc1.weight_v" in alone
    expected = crossed(legacy(tmp_path / "legacy", {"mp_rank_00": (arguments(**MIXED), view)}), tmp_path / "one")
    plain(tmp_path / "dcp", {"args": arguments(**MIXED), **alone})
    same(crossed(tmp_path / "dcp", tmp_path / "two"), expected)


def renamed(golden: Path, root: Path, before: str, after: str) -> Path:
    """Copy a torch_dist folder through torch's own reader and writer, a word in its names exchanged."""
    reader = dcp.FileSystemReader(golden)
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(held.size, dtype=held.properties.dtype)
        for name, held in entries.items()
        if isinstance(held, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    plain(root, {name.replace(before, after): tensor for name, tensor in state.items()})
    for name in ("common.pt", "metadata.json"):
        shutil.copy(golden / name, root / name)
    return root


def test_the_module_s_own_name_of_a_further_layer_is_read_too(tmp_path):
    """Since megatron-core 0.17 ``mtp_model_layer``, which torch_dist and fsdp_dtensor translate and per-rank files do not."""
    golden = Path(__file__).parents[1] / "goldens/megatron/deepseek_mtp_te_pp2/iter_0000001"
    root = renamed(golden, tmp_path / "renamed", ".transformer_layer.", ".mtp_model_layer.")
    assert any(".mtp_model_layer." in name for _, name in open_checkpoint(root).tensors)
    same(crossed(root, tmp_path / "after"), crossed(golden, tmp_path / "before"))

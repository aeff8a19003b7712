"""Checkpoints that megatron-core wrote: every tensor, from the raw bytes of its chunks, and once it is cut otherwise."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import carnet
from carnet.algebra.box import tiles, whole
from carnet.dtypes import BY_NAME
from carnet.formats.detect import open_checkpoint
from carnet.formats.stored import Checkpoint, Stored

GOLDENS = Path(__file__).parents[1] / "goldens/megatron"
NAMES = sorted(path.parents[1].name for path in GOLDENS.glob("*/*/.metadata"))
VOCAB = 251  # --vocab-size 250 and the end token; the goldens' padded rows, 251 to 255, hold random numbers

# module names, and what a store calls them where it does not use the same (the local spec stores fused norms' names)
SPELLINGS = (
    (r"input_layernorm\.(weight|bias)$", r"self_attention.linear_qkv.layer_norm_\1"),
    (r"pre_mlp_layernorm\.(weight|bias)$", r"mlp.linear_fc1.layer_norm_\1"),
)
# numbers in a module's names that are axes of a store: of layers that are alike, of experts in two implementations
NUMBERS = (
    (r"^decoder\.layers\.(?P<number>\d+)", r"decoder.layers"),
    (r"\.experts\.local_experts\.(?P<number>\d+)", r".experts.experts"),
    (r"\.experts\.(?P<matrix>linear_fc[12]\.weight)(?P<number>\d+)$", r".experts.experts.\g<matrix>"),
)
# of the parameters of a Mamba mixer and of Gated DeltaNet, in their order; a store keeps them apart
PARTS = (("z", "x", "B", "C", "dt"), ("query", "key", "value", "z", "beta", "alpha"))


def rebuilt(checkpoint: Checkpoint, tensor: Stored) -> torch.Tensor:
    """Return a tensor put together from nothing but the chunks' offsets and strides."""
    dtype = getattr(torch, BY_NAME[tensor.dtype].torch)
    result = torch.empty(tensor.shape, dtype=dtype)
    for chunk in tensor.chunks:
        raw = bytearray(Path(str(checkpoint.root), chunk.file).read_bytes()[chunk.offset :])
        raw = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
        piece = torch.frombuffer(raw, dtype=dtype).as_strided(chunk.box.shape, chunk.strides)
        place = tuple(slice(start, start + size) for start, size in zip(chunk.box.start, chunk.box.shape, strict=True))
        result[place] = piece
    return result


def stacked(full: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return what each key of a store holds, made of the plain module's parameters."""
    alike = not any(re.match(r"decoder\.layers\.\d", key) for key in shapes)
    items: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
    for name, value in full.items():
        key, place = name, []
        for pattern, spelled in NUMBERS[0 if alike else 1 :]:
            if found := re.search(pattern, key):
                place.append(int(found["number"]))
                key = re.sub(pattern, spelled, key)
        for pattern, spelled in SPELLINGS:
            key = key if key in shapes else re.sub(pattern, spelled, key)
        parts = max(([f"{key}.{part}" for part in parts if f"{key}.{part}" in shapes] for parts in PARTS), key=len)
        each = value.split([shapes[part][0] for part in parts]) if parts else (value,)
        for part, piece in zip(parts or [key], each, strict=True):
            items.setdefault(part, {})[tuple(place)] = piece
    together = {}
    for key, pieces in items.items():
        sizes = [max(index) + 1 for index in zip(*pieces, strict=True)]
        inner = next(iter(pieces.values())).shape
        together[key] = torch.stack([pieces[place] for place in sorted(pieces)]).view(*sizes, *inner)
    return together


def plain(golden: str) -> dict[str, torch.Tensor]:
    """Return the parameters of the plain module at one rank, as megatron-core has them in memory."""
    full = load_file(GOLDENS / golden / "full.safetensors")
    return {name: value for name, value in full.items() if not name.endswith("_extra_state")}


def different(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that differ in a bit, in type or in shape, or are on one side only."""
    return [
        name
        for name in found.keys() | expected.keys()
        if name not in found
        or name not in expected
        or found[name].dtype != expected[name].dtype
        or found[name].shape != expected[name].shape
        or not torch.equal(found[name].contiguous().view(torch.uint8), expected[name].contiguous().view(torch.uint8))
    ]


@pytest.mark.parametrize("golden", [name for name in NAMES if (GOLDENS / name / "full.safetensors").exists()])
def test_every_tensor_is_the_plain_module_s_bit_for_bit(golden):
    checkpoint = open_checkpoint(GOLDENS / golden)
    model = {name: tensor for (_, name), tensor in checkpoint.tensors.items() if tensor.chunks}
    found = {name: rebuilt(checkpoint, tensor) for name, tensor in model.items()}
    assert different(found, stacked(plain(golden), {name: tensor.shape for name, tensor in model.items()})) == []


# every golden, the per-rank ones too, and how it is cut anew: not as it was
CUTS = (
    ("deepseek_mtp_te_pp2", {"tp": 4, "pp": 3}),
    ("deepseek_mtp_te_pp2", {"ep": 4}),
    ("gemma_te_tp2", {"pp": 4}),
    ("gpt_te_tp2", {"tp": 4, "pp": 2}),
    ("llama_dist", {"tp": 2, "pp": 2}),
    ("llama_legacy", {"pp": 4}),
    ("llama_te_pp2_vpp", {"tp": 2}),
    ("llama_tp2pp2", {"pp": 3}),
    ("mamba_te_tp2", {"pp": 2}),
    ("mixtral_ep2", {"tp": 2, "pp": 2}),
    ("mixtral_ep2", {"tp": 2, "ep": 4}),
    ("mixtral_gg_te_ep2_legacy", {"pp": 2, "ep": 4}),
    ("qwen2_tp2", {"pp": 2}),
    ("v019_deepseek_te_ep2", {"tp": 2, "pp": 2, "ep": 2}),
    ("v019_llama_te_tp2", {"tp": 2, "pp": 4}),
)


@pytest.mark.referee
@pytest.mark.parametrize("spelling", ["te", "local"])
@pytest.mark.parametrize(("golden", "cut"), CUTS, ids=str)
def test_what_is_cut_anew_is_the_plain_module_still(golden, cut, spelling, tmp_path):
    """Read by torch; the vocabulary's padding is zeros now."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    assert carnet.cross(GOLDENS / golden, tmp_path / "out", to="megatron", spelling=spelling, **cut).equal
    reader = FileSystemReader(tmp_path / "out/iter_0000001")
    entries = reader.read_metadata().state_dict_metadata
    stored = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    load(found, storage_reader=reader, no_dist=True)
    expected = stacked(plain(golden), {name: tuple(entry.size) for name, entry in stored.items()})
    for name in {"embedding.word_embeddings.weight", "output_layer.weight"} & expected.keys():
        tokens = VOCAB - golden.startswith("v019")  # since 0.18 the end token is one of --vocab-size
        expected[name] = torch.nn.functional.pad(expected[name][:tokens], (0, 0, 0, len(found[name]) - tokens))
    assert different(found, expected) == []


@pytest.mark.referee
@pytest.mark.parametrize("golden", NAMES)
def test_every_tensor_is_what_torch_loads_optimizer_included(golden):
    from torch.distributed.checkpoint import FileSystemReader, load

    checkpoint = open_checkpoint(GOLDENS / golden, locate=lambda name: True)
    state = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, BY_NAME[tensor.dtype].torch))
        for (_, name), tensor in checkpoint.tensors.items()
    }
    load(state, storage_reader=FileSystemReader(str(checkpoint.root)), no_dist=True)
    for name, expected in state.items():
        found = rebuilt(checkpoint, checkpoint.tensors["", name])
        assert torch.equal(found.flatten().view(torch.uint8), expected.flatten().view(torch.uint8)), name


@pytest.mark.parametrize("golden", NAMES)
def test_names_shapes_and_objects_are_what_torch_s_own_metadata_says(golden):
    checkpoint = open_checkpoint(GOLDENS / golden)
    metadata = pickle.loads(Path(str(checkpoint.root), ".metadata").read_bytes())
    shapes = {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}
    assert {name: tensor.shape for (_, name), tensor in checkpoint.tensors.items()} == shapes
    assert set(checkpoint.objects) == set(metadata.state_dict_metadata) - set(shapes)


@pytest.mark.parametrize("golden", NAMES)
def test_the_chunks_of_a_tensor_tile_it(golden):
    for tensor in open_checkpoint(GOLDENS / golden).tensors.values():
        if tensor.chunks:
            assert tiles(whole(tensor.shape), [chunk.box for chunk in tensor.chunks])


def test_optimizer_tensors_have_names_and_no_chunks_unless_asked_for():
    name = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.exp_avg"
    assert open_checkpoint(GOLDENS / "llama_dist").tensors["", name].chunks == ()
    assert open_checkpoint(GOLDENS / "llama_dist", locate=lambda each: True).tensors["", name].chunks != ()


def test_only_the_tensors_that_are_asked_for_are_located():
    checkpoint = open_checkpoint(GOLDENS / "llama_tp2pp2", locate=lambda name: name == "output_layer.weight")
    assert [name for (_, name), tensor in checkpoint.tensors.items() if tensor.chunks] == ["output_layer.weight"]


def test_where_the_bytes_are_is_the_same_through_the_root_and_the_iteration():
    root, iteration = GOLDENS / "llama_tp2pp2", GOLDENS / "llama_tp2pp2/iter_0000001"
    assert open_checkpoint(root) == open_checkpoint(iteration)


def test_a_chunk_lies_where_the_writer_put_it():
    # facts/megatron.md: item at 20493 of __0_0.distcp, its data 704 bytes into the item
    chunks = open_checkpoint(GOLDENS / "llama_tp2pp2").tensors["", "embedding.word_embeddings.weight"].chunks
    first = chunks[0]
    assert (first.file, first.offset, first.strides) == ("__0_0.distcp", 20493 + 704, (64, 1))


@pytest.mark.parametrize("golden", NAMES)
def test_the_arguments_are_those_that_a_trusting_reader_finds(golden):
    checkpoint = open_checkpoint(GOLDENS / golden)
    assert {key: checkpoint.config[key] for key in ("num_layers", "hidden_size", "padded_vocab_size", "swiglu")} == {
        "num_layers": 4,
        "hidden_size": 64,
        "padded_vocab_size": 256,
        "swiglu": not golden.startswith(("gpt", "mamba", "v0192_nemotron3")),
    }
    assert checkpoint.config["params_dtype"] == "torch.bfloat16"
    assert checkpoint.config["model_type"] == "ModelType(1)"
    assert checkpoint.config["exit_signal"] == "Signals(15)"
    assert json.loads(json.dumps(checkpoint.config)) == checkpoint.config


def test_the_notes_say_which_megatron_wrote_it():
    old, new = open_checkpoint(GOLDENS / "llama_tp2pp2"), open_checkpoint(GOLDENS / "v019_llama_te_tp2")
    assert dict(old.notes) == {"writer": "megatron-core < 0.19 (common.pt)", "iteration": "1", "checkpoint_version": "3.0"}
    assert new.notes["writer"] == "megatron-core >= 0.19 (common_state)"


def test_every_file_of_the_iteration_is_stamped():
    checkpoint = open_checkpoint(GOLDENS / "llama_tp2pp2")
    present = sorted(path.name for path in Path(str(checkpoint.root)).iterdir())
    assert [stamp.file for stamp in checkpoint.stamps] == present
    assert [stamp.nbytes for stamp in checkpoint.stamps] == [
        Path(str(checkpoint.root), name).stat().st_size for name in present
    ]

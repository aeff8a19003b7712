"""Checkpoints that megatron-core wrote: every tensor, from the raw bytes of its chunks."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from carnet.box import tiles, whole
from carnet.dtypes import BY_NAME
from carnet.formats.detect import open_checkpoint
from carnet.formats.stored import Checkpoint, Stored

GOLDENS = Path(__file__).parents[1] / "goldens/megatron"
NAMES = sorted(path.name for path in GOLDENS.iterdir())

# the local spec's module names and the names that the same spec stores (facts: "fused names in both specs")
SPELLINGS = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm",
    "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm",
}


def rebuilt(checkpoint: Checkpoint, tensor: Stored) -> torch.Tensor:
    """Return a tensor put together from nothing but the chunks' offsets and strides."""
    dtype = getattr(torch, BY_NAME[tensor.dtype].torch)
    result = torch.empty(tensor.shape, dtype=dtype)
    for chunk in tensor.chunks:
        raw = bytearray((checkpoint.root / chunk.file).read_bytes()[chunk.offset :])
        raw = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
        piece = torch.frombuffer(raw, dtype=dtype).as_strided(chunk.box.shape, chunk.strides)
        place = tuple(slice(start, start + size) for start, size in zip(chunk.box.start, chunk.box.shape, strict=True))
        result[place] = piece
    return result


def module_names(stored: str, layers: int) -> list[str]:
    """Return the plain module's parameter of each layer, or the one parameter."""
    if not stored.startswith("decoder.layers."):
        return [stored]
    return [stored.replace("decoder.layers.", f"decoder.layers.{layer}.") for layer in range(layers)]


@pytest.mark.parametrize("golden", NAMES)
def test_every_tensor_is_the_plain_module_s_bit_for_bit(golden):
    checkpoint = open_checkpoint(GOLDENS / golden)
    full = load_file(GOLDENS / golden / "full.safetensors")
    for before, after in SPELLINGS.items():
        full = {re.sub(rf"{before}\.(weight|bias)", rf"{after}_\1", name): value for name, value in full.items()}
    full = {name: value for name, value in full.items() if not name.endswith("_extra_state")}
    used = set()
    model = {name: tensor for (_, name), tensor in checkpoint.tensors.items() if tensor.chunks}
    for name, tensor in model.items():
        names = module_names(name, int(str(checkpoint.config["num_layers"])))
        expected = torch.stack([full[each] for each in names]) if len(names) > 1 else full[names[0]]
        assert torch.equal(rebuilt(checkpoint, tensor).view(torch.uint8), expected.contiguous().view(torch.uint8)), name
        used |= set(names)
    assert used == set(full)


@pytest.mark.referee
@pytest.mark.parametrize("golden", NAMES)
def test_every_tensor_is_what_torch_loads_optimizer_included(golden):
    from torch.distributed.checkpoint import FileSystemReader, load

    checkpoint = open_checkpoint(GOLDENS / golden, locate=lambda name: True)
    state = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, BY_NAME[tensor.dtype].torch))
        for (_, name), tensor in checkpoint.tensors.items()
    }
    load(state, storage_reader=FileSystemReader(checkpoint.root), no_dist=True)
    for name, expected in state.items():
        found = rebuilt(checkpoint, checkpoint.tensors["", name])
        assert torch.equal(found.flatten().view(torch.uint8), expected.flatten().view(torch.uint8)), name


@pytest.mark.parametrize("golden", NAMES)
def test_names_shapes_and_objects_are_what_torch_s_own_metadata_says(golden):
    checkpoint = open_checkpoint(GOLDENS / golden)
    metadata = pickle.loads((checkpoint.root / ".metadata").read_bytes())
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
        "swiglu": not golden.startswith("gpt"),
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
    present = sorted(path.name for path in checkpoint.root.iterdir())
    assert [stamp.file for stamp in checkpoint.stamps] == present
    assert [stamp.nbytes for stamp in checkpoint.stamps] == [(checkpoint.root / name).stat().st_size for name in present]

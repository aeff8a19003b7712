"""Write the benchmark's checkpoint: a Llama of one billion parameters, saved by the real megatron-core from four ranks.

Tensor parallel 2, pipeline parallel 2. Layers are stacked under one key, each rank saves its own chunks, so that the files
are those of a training run::

    linear_qkv (layer, (kv *), hidden)      tp cuts rows, pp cuts layers
    linear_fc1 (layer, (gate | up), hidden) a rank holds a piece of gate and a piece of up: two chunks a layer

The weights are random. The training arguments are those of a small real checkpoint with the sizes changed.
"""

import os
import random
import shutil
import sys
import warnings
import zlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

TP, PP = 2, 2
LAYERS, HIDDEN, FFN, HEADS, KV, DIM, VOCAB = 8, 2048, 8192, 32, 8, 64, 128256
ITERATION = 1
ARGUMENTS = Path("tests/goldens/megatron/llama_te_pp2_vpp/iter_0000001/common.pt")
NEEDED = 10 * 10**9  # bytes of disk: the checkpoint, and the outputs that are compared
TRACKER = "latest_checkpointed_iteration.txt"

# key, shape of one layer, the axis that tensor parallelism cuts (None: every rank holds the whole)
STACKED = (
    ("self_attention.linear_qkv.layer_norm_weight", (HIDDEN,), None),
    ("self_attention.linear_qkv.weight", ((HEADS + 2 * KV) * DIM, HIDDEN), 0),
    ("self_attention.linear_proj.weight", (HIDDEN, HEADS * DIM), 1),
    ("mlp.linear_fc1.layer_norm_weight", (HIDDEN,), None),
    ("mlp.linear_fc2.weight", (HIDDEN, FFN), 1),
)
EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def prepare(work: Path) -> Path:
    """Return the checkpoint's folder, written where it is not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n")
    root = work / "llama-1b-tp2pp2"
    if (root / TRACKER).exists():
        return root
    free = shutil.disk_usage(work).free
    if free < NEEDED:
        sys.exit(
            f"{work} has {free / 1e9:.1f} GB free and {NEEDED / 1e9:.0f} GB are needed: set CARNET_BENCH_DIR to another disk"
        )
    shutil.rmtree(root, ignore_errors=True)
    (work / "meeting").unlink(missing_ok=True)
    folder = root / f"iter_{ITERATION:07}"
    folder.mkdir(parents=True)
    spawn(_rank, args=(str(folder), str(work / "meeting")), nprocs=TP * PP)  # type: ignore[no-untyped-call]
    (work / "meeting").unlink(missing_ok=True)
    (root / TRACKER).write_text(f"{ITERATION}\n")  # last: a checkpoint without it is written again
    return root


def weights(key: str, shape: tuple[int, ...], *where: int) -> torch.Tensor:
    """Return the random weights of one chunk: the same for the same key and place, whichever rank asks."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{key} {where}".encode()))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)


def _rank(rank: int, folder: str, meeting: str) -> None:
    warnings.simplefilter("ignore")  # megatron-core tells four times what a machine without a GPU lacks
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(TP * PP), "LOCAL_RANK": str(rank)}
    distributed.init_process_group("gloo", init_method=f"file://{Path(meeting).absolute()}", rank=rank, world_size=TP * PP)
    torch.set_num_threads(1)
    if not torch.cuda.is_available():  # the writer talks to a GPU without asking whether there is one
        vars(torch.cuda).update(synchronize=lambda: None, current_device=lambda: torch.device("cpu"))
    from megatron.core.dist_checkpointing import save

    tp, pp = rank % TP, rank // TP
    state: dict[str, object] = _common()
    state |= {f"{count}": item for count, item in enumerate(_chunks(tp, pp))}
    save(state, folder, content_metadata=state["content_metadata"])
    distributed.destroy_process_group()


def _chunks(tp: int, pp: int) -> Iterator[object]:
    """Yield the sharded tensors and objects of one rank, as GPTModel.sharded_state_dict of the TE spec gives them."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    def tensor(key: str, shape: tuple[int, ...], *cuts: tuple[int, int, int], stacked: int = 0, whole: bool = False) -> object:
        data = weights(key, shape, *(place for _, place, _ in cuts))
        copy = (0, tp if whole else 0, 0)  # the first copy is the one that is saved
        return ShardedTensor.from_rank_offsets(key, data, *cuts, replica_id=copy, prepend_axis_num=stacked)

    for layer in range(pp * LAYERS // PP, (pp + 1) * LAYERS // PP):
        place = (0, layer, LAYERS)
        for name, shape, axis in STACKED:
            cuts = [place] if axis is None else [place, (axis + 1, tp, TP)]
            share = tuple(size // TP if dim == axis else size for dim, size in enumerate(shape))
            yield tensor(f"decoder.layers.{name}", share, *cuts, stacked=1, whole=axis is None)
        for half in (tp, TP + tp):  # gate, then up: megatron/core/transformer/mlp.py, apply_swiglu_sharded_factory
            yield tensor("decoder.layers.mlp.linear_fc1.weight", (FFN // TP, HIDDEN), place, (1, half, 2 * TP), stacked=1)
        for name in EXTRA_STATES:
            key = f"decoder.layers.{name}._extra_state"
            yield ShardedObject(key, torch.empty(0, dtype=torch.uint8), (LAYERS,), (layer,), replica_id=(0, tp, 0))
    if pp == 0:
        yield tensor("embedding.word_embeddings.weight", (VOCAB // TP, HIDDEN), (0, tp, TP))
    if pp == PP - 1:
        yield tensor("decoder.final_layernorm.weight", (HIDDEN,), whole=True)
        yield tensor("output_layer.weight", (VOCAB // TP, HIDDEN), (0, tp, TP))
        empty = torch.empty(0, dtype=torch.uint8)
        yield ShardedObject("decoder.final_layernorm._extra_state", empty, (1,), (0,), replica_id=(0, tp, 0))
    yield ShardedObject("rng_state", [_random_state()], (PP, TP), (pp, tp), replica_id=0)


def _random_state() -> dict[str, object]:
    """Return what Megatron saves of the random generators: megatron/training/checkpointing.py, get_rng_state."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),  # the global state is what Megatron saves
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {},
    }


def _common() -> dict[str, object]:
    """Return what goes into common.pt: a real one's content with our sizes."""
    common: dict[str, object] = torch.load(ARGUMENTS, weights_only=False)  # written by ourselves, so safe to unpickle
    arguments = common["args"]
    assert isinstance(arguments, Namespace)
    sizes = {
        "num_layers": LAYERS,
        "encoder_num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "num_query_groups": KV,
        "group_query_attention": True,
        "kv_channels": DIM,
        "vocab_size": VOCAB,
        "padded_vocab_size": VOCAB,
        "make_vocab_size_divisible_by": 128,
        "seq_length": 8192,
        "encoder_seq_length": 8192,
        "max_position_embeddings": 8192,
        "tensor_model_parallel_size": TP,
        "expert_tensor_parallel_size": TP,
        "pipeline_model_parallel_size": PP,
        "transformer_pipeline_model_parallel_size": PP,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "world_size": TP * PP,
        "data_parallel_size": 1,
        "save": "llama-1b",
        "iteration": ITERATION,
    }
    unknown = sizes.keys() - vars(arguments).keys()
    if unknown:
        sys.exit(f"{ARGUMENTS} has no training argument {', '.join(sorted(unknown))}")
    vars(arguments).update(sizes)
    return common | {"iteration": ITERATION}


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1])))

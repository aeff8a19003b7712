"""A live refit of a model of 7B parameters on two GPUs, beside the link's own speed and megatron-core's ``resharding``.

    python -m bench.refit            needs two GPUs of 80 GB, carnet[megatron] and NCCL

The link's speed is that of the same bytes in messages of a gibibyte, the same ways. All contenders run in turns in one process
group; what arrived is compared bit by bit first.
"""

import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench.measure import record, table
from carnet import live
from carnet.live import Grid
from carnet.quantize import arithmetic
from carnet.quantize.recipes import BY_NAME, Recipe

SHAPE = {"layers": 32, "hidden": 4096, "ffn": 11008, "heads": 32, "vocab": 32000}
ROUNDS = 7
MESSAGE = 1 << 30
Found = dict[str, dict[str, float]]
Case = Callable[[int], tuple[str, dict[str, Callable[[], object]]]]


def main() -> None:
    """Let two ranks run, and show what the first of them found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, port, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    found: Found = answers.get()
    for process in ranks:
        process.join()
    for case, seconds in found.items():
        link = seconds["link"]
        rows = [(name, f"{each * 1e3:,.1f}", f"{link / each:.2f}") for name, each in seconds.items()]
        print(f"\n{case}\n" + table([("", "ms", "of the link's speed"), *rows]))
    record("refit", {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "shape": SHAPE, "seconds": found})


def _rank(rank: int, port: int, answers: Any) -> None:  # noqa: ANN401  a queue has no type that runs
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, device_id=torch.device("cuda", rank)
    )
    found: Found = {}
    cases: list[Case] = [_between_cuts, _to_engine, *(partial(_coded, scheme) for scheme in ("fp8", "mxfp8", "nvfp4"))]
    for case in cases:
        name, contenders = case(rank)
        found[name] = _times(contenders)
        torch.cuda.empty_cache()
    if rank == 0:
        answers.put(found)
    dist.barrier()
    dist.destroy_process_group()


def _times(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median seconds of each, all in turns; the slower rank counts."""
    every: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(ROUNDS + 2):
        for name, contender in contenders.items():
            torch.cuda.synchronize()
            dist.barrier()
            torch.cuda.synchronize()
            start = time.perf_counter()
            contender()
            torch.cuda.synchronize()
            took = torch.tensor([time.perf_counter() - start], device="cuda")
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if turn > 1:
                every[name].append(took.item())
    return {name: statistics.median(each) for name, each in every.items()}


def _between_cuts(rank: int) -> tuple[str, dict[str, Callable[[], object]]]:
    """From a model cut in two to a whole copy on each rank: half of the bytes go each way."""
    source, target = _model(rank, 2), _model(rank, 1)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(generator=torch.Generator("cuda").manual_seed(parameter.numel() + rank))
        for name, parameter in source.named_parameters():
            if "norm" in name:
                parameter.fill_(1.25)
    plan = live.plan(
        _config(), source=Grid(tp=2), target=Grid(), to="megatron", padded_vocab_size=32000, target_padded_vocab_size=32000
    )
    from megatron.core.resharding.refit import swap_model_weights

    plan.run(source, into=target)
    ours = [parameter.detach().clone() for parameter in target.parameters()]
    for parameter in target.parameters():
        parameter.data.zero_()
    swap_model_weights(source, target, "nccl")
    assert all(torch.equal(one, other) for one, other in zip(ours, target.parameters(), strict=True))
    del ours
    plan.check()
    sent = plan.traffic()["bytes sent"] // 2
    return f"TP2 -> TP1 on both, Megatron's modules, {sent / 1e9:.1f} GB each way", {
        "link": _link(rank, sent, sent),
        "carnet.live": lambda: plan.run(source, into=target),
        "megatron-core resharding": lambda: swap_model_weights(source, target, "nccl"),
    }


def _to_engine(rank: int) -> tuple[str, dict[str, Callable[[], object]]]:
    """From a model on one GPU to an engine on the other, under Hugging Face's names."""
    source = _model(rank, 1) if rank == 0 else None
    plan = live.plan(_config(), source=Grid(ranks=(0,)), target=Grid(ranks=(1,)), padded_vocab_size=32000)
    held = plan.run(source)
    plan.check()
    sent = plan.traffic()["bytes sent"]

    def stream() -> None:
        for _ in plan.stream(source):
            pass

    return f"one GPU -> the other, Hugging Face's names, {sent / 1e9:.1f} GB", {
        "link": _link(rank, sent, 0),
        "carnet.live": lambda: plan.run(source, into=held),
        "carnet.live, as a stream": stream,
    }


def _coded(scheme: str, rank: int) -> tuple[str, dict[str, Callable[[], object]]]:
    """Send the same as codes: all weights are measured before the first code goes."""
    source = _model(rank, 1) if rank == 0 else None
    if source is not None:
        for parameter in source.parameters():
            parameter.data.normal_()
    plan = live.plan(
        _config(),
        source=Grid(ranks=(0,)),
        target=Grid(ranks=(1,)),
        quantize=scheme,
        style="compressed-tensors",
        padded_vocab_size=32000,
        activations=None if scheme == "mxfp8" else "dynamic",
    )
    held = plan.run(source)
    _compare(BY_NAME[f"compressed-tensors/{scheme}"], source, held)
    plan.check()
    sent = plan.traffic()["bytes sent"]
    return f"one GPU -> the other, {scheme.upper()} on the way, {sent / 1e9:.1f} GB", {
        "link": _link(rank, sent, 0),
        "carnet.live": lambda: plan.run(source, into=held),
    }


def _compare(recipe: Recipe, source: torch.nn.Module | None, held: dict[str, torch.Tensor]) -> None:
    """Stop where one matrix has other codes than the processor makes of it; its scale is its own alone."""
    weights = torch.empty((SHAPE["hidden"], SHAPE["ffn"]), dtype=torch.bfloat16, device="cuda")
    if source is not None:
        weights.copy_(source.get_parameter("decoder.layers.1.mlp.linear_fc2.weight"))
    dist.broadcast(weights, 0)
    if source is None:
        bits = weights.cpu().view(torch.int16).numpy().view(np.uint16)
        amax = arithmetic.block_amax(bits, "bf16", recipe.block)
        outer = float(arithmetic.outer_scale(recipe, float(amax.max()), "bf16")) if recipe.scale.outer else None
        _, divisors = arithmetic.scales(recipe, amax, "bf16", outer)
        codes = arithmetic.pack(recipe, arithmetic.encode(recipe, bits, "bf16", divisors)).view(np.uint8)
        name = "model.layers.1.mlp.down_proj.weight"
        ours = held[name if name in held else f"{name}_packed"].view(torch.uint8).cpu().numpy()
        assert (ours == codes).all(), recipe.name


def _link(rank: int, there: int, back: int) -> Callable[[], object]:
    """Return what sends so many bytes from the first rank to the second, and back, in large messages."""
    out, into = (torch.empty(MESSAGE, dtype=torch.uint8, device="cuda") for _ in range(2))

    def run() -> None:
        for start in range(0, max(there, back), MESSAGE):
            ops = []
            for nbytes, sender in ((there, 0), (back, 1)):
                size = min(MESSAGE, nbytes - start)
                if size > 0:
                    sends = rank == sender
                    ops.append(dist.P2POp(dist.isend if sends else dist.irecv, (out if sends else into)[:size], 1 - rank))
            for work in dist.batch_isend_irecv(ops):
                work.wait()

    return run


def _config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": SHAPE["layers"],
        "hidden_size": SHAPE["hidden"],
        "intermediate_size": SHAPE["ffn"],
        "num_attention_heads": SHAPE["heads"],
        "num_key_value_heads": SHAPE["heads"],
        "vocab_size": SHAPE["vocab"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _model(rank: int, tp: int) -> torch.nn.Module:
    """Return a real model of megatron-core with the layers of its local spec, its weights as the memory was."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        _model.groups = _groups(rank)  # type: ignore[attr-defined]
    pair, own = _model.groups  # type: ignore[attr-defined]
    groups = {field.name: own for field in fields(ProcessGroupCollection)}
    cut = pair if tp == 2 else own
    groups |= {name: cut for name in groups if "tp" in name} | {
        name: own if tp == 2 else pair for name in groups if "dp" in name
    }
    groups.pop("hcp", None)
    config = TransformerConfig(
        num_layers=SHAPE["layers"],
        hidden_size=SHAPE["hidden"],
        ffn_hidden_size=SHAPE["ffn"],
        num_attention_heads=SHAPE["heads"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        params_dtype=torch.bfloat16,
        bf16=True,
        tensor_model_parallel_size=tp,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=SHAPE["vocab"],
        max_sequence_length=4096,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        pg_collection=ProcessGroupCollection(**groups),
    )
    made: torch.nn.Module = model.cuda().bfloat16()
    return made


def _groups(rank: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    pair = dist.new_group([0, 1])
    alone = [dist.new_group([each]) for each in range(2)]
    return pair, alone[rank]


if __name__ == "__main__":
    main()

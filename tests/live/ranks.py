"""What a rank of the tests' world is: a process that calls functions of ``jobs`` and its neighbours by name."""

import contextlib
import os
import traceback
import warnings
from datetime import timedelta

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tests.live import family_jobs, jobs, layout_jobs


def serve(pipe, rank, size, port, backend):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:  # megatron-core asks for a GPU where it needs none
        torch.cuda.current_device = lambda: "cpu"  # type: ignore[return-value]
    from megatron.core import tensor_parallel
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()
    while True:
        what, args = pipe.recv()
        try:
            known = next(module for module in (jobs, family_jobs, layout_jobs) if hasattr(module, what))
            pipe.send(getattr(known, what)(*args))
        except BaseException as error:  # noqa: BLE001
            error.add_note(f"on rank {rank}\n{traceback.format_exc()}")
            try:
                pipe.send(error)
            except Exception:  # noqa: BLE001
                pipe.send(RuntimeError(traceback.format_exc()))

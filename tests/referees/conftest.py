"""One process as Megatron's whole world, on a machine without a GPU."""

import contextlib
import socket

import pytest
import torch


@pytest.fixture(scope="module")
def megatron_world():
    """Give megatron-core what it asks of CUDA for no purpose here: a device to put tables on, a state of random numbers."""
    from megatron.core import parallel_state, tensor_parallel

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        tracker = tensor_parallel.get_cuda_rng_tracker()
        patch.setattr(tracker, "fork", lambda *_: contextlib.nullcontext(), raising=True)
        yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()

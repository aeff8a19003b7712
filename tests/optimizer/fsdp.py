"""Megatron-FSDP, the real one, on ranks without a GPU: its wrapper of a model, and what Megatron-LM saves of it as ``fsdp_dtensor``.

CUDA's streams have nothing to do on a CPU: what is asked of them is done at once. gloo has no groups of operations.
"""

import contextlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.fsdp import mcore_fsdp_adapter as adapter
from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer as buffers
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor
from megatron.core.transformer.fsdp_dtensor_checkpoint import (
    handle_experts_in_state_dict,
    handle_fp8_extra_state_case,
    handle_swiglu_in_state_dict,
)
from megatron.core.transformer.module import Float16Module

FORM = "fsdp_dtensor"


class Stream:
    """A stream of CUDA's, and an event on one: nothing to wait for."""

    def __init__(self, *_, **__):
        pass

    def record_event(self, *_):
        return self

    def _nothing(self, *_, **__):
        pass

    wait = wait_stream = wait_event = record = synchronize = _nothing


class Mesh(adapter.DeviceMesh):
    """A mesh of processors, whatever is asked for."""

    @staticmethod
    def from_group(group, device_type, *args, **kwargs):
        return torch.distributed.DeviceMesh.from_group(group, "cpu", *args, **kwargs)


@contextlib.contextmanager
def one_by_one(*_, **__):
    yield Stream()


def at_once(operation):
    """Return an operation of ranks that is done when it returns."""

    def done(*args, async_op=False, **kwargs):
        operation(*args, **kwargs)
        return Stream()

    return done


def without_gpu():
    """Let Megatron-FSDP believe what it asks CUDA for."""
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.current_stream = Stream
    torch.cuda.stream = one_by_one
    torch.cuda.empty_cache = lambda: None
    buffers._coalescing_manager = one_by_one
    adapter.DeviceMesh = Mesh
    adapter.TELinear = ()  # a mock, where Transformer Engine is not installed
    dist.all_gather_into_tensor = at_once(dist.all_gather_into_tensor)


def wrapped(config, how, model):
    """Return a model whose parameters ranks share; of f32 weights megatron-core 0.16.1 cannot save the optimizer's state."""
    more = {"data_parallel_sharding_strategy": "optim_grads_params", "gradient_reduce_div_fusion": False}  # which gloo has not
    shared = DistributedDataParallelConfig(**how, use_megatron_fsdp=True, **more)
    return adapter.FullyShardedDataParallel(config, shared, Float16Module(config, model), device=torch.device("cpu"))


def state_of(wrapped, optimizer):
    """Return what Megatron-LM saves of both: preprocess_fsdp_dtensor_state_dict in megatron/training/checkpointing.py."""
    model = wrapped.module  # which is as far as unwrap_model comes
    held = model.state_dict_for_save_checkpoint()
    kept = optimizer.sharded_state_dict(held, metadata={"distrib_optim_sharding_type": FORM})
    handle_fp8_extra_state_case(held)
    held, kept = handle_swiglu_in_state_dict(model, held, kept)
    if experts := model.config.num_moe_experts:
        held = handle_experts_in_state_dict(held, experts)
    state = {"model": held, "optimizer": kept}
    preprocess_state_dict_for_uneven_dtensor(state)
    return state


def save(state, folder):
    """Save what all ranks have, together."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder))

"""Ranks that train a small model with the real megatron-core, on gloo and without a GPU: from the start, or on from a checkpoint.

Arguments: a JSON file of the job, this rank, the port where ranks meet. ``job["out"]`` gets the losses of every step.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core.optimizer as chosen
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils

    from tests.optimizer import fsdp

LENGTH, VOCAB, BATCH = 16, 512, 4
ARGUMENTS = {  # as Megatron-LM would have them
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 8,
    "max_position_embeddings": LENGTH,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "vocab_size": VOCAB,
    "padded_vocab_size": VOCAB,
    "bf16": False,
}
MIXTURE = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "moe_router_load_balancing_type": "none"}


class OnCpu(TorchFunctionMode):
    """Make on the CPU what megatron-core makes on "cuda" whatever the machine."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:  # the mixed precision optimizer looks for CUDA's
            return function(*args).replace("torch.", "torch.cuda.")
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.device:
            return function("cpu" if str(args[0]).startswith("cuda") else args[0])
        return function(*args, **kwargs | ({"device": "cpu"} if str(kwargs.get("device")).startswith("cuda") else {}))


class FusedAdam(torch.optim.Optimizer):
    """Apex's and Transformer Engine's Adam, without their kernels: the step is one of a group, and no tensor.

    With torch's own, which is what megatron-core takes where neither is installed, 0.16.1 cannot load any state: it forgets the step of
    ``fully_reshardable``, and gives all parameters one tensor for it, which each of them counts up.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, **more):
        assert adam_w_mode
        assert not any(more.values())  # what newer releases say of it, too
        super().__init__(params, {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):  # type: ignore[override]
        """Take one step, as AdamW does."""
        for group in self.param_groups:
            held = group["params"]
            if held:  # of an empty group no step is counted
                group["step"] = group.get("step", 0) + 1
            (first, second), many = group["betas"], group.get("step", 0)
            for each in held:
                state = self.state[each]
                for name in () if state else ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(each)
                if each.grad is None:  # of a parameter of which this rank has no element
                    continue
                state["exp_avg"].lerp_(each.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(each.grad, each.grad, value=1 - second)
                wide = (state["exp_avg_sq"] / (1 - second**many)).sqrt_().add_(group["eps"])
                each.mul_(1 - group["lr"] * group["weight_decay"])
                each.addcdiv_(state["exp_avg"], wide, value=-group["lr"] / (1 - first**many))


def without_gpu():
    """Let megatron-core believe what it asks CUDA for."""
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[return-value]
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.fork = lambda *_: contextlib.nullcontext()
    moe_utils.te_general_gemm = None  # which 0.16.1 looks at where Transformer Engine is not installed
    tensor_parallel.random._set_cuda_rng_state = lambda *_, **__: None
    chosen.Adam = distrib_optimizer.Adam = FusedAdam
    chosen.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def trained(job):
    """Return the model of this rank, and what trains it."""
    said = {**ARGUMENTS, **(MIXTURE if job.get("mixture") else {}), **job.get("arguments", {})}
    said["untie_embeddings_and_output_weights"] = not job.get("tied")
    wide = torch.bfloat16 if job.get("bf16") else torch.float32
    config = TransformerConfig(
        **{
            each.name: said[each.name]
            for each in dataclasses.fields(TransformerConfig)
            if each.name in said and each.name != "bf16"
        },
        num_moe_experts=said.get("num_experts"),
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=job["tp"],
        pipeline_model_parallel_size=job["pp"],
        virtual_pipeline_model_parallel_size=job.get("vpp"),
        num_layers_in_first_pipeline_stage=job.get("first"),
        mtp_num_layers=job.get("mtp"),
        pipeline_model_parallel_layout=job.get("layout"),
        expert_model_parallel_size=job.get("ep", 1),
        expert_tensor_parallel_size=1,
        moe_token_dispatcher_type="allgather",
        bf16=wide is torch.bfloat16,
        params_dtype=wide,
        pipeline_dtype=wide,
    )
    config.finalize_model_grads_func = finalize_model_grads
    distributed = job["form"] != "plain"
    how = {"use_distributed_optimizer": distributed, "grad_reduce_in_fp32": True, **job.get("ddp", {})}
    models = [built(job, config, said, each) for each in range(job.get("vpp") or 1)]
    if job["form"] == fsdp.FORM:
        wrapped = [fsdp.wrapped(config, how, model) for model in models]
    else:
        wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(**how), model) for model in models]
    no_sync = [each.no_sync for each in wrapped]
    config.no_sync_func = no_sync if job.get("vpp") else no_sync[0]
    opened = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        min_lr=0.0,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=wide is torch.bfloat16,
        params_dtype=wide,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(opened, wrapped)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-2,
        min_lr=0.0,
        lr_warmup_steps=BATCH * 4,
        lr_decay_steps=BATCH * job.get("decay", 40),
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=BATCH * 40,
        wd_incr_style="constant",
    )
    return models, wrapped, optimizer, scheduler, said


def built(job, config, said, virtual):
    """Return what this rank has of the model in one of its virtual stages."""
    rank, last = parallel_state.get_pipeline_model_parallel_rank(), (job.get("vpp") or 1) - 1
    stage, vp = virtual * job["pp"] + rank, virtual if job.get("vpp") else None
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm", moe_grouped_gemm=False)
    model = GPTModel(
        config,
        spec,
        vocab_size=said["padded_vocab_size"],
        max_sequence_length=said["max_position_embeddings"],
        share_embeddings_and_output_weights=bool(job.get("tied")),
        position_embedding_type="rope",
        rotary_base=10000,
        pre_process=stage == 0,
        post_process=(virtual, rank) == (last, job["pp"] - 1),
        vp_stage=vp,
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=vp)
        if job.get("mtp")
        else None,
    ).to(config.params_dtype)
    for name, parameter in model.named_parameters():
        own = getattr(parameter, "tensor_model_parallel", False) or not getattr(parameter, "allreduce", True)
        shared = ["embedding.word_embeddings.weight", *(["output_layer.weight"] if job.get("tied") else [])]
        of = (0, shared[0]) if name in shared else (stage, name)
        place = (of[0], parallel_state.get_tensor_model_parallel_rank() if own else -1, of[1])
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(zlib.crc32(repr(place).encode())))
    return model


def tokens_of(number, vocab=VOCAB):
    """Return tokens that follow from the number of a step, and are nothing but that."""
    return torch.randint(vocab, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(number))


def step(tokens, models, wrapped, optimizer, scheduler):
    """Take one step; return the loss."""
    for each in wrapped:
        each.zero_grad_buffer()
    optimizer.zero_grad()
    here, world = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = tokens.chunk(world)[here].chunk(2 if wrapped[1:] else 1)  # virtual stages take turns with parts of it

    def loss_of(output):
        loss = output.float().mean()
        return loss, {"loss": loss.detach().clone()}

    def forward(coming, chunk):
        tokens = next(coming)
        places = torch.arange(tokens.shape[1] - 1)[None].expand(len(tokens), -1)
        return chunk(tokens[:, :-1], places, None, labels=tokens[:, 1:]), loss_of

    coming = [iter(batches) for _ in wrapped]
    done = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=coming if wrapped[1:] else coming[0],
        model=wrapped,
        num_microbatches=len(batches),
        seq_length=tokens.shape[1] - 1,
        micro_batch_size=len(batches[0]),
        forward_only=False,
    )
    optimizer.step()
    scheduler.step(increment=BATCH)
    loss = sum((each["loss"] for each in done), torch.zeros(())) / len(batches)
    dist.all_reduce(loss)
    return loss.item() / (dist.get_world_size() / parallel_state.get_pipeline_model_parallel_world_size())


def state_of(job, parts, iteration, *, loading):
    """Return what Megatron-LM saves of a run: generate_state_dict in megatron/training/checkpointing.py."""
    models, wrapped, optimizer, scheduler = parts
    said = {"checkpoint_version": 3.0, "iteration": iteration, "opt_param_scheduler": scheduler.state_dict()}
    if job["form"] == fsdp.FORM:
        return {**said, **fsdp.state_of(wrapped[0], optimizer)}, {}
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if job["form"] != "plain":
        metadata["distrib_optim_sharding_type"] = job["form"]
    names = [f"model{number}" for number, _ in enumerate(models)] if models[1:] else ["model"]
    held = {name: model.sharded_state_dict(metadata=metadata) for name, model in zip(names, models, strict=True)}
    state = {**said, **held}
    state["optimizer"] = optimizer.sharded_state_dict(held, is_loading=loading, metadata=metadata)
    return state, metadata


def save(job, said, parts, iteration):
    state, metadata = state_of(job, parts, iteration, loading=False)
    if job.get("no_save_optim"):
        del state["optimizer"], state["opt_param_scheduler"]
    consumed = BATCH * iteration
    cut = {
        "tensor_model_parallel_size": job["tp"],
        "pipeline_model_parallel_size": job["pp"],
        "virtual_pipeline_model_parallel_size": job.get("vpp"),
        "decoder_first_pipeline_num_layers": job.get("first"),
        "mtp_num_layers": job.get("mtp"),
        "pipeline_model_parallel_layout": job.get("layout"),
        "world_size": dist.get_world_size(),
        "expert_model_parallel_size": job.get("ep", 1),
        "expert_tensor_parallel_size": 1,
    }
    dtype = torch.bfloat16 if job.get("bf16") else torch.float32
    state["args"] = argparse.Namespace(
        **{**said, "bf16": bool(job.get("bf16"))},
        **cut,
        params_dtype=dtype,
        consumed_train_samples=consumed,
        consumed_valid_samples=0,
        use_distributed_optimizer=job["form"] != "plain",
        iteration=iteration,
    )
    state["num_floating_point_operations_so_far"] = 17.0 * iteration
    folder = Path(job["save"]) / f"iter_{iteration:07d}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
        (folder.parent / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    dist.barrier()
    if job["form"] == fsdp.FORM:
        fsdp.save(state, folder)
    else:
        dist_checkpointing.save(state, str(folder), content_metadata=metadata)


def load(job, parts):
    """Load a checkpoint with strict checking; return its iteration."""
    [model], _, optimizer, scheduler = parts
    root = Path(job["load"])
    folder = root / f"iter_{int((root / 'latest_checkpointed_iteration.txt').read_text()):07d}"
    asked, _ = state_of(job, parts, 0, loading=True)
    common = dist_checkpointing.load_common_state_dict(str(folder))
    assert dist_checkpointing.load_content_metadata(preloaded_state_dict=common).get("distrib_optim_sharding_type") == (
        None if job["form"] == "plain" else job["form"]
    )
    state = dist_checkpointing.load(asked, str(folder), strict=StrictHandling.RAISE_ALL)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["opt_param_scheduler"])
    return state["iteration"]


def main():
    job, rank, port = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), sys.argv[3]
    world = job["tp"] * job["pp"] * job.get("dp", 1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    without_gpu()
    fsdp.without_gpu()
    parallel_state.initialize_model_parallel(
        job["tp"], job["pp"], job.get("vpp"), expert_model_parallel_size=job.get("ep", 1), expert_tensor_parallel_size=1
    )
    with OnCpu():
        *parts, said = trained(job)
        first = load(job, parts) if job.get("load") else 0
        losses = []
        for number in range(first, first + job["steps"]):
            if job.get("save_at") == number:
                save(job, said, parts, number)
            losses.append(step(tokens_of(number, said["vocab_size"]), *parts))
        if job.get("save_at") == first + job["steps"]:
            save(job, said, parts, first + job["steps"])
    if rank == 0:
        Path(job["out"]).write_text(json.dumps({"first": first, "losses": losses}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

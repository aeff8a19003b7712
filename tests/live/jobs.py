"""What the ranks of the tests' world do: build real models of megatron-core, and let them cross."""

import os
import warnings
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import torch
import torch.distributed as dist

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer import TransformerConfig

from carnet import live
from carnet.errors import CarnetError
from carnet.live import Grid
from carnet.live.control import Control
from carnet.megatron.models import arguments
from carnet.megatron.ranks import grid
from tests.te_states import FORMS

AXES = {"tensor": "tp", "pipeline": "pp", "expert": "ep"}


@contextmanager
def parallel(tp=1, pp=1, ep=1, etp=None, vp=None):
    parallel_state.initialize_model_parallel(
        tp, pp, vp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp, create_gloo_process_groups=False
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        held = [group for group in dist.distributed_c10d._world.pg_map if group != dist.group.WORLD]
        for group in held:  # each has threads that look at their clocks; NCCL's are given up in the same order by all
            dist.destroy_process_group(group)


@contextmanager
def on_chunk(chunk):
    parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
    try:
        yield
    finally:
        parallel_state.set_virtual_pipeline_model_parallel_rank(None)


def build(sizes, **cut):
    """Return a model of this rank, every weight of it drawn from its global name and place."""
    config = TransformerConfig(
        num_layers=sizes["layers"],
        mtp_num_layers=sizes.get("mtp"),
        hidden_size=sizes["hidden"],
        ffn_hidden_size=sizes["ffn"],
        num_attention_heads=sizes["heads"],
        num_query_groups=sizes["kv"],
        num_moe_experts=sizes.get("experts"),
        moe_ffn_hidden_size=sizes.get("moe_ffn"),
        moe_router_topk=2,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
        bf16=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        persist_layer_norm=False,
        tensor_model_parallel_size=cut.get("tp", 1),
        pipeline_model_parallel_size=cut.get("pp", 1),
        pipeline_dtype=torch.bfloat16,
        virtual_pipeline_model_parallel_size=cut.get("vp"),
        expert_model_parallel_size=cut.get("ep", 1),
        expert_tensor_parallel_size=cut.get("etp") or cut.get("tp", 1),
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    further = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False) if sizes.get("mtp") else None
    pp = cut.get("pp", 1)
    at, chunk, vp = parallel_state.get_pipeline_model_parallel_rank(), cut.get("chunk", 0), cut.get("vp")
    model = GPTModel(
        config,
        get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=cut.get("chunk") if cut.get("vp") else None
        ),
        vocab_size=sizes["padded"],
        max_sequence_length=64,
        mtp_block_spec=further,
        share_embeddings_and_output_weights=sizes.get("tied", False),
        position_embedding_type="rope",
        **sizes.get("positions", {}),
        pre_process=at == chunk == 0,
        post_process=at == pp - 1 and chunk == (vp or 1) - 1,
        vp_stage=chunk if vp else None,
    )
    for name, parameter in model.named_parameters():
        ranks = [at, chunk]  # copies of what is not cut are the same on all ranks
        if getattr(parameter, "tensor_model_parallel", False):
            ranks.append(parallel_state.get_tensor_model_parallel_rank())
        if ".experts." in name:
            ranks.append(10 * parallel_state.get_expert_model_parallel_rank())
        seed = torch.Generator().manual_seed(crc32(f"{name} {ranks}".encode()))
        parameter.data = torch.empty(parameter.shape).normal_(generator=seed).bfloat16()
    return model.cuda() if dist.get_backend() == "nccl" else model


def save(state, cut, said, folder):
    """Save a rank's state as Megatron's per-rank format has it: what comes first of all copies."""
    tp, pp, ep = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank(), 0)
    if cut.get("ep", 1) > 1:
        ep = parallel_state.get_expert_model_parallel_rank()
    name = f"mp_rank_{tp:02d}" + f"_{pp:03d}" * (cut.get("pp", 1) > 1) + f"_{ep:03d}" * (cut.get("ep", 1) > 1)
    path = Path(folder) / name / "model_optim_rng.pt"
    if (parallel_state.get_data_parallel_rank() and not ep) or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = {f"{axis}_model_parallel_size": cut.get(short, 1) for axis, short in AXES.items()}
    model = state if "model0" in state else {"model": state}
    args = Namespace(**{**said, **sizes, "params_dtype": torch.bfloat16})
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, **model}, path)


def parts(found):
    """Return tensors as another process can have them: their bytes."""
    held = {name: tensor.contiguous().view(-1).cpu() for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}
    return {name: (str(t.dtype), tuple(found[name].shape), t.view(torch.uint8).numpy().tobytes()) for name, t in held.items()}


def states_of(model, scales):
    """Return a model's state, with what Transformer Engine leaves beside each linear layer where ``scales`` has a kind of state."""
    held = model.state_dict()
    offset = parallel_state.get_pipeline_model_parallel_rank() * len(model.decoder.layers)
    for name in [name for name in held if ".linear_" in name and name.endswith("weight")] if scales else []:
        layer = int(name.split(".")[2]) + offset  # ranks that share a layer have one scale: it is reduced among them
        random = torch.Generator().manual_seed(crc32(f"{layer} {name.split('.')[-2]}".encode()))
        held[name.replace("weight", "_extra_state")] = FORMS[scales](100 + 200 * torch.rand(3, generator=random))
    return held


def cross(sizes, cut, target, to, folder, options=None, scales=None):
    """Let a model cross, save it, and return what arrived; the same must come again, in place and as a stream."""
    with parallel(**cut):
        model = build(sizes, **cut)
        state = states_of(model, scales)
        said = arguments(model) | {"vocab_size": sizes["vocab"], "params_dtype": torch.bfloat16}
        save(state, cut, said, folder)
        given = {"timeout": 20, "states": state, **(options or {})}
        made = live.plan(said, source=Grid(**cut), target=Grid(**target), to=to, **given)
        first = made.run(state)
        kept = parts(first)
        for tensor in first.values():
            tensor.view(-1).view(torch.uint8).fill_(77)
        made.run(state, into=first)
        assert parts(first) == kept
        assert made.check() > 20
        # before the stream, in which a tensor larger than a bucket is to arrive whole
        assert 0 <= made.traffic()["bytes of buckets"] <= given.get("memory", 2 << 30)
        assert parts(dict(made.stream(state))) == kept
        dist.barrier()
        return kept, made.texts, dict(made.traffic())


def expect(sizes, cut, target, to, folder, options):
    """Let a model cross, bend what arrived, and return what the ranks of an engine must hold: what left. Save the model."""
    with parallel(**cut):
        model = build(sizes, **cut)
        said = arguments(model) | {"vocab_size": sizes["vocab"], "params_dtype": torch.bfloat16}
        save(model.state_dict(), cut, said, folder)
        made = live.plan(said, source=Grid(**cut), target=Grid(**target), to=to, timeout=20, **options)
        refused = ""
        try:
            made.expected()
        except CarnetError as error:
            refused = error.what
        held = made.run(model)
        for tensor in held.values():
            tensor.view(-1).view(torch.uint8).fill_(77)
        before = made.expected() if to == "vllm" else None
        dist.barrier()
        for parameter in model.parameters():  # the next step of training
            parameter.data.neg_()
        return before, made.expected(), refused


def described(sizes, more, options):
    """Return the config of a target whose source is described by itself, or by the arguments of a run; and the model's own angles."""
    with parallel():
        model = build(sizes)
        said = arguments(model) | {"vocab_size": sizes["vocab"]}
        if more is not None:  # as parse_args has them, of the release that runs
            said = {name: value for name, value in said.items() if name != "carnet_meant_for"} | more
        with live.plan(said, source=Grid(), target=Grid(), timeout=20, **options) as made:
            turned = model.rotary_pos_emb(2)[1].flatten()  # of the second token
            return made.texts["config.json"], turned[: len(turned) // 2].tolist()


def peak(sizes, cut, target, memory):
    """Return the most that a run needs of a GPU beyond what it returns."""
    with parallel(**cut):
        model = build(sizes, **cut)
        said = arguments(model) | {"vocab_size": sizes["vocab"]}
        made = live.plan(said, source=Grid(**cut), target=Grid(**target), memory=memory, timeout=20)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = made.run(model)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in found.values())


def save_together(sizes, cut, target, to, folder, options, outs):
    """Let the ranks write files together, once for each of ``outs``, and return how that was refused."""
    with parallel(**cut):
        model = build(sizes, **cut)
        said = arguments(model) | {"vocab_size": sizes["vocab"], "params_dtype": torch.bfloat16}
        save(model.state_dict(), cut, said, folder)
        made = live.plan(said, source=Grid(**cut), target=Grid(**target), to=to, timeout=20, **options)
        refused = []
        for out in outs:
            try:
                made.save(out, model)
                refused.append("")
            except CarnetError as error:
                refused.append(str(error))
        return refused


def again(sizes):
    """Say what of the work of a run is done again: for the same memory in another table, for other memory, after the end."""
    with parallel(tp=2):
        model = build(sizes, tp=2)
        made = live.plan(arguments(model), source=Grid(tp=2), target=Grid(), padded_vocab_size=sizes["padded"], timeout=20)
        tied, tie = [], made._tie

        def count(*args):
            tied.append(args)
            return tie(*args)

        made._tie = count
        tensors = made.run(model.state_dict())
        for _ in range(3):
            tensors = made.run(model.state_dict(), into=tensors)
        laid = made._acts
        for _ in made.stream(model.state_dict()):
            pass
        made.run(model.state_dict(), into=tensors)
        once = len(tied), made._acts is laid
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.clone().add_(1)
        moved = parts(made.run(model.state_dict(), into=tensors)) == parts(dict(made.stream(model)))
        made.close()
        try:
            made.run(model)
        except CarnetError as error:
            return once, len(tied), moved, error.what


def less_one(sizes):
    """Return the norms of a model that stores them less one: whole on a rank, and where the model is shared."""
    with parallel(tp=2):
        model = build(sizes, tp=2)
        said = arguments(model) | {"layernorm_zero_centered_gamma": True}
        cuts = Grid(tp=2), Grid(tp=2), Grid()
        found = []
        for target in cuts[1:]:
            made = live.plan(said, source=cuts[0], target=target, padded_vocab_size=sizes["padded"], timeout=20)
            found.append({name: each for name, each in parts(made.run(model)).items() if "norm" in name})
        return found


def odd_state(sizes):
    """Hand over what is not a state on one rank, where scales would be looked for in it."""
    with parallel(tp=2):
        model = build(sizes, tp=2)
        given = {"quantize": "fp8", "style": "compressed-tensors", "activations": "dynamic", "timeout": 20}
        made = live.plan(arguments(model), source=Grid(tp=2), target=Grid(), padded_vocab_size=sizes["padded"], **given)
        return made.run(5 if dist.get_rank() == 1 else model)


def damaged(sizes, cut, target, kind):
    """Let a model cross, change what lies at one end on one rank, and look at both ends again."""
    with parallel(**cut):
        model = build(sizes, **cut)
        state = model.state_dict()
        if kind == "copy" and dist.get_rank() == 1:
            state["decoder.layers.0.input_layernorm.weight"].data[3] += 1
        made = live.plan(arguments(model), source=Grid(**cut), target=Grid(**target), timeout=20)
        found = made.run(state)
        if kind == "arrival" and dist.get_rank() == 1:
            found["model.layers.1.mlp.down_proj.weight"].view(torch.uint8)[5, 7] ^= 64
        return made.check()


def to_modules(sizes, cut, target_cut):
    """Let a model cross into another model of megatron-core, which is cut otherwise; return what both say of every tensor."""
    with parallel(**cut):
        model = build(sizes, **cut)
        state, said = model.state_dict(), arguments(model) | {"vocab_size": sizes["vocab"]}
    with parallel(**target_cut):
        other = build(sizes, **target_cut)
        for parameter in other.parameters():
            parameter.data.fill_(77)
        padded = {"padded_vocab_size": sizes["padded"], "timeout": 20}
        both = {**padded, "target_padded_vocab_size": sizes["padded"]}
        made = live.plan(said, source=Grid(**cut), target=Grid(**target_cut), to="megatron", **both)
        made.run(state, into=other)
        for tensor in state.values():
            if isinstance(tensor, torch.Tensor):
                tensor.data.add_(1)
        made.run(state, into=other)  # the weights have changed since
        again = live.plan(said, source=Grid(**target_cut), target=Grid(ranks=(0,)), **padded).run(other)
        whole = live.plan(said, source=Grid(**cut), target=Grid(ranks=(0,)), **padded).run(state)
        return bool(parts(again) == parts(whole)), len(whole)


def virtual(sizes, folder):
    """Let the chunks of a virtual pipeline cross."""
    with parallel(pp=2, vp=2):
        models = []
        for chunk in range(2):
            with on_chunk(chunk):
                models.append(build(sizes, pp=2, vp=2, chunk=chunk))
        said = arguments(models[0]) | {"vocab_size": sizes["vocab"], "params_dtype": torch.bfloat16}
        save({f"model{at}": model.state_dict() for at, model in enumerate(models)}, {"pp": 2}, said, folder)
        made = live.plan(said, source=Grid(pp=2, vp=2), target=Grid(ranks=(2,)), timeout=20)
        return parts(made.run(models))


def no_number(sizes, scales):
    """Let a weight of one rank be no number, on the way to FP8."""
    with parallel(tp=2):
        model = build(sizes, tp=2)
        state = states_of(model, scales)
        if dist.get_rank() == 1:
            state["decoder.layers.2.mlp.linear_fc2.weight"].data[3, 5] = float("nan")
        given = {"quantize": "fp8", "style": "compressed-tensors", "activations": "dynamic", "timeout": 20}
        said = arguments(model) | {"vocab_size": sizes["vocab"]}
        return live.plan(said, source=Grid(tp=2), target=Grid(), states=state, **given).run(state)


def refused(sizes, cut, spoil, rank, options=None):
    """Plan a crossing, spoil what one rank hands over, and let it run: what it raises is returned."""
    with parallel(**cut):
        model = build(sizes, **cut)
        state, said = model.state_dict(), arguments(model) | {"vocab_size": sizes["vocab"]}
        if dist.get_rank() == rank:
            SPOILED[spoil](state, said)
        if spoil == "none":
            options = {"memory": 1 << 14}
        made = live.plan(said, source=Grid(**cut), target=Grid(tp=2), **{"timeout": 20, **(options or {})})
        return len(made.run(state))


def grids(sizes, cut, uneven):
    """Return the grid that Megatron's own state says, and what crosses with it alone."""
    with parallel(**cut):
        model = build(sizes, **cut)
        if uneven:
            model.config.num_layers_in_first_pipeline_stage = 3
        return grid(model.config)


def orders(sizes):
    """Say another order than the job has."""
    parallel_state.initialize_model_parallel(1, 2, order="tp-cp-ep-pp-dp", create_gloo_process_groups=False)
    try:
        model = build(sizes, pp=2)
        named = grid(model.config, order="tp-cp-ep-pp-dp")
        return named.order, grid(model.config)
    finally:
        parallel_state.destroy_model_parallel()


def page(sizes, code):
    """Do what a page of the documentation shows."""
    with parallel(tp=2, pp=2):
        model = build(sizes, tp=2, pp=2)
        args = Namespace(**(arguments(model) | {"vocab_size": sizes["vocab"], "params_dtype": torch.bfloat16}))
        told = {"args": args, "model": model, "train": train}
        exec(code, told)
        fresh = live.plan(vars(args), source=Grid(tp=2, pp=2), target=Grid(tp=2, ranks=[0, 1]), to="trtllm", timeout=20).run(
            model
        )
        return sorted(told["tensors"]), parts(told["tensors"]) == parts(fresh)


def train(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


def wish(sizes, cut, target, options):
    """Plan what cannot be."""
    with parallel():
        said = arguments(build(sizes)) | {"vocab_size": sizes["vocab"]}
        live.plan(said, source=Grid(**cut), target=Grid(**target), **{"timeout": 20, **options})


def _reshape(state, _):
    state["output_layer.weight"] = state["output_layer.weight"][1:]


def _lose(state, _):
    del state["decoder.layers.1.mlp.linear_fc2.weight"]


def _add(state, _):
    state["decoder.layers.0.mlp.linear_fc9.weight"] = torch.zeros(3)


def _retype(state, _):
    state["decoder.layers.0.mlp.linear_fc2.weight"] = state["decoder.layers.0.mlp.linear_fc2.weight"].float()


def _misconfigure(_, said):
    said["rotary_base"] = 77777


def _fail(state, _):
    state["decoder.layers.0.mlp.linear_fc2.weight"] = torch.zeros(4, 4, dtype=torch.bfloat16).to_sparse()


SPOILED = {"shape": _reshape, "loss": _lose, "more": _add, "type": _retype, "config": _misconfigure, "bug": _fail}


def leave(rank):
    """End one rank in the middle of a crossing, and say what the others raise."""
    control = Control(None, 3)
    if dist.get_rank() == rank:
        os._exit(1)
    try:
        control.agree(None)
    except CarnetError as error:
        return error.what, dict(error.facts)
    return "nothing", {}

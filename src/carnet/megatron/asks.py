"""What the model of a spec asks a checkpoint for: the keys of its parameters, their places, and the whole they are parts of.

The model is built on the meta device, a rank after the other, and asked what megatron-core itself would ask it before it loads.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from carnet.algebra.box import Box, whole
from carnet.dtypes import BY_TORCH
from carnet.errors import NotSupported
from carnet.megatron.fused import Saver, keys_map
from carnet.megatron.meta import Cut, Rank, Spec, built
from carnet.megatron.models import Arguments
from carnet.megatron.modules import core_attention, down_projection
from carnet.megatron.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec
from carnet.megatron.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec

# what a store's keys tell about how it was saved: a flag of sharded_state_dict's, and the keys that only it makes
FORMS = {
    "non_homogeneous_layers": re.compile(r"^decoder\.layers\.\d+\."),
    "singleton_local_shards": re.compile(r"_w$|\.experts\.experts\.\d+\."),
}
LAYER = re.compile(r"decoder\.layers\.\d+\.|mtp\.layers\.\d+\.(transformer_layer|mtp_model_layer)\.")
EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)")  # where experts are together: weight3
# a part of a layer -> its word in a kind of layer
PARTS = {
    "self_attention.linear_qkv": "attention",
    "self_attention.linear_kv_down_proj": "mla",
    "self_attention.in_proj": "gdn",
    "mixer.in_proj": "mamba",
    "mlp.linear_fc1": "dense",
    "mlp.router": "moe",
}


@dataclass(frozen=True, slots=True)
class Ask:
    """One part of a parameter, and what megatron-core would fill it with."""

    parameter: str  # in the model of a rank
    rank: str  # "tp0 pp0 ep0"
    unit: str  # the file of a rank; "" in a store
    key: str  # stored name
    box: Box  # of the stored tensor
    shape: tuple[int, ...]  # of the whole stored tensor
    dtype: str  # carnet's name of the parameter's element type


@dataclass(frozen=True, slots=True)
class Asked:
    """What all ranks of a model ask for together."""

    asks: list[Ask]
    states: set[str]  # of modules, by the names of their objects
    silent: dict[str, tuple[int, ...]]  # parameters, with their shapes, that no ask would fill


def spec_of(spec: str, saver: Saver | None, *, hybrid: bool) -> tuple[str, Spec]:
    """Return a spec as it is called in Python, and what builds it, or one that asks for the same keys.

    Transformer Engine's own is not built: it asks for what carnet's does under the names of its fused norms.
    """
    remap = saver is not None
    if spec == "local" and hybrid:
        raise NotSupported("megatron-core has no local spec of a hybrid", {"spec": spec}, remedy="--spec te or modelopt")
    if spec == "local":
        return "get_gpt_decoder_block_spec(config, use_transformer_engine=False)", _local
    if hybrid:
        own = f"get_hybrid_stack_modelopt_spec(remap_te_layernorm={remap})"
        made = get_hybrid_stack_modelopt_spec(remap_te_layernorm=remap)
        return own if spec == "modelopt" else "mamba_stack_spec, hybrid_stack_spec since 0.18 (by its names)", lambda *_: made
    if spec == "te":
        return "get_gpt_decoder_block_spec(config, use_transformer_engine=True) (by its names)", _by_names
    saved_by: Saver = saver or "te"
    text = (
        f"get_gpt_modelopt_spec(config, remap_te_layernorm={remap}{', saved_by=' + repr(saved_by) if saver == 'local' else ''})"
    )
    return text, lambda config, stage: get_gpt_modelopt_spec(
        config, remap_te_layernorm=remap, saved_by=saved_by, vp_stage=stage
    )


def _by_names(config: TransformerConfig, stage: int | None) -> TransformerBlockSubmodules:
    """Return a spec that asks for what Transformer Engine's would, cut alike."""
    made = get_gpt_modelopt_spec(config, remap_te_layernorm=True, vp_stage=stage)
    for layer in made.layer_specs if config.multi_latent_attention else ():
        inner = layer.submodules.self_attention.submodules
        inner.linear_q_down_proj = inner.linear_kv_down_proj = down_projection(like_te=True)
    return made


def _local(config: TransformerConfig, stage: int | None) -> TransformerBlockSubmodules:
    """Return megatron-core's own local spec, with attention that latent attention can be built with."""
    made = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=False,
        normalization=config.normalization,
        qk_l2_norm=getattr(config, "qk_l2_norm", False),
        vp_stage=stage,
    )
    for layer in made.layer_specs if config.multi_latent_attention else ():
        inner = layer.submodules.self_attention.submodules
        inner.core_attention = core_attention(local=True, latent=True)
        if config.q_lora_rank is None:  # a norm of nothing, which 0.19 refuses to build
            inner.q_layernorm = IdentityOp
    return made


def of_store(said: Arguments, builder: Spec, cut: Cut, names: Sequence[str]) -> Asked:
    """Return what all ranks ask a store for.

    ``names`` are those of the store: whether its layers and experts are apart is for it to say.
    """
    asked = Asked([], set(), {})
    form = {flag: True for flag, pattern in FORMS.items() if any(map(pattern.search, names))}
    for rank in cut.ranks():
        with built(said, builder, cut, rank) as stages:
            for model in stages:
                shards = [*_shards(model, form)]
                asked.states.update(shard.unique_key for _, shard in shards if isinstance(shard, ShardedObject))
                asked.asks.extend(_ask(name, shard, rank) for name, shard in shards if isinstance(shard, ShardedTensor))
                named = {name for name, _ in shards}
                asked.silent.update({name: tuple(held.shape) for name, held in model.named_parameters() if name not in named})
    return asked


def of_ranks(said: Arguments, builder: Spec, cut: Cut, saver: Saver | None, *, grouped: bool) -> list[Ask]:
    """Return what each rank asks its own file for; ``saver`` says whose names the norms have there.

    With ``grouped`` the experts of a layer are one module, as in Transformer Engine's spec.
    """
    asks: list[Ask] = []
    for rank in cut.ranks():
        with built(said, builder, cut, rank) as stages:
            for number, model in enumerate(stages):
                asks += _of_state(model, rank, number, saver, grouped=grouped)
    return asks


def _shards(model: torch.nn.Module, form: Mapping[str, bool]) -> Iterator[tuple[str, ShardedTensor | ShardedObject]]:
    """Yield what megatron-core asks a store for, by the name of the parameter; what it joins or splits on the way as it is stored."""
    state = model.sharded_state_dict(metadata=dict(form)) if form else model.sharded_state_dict()  # type: ignore[operator]
    apply_factories(state)
    for parameter, held in state.items():
        for shard in nested_values(held) if isinstance(held, dict | list) else (held,):
            yield parameter, shard


def _ask(parameter: str, shard: ShardedTensor, rank: Rank) -> Ask:
    box = Box(tuple(shard.global_offset), (1,) * shard.prepend_axis_num + tuple(shard.local_shape))
    return Ask(parameter, str(rank), "", shard.key, box, tuple(shard.global_shape), _dtype(shard.dtype))


def _of_state(model: torch.nn.Module, rank: Rank, stage: int, saver: Saver | None, *, grouped: bool) -> Iterator[Ask]:
    """Yield what a rank asks its file for: its own state, the norms under the names that they are saved by.

    Megatron renames them as it loads: megatron/core/post_training/modelopt/gpt/state_dict_hooks.py.
    """
    unit = f"tp{rank.tp}-pp{rank.pp}-ep{rank.ep}-vp{stage}"  # as formats/legacy.py names it
    state = {name: held for name, held in model.state_dict().items() if isinstance(held, torch.Tensor)}
    layers: dict[str, list[str]] = defaultdict(list)
    for name in state:
        match = LAYER.match(name)
        layers[match[0] if match else ""].append(name)
    for layer, names in layers.items():
        renamed = keys_map(_kind(names), saver) if layer and saver is not None else {}
        for name in names:
            if name.endswith("_extra_state"):
                continue
            inner = name.removeprefix(layer)
            key = next((layer + new + inner.removeprefix(old) for old, new in renamed.items() if inner.startswith(old)), name)
            key = EXPERT.sub(r"experts.\2.\3\1", key) if grouped else key
            shape = tuple(state[name].shape)
            yield Ask(name, str(rank), unit, key, whole(shape), shape, _dtype(state[name].dtype))


def _kind(names: Sequence[str]) -> str:
    """Return what a layer is, by the names in it."""
    parts = [kind for part, kind in PARTS.items() if any(f".{part}" in name for name in names)]
    return " ".join(parts)


def _dtype(dtype: torch.dtype) -> str:
    return BY_TORCH[str(dtype).removeprefix("torch.")].name

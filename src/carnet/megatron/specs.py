"""Specs for post-training: plain linear layers and norms of their own, under the names that training gave to both.

A quantizer wants a norm and the linear layer behind it apart, training wants them in one module. So the modules differ, the weights do
not, and ``sharded_state_dict_keys_map`` ties the two: ``input_layernorm.weight`` is saved as, and loaded from,
``self_attention.linear_qkv.layer_norm_weight``. Same names and parameters as megatron/core/post_training/modelopt/{gpt,mamba,hybrid}.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

from megatron.core import __version__ as installed
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.post_training.modelopt import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from carnet.errors import NotSupported
from carnet.megatron import refusals
from carnet.megatron.hybrids import (
    MambaLayer,
    MambaLayerSubmodules,
    MambaMixer,
    MambaMixerSubmodules,
    Stack,
    StackSubmodules,
)
from carnet.megatron.modules import (
    HAVE_TE,
    HybridStack,
    Norm,
    Refused,
    core_attention,
    define_forgotten,
    down_projection,
)

Saver = Literal["te", "local"]


@dataclass(frozen=True, slots=True)
class Fused:
    """A norm, and the linear layer under which its weight is saved."""

    norm: str  # the norm's own module
    linear: str  # what its weight and bias are called instead
    te: str  # the layers where Transformer Engine's spec fuses them, a pattern of their kind
    local: str  # the layers where the local spec names them so, without fusing anything


# a kind is what the layer mixes tokens with, and what it does to each: `attention moe`; in a hybrid one of them alone.
# megatron/core/models/gpt/gpt_layer_specs.py, whose local spec maps keys in every layer but those of latent attention;
# megatron/core/models/{mamba/mamba,hybrid/hybrid}_layer_specs.py, which has Transformer Engine's alone
FUSED = (
    Fused("input_layernorm.", "self_attention.linear_qkv.layer_norm_", te="attention*", local="attention*"),
    Fused("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_", te="*dense", local="attention *"),
    Fused("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_", te="mla*", local=""),
    Fused("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_", te="mla*", local=""),
    Fused("norm.", "mixer.in_proj.layer_norm_", te="mamba", local=""),
)
REAL_QUANT = {
    "None": TransformerLayer,
    "fp8_real_quant": layers.FP8WeightTransformerLayer,
    "fp8_blockwise_real_quant": layers.BlockwiseFP8WeightTransformerLayer,
}


def keys_map(kind: str, saved_by: Saver) -> dict[str, str]:
    """Return which keys of a layer of some kind are saved under another name.

    >>> keys_map("attention moe", "te")
    {'input_layernorm.': 'self_attention.linear_qkv.layer_norm_'}
    >>> keys_map("mamba", "te")
    {'norm.': 'mixer.in_proj.layer_norm_'}
    """
    return {each.norm: each.linear for each in FUSED if fnmatchcase(kind, getattr(each, saved_by))}


def get_gpt_modelopt_spec(
    config: TransformerConfig,
    local_core_attention: bool = False,
    remap_te_layernorm: bool = False,
    real_quant_cfg: str = "None",
    qk_l2_norm: bool = False,
    use_arbitrary_attention_mask: bool = False,
    *,
    saved_by: Saver = "te",
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """Return the spec of this rank's layers of a GPTModel: dense, mixtures, latent attention, q and k normed by their length.

    ``remap_te_layernorm`` has them load and save distributed checkpoints of the default spec: Transformer Engine's, or with
    ``saved_by`` "local" the local one, which calls the norm before a mixture otherwise. ``vp_stage`` is the virtual stage that is
    built, ``pp_rank`` the pipeline stage where it is not this rank's. Norms and core attention are Transformer Engine's where it is
    installed. Raises BadRequest for a word or a pattern that means nothing, NotSupported for layers that it has no spec for.
    """
    _refuse_strange(config)
    if real_quant_cfg not in REAL_QUANT:
        facts = {"found": real_quant_cfg, "known": ", ".join(REAL_QUANT)}
        raise refusals.Unmapped(f"RealQuantTransformerLayer does not support {real_quant_cfg}", facts)
    if saved_by not in get_args(Saver):
        raise refusals.Unmapped(f"{saved_by!r} is no spec of training", {"known": ", ".join(get_args(Saver))})
    mask = AttnMaskType.arbitrary if use_arbitrary_attention_mask else AttnMaskType.causal
    latent = config.multi_latent_attention
    if latent:
        mixer = _latent_attention(mask, local=local_core_attention, norm=Norm if config.qk_layernorm else IdentityOp)
    else:
        mixer = _attention(mask, local=local_core_attention, norm=_head_norm(config, qk_l2_norm=qk_l2_norm))

    def layer(mlp: str) -> ModuleSpec:
        kind = f"{'mla' if latent else 'attention'} {mlp}"
        return ModuleSpec(
            module=REAL_QUANT[real_quant_cfg],
            submodules=TransformerLayerSubmodules(
                input_layernorm=Norm,
                self_attention=mixer,
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=Norm,
                mlp=get_mlp_module_spec(use_te=False) if mlp == "dense" else _mixture(config.num_moe_experts),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map=keys_map(kind, saved_by) if remap_te_layernorm else {},
            ),
        )

    specs = {"dense": layer("dense"), "moe": layer("moe")} if config.num_moe_experts else {"dense": layer("dense")}
    pattern = ["moe" if mixed else "dense" for mixed in moe_pattern(config)]
    built = _built_here(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[specs[pattern[layer]] for layer in built], layer_norm=Norm)


def get_hybrid_stack_modelopt_spec(
    local_core_attention: bool = False,
    remap_te_layernorm: bool = False,
    use_default_te_spec: bool = False,
    moe_grouped_gemm: bool = True,
) -> ModuleSpec:
    """Return the spec of a hybrid's stack: Mamba, attention, MLP, mixtures and, where the stack has a place for it, latent attention.

    A layer of any other kind stops the model that is being built with NotSupported; megatron-core's own spec has an identity there,
    which has no weights. ``use_default_te_spec`` asks for the spec that training has, with
    ``moe_grouped_gemm`` or without, and needs Transformer Engine.
    """
    if use_default_te_spec:
        return _trained(grouped=moe_grouped_gemm)
    places = {field.name for field in fields(StackSubmodules)}
    made = _stack_layers(local=local_core_attention, remap=remap_te_layernorm)
    others = [name for name in places if name.endswith("_layer") and name not in made]
    refused = {name: ModuleSpec(module=Refused, params={"place": name}) for name in others}
    known = {name: spec for name, spec in made.items() if name in places}
    if "mtp_block_spec" in places:
        known["mtp_block_spec"] = _further()
    return ModuleSpec(module=HybridStack, submodules=StackSubmodules(**known, **refused))


get_mamba_stack_modelopt_spec = get_hybrid_stack_modelopt_spec


def moe_pattern(config: TransformerConfig) -> list[int]:
    """Return a mark a layer, 1 where it is a mixture: every n-th from the first on, or as the list says. Raises BadRequest."""
    often, count = config.moe_layer_freq, config.num_layers
    if not config.num_moe_experts:
        return [0] * count
    if isinstance(often, int) and often > 0:
        return [int(layer % often == 0) for layer in range(count)]
    if isinstance(often, Sequence) and not isinstance(often, str) and len(often) == count and set(often) <= {0, 1}:
        return [*often]
    raise refusals.Pattern("moe_layer_freq is no number and no list of a mark a layer", {"found": often, "layers": count})


def misplaced(pattern: str) -> dict[int, str]:
    """Return which layers of a hybrid's pattern would be lost, with the reason: the stack, or carnet, has no place for them.

    Letters of megatron/core/ssm/mamba_hybrid_layer_allocation.py, since 0.18 models/hybrid/hybrid_layer_allocation.py.

    >>> misplaced("MM*-")
    {}
    """
    symbols = inspect.getmodule(Stack).LayerSymbols  # type: ignore[union-attr]
    known = {letter: name for name, letter in vars(symbols).items() if not name.startswith("_") and isinstance(letter, str)}
    found = {}
    for layer, letter in enumerate(pattern.partition("/")[0].replace("|", "")):
        if known.get(letter) not in LETTERS:
            kind = known.get(letter, STRANGE.get(letter, "unknown"))
            whose = "carnet's spec" if letter in known else f"{Stack.__name__} of megatron-core {installed}"
            found[layer] = f"a layer {letter!r} ({kind}), for which {whose} has no place"
    return found


LETTERS = {"MAMBA", "ATTENTION", "MLA", "MLP", "MOE"}
STRANGE = {"G": "GDN", "D": "DS_ATTENTION", "+": "MLA"}  # of versions to come, as seen from 0.16


def _refuse_strange(config: TransformerConfig) -> None:
    """Refuse layers that are neither attention nor latent attention: they would be built as one of these, without a word."""
    for name in ("experimental_attention_variant", "linear_attention_freq", "heterogeneous_block_specs"):
        if getattr(config, name, None):
            raise NotSupported("carnet has no post-training spec for these layers", {name: getattr(config, name)})


def _built_here(config: TransformerConfig, vp_stage: int | None, pp_rank: int | None) -> Sequence[int]:
    """Return the layers of this pipeline stage, or of one of its virtual stages."""
    if config.virtual_pipeline_model_parallel_size is not None and vp_stage is None:
        facts = {"virtual stages": config.virtual_pipeline_model_parallel_size}
        raise refusals.Refused("the spec of a virtual pipeline is one of a virtual stage", facts, remedy="say vp_stage")
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank))


def _head_norm(config: TransformerConfig, *, qk_l2_norm: bool) -> type:
    """Return what norms the query and the key of each head."""
    if qk_l2_norm or getattr(config, "qk_l2_norm", False):  # a field of the config since Llama 4
        return L2Norm  # type: ignore[no-any-return]
    return Norm if config.qk_layernorm else IdentityOp


def _attention(mask: AttnMaskType, *, local: bool, norm: type) -> ModuleSpec:
    submodules = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=core_attention(local=local, latent=False),
        linear_proj=RowParallelLinear,
        q_layernorm=norm,
        k_layernorm=norm,
    )
    return ModuleSpec(module=SelfAttention, params={"attn_mask_type": mask}, submodules=submodules)


def _latent_attention(mask: AttnMaskType, *, local: bool, norm: type) -> ModuleSpec:
    define_forgotten()
    submodules = MLASelfAttentionSubmodules(
        linear_q_proj=ColumnParallelLinear,
        linear_q_down_proj=down_projection(),
        linear_q_up_proj=ColumnParallelLinear,
        linear_kv_down_proj=down_projection(),
        linear_kv_up_proj=ColumnParallelLinear,
        core_attention=core_attention(local=local, latent=True),
        linear_proj=RowParallelLinear,
        q_layernorm=norm,
        kv_layernorm=norm,
    )
    return ModuleSpec(module=MLASelfAttention, params={"attn_mask_type": mask}, submodules=submodules)


def _mixture(experts: int) -> ModuleSpec:
    define_forgotten()
    return get_moe_module_spec(use_te=False, num_experts=experts, moe_grouped_gemm=False)


def _stack_layers(*, local: bool, remap: bool) -> dict[str, ModuleSpec]:
    """Return the spec of each kind of layer that a hybrid may have, as the default spec has them: no norm of queries and keys."""

    def mapped(kind: str) -> dict[str, str]:
        return keys_map(kind, "te") if remap else {}

    def mixing(kind: str, mixer: ModuleSpec) -> ModuleSpec:
        submodules = TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=mixer,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=mapped(kind),
        )
        return ModuleSpec(module=TransformerLayer, submodules=submodules)

    def alone(kind: str, mlp: object) -> ModuleSpec:
        submodules = TransformerLayerSubmodules(
            pre_mlp_layernorm=Norm, mlp=mlp, mlp_bda=get_bias_dropout_add, sharded_state_dict_keys_map=mapped(kind)
        )
        return ModuleSpec(module=TransformerLayer, submodules=submodules)

    projections = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    mamba = MambaLayerSubmodules(
        norm=Norm,
        mixer=ModuleSpec(module=MambaMixer, submodules=projections),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=mapped("mamba"),
    )
    return {
        "mamba_layer": ModuleSpec(module=MambaLayer, submodules=mamba),
        "attention_layer": mixing("attention", _attention(AttnMaskType.causal, local=local, norm=IdentityOp)),
        "mla_layer": mixing("mla", _latent_attention(AttnMaskType.causal, local=local, norm=IdentityOp)),
        "mlp_layer": alone("dense", get_mlp_module_spec(use_te=False)),
        "moe_layer": alone("moe", _mixture(8)),  # how many the config says
    }


def _further() -> ModuleSpec:
    """Return what stands before and behind a hybrid's layers that predict further tokens; the layers are of the stack's own kinds."""
    from megatron.core.transformer.multi_token_prediction import (
        MultiTokenPredictionBlock,
        MultiTokenPredictionBlockSubmodules,
        MultiTokenPredictionLayer,
        MultiTokenPredictionLayerSubmodules,
    )

    given = {"enorm": Norm, "hnorm": Norm, "eh_proj": ColumnParallelLinear, "layer_norm": Norm}
    inner = {field.name: None for field in fields(MultiTokenPredictionLayerSubmodules) if field.name not in given}
    layer = ModuleSpec(module=MultiTokenPredictionLayer, submodules=MultiTokenPredictionLayerSubmodules(**given, **inner))
    return ModuleSpec(module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer]))


def _trained(*, grouped: bool) -> ModuleSpec:
    """Return the spec of training, with experts together or one by one."""
    if not HAVE_TE:
        raise NotSupported(
            "the default spec of a hybrid needs Transformer Engine", remedy="pip install transformer-engine[pytorch]"
        )
    try:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as spec
    except ImportError:
        from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec as spec
    if grouped:
        return spec
    moe = spec.submodules.moe_layer
    apart = replace(moe.submodules, mlp=get_moe_module_spec(use_te=True, num_experts=8, moe_grouped_gemm=False))
    stack = replace(spec.submodules, moe_layer=ModuleSpec(module=moe.module, submodules=apart))
    return ModuleSpec(module=spec.module, submodules=stack)

"""The spec of a hybrid's stack for post-training: each kind of layer that megatron-core's own has, under the names that training gave.

Same names and parameters as megatron/core/post_training/modelopt/{mamba,hybrid}/model_specs.py.
"""

import inspect
from dataclasses import fields, replace

from megatron.core import __version__ as installed
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.post_training.modelopt import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from carnet.errors import NotSupported
from carnet.megatron import hybrids
from carnet.megatron.fused import keys_map
from carnet.megatron.hybrids import Stack, StackSubmodules
from carnet.megatron.modules import (
    HAVE_TE,
    HybridStack,
    Norm,
    Refused,
    attention,
    core_attention,
    latent_attention,
    mixture,
)

LETTERS = {"MAMBA", "GDN", "ATTENTION", "DS_ATTENTION", "MLA", "MLP", "MOE"}
STRANGE = {"G": "GDN", "D": "DS_ATTENTION", "+": "MLA"}  # of versions to come, as seen from 0.16


def get_hybrid_stack_modelopt_spec(
    local_core_attention: bool = False,
    remap_te_layernorm: bool = False,
    use_default_te_spec: bool = False,
    moe_grouped_gemm: bool = True,
) -> ModuleSpec:
    """Return the spec of a hybrid's stack: Mamba, attention, MLP, mixtures and, where the stack has a place for it, more.

    Since megatron-core 0.18 these are Gated DeltaNet, DeepSeek's sparse attention and latent attention. A layer of any other kind stops
    the model that is being built with NotSupported; megatron-core's own spec has an identity there, which has no weights.
    ``use_default_te_spec`` asks for the spec that training has, with ``moe_grouped_gemm`` or without, and needs Transformer Engine.
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

    causal = AttnMaskType.causal
    ends = {"in_proj": ColumnParallelLinear, "out_proj": RowParallelLinear}
    mamba = hybrids.MambaLayerSubmodules(
        norm=Norm,
        mixer=ModuleSpec(module=hybrids.MambaMixer, submodules=hybrids.MambaMixerSubmodules(**ends)),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=mapped("mamba"),
    )
    delta = hybrids.GatedDeltaNetSubmodules(**ends, out_norm=Norm)
    latent = core_attention(local=local, latent=True)
    return {
        "mamba_layer": ModuleSpec(module=hybrids.MambaLayer, submodules=mamba),
        "gdn_layer": mixing("gdn", ModuleSpec(module=hybrids.GatedDeltaNet, submodules=delta)),
        "attention_layer": mixing("attention", attention(causal, local=local, norm=IdentityOp)),
        "dsa_layer": mixing("dsa", latent_attention(causal, norm=IdentityOp, core=_sparse())),
        "mla_layer": mixing("mla", latent_attention(causal, norm=IdentityOp, core=latent)),
        "mlp_layer": alone("dense", get_mlp_module_spec(use_te=False)),
        "moe_layer": alone("moe", mixture(8)),  # how many the config says
    }


def _sparse() -> ModuleSpec:
    """Return attention to the tokens that an indexer chooses, whose linear layers every rank has whole."""
    whole = dict.fromkeys(("linear_wq_b", "linear_wk", "linear_weights_proj"), layers.Linear)
    indexer = ModuleSpec(module=hybrids.DSAIndexer, submodules=hybrids.DSAIndexerSubmodules(**whole, k_norm=Norm))
    return ModuleSpec(module=hybrids.DSAttention, submodules=hybrids.DSAttentionSubmodules(indexer=indexer))


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

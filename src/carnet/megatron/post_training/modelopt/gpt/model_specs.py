"""The spec of a GPTModel for post-training: plain linear layers and norms of their own, under the names that training gave to both.

A quantizer wants a norm and the linear layer behind it apart, training wants them in one module: see ``carnet.megatron.fused``.
Same name and parameters as megatron/core/post_training/modelopt/gpt/model_specs.py.
"""

from collections.abc import Sequence
from typing import get_args

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec
from megatron.core.post_training.modelopt import layers
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
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
from carnet.megatron.fused import Saver, keys_map
from carnet.megatron.modules import Norm, attention, core_attention, latent_attention, mixture

REAL_QUANT = {
    "None": TransformerLayer,
    "fp8_real_quant": layers.FP8WeightTransformerLayer,
    "fp8_blockwise_real_quant": layers.BlockwiseFP8WeightTransformerLayer,
}


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
        raise refusals.Unmapped(f"{saved_by!r} is not a spec of training", {"known": ", ".join(get_args(Saver))})
    mask = AttnMaskType.arbitrary if use_arbitrary_attention_mask else AttnMaskType.causal
    latent = config.multi_latent_attention
    if latent:
        mixer = latent_attention(
            mask,
            norm=Norm if config.qk_layernorm else IdentityOp,
            core=core_attention(local=local_core_attention, latent=True),
            compressed=config.q_lora_rank is not None,
        )
    else:
        mixer = attention(mask, local=local_core_attention, norm=_head_norm(config, qk_l2_norm=qk_l2_norm))

    def layer(mlp: str) -> ModuleSpec:
        kind = f"{'mla' if latent else 'attention'} {mlp}"
        return ModuleSpec(
            module=REAL_QUANT[real_quant_cfg],
            submodules=TransformerLayerSubmodules(
                input_layernorm=Norm,
                self_attention=mixer,
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=Norm,
                mlp=get_mlp_module_spec(use_te=False) if mlp == "dense" else mixture(config.num_moe_experts),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map=keys_map(kind, saved_by) if remap_te_layernorm else {},
            ),
        )

    specs = {"dense": layer("dense"), "moe": layer("moe")} if config.num_moe_experts else {"dense": layer("dense")}
    pattern = ["moe" if mixed else "dense" for mixed in moe_pattern(config)]
    built = _built_here(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[specs[pattern[layer]] for layer in built], layer_norm=Norm)


def moe_pattern(config: TransformerConfig) -> list[int]:
    """Return a mark a layer, 1 where it is a mixture: every n-th from the first on, or as the list says. Raises BadRequest."""
    often, count = config.moe_layer_freq, config.num_layers
    if not config.num_moe_experts or not count:  # none is what is trained on what another model said: EAGLE, offline
        return [0] * count
    if isinstance(often, int) and often > 0:
        return [int(layer % often == 0) for layer in range(count)]
    if isinstance(often, Sequence) and not isinstance(often, str) and len(often) == count and set(often) <= {0, 1}:
        return [*often]
    raise refusals.Pattern("moe_layer_freq is neither a number nor a list of a mark a layer", {"found": often, "layers": count})


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

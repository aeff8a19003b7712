"""The modules of a spec that Transformer Engine has where it is installed, and that torch and megatron-core have elsewhere.

This is the one place where that is chosen. The tests run without Transformer Engine; its side is megatron/core/post_training/modelopt.
"""

import inspect
from types import ModuleType

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.post_training.modelopt import layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from carnet.errors import NotSupported
from carnet.megatron.hybrids import Stack, StackSubmodules

HAVE_TE = bool(transformer_engine.HAVE_TE and layers.HAVE_TE)
# what 0.16 and 0.17 forget to define, or leave a stand-in, where Transformer Engine is not installed; since 0.18 the last one, too
FORGOTTEN: tuple[tuple[ModuleType, str, object], ...] = (
    (moe_utils, "te_general_gemm", None),
    (multi_latent_attention, "TELinear", type("TELinear", (), {})),
    (multi_latent_attention, "Linear", layers.Linear),
)


class Norm:
    """Makes the norm that a config asks for: Transformer Engine's where it is installed, else torch's.

    ``hidden_size`` in elements. As megatron/core/post_training/modelopt/layers.py, which needs Transformer Engine; but ``eps`` is
    the config's unless said: MambaLayer says none, and the module that training has there, norm and linear layer in one, has that.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float | None = None) -> torch.nn.Module:  # type: ignore[misc]
        """Return the module."""
        eps = config.layernorm_epsilon if eps is None else eps
        if HAVE_TE:
            made: torch.nn.Module = layers.Norm(config, hidden_size, eps)
            return made
        kinds: dict[str, type[RMSNorm | LayerNorm]] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
        if config.normalization not in kinds:
            facts = {"found": config.normalization, "known": ", ".join(kinds)}
            raise NotSupported("carnet has no norm of this name", facts)
        norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        norm.less_one = config.layernorm_zero_centered_gamma
        torch.nn.init.constant_(norm.weight, 0.0 if norm.less_one else 1.0)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron sums its gradients
        return norm


class RMSNorm(torch.nn.RMSNorm):
    """torch's norm of the root mean square, whose weight may be stored less one."""

    less_one = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm the last axis."""
        weight = self.weight + 1 if self.less_one else self.weight
        return torch.nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)


class LayerNorm(torch.nn.LayerNorm):
    """torch's layer norm, whose weight may be stored less one."""

    less_one = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's name of it
        """Norm the last axis."""
        weight = self.weight + 1 if self.less_one else self.weight
        return torch.nn.functional.layer_norm(input, self.normalized_shape, weight, self.bias, self.eps)


class TwoWidths(DotProductAttention):  # type: ignore[misc]  # megatron-core has no types
    """Attention whose values are not as wide as its keys, as latent attention's are: megatron-core's own has one width alone."""

    def __init__(self, *, k_channels: int = 0, v_channels: int = 0, **given: object) -> None:
        del k_channels  # the scores need no width that is not the keys' own
        super().__init__(**given)
        self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


class HybridStack(Stack):  # type: ignore[misc]
    """megatron-core's stack of a hybrid's layers with a final norm that needs no Transformer Engine."""

    def __init__(self, config: TransformerConfig, submodules: StackSubmodules, **given: object) -> None:
        wanted = bool(given.pop("post_layer_norm", True))
        super().__init__(config, submodules, **given, post_layer_norm=wanted and HAVE_TE)
        self.post_layer_norm = wanted
        if wanted and self.post_process and not HAVE_TE:
            self.final_norm = Norm(config, config.hidden_size, config.layernorm_epsilon)


class Refused(torch.nn.Module):
    """A layer that carnet has no spec for: it stops the model that is being built, in whose place an identity would lose it."""

    def __init__(self, place: str, layer_number: int = 0, **given: object) -> None:
        del given
        super().__init__()
        raise NotSupported(f"carnet has no spec for a {place}", {"layer": layer_number - 1, "model": "hybrid"})


def core_attention(*, local: bool, latent: bool) -> type:
    """Return the class of the attention itself; ``local`` leaves Transformer Engine's aside."""
    if HAVE_TE and not local:
        return TEDotProductAttention  # type: ignore[no-any-return]
    own = inspect.signature(DotProductAttention.__init__).parameters
    return TwoWidths if latent and "v_channels" not in own else DotProductAttention


def down_projection(*, like_te: bool = HAVE_TE) -> type:
    """Return the class of latent attention's compressing layers, which no rank cuts in Transformer Engine's spec.

    As megatron-core's own spec has them; without Transformer Engine they are cut, as in the local spec, and have a state as there.
    Since 0.20 megatron-core knows no other way (multi_latent_attention.py).
    """
    return layers.Linear if like_te else ColumnParallelLinear  # type: ignore[no-any-return]


def define_forgotten() -> None:
    """Give megatron-core without Transformer Engine the names that it asks for all the same."""
    for module, name, value in () if HAVE_TE else FORGOTTEN:
        found = getattr(module, name, ...)
        if found is ... or (isinstance(value, type) and not isinstance(found, type)):
            setattr(module, name, value)


def attention(mask: AttnMaskType, *, local: bool, norm: type) -> ModuleSpec:
    """Return attention whose queries and keys have a norm."""
    submodules = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=core_attention(local=local, latent=False),
        linear_proj=RowParallelLinear,
        q_layernorm=norm,
        k_layernorm=norm,
    )
    return ModuleSpec(module=SelfAttention, params={"attn_mask_type": mask}, submodules=submodules)


def latent_attention(mask: AttnMaskType, *, norm: type, core: type | ModuleSpec, compressed: bool = True) -> ModuleSpec:
    """Return attention whose compressed keys have a norm, and so its queries if they are compressed, around what attends."""
    define_forgotten()
    submodules = MLASelfAttentionSubmodules(
        linear_q_proj=ColumnParallelLinear,
        linear_q_down_proj=down_projection(),
        linear_q_up_proj=ColumnParallelLinear,
        linear_kv_down_proj=down_projection(),
        linear_kv_up_proj=ColumnParallelLinear,
        core_attention=core,
        linear_proj=RowParallelLinear,
        q_layernorm=norm if compressed else IdentityOp,  # which 0.19 refuses elsewhere
        kv_layernorm=norm,
    )
    return ModuleSpec(module=MLASelfAttention, params={"attn_mask_type": mask}, submodules=submodules)


def mixture(experts: int) -> ModuleSpec:
    """Return experts that are modules of their own, and what chooses among them."""
    define_forgotten()
    return get_moe_module_spec(use_te=False, num_experts=experts, moe_grouped_gemm=False)

"""The providers and layer specs of Megatron-Bridge that bring into a model what no argument of Megatron's says.

A row is known by the module of the class, or of the layer spec, that a run_config.yaml names: NVIDIA-NeMo/Megatron-Bridge 067f987d,
src/megatron/bridge/models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from carnet.dialects.megatron.needs import UNSAID
from carnet.model.fields import Config

MODELS = "megatron.bridge.models."
NAMED = ("_target_", "transformer_layer_spec")  # where a config names them


@dataclass(frozen=True, slots=True)
class Provider:
    """One module of Megatron-Bridge's, and the model that it makes of a config."""

    module: str  # below ``MODELS``
    brings: Config  # fields of the model
    keys: Mapping[str, str] = field(default_factory=dict)  # a word of its config -> the field that it says
    says: Mapping[str, object] = field(default_factory=dict)  # words of its config that say the same as what it brings
    whatever: Mapping[str, object] = field(default_factory=dict)  # arguments that it has whatever its config says


GELU: dict[str, object] = {"activation_func": "fast_gelu", "gated_linear_unit": True}
GEMMA: Config = {"activation": "gelu_tanh", "gated": True, "embed_root": True}
WHOLE: Config = {"qk_norm": "whole"}
PROVIDERS = (
    Provider("gemma.gemma_provider", GEMMA, says=GELU),
    Provider(
        "gemma.gemma2_provider",
        {**GEMMA, "norm_after": True},
        keys={
            "query_pre_attn_scalar": "attention_root",
            "attn_logit_softcapping": "softcap_attention",
            "final_logit_softcapping": "softcap_logits",
        },
        says=GELU,
        whatever={"window_attn_skip_freq": 2},  # Gemma2DotProductAttention: every other layer, from the first
    ),
    Provider("olmoe.olmoe_provider", WHOLE),
    Provider("minimax_m2.minimax_m2_provider", WHOLE),
    Provider("exaone.exaone4.exaone4_provider", {"norm_after": True, "norm_before": False}),
)


def provider_of(said: Mapping[str, object]) -> Provider | None:
    """Return the provider that a config names; None where it names none of these."""
    names = [str(said.get(key)) for key in NAMED]
    return next((row for row in PROVIDERS if any(name.startswith(f"{MODELS}{row.module}.") for name in names)), None)


def provided(said: Mapping[str, object]) -> Mapping[str, object]:
    """Return arguments with what the provider that they name brings beside them, and its words for that taken out."""
    row = provider_of(said)
    if row is None:
        return said
    told = {name: said[key] for key, name in row.keys.items() if said.get(key) is not None}
    kept = {
        key: value for key, value in said.items() if key not in row.keys and (key not in row.says or value != row.says[key])
    }
    return {**kept, **row.whatever, UNSAID: {**row.brings, **told}}

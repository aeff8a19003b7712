"""The providers and layer specs of Megatron-Bridge that bring into a model what no argument of Megatron's says.

A row is known by the module of the class, or of the layer spec, that a run_config.yaml names: NVIDIA-NeMo/Megatron-Bridge 067f987d,
src/megatron/bridge/models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from carnet.dialects.configs import lookup
from carnet.model.fields import Config

Arguments = Mapping[str, object]
# an argument of carnet's own: the canonical fields of a model that no argument of Megatron's says, which a provider or a spec brings
UNSAID = "carnet_needs"
MODELS = "megatron.bridge.models."
TARGET, SPEC = "_target_", "transformer_layer_spec"  # where a config names the two
CALLED = {TARGET: "provider", SPEC: "layer spec"}
WINDOW, SKIPPED = "window_size", "window_attn_skip_freq"


@dataclass(frozen=True, slots=True)
class Provider:
    """One module of Megatron-Bridge's, and the model that it makes of a config."""

    module: str  # below ``MODELS``
    brings: Config  # fields of the model
    name: str = ""  # the class; that of every GPT where a layer spec is all that differs
    spec: str = ""  # the layer spec
    keys: Mapping[str, str] = field(default_factory=dict)  # a word of its config, dotted -> the field that it says
    says: Arguments = field(default_factory=dict)  # words of its config that say the same as what it brings
    only: Arguments = field(default_factory=dict)  # arguments of the models that it is for, where another has the same for all
    windows: int | None = None  # each so manieth layer sees all, whatever its config says

    @property
    def path(self) -> str:
        """Return where Python finds it."""
        return f"{MODELS}{self.module}.{self.name or self.spec}"


GELU: Arguments = {"activation_func": "fast_gelu", "gated_linear_unit": True}
GEMMA: Config = {"activation": "gelu_tanh", "gated": True, "embed_root": True}
WHOLE: Config = {"qk_norm": "whole"}
NORMED: Arguments = {"qk_layernorm": True}
ALIKE: Arguments = {"group_query_attention": False, "moe_router_score_function": "softmax"}
PROVIDERS = (
    Provider("gemma.gemma_provider", GEMMA, name="GemmaModelProvider", says=GELU),
    Provider(
        "gemma.gemma2_provider",
        {**GEMMA, "norm_after": True},
        name="Gemma2ModelProvider",
        spec="gemma2_layer_spec",
        keys={
            "query_pre_attn_scalar": "attention_root",
            "attn_logit_softcapping": "softcap_attention",
            "final_logit_softcapping": "softcap_logits",
        },
        says=GELU,
        windows=2,  # Gemma2DotProductAttention
    ),
    # its norm of the keys is as wide as that of the queries
    Provider("olmoe.olmoe_provider", WHOLE, spec="olmoe_layer_spec", says=NORMED, only=ALIKE),
    Provider("minimax_m2.minimax_m2_provider", WHOLE, spec="minimax_m2_layer_spec", says=NORMED),
    # read alone: a config of transformers' stands in its own, and carnet writes none
    Provider(
        "ministral3.ministral3_provider",
        {},
        name="Ministral3ModelProvider",
        keys={"hf_config.text_config.rope_parameters.llama_4_scaling_beta": "query_growth"},
        only={"hf_config": True},
    ),
    Provider("exaone.exaone4.exaone4_provider", {"norm_after": True, "norm_before": False}, spec="exaone4_layer_spec"),
)
# modules whose classes and layer specs bring into a model nothing but what their fields say: of Megatron-Bridge's releases from 0.1 on,
# of NeMo 2 (NVIDIA/NeMo, nemo/collections/llm/gpt/model), and Megatron's own
PLAIN = (
    *(
        f"{MODELS}{module}"
        for module in """
        gpt_provider mla_provider gpt.gpt_builder gpt.model_config hybrid.hybrid_provider hybrid.hybrid_builder mamba.mamba_provider
        mamba.mamba_builder deepseek.deepseek_provider deepseek.model_config ernie.ernie_45_bridge glm.glm45_provider
        gpt_oss.gpt_oss_provider kimi.kimi_provider llama.llama_provider llama_nemotron.llama_nemotron_provider mistral.mistral_provider
        nemotron.nemotron_provider nemotronh.nemotron_h_provider qwen.qwen_provider
        """.split()
    ),
    *(
        f"nemo.collections.llm.gpt.model.{module}"
        for module in """
        base deepseek gpt_oss llama llama_nemotron mistral mixtral nemotron phi3mini qwen2 qwen3 ssm starcoder starcoder2
        """.split()
    ),
    *(f"megatron.core.{module}" for module in ("models.gpt", "models.hybrid", "models.mamba", "post_training.modelopt")),
)


def unknown(said: Arguments) -> dict[str, str]:
    """Return the provider and the layer spec that arguments name and carnet does not know: the argument -> the name.

    >>> unknown({"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider", "transformer_layer_spec": "my.layers"})
    {'transformer_layer_spec': 'my.layers'}
    """
    known = (*PLAIN, *(f"{MODELS}{row.module}" for row in PROVIDERS))
    names = {key: _name(said[key]) for key in CALLED if said.get(key) is not None}
    return {key: name for key, name in names.items() if not any(name.startswith(f"{module}.") for module in known)}


def _name(value: object) -> str:
    """Return what a value of a config names: a path, or one with arguments of its own."""
    return str(value.get(TARGET, value) if isinstance(value, Mapping) else value)


def provided(said: Arguments) -> Arguments:
    """Return arguments with what the provider that they name brings beside them, and its words for that taken out."""
    names = [_name(said.get(key)) for key in CALLED]
    row = next((row for row in PROVIDERS if any(name.startswith(f"{MODELS}{row.module}.") for name in names)), None)
    if row is None:
        return said
    told = {name: found for key, name in row.keys.items() if (found := lookup(said, key)) is not None}
    kept = {
        key: value for key, value in said.items() if key not in row.keys and (key not in row.says or value != row.says[key])
    }
    windows = {} if row.windows is None else {SKIPPED: row.windows}
    return {**kept, **windows, UNSAID: {**row.brings, **told}}


def provider_for(said: Arguments) -> Provider | None:
    """Return the provider that brings what these arguments lack, all of it and nothing else; None where there is none."""
    lacking = lacked(said)
    return next((row for row in PROVIDERS if lacking and _has(row, lacking, said) and _sees(row, said)), None)


def lacked(said: Arguments) -> Arguments:
    """Return the fields of a model that its arguments could not say, and say as carnet's own."""
    own = said.get(UNSAID)
    return own if isinstance(own, Mapping) else {}


def _has(row: Provider, lacking: Arguments, said: Arguments) -> bool:
    if any(said.get(name) != value for name, value in row.only.items()):
        return False
    brought = lacking.keys() - {*row.keys.values()}
    return brought <= row.brings.keys() and all(lacking.get(name) == value for name, value in row.brings.items())


def _sees(row: Provider, said: Arguments) -> bool:
    """Say whether the layers that a provider gives a window are those that have one."""
    if said.get(WINDOW) is None:
        return True
    skipped, count = said.get(SKIPPED), said.get("num_layers")
    every = [int((layer + 1) % row.windows > 0) for layer in range(count)] if row.windows and isinstance(count, int) else None
    return skipped in (row.windows, every) if row.windows else skipped is None

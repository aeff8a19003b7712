"""A Megatron model and the training arguments that describe it, both ways by one table.

What the command line's arguments become: core_transformer_config_from_args in megatron/training/arguments.py (argument_utils.py since
0.18), gpt_builders.py and mamba_builders.py (hybrid_builders.py). Arguments that only concern training are left out; those that a
release does not hand on must be gone already: dialects/megatron/programs.py.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import cast

import megatron.core
import torch
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.torch_norm import L2Norm

from carnet.dialects.megatron.layers import DESCRIBED, HYBRID_SPEC
from carnet.dialects.megatron.programs import CORE, release_of
from carnet.dialects.megatron.releases import ACCEPTABLE, BY_NAME, PATTERNS, names_hybrid
from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.formats.wrapped import MEANT_FOR
from carnet.formats.wrapped import RENAMED as FIELDS

Arguments = Mapping[str, object]
Activation = Callable[[torch.Tensor], torch.Tensor]

# beside those that say what a model computes: its type, and how stages and stores share its layers
OTHERS = (
    *(
        "bf16",
        "fp16",
        "hetereogenous_dist_checkpoint",
        "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split",
    ),
    "account_for_loss_in_pipeline_split",
)
# arguments that fill the field of the same name in TransformerConfig or MLATransformerConfig, where it has one
SAME = BY_NAME.keys() - ACCEPTABLE.keys() | {*OTHERS}
# argument -> field of the config; how training kept its weights concerns nobody here
RENAMED = {argument: name for name, argument in FIELDS if name != "fp8_param"} | {
    "norm_epsilon": "layernorm_epsilon",  # before 0.16
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
OLDER = {"norm_epsilon", "apply_layernorm_1p"}  # read, never written
# argument -> attribute that is set on a config of positions called yarn; its value where the argument is not there
YARN: dict[str, tuple[str, object]] = {
    "rotary_scaling_factor": ("yarn_rotary_scaling_factor", 1.0),
    "yarn_original_max_position_embeddings": ("yarn_original_max_position_embeddings", 4096),
    "yarn_beta_fast": ("yarn_beta_fast", 32.0),
    "yarn_beta_slow": ("yarn_beta_slow", 1.0),
    "mscale": ("yarn_mscale", 1.0),
    "mscale_all_dim": ("yarn_mscale_all_dim", 0.0),
    "yarn_correction_range_round_to_int": ("yarn_correction_range_round_to_int", True),
}
# what the command line says where nobody does, as far as it differs from the config's own defaults
DEFAULTS = {"q_lora_rank": None, "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}

# argument, the activation and whether it is gated, the argument that says whether a kernel joins it with the bias
ACTIVATIONS: tuple[tuple[str, Activation, bool, str], ...] = (
    ("swiglu", torch.nn.functional.silu, True, "bias_swiglu_fusion"),
    ("quick_geglu", quick_gelu, True, "bias_gelu_fusion"),
    ("squared_relu", squared_relu, False, "bias_gelu_fusion"),
    ("", torch.nn.functional.gelu, False, "bias_gelu_fusion"),
)

# argument, keyword of GPTModel and MambaModel, attribute of a model that is built; gpt_builders.py does not hand the last two on,
# and a model that is built keeps the last one in its angles alone
KEYWORDS = (
    ("padded_vocab_size", "vocab_size", "vocab_size"),
    ("max_position_embeddings", "max_sequence_length", "max_sequence_length"),
    ("position_embedding_type", "position_embedding_type", "position_embedding_type"),
    ("rotary_percent", "rotary_percent", "rotary_percent"),
    ("rotary_base", "rotary_base", "rotary_base"),
    ("use_rope_scaling", "rope_scaling", "rotary_scaling"),
    ("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor", "rotary_pos_emb.seq_len_interpolation_factor"),
    ("rope_scaling_factor", "rope_scaling_factor", ""),
)
TIED = "untie_embeddings_and_output_weights", "share_embeddings_and_output_weights"  # each is what the other is not
# the same, of a hybrid
HYBRID_KEYWORDS = tuple((name, name, name) for name in (*PATTERNS, "hybrid_attention_ratio", "hybrid_mlp_ratio"))


def arguments(model: object) -> dict[str, object]:
    """Return the training arguments that describe a model of megatron-core that is built.

    ``model`` is a GPTModel, a MambaModel or a HybridModel, what a wrapper has as its ``module``, or the list of a rank's virtual
    stages. The values are plain, as carnet reads them in a checkpoint, and every one of them reached the model: they say so themselves
    (MEANT_FOR), so that nobody takes them for the words of a run of Megatron-LM, which hands on only some. A model knows its padded
    vocabulary alone: ``vocab_size`` is that, too. Raises BadRequest for anything else.
    """
    model = _unwrapped(model)
    config = getattr(model, "config", None)
    if not isinstance(config, TransformerConfig) or not hasattr(model, "vocab_size"):
        expected = "a GPTModel or a MambaModel of megatron-core, or what wraps one"
        raise BadRequest("this is not a model that carnet knows", {"found": type(model).__name__, "expected": expected})
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields.pop("activation_func")
    renamed = {new: old for old, new in RENAMED.items() if old not in OLDER}
    said = {renamed.get(name, name): _plain(value) for name, value in fields.items() if _is_plain(value)}
    said |= _activation_arguments(config, said)
    said["group_query_attention"] = True  # a config has as many groups as heads where they share nothing
    keywords = KEYWORDS + (HYBRID_KEYWORDS if is_hybrid(model) else ())
    said |= {name: _plain(found) for name, _, place in keywords if (found := _found(model, place)) is not None}
    said[TIED[0]] = not getattr(model, TIED[1])
    said["vocab_size"] = said["padded_vocab_size"]
    # a wrapper casts a model, and leaves its config as it was
    said["params_dtype"] = str(next((held.dtype for held in model.parameters()), config.params_dtype))
    if said["position_embedding_type"] == "yarn":
        said |= {name: getattr(config, place) for name, (place, _) in YARN.items()}
    if said.get("use_rope_scaling"):
        said["rope_scaling_factor"] = _stretched(model)
    if is_hybrid(model):
        said["spec"] = HYBRID_SPEC
    modules = [*model.modules()]
    if any(isinstance(module, SelfAttention) for module in modules):
        # a spec says it, whatever the config has: an argument of the spec's alone with the first Llama 4, and the local one is not told
        said["qk_l2_norm"] = any(isinstance(module, L2Norm) for module in modules)
    release = release_of(str(getattr(megatron.core, "__version__", "")))
    return {**said, MEANT_FOR: f"{CORE}=={release}" if release else CORE}


def config_of(said: Arguments, **given: object) -> TransformerConfig:
    """Return megatron-core's config of a model that training arguments describe; ``given`` stands over what they say.

    Without what concerns training: no dropout, no fused kernel, no parallelism but what is ``given``. Raises BadCheckpoint where
    megatron-core finds that the arguments do not go together, NotSupported for what it has no config for.
    """
    if any(said.get(name) for name in DESCRIBED):
        raise NotSupported(
            "carnet builds no model of layers that are described one by one", {"argument": next(iter(DESCRIBED))}
        )
    said = {**DEFAULTS, **{name: value for name, value in said.items() if value is not None}}
    kind = MLATransformerConfig if said.get("multi_latent_attention") else TransformerConfig
    names = {**{name: name for name in SAME}, **RENAMED}
    known = {field.name for field in dataclasses.fields(kind)}
    fields = {field: _typed(said[name]) for name, field in names.items() if field in known and name in said}
    if not said.get("group_query_attention"):
        fields["num_query_groups"] = None
    for name, function, gated, fusion in ACTIVATIONS:
        if not name or said.get(name):
            fields |= {"activation_func": function, "gated_linear_unit": gated}
            # the fused kernel of a plain GELU is another function than the plain one; it needs a bias
            fields["bias_activation_fusion"] = bool(said.get(fusion, gated or said.get("add_bias_linear", True)))
            break
    try:
        config = kind(**{**fields, **NEUTRAL, **given})
    except (AssertionError, TypeError, ValueError) as error:
        raise BadCheckpoint("megatron-core refuses what the training arguments say", {"because": error}) from error
    if said.get("position_embedding_type") == "yarn":
        for name, (field, default) in YARN.items():
            setattr(config, field, said.get(name, said.get(field, default)))
    return config


# what concerns no weight, and what a machine without a GPU has to be told
NEUTRAL = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "use_cpu_initialization": True,
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "moe_token_dispatcher_type": "allgather",
    "deterministic_mode": True,  # Gated DeltaNet by its formula, without the kernel of flash-linear-attention
}


def keywords_of(said: Arguments, *, hybrid: bool) -> dict[str, object]:
    """Return the keywords of GPTModel, or of a hybrid's class, that training arguments say, ``padded_vocab_size`` among them."""
    rows = KEYWORDS[:5] + HYBRID_KEYWORDS if hybrid else KEYWORDS
    found = {keyword: said[name] for name, keyword, _ in rows if said.get(name) is not None}
    found[TIED[1]] = not said.get(TIED[0])
    lacking = [name for name, keyword, _ in KEYWORDS[:2] if keyword not in found]
    if lacking:
        raise BadCheckpoint(f"the training arguments do not say {lacking[0]!r}", {"found": f"{len(said)} arguments"})
    return found


def describes_hybrid(said: Arguments) -> bool:
    """Say whether training arguments describe a hybrid: its layers' pattern, its spec, its flag."""
    return bool(said.get("is_hybrid_model")) or names_hybrid(said)


def _typed(value: object) -> object:
    """Return a value as a config has it: the element types are no texts there, a window is not a list."""
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return value


def is_hybrid(model: object) -> bool:
    """Say whether a model is a MambaModel, called HybridModel since 0.17."""
    return any(hasattr(model, name) for name in PATTERNS)


def _unwrapped(model: object) -> torch.nn.Module:
    """Return the model inside its wrappers: a list of virtual stages, DistributedDataParallel, Float16Module."""
    while True:
        if isinstance(model, list | tuple) and model:
            model = model[0]
        elif isinstance(model, torch.nn.Module) and not hasattr(model, "vocab_size") and hasattr(model, "module"):
            model = model.module
        else:
            return cast("torch.nn.Module", model)


def _found(model: torch.nn.Module, place: str) -> object:
    """Return an attribute of an attribute of a model; None where there is none."""
    try:
        return attrgetter(place)(model) if place else None
    except AttributeError:
        return None


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return [*map(_plain, value)]
    return str(value) if isinstance(value, torch.dtype) else value


def _activation_arguments(config: TransformerConfig, said: dict[str, object]) -> dict[str, object]:
    """Return what says the activation; one that no argument says stays as the config has it, for the families to refuse."""
    gated, fused = said.pop("gated_linear_unit"), said.pop("bias_activation_fusion", False)
    for name, function, is_gated, fusion in ACTIVATIONS:
        if config.activation_func is function and gated == is_gated:
            return {**{each: each == name for each, *_ in ACTIVATIONS if each}, fusion: fused}
    return {"gated_linear_unit": gated, "activation_func": getattr(config.activation_func, "__name__", "unknown")}


def _stretched(model: torch.nn.Module) -> float:
    """Return the factor of Llama 3's angles, from the slowest of them, of which RotaryEmbedding._apply_scaling divides most."""
    found = cast("torch.Tensor", attrgetter("rotary_pos_emb.inv_freq")(model))
    plain: float = float(cast("float", model.rotary_base)) ** (-(len(found) - 1) / len(found))
    turns = 8192 * plain / (2 * math.pi)  # in the length that the model was first trained for
    kept = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
    if found.is_meta or kept == 1:  # an angle that is not divided does not tell, nor does it matter
        return 8.0
    return round((1 - kept) * plain / (float(found[-1]) - kept * plain), 3)

"""The run_config.yaml that Megatron-Bridge reads beside a store: a model's arguments in the words of its provider.

What is written here ``wrapped.translate`` reads; Megatron-Bridge's own reader is load_model_config of training/model_load_save.py.
"""

from collections.abc import Mapping

import yaml

from carnet.algebra.layout import round_up
from carnet.formats.adapters import BASE
from carnet.formats.adapters import BRIDGE as PEFT
from carnet.formats.wrapped import ACTIVATIONS, RENAMED

Arguments = Mapping[str, object]
EVERY_GPT = "megatron.bridge.models.gpt_provider.GPTModelProvider"
LATENT = "megatron.bridge.models.mla_provider.MLAModelProvider"
SPECS = "megatron.core.models.gpt."
VARIANT = f"{SPECS}experimental_attention_variant_module_specs.get_transformer_block_with_experimental_attention_variant_spec"
BLOCKS = f"{SPECS}gpt_layer_specs.get_gpt_decoder_block_spec"
# where Python finds the functions of ``ACTIVATIONS``
FUNCTIONS = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch.nn.functional.gelu",
    **{name: f"megatron.core.activations.{name}" for name in ("squared_relu", "fast_gelu", "quick_gelu")},
}
# arguments that a provider says in other words, or that say of no model of GPT's kind anything
OTHERWISE = frozenset(
    """
    swiglu squared_relu openai_gelu quick_geglu bias_gelu_fusion group_query_attention num_query_groups max_position_embeddings
    vocab_size padded_vocab_size untie_embeddings_and_output_weights params_dtype hybrid_layer_pattern hybrid_override_pattern
    hybrid_attention_ratio hybrid_mlp_ratio is_hybrid_model spec heterogeneous_layers_config_path
    heterogeneous_layers_config_encoded_json
    """.split()
)
CUT = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "ep": "expert_model_parallel_size"}
HALVES = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}
# nothing of a run lies in the store but the weights
CHECKPOINT = {"ckpt_format": "torch_dist", "fully_parallel_save": False, "save_optim": False, "save_rng": False}


def run_config(said: Arguments, cut: Mapping[str, int], name: str, spec: str, words: Arguments, adapters: object = None) -> str:
    """Return the text for arguments, ranks, a provider and a layer spec ("" for those of every model), and the provider's own words.

    ``adapters`` is what is said of those that the store holds, with the name of the base model.
    """
    theirs = {ours: name for name, ours in RENAMED}
    model: dict[str, object] = {theirs.get(key, key): value for key, value in said.items() if key in said.keys() - OTHERWISE}
    latent = bool(said.get("multi_latent_attention"))
    model["_target_"] = name or (LATENT if latent else EVERY_GPT)
    model |= {CUT[key]: count for key, count in cut.items()}
    dtype, heads = str(said.get("params_dtype")), said.get("num_attention_heads")
    model |= {"params_dtype": _at(dtype), "pipeline_dtype": _at(dtype), **{key: dtype == name for key, name in HALVES.items()}}
    model["num_query_groups"] = said.get("num_query_groups") if said.get("group_query_attention") else heads
    model |= dict.fromkeys(("hidden_dropout", "attention_dropout"), 0.0)
    if latent and said.get("rope_type") == "rope":
        model["rotary_scaling_factor"] = 1.0  # a provider of latent attention has 40 where nothing is said
    model["share_embeddings_and_output_weights"] = not said.get("untie_embeddings_and_output_weights")
    model |= {"seq_length": said.get("max_position_embeddings"), "moe_grouped_gemm": bool(said.get("num_experts"))}
    model |= {**_vocabulary(said, cut["tp"]), **_activation(said), **words}
    if isinstance(function := model.get("activation_func"), str):
        model["activation_func"] = _at(FUNCTIONS.get(function, function))
    model |= _layers(said, spec, latent)
    return yaml.safe_dump({"model": model, "checkpoint": CHECKPOINT, **_adapters(adapters)})


def adapters_alone(said: object) -> str:
    """Return the text that says nothing of a model, but how its adapters were made."""
    return yaml.safe_dump(_adapters(said))


def _adapters(said: object) -> dict[str, object]:
    """Return the sections about adapters, none where there are none."""
    if not isinstance(said, Mapping):
        return {}
    above = {**CHECKPOINT, **({"pretrained_checkpoint": said[BASE]} if said.get(BASE) else {})}
    return {"checkpoint": above, PEFT: {key: said[key] for key in said if key != BASE}}


def _at(path: str) -> dict[str, object]:
    return {"_call_": False, "_target_": path}


def _activation(said: Arguments) -> dict[str, object]:
    found = (key for key, words in ACTIVATIONS.items() if all(said.get(word) == value for word, value in words.items()))
    name, gated = next(found, ("", False))
    fused = {"bias_activation_fusion": bool(said.get("bias_gelu_fusion"))} if name == "gelu" else {}
    return {"activation_func": name, "gated_linear_unit": gated, **fused} if name in FUNCTIONS else {}


def _vocabulary(said: Arguments, tp: int) -> dict[str, object]:
    """Say how many rows are stored as the providers count them: calculate_padded_vocab_size in megatron/bridge/utils/vocab_utils.py."""
    size, rows = said.get("vocab_size"), said.get("padded_vocab_size")
    if not isinstance(size, int) or not isinstance(rows, int) or rows == size:
        return {"vocab_size": size, "should_pad_vocab": False}
    unit = 128 if round_up(size, 128 * tp) == rows else rows // tp
    return {"vocab_size": size, "should_pad_vocab": True, "make_vocab_size_divisible_by": unit}


def _layers(said: Arguments, spec: str, latent: bool) -> dict[str, object]:
    """Say which spec builds the layers, where they are not alike."""
    if spec:
        return {"transformer_layer_spec": _at(spec)}
    if said.get("experimental_attention_variant"):
        return {"transformer_layer_spec": _at(VARIANT), "hetereogenous_dist_checkpoint": True}
    if latent or isinstance(said.get("moe_layer_freq"), list):
        blocks = {"_target_": BLOCKS, "_partial_": True, "_args_": [], "use_transformer_engine": True}
        return {"transformer_layer_spec": blocks}
    return {}

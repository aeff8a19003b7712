"""Nemotron-NAS (Deci): a Llama whose layers differ, in KV heads, in width, and where a block is one linear layer or nothing at all.

Hugging Face: modeling_decilm.py beside nvidia/Llama-3_3-Nemotron-Super-49B-v1, no class of transformers; vLLM reads all but the linear
layers: vllm/model_executor/models/nemotron_nas.py. A block that does nothing has no norm, a linear layer has one.
TensorRT-LLM: tensorrt_llm/models/nemotron_nas/{config,convert,layer_config}.py, where MLPs are called ``ffn``.
"""

from dataclasses import replace
from typing import Any

from carnet.architectures.family import Family
from carnet.dialects import hf, trtllm
from carnet.dialects.configs import Json, Place, place
from carnet.dialects.configs import Row as Field
from carnet.dialects.heterogeneous import MEANINGS, Layer, read_blocks, record, size, spelled_blocks, spread
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import row
from carnet.dialects.senses import Kind, Senseless, expect
from carnet.model.fields import Config, Value
from carnet.model.model import layers, number

LINEAR = (
    row(LAYER + "self_attn.linear_attn.weight", "hidden hidden_in", "linear_mixer"),
    row(LAYER + "mlp.linear_mlp.weight", "hidden hidden_in", "linear_mlp"),
)
# the whole of a linear layer's input, and a part of its output on every rank
TRTLLM_LINEAR = (
    row(LAYER + "attention.weight", "hidden hidden_in", "linear_mixer", cut="hidden"),
    row(LAYER + "ffn.weight", "hidden hidden_in", "linear_mlp", cut="hidden"),
)
OF_A_LAYER = {"kv_heads", "ffn"}
SIZES = {field.field: field for field in hf.SIZES if field.field not in OF_A_LAYER}
BLOCKS = {name: spread(name, {"block_configs": list[dict[str, object]]}, read_blocks, spelled_blocks) for name in MEANINGS}
FIELDS: tuple[Field, ...] = (
    # the blocks are read before all that only some blocks have
    *({name: SIZES[name] for name in ("layers", "hidden")} | {"blocks": BLOCKS["blocks"]} | SIZES | BLOCKS).values(),
    place("norm_eps", "rms_norm_eps", default=1e-6),
    place("activation", "hidden_act", default="silu", words=(("silu", "silu"),)),
    *hf.ROPE,
    hf.DTYPE,
    *hf.TOKENS,
    hf.TIED,
)

LAYER_KEYS: dict[str, Kind] = {
    "layer_configs": list[dict[str, object]],
    "layer_types": list[str],
    "num_kv_heads_per_layer": list[int],
    "num_key_value_heads": int,
    "intermediate_size": int,
}
KINDS = {"attention": {"attention": "*", "linear": "L", "no_op": ""}, "ffn": {"mlp": "-", "linear": "l", "no_op": ""}}
WORDS = {"attention": "attention", "dense": "mlp", "linear": "linear", "": "no_op"}  # what a layer has -> NVIDIA's word


def _read(said: tuple[Any, ...], config: Config) -> list[Layer]:
    """Return the layers of a config, sizes that they do not say from the rest; the keys that follow from them must agree."""
    each, kinds, kv_heads, *usual = said
    found = [_layer(block, usual, config) for block in each or ()]
    heads = number(config, "heads")
    follows = [
        ["attention" if layer.group else "linear" if "L" in layer.word else "no_op" for layer in found],
        [heads // layer.group for layer in found if layer.group],
    ]
    agree = kinds in (None, follows[0]) and kv_heads in (None, follows[1])
    expect(len(found) == number(config, "layers") and agree, "a record a layer")
    expect(any(layer.group for layer in found), "some attention")
    return found


def _layer(block: Json, usual: list[object], config: Config) -> Layer:
    heads = number(config, "heads")
    letters, sizes = [], []
    for (part, words), key, otherwise in zip(KINDS.items(), ("num_key_value_heads", "intermediate_size"), usual, strict=True):
        said = record(block, part)
        letter = words.get(str(said.get("impl")))
        if letter is None or set(said) - {"impl", key}:
            raise Senseless("an implementation and a size")
        letters.append(letter)
        sizes.append(size(otherwise if said.get(key) is None else said[key]) if letter in {"*", "-"} else 0)
    expect(not sizes[0] or heads % sizes[0] == 0, "whole groups of query heads")
    return Layer("".join(letters) or ".", heads // sizes[0] if sizes[0] else 0, sizes[1])


def spelled_layers(config: Config) -> tuple[object, ...]:
    """Return what NVIDIA's converter writes; the sizes of the whole model are its defaults and mean nothing."""
    each = layers(config)
    expect({layer[part] for layer in each for part in ("mixer", "mlp")} <= set(WORDS), "layers of these kinds")
    kinds = [(WORDS[str(layer["mixer"])], WORDS[str(layer["mlp"])]) for layer in each]
    kv_heads = [
        number(layer, "kv_heads") if mixer == "attention" else None for layer, (mixer, _) in zip(each, kinds, strict=True)
    ]
    widths = [number(layer, "ffn") if mlp == "mlp" else None for layer, (_, mlp) in zip(each, kinds, strict=True)]
    found = [
        {"attention": {"impl": mixer, "num_key_value_heads": kv}, "ffn": {"impl": mlp, "intermediate_size": width}}
        for (mixer, mlp), kv, width in zip(kinds, kv_heads, widths, strict=True)
    ]
    kept = [kv for kv in kv_heads if kv]
    return found, [mixer for mixer, _ in kinds], kept, number(config, "heads"), 4 * number(config, "hidden")


TRTLLM_FIELDS: tuple[Field, ...] = (
    *(field for field in trtllm.SIZES if not isinstance(field, Place) or field.field not in OF_A_LAYER),
    *(spread(name, LAYER_KEYS, _read, spelled_layers) for name in MEANINGS),
    *trtllm.ROPE,
    trtllm.ACTIVATION,
    place("tied", "tie_word_embeddings", default=False, omit=True),
)
TRAITS: dict[str, Value] = {"norm": "rms", "gated": True, "activation": "silu", "position": "rope"}

NEMOTRON_NAS = Family(
    name="nemotron_nas",
    traits=TRAITS,
    hf=hf.dialect(
        "DeciLMForCausalLM",
        "nemotron-nas",
        (*hf.LLAMA_ROWS, *LINEAR),
        FIELDS,
        fixed={"attention_bias": False, "mlp_bias": False},
        written={"intermediate_size": None, "num_key_value_heads": None},
        guards={"position_embedding_type": ("rope",), "o_proj_bias": (False,), "block_return_only_hidden_states": (False,)},
        ignored="llama4_attn_implementation router_aux_loss_coef router_z_loss_coef output_router_logits",
    ),
    trtllm=trtllm.dialect(
        "DeciLMForCausalLM",
        TRTLLM_LINEAR,
        TRTLLM_FIELDS,
        fixed={"position_embedding_type": "rope_gpt_neox"},
        written={"rotary_scaling": None},
        common=tuple(replace(each, name=each.name.replace(".mlp.", ".ffn.")) for each in (*trtllm.COMMON, *trtllm.GATED_MLP)),
    ),
)

"""A random small model of every family, and its checkpoint on disk, made without any program that knows the model.

A sample is data: the programs that must be able to say the family's plain model, and the parts that such a model is drawn from.
A new family is a line in ``SAMPLES``; what it may be besides, where both sides of a crossing can say it, is a line in ``MAYBE``.
"""

import json
import struct
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from math import gcd, prod
from pathlib import Path
from random import Random

import ml_dtypes
import numpy as np
from safetensors import deserialize

from carnet.architectures.family import Family
from carnet.architectures.known import FAMILIES, dialect_of, padded, recognise
from carnet.dialects.entries import entries
from carnet.dialects.entry import Entry
from carnet.dialects.rows import Dialect, less_one
from carnet.dialects.writing import write
from carnet.errors import NotSupported
from carnet.model.fields import Config, Value
from carnet.model.model import canonical_shapes, layers, mixtures, number, value
from carnet.model.model import marks as mixtures_of
from carnet.model.tensors import NORM, canonical

Fields = dict[str, Value]
Part = Callable[[Random, int, Config], Fields]  # draws fields; every axis that ranks share is a multiple of the second
FAMILY = {family.name: family for family in FAMILIES}


@dataclass(frozen=True)
class Sample:
    """What the models of one family are drawn from."""

    dialects: str  # the programs that can say the plain model
    parts: tuple[Part, ...]  # in order: later ones may look at what the earlier drew
    fields: Fields = field(default_factory=dict)  # what all of its models say, beside the family's traits


# --- parts ---------------------------------------------------------------------------------------------------------------------


def sizes(random: Random, ranks: int, _: Config) -> Fields:
    return {
        "layers": random.randint(1, 4),
        "hidden": ranks * random.randint(1, 5),
        "vocab": 2 * random.randint(1, 40) + 1,
        "positions": random.randint(1, 9),
    }


def grouped(random: Random, ranks: int, _: Config) -> Fields:
    """Heads in groups that share a key and a value; where there are fewer groups than ranks, ranks share a group."""
    kv = random.choice([n for n in (1, 2, 3, 4) if n % ranks == 0 or ranks % n == 0])
    heads = kv * max(1, ranks // kv) * random.randint(1, 2)
    return {"heads": heads, "kv_heads": kv, "head_dim": random.randint(1, 4)}


def each(random: Random, ranks: int, _: Config) -> Fields:
    """A key and a value for each head."""
    heads = ranks * random.randint(1, 3)
    return {"heads": heads, "kv_heads": heads, "head_dim": random.randint(1, 4)}


def one_or_each(random: Random, ranks: int, config: Config) -> Fields:
    found = each(random, ranks, config)
    return {**found, "kv_heads": random.choice((1, found["heads"]))}


def square(_: Random, __: int, config: Config) -> Fields:
    """Heads that are as wide as their part of the stream: the config has no key for their width."""
    return {"hidden": number(config, "heads") * number(config, "head_dim")}


def latent(random: Random, ranks: int, _: Config) -> Fields:
    heads = ranks * random.randint(1, 2)
    nope, rope = random.randint(1, 3), random.randint(1, 3)
    return {
        "heads": heads,
        "kv_heads": heads,
        "nope_dim": nope,
        "rope_dim": rope,
        "head_dim": nope + rope,
        "v_dim": random.randint(1, 3),
        "kv_lora": random.randint(1, 4),
        "q_lora": random.choice((0, 1, 3)),
        "latent_norm_eps": 1e-6,  # DeepSeek's classes have it whatever the config says, Megatron what all norms have
        "norm_eps": 1e-6,
    }


def indexers(random: Random, _: int, config: Config) -> Fields:
    """An indexer in every layer, which reads compressed queries."""
    return {
        "q_lora": max(1, number(config, "q_lora")),
        "index_heads": random.randint(1, 3),
        "index_dim": random.randint(1, 3),
        "index_topk": random.randint(1, 9),
        "index_norm_eps": 1e-6,
        "variant": "dsa",
    }


def choices_shared(random: Random, _: int, config: Config) -> Fields:
    """Some first layers have an indexer, then one of so many."""
    layers, first, step = number(config, "layers"), random.randint(1, 2), random.randint(1, 3)
    marks = tuple(int(max(layer + 1 - first, 0) % step == 0) for layer in range(layers))
    return {"index_layers": marks if 0 in marks else None}


def guesses(random: Random, _: int, config: Config) -> Fields:
    """A head that guesses tokens of another model."""
    layers = random.randint(1, 4)
    few = random.randint(1, number(config, "vocab") - 1)
    return {"layers": 1, "aux": layers, "aux_layers": tuple(range(layers)), "draft_vocab": random.choice((few, None))}


def dense(random: Random, ranks: int, _: Config) -> Fields:
    return {"ffn": ranks * random.randint(1, 5)}


def four_times(_: Random, __: int, config: Config) -> Fields:
    return {"ffn": 4 * number(config, "hidden")}


def experts(random: Random, ranks: int, _: Config) -> Fields:
    count = ranks * random.randint(1, 3)
    return {"experts": count, "topk": random.randint(1, count), "moe_ffn": ranks * random.randint(1, 3)}


def two_chosen(_: Random, __: int, config: Config) -> Fields:
    """Megatron norms the score of no expert that is alone, and stops where its softmax would be one."""
    return {"experts": max(2, number(config, "experts")), "topk": 2}


def one_width(_: Random, __: int, config: Config) -> Fields:
    """An expert is as wide as the MLP would be: the config has one key for both."""
    return {"ffn": config["moe_ffn"]}


def shared(random: Random, _: int, config: Config) -> Fields:
    return {"shared_ffn": random.randint(0, 2) * number(config, "moe_ffn")}


def one_shared(_: Random, __: int, config: Config) -> Fields:
    return {"shared_ffn": config["moe_ffn"]}


def latent_experts(random: Random, _: int, __: Config) -> Fields:
    """A projection of the stream goes to the experts, and what they make of it comes back by another."""
    return {"moe_latent": random.randint(1, 4)}


def dense_first(random: Random, _: int, config: Config) -> Fields:
    layers = number(config, "layers")
    dense = random.randint(0, layers - 1)
    return {"blocks": mixtures([layer >= dense for layer in range(layers)])}


def dense_anywhere(random: Random, _: int, config: Config) -> Fields:
    marks = [random.choice((True, False)) for _ in range(number(config, "layers"))]
    return {"blocks": mixtures([*marks[1:], True])}


def dense_between(random: Random, _: int, config: Config) -> Fields:
    layers = number(config, "layers")
    step = random.randint(1, layers)
    return {"blocks": mixtures([(layer + 1) % step == 0 for layer in range(layers)])}


def windows(random: Random, _: int, config: Config) -> Fields:
    return {
        "window": random.randint(1, 9),
        "window_layers": tuple(random.randint(0, 1) for _ in range(number(config, "layers"))),
    }


def global_heads(random: Random, ranks: int, config: Config) -> Fields:
    """Layers without the window, the last among them, have heads of a width of their own, and others of keys that are values too."""
    windows, heads = config["window_layers"], number(config, "heads")
    assert isinstance(windows, tuple)
    windows = (*windows[:-1], 0)
    keyed = random.choice((True, False))
    kv = random.choice([n for n in (1, 2, 4) if heads % n == 0 and (n % ranks == 0 or ranks % n == 0)])

    def of_layers(field: str, wide: int) -> Value:
        found = tuple(number(config, field) if mark else wide for mark in windows)
        return found if {*found} != {number(config, field)} else None

    return {
        "window_layers": windows,
        "value_layers": windows if keyed else None,
        "layer_head_dim": of_layers("head_dim", random.randint(1, 6)),
        "layer_kv_heads": of_layers("kv_heads", kv) if keyed else None,
    }


def mlp_beside(_: Random, __: int, config: Config) -> Fields:
    """What is the MLP of other models stands beside the experts."""
    return {"shared_ffn": config["ffn"], "shared_norms": True, "router_norm": True, "expert_scale": True}


def unrotated(random: Random, _: int, config: Config) -> Fields:
    marks = tuple(random.randint(0, 1) for _ in range(number(config, "layers")))
    return {"rope_layers": marks if 0 in marks else None}


def moving(random: Random, ranks: int, config: Config) -> Fields:
    """Only layers with the window have positions."""
    found = windows(random, ranks, config)
    return {**found, "rope_layers": found["window_layers"] if 0 in found["window_layers"] else None}


def chunks(random: Random, _: int, config: Config) -> Fields:
    marks = [random.randint(0, 1) for _ in range(number(config, "layers"))]
    rope = tuple(random.choice((marks, [1] * len(marks))))
    return {"chunk": 8, "chunk_layers": tuple(marks), "rope_layers": rope if 0 in rope else None}


def states(random: Random, ranks: int, _: Config) -> Fields:
    """Mamba-2 heads in groups, each group normed for itself; what Megatron's mixer fixes."""
    groups = ranks * random.randint(1, 2)
    return {
        "ssm_heads": groups * random.randint(1, 3),
        "ssm_head_dim": random.randint(1, 3),
        "ssm_groups": groups,
        "ssm_state": random.randint(1, 3),
        "ssm_conv": 4,
        "ssm_conv_bias": True,
        "ssm_norm_groups": groups,
        "ssm_norm_eps": 1e-5,
    }


def deltas(random: Random, ranks: int, config: Config) -> Fields:
    """Layers of Gated DeltaNet, value heads in groups that share a key; the last layer attends, and others may."""
    keys = ranks * random.randint(1, 2)
    marks = [*(random.randint(0, 1) for _ in range(number(config, "layers") - 1)), 1]
    mixers = "".join("G*"[mark] for mark in marks)
    return {
        "gdn_keys": keys,
        "gdn_values": keys * random.randint(1, 3),
        "gdn_key_dim": random.randint(1, 3),
        "gdn_value_dim": random.randint(1, 3),
        "gdn_conv": random.randint(1, 4),
        "variant": "gdn",
        "blocks": mixtures(mixtures_of(config), mixers) if "G" in mixers else config.get("blocks"),
    }


def one_group(_: Random, __: int, ___: Config) -> Fields:
    """The gated norm takes all heads at once, as Megatron's does where there is one group."""
    return {"ssm_groups": 1, "ssm_norm_groups": 1}


def expanded(random: Random, _: int, config: Config) -> Fields:
    """All heads together are so many times as wide as the stream."""
    return {
        "hidden": number(config, "ssm_heads") * number(config, "ssm_head_dim"),
        "ssm_head_dim": random.randint(1, 3) * number(config, "ssm_head_dim"),
    }


def channels(random: Random, _: int, config: Config) -> Fields:
    """Mamba-1's, a whole multiple of the stream; its steps' rank is what follows from that."""
    hidden = number(config, "hidden")
    return {
        "ssm_channels": hidden * random.randint(1, 3),
        "ssm_dt_rank": -(-hidden // 16),
        "ssm_state": random.randint(1, 3),
        "ssm_conv": 4,
        "ssm_conv_bias": True,
        "blocks": " ".join("S" * number(config, "layers")),
    }


def all_states(_: Random, __: int, config: Config) -> Fields:
    return {"blocks": " ".join("M" * number(config, "layers"))}


def mamba_attention_mlp(random: Random, _: int, config: Config) -> Fields:
    return {"blocks": " ".join(random.choice("M*-") for _ in range(number(config, "layers")))}


def one_block_each(random: Random, _: int, config: Config) -> Fields:
    return {"blocks": " ".join(["E", *(random.choice("M*-E") for _ in range(number(config, "layers") - 1))])}


def unlike(random: Random, ranks: int, config: Config) -> Fields:
    """Layers of other kinds and sizes; the model's own sizes are those of the first that has them. Hugging Face's are rounded."""
    layers, heads = range(number(config, "layers")), number(config, "heads")
    words = [
        "*-",
        *(random.choice(("*-", "*", "-", "*l", "L-", "Ll", ".")) for _ in layers[1:]),
    ]  # NVIDIA's ranks want some attention
    fitting = [kv for kv in (1, 2, 4) if heads % kv == 0 and (kv % ranks == 0 or ranks % kv == 0)]
    kv_heads = [random.choice(fitting) if "*" in word else 1 for word in words]
    widths = [256 * random.randint(1, 2) if "-" in word else 1 for word in words]
    first = next((kv for kv, word in zip(kv_heads, words, strict=True) if "*" in word), 1)
    wide = next((width for width, word in zip(widths, words, strict=True) if "-" in word), 1)
    return {"blocks": " ".join(words), "kv_heads": first, "ffn": wide, "layer_kv_heads": (*kv_heads,), "layer_ffn": (*widths,)}


def unevenly(random: Random, _: int, __: Config) -> Fields:
    """Each frequency stretched by a factor of its own; in texts no longer than before, so that NVIDIA's rule leaves cosines alone."""
    half = random.randint(1, 3)
    short, long = (tuple(step * (1 + each) for each in range(half)) for step in (1.0, 1.5))
    return {"head_dim": 2 * half, "rope_short": short, "rope_long": long, "rope_original": 100 + random.randint(0, 4)}


GQA: tuple[Part, ...] = (sizes, grouped)
MLP: tuple[Part, ...] = (*GQA, dense)
SQUARE: tuple[Part, ...] = (*MLP, square)
GPT: tuple[Part, ...] = (sizes, each, square, dense)
DEEPSEEK: tuple[Part, ...] = (sizes, latent, dense, experts, shared, dense_first)

SILU: Fields = {"activation": "silu", "tied": False}
ALL_BIASES: Fields = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
NO_BIASES: Fields = dict.fromkeys(ALL_BIASES, False)
GEMMA: Fields = {"activation": "gelu_tanh", "tied": True, "attention_root": 16}
ANGLES: Fields = {"rope_local_theta": 10000.0, "rope_type": "proportional", "rope_percent": 0.25}
GEMMA4: Fields = {"activation": "gelu_tanh", "tied": True, "window_every": 6, **ANGLES}
FALCON: Fields = {"activation": "gelu", "tied": True}
BESIDE: Fields = {"parallel_residual": True}
NEOX: Fields = {**ALL_BIASES, "activation": "gelu", "tied": False, "rope_percent": 0.25}
GPT_OSS: Fields = {"tied": False, "qkv_bias": True, "out_bias": True, "glu_limit": 7.0}
COHERE: Fields = {"activation": "silu", "tied": True}
CAPS: Fields = {"softcap_attention": 50.0, "softcap_logits": 30.0}
SHARPENED: Fields = {"temperature": True, "temperature_floor": 16, "temperature_scale": 0.5}

GROWING: Fields = {"rope_type": "yarn", "rope_factor": 4.0, "rope_original": 8, "rope_attention": 1.0, "query_growth": 0.1}

ALPHA: Fields = {"rope_type": "alpha", "rope_alpha": 1000.0}
RELU2: Fields = {"activation": "relu2", "tied": False}
SIGMOID: Fields = {"router_score": "sigmoid", "router_bias": True}

# a family, or a family and a remark where its programs cannot all say one kind of model
SAMPLES: dict[str, Sample] = {
    "llama": Sample("hf megatron trtllm", MLP, SILU),
    "mistral": Sample("hf megatron trtllm", MLP, SILU),
    "qwen2": Sample("hf megatron trtllm", MLP, SILU),
    "mimo": Sample("hf megatron", MLP, SILU),
    "qwen3": Sample("hf megatron trtllm", MLP, SILU),
    "phi3": Sample("hf megatron trtllm", MLP, SILU),
    "phi3, each frequency stretched for itself": Sample(
        "hf trtllm", (*MLP, unevenly, square), {**SILU, "rope_type": "longrope", "rope_attention": 1.0}
    ),
    "olmo2": Sample("hf", MLP, SILU),
    "granite": Sample("hf", MLP, {**SILU, "attention_scale": 0.3, "embed_scale": 12.0}),
    "gemma": Sample("hf trtllm", MLP, {"activation": "gelu_tanh", "tied": True}),
    "gemma2": Sample("hf trtllm", (*MLP, windows), {**GEMMA, **CAPS, "window_every": 2}),
    "gemma3": Sample("hf", (*MLP, windows), {**GEMMA, "rope_local_theta": 10000.0, "window_every": 6}),
    "gemma4": Sample("hf", (*MLP, windows, global_heads), GEMMA4),
    "gemma4, mixtures": Sample("hf", (*MLP, experts, windows, global_heads, mlp_beside), GEMMA4),
    "gpt2": Sample("hf megatron trtllm", GPT, {"activation": "gelu_tanh", "tied": True}),
    "gpt_neox": Sample("hf megatron", GPT, NEOX),
    "gpt_neox, MLP beside attention": Sample("hf trtllm", (*GPT, four_times), {**NEOX, "parallel_residual": True}),
    "nemotron": Sample("hf megatron trtllm", MLP, {**RELU2, "rope_percent": 0.5}),
    "starcoder2": Sample("hf megatron trtllm", MLP, {**ALL_BIASES, "activation": "gelu_tanh", "tied": True}),
    "falcon": Sample("hf megatron trtllm", (sizes, one_or_each, square, dense), FALCON),
    "falcon, MLP beside attention": Sample(
        "hf trtllm", (sizes, one_or_each, square, dense), {**FALCON, **BESIDE, "one_norm": True}
    ),
    "falcon, newer decoder": Sample("hf trtllm", SQUARE, {**FALCON, **BESIDE, "new_decoder": True}),
    "mixtral": Sample("hf megatron trtllm", (*GQA, experts, two_chosen, one_width), SILU),
    "olmoe": Sample("hf", (*GQA, square, experts, one_width), SILU),
    "minimax_m2": Sample("hf", (*GQA, experts, one_width), SILU),
    "qwen2_moe": Sample("hf megatron trtllm", (*MLP, experts, two_chosen, shared), {**SILU, "qkv_bias": True}),
    "qwen2_moe, some layers dense": Sample(
        "hf megatron", (*MLP, experts, two_chosen, shared, dense_anywhere), {**SILU, "qkv_bias": True}
    ),
    "qwen3_moe": Sample("hf megatron trtllm", (*MLP, experts, two_chosen), SILU),
    "qwen3_moe, some layers dense": Sample("hf megatron", (*MLP, experts, two_chosen, dense_anywhere), SILU),
    "qwen3_next": Sample("hf megatron", (*MLP, experts, two_chosen, one_shared, deltas), SILU),
    "qwen3_next, some layers dense": Sample(
        "hf megatron", (*MLP, experts, two_chosen, one_shared, dense_anywhere, deltas), SILU
    ),
    "qwen3_5": Sample("hf megatron", (*MLP, deltas), SILU),
    "qwen3_5_moe": Sample("hf megatron", (*GQA, experts, two_chosen, one_width, one_shared, deltas), SILU),
    "llama4": Sample("hf", (*MLP, experts, one_shared, dense_between, chunks), {**SILU, **SHARPENED, "qk_norm": "plain"}),
    "gpt_oss": Sample("hf megatron", (*GQA, experts, two_chosen, one_width, windows), GPT_OSS),
    "deepseek_v2": Sample("hf megatron", DEEPSEEK, {**SILU, "router_normed": False}),
    "deepseek_v3": Sample("hf megatron", (*DEEPSEEK, two_chosen), SILU),
    "eagle3": Sample("hf", (*MLP, guesses), SILU),
    "glm4": Sample("hf", MLP, {**SILU, "rope_percent": 0.5}),
    "seed_oss": Sample("hf megatron", MLP, SILU),
    "smollm3": Sample("hf megatron", (*MLP, unrotated), SILU),
    "ernie4_5": Sample("hf", MLP, SILU),
    "ernie4_5_moe": Sample("hf", (*MLP, experts, shared, dense_first), SILU),
    "olmo3": Sample("hf", (*MLP, windows), {**SILU, "window_every": 4, "rope_local_theta": 500000.0}),
    "exaone4": Sample("hf", MLP, SILU),
    "hunyuan_v1_dense": Sample("hf", MLP, SILU),
    "hunyuan_v1_dense, as published": Sample("hf", MLP, {**SILU, **ALPHA}),
    "hunyuan_v1_moe": Sample("hf", (*MLP, experts, one_width, one_shared), SILU),
    "hunyuan_v1_moe, as published": Sample("hf", (*MLP, experts, one_width, one_shared), {**SILU, **ALPHA}),
    "exaone4, windows": Sample("hf", (*MLP, moving), {**SILU, "window_every": 4}),
    "cohere": Sample("hf", MLP, {**COHERE, "logits_divisor": 2.0}),
    "cohere, norms of each head's own": Sample("hf", (*MLP, square), {**COHERE, "logits_divisor": 2.0, "qk_norm": "heads"}),
    "cohere2": Sample("hf", (*MLP, moving), {**COHERE, "logits_divisor": 4.0, "window_every": 4}),
    "stablelm": Sample("hf megatron", SQUARE, {**SILU, "rope_percent": 0.25}),
    "stablelm, MLP beside attention": Sample("hf", SQUARE, {**SILU, "rope_percent": 0.25, **BESIDE, "one_norm": True}),
    "ministral3": Sample("hf", MLP, {**SILU, **GROWING}),
    "stablelm, norms of each head's own": Sample("hf", SQUARE, {**SILU, "rope_percent": 0.25, "qk_norm": "heads"}),
    "dots1": Sample("hf megatron", (*MLP, experts, two_chosen, shared, dense_first), SILU),
    "glm4_moe": Sample("hf megatron", (*MLP, experts, two_chosen, shared, dense_first), {**SILU, "rope_percent": 0.5}),
    "bailing_moe_v2": Sample("hf megatron", (*MLP, experts, two_chosen, shared, dense_first), {**SILU, "rope_percent": 0.5}),
    "glm4_moe_lite": Sample("hf megatron", (*DEEPSEEK, two_chosen), SILU),
    "deepseek_v32": Sample("hf megatron", (*DEEPSEEK, indexers, two_chosen), SILU),
    "glm_moe_dsa": Sample("hf megatron", (*DEEPSEEK, indexers, choices_shared, two_chosen), SILU),
    "mamba": Sample("hf", (sizes, channels), {"position": "none", "tied": True}),
    "mamba2": Sample("hf megatron", (sizes, states, one_group, expanded, all_states), {"position": "none", "tied": False}),
    "nemotron_h": Sample("hf megatron", (*MLP, states, mamba_attention_mlp), RELU2),
    "nemotron_h, mixtures": Sample(
        "hf megatron", (*MLP, experts, two_chosen, shared, states, one_block_each), {**RELU2, **SIGMOID}
    ),
    "nemotron_h, latent mixtures": Sample(
        "hf megatron", (*MLP, experts, two_chosen, latent_experts, shared, states, one_block_each), {**RELU2, **SIGMOID}
    ),
    "nemotron_nas": Sample("hf megatron trtllm", (*MLP, unlike), SILU),
}


def family_of(sample: str) -> Family:
    """Return the family that a sample is of."""
    return FAMILY[sample.split(",", maxsplit=1)[0]]


# what a model may be besides: taken where both programs of a crossing can say it
STRETCHED: Fields = {"rope_factor": 8.0, "rope_original": 8192}
MAYBE: tuple[Fields, ...] = (
    *({"tied": tied} for tied in (True, False)),
    *({"activation": word} for word in ("silu", "gelu", "gelu_tanh", "relu2")),
    *(ALL_BIASES, NO_BIASES, {"qkv_bias": True, "out_bias": True}, {"qkv_bias": True}, {"qkv_bias": False}, {"mlp_bias": True}),
    {"norm_eps": 1e-6},
    {"rope_theta": 500000.0},
    {"rope_percent": 0.75},
    {"rope_type": "linear", "rope_factor": 2.0},
    {"rope_type": "llama3", "rope_low": 1.0, "rope_high": 4.0, **STRETCHED},
    {"rope_type": "yarn", "rope_attention": 1.0, "rope_mscale_all": 0.7, **STRETCHED},
    {"rope_type": "yarn", "rope_attention": 0.875, **STRETCHED},
    {"position": "alibi"},
    {"window": 4, "positions": 9},  # one that no sequence reaches may be left out
    {"one_norm": True},
    {"router_normed": True},
    {"router_normed": False},
    {"router_scale": 2.5},
    {"experts": 4, "topk": 2, "router_groups": 2, "router_group_best": 2},
    {"experts": 4, "topk": 2, "router_groups": 2, "router_group_best": 1},
    {"ssm_conv": 3, "ssm_conv_bias": False, "ssm_norm_eps": 1e-6, "norm_eps": 1e-6},
    {"mtp": 1},
    {"mtp": 2},
    {"attention_scale": 0.25, "logits_divisor": 8.0, "residual_scale": 0.2},
    CAPS,
)


# --- models --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """One small model."""

    family: str
    config: Fields  # canonical fields
    ranks: int  # how many ranks may share it


def draw(name: str, random: Random, dialects: tuple[str, ...] = ("hf",)) -> Model:
    """Return a random model of a sample that these programs can say."""
    ranks = random.choice((1, 2, 4))
    sample, family = SAMPLES[name], family_of(name).name
    traits = FAMILY[family].traits
    config: Fields = {
        "position": "rope",
        **traits,
        **sample.fields,
        "norm_eps": 1e-5,
        "dtype": random.choice(("bf16", "f16", "f32")),
    }
    for part in sample.parts:
        config |= part(random, ranks, config)
    for more in random.sample(MAYBE, random.randint(0, 4)):
        if fits(family, config, more, dialects):
            config |= more
    return Model(family, config, ranks)


def fits(family: str, config: Config, more: Config, dialects: Iterable[str]) -> bool:
    """Say whether a model may be this besides: the family's own config can say it, and what is read there, these programs."""
    traits, both = FAMILY[family].traits, {**config, **more}
    if {**both, **traits} != both or not says(family, "hf", both):
        return False
    _, found = recognise("hf", said(family, "hf", both), "", {})
    if found.get("mtp_blocks") != both.get("mtp_blocks"):  # its layer for a further token follows from others
        return False
    return all(says(family, dialect, found) for dialect in dialects)


def says(family: str, dialect: str, config: Config) -> bool:
    """Say whether a program's config can say a model."""
    try:
        said(family, dialect, config)
    except NotSupported:
        return False
    return True


def said(family: str, dialect: str, config: Config) -> dict[str, object]:
    """Return what a program's config says of a model."""
    spelled = dialect_of(FAMILY[family], dialect)
    traits = {} if dialect == "megatron" else FAMILY[family].traits
    return write(spelled.table, padded(spelled, config), traits, dialect)


def cut(model: Model, dialect: str, random: Random) -> dict[str, object]:
    """Return the options of a crossing that say how a target of this kind is cut."""
    config = model.config
    if dialect == "hf":
        return {"shard_size": random.choice((1, 300, 5_000_000_000))}
    # Megatron's ranks do not share a KV head, nor a group of states
    alone = [number(layer, "kv_heads") for layer in layers(config) if layer["mixer"] in ("attention", "mla")]
    alone = [*alone, number(config, "ssm_groups"), number(config, "gdn_keys")] if dialect == "megatron" else []
    widest = gcd(model.ranks, *alone)
    tp = random.choice([n for n in (1, 2, 4) if widest % n == 0])
    pp = random.randint(1, number(config, "layers"))
    ep = random.choice([n for n in (1, 2, 4) if (tp if dialect == "trtllm" else model.ranks) % n == 0])
    options: dict[str, object] = {"tp": tp, "pp": pp, "ep": ep if value(config, "experts") else 1}
    if dialect == "megatron":
        return {**options, "spelling": random.choice(("te", "local"))}
    options["parallel_embedding"] = random.choice((None, "none", "rows", "columns"))
    spelled = dialect_of(FAMILY[model.family], dialect)
    # some of NVIDIA's classes cannot share their layers among stages
    return options if says(model.family, dialect, {**config, **ranked(spelled, options)}) else {**options, "pp": 1}


# --- checkpoints ---------------------------------------------------------------------------------------------------------------

TYPES: Mapping[str, tuple[str, np.dtype]] = {
    "bf16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "f16": ("F16", np.dtype(np.float16)),
    "f32": ("F32", np.dtype(np.float32)),
    "i64": ("I64", np.dtype(np.int64)),
}
NUMPY = dict(TYPES.values())
NEVER_CENTRED = {"mamba.gated_norm"}  # whole in every program: any bits will do
File = dict[str, tuple[str, tuple[int, ...], bytes]]  # name -> element type, shape, content


def save(
    model: Model, folder: Path, dialect: str, random: Random, options: Mapping[str, object], *, finite: bool = False
) -> Path:
    """Write a checkpoint of a model as a program does, its weights random bits, or ``finite``, and no file but the program's."""
    spelled = dialect_of(FAMILY[model.family], dialect)
    config = {**model.config, **ranked(spelled, options)} if spelled.ranked else model.config
    weights = numbers(model, random, finite=finite)
    units = [f"rank{rank}.safetensors" for rank in range(number(config, "world"))] if spelled.ranked else []
    files: dict[str, File] = {unit: {} for unit in units}  # of a rank whose layers do nothing, too
    for entry in entries(spelled, config, None):
        dtype = entry.dtype or str(config["dtype"])
        stored = fill(entry, weights, dtype, centred=less_one(spelled, config))
        file = f"{entry.unit}.safetensors" if spelled.ranked else "model.safetensors"
        files.setdefault(file, {})[entry.name] = (TYPES[dtype][0], entry.shape, stored.tobytes())
    folder.mkdir()
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    (folder / "config.json").write_text(json.dumps(said(model.family, dialect, config), indent=2) + "\n")
    return folder


def ranked(dialect: Dialect, options: Mapping[str, object]) -> Fields:
    """Return the fields that say how ranks share a model."""
    tp, pp, ep = (int(str(options[name])) for name in ("tp", "pp", "ep"))
    shared = options["parallel_embedding"] or (dialect.embedding if tp > 1 else "none")
    return {"tp": tp, "pp": pp, "world": tp * pp, "ep": ep, "moe_tp": tp // ep, "embedding": str(shared)}


def numbers(model: Model, random: Random, *, finite: bool = False) -> dict[str, np.ndarray]:
    """Return random weights for every canonical tensor: any bits at all, but numbers where a program may add or cast, or everywhere."""
    generator = np.random.default_rng(random.randint(0, 1 << 32))
    item = TYPES[str(model.config["dtype"])][1]
    found: dict[str, np.ndarray] = {}
    for name, shape in canonical_shapes(model.config).items():
        if (name.tensor.role == NORM and name.tensor.part not in NEVER_CENTRED) or ".router" in name:
            # one and less are exact in every type, and so is their difference
            found[name] = 1 + generator.integers(0, 128, shape) / 128
        elif name == "draft.tokens":
            found[name] = generator.integers(0, 99, shape)
        elif finite:
            found[name] = (generator.integers(-128, 128, shape, np.int16) / np.float32(1024)).astype(item)
        else:
            found[name] = np.frombuffer(generator.bytes(item.itemsize * prod(shape)), item).reshape(shape)
    return found


def fill(entry: Entry, weights: Mapping[str, np.ndarray], dtype: str, *, centred: Container[str]) -> np.ndarray:
    """Return a stored tensor, each element put where the views say it is."""
    item = TYPES[dtype][1]
    stored = np.zeros(entry.shape, item)
    for view in entry.views:
        box = tuple(slice(start, start + length) for start, length in zip(view.box.start, view.box.shape, strict=True))
        part = weights[view.tensor][box]
        if part.dtype == np.float64:
            part = (part - (canonical(view.tensor).tensor.part in centred)).astype(item)
        index = [np.full(view.box.shape, origin) for origin in view.origin]
        for axis, (dim, stride) in enumerate(view.places):
            index[dim] = index[dim] + np.indices(view.box.shape)[axis] * stride
        bits = f"u{item.itemsize}"
        stored.view(bits)[tuple(index)] = part.view(bits)
    return stored


def save_file(tensors: File, path: Path) -> None:
    """Write a file as https://github.com/huggingface/safetensors#format says."""
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def load(folder: Path, files: str = "*.safetensors") -> File:
    """Return every tensor of a folder, read by safetensors itself; shards are one name space, ranks are not."""
    found: File = {}
    for path in sorted(folder.glob(files)):
        unit = "" if path.name.startswith("model") else f"{path.stem}/"
        found |= {
            unit + name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
            for name, tensor in deserialize(path.read_bytes())
        }
    return found

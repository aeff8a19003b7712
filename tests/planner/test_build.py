"""Whole plans against an explicit numpy oracle: checkpoints made by hand in memory, steps carried out one by one, no file anywhere."""

import itertools
import json
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carnet.algebra.box import Box
from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.formats.stored import Checkpoint, Chunk, Stored
from carnet.planner.build import build
from carnet.plans.columns import Plan
from carnet.plans.request import Request
from carnet.steps import Fill, Make, Measure, Move, Product, Put, Same, kind

NOWHERE = Path("/a/folder/that/does/not/exist")
NUMPY: Mapping[str, np.dtype[np.generic]] = {
    "bf16": np.dtype(np.uint16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
}


# --- a model: canonical arrays of random bits ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """One small model; the arrays are named and shaped as people think of them, not as any program stores them."""

    family: str
    n: Mapping[str, int]  # lengths: layers hidden kv rep dim ffn vocab positions
    tied: bool
    biases: bool
    tensors: Mapping[str, np.ndarray]  # embed, position, final, final_bias, head
    layers: tuple[Mapping[str, np.ndarray], ...]


def make_model(family, n, *, tied, biases, seed=0):
    numbers = np.random.default_rng(seed)

    def bits(*shape):
        return numbers.integers(0, 1 << 16, shape, np.uint16)

    gpt2 = family == "gpt2"
    hidden, heads, kv, ffn = n["hidden"], (n["kv"], n["rep"], n["dim"]), (n["kv"], n["dim"]), n["ffn"]
    tensors = {"embed": bits(n["vocab"], hidden), "final": bits(hidden)}
    tensors |= {} if tied else {"head": bits(n["vocab"], hidden)}
    tensors |= {"position": bits(n["positions"], hidden), "final_bias": bits(hidden)} if gpt2 else {}
    layers = []
    for _ in range(n["layers"]):
        layer = {
            "norm1": bits(hidden),
            "norm2": bits(hidden),
            "q": bits(*heads, hidden),
            "k": bits(*kv, hidden),
            "v": bits(*kv, hidden),
        }
        layer |= {"o": bits(hidden, *heads), "up": bits(ffn, hidden), "down": bits(hidden, ffn)}
        layer |= {"norm1_bias": bits(hidden), "norm2_bias": bits(hidden)} if gpt2 else {"gate": bits(ffn, hidden)}
        if biases:
            layer |= {"q_bias": bits(*heads), "k_bias": bits(*kv), "v_bias": bits(*kv), "o_bias": bits(hidden)}
            layer |= {"up_bias": bits(ffn), "down_bias": bits(hidden)} | ({} if gpt2 else {"gate_bias": bits(ffn)})
        layers.append(layer)
    return Model(family, n, tied, biases, tensors, tuple(layers))


@st.composite
def models(draw, family):
    """A model that can be cut for one, two and four ranks."""
    kv = draw(st.sampled_from((1, 2, 4)))
    rep = 4 // kv * draw(st.integers(1, 2))
    dim = draw(st.integers(1, 3))
    if family == "gpt2":
        kv, rep = 4, 1
    n = {
        "layers": draw(st.integers(2, 3)),
        "hidden": kv * rep * dim if family == "gpt2" else 4 * draw(st.integers(1, 3)),
        "kv": kv,
        "rep": rep,
        "dim": dim,
        "ffn": 4 * draw(st.integers(1, 3)),
        "vocab": draw(st.integers(1, 9)),
        "positions": draw(st.integers(1, 4)),
    }
    biases = family == "gpt2" or draw(st.booleans())
    return make_model(family, n, tied=draw(st.booleans()), biases=biases, seed=draw(st.integers(0, 1 << 16)))


# --- how each program stores it: config and {(unit, name): array} ------------------------------------------------------------------


def rows(array, n):
    """Fold every axis but the last one."""
    return array.reshape(-1, n["hidden"])


def hf(model):
    return hf_gpt2(model) if model.family == "gpt2" else hf_llama(model)


def hf_llama(model):
    n, t = model.n, model.tensors
    found = {"model.embed_tokens.weight": t["embed"], "model.norm.weight": t["final"]}
    found |= {} if model.tied else {"lm_head.weight": t["head"]}
    for number, layer in enumerate(model.layers):
        top = f"model.layers.{number}."
        found |= {f"{top}self_attn.{x}_proj.weight": rows(layer[x], n) for x in "qkv"}
        found |= {f"{top}self_attn.o_proj.weight": layer["o"].reshape(n["hidden"], -1)}
        found |= {f"{top}mlp.{x}_proj.weight": layer[x] for x in ("gate", "up", "down")}
        found |= {f"{top}input_layernorm.weight": layer["norm1"], f"{top}post_attention_layernorm.weight": layer["norm2"]}
        if model.biases:
            found |= {f"{top}self_attn.{x}_proj.bias": layer[f"{x}_bias"].reshape(-1) for x in "qkvo"}
            found |= {f"{top}mlp.{x}_proj.bias": layer[f"{x}_bias"] for x in ("gate", "up", "down")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": n["layers"],
        "hidden_size": n["hidden"],
        "num_attention_heads": n["kv"] * n["rep"],
        "num_key_value_heads": n["kv"],
        "head_dim": n["dim"],
        "intermediate_size": n["ffn"],
        "vocab_size": n["vocab"],
        "max_position_embeddings": n["positions"],
        "attention_bias": model.biases,
        "mlp_bias": model.biases,
        "tie_word_embeddings": model.tied,
        "torch_dtype": "bfloat16",
    }
    return "hf", config, {("", name): array for name, array in found.items()}


def hf_gpt2(model):
    n, t = model.n, model.tensors
    found = {"transformer.wte.weight": t["embed"], "transformer.wpe.weight": t["position"]}
    found |= {"transformer.ln_f.weight": t["final"], "transformer.ln_f.bias": t["final_bias"]}
    found |= {} if model.tied else {"lm_head.weight": t["head"]}
    for number, layer in enumerate(model.layers):
        top = f"transformer.h.{number}."
        found |= {
            f"{top}attn.c_attn.weight": np.concatenate([rows(layer[x], n) for x in "qkv"]).T,
            f"{top}attn.c_attn.bias": np.concatenate([layer[f"{x}_bias"].reshape(-1) for x in "qkv"]),
            f"{top}attn.c_proj.weight": layer["o"].reshape(n["hidden"], -1).T,
            f"{top}attn.c_proj.bias": layer["o_bias"],
            f"{top}mlp.c_fc.weight": layer["up"].T,
            f"{top}mlp.c_fc.bias": layer["up_bias"],
            f"{top}mlp.c_proj.weight": layer["down"].T,
            f"{top}mlp.c_proj.bias": layer["down_bias"],
            f"{top}ln_1.weight": layer["norm1"],
            f"{top}ln_1.bias": layer["norm1_bias"],
            f"{top}ln_2.weight": layer["norm2"],
            f"{top}ln_2.bias": layer["norm2_bias"],
        }
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": n["layers"],
        "n_embd": n["hidden"],
        "n_head": n["kv"],
        "n_inner": n["ffn"],
        "vocab_size": n["vocab"],
        "n_positions": n["positions"],
        "tie_word_embeddings": model.tied,
        "dtype": "bfloat16",
    }
    return "hf", config, {("", name): array for name, array in found.items()}


def megatron(model, *, norms="te", stacked=True, padded=0):
    """Store as megatron-core does; ``padded`` rows of rubbish follow the vocabulary."""
    n, t = model.n, model.tensors
    rubbish = np.full((padded, n["hidden"]), 0xDEAD, np.uint16)
    found = {
        "embedding.word_embeddings.weight": np.concatenate([t["embed"], rubbish]),
        "decoder.final_layernorm.weight": t["final"],
    }
    found |= {} if model.tied else {"output_layer.weight": np.concatenate([t["head"], rubbish])}
    if model.family == "gpt2":
        found |= {"embedding.position_embeddings.weight": t["position"], "decoder.final_layernorm.bias": t["final_bias"]}
    layers = [megatron_layer(model, layer, norms) for layer in model.layers]
    for name in layers[0]:
        if stacked:
            found[f"decoder.layers.{name}"] = np.stack([layer[name] for layer in layers])
        else:
            found |= {f"decoder.layers.{number}.{name}": layer[name] for number, layer in enumerate(layers)}
    config = {
        "num_layers": n["layers"],
        "hidden_size": n["hidden"],
        "num_attention_heads": n["kv"] * n["rep"],
        "group_query_attention": True,
        "num_query_groups": n["kv"],
        "kv_channels": n["dim"],
        "ffn_hidden_size": n["ffn"],
        "vocab_size": n["vocab"],
        "max_position_embeddings": n["positions"],
        "normalization": "LayerNorm" if model.family == "gpt2" else "RMSNorm",
        "swiglu": model.family == "llama",
        "bias_gelu_fusion": model.family == "gpt2",
        "add_bias_linear": model.biases,
        "position_embedding_type": "learned_absolute" if model.family == "gpt2" else "rope",
        "untie_embeddings_and_output_weights": not model.tied,
        "params_dtype": "torch.bfloat16",
    }
    return "megatron", config, {("", name): array for name, array in found.items()}


def megatron_layer(model, layer, norms):
    n = model.n
    first, second = {
        "te": ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"),
        "local": ("input_layernorm.", "pre_mlp_layernorm."),
    }[norms]
    groups = [np.concatenate([rows(layer[x][g], n) for x in "qkv"]) for g in range(n["kv"])]
    found = {
        f"{first}weight": layer["norm1"],
        f"{second}weight": layer["norm2"],
        "self_attention.linear_qkv.weight": np.concatenate(groups),
        "self_attention.linear_proj.weight": layer["o"].reshape(n["hidden"], -1),
        "mlp.linear_fc1.weight": np.concatenate([layer[x] for x in ("gate", "up") if x in layer]),
        "mlp.linear_fc2.weight": layer["down"],
    }
    if model.family == "gpt2":
        found |= {f"{first}bias": layer["norm1_bias"], f"{second}bias": layer["norm2_bias"]}
    if model.biases:
        biases = [np.concatenate([layer[f"{x}_bias"][g].reshape(-1) for x in "qkv"]) for g in range(n["kv"])]
        found["self_attention.linear_qkv.bias"] = np.concatenate(biases)
        found["self_attention.linear_proj.bias"] = layer["o_bias"]
        found["mlp.linear_fc1.bias"] = np.concatenate([layer[x] for x in ("gate_bias", "up_bias") if x in layer])
        found["mlp.linear_fc2.bias"] = layer["down_bias"]
    return found


def trtllm(model, *, tp=1, pp=1, embedding="none"):
    n, found = model.n, {}
    head = model.tensors["embed" if model.tied else "head"]
    head = np.concatenate([head, np.zeros((-n["vocab"] % tp, n["hidden"]), np.uint16)])
    for stage, numbers in enumerate(np.array_split(np.arange(n["layers"]), pp)):
        for place in range(tp):
            mine = trtllm_rank(model, numbers, tp, place)
            if stage == 0:
                mine["transformer.vocab_embedding.weight"] = embedding_of(model, tp, place, embedding)
                mine |= {"transformer.position_embedding.weight": model.tensors["position"]} if model.family == "gpt2" else {}
            if stage == pp - 1:
                mine |= {"transformer.ln_f.weight": model.tensors["final"], "lm_head.weight": np.split(head, tp)[place]}
                mine |= {"transformer.ln_f.bias": model.tensors["final_bias"]} if model.family == "gpt2" else {}
            found |= {(f"rank{stage * tp + place}", name): array for name, array in mine.items()}
    config = {
        "architecture": "GPT2LMHeadModel" if model.family == "gpt2" else "LlamaForCausalLM",
        "num_hidden_layers": n["layers"],
        "hidden_size": n["hidden"],
        "num_attention_heads": n["kv"] * n["rep"],
        "num_key_value_heads": n["kv"],
        "head_size": n["dim"],
        "intermediate_size": n["ffn"],
        "vocab_size": n["vocab"],
        "max_position_embeddings": n["positions"],
        "hidden_act": "gelu_new" if model.family == "gpt2" else "silu",
        "dtype": "bfloat16",
        "mapping": {"tp_size": tp, "pp_size": pp, "world_size": tp * pp},
        "use_parallel_embedding": embedding != "none",
        "embedding_sharding_dim": int(embedding == "columns"),
        "tie_word_embeddings": model.tied,
    }
    config |= {} if model.family == "gpt2" else {"attn_bias": model.biases, "mlp_bias": model.biases}
    return "trtllm", config, found


def embedding_of(model, tp, place, embedding):
    whole = model.tensors["embed"]
    if embedding == "rows":
        return np.split(np.concatenate([whole, np.zeros((-len(whole) % tp, whole.shape[1]), np.uint16)]), tp)[place]
    return np.split(whole, tp, axis=1)[place] if embedding == "columns" else whole


def trtllm_rank(model, numbers, tp, place):
    n, found = model.n, {}
    heads = np.array_split(np.arange(n["kv"] * n["rep"]), tp)[place]
    groups = sorted({head // n["rep"] for head in heads})

    def queries(array):
        return array.reshape(n["kv"] * n["rep"], n["dim"], *array.shape[3:])[heads]

    for at, number in enumerate(numbers):
        top, layer = f"transformer.layers.{at}.", model.layers[number]
        outputs = layer["o"].reshape(n["hidden"], n["kv"] * n["rep"], n["dim"])[:, heads]
        found |= {
            f"{top}input_layernorm.weight": layer["norm1"],
            f"{top}post_layernorm.weight": layer["norm2"],
            f"{top}attention.qkv.weight": np.concatenate(
                [rows(queries(layer["q"]), n), rows(layer["k"][groups], n), rows(layer["v"][groups], n)]
            ),
            f"{top}attention.dense.weight": outputs.reshape(n["hidden"], -1),
            f"{top}mlp.proj.weight": np.split(layer["down"], tp, axis=1)[place],
        }
        both = {"fc": "up"} if model.family == "gpt2" else {"fc": "gate", "gate": "up"}
        found |= {f"{top}mlp.{stored}.weight": np.split(layer[x], tp)[place] for stored, x in both.items()}
        if model.family == "gpt2":
            found |= {f"{top}input_layernorm.bias": layer["norm1_bias"], f"{top}post_layernorm.bias": layer["norm2_bias"]}
        if model.biases:
            qkv = [queries(layer["q_bias"]), layer["k_bias"][groups], layer["v_bias"][groups]]
            found[f"{top}attention.qkv.bias"] = np.concatenate([part.reshape(-1) for part in qkv])
            found |= {f"{top}attention.dense.bias": layer["o_bias"], f"{top}mlp.proj.bias": layer["down_bias"]}
            found |= {f"{top}mlp.{stored}.bias": np.split(layer[f"{x}_bias"], tp)[place] for stored, x in both.items()}
    return found


# --- a checkpoint in memory, cut into chunks at random ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    checkpoint: Checkpoint
    files: Mapping[str, bytearray]


def chunked(dialect, config, tensors, *, seed=0, dtype="bf16"):
    """Lay tensors into three files: random grids of chunks, in random order, rubbish between, now and then transposed."""
    chance = random.Random(seed)
    files = {f"part{at}.bin": bytearray(b"\xaa" * 16) for at in range(3)}
    stored = {}
    for (unit, name), array in tensors.items():
        chunks = []
        for box in grid(array.shape, chance):
            file = chance.choice(list(files))
            files[file] += b"\xaa" * (array.itemsize * chance.choice((0, 0, 1, 5)))
            part = array[tuple(slice(s, s + n) for s, n in zip(box.start, box.shape, strict=True))]
            order = chance.sample(range(part.ndim), part.ndim) if chance.random() < 0.15 else list(range(part.ndim))
            laid = np.ascontiguousarray(part.transpose(order))
            strides = [laid.strides[order.index(axis)] // array.itemsize for axis in range(part.ndim)]
            chunks.append(Chunk(box, file, len(files[file]), tuple(strides)))
            files[file] += laid.tobytes()
        chance.shuffle(chunks)
        stored[unit, name] = Stored(unit, name, dtype, array.shape, tuple(chunks))
    checkpoint = Checkpoint(NOWHERE, dialect, "by hand", config, stored, {}, (), "digest", {})
    return Source(checkpoint, files)


def grid(shape, chance):
    """Cut along rows, columns, both or neither, anywhere: through the middle of a head too."""
    spans = []
    for length in shape:
        inner = chance.sample(range(1, length), min(length - 1, chance.choice((0, 0, 1, 2)))) if length > 1 else []
        spans.append(list(itertools.pairwise([0, *sorted(inner), length])))
    return [Box(tuple(a for a, _ in each), tuple(b - a for a, b in each)) for each in itertools.product(*spans)]


# --- carrying out a plan, one step after the other --------------------------------------------------------------------------------


def array_at(place, shape, files):
    kind = NUMPY[place.dtype]
    strides = tuple(stride * kind.itemsize for stride in place.strides)
    return np.ndarray(shape, kind, files[place.file], place.offset, strides)  # numpy refuses what leaves the file


def carried_out(plan: Plan, files):
    """Return {(unit, name): array} of the target; each element is written once, into bytes that were rubbish before."""
    out = {file.name: bytearray(b"\x55" * file.nbytes) for file in plan.files}
    for step in plan.steps:
        match step:
            case Move() if kind(step) == "copy":
                array_at(step.target, step.shape, out)[...] = array_at(step.source, step.shape, files)
            case Move():
                assert (step.source.dtype, step.target.dtype, step.add) == ("bf16", "f32", 0)  # no norm here is stored less one
                wide = array_at(step.source, step.shape, files).astype(np.uint32) << 16
                array_at(step.target, step.shape, out)[...] = wide.view(np.float32)
            case Fill():
                array_at(step.target, step.shape, out)[...] = 0
            case Same():
                assert (array_at(step.source, step.shape, files) == array_at(step.other, step.shape, files)).all()
            case Make() | Product() | Measure() | Put():
                raise AssertionError("nothing here is quantized, nor computed")
    return {
        (PurePosixPath(file.name).stem if file.name.startswith("rank") else "", tensor.name): np.frombuffer(
            out[file.name], NUMPY[tensor.dtype], int(np.prod(tensor.shape)), tensor.offset
        ).reshape(tensor.shape)
        for file in plan.files
        for tensor in file.tensors
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, array in expected.items():
        assert found[key].shape == array.shape, key
        assert found[key].tobytes() == np.ascontiguousarray(array).tobytes(), key


# --- every dialect into every other ------------------------------------------------------------------------------------------------


def drawn_ranks(tp, pp, model, draw):
    return trtllm(model, tp=tp, pp=pp, embedding=draw(st.sampled_from(("none", "rows", "columns"))))


SOURCES: Mapping[str, Callable] = {
    "megatron te stacked": lambda model, draw: megatron(model, padded=draw(st.integers(0, 5))),
    "megatron local stacked": lambda model, draw: megatron(model, norms="local", padded=draw(st.integers(0, 5))),
    "megatron te by layer": lambda model, draw: megatron(model, stacked=False, padded=draw(st.integers(0, 5))),
    "hf": lambda model, draw: hf(model),
    **{f"trtllm tp{tp} pp{pp}": partial(drawn_ranks, tp, pp) for tp in (1, 2, 4) for pp in (1, 2)},
}
TARGETS = ("hf", *(name for name in SOURCES if name.startswith("trtllm")))


def wanted(name, model, embedding):
    """Return the request for a target, and what the oracle says it is."""
    if name == "hf":
        return Request("hf"), hf(model)[2]
    tp, pp = int(name.split()[1][2:]), int(name.split()[2][2:])
    return Request("trtllm", tp=tp, pp=pp, parallel_embedding=embedding), trtllm(model, tp=tp, pp=pp, embedding=embedding)[2]


@settings(deadline=None, max_examples=6)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("kind", "target"), list(itertools.product(SOURCES, TARGETS)))
@given(data=st.data())
def test_a_crossing_gives_what_numpy_gives(family, kind, target, data):
    model = data.draw(models(family))
    source = chunked(*SOURCES[kind](model, data.draw), seed=data.draw(st.integers(0, 1 << 16)))
    request, expected = wanted(target, model, data.draw(st.sampled_from(("none", "rows", "columns"))))
    assert_same(carried_out(build(source.checkpoint, request), source.files), expected)


@settings(deadline=None, max_examples=20)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@given(data=st.data())
def test_a_model_that_went_abroad_and_came_back_is_the_same_with_the_configs_that_were_written(family, data):
    model = data.draw(models(family))
    dialect, config, tensors = hf(model)
    home = tensors
    for request in (
        Request("trtllm", tp=4, parallel_embedding="rows"),
        Request("hf"),
        Request("trtllm", tp=2, pp=2),
        Request("hf"),
    ):
        source = chunked(dialect, config, tensors, seed=data.draw(st.integers(0, 1 << 16)))
        plan = build(source.checkpoint, request)
        tensors = carried_out(plan, source.files)
        dialect, config = request.to, next(json.loads(text.text) for text in plan.texts if text.name == "config.json")
    assert_same(tensors, home)


LLAMA_SIZES = {"layers": 2, "hidden": 8, "kv": 2, "rep": 2, "dim": 2, "ffn": 8, "vocab": 5, "positions": 4}
LLAMA = make_model("llama", LLAMA_SIZES, tied=False, biases=False)
TIED = make_model("llama", LLAMA_SIZES, tied=True, biases=False)


def test_one_file_becomes_many_where_a_file_may_hold_less():
    source = chunked(*hf(LLAMA))
    plan = build(source.checkpoint, Request("hf", shard_size=300))
    assert_same(carried_out(plan, source.files), hf(LLAMA)[2])
    index = json.loads(next(text.text for text in plan.texts if text.name == "model.safetensors.index.json"))
    assert index["weight_map"] == {tensor.name: file.name for file in plan.files for tensor in file.tensors}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in hf(LLAMA)[2].values())
    assert [file.name for file in plan.files] == [
        f"model-{n:05}-of-{len(plan.files):05}.safetensors" for n in range(1, len(plan.files) + 1)
    ]
    assert all(len(file.tensors) == 1 or file.nbytes - file.tensors[0].offset <= 300 for file in plan.files)


def test_a_cast_widens_every_element():
    source = chunked(*hf(LLAMA))
    found = carried_out(build(source.checkpoint, Request("hf", dtype="f32")), source.files)
    assert_same(found, {key: (array.astype(np.uint32) << 16).view(np.float32) for key, array in hf(LLAMA)[2].items()})


def test_a_tied_head_that_is_stored_all_the_same_is_compared_with_the_embedding_and_not_kept_twice():
    dialect, config, tensors = hf(TIED)
    source = chunked(dialect, config, tensors | {("", "lm_head.weight"): TIED.tensors["embed"]})
    plan = build(source.checkpoint, Request("hf"))
    assert_same(carried_out(plan, source.files), tensors)
    compared = [step for step in plan.steps if isinstance(step, Same)]
    assert {step.tensor for step in compared} == {"embed"}
    assert sum(int(np.prod(step.shape)) for step in compared) == TIED.tensors["embed"].size


def test_copies_on_ranks_are_compared_and_counted():
    source = chunked(*trtllm(LLAMA, tp=4), seed=3)
    plan = build(source.checkpoint, Request("hf"))
    assert {step.tensor.split(".")[-1] for step in plan.steps if isinstance(step, Same)} == {
        "embed",
        "final_norm",
        "attention_norm",
        "mlp_norm",
        "k",
        "v",
    }
    assert plan.proof["copies checked equal"] == sum(isinstance(step, Same) for step in plan.steps)


def test_the_proof_counts_every_byte():
    source = chunked(*megatron(LLAMA, padded=3))
    plan = build(source.checkpoint, Request("trtllm", tp=2))
    expected = trtllm(LLAMA, tp=2)[2]
    assert plan.proof == {
        "source tensors": 9,
        "source bytes": sum(array.nbytes for array in megatron(LLAMA, padded=3)[2].values()),
        "source padding bytes": 2 * 3 * 8 * 2,
        "copies checked equal": 0,
        "target tensors": len(expected),
        "target bytes": sum(array.nbytes for array in expected.values()),
        "target padding bytes": 1 * 8 * 2,
        "vocabulary rows": 8,
        "vocabulary rows left out": 3,
    }


def test_the_same_checkpoint_gives_the_same_plan():
    assert build(chunked(*hf(LLAMA)).checkpoint, Request("hf")) == build(chunked(*hf(LLAMA)).checkpoint, Request("hf"))


def by_layers(layers):
    """Return a checkpoint of records alone: nine small tensors a layer, one chunk each."""
    config = {**hf(LLAMA)[1], "num_hidden_layers": layers}
    one = {name: stored for (_, name), stored in chunked(*hf(LLAMA)).checkpoint.tensors.items() if ".layers.1." not in name}
    tensors, offset = {}, 8
    for name, stored in one.items():
        for layer in range(layers if ".layers." in name else 1):
            spelled = name.replace(".0.", f".{layer}.")
            whole = Chunk(Box((0,) * len(stored.shape), stored.shape), "all.bin", offset, (*stored.shape[1:], 1))
            tensors["", spelled] = Stored("", spelled, "bf16", stored.shape, (whole,))
            offset += 2 * int(np.prod(stored.shape))
    return Checkpoint(NOWHERE, "hf", "by hand", config, tensors, {}, (), "digest", {})


def test_a_hundred_thousand_tensors_are_planned():
    plan = build(by_layers(11_111), Request("hf"))
    assert plan.proof["source tensors"] == plan.proof["target tensors"] == len(plan.steps) == 9 * 11_111 + 3


# --- refusals ----------------------------------------------------------------------------------------------------------------------


def changed(source, key, **fields):
    tensors = dict(source.checkpoint.tensors)
    tensors[key] = replace(tensors[key], **fields)
    return replace(source.checkpoint, tensors=tensors)


UP = ("", "model.layers.1.mlp.up_proj.weight")


def test_an_unknown_tensor_is_refused_by_name():
    dialect, config, tensors = hf(LLAMA)
    strange = chunked(dialect, config, tensors | {("", "model.layers.1.mlp.router.weight"): LLAMA.tensors["final"]})
    with pytest.raises(NotSupported) as caught:
        build(strange.checkpoint, Request("hf"))
    assert str(caught.value) == (
        "the checkpoint holds a tensor that carnet does not know\n"
        f"  where       {NOWHERE}\n"
        "  tensor      model.layers.1.mlp.router.weight\n"
        "  in all      1\n"
        "  looks like  a part of a mixture\n"
        "  try: look whether the config is that of these weights: a model of its class has no such tensor"
    )
    plan = build(strange.checkpoint, Request("hf", drop=("*.router.weight",)))
    assert_same(carried_out(plan, strange.files), tensors)
    assert plan.dropped == {"--drop *.router.weight": ("model.layers.1.mlp.router.weight",)}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.layers.1.self_attn.q_proj.lora_A.default.weight", "an adapter"),
        ("decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight", "an adapter"),
        ("model.layers.0.self_attn.qkv_proj.weight", "a joined projection"),
        ("model.layers.0.self_attn.q_norm.weight", "a norm"),
        ("model.layers.0.self_attn.q_proj.bias", "a bias"),
    ],
)
def test_what_the_model_computes_with_is_never_offered_to_be_dropped(name, what):
    dialect, config, tensors = hf(LLAMA)
    strange = chunked(dialect, config, tensors | {("", name): LLAMA.tensors["final"]})
    with pytest.raises(NotSupported) as caught:
        build(strange.checkpoint, Request("hf"))
    assert caught.value.facts["looks like"] == what
    assert "--drop" not in str(caught.value)


def test_one_pattern_leaves_all_strange_tensors_behind_and_none_of_the_model_s():
    dialect, config, tensors = hf(LLAMA)
    tower = {("", f"visual.blocks.{number}.w"): LLAMA.tensors["final"] for number in range(3)}
    strange = chunked(dialect, config, tensors | tower)
    with pytest.raises(NotSupported, match=r"--drop 'visual\.blocks\.\*' if it may be left behind"):
        build(strange.checkpoint, Request("hf"))
    assert_same(carried_out(build(strange.checkpoint, Request("hf", drop=("visual.blocks.*",))), strange.files), tensors)


def test_a_missing_tensor_is_refused_by_name():
    dialect, config, tensors = hf(LLAMA)
    del tensors[UP]
    with pytest.raises(BadCheckpoint) as caught:
        build(chunked(dialect, config, tensors).checkpoint, Request("hf"))
    assert caught.value.what == "the checkpoint lacks 'layers.1.mlp.up'"
    assert "layers.{layer}.mlp.up_proj.weight" in str(caught.value.facts["looked for"])


def test_a_missing_rank_is_refused_with_the_part_that_it_held():
    dialect, config, tensors = trtllm(LLAMA, tp=2)
    del tensors["rank1", "transformer.layers.0.mlp.fc.weight"]
    with pytest.raises(BadCheckpoint) as caught:
        build(chunked(dialect, config, tensors).checkpoint, Request("hf"))
    assert caught.value.what == "the checkpoint lacks 'layers.0.mlp.gate'"
    assert caught.value.facts["missing part"] == "start [4, 0], shape [4, 8] of [8, 8]"


def test_a_wrong_shape_is_refused_by_name():
    dialect, config, tensors = hf(LLAMA)
    with pytest.raises(BadCheckpoint) as caught:
        build(chunked(dialect, config, tensors | {UP: LLAMA.layers[1]["up"][:6]}).checkpoint, Request("hf"))
    assert caught.value.what == "the shape of 'model.layers.1.mlp.up_proj.weight' contradicts the config"
    assert caught.value.facts["found"] == [6, 8]
    assert caught.value.facts["expected"] == [8, 8]


def test_a_transposed_tensor_is_refused():
    dialect, config, tensors = hf(LLAMA)
    key = ("", "lm_head.weight")
    with pytest.raises(BadCheckpoint, match=r"the shape of 'lm_head\.weight' contradicts the config"):
        build(chunked(dialect, config, tensors | {key: tensors[key].T}).checkpoint, Request("hf"))


HALVES = (Chunk(Box((0, 0), (4, 8)), "half0.bin", 16, (8, 1)), Chunk(Box((4, 0), (4, 8)), "half1.bin", 16, (8, 1)))
BROKEN = [
    ("a chunk is missing", HALVES[:1]),
    ("no chunk is there", ()),
    ("a chunk is a row short", (HALVES[0], replace(HALVES[1], box=Box((4, 0), (3, 8))))),
    ("a chunk is a column short", (HALVES[0], replace(HALVES[1], box=Box((4, 0), (4, 7))))),
]


@pytest.mark.parametrize(("remark", "chunks"), BROKEN, ids=[row[0] for row in BROKEN])
def test_a_tensor_is_refused_by_name_where(remark, chunks):
    checkpoint = changed(chunked(*hf(LLAMA)), UP, chunks=chunks)
    with pytest.raises(BadCheckpoint) as caught:
        build(checkpoint, Request("hf"))
    assert caught.value.what == "the chunks of 'layers.1.mlp.up' do not make up the whole tensor"


def test_chunks_that_overlap_are_compared_where_they_do():
    halves = (HALVES[0], replace(HALVES[1], box=Box((3, 0), (5, 8))))
    plan = build(changed(chunked(*hf(LLAMA)), UP, chunks=halves), Request("hf"))
    assert [(step.start, step.shape) for step in plan.steps if isinstance(step, Same)] == [((3, 0), (1, 8))]


def test_parts_of_one_target_tensor_with_two_element_types_are_refused_by_its_name():
    source = chunked(*hf(LLAMA))
    checkpoint = changed(source, ("", "model.layers.0.self_attn.k_proj.weight"), dtype="f16")
    with pytest.raises(NotSupported) as caught:
        build(checkpoint, Request("trtllm"))
    assert caught.value.what == "the parts of 'transformer.layers.0.attention.qkv.weight' have different element types"
    assert caught.value.facts["found"] == "bf16, f16"


def test_a_pattern_to_drop_that_meets_nothing_is_refused():
    with pytest.raises(BadRequest, match="nothing in the checkpoint"):
        build(chunked(*hf(LLAMA)).checkpoint, Request("hf", drop=("*.nothing",)))


def test_an_object_that_nobody_knows_is_refused_by_name():
    checkpoint = replace(chunked(*megatron(LLAMA)).checkpoint, objects={"rng_state/shard_0": 9, "a_surprise/shard_0": 9})
    with pytest.raises(NotSupported) as caught:
        build(checkpoint, Request("hf"))
    assert caught.value.facts["name"] == "a_surprise/shard_0"


def test_a_target_for_everybody_is_not_cut_for_ranks():
    for request in (Request("hf", tp=2), Request("hf", pp=2), Request("hf", parallel_embedding="rows")):
        with pytest.raises(BadRequest, match="is not cut for ranks"):
            build(chunked(*hf(LLAMA)).checkpoint, request)


# --- pure ---------------------------------------------------------------------------------------------------------------------------

AUDITED = """
import runpy, sys
this = runpy.run_path({path!r})
source = this["chunked"](*this["megatron"](this["LLAMA"], padded=3))
def listen(event, arguments):
    if event.split(".")[0] in ("open", "os", "pathlib", "glob", "socket", "subprocess", "shutil", "import"):
        raise SystemExit(f"the planner did {{event}} {{arguments}}")
sys.addaudithook(listen)
plan = this["build"](source.checkpoint, this["Request"]("trtllm", tp=2))
sys.stdout.write(f"{{len(plan.steps) > 0}}")
"""


def test_the_planner_opens_no_file_and_looks_at_no_folder():
    program = textwrap.dedent(AUDITED).format(path=__file__)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("True", "", 0)

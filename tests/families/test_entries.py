"""Entries: what a target is written as is what a source is read as, and every canonical tensor is in it."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from carnet.architectures.gpt2 import GPT2
from carnet.architectures.known import FAMILIES, dialect_of
from carnet.architectures.llama import LLAMA
from carnet.dialects.entries import entries
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.units import units
from carnet.errors import BadRequest
from carnet.model.model import canonical_shapes, layers
from tests.families.samples import FAMILY, SAMPLES, cut, family_of, ranked
from tests.families.samples import draw as random_model

KINDS = [
    (name, kind)
    for name, sample in SAMPLES.items()
    for kind in ("megatron te", "megatron local", "hf", "trtllm")
    if kind.split()[0] in sample.dialects.split()
]
UNLIKE = [
    family for family in FAMILIES if family.traits.get("hybrid") or family.name == "nemotron_nas"
]  # layer by layer always
RANKED = [name for name, kind in KINDS if kind == "trtllm"]
MEGATRONS = [(name, kind) for name, kind in KINDS if kind.startswith("megatron") and family_of(name) not in UNLIKE]
EXAMPLES = 10  # of each kind


@st.composite
def models(draw, name, kind):
    """A model of random size that a program can say; where it is for ranks, cut for some."""
    random, dialect = draw(st.randoms(use_true_random=False)), kind.split()[0]
    model = random_model(name, random, (dialect,))
    spelled = dialect_of(FAMILY[model.family], dialect)
    shares = ranked(spelled, cut(model, dialect, random)) if spelled.ranked else {"tp": 1, "pp": 1, "embedding": "none"}
    return {"mtp": 0, "padded_vocab": None, **model.config, "family": model.family, **shares}


def written(kind, config):
    dialect, _, spelling = kind.partition(" ")
    return list(entries(dialect_of(FAMILY[_family(config)], dialect), config, None, spelling))


def read_back(kind, config, present):
    return list(entries(dialect_of(FAMILY[_family(config)], kind.split()[0]), config, present))


def _family(config):
    return config.get("family") or ("gpt2" if config["norm"] == "layer" else "llama")


def keys(found):
    return {(entry.unit, entry.name) for entry in found}


def held(found, config):
    """Count how often each element of each canonical tensor lies in some entry."""
    count = {name: np.zeros(shape, np.int64) for name, shape in canonical_shapes(config).items()}
    for entry in found:
        for view in entry.views:
            count[view.tensor][tuple(slice(s, s + n) for s, n in zip(view.box.start, view.box.shape, strict=True))] += 1
    return count


@settings(deadline=None, max_examples=EXAMPLES)
@pytest.mark.parametrize(("family", "kind"), KINDS)
@given(data=st.data())
def test_a_target_that_is_read_back_as_a_source_is_the_same(family, kind, data):
    config = data.draw(models(family, kind))
    target = written(kind, config)
    assert read_back(kind, config, keys(target)) == target


@settings(deadline=None, max_examples=EXAMPLES)
@pytest.mark.parametrize(("family", "kind"), [pair for pair in KINDS if pair[1] != "trtllm"])
@given(data=st.data())
def test_a_target_for_everybody_holds_every_canonical_element_once(family, kind, data):
    config = data.draw(models(family, kind))
    # where layers that predict further tokens follow the others they may have the embedding and the head once more
    among = kind == "hf" and any(row.when.get("is_mtp") for row in family_of(family).hf.rows)
    again = dict.fromkeys(("embed", "head"), 1 + config["mtp"]) if among else {}
    found = held(written(kind, config), config)
    assert {name for name, count in found.items() if not (count == again.get(name, 1)).all()} == set()


@settings(deadline=None, max_examples=EXAMPLES)
@pytest.mark.parametrize("family", RANKED)
@given(data=st.data())
def test_ranks_hold_a_matrix_once_and_a_copy_of_what_is_not_cut(family, data):
    config = data.draw(models(family, "trtllm"))
    tp = config["tp"]
    cut_once = (
        "attention.q attention.o attention.q_bias mlp.gate mlp.up mlp.down mlp.gate_bias mlp.up_bias moe.gate moe.up moe.down"
    )
    copies = {
        "embed": (tp if config["embedding"] == "none" else 1) + config["tied"],
        "head": 1,
        **dict.fromkeys(f"{cut_once} shared.gate shared.up shared.down linear_mixer linear_mlp".split(), 1),
    }
    shared = [max(1, tp // layer.get("kv_heads", 1)) for layer in layers(config)]
    for name, count in held(written("trtllm", config), config).items():
        _, layer, tensor = name.split(".", 2) if name.startswith("layers.") else ("", 0, name)
        keys = shared[int(layer)] if tensor.startswith(("attention.k", "attention.v")) and "norm" not in tensor else None
        assert (count == (keys or copies.get(tensor, tp))).all(), name


@settings(deadline=None, max_examples=EXAMPLES)
@pytest.mark.parametrize(("family", "kind"), [pair for pair in KINDS if pair[1] != "megatron local"])
@given(data=st.data())
def test_every_stored_element_of_a_target_is_in_one_view_or_padding(family, kind, data):
    for entry in written(kind, data.draw(models(family, kind))):
        count = np.zeros(entry.shape, np.int64)
        for box in entry.padding:
            count[tuple(slice(s, s + n) for s, n in zip(box.start, box.shape, strict=True))] += 1
        for view in entry.views:
            index = [np.full(view.box.shape, origin) for origin in view.origin]
            for axis, (dim, stride) in enumerate(view.places):
                index[dim] = index[dim] + np.indices(view.box.shape)[axis] * stride
            np.add.at(count, tuple(index), 1)
        assert (count == 1).all(), entry.name
        assert (entry.padded != "") == bool(entry.padding)


def one_key_a_layer(found, config):
    """Return the keys of a model that is stored layer by layer, as Megatron does where its layers are not all alike."""
    numbered = ((unit, name.partition("decoder.layers.")) for unit, name in keys(found))
    return {
        (unit, f"{before}{at}{'' if not at else f'{layer}.'}{rest}")
        for unit, (before, at, rest) in numbered
        for layer in (range(config["layers"]) if at else [0])
    }


# models whose layers differ are drawn too
@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.filter_too_much])
@pytest.mark.parametrize(("family", "kind"), MEGATRONS)
@given(data=st.data())
def test_stacked_layers_and_one_key_a_layer_hold_the_same_boxes(family, kind, data):
    config = data.draw(models(family, kind))
    at_once = written(kind, config)
    assume(not any(part.isdigit() for entry in at_once for part in entry.name.split(".")))  # layers of one kind alone
    layer_by_layer = read_back(kind, config, one_key_a_layer(at_once, config))
    assert {(v.tensor, v.box) for e in at_once for v in e.views} == {(v.tensor, v.box) for e in layer_by_layer for v in e.views}
    one = {entry.name: entry for entry in layer_by_layer}
    for entry in at_once:
        if "layers." in entry.name:
            first = one[entry.name.replace("layers.", "layers.0.")]
            assert entry.shape == (config["layers"], *first.shape)
            assert [view.origin[0] for view in entry.views[:: len(first.views)]] == list(range(config["layers"]))


@settings(deadline=None, max_examples=EXAMPLES)
@given(data=st.data())
def test_a_padded_vocabulary_of_megatron_is_padding_past_the_true_one(data):
    config = data.draw(models("llama", "megatron te"))
    padded = config["vocab"] + data.draw(st.integers(1, 5))
    entry = written("megatron te", {**config, "padded_vocab": padded})[0]
    assert entry.name == "embedding.word_embeddings.weight"
    assert entry.shape == (padded, config["hidden"])
    assert [(box.start, box.shape) for box in entry.padding] == [
        ((config["vocab"], 0), (padded - config["vocab"], config["hidden"]))
    ]
    assert entry.padded == "embed"


SMALL: dict[str, str | int | float | None] = {
    "layers": 5,
    "hidden": 12,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 2,
    "ffn": 8,
    "vocab": 9,
    "positions": 7,
    "position": "rope",
    "tp": 1,
    "pp": 1,
    "tied": False,
    "embedding": "none",
}
LLAMA_SMALL = {**SMALL, **LLAMA.traits}
GPT2_SMALL = {**SMALL, **GPT2.traits, "kv_heads": 6, "tied": True}


def shapes(found):
    return {"/".join(filter(None, (entry.unit, entry.name))): entry.shape for entry in found}


def test_megatron_stores_a_llama_under_these_names_and_shapes():
    layer = "decoder.layers."
    assert shapes(written("megatron te", LLAMA_SMALL)) == {
        "embedding.word_embeddings.weight": (9, 12),
        layer + "self_attention.linear_qkv.layer_norm_weight": (5, 12),
        layer + "self_attention.linear_qkv.weight": (5, 20, 12),
        layer + "self_attention.linear_proj.weight": (5, 12, 12),
        layer + "mlp.linear_fc1.layer_norm_weight": (5, 12),
        layer + "mlp.linear_fc1.weight": (5, 16, 12),
        layer + "mlp.linear_fc2.weight": (5, 12, 8),
        "decoder.final_layernorm.weight": (12,),
        "output_layer.weight": (9, 12),
    }


def test_the_local_spelling_differs_in_the_name_of_the_norm_before_a_mixture_alone():
    assert shapes(written("megatron te", GPT2_SMALL)) == shapes(written("megatron local", GPT2_SMALL))
    mixture = {**LLAMA_SMALL, "experts": 4, "topk": 2, "moe_ffn": 8}
    fused, local = set(shapes(written("megatron te", mixture))), set(shapes(written("megatron local", mixture)))
    assert fused - local == {"decoder.layers.pre_mlp_layernorm.weight"}
    assert local - fused == {"decoder.layers.mlp.linear_fc1.layer_norm_weight"}


def test_a_rank_of_gpt2_has_these_names_and_shapes():
    found = shapes(written("trtllm", {**GPT2_SMALL, "layers": 1, "tp": 2}))
    rank = "rank1/transformer."
    layer = rank + "layers.0."
    assert {name: shape for name, shape in found.items() if name.startswith("rank1/")} == {
        rank + "vocab_embedding.weight": (9, 12),
        rank + "position_embedding.weight": (7, 12),
        layer + "input_layernorm.weight": (12,),
        layer + "input_layernorm.bias": (12,),
        layer + "attention.qkv.weight": (18, 12),
        layer + "attention.qkv.bias": (18,),
        layer + "attention.dense.weight": (12, 6),
        layer + "attention.dense.bias": (12,),
        layer + "post_layernorm.weight": (12,),
        layer + "post_layernorm.bias": (12,),
        layer + "mlp.fc.weight": (4, 12),
        layer + "mlp.fc.bias": (4,),
        layer + "mlp.proj.weight": (12, 4),
        layer + "mlp.proj.bias": (12,),
        rank + "ln_f.weight": (12,),
        rank + "ln_f.bias": (12,),
        "rank1/lm_head.weight": (5, 12),
    }


def test_ranks_are_numbered_stage_by_stage_and_the_first_stages_have_the_extra_layers():
    found = [
        (unit.name, unit.tensor.rank, list(unit.layers), unit.first, unit.last)
        for unit in units(LLAMA.trtllm, {**LLAMA_SMALL, "tp": 2, "pp": 3})
    ]
    assert found == [
        ("rank0", 0, [0, 1], True, False),
        ("rank1", 1, [0, 1], True, False),
        ("rank2", 0, [2, 3], False, False),
        ("rank3", 1, [2, 3], False, False),
        ("rank4", 0, [4], False, True),
        ("rank5", 1, [4], False, True),
    ]


def test_layers_of_every_stage_are_counted_from_0():
    found = shapes(written("trtllm", {**LLAMA_SMALL, "pp": 2}))
    numbers = defaultdict(set)
    for name in found:
        if ".layers." in name:
            numbers[name.split("/")[0]].add(int(name.split(".layers.")[1].split(".")[0]))
    assert numbers == {"rank0": {0, 1, 2}, "rank1": {0, 1}}


def test_more_ranks_than_kv_heads_hold_these_heads():
    found = {
        (entry.unit, view.tensor): (view.box.start[:2], view.box.shape[:2])
        for entry in written("trtllm", {**LLAMA_SMALL, "heads": 8, "layers": 1, "tp": 4})
        if entry.name.endswith("qkv.weight")
        for view in entry.views
    }
    q, k = "layers.0.attention.q", "layers.0.attention.k"
    assert [found[f"rank{rank}", q] for rank in range(4)] == [
        ((0, 0), (1, 2)),
        ((0, 2), (1, 2)),
        ((1, 0), (1, 2)),
        ((1, 2), (1, 2)),
    ]
    assert [found[f"rank{rank}", k][0][0] for rank in range(4)] == [0, 0, 1, 1]


def test_the_head_of_a_tied_model_is_stored_again_for_tensorrt_and_for_nobody_else():
    config = {**LLAMA_SMALL, "tied": True, "tp": 1}
    again = [entry for entry in written("trtllm", config) if entry.name == "lm_head.weight"]
    assert [view.tensor for view in again[0].views] == ["embed"]
    for kind in ("hf", "megatron te"):
        assert not [name for name in shapes(written(kind, config)) if "lm_head" in name or "output_layer" in name]


def test_a_tied_head_that_a_source_stores_all_the_same_is_read_as_the_embedding():
    config = {**LLAMA_SMALL, "tied": True}
    present = keys(written("hf", config)) | {("", "lm_head.weight")}
    found = {entry.name: entry for entry in read_back("hf", config, present)}
    assert [view.tensor for view in found["lm_head.weight"].views] == ["embed"]


PREFIXES = [
    ("hf", "model.", ""),
    ("hf", "model.", "model."),
    ("megatron te", "", "model."),
    ("megatron te", "", "module."),
    ("megatron te", "", "model.module."),
    ("megatron te", "", "model.module.module."),
]


@pytest.mark.parametrize(("kind", "usual", "other"), PREFIXES, ids=[f"{kind} under {other!r}" for kind, _, other in PREFIXES])
def test_a_source_may_have_this_prefix_before_every_name(kind, usual, other):
    target = written(kind, LLAMA_SMALL)
    renamed = [replace(e, name=e.name if e.name == "lm_head.weight" else other + e.name.removeprefix(usual)) for e in target]
    assert read_back(kind, LLAMA_SMALL, keys(renamed)) == renamed


def test_a_name_that_no_row_describes_is_nobodys_entry():
    present = {("", "model.norm.weight"), ("", "model.norm.scale"), ("", "model.layers.5.mlp.up_proj.weight")}
    assert keys(read_back("hf", LLAMA_SMALL, present)) == {("", "model.norm.weight")}


def test_a_bias_that_the_config_denies_is_nobodys_entry():
    present = {("", "model.norm.weight"), ("", "model.layers.0.self_attn.q_proj.bias")}
    assert keys(read_back("hf", LLAMA_SMALL, present)) == {("", "model.norm.weight")}


CUT = "cannot cut axis {!r} into {} equal shards"
REFUSALS = [
    ("more stages than layers", {"pp": 6}, "cannot share 5 layers among 6 pipeline stages", {}),
    (
        "KV heads among three ranks",
        {"tp": 3},
        CUT.format("kv", 3),
        {"tensor": "layers.0.attention.q", "axis": "kv = 2", "heads": "rep = 3 for each kv", "world": "tp = 3"},
    ),
    (
        "an MLP that does not divide",
        {"tp": 2, "ffn": 7},
        CUT.format("ffn", 2),
        {"tensor": "layers.0.mlp.down", "axis": "ffn = 7", "world": "tp = 2"},
    ),
    (
        "columns of an embedding that do not divide",
        {"tp": 2, "hidden": 11, "embedding": "columns"},
        CUT.format("hidden", 2),
        {"tensor": "embed", "axis": "hidden = 11", "world": "tp = 2"},
    ),
]


@pytest.mark.parametrize(("remark", "more", "what", "facts"), REFUSALS, ids=[row[0] for row in REFUSALS])
def test_a_model_is_not_cut_for(remark, more, what, facts):
    with pytest.raises(BadRequest) as caught:
        written("trtllm", {**LLAMA_SMALL, **more})
    assert (caught.value.what, caught.value.facts) == (what, facts)
    assert caught.value.remedy


def test_megatron_spells_both_families_with_one_dialect():
    apart = [family.name for family in FAMILIES if dialect_of(family, "megatron") is not MEGATRON]
    assert apart == ["eagle3"]  # which is saved beside another model


@settings(deadline=None, max_examples=EXAMPLES)
@given(data=st.data())
def test_no_name_appears_twice_in_a_unit(data):
    family, kind = data.draw(st.sampled_from(KINDS))
    found = written(kind, data.draw(models(family, kind)))
    assume(found)
    assert len(keys(found)) == len(found)

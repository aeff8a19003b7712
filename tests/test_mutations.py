"""The examination is itself examined: one damage is planted in a proven target, and must be found and named.

A target is made once and copied for each damage. Weights are damaged with the safetensors library or byte by byte, never with
carnet's own code.
"""

import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import carnet
from carnet.errors import CarnetError
from carnet.plans import saved

GOLDENS = Path(__file__).parent / "goldens/megatron"
LLAMA, GPT = GOLDENS / "llama_te_pp2_vpp", GOLDENS / "gpt_te_tp2"
# the goldens: 4 layers, 64 wide, 4 heads of 16, llama with 2 KV heads and an MLP of 96, a vocabulary of 251
HIDDEN, DIM = 64, 16
HF = "model.layers.{}."
TARGETS = {
    "hf": (LLAMA, {"to": "hf"}),
    "gpt": (GPT, {"to": "hf"}),
    "tp2pp2": (LLAMA, {"to": "trtllm", "tp": 2, "pp": 2}),
    "tp4": (LLAMA, {"to": "trtllm", "tp": 4}),
    "gpt ranks": (GPT, {"to": "trtllm", "tp": 2, "pp": 2}),
    "f32": (LLAMA, {"to": "hf", "dtype": "f32"}),
}
ASKED = {"f32": {"dtype": "f32"}}  # what is repeated to compare
MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    """Return (source, a fresh copy of its proven target)."""
    folder, made = tmp_path_factory.mktemp("proven"), {}

    def copy(which, to):
        source, given = TARGETS[which]
        if which not in made:
            assert carnet.cross(source, folder / which, **given).equal
            made[which] = folder / which
        shutil.copytree(made[which], to / "target")
        return source, to / "target"

    return copy


def rewrite(file, damage):
    """Let ``damage`` change the tensors of a file, by name, and save them with the safetensors library."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    damage(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)


def reconfigure(target, **fields):
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **fields}, indent=2))


def reread(file, name):
    """Return (first byte of a tensor in its file, one past its last byte), read off the header by hand."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    begin, end = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + begin, 8 + length + end


def flip(file, at, bit):
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1 << bit
    file.write_bytes(raw)


def findings(source, target, **asked):
    """Return {(where, what)} after asking that the target is not equal, and that it says so to a machine too."""
    verdict = carnet.verify(source, target, **asked)
    assert not verdict.equal
    assert all(finding.what and finding.where for finding in verdict.findings)
    return {(finding.where, finding.what) for finding in verdict.findings}


def exchange(tensor, a, b):
    """Exchange two equal parts of a tensor's first axis."""
    kept = tensor[a].clone()
    tensor[a] = tensor[b]
    tensor[b] = kept


def head(number):
    return slice(number * DIM, (number + 1) * DIM)


# --- it can pass ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", TARGETS)
def test_an_undamaged_target_is_equal(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    assert carnet.verify(source, target, **ASKED.get(which, {})).findings == ()
    assert carnet.verify(target).findings == ()


@pytest.mark.parametrize("which", TARGETS)
def test_a_target_is_equal_whoever_wrote_its_files(which, proven, tmp_path):
    """The tools that plant the damages do none of their own: rewritten in another order, another header, without a document."""
    source, target = proven(which, tmp_path)
    for file in sorted(target.glob("*.safetensors")):
        before = file.read_bytes()
        rewrite(file, lambda tensors: None)
        assert file.read_bytes() != before
    reconfigure(target)
    (target / "carnet.json").unlink()
    assert carnet.verify(source, target, **ASKED.get(which, {})).findings == ()


def test_a_proven_target_of_another_model_is_not_equal(proven, tmp_path):
    _, target = proven("hf", tmp_path)
    for other in (GOLDENS / "llama_tp2pp2", GPT):
        assert not carnet.verify(other, target).equal


# --- heads, gates, halves ------------------------------------------------------------------------------------------------------


def test_two_query_heads_of_one_group_exchanged(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    rewrite(target / MODEL, lambda t: exchange(t[HF.format(2) + "self_attn.q_proj.weight"], head(2), head(3)))
    assert findings(source, target) == {("layers.2.attention.q", "2 and 3 exchanged along kv rep")}


def test_two_query_heads_of_two_groups_exchanged(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    rewrite(target / MODEL, lambda t: exchange(t[HF.format(1) + "self_attn.q_proj.weight"], head(0), head(2)))
    assert findings(source, target) == {("layers.1.attention.q", "0 and 2 exchanged along kv rep")}


@pytest.mark.parametrize("name", ["k", "v"])
def test_two_kv_heads_exchanged(name, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    rewrite(target / MODEL, lambda t: exchange(t[HF.format(3) + f"self_attn.{name}_proj.weight"], head(0), head(1)))
    assert findings(source, target) == {(f"layers.3.attention.{name}", "0 and 1 exchanged along kv")}


def test_two_heads_exchanged_in_the_columns_of_the_output_projection(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    rewrite(target / MODEL, lambda t: exchange(t[HF.format(0) + "self_attn.o_proj.weight"].T, head(0), head(1)))
    assert findings(source, target) == {("layers.0.attention.o", "0 and 1 exchanged along kv rep")}


def test_two_of_four_heads_of_a_gpt_exchanged_in_the_columns_of_its_fused_projection(proven, tmp_path):
    source, target = proven("gpt", tmp_path)
    rewrite(target / MODEL, lambda t: exchange(t["transformer.h.1.attn.c_attn.weight"].T, head(0), head(2)))
    assert findings(source, target) == {("layers.1.attention.q", "0 and 2 exchanged along kv")}


def test_gate_and_up_exchanged(proven, tmp_path):
    source, target = proven("hf", tmp_path)

    def damage(tensors):
        gate, up = HF.format(1) + "mlp.gate_proj.weight", HF.format(1) + "mlp.up_proj.weight"
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    rewrite(target / MODEL, damage)
    assert findings(source, target) == {
        ("layers.1.mlp.gate", "holds layers.1.mlp.up"),
        ("layers.1.mlp.up", "holds layers.1.mlp.gate"),
    }


def test_gate_and_up_exchanged_on_one_rank(proven, tmp_path):
    source, target = proven("tp2pp2", tmp_path)

    def damage(tensors):
        fc, gate = "transformer.layers.1.mlp.fc.weight", "transformer.layers.1.mlp.gate.weight"
        tensors[fc], tensors[gate] = tensors[gate], tensors[fc]

    rewrite(target / "rank3.safetensors", damage)  # the second stage: layer 1 of its own is layer 3
    verdict = carnet.verify(source, target)
    assert {(f.where, f.what, f.stored) for f in verdict.findings} == {
        ("layers.3.mlp.gate", "holds layers.3.mlp.up", "rank3/transformer.layers.1.mlp.fc.weight"),
        ("layers.3.mlp.up", "holds layers.3.mlp.gate", "rank3/transformer.layers.1.mlp.gate.weight"),
    }


@pytest.mark.parametrize("name", ["q", "k"])
def test_rope_halves_exchanged_within_every_head(name, proven, tmp_path):
    source, target = proven("hf", tmp_path)

    def damage(tensors):
        stored = HF.format(2) + f"self_attn.{name}_proj.weight"
        heads = tensors[stored].reshape(-1, 2, DIM // 2, HIDDEN)
        tensors[stored] = heads.flip(1).reshape(-1, HIDDEN)

    rewrite(target / MODEL, damage)
    assert findings(source, target) == {(f"layers.2.attention.{name}", "halves exchanged along dim")}


@pytest.mark.parametrize("name", ["q", "k"])
def test_rope_pairs_interleaved_within_every_head(name, proven, tmp_path):
    """What a forgotten or doubled `permute` of Meta's checkpoints does."""
    source, target = proven("hf", tmp_path)

    def damage(tensors):
        stored = HF.format(2) + f"self_attn.{name}_proj.weight"
        tensors[stored] = tensors[stored].reshape(-1, 2, DIM // 2, HIDDEN).transpose(1, 2).reshape(-1, HIDDEN)

    rewrite(target / MODEL, damage)
    # the first and the last index of a head stay where they are
    assert findings(source, target) == {(f"layers.2.attention.{name}", f"{DIM - 2} indices rearranged along dim")}


def test_keys_and_values_exchanged(proven, tmp_path):
    source, target = proven("tp2pp2", tmp_path)

    def damage(tensors):
        fused = tensors["transformer.layers.0.attention.qkv.weight"]
        exchange(fused, slice(32, 48), slice(48, 64))  # a rank: 2 query heads, 1 key head, 1 value head

    rewrite(target / "rank0.safetensors", damage)
    assert findings(source, target) == {
        ("layers.0.attention.k", "holds layers.0.attention.v"),
        ("layers.0.attention.v", "holds layers.0.attention.k"),
    }


# --- bits ----------------------------------------------------------------------------------------------------------------------

STORED = {
    "model.embed_tokens.weight": "embed",
    "lm_head.weight": "head",
    "model.norm.weight": "final_norm",
    "model.layers.0.input_layernorm.weight": "layers.0.attention_norm",
    "model.layers.3.post_attention_layernorm.weight": "layers.3.mlp_norm",
    "model.layers.1.self_attn.q_proj.weight": "layers.1.attention.q",
    "model.layers.2.self_attn.k_proj.weight": "layers.2.attention.k",
    "model.layers.0.self_attn.v_proj.weight": "layers.0.attention.v",
    "model.layers.3.self_attn.o_proj.weight": "layers.3.attention.o",
    "model.layers.1.mlp.gate_proj.weight": "layers.1.mlp.gate",
    "model.layers.2.mlp.up_proj.weight": "layers.2.mlp.up",
    "model.layers.0.mlp.down_proj.weight": "layers.0.mlp.down",
}


@pytest.mark.parametrize("position", ["first byte", "last byte", "somewhere", "elsewhere"])
@pytest.mark.parametrize("name", STORED)
def test_one_bit_flipped(name, position, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    chance = random.Random(f"{name} {position}")
    first, end = reread(target / MODEL, name)
    at = {"first byte": first, "last byte": end - 1}.get(position, chance.randrange(first, end))
    flip(target / MODEL, at, chance.randrange(8))
    assert findings(source, target) == {(STORED[name], "1 bit of one element flipped")}


@pytest.mark.parametrize("bit", [0, 15])
def test_one_bit_flipped_in_a_gpt_s_transposed_projection(bit, proven, tmp_path):
    source, target = proven("gpt", tmp_path)
    first, _ = reread(target / MODEL, "transformer.h.2.attn.c_attn.weight")
    row, column = 5, 64 + 3 * DIM + 7  # of [64, 192]: a column of the fourth key head
    flip(target / MODEL, first + 2 * (row * 192 + column) + bit // 8, bit % 8)
    assert findings(source, target) == {("layers.2.attention.k", "1 bit of one element flipped")}


@pytest.mark.parametrize("rank", range(4))
def test_one_bit_flipped_in_one_of_the_copies_that_every_rank_holds(rank, proven, tmp_path):
    source, target = proven("tp2pp2", tmp_path)
    file = target / f"rank{rank}.safetensors"
    first, _ = reread(file, "transformer.layers.0.input_layernorm.weight")
    flip(file, first, 3)
    verdict = carnet.verify(source, target)
    stored = f"rank{rank}/transformer.layers.0.input_layernorm.weight"
    layer = 0 if rank < 2 else 2
    assert [(f.where, f.stored) for f in verdict.findings] == [(f"layers.{layer}.attention_norm", stored)]


def test_the_lowest_bit_of_a_cast_target(proven, tmp_path):
    source, target = proven("f32", tmp_path)
    first, end = reread(target / MODEL, "model.layers.2.mlp.up_proj.weight")
    flip(target / MODEL, (first + end) // 2 // 4 * 4 + first % 4, 0)
    ((where, _),) = findings(source, target, dtype="f32")
    assert where == "layers.2.mlp.up"


def test_a_zero_that_changes_its_sign(proven, tmp_path):
    """Compared as numbers the two would be equal."""
    _, source = proven("hf", tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(source / MODEL, lambda tensors: tensors[name][3, 4].zero_())
    assert carnet.cross(source, tmp_path / "out", to="hf").equal
    rewrite(tmp_path / "out" / MODEL, lambda tensors: tensors[name][3, 4].neg_())
    assert torch.equal(load_file(tmp_path / "out" / MODEL)[name], load_file(source / MODEL)[name])
    assert findings(source, tmp_path / "out") == {("layers.0.mlp.down", "1 bit of one element flipped")}


def test_a_number_that_becomes_none(proven, tmp_path):
    """Compared with a tolerance, NaN differs from nothing."""
    source, target = proven("hf", tmp_path)
    rewrite(target / MODEL, lambda tensors: tensors["lm_head.weight"][7, 7].fill_(float("nan")))
    ((where, _),) = findings(source, target)
    assert where == "head"


# --- tensors that are gone, doubled, emptied, turned ----------------------------------------------------------------------------


LAYER = "attention_norm attention.q attention.k attention.v attention.o mlp_norm mlp.gate mlp.up mlp.down".split()


def remove_layer(tensors, layer):
    for name in [name for name in tensors if f".layers.{layer}." in name]:
        del tensors[name]


def test_a_layer_missing(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    rewrite(target / MODEL, lambda tensors: remove_layer(tensors, 3))
    assert findings(source, target) == {(f"layers.3.{name}", "missing") for name in LAYER}


def test_a_layer_missing_and_the_config_made_to_fit(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    rewrite(target / MODEL, lambda tensors: remove_layer(tensors, 3))
    reconfigure(target, num_hidden_layers=3)
    found = findings(source, target)
    assert ("layers", "config field differs") in found
    assert {where for where, what in found if what == "missing"} == {f"layers.3.{name}" for name in LAYER}


def test_a_layer_too_many(proven, tmp_path):
    source, target = proven("hf", tmp_path)

    def damage(tensors):
        tensors |= {name.replace("s.3.", "s.4."): tensor.clone() for name, tensor in [*tensors.items()] if ".layers.3." in name}

    rewrite(target / MODEL, damage)
    ((_, what),) = findings(source, target)
    assert what == "the checkpoint holds a tensor that carnet does not know"
    reconfigure(target, num_hidden_layers=5)
    found = findings(source, target)
    assert ("layers", "config field differs") in found
    assert ("layers.4.mlp.up", "not in the source") in found


def test_a_layer_doubled(proven, tmp_path):
    source, target = proven("hf", tmp_path)

    def damage(tensors):
        tensors |= {name.replace("s.1.", "s.2."): tensor.clone() for name, tensor in [*tensors.items()] if ".layers.1." in name}

    rewrite(target / MODEL, damage)
    plain = load_file(target / MODEL)
    assert all(torch.equal(t, plain[n.replace("s.1.", "s.2.")]) for n, t in plain.items() if ".layers.1." in n)
    assert findings(source, target) == {(f"layers.2.{name}", f"holds layers.1.{name}") for name in LAYER}


def test_two_layers_exchanged_between_pipeline_stages(proven, tmp_path):
    source, target = proven("tp2pp2", tmp_path)
    for tp_rank in range(2):
        a, b = target / f"rank{tp_rank}.safetensors", target / f"rank{2 + tp_rank}.safetensors"
        first, second = load_file(a), load_file(b)
        layer = [name for name in first if ".layers.0." in name]
        rewrite(a, lambda t, layer=layer, other=second: t.update({name: other[name] for name in layer}))
        rewrite(b, lambda t, layer=layer, other=first: t.update({name: other[name] for name in layer}))
    found = findings(source, target)
    assert ("layers.0.mlp.down", "holds layers.2.mlp.down") in found
    assert ("layers.2.attention.o", "holds layers.0.attention.o") in found
    assert {where.split(".")[1] for where, _ in found} == {"0", "2"}


@pytest.mark.parametrize("name", STORED)
def test_a_tensor_of_nothing_but_zeros(name, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    rewrite(target / MODEL, lambda tensors: tensors[name].zero_())
    assert findings(source, target) == {(STORED[name], "all zero")}


@pytest.mark.parametrize("name", STORED)
def test_a_tensor_missing(name, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    rewrite(target / MODEL, lambda tensors: tensors.pop(name))
    assert findings(source, target) == {(STORED[name], "missing")}


def test_a_square_matrix_transposed(proven, tmp_path):
    source, target = proven("hf", tmp_path)

    def damage(tensors):
        tensors[HF.format(1) + "self_attn.o_proj.weight"] = tensors[HF.format(1) + "self_attn.o_proj.weight"].T

    rewrite(target / MODEL, damage)
    ((where, _),) = findings(source, target)
    assert where == "layers.1.attention.o"


def test_a_gpt_s_square_matrix_left_as_megatron_has_it(proven, tmp_path):
    source, target = proven("gpt", tmp_path)

    def damage(tensors):
        tensors["transformer.h.3.attn.c_proj.weight"] = tensors["transformer.h.3.attn.c_proj.weight"].T

    rewrite(target / MODEL, damage)
    ((where, _),) = findings(source, target)
    assert where == "layers.3.attention.o"


def test_a_few_rows_rearranged(proven, tmp_path):
    source, target = proven("hf", tmp_path)

    def damage(tensors):
        rows = tensors["model.embed_tokens.weight"]
        rows[[10, 20, 30]] = rows[[20, 30, 10]]

    rewrite(target / MODEL, damage)
    assert findings(source, target) == {("embed", "3 indices rearranged along vocab")}


def test_two_rows_exchanged(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    rewrite(target / MODEL, lambda t: exchange(t["lm_head.weight"], slice(0, 1), slice(250, 251)))
    assert findings(source, target) == {("head", "0 and 250 exchanged along vocab")}


def test_a_matrix_shifted_by_one_row(proven, tmp_path):
    source, target = proven("hf", tmp_path)

    def damage(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)

    rewrite(target / MODEL, damage)
    assert findings(source, target) == {("embed", "251 indices rearranged along vocab")}


def test_embedding_and_head_exchanged(proven, tmp_path):
    source, target = proven("hf", tmp_path)

    def damage(tensors):
        embed, output = "model.embed_tokens.weight", "lm_head.weight"
        tensors[embed], tensors[output] = tensors[output], tensors[embed]

    rewrite(target / MODEL, damage)
    assert findings(source, target) == {("embed", "holds head"), ("head", "holds embed")}


# --- vocabulary ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [False, True], ids=["vocab_size unchanged", "vocab_size changed"])
@pytest.mark.parametrize("rows", [250, 252, 256])
def test_rows_of_the_vocabulary_s_padding_kept_or_one_row_cut_off(rows, said, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    full = load_file(LLAMA / "full.safetensors")

    def damage(tensors):
        tensors["model.embed_tokens.weight"] = full["embedding.word_embeddings.weight"][:rows]
        tensors["lm_head.weight"] = full["output_layer.weight"][:rows]

    rewrite(target / MODEL, damage)
    if said:
        reconfigure(target, vocab_size=rows)
        assert ("vocab", "config field differs") in findings(source, target)
    else:
        assert findings(source, target) >= {
            (name, f"the shape of {name!r} contradicts the config") for name in ("model.embed_tokens.weight", "lm_head.weight")
        }


def test_the_padding_of_a_head_that_is_not_zero(proven, tmp_path):
    source, target = proven("tp4", tmp_path)  # 251 rows on 4 ranks: 63 each, the last one of them padding
    rewrite(target / "rank3.safetensors", lambda tensors: tensors["lm_head.weight"][-1, 5].fill_(1.0))
    verdict = carnet.verify(source, target)
    assert [(f.what, f.where, f.stored) for f in verdict.findings] == [("padding is not zero", "head", "rank3/lm_head.weight")]


def test_the_padding_of_a_head_that_holds_the_rows_of_megatron_s_padding(proven, tmp_path):
    source, target = proven("tp4", tmp_path)
    rows = load_file(LLAMA / "full.safetensors")["output_layer.weight"][251:252]
    rewrite(target / "rank3.safetensors", lambda tensors: tensors["lm_head.weight"][-1:].copy_(rows))
    assert findings(source, target) == {("head", "padding is not zero")}


# --- ranks ---------------------------------------------------------------------------------------------------------------------


def swap_files(target, a, b):
    first, second = target / f"rank{a}.safetensors", target / f"rank{b}.safetensors"
    first.rename(target / "held")
    second.rename(first)
    (target / "held").rename(second)


def test_the_files_of_two_tensor_parallel_ranks_exchanged(proven, tmp_path):
    source, target = proven("tp2pp2", tmp_path)
    swap_files(target, 0, 1)
    found = findings(source, target)
    # norms and the embedding are the same on both
    assert {where for where, _ in found} == {f"layers.{at}.{name}" for at in (0, 1) for name in LAYER if "norm" not in name}


def test_the_files_of_two_pipeline_stages_exchanged(proven, tmp_path):
    source, target = proven("tp2pp2", tmp_path)
    swap_files(target, 0, 2)
    assert findings(source, target)


def test_a_rank_that_is_a_copy_of_its_neighbour(proven, tmp_path):
    source, target = proven("tp4", tmp_path)
    shutil.copyfile(target / "rank2.safetensors", target / "rank3.safetensors")
    found = carnet.verify(source, target).findings
    assert "layers.0.mlp.up" in {finding.where for finding in found}
    # two ranks share a KV head, so keys and values are rightly the same on both
    assert not {finding.where for finding in found} & {"layers.0.attention.k", "layers.0.attention.v"}


@pytest.mark.parametrize("rank", range(4))
def test_a_repeated_kv_head_of_which_one_copy_differs(rank, proven, tmp_path):
    source, target = proven("tp4", tmp_path)  # 2 KV heads on 4 ranks; a rank: 1 query head, 1 key head, 1 value head
    name = "transformer.layers.2.attention.qkv.weight"
    rewrite(target / f"rank{rank}.safetensors", lambda tensors: tensors[name][20, 7].neg_())
    found = carnet.verify(source, target).findings
    assert [(f.where, f.what, f.stored) for f in found] == [
        ("layers.2.attention.k", "1 bit of one element flipped", f"rank{rank}/{name}")
    ]


def test_a_repeated_kv_head_that_is_the_other_one(proven, tmp_path):
    source, target = proven("tp4", tmp_path)
    other = load_file(target / "rank0.safetensors")["transformer.layers.2.attention.qkv.weight"][32:48]
    name = "transformer.layers.2.attention.qkv.weight"
    rewrite(target / "rank2.safetensors", lambda tensors: tensors[name][32:48].copy_(other))
    ((where, _),) = findings(source, target)
    assert where == "layers.2.attention.v"


def test_a_tied_head_that_is_not_the_embedding(proven, tmp_path):
    source, target = proven("gpt ranks", tmp_path)
    rewrite(target / "rank3.safetensors", lambda tensors: tensors["lm_head.weight"][0, 0].neg_())
    found = carnet.verify(source, target).findings
    assert [(f.where, f.stored) for f in found] == [("embed", "rank3/lm_head.weight")]


def test_a_bias_that_one_rank_has_set_to_zero(proven, tmp_path):
    """What some converters do on ranks after the first, so that the sum over ranks adds it once; this format wants it whole."""
    source, target = proven("gpt ranks", tmp_path)
    rewrite(target / "rank1.safetensors", lambda tensors: tensors["transformer.layers.0.attention.dense.bias"].zero_())
    assert findings(source, target) == {("layers.0.attention.o_bias", "all zero")}


# --- config --------------------------------------------------------------------------------------------------------------------

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
STALE = (
    ("hf", "rms_norm_eps", 1e-5, "norm_eps"),
    ("hf", "rms_norm_eps", None, None),  # transformers' own default is 1e-6, as here
    ("hf", "rope_theta", 10000.0, "rope_theta"),
    ("hf", "rope_theta", None, "rope_theta"),
    ("hf", "hidden_act", "gelu", "activation"),
    ("hf", "hidden_act", "relu", ...),
    ("hf", "max_position_embeddings", 128, "positions"),
    ("hf", "rope_scaling", LINEAR, "rope_type"),
    ("hf", "rope_scaling", LLAMA3, "rope_type"),
    ("hf", "rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "rope_type"),
    ("hf", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}, ...),
    ("hf", "torch_dtype", "float32", "dtype"),
    ("hf", "torch_dtype", None, "dtype"),  # transformers would take float32
    ("hf", "tie_word_embeddings", True, "tied"),
    ("hf", "num_key_value_heads", 4, ...),
    ("hf", "num_key_value_heads", 1, ...),
    ("hf", "num_key_value_heads", None, ...),  # as many as heads
    ("hf", "num_attention_heads", 8, ...),
    ("hf", "head_dim", 32, ...),
    ("hf", "vocab_size", 256, ...),
    ("hf", "hidden_size", 128, ...),
    ("hf", "intermediate_size", 192, ...),
    ("hf", "num_hidden_layers", 3, ...),
    ("hf", "attention_bias", True, ...),
    ("hf", "mlp_bias", True, ...),
    ("hf", "architectures", ["MistralForCausalLM"], ...),
    ("hf", "sliding_window", 4096, ...),
    ("gpt", "layer_norm_epsilon", 1e-6, "norm_eps"),
    ("gpt", "activation_function", "gelu_new", "activation"),
    ("gpt", "activation_function", None, "activation"),  # transformers would take gelu_new
    ("gpt", "tie_word_embeddings", False, ...),
    ("gpt", "n_head", 8, "heads"),
    ("gpt", "n_positions", 128, ...),
    ("gpt", "scale_attn_by_inverse_layer_idx", True, ...),
    ("tp2pp2", "norm_epsilon", 1e-5, "norm_eps"),
    ("tp2pp2", "rotary_base", 10000.0, "rope_theta"),
    ("tp2pp2", "rotary_scaling", {"type": "linear", "factor": 2.0}, "rope_type"),
    ("tp2pp2", "hidden_act", "gelu", "activation"),
    ("tp2pp2", "dtype", "float16", "dtype"),
    ("tp2pp2", "max_position_embeddings", 2048, "positions"),
    ("tp2pp2", "num_key_value_heads", 4, ...),
    ("tp2pp2", "vocab_size", 256, ...),
    ("tp2pp2", "use_parallel_embedding", True, ...),
    ("tp2pp2", "tie_word_embeddings", True, "tied"),
    ("tp2pp2", "position_embedding_type", "learned_absolute", ...),
    ("tp2pp2", "qk_layernorm", True, ...),
    ("gpt ranks", "norm_epsilon", 1e-6, "norm_eps"),
    ("gpt ranks", "hidden_act", "gelu_new", "activation"),
    ("gpt ranks", "hidden_act", "relu", ...),
)


@pytest.mark.parametrize(("which", "key", "value", "field"), STALE, ids=[f"{w}: {k} {v}"[:60] for w, k, v, _ in STALE])
def test_a_stale_config_field(which, key, value, field, proven, tmp_path):
    """``field`` is the canonical field that must be named; ``...`` where the tensors refute the config, which says it in its words."""
    source, target = proven(which, tmp_path)
    reconfigure(target, **{key: value})
    if field is None:
        assert findings(source, target) == {("config.json", "file differs")}  # the carnet knows its bytes
        (target / "carnet.json").unlink()
        assert carnet.verify(source, target).equal
    elif field is ...:
        assert findings(source, target)
    else:
        assert (field, "config field differs") in findings(source, target)


def test_a_stale_pipeline_size_in_the_mapping(proven, tmp_path):
    source, target = proven("tp2pp2", tmp_path)
    mapping = json.loads((target / "config.json").read_text())["mapping"]
    reconfigure(target, mapping={**mapping, "pp_size": 1, "tp_size": 4, "moe_tp_size": 4})
    assert findings(source, target)


@pytest.mark.parametrize("factor", ["low_freq_factor", "high_freq_factor", "factor", "original_max_position_embeddings"])
def test_a_stale_constant_of_rope_scaling(factor, proven, tmp_path):
    _, target = proven("hf", tmp_path)
    reconfigure(target, rope_scaling=LLAMA3)
    assert carnet.cross(target, tmp_path / "again", to="hf").equal
    reconfigure(tmp_path / "again", rope_scaling={**LLAMA3, factor: LLAMA3[factor] * 2})
    ((where, what),) = findings(target, tmp_path / "again")
    assert (where.startswith("rope_"), what) == (True, "config field differs")


# --- a target alone, against its own document ----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["hf", "tp2pp2"])
def test_alone_a_flipped_bit_is_found_and_named(which, proven, tmp_path):
    _, target = proven(which, tmp_path)
    file = target / (MODEL if which == "hf" else "rank2.safetensors")
    name = max(load_file(file))
    first, end = reread(file, name)
    flip(file, (first + end) // 2, 6)
    ((where, what),) = alone(target)
    assert (where.rsplit("/", 1)[-1], what) == (name, "digest differs")


@pytest.mark.parametrize("which", ["hf", "tp2pp2"])
def test_alone_a_changed_config_is_found_and_named(which, proven, tmp_path):
    _, target = proven(which, tmp_path)
    raw = (target / "config.json").read_text()
    (target / "config.json").write_text(raw.replace("500000.0", "500001.0"))
    assert alone(target) == {("config.json", "file differs")}


def test_alone_a_config_that_is_gone_is_found(proven, tmp_path):
    _, target = proven("hf", tmp_path)
    (target / "config.json").unlink()
    with pytest.raises(CarnetError, match="no checkpoint"):
        carnet.verify(target)


@pytest.mark.parametrize("which", ["hf", "tp2pp2"])
def test_alone_a_removed_tensor_is_found_and_named(which, proven, tmp_path):
    _, target = proven(which, tmp_path)
    file = target / (MODEL if which == "hf" else "rank3.safetensors")
    rewrite(file, lambda tensors: tensors.pop("lm_head.weight"))
    assert alone(target) == {("lm_head.weight" if which == "hf" else "rank3/lm_head.weight", "missing")}


@pytest.mark.parametrize("which", ["hf", "tp2pp2"])
def test_alone_an_added_tensor_is_found_and_named(which, proven, tmp_path):
    _, target = proven(which, tmp_path)
    file = target / (MODEL if which == "hf" else "rank3.safetensors")
    rewrite(file, lambda tensors: tensors.update(extra=torch.ones(3)))
    assert alone(target) == {("extra" if which == "hf" else "rank3/extra", "not in the carnet")}


def test_alone_another_element_type_is_found_and_named(proven, tmp_path):
    _, target = proven("hf", tmp_path)
    rewrite(target / MODEL, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].half()}))
    assert ("model.norm.weight", "dtype differs") in alone(target)


def test_alone_an_index_that_was_changed_is_found(proven, tmp_path):
    assert carnet.cross(LLAMA, tmp_path / "target", to="hf", shard_size=100_000).equal
    index = tmp_path / "target/model.safetensors.index.json"
    index.write_text(index.read_text() + " ")
    assert alone(tmp_path / "target") == {("model.safetensors.index.json", "file differs")}


def test_alone_a_tokenizer_that_was_changed_is_found(proven, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text('{"version": "1.0"}')
    assert carnet.cross(LLAMA, tmp_path / "target", to="hf", tokenizer=tmp_path / "tokenizer").equal
    (tmp_path / "target/tokenizer.json").write_text('{"version": "1.1"}')
    assert alone(tmp_path / "target") == {("tokenizer.json", "file differs")}


def test_alone_a_file_that_was_added_is_found(proven, tmp_path):
    _, target = proven("hf", tmp_path)
    (target / "generation_config.json").write_text('{"temperature": 0.1}')
    assert ("generation_config.json", "not in the carnet") in alone(target)


DOCUMENTS = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "without its target": lambda text: edited(text, lambda data: data.pop("target")),
    "a target without tensors": lambda text: edited(text, lambda data: data["target"].pop("tensors")),
    "a tensor without a digest": lambda text: edited(text, lambda data: first_tensor(data).pop("digest")),
    "a tensor that is a number": lambda text: edited(
        text, lambda data: data["target"]["tensors"].update({"lm_head.weight": 7})
    ),
    "a file that climbs": lambda text: edited(text, lambda data: data["target"]["files"].update({"../../x": "0" * 32})),
    "a file that is a number": lambda text: edited(text, lambda data: data["target"]["files"].update({"config.json": 7})),
}


def edited(text, damage):
    data = json.loads(text)
    damage(data)
    return json.dumps(data)


def first_tensor(data):
    return next(iter(data["target"]["tensors"].values()))


@pytest.mark.parametrize("which", DOCUMENTS)
def test_a_damaged_document_is_refused_or_found_and_never_a_crash(which, proven, tmp_path):
    _, target = proven("hf", tmp_path)
    document = target / "carnet.json"
    document.write_text(DOCUMENTS[which](document.read_text()))
    try:
        verdict = carnet.verify(target)
    except CarnetError:
        return
    assert not verdict.equal


def test_a_document_that_names_a_file_outside_of_its_target_is_not_believed(proven, tmp_path):
    _, target = proven("hf", tmp_path)
    (tmp_path / "outside").write_bytes(b"secret")
    document = target / "carnet.json"
    right = xxhash.xxh3_128_hexdigest(b"secret")
    document.write_text(edited(document.read_text(), lambda data: data["target"]["files"].update({"../outside": right})))
    with pytest.raises(CarnetError, match="outside"):
        carnet.verify(target)


def test_a_target_that_is_different_keeps_the_document_that_it_has(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    before = (target / "carnet.json").read_bytes()
    first, _ = reread(target / MODEL, "model.norm.weight")
    flip(target / MODEL, first, 0)
    assert not carnet.verify(source, target).equal
    assert (target / "carnet.json").read_bytes() == before


def alone(target):
    verdict = carnet.verify(target)
    assert not verdict.equal
    return {(finding.where, finding.what) for finding in verdict.findings}


# --- who says what is compared -------------------------------------------------------------------------------------------------


def resealed(target, damage):
    """Alter a document as someone does who knows its rules: with a digest over itself that is right again."""
    data = json.loads((target / "carnet.json").read_text())
    damage(data)
    data.pop("self")
    written = json.dumps(data, indent=1, ensure_ascii=False)
    data["self"] = xxhash.xxh3_128_hexdigest(f"{written}\n".encode())
    (target / "carnet.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def claim(**fields):
    return lambda data: data["request"].update(fields)


def cut_vocabulary(target, rows):
    def damage(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:rows]

    rewrite(target / MODEL, damage)
    reconfigure(target, vocab_size=rows)


@pytest.mark.parametrize("seal", [True, False])
def test_a_target_of_fewer_rows_whose_document_claims_that_they_were_asked_for(seal, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    cut_vocabulary(target, 200)
    if seal:
        resealed(target, claim(vocab=200))
    else:
        data = json.loads((target / "carnet.json").read_text())
        data["request"]["vocab_size"] = 200
        (target / "carnet.json").write_text(json.dumps(data, indent=1) + "\n")
    assert ("vocab", "config field differs") in findings(source, target)


def test_a_document_that_names_the_target_s_own_config(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    reconfigure(target, rms_norm_eps=0.25)
    resealed(target, claim(config=str(target / "config.json")))
    assert ("norm_eps", "config field differs") in findings(source, target)


CLAIMS = {
    "dtype": claim(dtype="f16"),
    "drop": lambda data: (claim(drop=["*q_proj*"])(data), data["dropped"].update({"--drop *q_proj*": ["x"]})),
    "vocab_size": claim(vocab_size=200),
    "kv_scale": claim(kv_scale=2.0, kv_cache="fp8"),
}


@pytest.mark.parametrize("field", ["dtype", "drop", "vocab_size"])
def test_a_request_that_the_document_alone_knows_is_a_finding_that_names_the_option(field, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    resealed(target, CLAIMS[field])
    (found,) = [f for f in carnet.verify(source, target).findings if f.where == f"request.{field}"]
    option = {"dtype": "--dtype f16", "drop": "--drop '*q_proj*'", "vocab_size": "--vocab-size 200"}[field]
    assert (found.what, f"repeat {option}" in found.detail) == ("the carnet names another request", True)


def test_a_cast_is_compared_when_it_is_repeated_and_found_where_it_is_not(proven, tmp_path):
    source, target = proven("f32", tmp_path)
    assert carnet.verify(source, target, dtype="f32").equal
    found = carnet.verify(source, target).findings
    assert {(f.where, f.what) for f in found} == {
        ("dtype", "stored wider than in the source"),
        ("request.dtype", "the carnet names another request"),
    }
    assert all("--dtype f32" in f.detail for f in found)


def test_an_option_that_says_what_the_source_says_changes_nothing(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    assert carnet.verify(source, target, dtype="bf16", vocab_size=251).findings == ()


def test_a_plan_says_what_was_asked_for(tmp_path):
    made = carnet.plan(LLAMA, to="hf", dtype="f32")
    saved.save(made, tmp_path / "llama.plan")
    carnet.run(made, tmp_path / "out")
    assert not carnet.verify(LLAMA, tmp_path / "out").equal
    assert json.loads((tmp_path / "out/carnet.json").read_text())["state"] == "written, not verified"
    assert carnet.verify(LLAMA, tmp_path / "out", plan=tmp_path / "llama.plan").findings == ()
    assert json.loads((tmp_path / "out/carnet.json").read_text())["state"] == "proven"
    assert carnet.verify(LLAMA, tmp_path / "out", plan=tmp_path / "llama.plan").equal
    assert carnet.verify(tmp_path / "out").equal
    with pytest.raises(CarnetError, match="the plan says what was asked for"):
        carnet.verify(LLAMA, tmp_path / "out", plan=tmp_path / "llama.plan", dtype="f32")


# --- verify writes nothing -----------------------------------------------------------------------------------------------------


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors.index.json"])
def test_a_file_that_was_altered_is_found_and_gets_no_new_digest(name, tokenizer, tmp_path):
    out = tmp_path / "target"
    assert carnet.cross(LLAMA, out, to="hf", tokenizer=tokenizer, shard_size=100_000).equal
    (out / name).write_text((out / name).read_text() + " ")
    before = contents(out)
    assert findings(LLAMA, out) == {(name, "file differs")}
    assert alone(out) == {(name, "file differs")}
    with_seal = carnet.verify(LLAMA, out, seal=True)
    assert not with_seal.equal
    assert contents(out) == before


def test_nothing_is_written_into_a_target_that_is_proven_or_of_another_program(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    stamp = (target / "carnet.json").stat().st_mtime_ns
    assert carnet.verify(source, target).equal
    assert (target / "carnet.json").stat().st_mtime_ns == stamp
    (target / "carnet.json").unlink()
    assert carnet.verify(source, target).equal
    assert not (target / "carnet.json").exists()
    assert carnet.verify(source, target, seal=True).document == "carnet.json is written"
    assert carnet.verify(target).equal


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_document_is_not_finished_over_a_file_that_changed_since_its_run(name, tokenizer, tmp_path):
    out = tmp_path / "target"
    carnet.run(carnet.plan(LLAMA, to="hf", tokenizer=tokenizer), out)
    written = (out / name).read_text()
    (out / name).write_text(written + " ")
    assert findings(LLAMA, out) == {(name, "file differs")}
    assert json.loads((out / "carnet.json").read_text())["state"] == "written, not verified"
    (out / name).write_text(written)
    assert carnet.verify(LLAMA, out).equal
    assert carnet.verify(out).equal


def test_a_target_with_a_tokenizer_that_nobody_knows_is_compared_and_not_sealed(tokenizer, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    (target / "carnet.json").unlink()
    shutil.copyfile(tokenizer / "tokenizer.json", target / "tokenizer.json")
    verdict = carnet.verify(source, target)
    assert (verdict.equal, verdict.unsure) == (True, ("tokenizer.json",))
    with pytest.raises(CarnetError, match="nobody says what a file of the target must hold"):
        carnet.verify(source, target, seal=True)
    assert carnet.verify(source, target, seal=True, tokenizer=tokenizer).equal
    (target / "tokenizer.json").write_text("{}")
    assert findings(source, target, tokenizer=tokenizer) == {("tokenizer.json", "file differs")}


@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("unshare") is None, reason="root writes everywhere but on a read-only mount"
)
@pytest.mark.parametrize("damaged", [False, True])
def test_a_target_that_cannot_be_written_to_has_its_verdict(damaged, tmp_path):
    carnet.run(carnet.plan(LLAMA, to="hf"), tmp_path / "out")
    if damaged:
        first, _ = reread(tmp_path / "out" / MODEL, "model.norm.weight")
        flip(tmp_path / "out" / MODEL, first, 0)
    before, verb = contents(tmp_path / "out"), f"{sys.executable} -m carnet verify {LLAMA} out"
    script = (
        f"mount --bind out out && mount -o remount,ro,bind out && {verb}" if os.geteuid() == 0 else f"chmod a-w out; {verb}"
    )
    command = ["unshare", "-m", "sh", "-c", script] if os.geteuid() == 0 else ["sh", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    (tmp_path / "out").chmod(0o755)
    if "mount" in done.stderr:
        pytest.skip(f"no read-only mount here: {done.stderr}")
    assert (done.returncode, done.stderr) == (3 if damaged else 0, "")
    assert contents(tmp_path / "out") == before


# --- everything is accounted for -----------------------------------------------------------------------------------------------


def plant(name, text="x"):
    def damage(target):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)

    return name, damage


def bind_socket(target):
    with socket.socket(socket.AF_UNIX) as opened:
        here = Path.cwd()
        os.chdir(target)  # the name of a socket is short
        opened.bind("socket")
        os.chdir(here)


LOADED = dict(
    [
        plant("modeling_x.py"),
        plant("custom_generate/generate.py"),
        plant("pytorch_model.bin"),
        plant("adapter_config.json", "{}"),
        plant("consolidated.00.pth"),
        plant("model.fp16.gguf"),
        plant("sub/deeper/weights.npz"),
        plant("library.so"),
        plant("nobody-knows-this"),
        plant("a/b.json", "{}"),
        ("fifo", lambda target: os.mkfifo(target / "fifo")),
        ("socket", bind_socket),
        ("link", lambda target: (target / "link").symlink_to("nowhere")),
        ("folder", lambda target: (target / "folder").symlink_to(target.parent)),
    ]
)
WORDED = dict(
    [
        plant("generation_config.json", "{}"),
        plant("tokenizer.json", "{}"),
        plant("chat_template.jinja"),
        plant("preprocessor_config.json", "{}"),
    ]
)
BESIDE = dict(
    [
        plant("README.md"),
        plant("LICENSE"),
        plant("figures/loss.png"),
        plant(".gitattributes"),
        plant("notes.txt"),
        plant("training_args.bin"),
        plant("docs/README.md"),
    ]
)


@pytest.mark.parametrize("documented", [True, False])
@pytest.mark.parametrize("which", ["hf", "tp2pp2"])
@pytest.mark.parametrize("name", LOADED)
def test_what_a_loader_reads_or_executes_and_nobody_knows(name, which, documented, proven, tmp_path):
    source, target = proven(which, tmp_path)
    if not documented:
        (target / "carnet.json").unlink()
    LOADED[name](target)
    ((where, _),) = findings(source, target)
    assert where == name
    if documented:
        assert {where for where, _ in alone(target)} == {name}


def swear(target, *names):
    """Have a document of a target name files as they are."""
    digests = {name: xxhash.xxh3_128_hexdigest((target / name).read_bytes()) for name in names}
    resealed(target, lambda data: data["target"]["files"].update(digests))


@pytest.mark.parametrize("which", ["hf", "tp2pp2"])
@pytest.mark.parametrize("name", [name for name in LOADED if name not in ("fifo", "socket", "link", "folder")])
def test_a_document_that_names_what_a_loader_executes_is_not_believed(name, which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    LOADED[name](target)
    swear(target, name)
    assert findings(source, target) == {(name, "not in the source")}


@pytest.mark.parametrize("name", ["README.safetensors", "LICENSE.bin", "optimizer.safetensors", "CITATION.pt"])
def test_weights_that_are_called_like_a_paper(name, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    (target / "carnet.json").unlink()
    (target / name).write_bytes(b"x")
    assert findings(source, target) == {(name, "not in the source")}


def test_words_that_the_document_alone_knows_are_named_and_their_code_is_found(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    (target / "tokenizer_config.json").write_text("{}")
    swear(target, "tokenizer_config.json")
    verdict = carnet.verify(source, target)
    assert (verdict.equal, verdict.unsure) == (True, ("tokenizer_config.json",))
    (target / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}')
    swear(target, "tokenizer_config.json")
    assert findings(source, target) == {("tokenizer_config.json", "auto_map was added")}


def test_heads_that_a_config_prunes(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    (target / "carnet.json").unlink()
    reconfigure(target, pruned_heads={})  # as every config of transformers 4 says it
    assert carnet.verify(source, target).equal
    reconfigure(target, pruned_heads={"0": [1]})
    assert {what for _, what in findings(source, target)} == {"the config sets 'pruned_heads.0', which carnet does not know"}


def test_a_file_that_became_a_folder(tokenizer, tmp_path):
    assert carnet.cross(LLAMA, tmp_path / "target", to="hf", tokenizer=tokenizer).equal
    (tmp_path / "target/tokenizer.json").unlink()
    (tmp_path / "target/tokenizer.json").mkdir()
    assert findings(LLAMA, tmp_path / "target") == alone(tmp_path / "target") == {("tokenizer.json", "missing")}


@pytest.mark.parametrize("value", ["somebody/kernel", {"": "somebody/kernel@main"}])
def test_a_kernel_of_a_repository_that_was_added_to_a_config(value, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    (target / "carnet.json").unlink()
    reconfigure(target, _attn_implementation="sdpa")
    assert carnet.verify(source, target).equal
    reconfigure(target, _attn_implementation=value)
    assert ("_attn_implementation", "_attn_implementation was added") in findings(source, target)


@pytest.mark.parametrize("name", WORDED)
def test_what_a_loader_reads_as_words_is_found_by_a_document_and_named_without(name, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    WORDED[name](target)
    assert findings(source, target) == alone(target) == {(name, "not in the carnet")}
    (target / "carnet.json").unlink()
    assert carnet.verify(source, target).unsure == (name,)


@pytest.mark.parametrize("documented", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_what_nobody_loads_is_named_and_changes_nothing(name, documented, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    BESIDE[name](target)
    if documented:
        assert (carnet.verify(target).findings, carnet.verify(target).beside) == ((), (name,))
    else:
        (target / "carnet.json").unlink()
    verdict = carnet.verify(source, target)
    assert (verdict.findings, verdict.beside) == ((), (name,))


@pytest.mark.parametrize("link", [False, True])
def test_a_file_that_became_a_link(link, proven, tmp_path):
    """Links lead where a snapshot of the Hugging Face cache has its files, or they are found."""
    source, target = proven("hf", tmp_path)
    blob = tmp_path / ("blobs/" + "0" * 64 if link else "elsewhere")
    blob.parent.mkdir(exist_ok=True)
    (target / "config.json").rename(blob)
    (target / "config.json").symlink_to(os.path.relpath(blob, target))
    expected = set() if link else {("config.json", "not a file")}
    assert {(f.where, f.what) for f in carnet.verify(source, target).findings} == expected
    assert {(f.where, f.what) for f in carnet.verify(target).findings} == expected


def test_metadata_of_a_header_that_was_added(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    save_file(load_file(target / MODEL), target / MODEL, {"format": "pt", "loader": "x"})
    assert alone(target) == {(MODEL, "what stands around its tensors differs")}
    assert ("loader", "header metadata that the source does not have") in findings(source, target)
    (target / "carnet.json").unlink()
    assert findings(source, target) == {("loader", "header metadata that the source does not have")}
    save_file(load_file(target / MODEL), target / MODEL, {"format": "tf"})
    assert findings(source, target) == {("format", "header metadata differs")}


def test_a_header_that_was_written_again_is_found_by_the_document(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    rewrite(target / MODEL, lambda tensors: None)
    assert findings(source, target) == {(f"target.frames.{MODEL}", "the carnet claims otherwise")}


@pytest.mark.parametrize("documented", [True, False])
def test_the_total_of_an_index(documented, tmp_path):
    assert carnet.cross(LLAMA, tmp_path / "target", to="hf", shard_size=100_000).equal
    index = tmp_path / "target/model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["metadata"]["total_size"] += 2
    index.write_text(json.dumps(data, indent=2) + "\n")
    if not documented:
        (tmp_path / "target/carnet.json").unlink()
    assert findings(LLAMA, tmp_path / "target") == {("total_size", "the index says another total")}


@pytest.mark.parametrize("documented", [True, False])
def test_a_map_to_code_that_was_added_to_a_config(documented, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    if not documented:
        (target / "carnet.json").unlink()
    reconfigure(target, auto_map={"AutoModelForCausalLM": "somebody/repo--modeling_x.X"})
    assert findings(source, target) == {("auto_map", "auto_map was added")}


def test_a_map_to_code_in_the_config_of_a_tokenizer_that_nobody_knows(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    (target / "carnet.json").unlink()
    (target / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}')
    assert findings(source, target) == {("tokenizer_config.json", "auto_map was added")}


def test_side_files_are_compared_with_those_of_a_source_of_the_same_kind(proven, tmp_path):
    _, source = proven("hf", tmp_path)
    (source / "carnet.json").unlink()
    (source / "modeling_x.py").write_text("one = 1")
    (source / "tokenizer.json").write_text('{"a": 1, "b": 2}')
    shutil.copytree(source, tmp_path / "copy")
    (tmp_path / "copy/tokenizer.json").write_text('{"b": 2,\n"a": 1}')
    assert carnet.verify(source, tmp_path / "copy").findings == ()
    (tmp_path / "copy/modeling_x.py").write_text("one = 2")
    (tmp_path / "copy/tokenizer.json").write_text('{"a": 1, "b": 3}')
    assert findings(source, tmp_path / "copy") == {("modeling_x.py", "file differs"), ("tokenizer.json", "file differs")}


MEGATRON_FILES = [
    "latest_checkpointed_iteration.txt",
    "iter_0000001/metadata.json",
    "iter_0000001/.metadata",
    "iter_0000001/common.pt",
]


@pytest.fixture(scope="module")
def as_megatron(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron") / "target"
    assert carnet.cross(LLAMA, folder, to="megatron", tp=2).equal
    return folder


@pytest.mark.parametrize("name", MEGATRON_FILES)
def test_a_file_of_a_megatron_store_that_is_written_otherwise(name, as_megatron, tmp_path):
    shutil.copytree(as_megatron, tmp_path / "target")
    assert carnet.verify(LLAMA, tmp_path / "target").findings == carnet.verify(tmp_path / "target").findings == ()
    with (tmp_path / "target" / name).open("ab") as file:
        file.write(b"\n")
    try:
        assert (name, "file differs") in findings(LLAMA, tmp_path / "target")
        assert (name, "file differs") in alone(tmp_path / "target")
    except CarnetError as error:
        assert name.rsplit("/", 1)[-1] in str(error)


BUILT = ["iter_0000001/run_config.yaml", "iter_0000001/modelopt_run_config.yaml", "context/model.yaml"]  # of Bridge, of NeMo


@pytest.mark.parametrize(
    "name", ["iter_0000002/common.pt", "iter_0000001/__9_0.distcp", "iter_0000001/x.py", "release/x.pt", *BUILT]
)
def test_a_file_beside_a_megatron_store(name, as_megatron, tmp_path):
    shutil.copytree(as_megatron, tmp_path / "target")
    plant(name)[1](tmp_path / "target")
    assert {where for where, _ in findings(LLAMA, tmp_path / "target")} == {name}
    assert {where for where, _ in alone(tmp_path / "target")} == {name}
    (tmp_path / "target/carnet.json").unlink()
    assert {where for where, _ in findings(LLAMA, tmp_path / "target")} == {name}


def leaves(data, path=()):
    """Yield (path, value) for every value of a document."""
    if isinstance(data, dict) and data:
        for key, each in data.items():
            yield from leaves(each, (*path, key))
    else:
        yield path, data


def put(data, path, value):
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


def test_no_value_of_a_document_can_be_altered_unseen(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    document = target / "carnet.json"
    before = document.read_text()
    paths = [path for path, _ in leaves(json.loads(before))]
    seen = [path for path in paths if path[0] not in ("source", "target")] + random.Random(1).sample(paths, 20)
    assert {path[0] for path in seen} == set(json.loads(before))
    for path in seen:
        data = json.loads(before)
        put(data, path, "altered")
        document.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        for check in (lambda: carnet.verify(target), lambda: carnet.verify(source, target)):
            try:
                assert not check().equal, path
            except CarnetError:
                assert path in (("carnet",), ("state",)), path
    document.write_text(before + " ")
    assert alone(target) == {("carnet.json", "the carnet was altered")}


FALSE = {
    "family": lambda data: data.update(family="gpt2"),
    "config.norm_eps": lambda data: data["config"].update(norm_eps=1e-5),
    "proof.tensors": lambda data: data["proof"].update(tensors=40),
    "proof.casts": lambda data: data["proof"].update(casts=["f32 -> bf16"]),
    "dropped.--drop x": lambda data: data["dropped"].update({"--drop x": ["x"]}),
    "target.tensors.lm_head.weight.layout": lambda data: data["target"]["tensors"]["lm_head.weight"].update(
        layout="vocab: head"
    ),
    "target.files.config.json": lambda data: data["target"]["files"].pop("config.json"),
    "request.to": claim(to="trtllm"),
    "request.tp": claim(tp=2),
}


@pytest.mark.parametrize("where", FALSE)
def test_a_claim_that_is_false_is_found_with_the_source_though_the_document_is_whole(where, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    resealed(target, FALSE[where])
    found = {where for where, _ in findings(source, target)}
    assert {where, where.replace("target.files.", "")} & found


def test_the_digests_of_the_source_in_a_document_are_compared(proven, tmp_path):
    source, target = proven("hf", tmp_path)
    label = "output_layer.weight"
    resealed(target, lambda data: data["source"]["tensors"][label].update(digest="0" * 32))
    assert findings(source, target) == {(f"source.tensors.{label}.digest", "the carnet claims otherwise")}


@pytest.mark.parametrize("damage", ["a fifo", "a folder", "cut off", "another version"])
def test_a_document_that_cannot_be_read_is_a_finding_where_the_source_is_named(damage, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    document = target / "carnet.json"
    text = document.read_text()
    document.unlink()
    if damage == "a fifo":
        os.mkfifo(document)
    elif damage == "a folder":
        document.mkdir()
    else:
        document.write_text(text[:100] if damage == "cut off" else text.replace('"carnet": 3', '"carnet": 2'))
    assert ("carnet.json", "the carnet cannot be believed") in findings(source, target)
    with pytest.raises(CarnetError):
        carnet.verify(target)


# --- types and buffers ---------------------------------------------------------------------------------------------------------


def test_a_cast_that_nobody_asked_for(proven, tmp_path):
    _, source = proven("f32", tmp_path)
    (source / "carnet.json").unlink()
    assert carnet.cross(source, tmp_path / "out", to="hf", dtype="bf16").equal
    (tmp_path / "out/carnet.json").unlink()
    assert findings(source, tmp_path / "out") == {("dtype", "a cast that nobody asked for")}
    assert carnet.verify(source, tmp_path / "out", dtype="bf16").equal
    assert findings(source, tmp_path / "out", dtype="f16") == {("dtype", "not cast as asked")}


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_one_tensor_of_another_type(kind, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    rewrite(target / MODEL, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].to(kind)}))
    assert (
        "dtype",
        "stored wider than in the source" if kind == torch.float32 else "a cast that nobody asked for",
    ) in findings(source, target)


INV_FREQ = "model.layers.1.self_attn.rotary_emb.inv_freq"


def frequencies(base):
    return 1.0 / (base ** (torch.arange(0, DIM, 2, dtype=torch.int64).float() / DIM))  # as transformers computes them


@pytest.mark.parametrize("base", [500_000.0, 10_000.0])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_buffer_of_rotary_frequencies(kind, base, proven, tmp_path):
    source, target = proven("hf", tmp_path)
    (target / "carnet.json").unlink()
    rewrite(target / MODEL, lambda tensors: tensors.update({INV_FREQ: frequencies(base).to(kind)}))
    if base == 500_000.0:
        assert carnet.verify(source, target).findings == ()
    else:
        assert findings(source, target) == {(INV_FREQ, "rotary buffer: wrong values")}


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("name", ["bias", "masked_bias"])
def test_a_buffer_of_a_causal_mask(name, right, proven, tmp_path):
    source, target = proven("gpt", tmp_path)
    (target / "carnet.json").unlink()
    mask = torch.tril(torch.ones(64, 64, dtype=torch.bool)).reshape(1, 1, 64, 64)
    value = torch.tensor(-1e4)
    if not right:
        mask[0, 0, 3, 60], value = True, torch.tensor(0.0)
    name = f"transformer.h.2.attn.{name}"
    rewrite(target / MODEL, lambda tensors: tensors.update({name: value if "masked" in name else mask}))
    if right:
        assert carnet.verify(source, target).findings == ()
    else:
        assert findings(source, target) == {(name, "causal mask: wrong values")}


def test_a_buffer_that_a_source_has_too_is_compared_with_it(proven, tmp_path):
    _, source = proven("hf", tmp_path)
    (source / "carnet.json").unlink()
    rewrite(source / MODEL, lambda tensors: tensors.update({INV_FREQ: frequencies(3.0)}))
    shutil.copytree(source, tmp_path / "copy")
    assert carnet.verify(source, tmp_path / "copy").findings == ()
    rewrite(tmp_path / "copy" / MODEL, lambda tensors: tensors[INV_FREQ].mul_(2))
    assert findings(source, tmp_path / "copy") == {(INV_FREQ, "rotary buffer: wrong values")}

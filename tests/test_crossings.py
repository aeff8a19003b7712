"""Whole crossings, judged from outside: by numpy arithmetic written by hand, by torch's casts, and by two ways to one target."""

import json
import os
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file

import carnet
from carnet.errors import BadRequest, CarnetError
from carnet.plans import saved

GOLDENS = Path(__file__).parent / "goldens"
MEGATRON, TRTLLM = GOLDENS / "megatron", GOLDENS / "trtllm"
NAMES = ("gpt_te_tp2", "llama_dist", "llama_te_pp2_vpp", "llama_tp2pp2", "v019_llama_te_tp2")
# what the goldens were made with: the training arguments
# --vocab-size 250 of a NullTokenizer of 0.16, which counts one more; the stored vocabulary is padded to 256 with random rows
LAYERS, HIDDEN, HEADS, DIM, VOCAB = 4, 64, 4, 16, 251
KV = {"llama": 2, "gpt": 4}
FFN = 96


def bits(file):
    """Return name -> the 16-bit patterns of a tensor: numpy has no bfloat16, and bits are what is compared."""
    return {name: tensor.view(torch.int16).numpy() for name, tensor in load_file(file).items() if "_extra_state" not in name}


def hf_bits(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in bits(file).items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not np.array_equal(found[name], expected[name])] == []


def contents(folder):
    """Return every file of a target but its document, whole."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "carnet.json"}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A golden as a Hugging Face folder, made once."""
    folder, made = tmp_path_factory.mktemp("hf"), {}

    def cross(name):
        if name not in made:
            assert carnet.cross(MEGATRON / name, folder / name, to="hf").equal
            made[name] = folder / name
        return made[name]

    return cross


# --- an oracle for Megatron -> Hugging Face: the plain module's parameters, taken apart by hand --------------------------------


def ungrouped(fused, heads, kv):
    """Return query, key and value rows of a fused projection: for each KV head its query heads, its key head, its value head."""
    per_group = heads // kv * DIM
    query, key, value = [], [], []
    for group in np.split(fused, kv):
        query.append(group[:per_group])
        key.append(group[per_group : per_group + DIM])
        value.append(group[per_group + DIM :])
    return np.concatenate(query), np.concatenate(key), np.concatenate(value)


def llama_by_hand(full, tokens=VOCAB):
    made = {
        "model.embed_tokens.weight": full["embedding.word_embeddings.weight"][:tokens],
        "model.norm.weight": full["decoder.final_layernorm.weight"],
        "lm_head.weight": full["output_layer.weight"][:tokens],
    }
    for layer in range(LAYERS):
        theirs, ours = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        norms = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
        if theirs + norms[0] not in full:
            norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        made[ours + "input_layernorm.weight"] = full[theirs + norms[0]]
        made[ours + "post_attention_layernorm.weight"] = full[theirs + norms[1]]
        fused = ungrouped(full[theirs + "self_attention.linear_qkv.weight"], HEADS, KV["llama"])
        for name, rows in zip("qkv", fused, strict=True):
            made[f"{ours}self_attn.{name}_proj.weight"] = rows
        made[ours + "self_attn.o_proj.weight"] = full[theirs + "self_attention.linear_proj.weight"]
        gate_up = full[theirs + "mlp.linear_fc1.weight"]
        made[ours + "mlp.gate_proj.weight"] = gate_up[:FFN]
        made[ours + "mlp.up_proj.weight"] = gate_up[FFN:]
        made[ours + "mlp.down_proj.weight"] = full[theirs + "mlp.linear_fc2.weight"]
    return made


def gpt_by_hand(full):
    made = {
        "transformer.wte.weight": full["embedding.word_embeddings.weight"][:VOCAB],
        "transformer.wpe.weight": full["embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": full["decoder.final_layernorm.weight"],
        "transformer.ln_f.bias": full["decoder.final_layernorm.bias"],
    }
    for layer in range(LAYERS):
        theirs, ours = f"decoder.layers.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            made[ours + f"ln_1.{kind}"] = full[theirs + f"self_attention.linear_qkv.layer_norm_{kind}"]
            made[ours + f"ln_2.{kind}"] = full[theirs + f"mlp.linear_fc1.layer_norm_{kind}"]
            fused = np.concatenate(ungrouped(full[theirs + f"self_attention.linear_qkv.{kind}"], HEADS, KV["gpt"]))
            made[ours + f"attn.c_attn.{kind}"] = fused.T  # transformers' Conv1D is [in, out]; a bias has no transpose
            made[ours + f"attn.c_proj.{kind}"] = full[theirs + f"self_attention.linear_proj.{kind}"].T
            made[ours + f"mlp.c_fc.{kind}"] = full[theirs + f"mlp.linear_fc1.{kind}"].T
            made[ours + f"mlp.c_proj.{kind}"] = full[theirs + f"mlp.linear_fc2.{kind}"].T
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_for_transformers_is_the_trained_module_taken_apart_by_hand(name, hf):
    full = bits(MEGATRON / name / "full.safetensors")
    tokens = VOCAB - name.startswith("v019")  # since 0.18 the end token is one of --vocab-size
    same(hf_bits(hf(name)), llama_by_hand(full, tokens) if "llama" in name else gpt_by_hand(full))


# --- an oracle for TensorRT-LLM ranks: slices of the folder for transformers ----------------------------------------------------


def by_kv_head(tensors, kv, tp, rank, place):
    """Return a rank's query, key and value rows, joined; where there are more ranks than KV heads, neighbours share one."""
    q, k, v = (tensors[f"model.layers.{place}.self_attn.{name}_proj.weight"] for name in "qkv")
    rows = len(q) // tp
    head, count = (rank * kv // tp, 1) if tp > kv else (rank * (kv // tp), kv // tp)
    held = slice(head * DIM, (head + count) * DIM)
    return np.concatenate([q[rank * rows : (rank + 1) * rows], k[held], v[held]])


def padded_share(rows, tp, rank):
    """Return a rank's rows of the vocabulary, zeros up to a multiple of the ranks."""
    each = -(-len(rows) // tp)
    padded = np.concatenate([rows, np.zeros((each * tp - len(rows), *rows.shape[1:]), rows.dtype)])
    return padded[rank * each : (rank + 1) * each]


def stage_layers(pp, stage):
    """Return a stage's layers: the first stages get one more where they do not divide (torch.tensor_split)."""
    return [int(layer) for layer in np.array_split(np.arange(LAYERS), pp)[stage]]


def rank_by_hand(tensors, *, tp, pp, tp_rank, stage, embedding):
    made = {}
    if stage == 0:
        table = tensors["model.embed_tokens.weight"]
        made["transformer.vocab_embedding.weight"] = {
            "none": table,
            "rows": padded_share(table, tp, tp_rank),
            "columns": np.split(table, tp, axis=1)[tp_rank],
        }[embedding]
    for at, layer in enumerate(stage_layers(pp, stage)):
        theirs, ours = f"model.layers.{layer}.", f"transformer.layers.{at}."
        made[ours + "input_layernorm.weight"] = tensors[theirs + "input_layernorm.weight"]
        made[ours + "post_layernorm.weight"] = tensors[theirs + "post_attention_layernorm.weight"]
        made[ours + "attention.qkv.weight"] = by_kv_head(tensors, KV["llama"], tp, tp_rank, layer)
        made[ours + "attention.dense.weight"] = np.split(tensors[theirs + "self_attn.o_proj.weight"], tp, axis=1)[tp_rank]
        made[ours + "mlp.fc.weight"] = np.split(tensors[theirs + "mlp.gate_proj.weight"], tp)[tp_rank]
        made[ours + "mlp.gate.weight"] = np.split(tensors[theirs + "mlp.up_proj.weight"], tp)[tp_rank]
        made[ours + "mlp.proj.weight"] = np.split(tensors[theirs + "mlp.down_proj.weight"], tp, axis=1)[tp_rank]
    if stage == pp - 1:
        made["transformer.ln_f.weight"] = tensors["model.norm.weight"]
        made["lm_head.weight"] = padded_share(tensors["lm_head.weight"], tp, tp_rank)
    return made


@pytest.mark.parametrize("embedding", ["none", "rows", "columns"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (2, 3), (4, 2)])
def test_the_ranks_are_slices_that_numpy_cuts(tp, pp, embedding, hf, tmp_path):
    out = tmp_path / "ranks"
    assert carnet.cross(MEGATRON / "llama_tp2pp2", out, to="trtllm", tp=tp, pp=pp, parallel_embedding=embedding).equal
    whole = hf_bits(hf("llama_tp2pp2"))
    for stage, tp_rank in product(range(pp), range(tp)):
        expected = rank_by_hand(whole, tp=tp, pp=pp, tp_rank=tp_rank, stage=stage, embedding=embedding)
        same(bits(out / f"rank{stage * tp + tp_rank}.safetensors"), expected)
    said = json.loads((out / "config.json").read_text())
    assert (said["use_parallel_embedding"], said["embedding_sharding_dim"]) == {
        "none": (False, 0),
        "rows": (True, 0),
        "columns": (True, 1),
    }[embedding]
    mapping = {name: said["mapping"][name] for name in ("world_size", "tp_size", "pp_size")}
    assert mapping == {"world_size": tp * pp, "tp_size": tp, "pp_size": pp}
    assert said["vocab_size"] == VOCAB  # the true one, padded or not
    assert said["num_key_value_heads"] == KV["llama"]  # the model's own, repeated or not


# --- two ways to one target, and the way back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pp", [1, 2, 3])  # 4 layers: 3 stages hold 2, 1 and 1
@pytest.mark.parametrize("tp", [1, 2, 4])  # llama has 2 KV heads: 4 ranks hold each twice
@pytest.mark.parametrize("name", ["llama_tp2pp2", "gpt_te_tp2"])
def test_ranks_by_way_of_a_folder_are_the_ranks_of_the_direct_way(name, tp, pp, hf, tmp_path):
    assert carnet.cross(MEGATRON / name, tmp_path / "direct", to="trtllm", tp=tp, pp=pp).equal
    assert carnet.cross(hf(name), tmp_path / "roundabout", to="trtllm", tp=tp, pp=pp).equal
    direct = contents(tmp_path / "direct")
    assert sorted(direct) == ["config.json", *sorted(f"rank{rank}.safetensors" for rank in range(tp * pp))]
    assert contents(tmp_path / "roundabout") == direct


@pytest.mark.parametrize(("tp", "pp", "embedding"), [(1, 1, "none"), (2, 2, "rows"), (4, 1, "columns"), (4, 3, "rows")])
@pytest.mark.parametrize("name", ["llama_te_pp2_vpp", "gpt_te_tp2"])
def test_a_folder_comes_back_from_ranks_byte_for_byte(name, tp, pp, embedding, hf, tmp_path):
    ranks = tmp_path / "ranks"
    assert carnet.cross(hf(name), ranks, to="trtllm", tp=tp, pp=pp, parallel_embedding=embedding).equal
    assert carnet.cross(ranks, tmp_path / "back", to="hf").equal
    before, after = contents(hf(name)), contents(tmp_path / "back")
    assert after.keys() == before.keys()
    assert after["model.safetensors"] == before["model.safetensors"]
    # a TensorRT-LLM config has no place for the ids of special tokens; everything else is as it was
    tokens = {"bos_token_id", "eos_token_id", "pad_token_id"}
    kept = {key: value for key, value in json.loads(before["config.json"]).items() if key not in tokens}
    assert json.loads(after["config.json"]) == kept


def test_ranks_come_back_from_other_ranks_byte_for_byte(tmp_path):
    given = {"to": "trtllm", "tp": 4, "pp": 3, "parallel_embedding": "rows"}
    assert carnet.cross(MEGATRON / "llama_tp2pp2", tmp_path / "a", **given).equal
    assert carnet.cross(tmp_path / "a", tmp_path / "b", to="trtllm", tp=2, pp=2, parallel_embedding="columns").equal
    assert carnet.cross(tmp_path / "b", tmp_path / "c", **given).equal
    assert contents(tmp_path / "c") == contents(tmp_path / "a")


def test_a_checkpoint_gives_one_target_whether_its_root_or_its_iteration_is_named(tmp_path):
    shutil.copytree(MEGATRON / "llama_dist", tmp_path / "elsewhere")
    assert carnet.cross(MEGATRON / "llama_dist", tmp_path / "a", to="hf").equal
    assert carnet.cross(tmp_path / "elsewhere/iter_0000001", tmp_path / "b", to="hf").equal
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --- casts ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("name", ["llama_tp2pp2", "gpt_te_tp2"])
def test_a_cast_gives_the_bits_of_torch_s_own(name, word, dtype, hf, tmp_path):
    assert carnet.cross(MEGATRON / name, tmp_path / "out", to="hf", dtype=word).equal
    found, plain = load_file(tmp_path / "out/model.safetensors"), load_file(hf(name) / "model.safetensors")
    assert found.keys() == plain.keys()
    for tensor, before in plain.items():
        assert found[tensor].dtype == dtype
        assert torch.equal(found[tensor].view(torch.uint8), before.to(dtype).view(torch.uint8)), tensor
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["torch_dtype"] == str(dtype).removeprefix("torch.")


def with_embedding(folder, source, values):
    """Write a float32 copy of a folder for transformers with an embedding of these values first."""
    shutil.copytree(source, folder)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    embedding = tensors["model.embed_tokens.weight"]
    embedding.view(-1)[: len(values)] = values
    save_file({name: tensor.numpy() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    return embedding


# signs, infinities, the largest of f16 and what still rounds to it, subnormals of f16 and of f32, ties of bf16 down and up
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), 65504.0, 65519.99, 1e-8, 5.9e-8, 6.1e-5, 1e-40, 1.00390625, 1.01171875]


@pytest.mark.parametrize(("word", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_cast_rounds_the_edges_as_torch_does(word, dtype, hf, tmp_path):
    """Values that random weights do not have."""
    patterns = torch.arange(VOCAB * HIDDEN, dtype=torch.int64) * 268409 % (1 << 32)  # spread over all 32-bit patterns
    values = patterns.to(torch.int32).view(torch.float32)
    values[: len(SPECIAL)] = torch.tensor(SPECIAL)
    lost = values.to(dtype).isinf() & values.isfinite()  # those are refused: the next test
    values = torch.where(lost | values.isnan(), 1.0, values)  # NaN has many spellings, and casts need not agree on them
    embedding = with_embedding(tmp_path / "source", hf("llama_tp2pp2"), values)
    given = {"to": "trtllm", "tp": 2, "dtype": word, "parallel_embedding": "columns"}
    assert carnet.cross(tmp_path / "source", tmp_path / "out", **given).equal
    expected = embedding.to(dtype).chunk(2, dim=1)
    for rank in range(2):
        found = load_file(tmp_path / f"out/rank{rank}.safetensors")["transformer.vocab_embedding.weight"]
        assert torch.equal(found.view(torch.int16), expected[rank].contiguous().view(torch.int16))


@pytest.mark.parametrize(("word", "value"), [("f16", 65520.0), ("f16", -1e6), ("bf16", 3.4e38), ("bf16", -3.4e38)])
def test_a_weight_that_a_cast_would_make_infinite_is_refused_and_named(word, value, hf, tmp_path):
    with_embedding(tmp_path / "source", hf("llama_tp2pp2"), torch.tensor([value]))
    with pytest.raises(BadRequest, match=f"a value of embed is out of range for {word}"):
        carnet.cross(tmp_path / "source", tmp_path / "out", to="hf", dtype=word)
    assert not (tmp_path / "out").exists()


# --- files ---------------------------------------------------------------------------------------------------------------------


def test_a_small_shard_size_gives_shards_and_the_index_that_transformers_reads(hf, tmp_path):
    limit = 40_000
    assert carnet.cross(MEGATRON / "llama_tp2pp2", tmp_path / "out", to="hf", shard_size=limit).equal
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{at + 1:05}-of-{len(files):05}.safetensors" for at in range(len(files))]
    assert len(files) > 3
    held = {}
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            names = list(opened.keys())
            assert opened.metadata() == {"format": "pt"}
        nbytes = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / file).values())
        assert nbytes <= limit or len(names) == 1
        held |= dict.fromkeys(names, file)
    assert index["weight_map"] == held
    whole = hf_bits(hf("llama_tp2pp2"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    same(hf_bits(tmp_path / "out"), whole)


@pytest.mark.parametrize(
    "given", [{"to": "hf", "shard_size": 50_000}, {"to": "trtllm", "tp": 4, "pp": 3}, {"to": "hf", "dtype": "f16"}]
)
def test_the_same_input_gives_the_same_bytes_document_included(given, tmp_path):
    for place in "ab":
        (tmp_path / place).mkdir()
        assert carnet.cross(MEGATRON / "llama_te_pp2_vpp", tmp_path / place / "out", **given).equal
    a, b = ({path.name: path.read_bytes() for path in (tmp_path / place / "out").iterdir()} for place in "ab")
    assert "carnet.json" in a
    assert a == b


def test_the_document_names_the_target_and_not_the_folder_in_which_it_was_made(tmp_path):
    assert carnet.cross(MEGATRON / "llama_te_pp2_vpp", tmp_path / "out", to="hf").equal
    assert ".partial" not in (tmp_path / "out/carnet.json").read_text()


@pytest.mark.parametrize("megabytes", [68, 75, 1024])
def test_the_memory_that_is_given_changes_no_byte(megabytes, hf, tmp_path):
    assert carnet.cross(MEGATRON / "llama_tp2pp2", tmp_path / "out", to="hf", memory=megabytes << 20).equal
    assert contents(tmp_path / "out") == contents(hf("llama_tp2pp2"))


def test_memory_that_is_too_little_to_examine_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(BadRequest, match="too small to examine"):
        carnet.cross(MEGATRON / "llama_tp2pp2", tmp_path / "out", to="hf", memory="70M")
    assert not list(tmp_path.iterdir())  # a plan for more memory would be another


def test_nothing_is_left_beside_a_finished_target(tmp_path):
    assert carnet.cross(MEGATRON / "llama_tp2pp2", tmp_path / "out", to="trtllm", tp=2).equal
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["carnet.json", "config.json", "rank0.safetensors", "rank1.safetensors"]


# --- a plan is data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [{"to": "trtllm", "tp": 4, "pp": 3, "parallel_embedding": "rows"}, {"to": "hf", "dtype": "f32"}]
)
@pytest.mark.parametrize("name", ["llama_tp2pp2", "gpt_te_tp2"])
def test_a_plan_that_was_saved_and_loaded_writes_what_the_plan_itself_writes(name, given, tmp_path):
    made = carnet.plan(MEGATRON / name, **given)
    saved.save(made, tmp_path / "plan")
    assert saved.load(tmp_path / "plan") == made
    carnet.run(made, tmp_path / "direct")
    carnet.run(tmp_path / "plan", tmp_path / "saved")
    assert carnet.verify(MEGATRON / name, tmp_path / "saved", plan=tmp_path / "plan").equal
    assert contents(tmp_path / "saved") == contents(tmp_path / "direct")


def test_what_run_writes_and_verify_completes_is_what_cross_writes(tmp_path):
    given = {"to": "trtllm", "tp": 2, "pp": 2}
    steps, once = tmp_path / "steps/out", tmp_path / "once/out"
    steps.parent.mkdir()
    once.parent.mkdir()
    carnet.run(carnet.plan(MEGATRON / "llama_tp2pp2", **given), steps)
    assert json.loads((steps / "carnet.json").read_text())["state"] == "written, not verified"
    assert carnet.verify(MEGATRON / "llama_tp2pp2", steps).equal
    assert carnet.cross(MEGATRON / "llama_tp2pp2", once, **given).equal
    assert json.loads((steps / "carnet.json").read_text()) == json.loads((once / "carnet.json").read_text())
    assert contents(steps) == contents(once)


def touch(file):
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def append_a_byte(file):
    with file.open("ab") as opened:
        opened.write(b"\0")


def overwrite_in_place(file):
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


SOURCES = {
    "a megatron checkpoint's data": (MEGATRON / "llama_tp2pp2", "iter_0000001/__2_0.distcp"),
    "a megatron checkpoint's metadata": (MEGATRON / "llama_tp2pp2", "iter_0000001/.metadata"),
    "a folder's weights": (TRTLLM / "llama/hf", "model.safetensors"),
    "a folder's config": (TRTLLM / "llama/hf", "config.json"),
    "a rank": (TRTLLM / "llama/trtllm-tp2pp2", "rank3.safetensors"),
}


@pytest.mark.parametrize("change", [touch, append_a_byte, overwrite_in_place])
@pytest.mark.parametrize("which", SOURCES)
def test_a_plan_is_refused_once_its_source_has_changed(which, change, tmp_path):
    golden, file = SOURCES[which]
    source = tmp_path / "source"
    shutil.copytree(golden, source)
    made = carnet.plan(source, to="hf")
    change(source / file)
    with pytest.raises(CarnetError):
        carnet.run(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_an_untouched_copy_in_the_same_place_is_not_refused(tmp_path):
    shutil.copytree(MEGATRON / "llama_tp2pp2", tmp_path / "source")
    made = carnet.plan(tmp_path / "source", to="hf")
    assert carnet.run(made, tmp_path / "out") == tmp_path / "out"


def test_a_target_that_is_there_is_refused_and_left_as_it_is(tmp_path):
    made = carnet.plan(MEGATRON / "llama_tp2pp2", to="hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    for refused in (lambda: carnet.run(made, tmp_path / "out"), lambda: carnet.cross(made.source, tmp_path / "out", to="hf")):
        with pytest.raises(BadRequest, match="exists"):
            refused()
    assert contents(tmp_path / "out") == {"mine.txt": b"mine"}


def test_a_target_is_not_written_into_its_own_source(tmp_path):
    shutil.copytree(TRTLLM / "llama/hf", tmp_path / "source")
    before = contents(tmp_path / "source")
    with pytest.raises(BadRequest, match="lie in each other"):
        carnet.cross(tmp_path / "source", tmp_path / "source", to="hf")
    assert contents(tmp_path / "source") == before


def test_a_crossing_leaves_its_source_as_it_was(tmp_path):
    shutil.copytree(MEGATRON / "llama_dist", tmp_path / "source")

    def state():
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "source").rglob("*") if path.is_file()
        }

    before = state()
    assert carnet.cross(tmp_path / "source", tmp_path / "out", to="hf").equal
    assert state() == before

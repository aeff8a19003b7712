"""Gemma 1 to 4: transformers runs what carnet wrote, and NVIDIA's own converter wrote the same ranks."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Gemma2Config, Gemma3TextConfig, Gemma4TextConfig, GemmaConfig

import carnet
from carnet.errors import CarnetError
from tests.referees.sizes import GROUPED

pytestmark = pytest.mark.referee

GOLDEN = Path(__file__).parents[1] / "goldens/trtllm/gemma"
BUFFERS = ("embed_positions", "embed_positions_for_gpt_attention", "rotary_inv_freq")
SIZES = {**GROUPED, "intermediate_size": 56, "head_dim": 24}
KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"]
ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 10}
WIDE = {**SIZES, "global_head_dim": 32, "hidden_size_per_layer_input": 0, "sliding_window": 8}
KEYED = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
MIXED = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 20}
PART = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
}
WHOLE = {**PART, "full_attention": {"rope_type": "default", "rope_theta": 500000.0}}
MODELS = {
    "gemma": GemmaConfig(**SIZES),
    "gemma, a head of its own and biases": GemmaConfig(**SIZES, tie_word_embeddings=False, attention_bias=True),
    "gemma2": Gemma2Config(**SIZES, sliding_window=8),
    "gemma2, layers out of step": Gemma2Config(
        **SIZES, **CAPS, sliding_window=8, layer_types=KINDS, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}
    ),
    "gemma3": Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 7}, sliding_window=8),
    "gemma3, angles stretched, layers out of step, capped": Gemma3TextConfig(
        **SIZES, **CAPS, sliding_window=8, layer_types=KINDS, rope_parameters=ROPE
    ),
}
MODELS |= {
    "gemma4": Gemma4TextConfig(**{**WIDE, "num_hidden_layers": 7}, **KEYED),
    "gemma4, values of their own, capped, a head of its own": Gemma4TextConfig(
        **WIDE, layer_types=KINDS, final_logit_softcapping=2.0, tie_word_embeddings=False
    ),
    "gemma4, one width, biases": Gemma4TextConfig(
        **{**WIDE, "global_head_dim": 24}, attention_bias=True, layer_types=KINDS, rope_parameters=WHOLE, attention_k_eq_v=True
    ),
    "gemma4, a mixture": Gemma4TextConfig(**WIDE, **KEYED, **MIXED, layer_types=KINDS, rope_parameters=PART),
    "gemma4, a mixture, values of their own": Gemma4TextConfig(**WIDE, **MIXED),
}
RANKED = ("gemma", "gemma2", "gemma2, layers out of step")
# where a config lies, and which program wrote it
VOLATILE = {"_name_or_path", "transformers_version"}


def weights(folder):
    return load_file(folder / "model.safetensors")


def meaning(folder) -> dict[str, object]:
    """Return what transformers understands a folder's config to say."""
    return {key: value for key, value in AutoConfig.from_pretrained(folder).to_dict().items() if key not in VOLATILE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_as_it_went(which, dtype, there_and_again):
    there_and_again(MODELS[which], dtype=dtype)


@pytest.fixture
def exact(saved):
    """Save a model whose norms survive one more and one less: they are multiples of 1/64 between -1/2 and 1/2."""

    def save(config, dtype):
        folder = saved(config, dtype)
        tensors = weights(folder)
        for name in tensors:
            if "norm" in name:
                tensors[name] = ((tensors[name].float().clamp(-0.5, 0.5) * 64).round() / 64).to(dtype)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", RANKED)
def test_a_model_comes_back_from_four_tensorrt_ranks_as_it_went(which, dtype, exact, loaded, tmp_path):
    folder = exact(MODELS[which], dtype)
    assert carnet.cross(folder, tmp_path / "ranks", to="trtllm", tp=2, pp=2).equal
    assert carnet.cross(tmp_path / "ranks", tmp_path / "back", to="hf").equal
    ours, theirs = weights(tmp_path / "back"), weights(folder)
    assert ours.keys() == theirs.keys()
    # a norm less one is kept in float32: bf16(w - 1) need not be w - 1
    assert {name: tensor.dtype for name, tensor in ours.items()} == {n: torch.float32 if "norm" in n else dtype for n in theirs}
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in theirs)
    tokens = torch.randint(97, (2, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found, expected = (loaded(each)(tokens, use_cache=False).logits for each in (tmp_path / "back", folder))
    assert expected.std() > 0.1
    assert torch.equal(found, expected)
    assert meaning(tmp_path / "back") == meaning(folder)


def test_a_norm_of_the_ranks_is_the_folder_s_plus_one(saved, tmp_path):
    saved(MODELS["gemma2"], torch.bfloat16)
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm", tp=2).equal
    ours, theirs = load_file(tmp_path / "ranks/rank1.safetensors"), weights(tmp_path / "hf")
    pairs = {
        "input_layernorm": "input_layernorm",
        "post_layernorm": "post_attention_layernorm",
        "pre_feedforward_layernorm": "pre_feedforward_layernorm",
        "post_feedforward_layernorm": "post_feedforward_layernorm",
    }
    for here, there in pairs.items():
        expected = (theirs[f"model.layers.3.{there}.weight"].float() + 1).bfloat16()
        assert torch.equal(ours[f"transformer.layers.3.{here}.weight"], expected)


def ranks(folder):
    found = [load_file(folder / f"rank{rank}.safetensors") for rank in range(4)]
    return [{name: tensor for name, tensor in rank.items() if name not in BUFFERS} for rank in found]


def same(ours, theirs):
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_every_rank_holds_what_nvidia_s_converter_writes_but_for_the_layers_that_it_takes_twice(tmp_path):
    """Its Gemma parser keeps the numbers of the folder, so that the second stage's 0 and 1 are the model's 0 and 1 again."""
    assert carnet.cross(GOLDEN / "hf", tmp_path / "ranks", to="trtllm", tp=2, pp=2).equal
    ours, theirs = ranks(tmp_path / "ranks"), ranks(GOLDEN / "trtllm-tp2pp2")
    for rank in range(4):
        assert ours[rank].keys() == theirs[rank].keys()
        wrong = {name for name in theirs[rank] if not same(ours[rank][name], theirs[rank][name])}
        assert wrong == ({name for name in theirs[rank] if ".layers." in name} if rank >= 2 else set())
    for rank in (2, 3):
        assert all(same(theirs[rank][name], theirs[rank - 2][name]) for name in theirs[rank] if ".layers." in name)
        findings = carnet.verify(GOLDEN / "hf", GOLDEN / "trtllm-tp2pp2").findings
        assert "holds layers.0.attention.q" in {found.what for found in findings if found.where == "layers.2.attention.q"}


def test_every_config_field_is_the_one_that_nvidia_s_converter_writes(tmp_path):
    assert carnet.cross(GOLDEN / "hf", tmp_path / "ranks", to="trtllm", tp=2, pp=2).equal
    ours, theirs = ((folder / "config.json").read_text() for folder in (tmp_path / "ranks", GOLDEN / "trtllm-tp2pp2"))
    assert json.loads(ours) == json.loads(theirs)


def test_nvidia_s_first_stage_and_what_follows_the_layers_come_back_as_they_were(tmp_path):
    assert carnet.cross(GOLDEN / "trtllm-tp2pp2", tmp_path / "hf", to="hf").equal
    ours, theirs = weights(tmp_path / "hf"), weights(GOLDEN / "hf")
    assert ours.keys() == theirs.keys()
    right = {name for name in theirs if not any(f"layers.{layer}." in name for layer in (2, 3))}
    # NVIDIA rounded the norms
    assert all(same(ours[name], theirs[name]) for name in right if "norm" not in name)
    assert all(torch.equal(ours[n], (theirs[n].float() + 1).bfloat16().float() - 1) for n in right if "norm" in n)


@pytest.mark.parametrize(("asked", "shape"), [(None, [49, 40]), ("rows", [49, 40]), ("none", [97, 40]), ("columns", [97, 20])])
def test_ranks_share_the_embedding_by_rows_unless_asked_otherwise(asked, shape, saved, tmp_path):
    saved(MODELS["gemma"])
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm", tp=2, parallel_embedding=asked).equal
    found = load_file(tmp_path / "ranks/rank0.safetensors")["transformer.vocab_embedding.weight"]
    assert [*found.shape] == shape


def test_one_rank_shares_nothing(saved, tmp_path):
    saved(MODELS["gemma"])
    assert carnet.cross(tmp_path / "hf", tmp_path / "ranks", to="trtllm").equal
    assert json.loads((tmp_path / "ranks/config.json").read_text())["use_parallel_embedding"] is False


def changed(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


def test_the_sliding_window_pattern_counts_where_no_layer_types_are(saved, tmp_path):
    """As Gemma 3 was published; transformers agrees."""
    saved(MODELS["gemma3"])
    changed(tmp_path / "hf", layer_types=None, _sliding_window_pattern=None, sliding_window_pattern=3)  # null: not set
    changed(tmp_path / "hf", rope_parameters=None, rope_theta=300000.0, rope_local_base_freq=7000.0)
    assert carnet.cross(tmp_path / "hf", tmp_path / "again", to="hf").equal
    before, after = meaning(tmp_path / "hf"), meaning(tmp_path / "again")
    assert after["layer_types"] == (["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"]
    assert {**after, "_sliding_window_pattern": None} == before


REFUSED = (
    ("gemma", {"hidden_act": "silu"}),
    ("gemma", {"use_bidirectional_attention": True}),
    ("gemma", {"head_dim": None}),
    ("gemma2", {"layer_types": ["sliding_attention"]}),
    ("gemma2", {"layer_types": ["chunked_attention"] * 5}),
    ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}}),
    ("gemma4", {"layer_types": ["sliding_attention"] * 7}),
    ("gemma4", {"num_kv_shared_layers": 2}),
    ("gemma4", {"hidden_size_per_layer_input": 16}),
    ("gemma4", {"use_bidirectional_attention": "all"}),
    ("gemma4", {"rope_parameters": {**PART, "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}}),
    ("gemma4", {"rope_parameters": {**PART, "full_attention": {**PART["full_attention"], "factor": 2.0}}}),
    ("gemma4", {"per_layer_config": None, "num_global_key_value_heads": 3}),
    ("gemma4", {"global_head_dim": 32}),
    ("gemma4", {"per_layer_config": None, "global_head_dim": 0}),
    ("gemma4", {"per_layer_config": {"7": {"head_dim": 32}}}),
    ("gemma4", {"per_layer_config": {"6": {"head_dim": 0}}}),
    ("gemma4", {"per_layer_config": {"6": {"intermediate_size": 32}}}),
    ("gemma4", {"per_layer_config": {"6": 32}}),
    ("gemma4", {"per_layer_config": {"0": {"head_dim": 32}}}),
    ("gemma4, a mixture", {"num_experts": None}),
    ("gemma4, a mixture", {"enable_moe_block": False}),
)


@pytest.mark.parametrize(("which", "values"), REFUSED, ids=str)
def test_what_carnet_cannot_carry_over_is_refused(which, values, saved, tmp_path):
    saved(MODELS[which])
    changed(tmp_path / "hf", **values)
    with pytest.raises(CarnetError):
        carnet.cross(tmp_path / "hf", tmp_path / "again", to="hf")


NO_WORD = (
    ("gemma3", "trtllm"),
    ("gemma, a head of its own and biases", "trtllm"),
    ("gemma", "megatron"),
    ("gemma2", "megatron"),
)


@pytest.mark.parametrize(("which", "to"), NO_WORD, ids=str)
def test_what_a_program_has_no_word_for_is_refused(which, to, saved, tmp_path):
    saved(MODELS[which])
    with pytest.raises(CarnetError):
        carnet.cross(tmp_path / "hf", tmp_path / "out", to=to)


def test_keys_that_are_values_have_biases_in_megatron_too(there_and_again):
    there_and_again(MODELS["gemma4, one width, biases"], {"to": "megatron", "tp": 2, "accept": ["needs"]})


def test_keys_that_are_values_stand_twice_in_megatron_and_must_be_the_same(saved, tmp_path):
    """As Megatron-Bridge stores them: rows of the keys, and again in the place of the values."""
    saved(MODELS["gemma4"])
    assert carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron", accept=["needs"]).equal
    key = weights(tmp_path / "hf")["model.layers.6.self_attn.k_proj.weight"].numpy().tobytes()
    (held,) = (path for path in (tmp_path / "megatron").rglob("*.distcp") if key in path.read_bytes())
    found = held.read_bytes()
    assert (found.count(key), found.count(key + key)) == (2, 1)
    assert carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf").equal
    again = found.index(key) + len(key)
    held.write_bytes(found[:again] + bytes([found[again] ^ 1]) + found[again + 1 :])
    with pytest.raises(CarnetError, match=r"attention\.k"):
        carnet.cross(tmp_path / "megatron", tmp_path / "other", to="hf")

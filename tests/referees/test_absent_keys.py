"""A key that a config.json does not have means what transformers' config class takes it for; a key that is null, what null means there.

Each key of a small model's config is left out in turn, and put to null. What carnet reads is what it reads of the whole config that
the class makes of the rest: the same, or it refuses and says that the key is not there.
"""

import json
from copy import deepcopy

import pytest
import transformers as hf

from carnet.architectures.known import FAMILIES, recognise, text_of
from carnet.errors import CarnetError
from carnet.model.fields import BY_NAME
from carnet.model.model import concerns, value
from tests.referees.meanings import BASES, GEMMA4_EXPERTS, LATENT, SIZES, WIDE
from tests.referees.towers import CLASSES, PUBLISHED

pytestmark = pytest.mark.referee

FAMILY = {family.name: family for family in FAMILIES}
NO_CLASS = {"bailing_moe_v2", "eagle3", "mimo", "nemotron_nas"}  # in transformers
NAMES = {"architectures", "model_type"}  # which class it is: carnet reads either, transformers wants the second
# transformers does not compute the layers that predict further tokens; whether they are there the tensors say
FURTHER = {"num_nextn_predict_layers"}

NEW_DECODER = {"new_decoder_architecture": True, "parallel_attn": True}
HYBRID = {"n_routed_experts": 4, "num_experts_per_tok": 3, "layers_block_type": ["linear_attention", "moe", "full_attention"]}
GROWING = {
    "rope_type": "yarn",
    "rope_theta": 7.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.5,
}
MAMBA2 = {"num_hidden_layers": 2, "hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 12, "vocab_size": 97}
FINE = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
SPARSE = {**LATENT, "q_lora_rank": 12, "index_n_heads": 3, "index_head_dim": 10, "index_topk": 6}
MODELS = {
    **BASES,
    "qwen3_next": (hf.Qwen3NextConfig, {**SIZES, "num_hidden_layers": 6, "num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_5": (hf.Qwen3_5TextConfig, {**SIZES, "num_hidden_layers": 6}),
    "qwen3_5_moe": (hf.Qwen3_5MoeTextConfig, {**SIZES, "num_hidden_layers": 6, "num_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": (hf.OlmoeConfig, {**SIZES, "num_experts": 4, "num_experts_per_tok": 2}),
    "minimax_m2": (hf.MiniMaxM2Config, {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8}),
    "seed_oss": (hf.SeedOssConfig, WIDE),
    "smollm3": (hf.SmolLM3Config, {**SIZES, "num_hidden_layers": 6, "pad_token_id": 0}),
    "ernie4_5": (hf.Ernie4_5Config, WIDE),
    "ernie4_5_moe": (hf.Ernie4_5_MoeConfig, {**SIZES, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 20}),
    "glm4": (hf.Glm4Config, {**WIDE, "pad_token_id": 0}),
    "glm4_moe": (hf.Glm4MoeConfig, {**WIDE, **FINE, "first_k_dense_replace": 1}),
    "glm4_moe_lite": (hf.Glm4MoeLiteConfig, {name: size for name, size in LATENT.items() if name != "first_k_dense_replace"}),
    "deepseek_v32": (hf.DeepseekV32Config, SPARSE),
    "glm_moe_dsa": (hf.GlmMoeDsaConfig, SPARSE),
    "hunyuan_v1_dense": (hf.HunYuanDenseV1Config, WIDE),
    "hunyuan_v1_moe": (hf.HunYuanMoEV1Config, {**WIDE, "num_experts": 4, "moe_topk": 2}),
    "olmo3": (hf.Olmo3Config, SIZES),
    "exaone4": (hf.Exaone4Config, WIDE),
    "cohere": (hf.CohereConfig, SIZES),
    "cohere2": (hf.Cohere2Config, SIZES),
    "stablelm": (hf.StableLmConfig, SIZES),
    "dots1": (hf.Dots1Config, {**WIDE, **FINE, "n_shared_experts": 1}),
    "ministral3": (hf.Ministral3Config, {**WIDE, "rope_parameters": GROWING}),
    "mamba2": (hf.Mamba2Config, {**MAMBA2, "n_groups": 2}),
    "mamba": (hf.MambaConfig, {"vocab_size": 97, "hidden_size": 40, "num_hidden_layers": 3, "state_size": 12}),
}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 60}
MANY_HEADS = {"num_attention_heads": 256, "num_key_value_heads": 64, "hidden_size": 2560}
WIDE_HEADS = {"global_head_dim": 24, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 7.0}
MROPE = {"rope_type": "default", "rope_theta": 7.0, "mrope_section": [1, 2, 1], "mrope_interleaved": True}
# family -> what its small model may be besides: no field is then what another one says, and no class has it as its default
CHANGES = {
    **dict.fromkeys(MODELS, ({}, HEADS, MANY_HEADS)),
    **dict.fromkeys(("llama", "mistral", "qwen2", "mixtral"), ({}, HEADS, MANY_HEADS, {"rope_parameters": LLAMA3})),
    "gpt2": ({}, {"n_head": 6, "n_embd": 60, "n_inner": 70}),
    "mamba2": ({},),
    "mamba": ({}, {"hidden_size": 200, "expand": 3, "use_conv_bias": False}),
    "falcon": ({}, {"num_attention_heads": 6, "hidden_size": 60, "num_kv_heads": 3, **NEW_DECODER}),
    "gpt_neox": ({}, {"num_attention_heads": 6, "hidden_size": 60, "rotary_pct": 0.5}),
    "gemma4": ({}, HEADS, MANY_HEADS, {**WIDE_HEADS, **GEMMA4_EXPERTS}),
    "gemma3": ({}, HEADS, {"sliding_window_pattern": 2}),
    "deepseek_v2": ({}, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    "deepseek_v3": ({}, {"n_group": 16, "topk_group": 5, "n_routed_experts": 64}, {"num_attention_heads": 256}),
    "qwen2_moe": ({}, HEADS, {**MANY_HEADS, "decoder_sparse_step": 2}),
    "qwen3_moe": ({}, HEADS, {**MANY_HEADS, "decoder_sparse_step": 2}),
    "nemotron_h": ({}, HEADS, HYBRID),
    "qwen3_5": ({}, HEADS, {"linear_num_value_heads": 64, "rope_parameters": MROPE}),
    "qwen3_5_moe": ({}, HEADS, {"linear_num_value_heads": 64, "rope_parameters": MROPE}),
    "deepseek_v32": ({}, {"n_group": 16, "topk_group": 5, "n_routed_experts": 64}),
    "glm_moe_dsa": ({}, {"indexer_types": ["full", "shared", *["full"] * (LATENT["num_hidden_layers"] - 2)]}),
    "qwen3_next": ({}, HEADS, {"decoder_sparse_step": 2, "full_attention_interval": 3, "linear_num_value_heads": 64}),
}
TABLE = [(name, change) for name, changes in CHANGES.items() for change in changes]


def spelled(said, name):
    """Return a config as transformers 5 writes it, and as versions before did: the base beside rope_scaling."""
    found = deepcopy(said)
    rope = found.pop("rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope or name == "gpt_oss":
        return [said]
    found["rope_theta"] = rope.pop("rope_theta")
    return [said, found | ({"rope_scaling": rope} if rope["rope_type"] != "default" else {})]


def keys(said, above=()):
    """Yield the path of every key, of those inside others too."""
    for key, inside in said.items():
        yield (*above, key)
        if isinstance(inside, dict) and key in {"rope_parameters", "rope_scaling", "text_config"}:
            yield from keys(inside, (*above, key))


def changed(said, path, null):
    """Return a config without a key, or with null there."""
    found = deepcopy(said)
    inside = found
    for key in path[:-1]:
        inside = inside[key]
    if null:
        inside[path[-1]] = None
    else:
        del inside[path[-1]]
    return found


def read(said):
    try:
        text, rest = text_of(said, "a config")
        return recognise("hf", text, "a config", {"wrapper": rest})[1]
    except CarnetError as error:
        return error


def different(said, kind, file):
    """Return how what carnet reads differs from what it reads of the whole config that transformers makes of it."""
    file.write_text(json.dumps(said))
    try:
        whole = json.loads(kind.from_json_file(file).to_json_string(use_diff=False))
    except Exception:  # noqa: BLE001 - of many kinds: there is no such model
        return None
    found, expected = read(said), read(whole)
    if isinstance(expected, CarnetError):
        return {} if isinstance(found, CarnetError) else f"{found}, where carnet refuses the whole: {expected}"
    if isinstance(found, CarnetError):
        return found
    names = (found.keys() | expected.keys()) - {"wrapper"}
    fields = {name for name in names if not BY_NAME[name].soft and concerns(expected, name)}
    return {name: (value(found, name), value(expected, name)) for name in fields if value(found, name) != value(expected, name)}


def test_every_family_is_varied_that_transformers_has_a_class_for():
    assert FAMILY.keys() - MODELS.keys() == NO_CLASS


@pytest.mark.parametrize("null", [False, True], ids=["absent", "null"])
@pytest.mark.parametrize(("name", "change"), TABLE, ids=[f"{name}, {change}" for name, change in TABLE])
def test_a_key_that_is_not_there_is_what_the_class_takes_it_for(name, change, null, tmp_path):
    kind, plain = MODELS[name]
    made = kind(**{**plain, **change}, architectures=[FAMILY[name].hf.architecture], dtype="bfloat16")
    wrong = {}
    for said in spelled(json.loads(made.to_json_string(use_diff=False)), name):
        assert isinstance(read(said), dict)
        assert different(said, kind, tmp_path / "config.json") == {}
        for path in keys(said):
            if path[-1] in NAMES | FURTHER:
                continue
            found = different(changed(said, path, null), kind, tmp_path / "config.json")
            if found and not (isinstance(found, CarnetError) and path[-1] in str(found)):
                wrong[".".join(path)] = str(found)
    assert wrong == {}


# where their positions lie in an image, which the text alone does not ask for
BESIDE = {"mrope_section", "mrope_interleaved"}
# the class ties where nothing is said, but for a file that has a head: as no published config says it, carnet asks the files
TOLD_BY_FILES = {("Mistral3ForConditionalGeneration", "tie_word_embeddings")}
# of layers for further tokens it asks them whatever is said: the class knows no more than their number; published configs say the other
TOLD_BY_FILES |= {("KimiK25ForConditionalGeneration", key) for key in ("num_nextn_predict_layers", "tie_word_embeddings")}
INSIDE = [(name, False) for name in CLASSES] + [(name, True) for name in CLASSES if "Qwen2" in name]


@pytest.mark.parametrize("null", [False, True], ids=["absent", "null"])
@pytest.mark.parametrize(("name", "flat"), INSIDE, ids=[f"{name}{', among the others' * flat}" for name, flat in INSIDE])
def test_a_key_of_a_text_model_inside_is_what_its_own_class_takes_it_for(name, flat, null, tmp_path):
    architecture = name.split(",")[0]
    kind = getattr(hf, *PUBLISHED.get(name, (architecture,))[:1]).config_class
    made = kind(**deepcopy(CLASSES[name]), architectures=[architecture], dtype="bfloat16")
    said = json.loads(made.to_json_string(use_diff=False))
    said = {**said.pop("text_config"), **said} if flat else said
    assert isinstance(read(said), dict)
    assert different(said, kind, tmp_path / "config.json") == {}
    wrong = {}
    for path in keys(said):
        about_text = path[0] == "tie_word_embeddings" or (path[0] != "vision_config" if flat else path[1:])
        if not about_text or path[-1] in NAMES | BESIDE or (architecture, path[-1]) in TOLD_BY_FILES:
            continue
        found = different(changed(said, path, null), kind, tmp_path / "config.json")
        if found and not (isinstance(found, CarnetError) and path[-1] in str(found)):
            wrong[".".join(path)] = str(found)
    assert wrong == {}

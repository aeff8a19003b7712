"""What Megatron-Bridge says of a model in its run_config.yaml, for models that transformers makes: the weights come back by that alone.

``tests/goldens/bridge`` has the section ``model`` as Megatron-Bridge wrote it (NVIDIA-NeMo/Megatron-Bridge 067f987d: AutoBridge's
provider, or its builder's config, of the config here, in a ConfigContainer's to_yaml).
"""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file

import carnet
from carnet.architectures.known import recognise
from carnet.errors import BadCheckpoint, BadOption, CarnetError, NotSupported
from carnet.formats.wrapped import arguments_of

pytestmark = pytest.mark.referee

CONFIGS = Path(__file__).parents[1] / "goldens/bridge"
ALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
SIZES = {**ALL, "head_dim": 16}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
GROUPS = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
WHOLE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}  # what Megatron-Bridge makes of a quarter
CAPS = {"query_pre_attn_scalar": 16, "sliding_window": 32}
MODELS = {
    "llama.provider": hf.LlamaConfig(**SIZES),
    "llama.builder": hf.LlamaConfig(**SIZES),
    "qwen3_next.provider": hf.Qwen3NextConfig(
        **{**SIZES, **ROUTED, **DELTA, "rope_parameters": WHOLE},
        num_experts=4,
        shared_expert_intermediate_size=48,
    ),
    "deepseek_v3.provider": hf.DeepseekV3Config(**{**ALL, "num_key_value_heads": 4}, **ROUTED, **LATENT, **GROUPS),
    "gemma.provider": hf.GemmaConfig(**SIZES),
    "gemma2.provider": hf.Gemma2Config(**SIZES, **CAPS),
    "olmoe.provider": hf.OlmoeConfig(
        **{**ALL, "num_key_value_heads": 4}, num_experts=4, num_experts_per_tok=2, norm_topk_prob=False
    ),
    "minimax_m2.provider": hf.MiniMaxM2Config(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "exaone4.provider": hf.Exaone4Config(
        **SIZES, sliding_window=None, sliding_window_pattern=4, layer_types=["full_attention"] * 4
    ),
}


@pytest.fixture
def stored(saved, tmp_path):
    """Return a folder of transformers, and its weights as Megatron-Bridge stores them: run_config.yaml alone says what they are."""

    def make(name):
        before, root = saved(MODELS[name], torch.bfloat16), tmp_path / "megatron"
        carnet.cross(before, root, to="megatron", accept=["needs"])
        common = root / "iter_0000001/common.pt"
        said = {
            key: value
            for key, value in torch.load(common, weights_only=False).items()
            if key in ("iteration", "checkpoint_version")
        }
        torch.save(said, common)
        (root / "carnet.json").unlink()
        shutil.copy(CONFIGS / f"{name}.yaml", root / "iter_0000001/run_config.yaml")
        return before, root

    return make


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_by_what_megatron_bridge_says_of_it(name, stored, tmp_path):
    before, root = stored(name)
    seen = carnet.inspect(root)
    assert seen.checkpoint.program == "megatron-bridge"
    assert carnet.cross(root, tmp_path / "back", to="hf").equal
    assert [each.what for each in carnet.verify(before, tmp_path / "back").findings if each.where != "dtype"] == []
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", before))
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key].to(theirs[key].dtype), theirs[key])] == []


@pytest.mark.parametrize(
    ("name", "now", "then"),
    [
        ("gemma.provider", "megatron.core.activations.fast_gelu", "torch.nn.functional.gelu"),
        ("gemma2.provider", "attn_logit_softcapping: 50.0", "attn_logit_softcapping: -1.5e400"),
        ("llama.provider", "_target_: torch.nn.functional.silu", "_target_: torch.nn.functional.elu"),
    ],
    ids=lambda said: said[:12],
)
def test_words_that_the_provider_does_not_have_are_refused(name, now, then, stored):
    _, root = stored(name)
    said = root / "iter_0000001/run_config.yaml"
    text = said.read_text()
    assert now in text
    said.write_text(text.replace(now, then))
    with pytest.raises(CarnetError):
        carnet.plan(root, to="hf")


@pytest.mark.parametrize(
    ("name", "now", "then", "key"),
    [
        ("llama.provider", "gpt_provider.GPTModelProvider", "gemma.gemma3_provider.Gemma3ModelProvider", "_target_"),
        ("llama.provider", "megatron.bridge.models.gpt_provider.GPTModelProvider", "my.Llama", "_target_"),
        ("llama.builder", "gpt.model_config.BridgeGPTModelConfig", "mimo_v2_flash.x.Config", "_target_"),
        (
            "gemma.provider",
            "gpt_provider.default_layer_spec",
            "llama.llama4_utils.get_llama4_layer_spec",
            "transformer_layer_spec",
        ),
        (
            "deepseek_v3.provider",
            "megatron.core.models.gpt.gpt_layer_specs.get_gpt",
            "my.specs.get_gpt",
            "transformer_layer_spec",
        ),
    ],
)
def test_a_provider_or_layer_spec_that_nobody_knows_is_refused_by_name(name, now, then, key, stored):
    """It may make another model of the same weights and fields, as Gemma's does; a person may know that it does not."""
    _, root = stored(name)
    said = root / "iter_0000001/run_config.yaml"
    text = said.read_text()
    assert now in text
    said.write_text(text.replace(now, then))
    with pytest.raises(NotSupported, match="carnet does not know this") as refused:
        carnet.plan(root, to="hf")
    assert then in refused.value.facts[key]
    assert refused.value.remedy.startswith(f"--accept {key}, ")
    assert [*carnet.plan(root, to="hf", accept=[key]).accepted] == [key]


def test_what_carnet_knows_of_a_provider_is_not_given_up(stored):
    _, root = stored("gemma.provider")
    made = carnet.plan(root, to="hf", accept=["_target_"])
    assert (made.family, dict(made.accepted)) == ("gemma", {})


# what a run chooses as it likes, and what says the same in other words
FREE = {
    *(
        "moe_aux_loss_coeff",
        "moe_router_load_balancing_type",
        "moe_router_dtype",
        "pipeline_dtype",
        "tensor_model_parallel_size",
    ),
    *("should_pad_vocab", "make_vocab_size_divisible_by", "attention_dropout"),
}
SAME = {
    "linear_attention_freq": (4, [1, 1, 1, 0]),
    "moe_router_topk_scaling_factor": (1.0, None),
    "moe_router_num_groups": (None, 1),
    "moe_router_group_topk": (None, 1),
    "moe_ffn_hidden_size": (96, None),  # ffn_hidden_size, where it is not said
    "rope_type": ("rope", "yarn"),  # whose factor is 1
    "mscale_all_dim": (0.0, 1.0),
    "bias_activation_fusion": (False, True),  # of a SiLU, a kernel of the same numbers
}
BLOCKS = "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec"


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("provider")])
def test_what_is_written_for_megatron_bridge_is_what_it_writes_itself(name, saved, tmp_path):
    """Every word is one of its provider's; those about the model have its own values."""
    before = saved(MODELS[name], torch.bfloat16)
    went = carnet.cross(before, tmp_path / "megatron", to="megatron", spelling="bridge", accept=["needs"], tp=2)
    assert went.equal
    assert went.needs["program"] == "megatron-bridge"
    said = tmp_path / "megatron/iter_0000001/run_config.yaml"
    ours, theirs = (yaml.safe_load(path.read_text())["model"] for path in (said, CONFIGS / f"{name}.yaml"))
    assert ours.keys() <= theirs.keys()
    different = {key: (value, theirs[key]) for key, value in ours.items() if value != theirs[key] and key not in FREE}
    layers = different.pop("transformer_layer_spec", ({}, {}))
    assert [each.get("_target_") for each in layers] in ([None, None], [BLOCKS, BLOCKS])
    assert {key: pair for key, pair in different.items() if SAME.get(key) != pair} == {}
    target = (
        theirs["_target_"]
        if "ModelProvider" in went.needs.get("provider", "")
        else theirs["transformer_layer_spec"]["_target_"]
    )
    assert went.needs.get("provider", target) == target
    assert carnet.verify(before, tmp_path / "megatron", read_by="megatron-bridge", accept=["needs"]).equal
    carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf", config=said)
    assert load_file(tmp_path / "back/model.safetensors").keys() == load_file(before / "model.safetensors").keys()


def test_what_no_provider_has_is_refused_with_a_way_out(saved, tmp_path):
    before = saved(hf.Olmo2Config(**ALL), torch.bfloat16)
    with pytest.raises(NotSupported, match="knows no provider") as refused:
        carnet.plan(before, to="megatron", spelling="bridge", accept=["needs"])
    assert refused.value.facts["beyond arguments"] == "norm_after, qk_norm, norm_before"
    assert carnet.cross(before, tmp_path / "megatron", to="megatron", read_by="megatron-bridge", accept=["needs"]).equal
    assert not (tmp_path / "megatron/iter_0000001/run_config.yaml").exists()


def test_another_program_cannot_read_it(saved):
    with pytest.raises(BadOption, match="--spelling bridge is for megatron-bridge"):
        carnet.plan(saved(hf.LlamaConfig(**SIZES)), to="megatron", spelling="bridge", read_by="megatron-lm==0.18")


@pytest.mark.parametrize(
    ("now", "then"),
    [("num_layers: 4", "num_layers: 5"), ("GemmaModelProvider", "GemmaModelProvider2"), ("model:", "train: {}\nmodel:")],
    ids=["a number", "a class", "a section"],
)
def test_one_that_is_not_what_the_arguments_say_is_found(now, then, saved, tmp_path):
    before = saved(MODELS["gemma.provider"], torch.bfloat16)
    carnet.cross(before, tmp_path / "megatron", to="megatron", spelling="bridge", accept=["needs"])
    said = tmp_path / "megatron/iter_0000001/run_config.yaml"
    text = said.read_text()
    assert now in text
    said.write_text(text.replace(now, then, 1))
    told = carnet.verify(before, tmp_path / "megatron", read_by="megatron-bridge", accept=["needs"])
    assert [each.where for each in told.findings] == ["iter_0000001/run_config.yaml"]


@pytest.mark.parametrize(
    "strange", [{"vocab_size": 0}, {"params_dtype": None}, {"num_layers": "x" * 99}, {"tokens": [[[[]]]] * 9}]
)
def test_strange_arguments_beside_one_make_no_traceback(strange, saved, tmp_path):
    before = saved(MODELS["gemma2.provider"], torch.bfloat16)
    carnet.cross(before, tmp_path / "megatron", to="megatron", spelling="bridge", accept=["needs"])
    common = tmp_path / "megatron/iter_0000001/common.pt"
    state = torch.load(common, weights_only=False)
    vars(state["args"]).update(strange)
    torch.save(state, common)
    with suppress(CarnetError):
        assert not carnet.verify(before, tmp_path / "megatron", read_by="megatron-bridge", accept=["needs"]).equal


GROWING = {
    "_target_": "megatron.bridge.models.ministral3.ministral3_provider.Ministral3ModelProvider",
    "position_embedding_type": "yarn",
    "yarn_rotary_scaling_factor": 16.0,
    "yarn_original_max_position_embeddings": 16384,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 1.0,
    "yarn_correction_range_round_to_int": False,
}


@pytest.mark.parametrize("said", [0.1, "a lot"])
def test_queries_that_grow_are_in_the_config_that_ministral_s_provider_keeps(said):
    """As config_utils.py _convert_pretrained_config_to_dict writes a config of transformers."""
    config = yaml.safe_load((CONFIGS / "llama.provider.yaml").read_text())
    kept = {"_target_": "transformers.Mistral3Config", "text_config": {"rope_parameters": {"llama_4_scaling_beta": said}}}
    config["model"] |= {**GROWING, "hf_config": kept}
    if not isinstance(said, float):
        with pytest.raises(BadCheckpoint, match="query_growth"):
            recognise("megatron", arguments_of(config, "-"), "-", {})
        return
    family, fields = recognise("megatron", arguments_of(config, "-"), "-", {})
    assert (family.name, fields["query_growth"], fields["rope_truncated"]) == ("ministral3", said, False)

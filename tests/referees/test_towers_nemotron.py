"""Nemotron's classes that see or hear: transformers has none, so that its text model is put inside under the names of published files.

Names as vLLM's models/nano_nemotron_vl.py and nemotron_vl.py load them, and Megatron-Bridge's nemotron_vl_bridge.py.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, NemotronHConfig

import carnet
from carnet.errors import NotSupported
from tests.referees.sizes import HEADS, TOKENS
from tests.referees.test_towers import of_store

pytestmark = pytest.mark.referee

HYBRID = NemotronHConfig(
    **{name: size for name, size in HEADS.items() if name not in {"num_hidden_layers", "tie_word_embeddings"}},
    **TOKENS,
    intermediate_size=56,
    layers_block_type=["linear_attention", "mlp", "full_attention", "moe"],
    mamba_num_heads=6,
    mamba_head_dim=14,
    ssm_state_size=12,
    n_groups=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    moe_shared_expert_intermediate_size=28,
)
LLAMA = LlamaConfig(**HEADS, **TOKENS, intermediate_size=56)
INSIDE = {  # class -> the text model, and what stands before its names
    "NemotronH_Nano_VL_V2": (HYBRID, "backbone."),
    "NemotronH_Nano_Omni_Reasoning_V3": (HYBRID, "backbone."),
    "Llama_Nemotron_Nano_VL": (LLAMA, "model."),
}
RADIO = "vision_model.radio_model.model."
BLOCK = {
    "norm1.weight": (32,),
    "norm1.bias": (32,),
    "norm2.weight": (32,),
    "norm2.bias": (32,),
    "attn.qkv.weight": (96, 32),
    "attn.qkv.bias": (96,),
    "attn.proj.weight": (32, 32),
    "attn.proj.bias": (32,),
    "mlp.fc1.weight": (64, 32),
    "mlp.fc1.bias": (64,),
    "mlp.fc2.weight": (32, 64),
    "mlp.fc2.bias": (32,),
}
TOWER = {
    RADIO + "patch_generator.cls_token.token": (4, 32),
    RADIO + "patch_generator.embedder.weight": (32, 48),
    RADIO + "patch_generator.pos_embed": (1, 16, 32),
    **{f"{RADIO}blocks.{at}.{name}": shape for at in range(2) for name, shape in BLOCK.items()},
    "vision_model.radio_model.input_conditioner.norm_mean": (3, 1, 1),
    "mlp1.0.weight": (128,),
    "mlp1.1.weight": (40, 128),
    "mlp1.3.weight": (40, 40),
}
HEARD = {
    "sound_encoder.encoder.layers.0.conv.pointwise_conv1.weight": (8, 4, 1),
    "sound_encoder.encoder.feature_extractor.featurizer.window": (16,),
    "sound_projection.norm.weight": (8,),
    "sound_projection.linear1.weight": (40, 8),
    "sound_projection.linear2.weight": (40, 40),
}
AROUND = {"vision_config": {"args": {"model": "vit_huge_patch16_224"}}, "downsample_ratio": 0.5, "img_context_token_id": 9}
TEXTS = torch.randint(20, 97, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=INSIDE)
def seen(request, saved, tmp_path):
    """Return a class, a folder of it, and that of the text model inside."""
    config, prefix = INSIDE[request.param]
    text, folder = saved(config, torch.bfloat16), tmp_path / "seen"
    weights = load_file(text / "model.safetensors")
    first = "backbone." if any(name.startswith("backbone.") for name in weights) else "model."
    inside = {
        f"language_model.{prefix if name.startswith(first) else ''}{name.removeprefix(first)}": weights[name]
        for name in weights
    }
    names = {**TOWER, **(HEARD if "Omni" in request.param else {})}
    tower = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in names.items()}
    folder.mkdir()
    save_file({**inside, **tower}, folder / "model.safetensors", {"format": "pt"})
    said = {"architectures": [request.param], "model_type": request.param, **AROUND, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**said, "llm_config": json.loads((text / "config.json").read_text())}))
    return request.param, folder, text


def test_such_a_class_comes_back_from_megatron_as_it_was(seen, tmp_path):
    name, folder, _ = seen
    went = carnet.cross(folder, tmp_path / "megatron", to="megatron", tp=2, accept=["needs"])
    assert went.equal
    assert "wrapper" in went.needs["fields"]
    assert carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf").equal
    before, after = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert [each for each in before if not torch.equal(before[each], after[each])] == []
    said = json.loads((tmp_path / "back/config.json").read_text())
    assert said["architectures"] == [name]
    assert {key: said[key] for key in AROUND} == AROUND


def test_megatron_bridge_finds_the_tower_under_its_own_names(seen, tmp_path):
    """As its nemotron_vl_bridge.py and nemotron_omni_bridge.py have them: a head's q, k, v together, of 16 heads."""
    _, folder, _ = seen
    assert carnet.cross(folder, tmp_path / "megatron", to="megatron", accept=["needs"]).equal
    ours, theirs = of_store(tmp_path / "megatron"), load_file(folder / "model.safetensors")

    def stacked(name):
        return torch.stack([theirs[f"{RADIO}blocks.{at}.{name}"] for at in range(2)])

    projection = "vision_projection.encoder.linear_fc"
    expected = {
        "vision_model.class_token": theirs[RADIO + "patch_generator.cls_token.token"],
        "vision_model.position_embeddings": theirs[RADIO + "patch_generator.pos_embed"],
        "vision_model.embedder.weight": theirs[RADIO + "patch_generator.embedder.weight"],
        "vision_model.radio_model.input_conditioner.norm_mean": theirs["vision_model.radio_model.input_conditioner.norm_mean"],
        projection + "1.layer_norm_weight": theirs["mlp1.0.weight"],
        projection + "1.weight": theirs["mlp1.1.weight"],
        projection + "2.weight": theirs["mlp1.3.weight"],
    }
    for last in ("weight", "bias"):
        of = {
            "self_attention.linear_proj.": "attn.proj",
            "self_attention.linear_qkv.layer_norm_": "norm1",
            "mlp.linear_fc1.layer_norm_": "norm2",
            "mlp.linear_fc1.": "mlp.fc1",
            "mlp.linear_fc2.": "mlp.fc2",
        }
        expected |= {f"vision_model.decoder.layers.{name}{last}": stacked(f"{each}.{last}") for name, each in of.items()}
        rows = stacked(f"attn.qkv.{last}")
        apart = rows.view(2, 3, 16, 2, *rows.shape[2:]).transpose(1, 2).reshape(rows.shape)
        expected[f"vision_model.decoder.layers.self_attention.linear_qkv.{last}"] = apart
    if any(name in theirs for name in HEARD):
        expected |= {
            name.replace("sound_encoder.", "sound_model."): theirs[name] for name in HEARD if name.startswith("sound_encoder.")
        }
        heard = {"linear_fc1.layer_norm_": "norm", "linear_fc1.": "linear1", "linear_fc2.": "linear2"}
        expected |= {
            f"sound_projection.encoder.{name}weight": theirs[f"sound_projection.{each}.weight"] for name, each in heard.items()
        }
    beside = {name: tensor for name, tensor in ours.items() if not name.startswith("language_model.")}
    assert beside.keys() == expected.keys()
    assert [name for name in beside if not torch.equal(beside[name], expected[name])] == []


def test_without_the_tower_the_text_model_says_what_it_said(seen, loaded, tmp_path):
    _, folder, text = seen
    beside = ("vision_model.*", "mlp1.*", "sound_encoder.*", "sound_projection.*")
    there = load_file(folder / "model.safetensors")
    drop = [pattern for pattern in beside if any(name.startswith(pattern[:-1]) for name in there)]
    assert carnet.cross(folder, tmp_path / "alone", to="hf", drop=drop).equal
    with torch.no_grad():
        found, expected = (loaded(at)(TEXTS, use_cache=False).logits for at in (tmp_path / "alone", text))
    assert torch.equal(found, expected)


def test_the_text_alone_is_quantized_and_the_config_excludes_the_rest(seen, tmp_path):
    _, folder, _ = seen
    assert carnet.cross(folder, tmp_path / "fp8", to="hf", quantize="fp8-channel", style="modelopt").equal
    before, after = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "fp8"))
    coded = {name for name, tensor in after.items() if tensor.dtype == torch.float8_e4m3fn}
    assert coded
    assert all(name.startswith("language_model.") for name in coded)
    assert [name for name in before if name not in coded and not torch.equal(before[name], after[name])] == []
    said = json.loads((tmp_path / "fp8/hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    assert {"vision_model*", "mlp1*"} <= {*said}


def test_another_text_model_inside_is_refused_by_its_name(seen, tmp_path):
    _, folder, _ = seen
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "llm_config": {**said["llm_config"], "model_type": "phi3"}}))
    with pytest.raises(NotSupported, match="'phi3'"):
        carnet.plan(folder, to="hf")

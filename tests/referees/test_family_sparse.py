"""DeepSeek-V3.2 and GLM-5: what transformers saved comes back tensor by tensor, and computes the same bits.

More tokens than an indexer chooses: a wrong choice would be seen.
"""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV32Config, GlmMoeDsaConfig

import carnet
from tests.referees import roomy
from tests.referees.test_family_deepseek import SIZES, YARN

pytestmark = pytest.mark.referee

SPARSE: dict[str, Any] = {**SIZES, "rms_norm_eps": 1e-6, "q_lora_rank": 20, "num_nextn_predict_layers": 0}
SPARSE |= {"index_n_heads": 3, "index_head_dim": 10, "index_topk": 7}
STEP: dict[str, Any] = {"index_topk_freq": 2, "index_skip_topk_offset": 2}
MODELS = {
    "v3.2": DeepseekV32Config(**SPARSE | {"num_experts_per_tok": 4}, n_group=3, topk_group=2, rope_parameters=YARN),
    "glm-5": GlmMoeDsaConfig(**SPARSE),
    "glm-5, dense layers between": GlmMoeDsaConfig(
        **{name: size for name, size in SPARSE.items() if name != "first_k_dense_replace"},
        mlp_layer_types=["sparse", "dense", "sparse", "sparse"],
    ),
    "glm-5.2": GlmMoeDsaConfig(**SPARSE, **STEP),
    "glm-5.2, no step says it": GlmMoeDsaConfig(**SPARSE, indexer_types=["full", "shared", "full", "full"]),
}
# what vLLM and Megatron-Bridge read, and transformers does not write
BESIDE = {"scoring_func", "moe_layer_freq", "topk_method", "indexer_rope_interleave"}
GLM = BESIDE | {"rope_interleave"}
OTHERWISE = {"v3.2": BESIDE, "glm-5.2": GLM, "glm-5.2, no step says it": GLM}
CUTS = [{"tp": 2, "pp": 2}, {"ep": 2}]


@pytest.mark.parametrize("cut", [*CUTS, None], ids=["tp 2 pp 2", "ep 2", "folder to folder"])
@pytest.mark.parametrize("which", MODELS)
def test_a_model_comes_back_as_it_went(which, cut, there_and_again):
    if cut and "no step" in which:
        pytest.skip("Megatron has a step and nothing else")
    # no flag of Megatron-LM's says the length before yarn
    stops = [{"to": "megatron", "read_by": "megatron-bridge", **cut}] if cut else []
    there_and_again(MODELS[which], *stops, spelled_otherwise=OTHERWISE.get(which, GLM))


def test_an_indexer_is_read_as_its_vendor_codes_it_and_goes_along_as_it_is(tmp_path):
    """DeepSeek-V3.2 and GLM-5-FP8 have codes of two of its projections, which carnet leaves plain where it makes codes."""
    carnet.cross(
        roomy.save("glm_moe_dsa", tmp_path / "plain"), tmp_path / "coded", to="hf", quantize="fp8-block", style="deepseek"
    )
    file, said = tmp_path / "coded/model.safetensors", json.loads((tmp_path / "coded/config.json").read_text())
    held, plain = load_file(file), said["quantization_config"]["modules_to_not_convert"]
    modules = [f"model.layers.0.self_attn.indexer.{name}" for name in ("wq_b", "wk")]
    expected = {}
    for module in modules:
        plain.remove(module)
        weight = held[f"{module}.weight"].float()
        blocks = weight.view(weight.shape[0] // 128, 128, weight.shape[1] // 128, 128)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        held |= {f"{module}.weight": codes.view_as(weight), f"{module}.weight_scale_inv": scale}
        expected[f"{module}.weight"] = (codes.float() * scale[:, None, :, None]).view_as(weight).bfloat16()
    save_file(held, file, metadata={"format": "pt"})
    (tmp_path / "coded/config.json").write_text(json.dumps(said))
    (tmp_path / "coded/carnet.json").unlink()
    assert carnet.cross(tmp_path / "coded", tmp_path / "weights", to="hf", dtype="bf16").equal
    found = load_file(tmp_path / "weights/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert carnet.cross(tmp_path / "coded", tmp_path / "along", to="hf").equal
    along = load_file(tmp_path / "along/model.safetensors")
    assert along.keys() == held.keys()
    assert all(torch.equal(along[name].view(torch.uint8), held[name].view(torch.uint8)) for name in held)

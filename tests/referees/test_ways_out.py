"""What carnet cannot read it says a way out for: transformers dequantizes it, and carnet reads what transformers then saves."""

import json

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from carnet import api
from carnet.errors import NotSupported
from tests.referees import roomy

pytestmark = [pytest.mark.referee, pytest.mark.filterwarnings("ignore")]  # that a way of loading was asked for


def groups_of_64(folder):
    """Have compressed-tensors pack the weights in groups that carnet does not know."""
    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=64, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    packer, stored = BaseCompressor.get_value_from_registry("pack-quantized"), {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        groups = weight.unflatten(1, (-1, 64))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), weights)
        packed = packer.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
        stored |= {name.removesuffix("weight") + each: tensor.contiguous() for each, tensor in packed.items()}
    record = {"config_groups": {"group_0": scheme.model_dump(mode="json")}, "format": "pack-quantized", "ignore": ["lm_head"]}
    return stored, {**record, "quant_method": "compressed-tensors", "quantization_status": "compressed"}


def smaller_blocks(folder):
    """Code every weight by blocks that are not DeepSeek's."""
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        blocks = stored[name].float().unflatten(0, (-1, 8)).unflatten(2, (-1, 8))
        scale = blocks.abs().amax((1, 3)) / 448
        stored[name] = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(stored[name].shape)
        stored[f"{name}_scale_inv"] = scale
    return stored, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}


@pytest.mark.parametrize(
    ("family", "publish", "loads_as"),
    [
        ("llama", groups_of_64, "CompressedTensorsConfig"),
        ("llama", smaller_blocks, "FineGrainedFP8Config"),
    ],
)
def test_what_transformers_dequantizes_and_saves_is_read_with_the_same_logits(family, publish, loads_as, tmp_path):
    folder = roomy.save(family, tmp_path / "published")
    tensors, record = publish(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": record}))
    with pytest.raises(NotSupported) as refusal:
        api.plan(folder, to="hf", dtype="bf16")
    asked = f"from_pretrained(DIR, quantization_config={loads_as}(dequantize=True))"
    saved = "save_pretrained(OUT, save_original_format=False)"
    assert refusal.value.remedy == f"dequantize it with transformers: {asked}, then {saved}; OUT is plain"
    way = getattr(transformers, loads_as)(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=way)
    model.save_pretrained(tmp_path / "OUT", save_original_format=False)
    assert api.cross(tmp_path / "OUT", tmp_path / "crossed", to="hf").equal
    model.set_attn_implementation("eager")
    assert torch.equal(roomy.logits(roomy.loaded(tmp_path / "crossed")), roomy.logits(model.eval()))

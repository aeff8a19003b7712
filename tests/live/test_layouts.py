"""Layouts of a pipeline, as Megatron's --pipeline-model-parallel-layout says them: files per rank are read whatever a stage holds."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import carnet
from carnet.errors import NotSupported

# E embedding, t a layer, m a layer that predicts further tokens, L the head; which layers of the model each chunk's own are
STAGES = [(0,), (1, 2), (3,), ()]
# what keeps its name's end and its layout on the way to Hugging Face
KEPT = {
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
    "mlp.experts.local_experts.3.linear_fc2.weight": "mlp.experts.3.down_proj.weight",
}
ONCE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "mtp.layers.0.enorm.weight": "model.layers.4.enorm.weight",
    "mtp.layers.0.eh_proj.weight": "model.layers.4.eh_proj.weight",
    "mtp.layers.0.final_layernorm.weight": "model.layers.4.shared_head.norm.weight",
    "mtp.layers.0.transformer_layer.mlp.router.weight": "model.layers.4.mlp.gate.weight",
    "output_layer.weight": "lm_head.weight",
}


def bf16(path):
    return {name: tensor.astype(np.float32) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(("layout", "pp", "vp"), [("Et|tt|t|mL", 4, None), ("Et|tt|t|mL", 2, 2), ("Ett|ttmL", 2, None)])
def test_further_token_layers_are_read_on_whatever_stage_they_are(world, tmp_path, layout, pp, vp):
    held = world.run("save_layout", layout, pp, vp, str(tmp_path / "ranks"))[:: 4 // pp]  # copies stand beside each other
    chunks = [held[at % pp][at // pp] for at in range(pp * (vp or 1))]
    stages = STAGES if len(chunks) == 4 else [(0, 1), (2, 3)]
    assert carnet.cross(tmp_path / "ranks", tmp_path / "out", to="hf").equal
    found = bf16(tmp_path / "out/model.safetensors")
    seen = set()
    for chunk, layers in zip(chunks, stages, strict=True):
        pairs = {name: there for name, there in ONCE.items() if name in chunk}
        for at, layer in enumerate(layers):
            pairs |= {f"decoder.layers.{at}.{end}": f"model.layers.{layer}.{there}" for end, there in KEPT.items()}
        for name, there in pairs.items():
            if name in chunk:
                seen.add(there)
                assert np.array_equal(chunk[name][: len(found[there])], found[there]), (name, there)
    assert len(seen) == len(ONCE) + 4 * 2 + 3 * 3  # two in every layer, three in each mixture
    others = {name for name in found if name.startswith("model.layers.4.")} - seen
    assert len(others) > 20


def test_further_token_layers_can_be_left_behind_before_a_family_is_chosen(world, tmp_path):
    held = world.run("save_dense", str(tmp_path / "ranks"))[0]
    with pytest.raises(NotSupported, match="the family 'llama' has no layers that predict further tokens") as caught:
        carnet.cross(tmp_path / "ranks", tmp_path / "out", to="hf")
    assert "--drop 'mtp.*'" in str(caught.value)
    assert carnet.cross(tmp_path / "ranks", tmp_path / "out", to="hf", drop=("mtp.*",)).equal
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    found = bf16(tmp_path / "out/model.safetensors")
    assert np.array_equal(found["model.norm.weight"], held["decoder.final_layernorm.weight"])
    assert np.array_equal(found["model.layers.1.mlp.down_proj.weight"], held["decoder.layers.1.mlp.linear_fc2.weight"])
    assert not any("layers.2." in name for name in found)

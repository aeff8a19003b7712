"""Norms that are stored less one stay so where the target stores them so."""

from pathlib import Path

import torch
import transformers

import carnet
from carnet.formats.detect import open_checkpoint
from carnet.steps import kind


def test_nemotron_s_norms_go_to_megatron_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.NemotronConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=64,
    )
    transformers.NemotronForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    assert carnet.cross(tmp_path / "hf", tmp_path / "megatron", to="megatron").equal
    found = open_checkpoint(tmp_path / "megatron")
    assert found.config["layernorm_zero_centered_gamma"] is True
    assert {tensor.dtype for tensor in found.tensors.values()} == {"bf16"}
    plan = carnet.plan(tmp_path / "hf", to="megatron")
    assert {kind(step) for step in plan.steps} <= {"copy", "fill"}

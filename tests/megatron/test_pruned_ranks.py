"""Pruned models of which every rank saved its own part in a file: their widths are told by all of them together."""

import argparse

import pytest
import torch

import carnet
from carnet.megatron.meta import Cut, built
from tests.megatron.test_pruned import CASES

pytestmark = pytest.mark.referee


@pytest.mark.parametrize("name", ["llama", "hybrid"])
def test_ranks_with_a_file_each_tell_the_widths_together(name, default_spec, default_stack, tmp_path):
    said, cut = CASES[name]
    cut = {**cut, "num_layers": 2} if name == "llama" else cut  # stages of one length
    said = {**said, "vocab_size": 64, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    spec = (lambda *_: default_stack) if said.get("is_hybrid_model") else default_spec("te")
    ranks = Cut(tp=2, pp=2)
    for rank in ranks.ranks():
        with built({**said, **cut}, spec, ranks, rank, device="cpu") as [stage]:
            for tensor in stage.parameters():
                torch.nn.init.constant_(tensor, 0.5)  # what ranks have copies of is equal
            folder = tmp_path / "saved/iter_0000001" / f"mp_rank_{rank.tp:02d}_{rank.pp:03d}"
            folder.mkdir(parents=True)
            held = {"args": argparse.Namespace(**said), "model": stage.state_dict(), "iteration": 1, "checkpoint_version": 3.0}
            torch.save(held, folder / "model_optim_rng.pt")
    told = carnet.plan(tmp_path / "saved", to="hf", accept="pruned").notes["pruned"]
    assert all(f"{key} {said[key]} -> {size}" in told for key, size in cut.items() if said.get(key) is not None)
    assert carnet.cross(tmp_path / "saved", tmp_path / "hf", to="hf", accept="pruned").equal

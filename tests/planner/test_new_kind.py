"""A new per-rank target is a row of kinds, its rows, and the line that spells a family in it: nothing else has to know it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import carnet
from carnet.architectures import known
from carnet.dialects import kinds
from carnet.dialects.kinds import RANKS
from carnet.dialects.sharing import shared

MEGATRON = Path(__file__).parents[1] / "goldens/megatron/llama_tp2pp2"
# what an engine calls its ranks' own tensors: Hugging Face's names, each rank with its part
ENGINE = replace(kinds.KINDS["hf"], name="engine", files=RANKS, styles=(), codes_key="", companions=False)
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")  # of what ranks cut by rows
COLUMNS = ("o_proj", "down_proj")


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setitem(kinds.KINDS, "engine", ENGINE)
    monkeypatch.setitem(known.SPELLED, "engine", lambda family: replace(shared(family.hf), kind=ENGINE))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("tp", [1, 2])
def test_an_engines_own_ranks_are_written_by_a_row_of_kinds(tp, tmp_path):
    carnet.run(carnet.plan(MEGATRON, to="engine", tp=tp, vocab_size=250), tmp_path / "ranks")
    carnet.run(carnet.plan(MEGATRON, to="hf", vocab_size=250), tmp_path / "whole")
    whole = load_file(tmp_path / "whole/model.safetensors")
    ranks = [load_file(tmp_path / f"ranks/rank{rank}.safetensors") for rank in range(tp)]
    for name, tensor in whole.items():
        parts = [rank[name] for rank in ranks]
        axis = 0 if any(f"{each}." in name for each in ROWS) else 1 if any(f"{each}." in name for each in COLUMNS) else None
        if axis is None:
            assert all(torch.equal(part, tensor) for part in parts), name
        else:
            assert torch.equal(torch.cat(parts, axis)[: tensor.shape[0]], tensor), name

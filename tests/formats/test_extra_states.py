"""States of Transformer Engine, as its versions write them, honest and not."""

import argparse
import fractions
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carnet.errors import BadCheckpoint, CarnetError, NotSupported
from carnet.formats import extra_state
from carnet.formats.detect import open_checkpoint
from carnet.formats.extra_state import Scales, read_states
from tests.te_states import (
    FORMS,
    DelayedScaling,
    Float8CurrentScaling,
    Format,
    first_form,
    of_modelopt,
    second_form,
    split,
    table,
)

MODULE = "decoder.layers.0.mlp.linear_fc1"
SCALES = torch.tensor([0.37, 411.25, 7.0])


def rank(root: Path, state: object, module: str = MODULE) -> Path:
    """Write a rank's file with one state, as Megatron's save_checkpoint does."""
    args = argparse.Namespace(num_layers=1, tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    model = {f"{module}.weight": torch.zeros(4, 4).bfloat16(), f"{module}._extra_state": state}
    (root / "mp_rank_00").mkdir(parents=True)
    torch.save({"args": args, "iteration": 1, "model": model}, root / "mp_rank_00/model_optim_rng.pt")
    return root


def said(root: Path, state: object) -> Scales | None:
    found = read_states(open_checkpoint(rank(root, state)))
    if not found:
        return None
    assert list(found) == [("tp0-pp0-ep0-vp0", MODULE)]
    return found["tp0-pp0-ep0-vp0", MODULE][()]


@pytest.mark.parametrize("form", FORMS)
def test_a_state_says_the_scales_of_input_and_weight(form, tmp_path):
    found = said(tmp_path, FORMS[form](SCALES))
    assert found.input == (float(SCALES[0]),)
    assert found.weight == (float(SCALES[1]),)


@pytest.mark.parametrize("form", FORMS)
def test_a_state_of_several_experts_has_the_inputs_first_and_then_the_weights(form, tmp_path):
    scales = torch.arange(2.0, 14.0)
    found = said(tmp_path, FORMS[form](scales))
    assert found.input == (2.0, 3.0, 4.0, 5.0)
    assert found.weight == (6.0, 7.0, 8.0, 9.0)


@pytest.mark.parametrize("pack", [first_form, second_form])
def test_one_expert_out_of_many_is_a_view_of_what_all_share(pack, tmp_path):
    parts = split(table(torch.arange(2.0, 14.0), recipe=pack is second_form, gemms=4), 4)
    found = said(tmp_path, pack(parts[2]))
    assert (found.input, found.weight) == ((4.0,), (8.0,))


@pytest.mark.parametrize(
    "empty",
    [
        None,
        torch.empty(0, dtype=torch.uint8),
        io.BytesIO(),
        first_form(None),
        second_form(None),
        second_form({}),
        second_form({"recipe": Float8CurrentScaling(), "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1}}),
        of_modelopt(),
        of_modelopt(torch.empty(0, dtype=torch.uint8)),
    ],
)
def test_a_state_without_scales_says_nothing(empty, tmp_path):
    assert said(tmp_path, empty) is None


@pytest.mark.parametrize("form", FORMS)
def test_a_slot_that_nothing_was_seen_in_says_nothing(form, tmp_path):
    found = said(tmp_path, FORMS[form](torch.tensor([1.0, 2.0, 1.0])))
    assert (found.input, found.weight) == ((None,), (2.0,))


def test_a_scale_of_one_that_follows_from_what_was_seen_is_a_scale(tmp_path):
    state = table(torch.tensor([1.0, 1.0, 1.0]), recipe=True)
    state["amax_history_fwd"][3, 1] = 448.0
    assert said(tmp_path, second_form(state)).weight == (1.0,)


class Call:
    """Something that a pickle wants to run."""

    def __init__(self, function: object, *given: object) -> None:
        self.what = function, given

    def __reduce__(self) -> tuple[object, ...]:
        return self.what


def test_a_format_that_python_pickles_by_its_name_is_read(tmp_path):
    recipe = DelayedScaling(fp8_format=Call(getattr, Format, "HYBRID"))
    assert said(tmp_path, second_form(damaged(recipe=recipe))).weight == (float(SCALES[1]),)


def damaged(**changes: object) -> dict[str, Any]:
    return {**table(SCALES, recipe=True), **changes}


MARK = "ran"
HOSTILE = {
    "runs a command": (damaged(recipe=Call(os.system, f"touch {MARK}")), "posix.system"),
    "looks up an attribute": (damaged(recipe=Call(getattr, io.BytesIO, "write")), "builtins.getattr"),
    "names an unknown class": (damaged(recipe=zipfile.ZipInfo()), "zipfile.ZipInfo"),
    "names a recipe of one's own": (damaged(recipe=Call(argparse.Namespace)), "argparse.Namespace"),
    "no table": ([1, 2], "is damaged"),
    "no tensor": (damaged(scale_fwd=[1.0, 2.0, 3.0]), "is damaged"),
    "two slots": (damaged(scale_fwd=torch.ones(2)), "is damaged"),
    "no slots": (damaged(scale_fwd=torch.ones(0)), "is damaged"),
    "a matrix": (damaged(scale_fwd=torch.ones(3, 1)), "is damaged"),
    "whole numbers": (damaged(scale_fwd=torch.ones(3, dtype=torch.int64)), "is damaged"),
    "NaN": (damaged(scale_fwd=torch.tensor([1.0, float("nan"), 1.0])), "is damaged"),
    "zero": (damaged(scale_fwd=torch.tensor([1.0, 0.0, 1.0])), "is damaged"),
    "less than zero": (damaged(scale_fwd=torch.tensor([1.0, -2.0, 1.0])), "is damaged"),
    "another history": (damaged(amax_history_fwd=torch.ones(4, 6)), "is damaged"),
    "another format": (damaged(extra_fp8_variables={"fp8_max_fwd": 57344}), "another format than e4m3"),
    "a format that is none": (damaged(extra_fp8_variables={"fp8_max_fwd": []}), "another format than e4m3"),
}


@pytest.mark.parametrize("pack", [first_form, second_form])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_strange_state_is_refused_by_name_and_runs_nothing(name, pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, words = HOSTILE[name]
    checkpoint = open_checkpoint(rank(tmp_path / "rank", pack(state)))
    with pytest.raises((BadCheckpoint, NotSupported)) as refusal:
        read_states(checkpoint)
    assert words in str(refusal.value) or words in str(refusal.value.facts)
    assert MODULE in str(refusal.value)
    assert not (tmp_path / MARK).exists()


def test_a_state_that_was_cut_off_or_changed_is_refused_or_says_something(tmp_path):
    for pack in (first_form, second_form):
        packed = pack(table(SCALES, recipe=pack is second_form))
        whole = packed.getvalue() if isinstance(packed, io.BytesIO) else packed.numpy().tobytes()
        rng = np.random.default_rng(0)
        broken = [whole[:size] for size in range(1, len(whole), max(1, len(whole) // 60))]
        for _ in range(150):
            changed = bytearray(whole)
            changed[rng.integers(len(whole))] ^= 1 << rng.integers(8)
            broken.append(bytes(changed))
        refused = 0
        for data in broken:
            try:
                found = extra_state.scales_in(data, "state", str(tmp_path))
            except CarnetError:
                refused += 1
            else:
                assert found is None or all(scale is None or scale > 0 for scale in (*found.input, *found.weight))
        assert refused > len(broken) // 3


def test_a_state_that_swells_is_refused(tmp_path):
    wide = torch.zeros(1).expand(3 << 40)
    with pytest.raises(BadCheckpoint, match="is damaged"):
        said(tmp_path / "a", first_form(damaged(scale_fwd=wide, recipe=None)))
    nested = of_modelopt(of_modelopt(second_form(table(SCALES, recipe=True))))
    with pytest.raises(BadCheckpoint, match="is damaged"):
        said(tmp_path / "b", nested)


def test_storages_that_are_loaded_again_and_again_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(extra_state, "LIMIT", 1 << 16)
    storage = pickle.dumps(torch.zeros(1 << 10))
    start = storage.index(b"\x80\x02\x8a\nl\xfc")
    length = struct.unpack("<I", storage[start - 4 : start])[0]
    call = b"ctorch.storage\n_load_from_bytes\n" + b"B" + storage[start - 4 : start + length] + b"q\x00\x85R0"
    again = b"ctorch.storage\n_load_from_bytes\nh\x00\x85R0"
    with pytest.raises(BadCheckpoint, match="not a valid pickle") as refusal:
        said(tmp_path, torch.frombuffer(bytearray(b"\x80\x02" + call + again * 40 + b"N."), dtype=torch.uint8))
    assert "do not fit" in str(refusal.value.facts)


@pytest.mark.parametrize("other", [3, "text", [None, None], fractions.Fraction(1, 2)])
def test_what_is_no_state_at_all_is_refused(other, tmp_path):
    with pytest.raises(BadCheckpoint, match="not a state of a module"):
        said(tmp_path, other)

"""A plan that a stranger signed anew is refused in one sentence before anything is written, whichever of its values he changed."""

import json
from pathlib import Path

import pytest
import xxhash

import carnet
from carnet.plans import saved
from tests.planner.test_saved import at as put

GOLDEN = Path(__file__).parents[1] / "goldens" / "megatron" / "gpt_te_tp2"
FILE, SCRATCH, DOCUMENT, STEPS = 1, 2, 3, 5  # rows of the plan of a folder for transformers


@pytest.fixture(scope="module")
def rows():
    return {to: [*saved.lines(carnet.plan(GOLDEN, to=to))] for to in ("hf", "megatron")}


def signed(rows, path):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text + json.dumps({"digest": xxhash.xxh3_128(text.encode()).hexdigest()}) + "\n")
    return path


def twice_the_first_name(rows):
    rows[FILE]["tensors"][1][0] = rows[FILE]["tensors"][0][0]


FORGED = [
    ("two tensors of one name", "hf", twice_the_first_name, "not laid out"),
    ("a tensor that is the metadata", "hf", put(FILE, "tensors", 0, 0, "__metadata__"), "not laid out"),
    ("a negative length", "megatron", put(FILE, "tensors", 0, 2, 0, -1), "not a plan"),
    ("lengths whose product no number is", "hf", put(FILE, "tensors", 0, 2, [1 << 62] * 63), "not laid out"),
    ("lengths that no frame holds", "megatron", put(FILE, "tensors", 0, 2, 0, 1 << 62), "not laid out"),
    ("more axes than an array has", "hf", put(FILE, "tensors", 0, 2, [1] * 1000), "not a plan"),
    ("no target file", "hf", lambda rows: rows.pop(FILE), "belong to no tensor"),
    ("a window of two bytes", "hf", put(0, "window", 2), "memory that cannot be"),
    ("a window between two pages", "hf", put(0, "window", 100_000), "memory that cannot be"),
    (
        "a window larger than machines",
        "hf",
        lambda rows: rows[0].update(window=1 << 60, memory=1 << 61),
        "memory that cannot be",
    ),
    ("a text in place of the journal", "hf", put(DOCUMENT, "text", "journal.jsonl"), "in the way"),
    ("a text below the journal", "hf", put(DOCUMENT, "text", "journal.jsonl/x"), "in the way"),
    ("a text where another is begun", "hf", put(DOCUMENT, "text", "config.json.tmp"), "in the way"),
    ("a text below another", "hf", put(DOCUMENT, "text", "config.json/x"), "in the way"),
    ("a name that no disk takes", "hf", put(DOCUMENT, "text", "x" * 300), "not a plan"),
    ("a folder in a folder, and so on", "hf", put(DOCUMENT, "text", "a/" * 2000 + "b"), "not a plan"),
]


@pytest.mark.parametrize(("remark", "to", "change", "said"), FORGED, ids=[row[0] for row in FORGED])
def test_refused_is(rows, tmp_path, remark, to, change, said):
    forged = [json.loads(line) for line in rows[to]]
    change(forged)
    out = tmp_path / "out" / "model"
    with pytest.raises(carnet.CarnetError) as caught:
        carnet.run(signed(forged, tmp_path / "a.plan"), out)
    assert said in str(caught.value)
    assert not out.parent.exists()


def test_signed_anew_the_plan_itself_is_run(rows, tmp_path):
    carnet.run(signed([json.loads(line) for line in rows["hf"]], tmp_path / "a.plan"), tmp_path / "out")
    assert carnet.verify(GOLDEN, tmp_path / "out").equal

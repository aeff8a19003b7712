"""A plan on disk is the plan, and a plan that was damaged is refused."""

import itertools
import json
from dataclasses import fields, replace
from types import MappingProxyType

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carnet.errors import BadRequest, MachineFailed
from carnet.plans.columns import Plan, Steps
from carnet.plans.saved import digest, lines, load, save
from carnet.steps import (
    AssetFile,
    Encoding,
    Fill,
    Make,
    Measure,
    Move,
    Place,
    Put,
    RawFile,
    Same,
    TargetFile,
    TargetTensor,
    TextFile,
    Update,
)

SOURCE = Place("iter_1/__0_0.distcp", 704, (8, 1), "bf16")
TARGET = Place("rank0.safetensors", 1504, (1, 4), "bf16")
CODES, SCALES = Place("model.safetensors", 1024, (128, 1), "u8"), Place("model.safetensors", 96, (4, 1), "bf16")
ENCODING = Encoding("compressed-tensors/int4-group", (512, 512), 1024, SCALES, None)
OWN = Encoding("modelopt/fp8", (4, 2), 1504, replace(TARGET, offset=1520), SCALES)
ASSEMBLED = replace(SOURCE, file="scratch", offset=0, space="scratch")
PLAN = Plan(
    source="/models/llama",
    fingerprint="9f00",
    request={"to": "trtllm", "tp": 2, "drop": ["*.bias"], "dtype": None},
    family="llama",
    files=(
        TargetFile(
            "rank0.safetensors", 96536, (TargetTensor("a.weight", "bf16", (4, 2), 1504), TargetTensor("b", "f32", (), 1520)), {}
        ),
        TargetFile("model.safetensors", 8, (), {"format": "pt"}),
    ),
    texts=(TextFile("config.json", '{\n  "a": 1\n}\n'), TextFile("note.txt", "ü 語 \r\n\t end")),
    assets=(AssetFile("tokenizer.json", "/t/tokenizer.json", 12, "ab" * 16),),
    steps=Steps.of(
        [
            Move("layers.0.attention.q", (0, 0), (4, 2), SOURCE, TARGET),
            Move("b", (), (), replace(SOURCE, strides=()), replace(TARGET, strides=(), dtype="f32")),
            Fill("head", (2, 8), TARGET),
            Same("embed", (1, 0), (1, 8), SOURCE, replace(SOURCE, file="iter_1/__1_0.distcp")),
            Make("dequantize", "up", (0, 0), (4, 2), CODES, TARGET, ENCODING),
            Measure("up", (0, 0), (4, 2), CODES, "up", replace(ENCODING, recipe="modelopt/nvfp4", outer=SCALES)),
            Measure("down", (0, 0), (4, 2), SOURCE, "down"),
            Make("quantize", "up", (0, 0), (4, 2), ASSEMBLED, TARGET, OWN, ("up", "down")),
            Put("up_scale", (), replace(SCALES, strides=()), (0.5,)),
        ]
    ),
    dropped={"module extra state": ("a._extra_state", "b._extra_state"), "random state": ()},
    proof={"source bytes": 12, "copies checked equal": 1},
    memory=1 << 20,
    window=4096,
    scratch=TargetFile("scratch", 16, (TargetTensor("up", "bf16", (4, 2), 0),), {}, "scratch"),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.plan"


def saved(plan, path):
    save(plan, path)
    return path.read_bytes().splitlines(keepends=True)


def test_a_plan_that_was_saved_and_loaded_is_the_plan(path):
    save(PLAN, path)
    assert load(path) == PLAN
    assert digest(load(path)) == digest(PLAN)
    assert not path.with_name("a.plan.partial").exists()


def test_what_was_loaded_is_of_the_same_types_down_to_each_tuple(path):
    save(PLAN, path)
    assert [repr(getattr(load(path), field.name)) for field in fields(Plan)] == [
        repr(getattr(PLAN, field.name)) for field in fields(Plan)
    ]


def test_a_plan_is_lines_of_json_in_this_order():
    found = [json.loads(line) for line in lines(PLAN)]
    assert found[0]["carnet-plan"] == 5
    kinds = [
        "carnet-plan",
        "file",
        "file",
        "file",
        "text",
        "text",
        "asset",
        "steps",
        "steps",
        "steps",
        "steps",
        "steps",
        "steps",
    ]
    assert [next(iter(row)) for row in found] == kinds
    assert found[1]["tensors"] == [["a.weight", "bf16", [4, 2], 1504], ["b", "f32", [], 1520]]
    assert [row["steps"] for row in found[7:]] == [
        "rank0.safetensors",
        "",
        "rank0.safetensors",
        "",
        "rank0.safetensors",
        "model.safetensors",
    ]
    assert found[7] == {
        "steps": "rank0.safetensors",
        "number": 3,
        "forms": [
            ["move", [4, 2], [[8, 1], "bf16", "file"], [[1, 4], "bf16", "file"], 0.0, ""],
            ["move", [], [[], "bf16", "file"], [[], "f32", "file"], 0.0, ""],
            ["fill", [2, 8], [[1, 4], "bf16", "file"]],
        ],
        "names": ["iter_1/__0_0.distcp", "rank0.safetensors", "layers.0.attention.q", "b", "head"],
        "starts": [[0, 0], []],
        "mores": [[]],
        "form": [0, 1, 2],
        "tensor": [2, 3, 4],
        "start": [0, 1, 1],
        "more": 0,
        "source": [0, 0, -1],
        "target": 1,
        "scales": -1,
        "outer": -1,
        "source_at": [704, 704, 0],
        "target_at": 1504,
        "first": 0,
        "scales_at": 0,
        "outer_at": 0,
    }


def test_the_last_line_is_the_digest_of_those_before_it(path):
    *before, last = saved(PLAN, path)
    assert json.loads(last) == {"digest": xxhash.xxh3_128(b"".join(before)).hexdigest()} == {"digest": digest(PLAN)}


@pytest.mark.parametrize("field", [field.name for field in fields(Plan)])
def test_a_plan_that_differs_in_one_field_has_another_digest(field):
    other = {
        **dict.fromkeys(("source", "fingerprint", "family"), "x"),
        **dict.fromkeys(("files", "texts", "assets"), ()),
        "steps": Steps.of([]),
        "scratch": TargetFile("scratch", 0, (), {}, "scratch"),
        "factors": TargetFile("factors", 4, (TargetTensor("layers.0.attention.q.a", "f32", (1, 1), 0),), {}, "factors"),
        "updates": (Update("layers.0.attention.q", "layers.0.attention.q.a", "layers.0.attention.q.b", 2.0, False, 3),),
        "raws": (RawFile(".metadata", b"x"),),
        "request": {},
        "dropped": {},
        "proof": {},
        **{name: {"vocabulary": "x"} for name in ("notes", "unused", "accepted", "needs")},
        **dict.fromkeys(("memory", "window"), 7),
    }[field]
    assert digest(replace(PLAN, **{field: other})) != digest(PLAN)


PLAIN = st.characters(exclude_characters="\x85\u2028\u2029", exclude_categories=["Cs"])
TEXT = st.text(PLAIN, max_size=6)
NUMBERS = st.integers(0, 1 << 62)
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
NAMES = st.sampled_from(("a.bin", "b/c.bin", "rank0.safetensors", "ü 語.bin", "..a", "a.."))
SPACES = st.sampled_from(("file", "packed", "scratch"))
PLACES = st.builds(Place, NAMES, NUMBERS, SHAPES, st.sampled_from(("bf16", "f32", "f8_e4m3")), SPACES)
ENCODINGS = st.builds(Encoding, TEXT, st.tuples(NUMBERS, NUMBERS), NUMBERS, PLACES, st.none() | PLACES)
FUNCTIONS = st.sampled_from(("dequantize", "quantize"))
AMAXES = st.lists(TEXT, max_size=2).map(tuple)
FLOATS = st.floats(allow_nan=False)
STEPS = st.one_of(
    st.builds(Make, FUNCTIONS, TEXT, SHAPES, SHAPES, PLACES, PLACES, ENCODINGS, AMAXES, st.none() | FLOATS),
    st.builds(Measure, TEXT, SHAPES, SHAPES, PLACES, TEXT, st.none() | ENCODINGS),
    st.builds(Put, TEXT, SHAPES, PLACES, st.lists(FLOATS, max_size=3).map(tuple)),
    st.builds(Move, TEXT, SHAPES, SHAPES, PLACES, PLACES, FLOATS),
    st.builds(Fill, TEXT, SHAPES, PLACES),
    st.builds(Same, TEXT, SHAPES, SHAPES, PLACES, PLACES),
)
TENSORS = st.builds(TargetTensor, TEXT, st.sampled_from(("bf16", "i64")), SHAPES, NUMBERS)
PLANS = st.builds(
    Plan,
    TEXT,
    TEXT,
    st.dictionaries(TEXT, st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, st.lists(TEXT, max_size=2))),
    TEXT,
    st.lists(
        st.builds(TargetFile, NAMES, NUMBERS, st.lists(TENSORS, max_size=3).map(tuple), st.dictionaries(TEXT, TEXT)), max_size=2
    ).map(tuple),
    st.lists(st.builds(TextFile, NAMES, st.text(PLAIN, max_size=20)), max_size=2).map(tuple),
    st.lists(st.builds(AssetFile, NAMES, TEXT, NUMBERS, TEXT), max_size=2).map(tuple),
    st.lists(STEPS, max_size=4).map(Steps.of),
    st.dictionaries(TEXT, st.lists(TEXT, max_size=2).map(tuple)),
    st.dictionaries(TEXT, NUMBERS),
    NUMBERS,
    NUMBERS,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=PLANS)
def test_any_plan_that_was_saved_and_loaded_is_the_plan(path, plan):
    save(plan, path)
    assert load(path) == plan


def test_a_worker_reads_its_own_files_and_what_looks_at_the_source(path):
    save(PLAN, path)
    first, second = load(path, ["rank0.safetensors"]), load(path, ["model.safetensors"])
    assert [file.name for file in first.files] == ["rank0.safetensors"]
    assert [*first.steps] == [step for step in PLAN.steps if not isinstance(step, Put)]
    assert first.scratch == PLAN.scratch
    assert [*second.steps] == [step for step in PLAN.steps if isinstance(step, Same | Measure | Put)]
    assert second.scratch.tensors == ()
    assert (second.texts, second.proof) == (PLAN.texts, PLAN.proof)


def test_lines_of_other_files_are_not_parsed(path):
    rows = saved(PLAN, path)[:-1]
    rows[-1] = rows[-1].rstrip()[:-1] + b', "rubbish}\n'
    body = b"".join(rows)
    path.write_bytes(body + json.dumps({"digest": xxhash.xxh3_128(body).hexdigest()}).encode() + b"\n")
    assert len(load(path, ["rank0.safetensors"]).steps) == len(PLAN.steps) - 1
    with pytest.raises(BadRequest, match="this is not a plan that carnet can run"):
        load(path)


STRANGE = [
    pytest.param("\n", id="a line end"),
    pytest.param("\x1c", id="a file separator"),
    pytest.param("\x0c", id="a form feed"),
    pytest.param("\x85", id="a next line"),
    pytest.param("\u2028", id="a line separator"),
    pytest.param("\u2029", id="a paragraph separator"),
    pytest.param(
        "\udcff",
        id="a byte that is no UTF-8",
    ),
]


@pytest.mark.parametrize("character", STRANGE)
def test_a_folder_may_have_this_in_its_name(path, character):
    plan = replace(PLAN, source=f"/models/a{character}b")
    save(plan, path)
    assert load(path) == plan


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chance=st.randoms(use_true_random=False))
def test_a_plan_with_one_flipped_bit_is_refused(path, chance):
    path.unlink(missing_ok=True)  # what was damaged at its beginning is not a plan that another may replace
    save(PLAN, path)
    content = bytearray(path.read_bytes())
    at = chance.choice([place for place, byte in enumerate(content) if byte != ord("\n")])
    content[at] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    with pytest.raises(BadRequest, match="this is not a plan that carnet can run"):
        load(path)


def test_a_plan_with_one_flipped_bit_in_a_line_end_is_refused(path):
    save(PLAN, path)
    content = path.read_bytes()
    for at, bit in itertools.product([place for place, byte in enumerate(content) if byte == ord("\n")], range(8)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        with pytest.raises(BadRequest, match="this is not a plan that carnet can run"):
            load(path)


def test_a_plan_that_lost_any_one_line_is_refused(path):
    rows = saved(PLAN, path)
    for at in range(len(rows)):
        path.write_bytes(b"".join(rows[:at] + rows[at + 1 :]))
        with pytest.raises(BadRequest, match="this is not a plan that carnet can run"):
            load(path)


def test_a_plan_in_which_any_two_lines_changed_places_is_refused(path):
    rows = saved(PLAN, path)
    for at in range(len(rows) - 1):
        path.write_bytes(b"".join([*rows[:at], rows[at + 1], rows[at], *rows[at + 2 :]]))
        with pytest.raises(BadRequest, match="this is not a plan that carnet can run"):
            load(path)


def test_a_plan_with_any_one_line_twice_is_refused(path):
    rows = saved(PLAN, path)
    for at in range(len(rows)):
        path.write_bytes(b"".join([*rows[: at + 1], *rows[at:]]))
        with pytest.raises(BadRequest, match="this is not a plan that carnet can run"):
            load(path)


def test_a_plan_that_ends_early_is_refused_wherever_it_ends(path):
    content = b"".join(saved(PLAN, path))
    for length in range(len(content) - 1):  # the very last byte is a line end
        path.write_bytes(content[:length])
        with pytest.raises(BadRequest, match="this is not a plan that carnet can run"):
            load(path)


def forged(path, change):
    """Write a plan whose rows were changed by somebody who knows how the digest is made."""
    rows = [json.loads(line) for line in lines(PLAN)]
    change(rows)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text + json.dumps({"digest": xxhash.xxh3_128(text.encode()).hexdigest()}) + "\n")
    return path


def at(row, *way):
    """Return a change of one value: the row, then the keys that lead to it, then the new value."""
    *keys, last, value = way

    def change(rows):
        found = rows[row]
        for key in keys:
            found = found[key]
        found[last] = value

    return change


FORGED = [
    ("a target file above the folder", at(1, "file", "../rank0.safetensors")),
    ("a target file from the root", at(1, "file", "/etc/rank0.safetensors")),
    ("a target file without a name", at(1, "file", "")),
    ("a target file that is the folder", at(1, "file", ".")),
    ("a text above the folder", at(4, "text", "a/../../config.json")),
    ("an asset above the folder", at(6, "asset", "../tokenizer.json")),
    ("a step that reads above the folder", at(7, "names", 0, "../../etc/passwd")),
    ("a step that reads from the root", at(7, "names", 0, "/etc/passwd")),
    ("a step that writes above the folder", at(7, "names", 1, "../x")),
    ("a comparison above the folder", lambda rows: rows[8]["names"].__setitem__(rows[8]["target"], "../x")),
    ("a name that is a number", at(7, "names", 0, 7)),
    ("a step of a kind that nobody knows", at(7, "forms", 0, 0, "execute")),
    ("a form that is a word", at(7, "forms", 0, "move")),
    ("a form with a field too few", lambda rows: rows[7]["forms"][0].pop()),
    ("a form with a field too many", lambda rows: rows[7]["forms"][0].append(1)),
    ("a place that is a number", at(7, "forms", 0, 2, 7)),
    ("a space that nobody knows", at(7, "forms", 0, 2, 2, "network")),
    ("a space that is a list", at(7, "forms", 0, 2, 2, [])),
    ("a place with a field too few", lambda rows: rows[7]["forms"][0][2].pop()),
    ("an element type that nobody knows", at(7, "forms", 0, 2, 1, "f4")),
    ("a stride that is a half", at(7, "forms", 0, 2, 0, 0, 0.5)),
    ("a tensor of a type that nobody knows", at(1, "tensors", 0, 1, "f4")),
    ("a function that nobody knows", at(9, "forms", 0, 1, "execute")),
    ("a function that is a list", at(9, "forms", 0, 1, [])),
    ("codes without an encoding", at(9, "forms", 0, 5, None)),
    ("an encoding with a field too few", lambda rows: rows[9]["forms"][0][5].pop()),
    ("an encoding that is a word", at(9, "forms", 0, 5, "modelopt/fp8")),
    ("a matrix of three dimensions", at(9, "forms", 0, 5, 1, [4, 4, 4])),
    ("a matrix that begins nowhere", at(9, "first", "0")),
    ("scales above the folder", lambda rows: rows[9]["names"].__setitem__(rows[9]["scales"], "../x")),
    ("no scales", at(9, "forms", 0, 5, 2, None)),
    ("scales in no file", at(9, "scales", -1)),
    ("a form that is not in the table", at(7, "form", 0, 3)),
    ("a form before the table", at(7, "form", 0, -1)),
    ("a tensor that is not in the table", at(7, "tensor", 5)),
    ("a source in no file", at(7, "source", -1)),
    ("a file that is not in the table", at(7, "target", 5)),
    ("an offset below zero", at(7, "target_at", -1)),
    ("an offset that no file has", at(7, "target_at", (1 << 62) + 1)),
    ("an offset that no machine has", at(7, "target_at", 1 << 80)),
    ("an offset that is a half", at(7, "target_at", 0.5)),
    ("an offset that is true", at(7, "target_at", True)),
    ("a column that is a word", at(7, "target_at", "0")),
    ("a column too short", lambda rows: rows[7]["form"].pop()),
    ("a column too long", lambda rows: rows[7]["form"].append(0)),
    ("a column of columns", lambda rows: rows[7].__setitem__("form", [rows[7]["form"]])),
    ("a column of unequal columns", at(7, "form", 0, [0, 1])),
    ("no column", lambda rows: rows[7].pop("outer_at")),
    ("more steps than are there", at(7, "number", 4)),
    ("more steps than a block has", at(7, "number", 1 << 40)),
    ("no steps", at(7, "number", 0)),
    ("steps in half", at(7, "number", 1.5)),
    ("a start that is a number", at(7, "starts", 0, 0)),
    ("a value that is a word", lambda rows: rows[12].__setitem__("mores", [["0"]])),
    ("a scale that is a word", at(11, "mores", 0, 0, "0.5")),
    ("nothing of what a scale follows from", at(11, "mores", 0, [])),
    ("two scratch spaces", at(1, "kind", "scratch")),
    ("no scratch space", lambda rows: rows.pop(3)),
    ("another version", at(0, "carnet-plan", 6)),
    ("no version", lambda rows: rows[0].pop("carnet-plan")),
    ("no window", lambda rows: rows[0].pop("window")),
    ("a row that is a number", lambda rows: rows.append(7)),
    ("a row that is nothing known", lambda rows: rows.append({"script": "rm"})),
    ("no rows", lambda rows: rows.clear()),
]


@pytest.mark.parametrize(("remark", "change"), FORGED, ids=[row[0] for row in FORGED])
def test_a_forged_plan_is_refused_for(path, remark, change):
    with pytest.raises(BadRequest) as caught:
        load(forged(path, change))
    assert caught.value.what == "this is not a plan that carnet can run"
    assert caught.value.facts["where"] == path


def test_a_plan_of_an_older_version_is_refused_in_plain_words(path):
    with pytest.raises(BadRequest) as caught:
        load(forged(path, at(0, "carnet-plan", 1)))
    assert caught.value.facts["reason"] == "another carnet made it: a plan of version 1, where this one reads version 5"
    assert caught.value.remedy == "make it again with `carnet plan`"


def test_the_forgers_hand_alone_is_not_what_is_refused(path):
    assert load(forged(path, lambda rows: None)) == PLAN


NO_PLANS = [
    ("an empty file", b""),
    ("a line end", b"\n"),
    ("no text", b"\xff\xfe\x00"),
    ("a text", b"hello\n"),
    ("a number", b"7\n"),
    ("another JSON file", b'{"architectures": ["LlamaForCausalLM"]}\n'),
    ("brackets without end", b"[" * 100_000),
    ("a digest of nothing", json.dumps({"digest": xxhash.xxh3_128(b"").hexdigest()}).encode()),
]


@pytest.mark.parametrize(("remark", "content"), NO_PLANS, ids=[row[0] for row in NO_PLANS])
def test_this_is_no_plan(path, remark, content):
    path.write_bytes(content)
    with pytest.raises(BadRequest, match="this is not a plan that carnet can run"):
        load(path)


def test_a_plan_that_is_not_there_is_the_machines_fault(path):
    with pytest.raises(MachineFailed, match="the plan cannot be read"):
        load(path)


def test_a_plan_that_cannot_be_written_leaves_what_was_there(path):
    save(PLAN, path)
    before = path.read_bytes()
    with pytest.raises(MachineFailed, match="the plan cannot be written"):
        save(PLAN, path / "below a file")
    assert path.read_bytes() == before


def test_mappings_of_any_kind_are_saved_as_tables(path):
    save(replace(PLAN, proof=MappingProxyType({"a": 1})), path)
    assert load(path).proof == {"a": 1}

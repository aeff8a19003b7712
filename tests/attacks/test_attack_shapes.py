"""Small files that would become large in memory: refused by their shape, before anything is parsed, within a budget of memory."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import carnet
from carnet.dialects.strangers import way_out
from carnet.errors import BadCheckpoint
from carnet.formats import jsons, pickles
from carnet.formats.jsons import parse_object
from carnet.inventory.survey import survey
from carnet.plans import saved
from tests.counting import calls_of
from tests.peak import SAMPLED

LLAMA = Path(__file__).parents[1] / "goldens/megatron/llama_te_pp2_vpp"
BUDGET = 320 << 20  # bytes of private memory over what an idle carnet has: the file itself, and its text
CHILD = f"""
{SAMPLED}
from carnet.errors import CarnetError
from carnet import api
from carnet.executor import run
from carnet.formats.safetensors import read_header
from carnet.storage.schemes import folder_at
from carnet.plans import saved

before = private()
thread.start()
try:
    exec(sys.argv[1])
    print("no refusal")
except CarnetError as error:
    print(str(error).splitlines()[0])
stop()
print(peak - before)
"""


def refusal(action: str, budget: int = BUDGET) -> str:
    """Return how a child refuses something, once it stayed within the budget."""
    child = subprocess.run([sys.executable, "-c", CHILD, action], capture_output=True, text=True, check=True, timeout=120)
    said, peak = child.stdout.splitlines()
    assert int(peak) <= budget, f"{int(peak) >> 20} MiB"
    return said


def filled(unit: bytes, size: int, begin: bytes = b'{"a":[', end: bytes = b"]}") -> bytes:
    return begin + b",".join([unit] * (size // (len(unit) + 1))) + end


@pytest.fixture
def llama(tmp_path):
    """The headers of a small model as a Hugging Face folder."""
    assert carnet.cross(LLAMA, tmp_path / "llama", to="hf")
    return carnet.inspect(tmp_path / "llama").checkpoint


WIDE = [b"[]", b"{}", b'{"a":0}', b"[[0]]", b'"aa"', b"9", b'{"a":{}}', b'["\\"[",{}]']


@pytest.mark.parametrize("unit", WIDE)
def test_a_wide_config_is_refused_by_its_shape(tmp_path, unit):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    (tmp_path / "config.json").write_bytes(filled(unit, 30 << 20))
    assert refusal(f"api.inspect({str(tmp_path)!r})") == "config.json is too large for what it should hold"


@pytest.mark.parametrize("opened", [b"[", b'{"a":', b'[{"a":'])
@pytest.mark.parametrize("where", ["config.json", "model.safetensors.index.json"])
def test_a_deep_text_is_refused_by_its_shape(tmp_path, opened, where):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / where).write_bytes(b'{"a":' + opened * ((20 << 20) // len(opened)))
    assert refusal(f"api.inspect({str(tmp_path)!r})") == f"{where} is nested too deeply"


@pytest.mark.parametrize("unit", [b"[]", b"{}"])
def test_a_wide_header_is_refused_by_its_shape(tmp_path, unit):
    header = filled(unit, 60 << 20)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    said = refusal(f"read_header(folder_at({str(tmp_path)!r}), 'a.safetensors')")
    assert said == "the header of a.safetensors is too large for what it should hold"


@pytest.mark.parametrize("program", [b"}", b"]", b"(l", b")\x85", b"\x8f", b"(\x91", b"K\x07\x85\x85\x85\x85"])
def test_a_pickle_of_nothing_but_containers_is_refused_by_its_shape(megatron, program):
    (megatron.root / ".metadata").write_bytes(b"\x80\x04" + program * ((30 << 20) // len(program)) + b".")
    assert refusal(f"api.inspect({str(megatron.root)!r})") == ".metadata is not a valid pickle"


def test_names_of_unknown_classes_are_limited(megatron):
    many = b"".join(b"ca\nb%d\n0" % number for number in range(20_000))
    item = b"\x80\x04" + many + b"N."
    with pytest.raises(BadCheckpoint, match="too many classes"):
        pickles_of(item)


def pickles_of(program: bytes) -> object:
    from carnet.formats.torch_pickles import lenient, storage_of

    return pickles.load(program, "it", "here", lenient, storage_of)


@pytest.mark.parametrize("unit", ["- a\n", "[],", "&a {},", "? a\n"])
def test_a_wide_yaml_is_refused_by_its_shape(tmp_path, unit):
    text = "model:\n" + (unit * 3_000_000 if unit.endswith("\n") else f"  [{unit * 2_000_000}]\n")
    (tmp_path / "run_config.yaml").write_text(text)
    said = refusal(f"from carnet.formats.wrapped import read_config; read_config(Path({str(tmp_path)!r}) / 'run_config.yaml')")
    assert said == "run_config.yaml is not plain YAML"


@pytest.mark.parametrize("line", [b"[" * (60 << 20), filled(b"[]", 60 << 20), b'{"text":' * (2 << 20), b"[[]]\n" * (8 << 20)])
def test_a_plan_that_would_fill_the_memory_is_refused_a_line_at_a_time(tmp_path, line):
    import xxhash

    body = b'{"carnet-plan":1}\n' + line + b"\n"
    (tmp_path / "plan").write_bytes(body + b'{"digest":"%s"}\n' % xxhash.xxh3_128_hexdigest(body).encode())
    assert refusal(f"saved.load(Path({str(tmp_path / 'plan')!r}))") == "this is not a plan that carnet can run"


def test_a_sparse_tokenizer_is_read_piece_by_piece(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)
    assert (
        refusal(f"from carnet.formats.companions import asset; asset(folder_at({str(tmp_path)!r}), 'tokenizer.json')", 16 << 20)
        == "no refusal"
    )


def test_a_carnet_that_would_fill_the_memory_is_refused_by_its_shape(tmp_path):
    (tmp_path / "carnet.json").write_bytes(filled(b"{}", 60 << 20))
    said = refusal(f"api.verify({str(tmp_path)!r})")
    assert said == "carnet.json is too large for what it should hold"


def test_a_tensor_that_nobody_knows_is_looked_at_a_few_times_however_many_there_are(llama):
    def looking_at(strangers):
        strange = {("", f"t.{at}.weight"): replace(norm, name=f"t.{at}.weight") for at in range(strangers)}
        several = replace(llama, tensors={**llama.tensors, **strange})
        return calls_of(lambda: survey(several))

    (norm,) = (stored for (_, name), stored in llama.tensors.items() if name == "model.norm.weight")
    few, many = looking_at(1000), looking_at(11_000)
    assert many - few < 20 * 10_000


@pytest.mark.parametrize("word", ["adapter", "linear_", ".adapter", "_", "*", "["])
def test_what_a_long_name_looks_like_is_found_in_one_pass(word):
    assert way_out([word * 300_000, "norm.weight"], {"embed"}, whole=True)[0] in {"", "an adapter"}  # not all are norms


def test_the_header_of_the_largest_models_passes_by_far():
    layers, experts = 61, 1100  # 200,000 tensors
    names = (
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(layers)
        for expert in range(experts)
        for part in ("gate", "up", "down")
    )
    each = 7168 * 2048 * 2
    header = {
        name: {"dtype": "BF16", "shape": [2048, 7168], "data_offsets": [at * each, (at + 1) * each]}
        for at, name in enumerate(names)
    }
    data = json.dumps(header).encode()
    jsons.check_shape(data, jsons.TABLE * 6 // 10)
    assert len(header) > 200_000


@pytest.mark.parametrize(
    ("data", "deep"),
    [(b'["%s"]' % (b"[" * 5000), 1), (b'["\\"",%s"[[["]' % (b'"\\\\",' * 2000), 1), (b'{"a":%s0}' % (b'{"[":[]},' * 1000), 3)],
)
def test_what_stands_in_a_text_does_not_nest(data, deep):
    jsons.check_shape(data, 1 << 30)
    assert deep < jsons.DEPTH


@pytest.mark.parametrize("cut", range(-3, 4))
def test_a_backslash_before_the_end_of_a_chunk_hides_the_quote_after_it(cut):
    text = b'["' + b"a" * (jsons._CHUNK - 4 + cut) + b'\\"' + b"[" * 100 + b'"]'
    assert json.loads(text)
    jsons.check_shape(text, 1 << 30)


@pytest.mark.parametrize("name", ["\\ud800extra", "a\\udfff", "\\udc00\\ud800"])
def test_a_name_that_is_no_unicode_is_an_error_that_can_be_printed(name):
    with pytest.raises(BadCheckpoint, match="holds a text that is no Unicode") as error:
        parse_object(b'{"%s": 1}' % name.encode(), "a.json", "here")
    assert str(error.value).encode()
    assert parse_object(b'{"\\ud83d\\ude00": 1}', "a.json", "here") == {"\U0001f600": 1}


def test_a_plan_of_a_million_steps_is_far_from_the_limit():
    assert saved.STEPS >= 4_000_000

"""One table of options: Python, the command line and a file of options take the same; what a target cannot use is refused."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

import carnet
from carnet.cli import main
from carnet.plans.request import ASIDE, OPTIONS, flag_of

HERE = Path(__file__).parent
MEGATRON = HERE / "goldens" / "megatron" / "llama_tp2pp2"

TYPO, GONE = {"dtyp": "fp32"}, {"device": "cuda"}


def call(*words):
    return CliRunner().invoke(main, [*map(str, words)])


def planned(*words):
    result = call("plan", MEGATRON, *words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["request"]


def test_types_table_and_command_line_know_the_same_options():
    known = {*OPTIONS, *ASIDE}
    assert known == carnet.Options.__required_keys__ | carnet.Options.__optional_keys__
    for verb, told in (("plan", known - {"threads"}), ("cross", known)):  # a plan is the same on every machine
        asked = {param.name: param.opts for param in main.commands[verb].params}
        assert {name: [flag_of(name)] for name in told} == {name: asked[name] for name in asked.keys() & known}


@pytest.mark.parametrize(
    "text", ['to = "trtllm"\ntp = 2\nvocab-size = 250\n', '{"request": {"to": "trtllm", "tp": 2, "vocab_size": 250}}']
)
def test_a_file_of_options_says_what_the_words_say(text, tmp_path):
    file = tmp_path / "wish"
    file.write_text(text)
    assert planned("--request", file) == planned("--to", "trtllm", "--tp", 2, "--vocab-size", 250)
    assert planned("--request", file, "--tp", 4, "--dtype", "fp32") == planned(
        "--to", "trtllm", "--tp", 4, "--vocab-size", 250, "--dtype", "fp32"
    )
    assert carnet.plan(MEGATRON, request=file).request == carnet.plan(MEGATRON, to="trtllm", tp=2, vocab_size=250).request


def test_paths_of_a_file_are_seen_from_its_folder(tmp_path, monkeypatch):
    below = tmp_path / "wishes"
    below.mkdir()
    (tmp_path / "llama.toml").write_text('to = "hf"\nvocab-size = 250\nconfig = "own.yaml"\n')
    own = tmp_path / "own.yaml"
    own.write_text("num_layers: twelve\n")
    monkeypatch.chdir(below)
    relative = call("plan", MEGATRON, "--request", "../llama.toml", "--json")
    named = call("plan", MEGATRON, "--to", "hf", "--vocab-size", 250, "--config", own, "--json")
    assert (relative.exit_code, relative.stdout) == (1, named.stdout)


def test_what_plan_and_document_give_back_asks_for_the_same(tmp_path):
    first = call(
        "cross", MEGATRON, tmp_path / "one", "--to", "hf", "--dtype", "fp32", "--vocab-size", 250, "--shard-size", "64KiB"
    )
    assert first.exit_code == 0, first.stderr
    for said in (tmp_path / "one" / "carnet.json", tmp_path / "plan.json"):
        if not said.exists():
            said.write_text(call("plan", MEGATRON, "--request", tmp_path / "one" / "carnet.json", "--json").stdout)
        out = tmp_path / f"from {said.name}"
        result = call("cross", MEGATRON, out, "--request", said)
        assert result.exit_code == 0, result.stderr
        for file in (tmp_path / "one").iterdir():
            assert file.name == "carnet.json" or (out / file.name).read_bytes() == file.read_bytes()
    verdict = call("verify", MEGATRON, tmp_path / "one", "--request", tmp_path / "plan.json")
    assert verdict.exit_code == 0, verdict.stderr
    assert call("verify", MEGATRON, tmp_path / "one", "--vocab-size", 250).exit_code == 3  # without the type


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('to = "hf', "is not TOML"),
        ("[[to]]\n", "cannot be"),
        ('to = "hf"\ntpp = 2\n', "no option is called 'tpp'; did you mean 'tp'?"),
        ('to = "hf"\ntp = "2"\n', "tp cannot be '2'"),
        ('to = "hf"\ndrop = 3\n', "drop cannot be 3"),
        ('to = "hf"\nrequest = "other.toml"\n', "no option is called 'request'"),
        ("tp = 2\n", "needs to know what its target is for"),
        ('{"request": 3}', "no option is called 'request'"),
        ("[1]", "no option is called '1'"),
        (b"to = '\xff'", "is not TOML"),
        ('to = "hf"\nconfig = {name = "config.json"}\n', "config cannot be"),
        ('to = "hf"\nvocab-size = 250\nvocab_size = 100\n', "says 'vocab_size' twice"),
        ('to = "hf"\nas = "llama"\nfamily = "gpt2"\n', "says 'family' twice"),
        ('{"to": "hf", "to": "trtllm"}', "is there twice"),
        ('[request]\nto = "hf"\n', "no option is called 'request'"),
        ('{"to": "hf", "request": {"tp": 2}}', "no option is called 'request'"),
        ('{"to": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested too deeply"),
        ("to = " + "[" * 20_000 + "]" * 20_000, "is nested too deeply"),
        ("#" * 100_000, "is too large"),
        ('to = "hf"\nkv-scale = 1' + "0" * 400, "kv_scale cannot be 1"),
        ('to = "hf"\nkv-scale = nan\n', "kv_scale cannot be nan"),
        ('to = "hf"\nmemory = "1' + "0" * 400 + 'M"\n', "memory is larger than"),
        ('to = "hf"\nshard-size = "0.1"\n', "shard_size must be at least 1"),
        ('to = "hf"\nwritten-by = ["nemo"]\n', "written_by cannot be ['nemo']"),
        ('to = "hf"\nwritten-by = "megatron"\n', "no program is called 'megatron'"),
        ('to = "hf"\nconfig = ""\n', "config cannot be ''"),
        ('{"to": "hf", "config": "a\\u0000b"}', r"config cannot be 'a\x00b'"),
        ('{"to": "hf", "config": "\\ud800"}', "holds a text that is no Unicode"),
        ('to = "' + "x" * 5000 + '"\n', "xxx..."),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_wrong_file_of_options_is_a_usage_error(text, said, tmp_path):
    file = tmp_path / "wish.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = call("plan", MEGATRON, "--vocab-size", 250, "--request", file)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    with pytest.raises(carnet.BadOption):
        carnet.plan(MEGATRON, request=file)


def test_what_is_no_file_of_options_is_a_usage_error(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "huge", "wb") as huge:
        huge.truncate(40 << 30)
    for file, said in (
        ("fifo", "a FIFO"),
        ("huge", "too large"),
        (".", "a folder"),
        ("none", "is missing"),
        ("a\0b", "a path"),
    ):
        with pytest.raises(carnet.BadOption) as caught:
            carnet.plan(MEGATRON, request=f"{tmp_path}/{file}")
        assert said in str(caught.value)


def test_a_file_of_options_may_begin_as_windows_writes_it(tmp_path):
    (tmp_path / "wish.toml").write_bytes(b'\xef\xbb\xbfto = "hf"\r\nvocab-size = 250\r\n')
    assert planned("--request", tmp_path / "wish.toml")["vocab_size"] == 250


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda out: carnet.cross(MEGATRON, out, to="hf", vocab_size=250, **GONE), "no option is called 'device'"),
        (lambda out: carnet.verify(MEGATRON, out, **TYPO), "no option is called 'dtyp'; did you mean 'dtype'?"),
        (lambda out: carnet.verify(MEGATRON, out, memory=None), "memory cannot be None"),
        (lambda _: carnet.cross(MEGATRON, "a\0b", to="hf"), "out cannot be"),
        (lambda _: carnet.cross(MEGATRON, "\ud800", to="hf"), "out cannot be"),
        (lambda _: carnet.cross(MEGATRON, "", to="hf"), "out cannot be ''"),
        (lambda out: carnet.cross("", out, to="hf"), "ckpt cannot be ''"),
        (lambda _: carnet.plan(MEGATRON, to="hf", tokenizer="a\0b"), "tokenizer cannot be"),
        (lambda _: carnet.plan(MEGATRON, to="hf", written_by=3), "written_by cannot be 3"),
        (lambda _: carnet.plan(MEGATRON, to="trtllm", tp=10**5000), "tp is larger than"),
        (lambda _: carnet.plan(MEGATRON, to="hf", adapter="own", adapter_scale=-(10**400)), "adapter_scale cannot be -1"),
        (lambda _: carnet.plan(MEGATRON, to="hf", read_by="megatron-lm==7"), "no release '7' of megatron-lm"),
    ],
)
def test_what_an_option_of_python_never_is_names_the_option(ask, said, tmp_path):
    with pytest.raises(carnet.BadOption) as caught:
        ask(tmp_path / "out")
    assert said in str(caught.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("to", "option", "value"),
    [
        ("hf", "spelling", "local"),
        ("trtllm", "spelling", "local"),
        ("trtllm", "shard_size", "1G"),
        ("megatron", "shard_size", "1G"),
        ("hf", "read_by", "nemo"),
        ("hf", "parallel_embedding", "rows"),
        ("megatron", "parallel_embedding", "rows"),
    ],
)
def test_what_a_target_cannot_use_is_refused(to, option, value):
    result = call("plan", MEGATRON, "--to", to, "--vocab-size", 250, flag_of(option), value)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{option} is for a target of the kind" in result.stderr
    with pytest.raises(carnet.BadOption, match=f"{option} is for a target of the kind"):
        carnet.plan(MEGATRON, **{"to": to, option: value})


def test_help_shows_options_in_groups_the_most_needed_first():
    text = call("cross", "--help").stdout
    places = [text.index(f"\n{group}:\n") for group in ("Options", "Source", "Target", "Numbers", "Machine")]
    assert places == sorted(places)
    for before, flag, after in (
        ("Options", "--to ", "Source"),
        ("Source", "--drop ", "Target"),
        ("Numbers", "--style ", "Machine"),
    ):
        assert text.index(f"\n{before}:\n") < text.index(flag) < text.index(f"\n{after}:\n")

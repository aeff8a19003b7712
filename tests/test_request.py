"""One table of options: Python, the command line and a file of options take the same; what a target cannot use is refused."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import carnet
from carnet.cli import main
from carnet.plans.request import ASIDE, OPTIONS, flag_of

HERE = Path(__file__).parent
MEGATRON = HERE / "goldens" / "megatron" / "llama_tp2pp2"


def call(*words):
    return CliRunner().invoke(main, [*map(str, words)])


def planned(*words):
    result = call("plan", MEGATRON, *words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["request"]


def test_types_table_and_command_line_know_the_same_options():
    known = {*OPTIONS, *ASIDE}
    assert known == carnet.Options.__required_keys__ | carnet.Options.__optional_keys__
    for verb in ("plan", "cross"):
        asked = {param.name: param.opts for param in main.commands[verb].params}
        assert {name: [flag_of(name)] for name in known} == {name: asked[name] for name in known}


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
    ],
    ids=str,
)
def test_a_wrong_file_of_options_is_a_usage_error(text, said, tmp_path):
    file = tmp_path / "wish.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = call("plan", MEGATRON, "--vocab-size", 250, "--request", file)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    with pytest.raises(carnet.BadOption):
        carnet.plan(MEGATRON, request=file)


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

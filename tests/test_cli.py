"""The command line from outside: exit codes, what goes to which stream, and what a person reads when carnet refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import carnet
from carnet.cli import main
from carnet.plans import saved

GOLDENS = Path(__file__).parent / "goldens"
MEGATRON = GOLDENS / "megatron/llama_tp2pp2"
HF = GOLDENS / "trtllm/llama_kv2/hf"
SOURCE_TREE = Path(carnet.__file__).parents[1]


def carnet_in_a_shell(*words, cwd=None, code=None):
    """Run the command in a process of its own, both streams into pipes."""
    program = ["-m", "carnet"] if code is None else ["-c", code]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_TREE), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, *program, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def call(*words):
    """Run the command in this process; one that takes a hostile number at its word would run for ever, and the suite with it."""

    def late(signum, frame):
        raise TimeoutError("the command was still running after 8 seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 8)
    try:
        result = CliRunner().invoke(main, [str(word) for word in words], prog_name="carnet")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback
    assert "Traceback" not in result.stderr
    return result


def refused(*words):
    """Return the lines of a refusal, after asking that it is one: exit code 1, nothing on stdout, aligned facts, one `try:` at most."""
    result = call(*words)
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert lines[0].startswith("carnet: ")
    assert all(line.startswith("  ") for line in lines[1:])
    assert sum(line.startswith("  try: ") for line in lines) <= 1
    facts = [line for line in lines[1:] if not line.startswith("  try: ")]
    starts = [{at for at in range(12, 40) if fact[at - 1 : at] == " " != fact[at : at + 1]} for fact in facts]
    assert not facts or set.intersection(*starts)  # there is a column in which every value starts
    return lines


@pytest.fixture
def hf(tmp_path):
    shutil.copytree(HF, tmp_path / "hf")
    return tmp_path / "hf"


def rewrite(folder, damage):
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reconfigure(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


# --- the package ---------------------------------------------------------------------------------------------------------------


VERBS = ("clean", "cross", "finish", "inspect", "plan", "run", "verify")
ASIDE = ("against", "expect", "merge", "Comparison", "Expected")  # of engines, and of several checkpoints
ERRORS = ("BadCheckpoint", "BadOption", "BadRequest", "CarnetError", "MachineFailed", "NotSupported")


def test_the_package_shows_its_five_verbs_what_they_return_and_what_they_raise_and_nothing_else():
    assert set(carnet.__all__) == {*VERBS, *ERRORS, *ASIDE, "Inspection", "Options", "Plan", "Progress", "Verdict"}
    assert {name for name in dir(carnet) if not name.startswith("_")} == set(carnet.__all__)
    assert all(callable(getattr(carnet, name)) for name in carnet.__all__)
    assert all(issubclass(getattr(carnet, name), carnet.CarnetError) for name in ERRORS)
    with pytest.raises(AttributeError, match="no attribute 'convert'"):
        _ = carnet.convert


def test_the_commands_are_the_verbs_and_what_stands_beside_them():
    assert sorted(main.commands) == sorted(
        [*VERBS, "apply", "calibrate", "completion", "delta", "expect", "fits", "lineage", "merge", "report", "sign"]
    )


def test_help_imports_neither_numpy_nor_rich_nor_any_layer_below_but_the_words_of_a_request():
    code = (
        "import sys\nfrom carnet.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "loaded = {name for name in sys.modules if name.split('.')[0] in ('numpy', 'rich', 'ml_dtypes', 'xxhash', 'torch')}\n"
        "own = {name for name in sys.modules if name.startswith('carnet.') and not name.startswith('carnet.cli')}\n"
        "loaded |= own - {'carnet.plans', 'carnet.plans.options', 'carnet.plans.request', 'carnet.errors', 'carnet.version'}\n"
        "loaded -= {'carnet.dialects', 'carnet.dialects.kinds', 'carnet.plans.words'}\n"
        "print(sorted(loaded), file=sys.stderr)"
    )
    result = carnet_in_a_shell(code=code)
    assert result.stderr == "[]\n"
    assert "Usage: " in result.stdout


@pytest.mark.parametrize("verb", [*VERBS, "calibrate", "expect", "fits", "merge"])
def test_the_help_of_every_verb_has_examples_that_are_commands(verb):
    result = call(verb, "--help")
    assert result.exit_code == 0
    assert f"  carnet {verb} " in result.stdout.split("Examples:\n")[1]


# --- from Python --------------------------------------------------------------------------------------------------------------


def test_a_verdict_is_false_where_the_target_is_different(tmp_path):
    verdict = carnet.cross(MEGATRON, tmp_path / "out", to="hf")
    assert verdict
    assert isinstance(verdict, carnet.Verdict)
    rewrite(tmp_path / "out", lambda tensors: tensors["lm_head.weight"].neg_())
    assert not carnet.verify(MEGATRON, tmp_path / "out")
    assert not carnet.verify(tmp_path / "out")


def test_what_the_verbs_return_has_a_short_repr(tmp_path):
    plan, seen = carnet.plan(MEGATRON, to="hf"), carnet.inspect(MEGATRON)
    assert isinstance(plan, carnet.Plan)
    assert isinstance(seen, carnet.Inspection)
    for each in (plan, seen, seen.inventory, carnet.cross(MEGATRON, tmp_path / "out", to="hf"), carnet.inspect(HF)):
        assert repr(each).startswith(f"{type(each).__name__}(")
        assert len(repr(each)) < 400
        assert "\n" not in repr(each)
    assert "78 steps" in repr(plan) or "steps" in repr(plan)


def test_options_in_python_are_written_as_on_the_command_line():
    plain = carnet.plan(MEGATRON, to="hf", memory=256_000_000)
    for memory in ("256M", "256 MB", "256000000", "0.256G"):
        assert carnet.plan(MEGATRON, to="hf", memory=memory) == plain
    assert carnet.plan(MEGATRON, to="hf", memory="256MiB").memory >= plain.memory
    one = carnet.plan(MEGATRON, to="hf", quantize="fp8-channel", exclude="*.o_proj")
    assert one == carnet.plan(MEGATRON, to="hf", quantize="fp8-channel", exclude=["*.o_proj"])
    assert one.request["exclude"] == ["*.o_proj"]
    assert carnet.plan(str(MEGATRON), to="hf", shard_size="64KiB").request["shard_size"] == 65536


@pytest.mark.parametrize("options", [{}, {"quantize": "fp8-channel"}], ids=str)
def test_progress_has_one_total_from_the_start_never_goes_back_and_is_told_on_the_thread_that_called(options, tmp_path):
    said = []
    carnet.cross(
        MEGATRON,
        tmp_path / "out",
        to="hf",
        progress=lambda at: said.append((at, threading.current_thread())),
        **options,
    )
    done = [at.done for at, _ in said]
    assert {at.total for at, _ in said if at.phase != "planning"} == {done[-1]}
    assert done == sorted(done)
    assert {thread for _, thread in said} == {threading.main_thread()}


WRONG = {
    "tp": ("2", 2.0, True, None, 0, [2]),
    "vocab_size": ("250", 250.5, 0, True),
    "memory": ("much", None, [], 0, -5, "512Q", 1.5),
    "shard_size": ("5 giga", {}, 0),
    "dtype": (16, ["bf16"], torch.int8, object()),
    "to": (None, 3, "onnx"),
    "spelling": (None, 1),
    "drop": (7, [7], {"a": 1}, b"x"),
    "exclude": (3.5, ["*", None]),
    "config": (3, ["a"], b"config.json"),
    "tokenizer": (3, object()),
    "amax": (1.0, {}),
    "kv_scale": ("1", [1.0], True),
    "quantize": (8, ["fp8"]),
    "style": (1,),
    "activations": (True,),
    "parallel_embedding": (False,),
}


@pytest.mark.parametrize("option", WRONG)
def test_a_value_of_a_wrong_type_is_a_usage_error_that_names_the_option(option):
    for value in WRONG[option]:
        with pytest.raises(carnet.BadRequest) as refusal:
            carnet.plan(MEGATRON, **{"to": "hf", option: value})
        assert option in str(refusal.value)


def test_an_option_that_is_misspelled_or_lacking_is_a_usage_error():
    wish = {"to": "hf", "quantise": "fp8"}
    with pytest.raises(carnet.BadOption, match="no option is called 'quantise'; did you mean 'quantize'"):
        carnet.plan(MEGATRON, **wish)
    with pytest.raises(carnet.BadOption, match="needs to know what its target is for"):
        carnet.plan(MEGATRON, **{})  # noqa: PIE804  mypy would say it first
    for verb in (
        carnet.inspect,
        carnet.verify,
        lambda path: carnet.plan(path, to="hf"),
        lambda path: carnet.cross(path, "x", to="hf"),
    ):
        for path in (None, 3, b"bytes", ["a"]):
            with pytest.raises(carnet.BadRequest):
                verb(path)
    for out in (3, b"x", ["a"]):
        with pytest.raises(carnet.BadRequest, match="out cannot be"):
            carnet.cross(MEGATRON, out, to="hf")


# --- stores ---------------------------------------------------------------------------------------------------------------------

URLS = ("hf://meta-llama/Llama-3.1-8B", "https://huggingface.co/gpt2", "foo://x", "S4://B/x")


@pytest.mark.parametrize("url", URLS)
def test_a_url_of_an_unknown_kind_is_a_usage_error_that_names_the_known_ones_and_becomes_no_folder(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = carnet.plan(MEGATRON, to="hf")
    saved.save(plan, tmp_path / "a.plan")
    for words in (
        ("cross", MEGATRON, url, "--to", "hf"),
        ("cross", url, "out", "--to", "hf"),
        ("inspect", url),
        ("inspect", MEGATRON, "--config", url),
        ("verify", url),
        ("verify", MEGATRON, url),
        ("run", "a.plan", url),
        ("run", url, "out"),
        ("plan", url, "--to", "hf"),
        ("plan", MEGATRON, "--to", "hf", "-o", url),
        ("plan", MEGATRON, "--to", "hf", "--tokenizer", url),
        ("plan", MEGATRON, "--to", "hf", "--request", url),
        ("plan", MEGATRON, "--to", "hf", "--quantize", "fp8", "--amax", url),
    ):
        result = call(*words)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "s3://, gs://, az://, msc://" in result.stderr
        assert ("hf download" in result.stderr) == url.startswith("hf:")
    for path in (url, Path(url)):  # a Path has one slash less
        for call_it in (
            lambda path=path: carnet.cross(MEGATRON, path, to="hf"),
            lambda path=path: carnet.run(plan, path),
            lambda path=path: carnet.inspect(path),
            lambda path=path: carnet.verify(MEGATRON, path),
        ):
            with pytest.raises(carnet.BadOption, match="a kind that carnet does not know"):
                call_it()
    assert [path.name for path in tmp_path.iterdir()] == ["a.plan"]


@pytest.mark.parametrize(
    "words",
    [
        ("run", "s3://bucket/a.plan", "out"),
        ("plan", MEGATRON, "--to", "hf", "-o", "s3://bucket/a.plan"),
        ("plan", MEGATRON, "--to", "hf", "--request", "s3://bucket/a.toml"),
        ("verify", MEGATRON, MEGATRON, "--plan", "s3://bucket/a.plan"),
        ("calibrate", "s3://bucket/llama", "--data", __file__, "-o", "x.safetensors"),
    ],
    ids=str,
)
def test_what_has_to_be_of_this_machine_is_not_looked_for_in_a_store(words):
    result = call(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is a URL, and has to be a path of this machine" in result.stderr


@pytest.mark.parametrize(
    ("url", "library"), [("s3://b/x", "obstore"), ("az://b/x", "obstore"), ("msc://b/x", "multistorageclient")]
)
def test_a_store_whose_library_is_not_installed_is_refused_with_how_to_install_it(url, library, tmp_path):
    code = f"import sys; sys.modules[{library!r}] = None; from carnet.cli import main; main()"
    for words in (("inspect", url), ("cross", MEGATRON, url, "--to", "hf")):
        done = carnet_in_a_shell(*words, cwd=tmp_path, code=code)
        assert (done.returncode, done.stdout) == (1, "")
        assert "try: pip install 'carnet[cloud]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_url_of_this_machine_is_its_path(tmp_path):
    out = f"file://{tmp_path}/my%20out"
    assert call("cross", f"file://{MEGATRON}", out, "--to", "hf").exit_code == 0
    assert carnet.verify(f"file:{MEGATRON}", Path(out)).equal
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my out"]
    result = call("inspect", "file://host/models")
    assert (result.exit_code, "three slashes" in result.stderr) == (2, True)


def test_a_folder_whose_name_has_a_colon_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run:7").mkdir()
    assert carnet.cross(MEGATRON, "run:7/out", to="hf")
    assert carnet.cross(MEGATRON, "a:b", to="hf")


# --- exit codes ----------------------------------------------------------------------------------------------------------------


def test_what_is_done_exits_with_0(tmp_path):
    for words in (
        ("inspect", MEGATRON),
        ("inspect", HF, "--tensors"),
        ("plan", MEGATRON, "--to", "trtllm", "--tp", 2, "-o", tmp_path / "plan"),
        ("run", tmp_path / "plan", tmp_path / "ran"),
        ("verify", MEGATRON, tmp_path / "ran"),
        ("verify", tmp_path / "ran"),
        ("cross", MEGATRON, tmp_path / "crossed", "--to", "hf"),
        ("plan", MEGATRON, "--to", "hf", "--quantize", "nvfp4", "--style", "compressed-tensors", "--activations", "dynamic"),
        ("plan", MEGATRON, "--to", "hf", "--quantize", "fp8-channel", "--kv-cache", "fp8", "--kv-scale", "1.0"),
    ):
        assert (call(*words).exit_code, words[0]) == (0, words[0])


def test_what_is_refused_exits_with_1(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "plan").write_text("no plan\n")
    for words in (
        ("inspect", tmp_path / "empty"),
        ("plan", tmp_path / "empty", "--to", "hf"),
        ("run", tmp_path / "plan", tmp_path / "out"),
        ("verify", tmp_path / "empty", HF),
        ("verify", HF, tmp_path / "empty"),
        ("verify", HF),
        ("cross", tmp_path / "empty", tmp_path / "out", "--to", "hf"),
    ):
        assert refused(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "plan"]


def test_what_is_asked_for_wrongly_exits_with_2(tmp_path):
    gone = tmp_path / "gone"
    for words in (
        (),
        ("convert", HF),
        ("inspect",),
        ("inspect", gone),
        ("plan", gone, "--to", "hf"),
        ("plan", HF),
        ("plan", HF, "--to", "onnx"),
        ("plan", HF, "--to", "trtllm", "--tp", "0"),
        ("plan", HF, "--to", "trtllm", "--tp", "two"),
        ("plan", HF, "--to", "hf", "--memory", "much"),
        ("plan", HF, "--to", "hf", "--memory", "infG"),
        ("run", gone, tmp_path / "out"),
        ("verify", gone),
        ("verify", HF, gone),
        ("cross", gone, tmp_path / "out", "--to", "hf"),
        ("cross", HF, "--to", "hf"),
        ("cross", HF, tmp_path / "out", "--to", "hf", "--tokenizer", gone),
        ("cross", HF, tmp_path / "out", "--to", "hf", "--parallel-embedding", "both"),
        ("plan", HF, "--to", "hf", "--quantize", "fp8", "--kv-cache", "int8"),
        ("plan", HF, "--to", "hf", "--quantize", "fp8", "--activations", "none"),
        ("plan", HF, "--to", "hf", "--quantize", "fp8", "--amax", gone),
        ("calibrate", HF, "-o", tmp_path / "amax"),
        ("calibrate", HF, "--data", gone, "-o", tmp_path / "amax"),
        ("calibrate", HF, "--data", HF / "config.json"),
        ("fits", MEGATRON),
        ("fits", MEGATRON, "--spec", "apex"),
        ("fits", MEGATRON, "--spec", "te", "--tp", "0"),
        ("plan", HF, "--to", "hf", "--dtype", "fp99"),
        ("plan", HF, "--to", "hf", "--dtype", "i8"),
        ("plan", HF, "--to", "hf", "--quantize", "fp7"),
        ("plan", HF, "--to", "hf", "--quantize", "fp8", "--style", "awq"),
        ("plan", HF, "--to", "megatron", "--spelling", "transformer_engine"),
        ("plan", HF, "--to", "hf", "--memory", "512Q"),
        ("plan", HF, "--to", "hf", "--memory", "0"),
        ("plan", HF, "--to", "hf", "--shard-size", "-1"),
        ("cross", HF, tmp_path / "out", "--to", "hf", "--device", "cuda"),
    ):
        result = call(*words)
        assert (result.exit_code, result.stdout, words) == (2, "", words)
        assert "Usage: carnet" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_verified_and_different_exits_with_3(tmp_path):
    out = tmp_path / "out"
    assert call("cross", MEGATRON, out, "--to", "hf").exit_code == 0
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    for words in (("verify", MEGATRON, out), ("verify", out), ("verify", MEGATRON, out, "--json")):
        assert (call(*words).exit_code, words) == (3, words)


# --- streams -------------------------------------------------------------------------------------------------------------------


def test_in_a_pipe_stdout_is_json_alone_and_stderr_is_silent(tmp_path):
    """Six processes as a script would call them; nothing draws a progress bar."""
    out, plan = tmp_path / "out", tmp_path / "plan"
    for words in (
        ("inspect", MEGATRON, "--json"),
        ("inspect", MEGATRON, "--tensors", "--json"),
        ("plan", MEGATRON, "--to", "hf", "--json"),
        ("cross", MEGATRON, out, "--to", "hf", "--json"),
        ("verify", MEGATRON, out, "--json"),
        ("verify", out, "--json"),
    ):
        result = carnet_in_a_shell(*words)
        assert (result.returncode, result.stderr) == (0, "")
        assert isinstance(json.loads(result.stdout), dict)
    result = carnet_in_a_shell("plan", MEGATRON, "--to", "hf", "-o", plan, "--json")
    assert result.stderr == f"carnet: plan saved to {plan}\n"
    assert json.loads(result.stdout)["family"] == "llama"
    result = carnet_in_a_shell("run", plan, tmp_path / "ran")
    ran = tmp_path / "ran"
    assert result.stdout == ""
    assert result.stderr == f"carnet: {ran} is written, not examined: `carnet verify CKPT {ran}` proves it\n"


def test_tables_in_a_pipe_have_no_control_codes(tmp_path):
    for words in (
        ("inspect", MEGATRON, "--tensors"),
        ("cross", MEGATRON, tmp_path / "out", "--to", "trtllm"),
        ("verify", tmp_path / "out"),
    ):
        result = carnet_in_a_shell(*words)
        assert (result.returncode, result.stderr) == (0, "")
        assert not set(result.stdout + result.stderr) & {"\x1b", "\r", "\b"}
        assert all(len(line) <= 250 for line in result.stdout.splitlines())


def test_a_reader_that_goes_away_is_no_traceback():
    words = [sys.executable, "-m", "carnet", "inspect", str(MEGATRON), "--tensors", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE_TREE)}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert "Traceback" not in said
    assert "Exception ignored" not in said


def test_a_verdict_in_json_says_every_finding(tmp_path):
    call("cross", MEGATRON, tmp_path / "out", "--to", "hf")
    rewrite(tmp_path / "out", lambda tensors: tensors["lm_head.weight"].zero_())
    reconfigure(tmp_path / "out", rope_theta=10000.0)
    said = json.loads(call("verify", MEGATRON, tmp_path / "out", "--json").stdout)
    assert said["equal"] is False
    assert [(f["what"], f["where"]) for f in said["findings"]] == [("config field differs", "rope_theta"), ("all zero", "head")]
    assert set(said["findings"][0]) == {"what", "where", "stored", "detail"}


@pytest.mark.parametrize(
    "words", [("inspect",), ("plan", "--to", "hf"), ("cross", "out", "--to", "hf")], ids=lambda words: words[0]
)
def test_a_refusal_in_json_is_one_document_on_stdout_and_the_same_words_on_stderr(words, hf, tmp_path):
    rewrite(hf, lambda tensors: tensors.update({"model.strange": torch.ones(3)}))
    verb, *rest = words
    result = call(verb, hf, *[tmp_path / word if word == "out" else word for word in rest], "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    error = said.get("refused", said)
    assert error["error"] == "the checkpoint holds a tensor that carnet does not know"
    assert error["facts"]["tensor"] == "model.strange"
    assert error["try"] == "--drop 'model.strange' if it may be left behind"
    assert result.stderr.startswith(f"carnet: {error['error']}\n")


# --- refusals, line by line ----------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_checkpoint(tmp_path):
    assert refused("inspect", tmp_path) == [
        "carnet: no checkpoint of a known kind is here",
        f"  where       {tmp_path}",
        "  Megatron's  would have latest_checkpointed_iteration.txt, iter_* folders or .metadata",
        "  any other   would have config.json",
        "  try: name the folder in which one of these lies",
    ]


@pytest.mark.parametrize("verb", ["plan", "cross"])
def test_more_ranks_than_the_kv_heads_can_be_cut_into(verb, tmp_path):
    out = [tmp_path / "out"] if verb == "cross" else []
    assert refused(verb, HF, *out, "--to", "trtllm", "--tp", 3) == [
        "carnet: cannot cut axis 'kv' into 3 equal shards",
        "  tensor    layers.0.attention.q",
        "  axis      kv = 2",
        "  heads     rep = 4 for each kv",
        "  world     tp = 3",
        "  try: use a tensor-parallel size that divides 2, or is a multiple of it that divides 8",
    ]


@pytest.mark.parametrize(
    ("option", "word", "meant"),
    [
        ("--to", "megaton", "megatron"),
        ("--to", "transformers", "hf"),
        ("--to", "TensorRT-LLM", "trtllm"),
        ("--to", "mcore", "megatron"),
        ("--dtype", "bff16", "bf16"),
        ("--quantize", "fp8-chanel", "fp8-channel"),
        ("--style", "compressed_tensors", "compressed-tensors"),
        ("--spelling", "locale", "local"),
        ("--parallel-embedding", "row", "rows"),
        ("--activations", "statik", "static"),
    ],
)
def test_a_word_that_is_wrong_is_answered_with_the_one_that_is_near(option, word, meant):
    to = () if option == "--to" else ("--to", "hf")
    result = call("plan", MEGATRON, *to, option, word)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Invalid value for '{option}': '{word}' is not one of " in result.stderr
    assert f"did you mean '{meant}'?" in result.stderr
    with pytest.raises(carnet.BadOption, match=f"{option[2:].replace('-', '_')} cannot be '{word}'; did you mean '{meant}'"):
        carnet.plan(MEGATRON, **{"to": "hf", option[2:].replace("-", "_"): word})


@pytest.mark.parametrize(
    "words", [("inspect",), ("plan", "--to", "megatron"), ("plan", MEGATRON, "--to", "hf", "--tokenizer"), ("verify",)], ids=str
)
def test_a_models_name_on_a_hub_is_answered_with_how_to_bring_it_here(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*words, "meta-llama/Llama-3.1-8B")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is not a folder of this machine" in result.stderr
    assert "hf download meta-llama/Llama-3.1-8B --local-dir FOLDER" in result.stderr
    with pytest.raises(carnet.BadOption, match="is not a folder of this machine"):
        carnet.inspect("meta-llama/Llama-3.1-8B")
    (tmp_path / "meta-llama").mkdir()  # the folder is here, and this model is not in it
    result = call(*words, "meta-llama/Llama-3.1-8B")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


@pytest.mark.parametrize("words", [("inspect",), ("cross", MEGATRON, "out", "--to", "hf", "--tokenizer")])
def test_a_file_in_place_of_its_folder_is_answered_with_the_folder(words, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    result = call(*words, tmp_path / "tokenizer.json")
    assert (result.exit_code, result.stderr.splitlines()[-1].partition("; ")[2]) == (2, f"name its folder: {tmp_path}")


@pytest.mark.parametrize("missing", ["lama", "lama/", "./lama"])
def test_a_folder_that_is_not_there_is_answered_with_the_one_that_is_near(missing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    result = call("inspect", missing)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"'{missing}' does not exist; did you mean 'llama'?" in result.stderr


@pytest.mark.parametrize("dtype", ["f8_e4m3", "i8", "bool", "f64"])
def test_an_element_type_that_weights_cannot_be_cast_to_is_a_wrong_word(dtype, tmp_path):
    assert call("cross", MEGATRON, tmp_path / "out", "--to", "hf", "--dtype", dtype).exit_code == 2


@pytest.mark.parametrize(
    ("words", "stored"),
    [
        ("bf16 bfloat16 BF16 torch.bfloat16", torch.bfloat16),
        ("f16 fp16 float16 half FP16", torch.float16),
        ("f32 fp32 float32 float", torch.float32),
    ],
)
def test_an_element_type_may_be_written_as_other_programs_write_it(words, stored, tmp_path):
    for word in words.split():
        assert carnet.cross(MEGATRON, tmp_path / word, to="hf", dtype=word)
        assert {tensor.dtype for tensor in load_file(tmp_path / word / "model.safetensors").values()} == {stored}
        if "." not in word:
            assert call("plan", MEGATRON, "--to", "hf", "--dtype", word).exit_code == 0
    assert carnet.plan(MEGATRON, to="hf", dtype=stored).request["dtype"] == {2: words.split()[0], 4: "f32"}[stored.itemsize]


def test_a_pattern_of_names_to_drop_that_matches_nothing():
    assert refused("plan", MEGATRON, "--to", "hf", "--drop", "nothing.*") == [
        "carnet: nothing in the checkpoint is called 'nothing.*'",
        "  option    --drop",
        "  try: look at `carnet inspect --tensors`",
    ]


def test_a_budget_of_memory_that_is_too_small():
    lines = refused("plan", MEGATRON, "--to", "hf", "--memory", "1M")
    assert lines[0] == "carnet: the memory budget is too small for this crossing"
    assert lines[1].startswith("  expected  at least ")
    assert lines[2:] == ["  found     1,000,000 bytes", "  try: give more --memory"]
    least = int(lines[1].removeprefix("  expected  at least ").removesuffix(" bytes").replace(",", ""))
    assert call("plan", MEGATRON, "--to", "hf", "--memory", least).exit_code == 0
    assert refused("plan", MEGATRON, "--to", "hf", "--memory", least - 1)


def test_more_stages_than_layers():
    assert refused("plan", HF, "--to", "trtllm", "--pp", 5)[0] == "carnet: cannot share 4 layers among 5 pipeline stages"


def test_a_target_that_is_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    lines = refused("cross", MEGATRON, tmp_path / "out", "--to", "hf")
    assert lines[0] == f"carnet: {tmp_path / 'out'} exists"
    assert (
        lines[-1]
        == "  try: choose a folder that is empty or not there, or see whether it is the target already: carnet verify OUT"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("mine")
    assert refused("cross", MEGATRON, tmp_path / "file", "--to", "hf")[0] == f"carnet: {tmp_path / 'file'} exists"


def test_an_unknown_tensor_is_named_with_the_way_to_leave_it_behind(hf, tmp_path):
    rewrite(hf, lambda tensors: tensors.update({"model.strange": torch.ones(3), "model.stranger": torch.ones(3)}))
    assert refused("cross", hf, tmp_path / "out", "--to", "trtllm") == [
        "carnet: the checkpoint holds a tensor that carnet does not know",
        f"  where     {hf}",
        "  tensor    model.strange",
        "  and       model.stranger",
        "  in all    2",
        "  try: --drop 'model.strange*' if it may be left behind",
    ]
    assert call("cross", hf, tmp_path / "out", "--to", "trtllm", "--drop", "model.strange*").exit_code == 0
    document = json.loads((tmp_path / "out/carnet.json").read_text())
    assert document["dropped"] == {"--drop model.strange*": ["model.strange", "model.stranger"]}
    assert not any("strange" in name for name in load_file(tmp_path / "out/rank0.safetensors"))
    assert call("verify", hf, tmp_path / "out", "--drop", "model.strange*").exit_code == 0
    assert "  its carnet  --drop 'model.strange*'" in refused("verify", hf, tmp_path / "out")
    (tmp_path / "out/carnet.json").unlink()
    assert "model.strange" in "\n".join(refused("verify", hf, tmp_path / "out"))
    assert call("verify", hf, tmp_path / "out", "--drop", "model.strange*").exit_code == 0


def test_a_weight_that_the_model_needs_cannot_be_dropped(hf, tmp_path):
    lines = refused("cross", hf, tmp_path / "out", "--to", "trtllm", "--drop", "model.layers.2.mlp.up_proj.weight")
    assert lines[0] == "carnet: the checkpoint lacks 'layers.2.mlp.up'"


@pytest.mark.parametrize("verb", ["plan", "cross"])
def test_an_unknown_config_field_is_named(verb, hf, tmp_path):
    reconfigure(hf, clever_new_scaling=0.5)
    lines = refused(verb, hf, *([tmp_path / "out"] if verb == "cross" else []), "--to", "trtllm")
    assert lines[:3] == [
        "carnet: the config sets 'clever_new_scaling', which carnet does not know",
        f"  where     {hf}",
        "  found     0.5",
    ]


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("hidden_act", "relu", "hidden_act"),
        ("hidden_size", "wide", "hidden_size"),
        ("num_hidden_layers", 4.0, "num_hidden_layers"),
        ("num_hidden_layers", True, "num_hidden_layers"),
        ("num_attention_heads", 0, ""),
        ("num_key_value_heads", 0, ""),
        ("num_key_value_heads", 3, ""),
        ("num_key_value_heads", -2, ""),
        ("num_hidden_layers", -1, ""),
        ("num_hidden_layers", 0, ""),
        ("num_hidden_layers", 10**9, ""),
        ("vocab_size", 0, ""),
        ("vocab_size", None, "vocab_size"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "yarn"),
        ("rope_scaling", "double", "rope_scaling"),
        ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
        ("architectures", ["RwkvForCausalLM"], "RwkvForCausalLM"),
        ("architectures", "LlamaForCausalLM", ""),
        ("torch_dtype", "float8", "float8"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_name_and_never_a_traceback(field, value, word, hf):
    reconfigure(hf, **{field: value})
    if field == "torch_dtype":
        reconfigure(hf, dtype=None)
    assert word in "\n".join(refused("plan", hf, "--to", "trtllm"))


def test_a_missing_tensor_is_named(hf):
    rewrite(hf, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    lines = refused("plan", hf, "--to", "trtllm")
    assert lines[0] == "carnet: the checkpoint lacks 'layers.2.mlp.up'"
    assert any("layers.{layer}.mlp.up_proj.weight" in line for line in lines[1:])


def test_a_shape_that_contradicts_the_config_is_named(hf):
    rewrite(hf, lambda tensors: tensors.update({"model.norm.weight": torch.ones(63, dtype=torch.bfloat16)}))
    lines = refused("plan", hf, "--to", "trtllm")
    assert lines[0] == "carnet: the shape of 'model.norm.weight' contradicts the config"
    assert any(line.startswith("  expected  [64]") for line in lines)
    assert "  found     [63]" in lines


def test_a_source_that_was_cut_off_is_named(hf):
    raw = (hf / "model.safetensors").read_bytes()
    (hf / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    assert "model.safetensors" in "\n".join(refused("plan", hf, "--to", "trtllm"))


def test_a_checkpoint_that_carnet_does_not_understand_is_shown_and_then_refused(hf):
    rewrite(hf, lambda tensors: tensors.update({"model.strange": torch.ones(3)}))
    result = call("inspect", hf, "--tensors")
    assert result.exit_code == 1
    assert "model.strange" in result.stdout
    assert "model.strange" in result.stderr


# --- plans ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path, hf):
    assert call("plan", hf, "--to", "trtllm", "--tp", 2, "-o", tmp_path / "plan").exit_code == 0
    return tmp_path / "plan"


def sealed(lines):
    """Return the text of a plan whose last line vouches for the others."""
    body = "".join(f"{line}\n" for line in lines)
    return body + json.dumps({"digest": xxhash.xxh3_128_hexdigest(body.encode())}, separators=(",", ":")) + "\n"


def test_the_seal_of_a_plan_is_what_these_tests_think_it_is(plan):
    assert sealed(plan.read_text().splitlines()[:-1]) == plan.read_text()


DAMAGES = {
    "cut off within a line": lambda text: text[: len(text) // 2],
    "cut off before the last line": lambda text: "".join(text.splitlines(keepends=True)[:-1]),
    "empty": lambda text: "",
    "the steps of a file twice": lambda text: re.sub(r'(\n{"steps".*)', r"\1\1", text, count=1),
    "one number changed": lambda text: text.replace('model.safetensors",', 'model.safetensors",1', 1),
    "another program's json": lambda text: '{"hello": 1}\n{"digest": "0"}\n',
    "no json": lambda text: "hello\n",
    "a digest alone": lambda text: sealed([]),
    "binary": lambda text: "\x00\x01",
}


@pytest.mark.parametrize("which", DAMAGES)
def test_a_plan_that_was_cut_off_or_edited(which, plan, tmp_path):
    text = plan.read_text()
    damaged = DAMAGES[which](text)
    assert damaged != text
    plan.write_text(damaged)
    lines = refused("run", plan, tmp_path / "out")
    assert lines[0] == "carnet: this is not a plan that carnet can run"
    assert lines[-1] == "  try: make it again with `carnet plan`"
    assert not (tmp_path / "out").exists()


CLIMBS = {
    "a file of weights": lambda line: line.replace('{"file":"rank0', '{"file":"../rank0'),
    "an absolute file": lambda line: line.replace('{"file":"rank0', '{"file":"/tmp/rank0'),
    "a config": lambda line: line.replace('{"text":"config.json"', '{"text":"a/../../config.json"'),
    "a step's source": lambda line: re.sub(r'(?<=[\[,])"model(?=\.safetensors"[],])', '"../model', line),
    "a step's target": lambda line: re.sub(r'(?<=[\[,])"rank1(?=\.safetensors"[],])', '"../rank1', line),
    "nothing at all": lambda line: line.replace('{"file":"rank0.safetensors"', '{"file":""'),
}


@pytest.mark.parametrize("which", CLIMBS)
def test_a_plan_whose_file_names_climb_out_of_their_folder(which, plan, tmp_path):
    """With a digest that is right: whoever edits a plan can seal it again."""
    lines = plan.read_text().splitlines()[:-1]
    damaged = [CLIMBS[which](line) for line in lines]
    assert damaged != lines
    plan.write_text(sealed(damaged))
    before = sorted(path.name for path in tmp_path.iterdir())
    lines = refused("run", plan, tmp_path / "out")
    assert lines[0] == "carnet: this is not a plan that carnet can run"
    assert "leaves the folder" in lines[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


HEADS: dict[str, dict[str, object]] = {
    "no memory": {"memory": 0},
    "memory that is a word": {"memory": "much"},
    "no window": {"window": 0},
    "a window below zero": {"window": -1},
    "a window that is a word": {"window": "big"},
    "a window larger than the machine": {"window": 1 << 60},
    "a source that is a number": {"source": 7},
    "a source that is gone": {"source": "/nowhere/at/all"},
    "a request that is a list": {"request": [1, 2]},
    "a dropped that is a number": {"dropped": 7},
    "another version": {"carnet-plan": 99},
}


@pytest.mark.parametrize("which", HEADS)
def test_a_plan_whose_first_line_was_edited_and_sealed_again_is_refused_without_a_traceback(which, plan, tmp_path):
    first, *lines = plan.read_text().splitlines()[:-1]
    plan.write_text(sealed([json.dumps({**json.loads(first), **HEADS[which]}), *lines]))
    result = call("run", plan, tmp_path / "out")
    assert result.exit_code in {0, 1}
    assert (result.exit_code == 0) == (tmp_path / "out").exists()
    if which == "another version":
        assert "another carnet made it" in result.stderr


STEPS: dict[str, Callable[[Any, Any], object]] = {  # a row, and its form: ["move", shape, source, target, what is added]
    "an offset beyond the source": lambda row, _: row.update(source_at=1 << 40),
    "an offset below zero": lambda row, _: row.update(source_at=-8),
    "an offset beyond the target": lambda row, _: row.update(target_at=1 << 40),
    "a target offset below zero": lambda row, _: row.update(target_at=-8),
    "a stride that leaves the source": lambda _, form: form[2].__setitem__(0, [1 << 40] * len(form[2][0])),
    "a stride too few": lambda _, form: form[2].__setitem__(0, form[2][0][1:]),
    "a shape of words": lambda _, form: form.__setitem__(1, ["a"] * len(form[1])),
    "a shape below zero": lambda _, form: form.__setitem__(1, [-1] * len(form[1])),
    "a shape too large": lambda _, form: form.__setitem__(1, [1 << 40] * len(form[1])),
    "another file": lambda row, _: row.update(source="nothing.safetensors"),
    "a target file that the plan lacks": lambda row, _: row.update(target="rank9.safetensors"),
    "the target's element type": lambda _, form: form[3].__setitem__(1, "f32"),
    "no element type": lambda _, form: form[3].__setitem__(1, "f7"),
    "another kind": lambda _, form: form.__setitem__(0, "fill"),
    "a field too few": lambda _, form: form.pop(),
}


def edited(line: str, tensor: str, change: Callable[[Any, Any], object]) -> str:
    """Change the first step of a tensor, of which a block says a number in each column or one for all."""
    block = json.loads(line)
    columns = [name for name, said in block.items() if name not in ("steps", "number", "forms", "names", "starts", "mores")]
    for name in columns:
        block[name] = block[name] if isinstance(block[name], list) else [block[name]] * block["number"]
    at = block["tensor"].index(block["names"].index(tensor))
    row = {name: block[name][at] for name in columns}
    form = json.loads(json.dumps(block["forms"][row["form"]]))
    change(row, form)
    block["forms"].append(form)
    row["form"] = len(block["forms"]) - 1
    for name in ("source", "target"):
        if isinstance(row[name], str):
            block["names"].append(row[name])
            row[name] = len(block["names"]) - 1
    for name in columns:
        block[name][at] = row[name]
    return json.dumps(block, separators=(",", ":"))


def test_a_step_that_was_edited_to_what_it_was_is_the_step(plan, hf, tmp_path):
    lines = plan.read_text().splitlines()[:-1]
    at = next(i for i, line in enumerate(lines) if line.startswith('{"steps"') and '"layers.1.mlp.up"' in line)
    lines[at] = edited(lines[at], "layers.1.mlp.up", lambda row, form: None)
    plan.write_text(sealed(lines))
    assert call("run", plan, tmp_path / "out").exit_code == 0
    assert call("verify", hf, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("which", STEPS)
def test_a_plan_whose_step_was_edited_and_sealed_again_never_becomes_a_proven_target(which, plan, hf, tmp_path):
    """`run` may refuse it or write it; what it writes is not the source, and no traceback is shown either way."""
    lines = plan.read_text().splitlines()[:-1]
    at = next(i for i, line in enumerate(lines) if line.startswith('{"steps"') and '"layers.1.mlp.up"' in line)
    lines[at] = edited(lines[at], "layers.1.mlp.up", STEPS[which])
    plan.write_text(sealed(lines))
    if call("run", plan, tmp_path / "out").exit_code == 0:
        assert call("verify", hf, tmp_path / "out").exit_code == 3
    else:
        assert not (tmp_path / "out").exists()


def test_a_plan_whose_source_has_changed(plan, hf, tmp_path):
    reconfigure(hf, use_cache=False)
    assert refused("run", plan, tmp_path / "out") == [
        "carnet: the source is not the one that was planned",
        f"  where     {hf}",
        "  try: plan again",
    ]


def test_a_plan_that_cannot_be_saved(hf, tmp_path):
    result = call("plan", hf, "--to", "hf", "-o", tmp_path / "nowhere/plan")
    assert result.exit_code in {1, 2}
    assert "nowhere" in result.stderr


# --- the tokenizer -------------------------------------------------------------------------------------------------------------


def test_the_files_of_a_tokenizer_go_along_as_they_are_and_others_do_not(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    files = {"tokenizer.json": b'{"model": "\xc3\xa9"}', "tokenizer_config.json": b"{}\r\n", "chat_template.jinja": b"{{ x }}"}
    for name, content in {**files, "README.md": b"no", "model.safetensors": b"no", "config.json": b"no"}.items():
        (folder / name).write_bytes(content)
    assert call("cross", MEGATRON, tmp_path / "out", "--to", "hf", "--tokenizer", folder).exit_code == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted([*files, "carnet.json", "config.json", "model.safetensors"])
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    assert set(json.loads((tmp_path / "out/carnet.json").read_text())["target"]["files"]) == {*files, "config.json"}


def test_a_tokenizer_that_changed_after_planning_is_refused(hf, tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    assert call("plan", hf, "--to", "trtllm", "--tokenizer", tmp_path / "tokenizer", "-o", tmp_path / "plan").exit_code == 0
    (tmp_path / "tokenizer/tokenizer.json").write_text("[]")
    assert refused("run", tmp_path / "plan", tmp_path / "out")[0] == "carnet: a file changed after planning"
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    lines = refused("cross", MEGATRON, tmp_path / "out", "--to", "hf", "--tokenizer", tmp_path / "empty")
    assert lines[:2] == ["carnet: the folder holds no tokenizer", f"  where       {tmp_path / 'empty'}"]
    assert lines[-1] == "  try: name the folder that the model's tokenizer lies in"


@pytest.mark.parametrize(
    ("word", "nbytes"),
    [
        ("64K", 64000),
        ("64k", 64000),
        ("64kB", 64000),
        ("64 KB", 64000),
        ("64KiB", 65536),
        ("64ki", 65536),
        ("65536", 65536),
        ("0.5M", 500000),
        ("1.5MiB", 1572864),
        ("2G", 2 * 10**9),
    ],
)
def test_a_size_is_read_as_people_write_it(word, nbytes, tmp_path):
    assert call("plan", MEGATRON, "--to", "hf", "--shard-size", word, "-o", tmp_path / word).exit_code == 0
    assert json.loads((tmp_path / word).read_text().splitlines()[0])["request"]["shard_size"] == nbytes


# --- quantizing ----------------------------------------------------------------------------------------------------------------


def test_help_names_every_scheme_of_every_style():
    for verb in ("plan", "cross"):
        listed = call(verb, "--help").stdout.split("Schemes of --quantize, by --style:\n")[1].split("Examples:")[0]
        words = listed.replace(",", "").split()
        starts = [words.index(style) for style in ("modelopt", "compressed-tensors", "deepseek", "trtllm")]
        assert starts == sorted(starts)
        assert words[1 : starts[1]] == ["fp8", "fp8-channel", "fp8-block", "nvfp4", "mxfp8", "mxfp4"]
        assert {"int8-channel", "int4-group"} <= set(words[starts[1] : starts[2]])
        assert words[starts[2] + 1 :] == ["fp8-block", "trtllm", "fp8"]


def test_a_plan_says_what_becomes_codes_and_what_stays():
    words = ("plan", MEGATRON, "--to", "hf", "--quantize", "fp8-channel", "--exclude", "*.0.mlp.down_proj")
    said = call(*words).stdout
    (line,) = [line for line in said.splitlines() if line.startswith("quantized ")]
    # 4 layers of q and o 64 x 64, k and v 32 x 64, gate and up 96 x 64, down 64 x 96, less one down; a scale of 4 bytes a row
    elements = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64) - 64 * 96
    rows = 4 * (64 + 32 + 32 + 64 + 96 + 96 + 64) - 64
    data = json.loads(call(*words, "--json").stdout)["quantized"]
    assert data["recipe"] == "modelopt/fp8-channel"
    assert (data["weights"], data["bytes before"], data["bytes after"]) == (27, 2 * elements, elements + 4 * rows)
    assert data["kept"] == ["attention_norm", "embed", "final_norm", "head", "mlp.down", "mlp_norm"]
    assert data["bytes kept"] == 2 * (64 * 96 + 2 * 251 * 64 + 9 * 64)
    assert "27 weights as modelopt/fp8-channel: 233 kB become 124 kB" in line
    assert "as they are" in said
    assert json.loads(call("plan", MEGATRON, "--to", "hf", "--json").stdout)["quantized"] is None
    assert "quantized" not in call("plan", MEGATRON, "--to", "hf").stdout


FP8 = ("plan", MEGATRON, "--to", "hf", "--quantize", "fp8")
CHANNEL = ("plan", MEGATRON, "--to", "hf", "--quantize", "fp8-channel")
REFUSED = {
    "no calibration": (
        FP8,
        "nothing says how large the activations of 'model.layers.0.self_attn.q_proj.weight' are",
        "name a file with --amax (carnet calibrate makes one)",
    ),
    "no calibration, where it may be left out": (
        (*FP8, "--style", "compressed-tensors"),
        "nothing says how large the activations of 'model.layers.0.self_attn.q_proj.weight' are",
        "name a file with --amax (carnet calibrate makes one), or use --activations dynamic",
    ),
    "a cache without a scale": (
        (*CHANNEL, "--kv-cache", "fp8"),
        "nothing says how large the cached keys of 'model.layers.0.self_attn.k_proj.weight' are",
        "name a file with --amax (carnet calibrate makes one), or a number with --kv-scale",
    ),
    "dynamic where a scale is needed": (
        (*FP8, "--activations", "dynamic"),
        "the scheme needs a scale of activations",
        "use --activations static, with --amax FILE",
    ),
    "static where there is no place": (
        (*CHANNEL, "--activations", "static"),
        "the scheme has no place for a scale of activations",
        "leave out --activations",
    ),
    "a scheme of another style": (
        ("plan", MEGATRON, "--to", "hf", "--quantize", "int4-group"),
        "there is no scheme 'int4-group' in the style 'modelopt'",
        "--style compressed-tensors",
    ),
    "a style of another target": (
        ("plan", MEGATRON, "--to", "trtllm", "--quantize", "fp8", "--style", "modelopt"),
        "a target of the kind 'trtllm' has no style 'modelopt'",
        None,
    ),
    "a target without codes": (
        ("plan", MEGATRON, "--to", "megatron", "--quantize", "fp8"),
        "a target of the kind 'megatron' holds no codes",
        "leave out --quantize",
    ),
    "a cache that the style cannot have": (
        ("plan", MEGATRON, "--to", "hf", "--quantize", "fp8-block", "--style", "deepseek", "--kv-cache", "fp8"),
        "the style 'deepseek' has no place for the scales of a cache",
        None,
    ),
    "a scale without a cache": ((*CHANNEL, "--kv-scale", "1"), "nothing needs the scale of a cache", "add --kv-cache fp8"),
    "an exclusion of nothing": ((*CHANNEL, "--exclude", "*.downproj"), "no module of the target is called '*.downproj'", None),
    "an exclusion of everything": ((*CHANNEL, "--exclude", "*_proj"), "nothing is left to quantize", None),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_quantized_is_refused_with_a_way_out(which):
    words, what, remedy = REFUSED[which]
    lines = refused(*words)
    assert lines[0] == f"carnet: {what}"
    assert [line for line in lines if line.startswith("  try: ")] == ([f"  try: {remedy}"] if remedy else [])


def test_a_file_of_calibration_that_says_something_else_is_refused(tmp_path):
    amax, key = tmp_path / "amax.safetensors", "model.layers.0.self_attn.q_proj.input_amax"
    for tensor in (torch.tensor(0.0), torch.tensor(-1.0), torch.tensor(torch.nan), torch.tensor(torch.inf)):
        save_file({key: tensor}, amax)
        assert refused(*FP8, "--amax", amax)[0] == "carnet: the file of calibration holds no magnitude"
    for tensor in (torch.tensor(1.0).bfloat16(), torch.ones(2), torch.tensor(1)):
        save_file({key: tensor}, amax)
        assert refused(*FP8, "--amax", amax)[0] == "carnet: the file of calibration holds something else"
    save_file({key: torch.tensor(1.0), "model.layers.4.self_attn.q_proj.input_amax": torch.tensor(1.0)}, amax)
    assert refused(*FP8, "--amax", amax) == [
        "carnet: the calibration names a module that the model does not have",
        "  name      model.layers.4.self_attn.q_proj.input_amax",
        "  others    0",
    ]
    amax.write_bytes(b"no tensors")
    assert refused(*FP8, "--amax", amax)


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf"])
def test_the_scale_of_a_cache_is_a_positive_number(scale):
    result = call(*CHANNEL, "--kv-cache", "fp8", "--kv-scale", scale)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"kv_scale cannot be {float(scale)!r}" in result.stderr
    assert "a positive number" in result.stderr


@pytest.mark.parametrize(
    "option",
    [
        ("--style", "modelopt"),
        ("--kv-cache", "fp8"),
        ("--kv-scale", "1"),
        ("--activations", "dynamic"),
        ("--exclude", "*"),
    ],
    ids=lambda option: option[0],
)
def test_an_option_of_quantizing_means_nothing_alone(option):
    assert refused("plan", MEGATRON, "--to", "hf", *option) == [
        "carnet: nothing is quantized",
        f"  option    {option[0]}",
        "  try: add --quantize SCHEME",
    ]


def test_the_scale_that_a_person_names_is_that_of_every_cache(tmp_path):
    assert call(*CHANNEL, "--kv-cache", "fp8", "--kv-scale", "1.0", "-o", tmp_path / "plan").exit_code == 0
    assert call("run", tmp_path / "plan", tmp_path / "out").exit_code == 0
    tensors = load_file(tmp_path / "out/model.safetensors")
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith(("k_scale", "v_scale"))}
    assert scales.keys() == {f"model.layers.{layer}.self_attn.{p}_proj.{p}_scale" for layer in range(4) for p in "kv"}
    assert all(torch.equal(scale, torch.tensor(1.0)) for scale in scales.values())


# --- calibration: what it does is held against ModelOpt's own export in referees/test_quantized.py -----------------------------


def test_calibration_refuses_to_invent_activations(tmp_path):
    data, amax = tmp_path / "texts.jsonl", tmp_path / "amax.safetensors"
    data.write_text("\n\n")
    assert refused("calibrate", HF, "--data", data, "-o", amax) == [
        "carnet: there is no text to calibrate with",
        f"  where     {data}",
        '  try: write {"text": "..."}, one a line',
    ]
    for line in ("[]", "{}", '{"text": 3}', '"text"', "{", "[" * 100_000):
        data.write_text(f'{{"text": "good"}}\n{line}\n')
        assert refused("calibrate", HF, "--data", data, "-o", amax) == [
            "carnet: a line of the texts is something else",
            f"  where     {data}:2",
            '  expected  {"text": "..."}',
        ]
    data.write_bytes(b'{"text": "\xff"}\n')
    assert refused("calibrate", HF, "--data", data, "-o", amax)[0] == "carnet: the texts are no UTF-8"
    assert not amax.exists()


def test_calibration_takes_a_hugging_face_folder_with_its_tokenizer_alone(tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "good"}\n')
    words = ("--data", data, "-o", tmp_path / "amax.safetensors")
    assert refused("calibrate", MEGATRON, *words)[0] == "carnet: only a Hugging Face folder can be calibrated"
    assert refused("calibrate", tmp_path, *words)[0] == "carnet: no checkpoint of a known kind is here"
    assert refused("calibrate", HF, *words) == [
        "carnet: the folder holds no tokenizer",
        f"  where       {HF}",
        "  looked for  tokenizer.json, tokenizer_config.json, tokenizer.model, vocab.json",
        "  try: put the model's own into it",
    ]
    lines = refused("calibrate", HF, "--data", data, "-o", tmp_path / "gone/amax.safetensors")
    assert lines[0] == "carnet: the folder of the output does not exist"
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_calibration_without_its_extra_says_how_to_get_it(tmp_path, hf):
    """A process that has carnet's own needs and nothing else."""
    (hf / "tokenizer.json").write_text("{}")
    site = Path(torch.__file__).parents[1]
    for name in "click _yaml yaml ml_dtypes numpy numpy.libs rich pygments markdown_it mdurl xxhash".split():
        if (site / name).exists():
            (tmp_path / "site" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "site" / name).symlink_to(site / name)
    (tmp_path / "texts.jsonl").write_text('{"text": "good"}\n')
    environment = {**os.environ, "PYTHONPATH": f"{SOURCE_TREE}:{tmp_path / 'site'}"}
    words = ["calibrate", str(hf), "--data", str(tmp_path / "texts.jsonl"), "-o", str(tmp_path / "amax")]
    result = subprocess.run(
        [sys.executable, "-S", "-m", "carnet", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "carnet: the programs that run a model are not installed",
        "  missing   torch, transformers, safetensors, modelopt",
        "  try: pip install 'carnet[modelopt]'",
    ]

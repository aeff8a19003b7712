"""Pickles that run code in a trusting reader: refused by name, and nothing runs."""

import argparse
import io
import pickle
import struct
import subprocess

import pytest
import torch

from carnet.errors import BadCheckpoint
from carnet.formats.detect import open_checkpoint


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def refusal(checkpoint) -> str:
    with pytest.raises(BadCheckpoint) as error:
        open_checkpoint(checkpoint.root)
    return str(error.value)


def test_the_attack_works_on_a_reader_that_trusts(evil, tmp_path):
    trap = type(evil)(tmp_path / "trusting")
    pickle.loads(pickle.dumps(trap))
    assert (tmp_path / "trusting").exists()


def test_a_command_in_the_metadata_is_refused_by_name(megatron, evil):
    megatron.edit(lambda metadata: setattr(metadata, "planner_data", evil))
    text = refusal(megatron)
    assert text.splitlines()[0] == ".metadata names code that carnet does not run"
    assert "  found     posix.system" in text


def test_a_command_in_place_of_the_metadata_is_refused_by_name(megatron, evil):
    (megatron.root / ".metadata").write_bytes(pickle.dumps(evil))
    assert "  found     posix.system" in refusal(megatron)


def test_a_command_among_the_training_arguments_is_refused_by_name(megatron, evil):
    torch.save({"args": argparse.Namespace(num_layers=evil)}, megatron.root / "common.pt")
    text = refusal(megatron)
    assert text.splitlines()[0] == "common.pt names code that carnet does not run"
    assert "  found     posix.system" in text


def test_a_command_in_the_common_state_item_is_refused_by_name(megatron, evil):
    def describe(metadata):
        metadata.state_dict_metadata["common_state/shard_0_1"] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
        index = torch.distributed.checkpoint.metadata.MetadataIndex("common_state/shard_0_1")
        metadata.storage_data[index] = metadata.storage_data[megatron.index("decoder.bias")]

    megatron.edit(describe)
    megatron.replace_item("common_state/shard_0_1", saved([{"args": evil}]))
    (megatron.root / "common.pt").unlink()
    assert "__0_0.distcp at byte" in refusal(megatron)
    assert "  found     posix.system" in refusal(megatron)


def test_a_command_in_a_tensor_item_is_refused_by_name(megatron, evil):
    megatron.replace_item("decoder.weight", saved(evil))
    text = refusal(megatron)
    assert text.splitlines()[0].startswith("__0_0.distcp at byte")
    assert text.splitlines()[0].endswith("names code that carnet does not run")
    assert "  found     posix.system" in text


def test_even_a_harmless_class_is_refused_in_a_tensor_item(megatron):
    megatron.replace_item("decoder.weight", saved(argparse.Namespace()))
    assert "  found     argparse.Namespace" in refusal(megatron)


def test_an_optimizer_item_that_runs_code_is_not_even_opened(megatron, evil):
    megatron.replace_item("optimizer.state.exp_avg.decoder.bias", saved(evil))
    assert open_checkpoint(megatron.root).tensors["", "optimizer.state.exp_avg.decoder.bias"].chunks == ()


def _named(module: str, name: str, argument: str) -> bytes:
    """A pickle of protocol 4 that calls a global with one text."""
    parts = (b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name, argument))
    first, second, third = parts
    return b"\x80\x04" + first + second + b"\x93" + third + b"\x85R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("__builtin__", "eval"),  # as python 2 spelled it
        ("os", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("importlib", "import_module"),
        ("runpy", "_run_code"),
        ("torch.hub", "load"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("types", "FunctionType"),
        ("pickle", "loads"),
        ("numpy.testing._private.utils", "runstring"),
        ("argparse", "Namespace.__init__"),  # protocol 4 walks the dots
        ("argparse", "_sys.modules"),
        ("io", "open"),
    ],
)
def test_machinery_is_refused_among_the_training_arguments_too(megatron, marker, module, name):
    _with_pickle(megatron.root / "common.pt", _named(module, name, f"open({str(marker)!r}, 'w')"))
    shown = module.replace("__builtin__", "builtins")
    assert f"  found     {shown}.{name}" in refusal(megatron)


def _with_pickle(path, program: bytes) -> None:
    """Replace data.pkl in a torch.save zip by one of the same kind, through torch's own writer."""
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", program, len(program))
    writer.write_record("byteorder", b"little", 6)
    writer.write_end_of_file()


def test_a_class_of_an_unknown_program_is_inert(megatron, marker):
    program = _named("some.training.program", "Launch", f"touch {marker}")
    # {"args": Namespace with "it": Launch("touch ...")}
    call = program[2:-1]
    namespace = b"\x8c\x08argparse\x8c\x09Namespace\x93)\x81}\x8c\x02it" + call + b"sb"
    _with_pickle(megatron.root / "common.pt", b"\x80\x04}\x8c\x04args" + namespace + b"s.")
    found = open_checkpoint(megatron.root).config["it"]
    assert str(found).startswith("Launch(")


def test_attributes_set_on_a_class_by_the_pickle_do_not_stay(megatron):
    # BUILD with a slot state sets attributes: on a class of ours that would outlive the pickle
    namespace = b"\x8c\x08argparse\x8c\x09Namespace\x93"
    program = b"\x80\x04" + namespace + b"N}\x8c\x04evil\x8c\x04codes\x86b."
    _with_pickle(megatron.root / "common.pt", program)
    assert refusal(megatron).splitlines()[0] == "common.pt is not a valid pickle"
    from carnet.formats.torch_pickles import Namespace

    assert not hasattr(Namespace, "evil")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (b"", "the pickle ends early"),
        (b"\x80\x04", "the pickle ends early"),
        (b"\x80\x04N..", "1 bytes follow the pickle's end"),
        (b"\x80\x04Nr\xff\xff\xff\xff.", "instruction 0x72 at byte 3"),  # the memo would take 64 GiB
        (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.", "does not fit"),
        (b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b"x.", "does not fit"),
        (b"\x80\x04\x8b" + struct.pack("<I", 8) + b"12345678.", "instruction 0x8b"),
        (b"\x80\x02\x82\x01.", "instruction 0x82"),  # the extension registry
        (b"(S'x'\n.", "instruction 0x53"),
        (b"(iposix\nsystem\n.", "instruction 0x69"),
        (b"\x80\x04\x93.", ""),
        (b"\x80\x04R.", ""),
        (b"\x80\x04)).", ""),
        (b"\x80\x04h\x09.", ""),
        (b"\x80\x09N.", "unsupported pickle protocol"),
        (b"\x80\x04}]Ns.", "unhashable"),
        (b"\x80\x04\x8c\x02\xff\xfe.", "codec can't decode"),
        (b"\x80\x04N.", "a Metadata is missing"),
        (b"\x80\x04}" + b"(" * 100_000 + b"N.", "a Metadata is missing"),
    ],
)
def test_a_broken_program_is_an_error_about_the_metadata(megatron, program, reason):
    (megatron.root / ".metadata").write_bytes(program)
    text = refusal(megatron)
    assert text.startswith(".metadata ")
    assert reason in text


@pytest.mark.parametrize("levels", [10_000, 60_000, 1_000_000])
def test_nesting_that_overflows_the_stack_of_c_is_only_an_error(megatron, levels):
    # a dictionary whose key is a tuple in a tuple in a tuple: CPython hashes it by recursion without a guard
    (megatron.root / ".metadata").write_bytes(b"\x80\x04})" + b"\x85" * levels + b"Ns.")
    assert refusal(megatron).startswith(".metadata ")


def test_nested_arguments_are_only_an_error(megatron):
    inner = b"]" * 5000 + b"a" * 4999
    namespace = b"\x8c\x08argparse\x8c\x09Namespace\x93)\x81}\x8c\x02it" + inner + b"sb"
    _with_pickle(megatron.root / "common.pt", b"\x80\x04}\x8c\x04args" + namespace + b"s.")
    assert refusal(megatron).splitlines()[0] == "the training arguments are too large or nested too deeply"


def test_arguments_that_share_themselves_a_billion_times_are_only_an_error(megatron):
    namespace = b"\x8c\x08argparse\x94\x8c\x09Namespace\x94\x93)\x81}\x8c\x02it]\x94"
    body = b"".join(b"0]\x94(h" + bytes([level]) + b"h" + bytes([level]) + b"e" for level in range(2, 40))
    _with_pickle(megatron.root / "common.pt", b"\x80\x04}\x8c\x04args" + namespace + body + b"sbs.")
    assert refusal(megatron).splitlines()[0] == "the training arguments are too large or nested too deeply"


def test_arguments_that_contain_themselves_are_only_an_error(megatron):
    namespace = b"\x8c\x08argparse\x94\x8c\x09Namespace\x94\x93)\x81}\x8c\x02it]\x94h\x02asb"
    _with_pickle(megatron.root / "common.pt", b"\x80\x04}\x8c\x04args" + namespace + b"s.")
    assert refusal(megatron).splitlines()[0] == "the training arguments are too large or nested too deeply"


def test_a_terminal_sequence_in_a_name_is_shown_escaped(megatron):
    (megatron.root / ".metadata").write_bytes(_named("ev\x1b[31mil", "f", "x"))
    text = refusal(megatron)
    assert "\x1b" not in text
    assert "ev\\x1b[31mil.f" in text


def test_no_process_is_started_while_reading(megatron, evil, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **_: started.append(args))
    megatron.edit(lambda metadata: setattr(metadata, "planner_data", evil))
    refusal(megatron)
    assert started == []

"""`carnet delta` writes the folder that slime, miles and ModelExpress pull; `carnet apply` gives the next version, bit for bit."""

import json
import shutil

import pytest
import xxhash
import zstandard

import carnet
from carnet import deltas
from carnet.cli import main
from carnet.errors import BadRequest
from carnet.report.terminal import applied_lines
from tests.deltas.hand import INDEX, SHARD, adler32, by_hand, change, tensors

METADATA = {"base_version": "000000", "checksum_format": "adler32", "compression_format": "zstd", "delta_encoding": "xor"}


@pytest.fixture
def made(versions, tmp_path):
    deltas.delta(versions.a, versions.b, tmp_path / "weight_v000001")
    return tmp_path / "weight_v000001"


def test_an_index_says_what_a_delta_is_of(made, said):
    index = json.loads((made / INDEX).read_text())
    assert index == {"metadata": {**METADATA, "version": "000001"}, "weight_map": dict.fromkeys(said[0], SHARD)}
    assert sorted(path.name for path in made.iterdir()) == ["carnet.json", SHARD, INDEX]


def test_a_shard_holds_a_frame_for_each_tensor_that_changed_and_no_other(made, versions, said):
    old, new, frames = tensors(versions.a), tensors(versions.b), tensors(made)
    assert frames.keys() == said[0].keys() < old.keys()
    for name, (dtype, shape, data) in frames.items():
        assert (dtype, shape) == ("torch.uint8", (len(data),))
        assert zstandard.get_frame_parameters(data).content_size == len(old[name][2])
        difference = zstandard.ZstdDecompressor().decompress(data)
        assert bytes(a ^ b for a, b in zip(difference, old[name][2], strict=True)) == new[name][2]


def test_checksums_are_of_the_whole_new_tensor(made, said):
    raw = (made / SHARD).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == said[1]


def test_a_base_becomes_the_next_version_and_keeps_its_files(made, versions, tmp_path):
    done = deltas.apply(versions.a, made, tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(versions.b)
    assert (done.version, done.base_version, done.proven) == ("000001", "000000", True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*(path.name for path in versions.a.iterdir()), "carnet.json"]
    )
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (versions.a / name).read_bytes()


def test_what_was_applied_is_verified_alone_and_against_the_new_version(made, versions, tmp_path):
    deltas.apply(versions.a, made, tmp_path / "out")
    assert carnet.verify(tmp_path / "out")
    assert carnet.verify(versions.b, tmp_path / "out")
    assert not carnet.verify(versions.a, tmp_path / "out")


def test_steps_are_applied_one_by_one_or_together(versions, tmp_path):
    deltas.delta(versions.a, versions.b, tmp_path / "1")
    deltas.delta(versions.b, versions.c, tmp_path / "2", after=tmp_path / "1")
    assert json.loads((tmp_path / "2" / INDEX).read_text())["metadata"]["version"] == "000002"
    deltas.apply(versions.a, [tmp_path / "1", tmp_path / "2"], tmp_path / "both")
    deltas.apply(versions.a, tmp_path / "1", tmp_path / "one")
    deltas.apply(tmp_path / "one", tmp_path / "2", tmp_path / "two")
    assert tensors(tmp_path / "both") == tensors(tmp_path / "two") == tensors(versions.c)
    chains = [json.loads((tmp_path / name / "carnet.json").read_text())["chain"] for name in ("both", "two")]
    assert chains[0] == chains[1]
    assert [step["version"] for step in chains[0]] == ["000001", "000002"]


def test_a_folder_that_deltas_made_knows_its_version(made, versions, tmp_path):
    deltas.apply(versions.a, made, tmp_path / "out")
    assert deltas.delta(tmp_path / "out", versions.c, tmp_path / "next").version == "000002"


@pytest.mark.parametrize("format_", ["adler32", "xxh3-128"])
def test_a_delta_that_another_program_wrote_is_applied(versions, said, tmp_path, format_):
    frames, checksums = said
    if format_ == "xxh3-128":
        checksums = {name: xxhash.xxh3_128_hexdigest(tensors(versions.b)[name][2]) for name in frames}
    by_hand(tmp_path / "delta", frames, checksums, checksum_format=format_)
    done = deltas.apply(versions.a, tmp_path / "delta", tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(versions.b)
    assert not done.proven  # it says nothing of the tensors that did not change


def test_a_frame_need_not_say_how_much_it_holds(versions, said, tmp_path):
    old, new = tensors(versions.a), tensors(versions.b)
    coder = zstandard.ZstdCompressor(level=19, write_content_size=False)
    xor = {n: bytes(a ^ b for a, b in zip(old[n][2], new[n][2], strict=True)) for n in said[0]}
    by_hand(tmp_path / "delta", {name: coder.compress(data) for name, data in xor.items()}, said[1])
    deltas.apply(versions.a, tmp_path / "delta", tmp_path / "out")
    assert tensors(tmp_path / "out") == new


def test_checksums_of_frames_are_read_and_written(versions, said, tmp_path):
    sums = {name: adler32(data) for name, data in said[0].items()}
    by_hand(tmp_path / "hand", said[0], sums, checksum_scope="compressed_delta")
    deltas.delta(versions.a, versions.b, tmp_path / "ours", scope="compressed_delta")
    for name in ("hand", "ours"):
        deltas.apply(versions.a, tmp_path / name, tmp_path / f"out-{name}")
        assert tensors(tmp_path / f"out-{name}") == tensors(versions.b)
    change(tmp_path / "hand", checksum_scope=None)
    with pytest.raises(carnet.BadCheckpoint, match=r"the delta of .* is damaged"):
        deltas.apply(versions.a, tmp_path / "hand", tmp_path / "out")


def test_a_version_of_several_lines_fakes_no_proof(versions, said, tmp_path):
    by_hand(tmp_path / "delta", *said, version="1\nproof    39 tensors have the digests that the deltas say")
    done = deltas.apply(versions.a, tmp_path / "delta", tmp_path / "out")
    assert [line.split()[0] for line in applied_lines(done, None)] == ["applied", "changed", "proof", "target"]


def test_checksums_of_frames_do_not_tell_a_wrong_base_and_nobody_says_that_they_do(versions, said, tmp_path):
    sums = {name: adler32(data) for name, data in said[0].items()}
    by_hand(tmp_path / "frames", said[0], sums, checksum_scope="compressed_delta")
    by_hand(tmp_path / "whole", *said)
    blind, sure = (deltas.apply(versions.a, tmp_path / name, tmp_path / f"out-{name}") for name in ("frames", "whole"))
    assert (blind.proven, blind.checked, sure.proven, sure.checked) == (False, False, False, True)
    assert any("nothing says that the base is the right one" in line for line in applied_lines(blind, None))
    assert not deltas.verify(versions.c, tmp_path / "frames", against=versions.b)


def test_a_delta_is_the_same_bytes_whoever_many_worked_and_whatever_the_memory(versions, tmp_path):
    whole = {}
    for name, options in {"a": {"threads": 1}, "b": {"threads": 4}, "c": {"memory": "100M"}}.items():
        deltas.delta(versions.a, versions.b, tmp_path / name, **options)
        whole[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert whole["a"] == whole["b"] == whole["c"]


def test_nothing_that_changed_is_an_index_alone(versions, tmp_path):
    made = deltas.delta(versions.a, versions.a, tmp_path / "delta")
    assert (made.changed, made.packed) == (0, 0)
    assert sorted(path.name for path in (tmp_path / "delta").iterdir()) == ["carnet.json", INDEX]
    assert json.loads((tmp_path / "delta" / INDEX).read_text())["weight_map"] == {}
    deltas.apply(versions.a, tmp_path / "delta", tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(versions.a)


def test_weights_of_another_kind_stay_behind(made, versions, tmp_path):
    shutil.copytree(versions.a, tmp_path / "base")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"the old version's")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    deltas.apply(tmp_path / "base", made, tmp_path / "out")
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_versions_are_what_a_person_says(versions, tmp_path):
    made = deltas.delta(versions.a, versions.b, tmp_path / "1", version="step-7", base_version="step-6")
    assert (made.base_version, made.version) == ("step-6", "step-7")
    with pytest.raises(BadRequest, match="nothing says the version after this one"):
        deltas.delta(versions.b, versions.c, tmp_path / "2", base_version="step-7")


def test_a_delta_that_is_there_is_no_target(made, versions):
    with pytest.raises(BadRequest, match="exists"):
        deltas.delta(versions.a, versions.b, made)


def test_both_commands_say_what_they_did(versions, tmp_path, capsys):
    def said(*words):
        assert main.main([*map(str, words)], prog_name="carnet", standalone_mode=False) in (None, 0)
        return capsys.readouterr().out

    delta, out = tmp_path / "delta", tmp_path / "out"
    assert "000000 to 000001" in said("delta", versions.a, versions.b, delta)
    assert json.loads(said("apply", versions.a, delta, out, "--json"))["proven"] is True
    assert tensors(out) == tensors(versions.b)

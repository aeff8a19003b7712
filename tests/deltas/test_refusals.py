"""What is wrong with a delta, its base or its place in a chain is said by name; nothing is left of the target."""

import json
import shutil
import subprocess
import sys

import pytest
import zstandard
from safetensors.torch import load_file, save_file

import carnet
from carnet import deltas
from carnet.errors import BadCheckpoint, BadOption, BadRequest, NotSupported
from tests.deltas.hand import INDEX, SHARD, adler32, by_hand, change, frame
from tests.peak import SAMPLED

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def chain(versions, tmp_path):
    deltas.delta(versions.a, versions.b, tmp_path / "1")
    deltas.delta(versions.b, versions.c, tmp_path / "2", after=tmp_path / "1")
    return tmp_path / "1", tmp_path / "2"


def refused(kind, match, base, steps, out):
    with pytest.raises(kind, match=match) as error:
        deltas.apply(base, steps, out)
    assert not out.exists()
    assert not out.with_name(f"{out.name}.partial").exists()
    return error.value


def test_a_wrong_base_is_named_by_a_tensor_of_it(chain, versions, tmp_path):
    error = refused(BadRequest, "the base is another one", versions.b, chain[0], tmp_path / "out")
    assert error.what.startswith("model.") or error.what.startswith("lm_head")


def test_a_wrong_base_without_digests_fails_its_checksums(versions, said, tmp_path):
    by_hand(tmp_path / "delta", *said)
    error = refused(BadCheckpoint, "is damaged", versions.c, tmp_path / "delta", tmp_path / "out")
    assert error.facts["or"] == "the base is not version 000000"


def test_a_base_that_differs_where_the_delta_does_not_is_found(chain, versions, tmp_path):
    shutil.copytree(versions.a, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(raw[:8], "little")
    at = json.loads(raw[8:begin])["model.norm.weight"]["data_offsets"][0]
    raw[begin + at] ^= 1
    path.write_bytes(raw)
    refused(BadRequest, "model.norm.weight is not what version 000000 has", tmp_path / "base", chain[0], tmp_path / "out")


@pytest.mark.parametrize("order", [(1, 0), (0, 0), (1,)], ids=["swapped", "twice", "one missing"])
def test_a_step_that_is_missing_or_swapped_is_found(chain, versions, tmp_path, order):
    match = "a delta is missing, or in another's place" if len(order) > 1 else "the base is another one"
    refused(BadRequest, match, versions.a, [chain[at] for at in order], tmp_path / "out")


def test_a_version_knows_what_it_is(chain, versions, tmp_path):
    deltas.apply(versions.a, chain[0], tmp_path / "b")
    error = refused(BadRequest, "another version", tmp_path / "b", chain[0], tmp_path / "out")
    assert (error.facts["expected"], error.facts["found"]) == ("version 000000", "version 000001")


def test_the_index_of_a_whole_version_says_which_it_is(chain, versions, tmp_path):
    """As slime and ModelExpress write it; what becomes of it says the next."""
    shutil.copytree(versions.b, tmp_path / "b")
    index = tmp_path / "b/model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": {"version": "000001"}}))
    refused(BadRequest, "another version", tmp_path / "b", chain[0], tmp_path / "out")
    deltas.apply(tmp_path / "b", chain[1], tmp_path / "c")
    assert json.loads((tmp_path / "c/model.safetensors.index.json").read_text())["metadata"] == {"version": "000002"}
    assert carnet.verify(tmp_path / "c").equal
    assert deltas.delta(tmp_path / "b", versions.c, tmp_path / "next").version == "000002"


def test_a_step_of_another_run_with_the_same_number_is_found(chain, versions, tmp_path):
    deltas.delta(versions.a, versions.c, tmp_path / "other")
    refused(
        BadRequest,
        "version 000001 of one delta is not that of the next",
        versions.a,
        [tmp_path / "other", chain[1]],
        tmp_path / "o",
    )


def test_a_delta_begins_where_the_one_before_ends(chain, versions, tmp_path):
    with pytest.raises(BadRequest, match="the old version is not what the delta before leads to"):
        deltas.delta(versions.a, versions.c, tmp_path / "out", after=chain[0])
    assert not (tmp_path / "out").exists()


def test_a_delta_before_that_has_no_digests_proves_nothing(versions, said, tmp_path):
    by_hand(tmp_path / "1", *said)
    with pytest.raises(BadRequest, match="the delta before has no digests") as error:
        deltas.delta(versions.b, versions.c, tmp_path / "out", after=tmp_path / "1")
    assert "--base-version 000001" in error.value.remedy
    assert deltas.delta(versions.b, versions.c, tmp_path / "out", base_version="000001").version == "000002"


def test_a_delta_of_more_tensors_does_not_lead_to_fewer(chain, versions, tmp_path):
    shutil.copytree(versions.b, tmp_path / "b")
    (tmp_path / "b" / INDEX).unlink()
    parts = [load_file(path) for path in sorted((tmp_path / "b").glob("*.safetensors"))]
    for path in (tmp_path / "b").glob("*.safetensors"):
        path.unlink()
    fewer = {name: tensor for part in parts for name, tensor in part.items() if name != "model.norm.weight"}
    save_file(fewer, tmp_path / "b" / "model.safetensors")
    with pytest.raises(BadRequest, match="the old version is not what the delta before leads to") as error:
        deltas.delta(tmp_path / "b", tmp_path / "b", tmp_path / "out", after=chain[0])
    assert error.value.facts["tensor"] == "model.norm.weight"


def cut(data, checksum):
    return data[: len(data) // 2], checksum


def bit(data, checksum):
    changed = bytearray(data)
    changed[-3] ^= 16
    return bytes(changed), checksum


def longer(data, checksum):
    return zstandard.ZstdCompressor(1, write_content_size=False).compress(
        zstandard.ZstdDecompressor().decompress(data) + b"\0"
    ), checksum


def two(data, checksum):
    return data + zstandard.ZstdCompressor(1).compress(b"more"), checksum


def said_longer(data, checksum):
    return zstandard.ZstdCompressor(1).compress(zstandard.ZstdDecompressor().decompress(data) + b"\0"), checksum


def no_frame(data, checksum):
    return b"no frame of zstd", checksum


def other_checksum(data, checksum):
    return data, adler32(b"another tensor")


def large_window(data, checksum):
    parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    coder = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return coder.compress(zstandard.ZstdDecompressor().decompress(data)) + coder.flush(), checksum


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (cut, f"the frame of {Q} (ends too early|cannot be decoded)"),
        (bit, f"of {Q} (is damaged|cannot be decoded|ends too early)"),
        (longer, f"the frame of {Q} goes on after the tensor's last byte"),
        (two, f"the frame of {Q} (goes on after the tensor's last byte|cannot be decoded)"),
        (said_longer, f"the frame of {Q} is of another tensor"),
        (no_frame, f"the frame of {Q} cannot be decoded"),
        (other_checksum, f"the delta of {Q} is damaged"),
        (large_window, f"the frame of {Q} takes more memory than a frame of a delta may"),
    ],
)
def test_a_damaged_frame_is_named(versions, said, tmp_path, damage, match):
    frames, checksums = said
    frames[Q], checksums[Q] = damage(frames[Q], checksums[Q])
    by_hand(tmp_path / "delta", frames, checksums)
    refused(BadCheckpoint, match, versions.a, tmp_path / "delta", tmp_path / "out")


def test_a_frame_that_would_fill_the_memory_is_not_decoded(versions, said, tmp_path):
    bomb = zstandard.ZstdCompressor(1, write_content_size=False)
    coder = bomb.compressobj()
    frames = {**said[0], Q: b"".join(coder.compress(bytes(1 << 20)) for _ in range(2000)) + coder.flush()}
    by_hand(tmp_path / "delta", frames, said[1])
    assert len(frames[Q]) < 1 << 20
    program = f"""{SAMPLED}
from carnet import deltas
thread.start()
try:
    deltas.apply({str(versions.a)!r}, {str(tmp_path / "delta")!r}, {str(tmp_path / "out")!r})
except Exception as error:
    print(error.what)
stop()
print(peak)"""
    said, most = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert "goes on after" in said
    assert int(most) < 100 << 20


def test_a_tensor_that_is_not_in_the_index_is_named(versions, said, tmp_path):
    delta = by_hand(tmp_path / "delta", *said)
    index = json.loads((delta / INDEX).read_text())
    del index["weight_map"][Q]
    (delta / INDEX).write_text(json.dumps(index))
    refused(BadCheckpoint, f"the shards disagree on '{Q}'", versions.a, delta, tmp_path / "out")


def test_a_tensor_that_was_left_out_everywhere_but_in_the_digests_is_named(chain, versions, said, tmp_path):
    frames, checksums = ({name: each for name, each in part.items() if name != Q} for part in said)
    delta = by_hand(tmp_path / "delta", frames, checksums)
    shutil.copy(chain[0] / "carnet.json", delta)
    refused(BadCheckpoint, f"a delta and its carnet disagree on '{Q}'", versions.a, delta, tmp_path / "out")


def test_a_shard_beside_the_index_is_refused_because_engines_would_apply_it(chain, versions, tmp_path):
    shutil.copy(chain[1] / SHARD, chain[0] / "model-00001-of-00002.safetensors")
    refused(BadCheckpoint, "shards that .* does not name", versions.a, chain[0], tmp_path / "out")


def test_a_carnet_that_was_altered_is_refused(chain, versions, tmp_path):
    path = chain[0] / "carnet.json"
    path.write_text(path.read_text().replace('"version": "000001"', '"version": "000009"', 1))
    refused(BadCheckpoint, "the carnet of a delta was altered", versions.a, chain[0], tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "kind", "match"),
    [
        ("delta_encoding", "overwrite", NotSupported, "delta_encoding is 'overwrite'"),
        ("compression_format", "lz4", NotSupported, "compression_format is 'lz4'"),
        ("checksum_format", "blake3", NotSupported, "checksum_format is 'blake3'"),
        ("checksum_scope", "tensor", NotSupported, "checksum_scope is 'tensor'"),
        ("version", None, BadCheckpoint, "says no version"),
        ("base_version", 7, BadCheckpoint, "says no base_version"),
        ("delta_encoding", None, BadRequest, "no delta but a checkpoint"),
    ],
)
def test_another_form_is_refused_by_its_word(versions, said, tmp_path, key, value, kind, match):
    delta = by_hand(tmp_path / "delta", *said)
    change(delta, **{key: value})
    refused(kind, match, versions.a, delta, tmp_path / "out")


def test_a_tensor_that_the_base_does_not_have_is_named(versions, tmp_path):
    delta = by_hand(tmp_path / "delta", {"other": frame(b"ab", b"cd")}, {"other": adler32(b"cd")})
    error = refused(BadRequest, "the base does not have the tensors", versions.a, delta, tmp_path / "out")
    assert error.facts["tensor"] == "other"


def test_two_models_have_no_delta(versions, tmp_path):
    shutil.copytree(versions.b, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(BadRequest, match="the configs say otherwise of norm_eps"):
        deltas.delta(versions.a, tmp_path / "b", tmp_path / "out")


def test_a_config_that_says_the_same_in_other_words_is_no_hindrance(versions, tmp_path):
    shutil.copytree(versions.b, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["head_dim"] == 8
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "head_dim": None, "transformers_version": "4.0.0"}))
    assert deltas.delta(versions.a, tmp_path / "b", tmp_path / "out").changed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"rope_type": "linear", "factor": 4.0}),
        ("sliding_window", 8),
        ("quantization_config", {"quant_method": "fp8"}),
        ("logit_scale", 3.0),  # of which carnet knows nothing for this family
    ],
)
def test_what_one_config_alone_says_is_a_difference(versions, tmp_path, key, value):
    shutil.copytree(versions.b, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert key not in config
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, key: value}))
    for one, other in ((versions.a, tmp_path / "b"), (tmp_path / "b", versions.a)):
        with pytest.raises(BadRequest, match=f"the configs say otherwise of {key}"):
            deltas.delta(one, other, tmp_path / "out")
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, key: None}))
    assert deltas.delta(versions.a, tmp_path / "b", tmp_path / "out").changed


def test_words_that_mean_nothing_are_usage_errors(versions, tmp_path):
    for wrong in ({"checksum": "md5"}, {"scope": "all"}, {"tp": 2}, {"vocab_size": 96}, {"version": ""}):
        with pytest.raises(BadOption):
            deltas.delta(versions.a, versions.b, tmp_path / "out", **wrong)


def test_a_delta_is_no_base_and_a_base_no_delta(chain, versions, tmp_path):
    error = refused(BadRequest, "no checkpoint of a known kind is here", chain[1], chain[0], tmp_path / "out")
    assert "carnet verify BASE DELTA --against B" in error.remedy
    refused(BadRequest, "no delta is here", versions.a, versions.c, tmp_path / "out")
    refused(BadRequest, "no delta but a checkpoint", versions.a, versions.b, tmp_path / "out")  # of several files


def test_a_delta_alone_is_compared_with_nothing(chain):
    with pytest.raises(BadRequest, match="a delta alone") as error:
        carnet.verify(chain[0])
    assert error.value.remedy == "carnet verify BASE DELTA --against B"


def test_a_version_does_not_follow_itself(versions, tmp_path):
    with pytest.raises(BadRequest, match="does not follow itself"):
        deltas.delta(versions.a, versions.b, tmp_path / "out", version="step-1", base_version="step-1")


def test_a_target_does_not_lie_in_what_is_read(chain, versions, tmp_path):
    shutil.copytree(versions.a, tmp_path / "a")
    for a, b, out in (
        (tmp_path / "a", versions.b, tmp_path / "a" / "out"),
        (versions.a, tmp_path / "a", tmp_path / "a" / "out"),
    ):
        with pytest.raises(BadRequest, match="lie in each other"):
            deltas.delta(a, b, out)
    with pytest.raises(BadRequest, match="lie in each other"):
        deltas.apply(versions.a, chain[0], chain[0] / "out")

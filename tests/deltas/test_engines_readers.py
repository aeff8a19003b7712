"""What `carnet delta` writes is taken by ModelExpress' own receiver, and what its own publisher writes by `carnet apply`.

Its package asks for much that its readers do not need: ``make test`` puts it beside the environment without.
"""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from carnet import deltas
from tests.deltas.hand import INDEX, by_hand, tensors

BROUGHT = next(iter(sorted(Path(sys.prefix).glob("modelexpress-*"))), None)
pytestmark = [pytest.mark.referee, pytest.mark.skipif(BROUGHT is None, reason="`make test` brings modelexpress")]


@pytest.fixture
def utils(monkeypatch):
    monkeypatch.syspath_prepend(BROUGHT)
    return import_module("modelexpress_rl.utils")


@pytest.fixture
def receiver(monkeypatch):
    monkeypatch.syspath_prepend(BROUGHT)
    return import_module("modelexpress_rl.inference.receiver")


class Disk:
    """What its S3 client does, of a folder."""

    def get(self, uri):
        return Path(uri.removeprefix("s3://bucket")).read_bytes()

    def size(self, uri):
        return len(self.get(uri))


def received(receiver, base, steps, cache):
    """Return the folder that its receiver makes of a base and steps."""
    config = receiver.ObjectStorageGeneratorConfig(
        storage_type=next(iter(receiver.ObjectStorageType)),
        initial_base_version_id="000000",
        seed_checkpoint_path=base,
        refit_checkpoint_dir=cache,
    )
    local = receiver._LocalCheckpoint(model_name="model", config=config, s3=Disk())
    local.initialize()
    kind = receiver.WeightPayloadFormat.XOR_DELTA
    uris = [f"s3://bucket{step}/{INDEX}" for step in steps]
    versions = [receiver._S3Version(f"{n:06d}", f"{n - 1:06d}", kind, uri) for n, uri in enumerate(uris, 1)]
    return local.prepare_chain(tuple(versions)).path


def test_its_receiver_takes_a_chain(receiver, versions, tmp_path):
    steps = [tmp_path / "1", tmp_path / "2"]
    deltas.delta(versions.a, versions.b, steps[0])
    deltas.delta(versions.b, versions.c, steps[1], after=steps[0])
    assert tensors(received(receiver, versions.a, steps, tmp_path / "cache")) == tensors(versions.c)


def test_its_receiver_refuses_a_step_that_is_missing(receiver, versions, tmp_path):
    deltas.delta(versions.a, versions.b, tmp_path / "1")
    deltas.delta(versions.b, versions.c, tmp_path / "2", after=tmp_path / "1")
    with pytest.raises(RuntimeError, match="version"):
        received(receiver, versions.a, [tmp_path / "2"], tmp_path / "cache")


def test_its_frames_and_checksums_are_taken(utils, versions, tmp_path):
    old, new = tensors(versions.a), tensors(versions.b)
    frames, sums = {}, {}
    for name in old:
        before, after = (np.frombuffer(side[name][2], np.uint8) for side in (old, new))
        difference, changed = utils.compute_delta(after, before)
        if changed:
            checksum = utils.checksum_factory("adler32")
            checksum.update(after)
            frames[name], sums[name] = utils.compress_delta(difference).tobytes(), checksum.hexdigest()
    by_hand(tmp_path / "theirs", frames, sums)
    deltas.apply(versions.a, tmp_path / "theirs", tmp_path / "out")
    assert tensors(tmp_path / "out") == new

"""After a round every rank knows what the ranks of the engine must hold: the digests of the crossing of files, told from the source."""

import pytest

import carnet
from carnet.errors import BadRequest
from tests.live.test_live import DENSE, MIXTURE, held


@pytest.mark.parametrize(
    ("sizes", "cut", "target"),
    [
        (DENSE, {"tp": 2, "pp": 2}, {"tp": 4}),
        (DENSE | {"tied": True}, {"tp": 2}, {"tp": 2, "pp": 2}),
        (DENSE, {"tp": 4}, {"tp": 2, "ranks": (1, 3)}),
        (MIXTURE, {"ep": 2}, {"tp": 2, "ep": 2, "ranks": (0, 1)}),
    ],
    ids=str,
)
def test_an_engine_must_hold_what_left_whatever_arrived(world, tmp_path, sizes, cut, target):
    found = world.run("expect", sizes, cut, target, "vllm", str(tmp_path / "megatron"), {"memory": 1 << 16})
    asked = {name: size for name, size in target.items() if name != "ranks"}
    wanted = carnet.expect(tmp_path / "megatron", **asked)
    for before, after, refused in found:
        assert refused == "nothing was run that an engine could hold"
        assert (before.checksums, before.tp, before.pp, before.ep) == (wanted.checksums, wanted.tp, wanted.pp, wanted.ep)
        assert before.release == wanted.release
        assert after.checksums.keys() == wanted.checksums.keys()
        assert all(after.checksums[key] != digest for key, digest in wanted.checksums.items())


@pytest.mark.parametrize(("sizes", "target"), [(DENSE, {"tp": 4}), (DENSE | {"tied": True}, {"tp": 2, "pp": 2})], ids=str)
def test_the_ranks_of_an_engine_get_the_bytes_of_the_crossing_of_files(world, tmp_path, sizes, target):
    found = world.run("cross", sizes, {"tp": 2}, target, "vllm", str(tmp_path / "megatron"))
    assert carnet.cross(tmp_path / "megatron", tmp_path / "out", to="vllm", **target).equal
    for rank, path in enumerate(sorted((tmp_path / "out").glob("*.safetensors"))):
        assert found[rank][0] == held(path)


def test_only_the_ranks_of_an_engine_have_expected_digests(world, tmp_path):
    with pytest.raises(BadRequest, match="only an engine's ranks have expected digests"):
        world.run("expect", DENSE, {"tp": 4}, {}, "hf", str(tmp_path / "megatron"), {})

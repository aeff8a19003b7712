"""What an engine says beside what it must say: what differs is named, and what cannot be compared is never called equal."""

import hashlib
from dataclasses import replace

import pytest

from carnet.engines.comparing import Finding, compare
from carnet.engines.expected import Expected
from carnet.errors import BadRequest, NotSupported

NOTHING = hashlib.sha256().hexdigest()


def digest(word):
    return hashlib.sha256(word.encode()).hexdigest()


def expected(*names, ranks=2, **more):
    found = {
        f"dp0:pp0:pcp0:tp{rank}:{name}": (digest(name if "norm" in name else f"{name}{rank}"),)
        for rank in range(ranks)
        for name in names
    }
    return replace(Expected("vllm", "0.32", "model", ranks, 1, 1, found), **more)


NAMES = ("model.norm.weight", "layers.0.qkv_proj.weight")
TP0, TP1 = "dp0:pp0:pcp0:tp0", "dp0:pp0:pcp0:tp1"


def test_what_is_equal_is_counted():
    wanted = expected(*NAMES)
    found = compare(wanted, wanted.checksums, "http://a")
    assert found
    assert (found.equal, found.compared, found.different, found.apart, found.url) == (4, 4, (), (), "http://a")


def test_what_differs_is_named_by_rank_and_parameter():
    wanted = expected(*NAMES)
    other = digest("other")
    found = compare(wanted, wanted.checksums | {f"{TP1}:{NAMES[1]}": other})
    assert not found
    assert found.different == (Finding(TP1, NAMES[1], "different", digest(f"{NAMES[1]}1"), other),)


def test_a_shard_of_another_rank_is_named_as_such():
    wanted = expected(*NAMES)
    swapped = {f"{TP0}:{NAMES[1]}": digest(f"{NAMES[1]}1"), f"{TP1}:{NAMES[1]}": digest(f"{NAMES[1]}0")}
    found = compare(wanted, wanted.checksums | swapped)
    assert [each.what for each in found.different] == [f"holds {TP1}:{NAMES[1]}", f"holds {TP0}:{NAMES[1]}"]


def test_what_is_packed_is_not_comparable_and_no_success_alone():
    wanted = expected(*NAMES)
    found = compare(wanted, {key: NOTHING if "qkv" in key else each for key, each in wanted.checksums.items()})
    assert found
    assert (found.equal, found.compared) == (2, 2)
    assert {(each.rank, each.name) for each in found.apart} == {(TP0, NAMES[1]), (TP1, NAMES[1])}
    nothing = compare(wanted, dict.fromkeys(wanted.checksums, NOTHING))
    assert (bool(nothing), nothing.compared, len(nothing.apart)) == (False, 0, 4)


def test_a_parameter_of_no_bytes_is_equal_to_itself():
    wanted = Expected("vllm", "0.32", "model", 1, 1, 1, {f"{TP0}:empty": (NOTHING,)})
    assert compare(wanted, wanted.checksums)


def test_codes_that_differ_are_not_comparable_but_codes_that_are_equal_are_equal():
    codes = {
        f"{TP0}:{NAMES[1]}",
        f"{TP1}:{NAMES[1]}",
        f"{TP0}:layers.0.qkv_proj.weight_scale",
        f"{TP1}:layers.0.qkv_proj.weight_scale",
    }
    wanted = expected(*NAMES, "layers.0.qkv_proj.weight_scale", coded=frozenset(codes))
    said = {key: each for key, each in wanted.checksums.items() if not key.endswith("scale")} | {
        f"{TP1}:{NAMES[1]}": digest("packed")
    }
    said[f"{TP0}:layers.0.qkv_proj.workspace"] = digest("a kernel's own")
    found = compare(wanted, said)
    assert found
    assert found.equal == 3
    assert sorted((each.rank, each.name, each.what) for each in found.apart) == [
        (TP0, "layers.0.qkv_proj.weight_scale", "the engine has none"),
        (TP0, "layers.0.qkv_proj.workspace", "no weight of the checkpoint"),
        (TP1, NAMES[1], "the engine may have packed it anew"),
        (TP1, "layers.0.qkv_proj.weight_scale", "the engine has none"),
    ]


def test_a_parameter_too_many_and_one_too_few_are_differences():
    wanted = expected(*NAMES)
    said = {key: each for key, each in wanted.checksums.items() if key != f"{TP1}:{NAMES[0]}"} | {f"{TP0}:model.b": digest("b")}
    found = compare(wanted, said)
    assert [(each.rank, each.name, each.what) for each in found.different] == [
        (TP0, "model.b", "no weight of the checkpoint"),
        (TP1, NAMES[0], "the engine has none"),
    ]


def test_ranks_of_another_number_are_refused_with_what_to_say():
    wanted = expected(*NAMES)
    with pytest.raises(BadRequest, match="the ranks of vllm are others") as refused:
        compare(wanted, {key: each for key, each in wanted.checksums.items() if key.startswith(TP0)})
    assert refused.value.facts == {"expected": f"{TP0}, {TP1}", "found": TP0}
    assert "--tp" in refused.value.remedy
    with pytest.raises(BadRequest):
        compare(wanted, {})


def test_data_parallel_ranks_hold_the_same_unless_there_are_experts():
    wanted = expected(*NAMES)
    both = wanted.checksums | {key.replace("dp0", "dp1"): each for key, each in wanted.checksums.items()}
    assert compare(wanted, both).equal == 8
    bent = compare(wanted, both | {f"{TP0}:{NAMES[0]}".replace("dp0", "dp1"): digest("bent")})
    assert [each.rank for each in bent.different] == [TP0.replace("dp0", "dp1")]
    mixture = expected("layers.0.mlp.experts.routed_experts.w13_weight")
    with pytest.raises(NotSupported, match="data-parallel"):
        compare(mixture, mixture.checksums | {key.replace("dp0", "dp1"): each for key, each in mixture.checksums.items()})


def test_sglang_may_hash_on_a_gpu_or_not_and_tells_of_buffers():
    wanted = Expected("sglang", "0.5.23", "model", 1, 1, 1, {"dp0:pp0:tp0:a": ("0" * 15 + "1", "f" * 16)})
    for said in wanted.digests["dp0:pp0:tp0:a"]:
        found = compare(wanted, {"dp0:pp0:tp0:a": said, "dp0:pp0:tp0:a.buffer": "e" * 16})
        assert found
        assert [(each.name, each.what) for each in found.apart] == [("a.buffer", "no weight of the checkpoint")]
    assert not compare(wanted, {"dp0:pp0:tp0:a": "0" * 14 + "11"})

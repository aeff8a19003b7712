"""A tensor is said to be whole when it is, and no later than the target; what is examined meanwhile is what lies in the files."""

import threading
from collections.abc import Iterable
from math import prod
from pathlib import Path

import pytest

import carnet
from carnet.dtypes import BY_NAME
from carnet.executor.arrivals import Arrivals, Unfinished
from carnet.executor.jobs import jobs_of
from carnet.storage.drafts import PosixDraft, staging_of
from carnet.storage.files import PosixTarget

MEGATRON = Path(__file__).parents[1] / "goldens" / "megatron" / "llama_tp2pp2"
TARGETS = {
    "hf": {"to": "hf"},
    "ranks": {"to": "trtllm", "tp": 2, "pp": 2},
    "megatron": {"to": "megatron", "tp": 4},
    "codes": {"to": "hf", "quantize": "fp8-channel", "style": "compressed-tensors", "activations": "dynamic"},
    "codes under two scales": {"to": "hf", "quantize": "nvfp4", "style": "compressed-tensors", "activations": "dynamic"},
}


def whole(arrivals: Arrivals) -> set[int]:
    return {tensor for tensor, left in enumerate(arrivals._left) if not left}


@pytest.mark.parametrize("asked", TARGETS.values(), ids=TARGETS)
def test_a_tensor_that_is_said_to_be_whole_has_its_last_bytes(asked, tmp_path, monkeypatch):
    plan = carnet.plan(MEGATRON, **asked)
    final, out = tmp_path / "final", tmp_path / "out"
    assert carnet.cross(MEGATRON, final, **asked)
    places = sorted(
        ((number, tensor.offset, file.name, prod(tensor.shape) * BY_NAME[tensor.dtype].nbytes))
        for number, file in enumerate(plan.files)
        for tensor in file.tensors
    )
    seen, lock, note = set[int](), threading.Lock(), Arrivals.note

    def look(arrivals: Arrivals, job: int) -> None:
        note(arrivals, job)
        with lock:
            new = whole(arrivals) - seen
            seen.update(new)
            for _, offset, name, nbytes in (places[tensor] for tensor in new):
                there, then = ((folder / name).read_bytes()[offset : offset + nbytes] for folder in (staging_of(out), final))
                assert there == then

    monkeypatch.setattr(Arrivals, "note", look)
    assert carnet.cross(MEGATRON, out, threads=2, **asked)
    assert seen == {*range(len(places))}


def test_tasks_come_when_what_they_need_is_there_and_all_of_them_come():
    plan = carnet.plan(MEGATRON, to="hf")
    jobs = jobs_of(plan)
    needs = [[(file.name, tensor.offset)] for file in plan.files for tensor in file.tensors]
    arrivals, came = Arrivals(plan, jobs, ()), list[int]()
    order = iter(arrivals.order([*needs, []]))
    assert next(order) == len(needs)  # it needs nothing
    thread = threading.Thread(target=lambda: came.extend(order))
    thread.start()
    for job in range(len(jobs)):
        arrivals.note(job)
    arrivals.end(whole=True)
    thread.join()
    assert sorted(came) == [*range(len(needs))]


def test_a_target_that_will_never_be_whole_ends_the_wait():
    plan = carnet.plan(MEGATRON, to="hf")
    arrivals = Arrivals(plan, jobs_of(plan), ())
    order = arrivals.order([[(file.name, tensor.offset)] for file in plan.files for tensor in file.tensors])
    arrivals.end(whole=False)
    with pytest.raises(Unfinished):
        next(iter(order))


def test_a_byte_that_the_writer_gets_wrong_is_found_in_the_file(tmp_path, monkeypatch):
    write, wrong = PosixTarget.write, list[int]()

    def bend(target: PosixTarget, offset: int, data: memoryview) -> None:
        if not wrong and target.name.endswith(".safetensors") and offset > 1 << 16:
            wrong.append(offset)
            data = memoryview(bytes([data[0] ^ 1, *data[1:]]))
        write(target, offset, data)

    monkeypatch.setattr(PosixTarget, "write", bend)
    verdict = carnet.cross(MEGATRON, tmp_path / "out", to="hf")
    assert wrong
    assert [finding.what for finding in verdict.findings] == ["1 bit of one element flipped"]
    assert not (tmp_path / "out").exists()


def test_an_examination_that_fails_ends_the_crossing_with_its_error(tmp_path, monkeypatch):
    def fail(*_args: object, **_given: object) -> None:
        raise carnet.MachineFailed("the machine refused")

    monkeypatch.setattr("carnet.proving.examine", fail)
    with pytest.raises(carnet.MachineFailed, match="the machine refused"):
        carnet.cross(MEGATRON, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_not_written_as_it_was_examined_is_found(tmp_path, monkeypatch):
    put = PosixDraft.put

    def bend(draft: PosixDraft, name: str, chunks: Iterable[bytes], *, sync: bool = False) -> None:
        whole = b"".join(chunks)
        put(draft, name, [whole.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05')], sync=sync)

    monkeypatch.setattr(PosixDraft, "put", bend)
    verdict = carnet.cross(MEGATRON, tmp_path / "out", to="hf")
    # what it is called depends on whether the config was there when the examination began
    found = {finding.what for finding in verdict.findings}
    assert {"written otherwise than planned", "config field differs"} & found
    assert not (tmp_path / "out").exists()

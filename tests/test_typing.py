"""A program that uses carnet is checked by mypy as strictly as it goes: what it gets has types, and what it misspells is found."""

import os
import subprocess
import sys
from importlib import import_module
from inspect import isfunction
from pathlib import Path

import pytest

PROGRAM = """
import carnet
from carnet import (
    BadCheckpoint, BadOption, BadRequest, CarnetError, Comparison, Expected, Inspection, MachineFailed, NotSupported, Options,
    Plan, Progress, Verdict,
)
from carnet import deltas, lineage, merging, signing

seen: list[Progress] = []


def show(at: Progress) -> None:
    amount: int = at.done + at.total
    print(at.phase.upper(), amount)


def cross(options: Options) -> bool:
    try:
        verdict: Verdict = carnet.cross("a", "b", **options, progress=show)
    except (BadCheckpoint, BadRequest, BadOption, MachineFailed, NotSupported) as error:
        refusal: CarnetError = error
        remedy: str | None = refusal.remedy
        raise SystemExit(remedy) from error
    for finding in verdict.findings:
        place: str = finding.where
        print(place.upper(), finding.what.upper(), finding.detail.upper())
    return bool(verdict) and verdict.equal and verdict.nbytes > 0


cross({"to": "hf", "tp": 2, "memory": "1G"})
found: Inspection = carnet.inspect("a")
plan: Plan = carnet.plan("a", to="hf", dtype="bf16")
carnet.run(plan, "b", part=(1, 2), progress=seen.append)
finished: Verdict | None = carnet.finish(plan, "b", verify=True, progress=seen.append)
again: Verdict = carnet.verify("a", "b", dtype="bf16", progress=show)
removed: list[str] = carnet.clean("b")
merged: Verdict = carnet.merge(["a", "b"], "c", [0.5, 0.5], to="hf", progress=show)
same: Verdict = merging.verify(["a", "b"], "c", [0.5, 0.5])
expected: Expected = carnet.expect("a", engine="vllm", tp=2, progress=show)
compared: Comparison = carnet.against(expected, "http://host:8000")
made: deltas.Made = deltas.delta("a", "b", "c", progress=show)
applied: deltas.Applied = deltas.apply("a", "c", "d", progress=show)
signed: signing.Signed = signing.sign("d", signing.Key(key="key.pem"), progress=show)
chain: lineage.Lineage = lineage.follow("d")

carnet.cross("a", "b", too="hf")  # type: ignore[call-arg]
carnet.cross("a", "b", to="hf", tp="two")  # type: ignore[arg-type]
carnet.cross("a", "b", to="hf", progress=lambda done, total: None)  # type: ignore[arg-type,misc]
carnet.run(plan, "b", phase=print)  # type: ignore[call-arg]
carnet.plan("a", to="hf").findings  # type: ignore[attr-defined]
carnet.convert("a")  # type: ignore[attr-defined]
"""


@pytest.mark.parametrize(
    "module", ["", ".deltas", ".merging", ".signing", ".lineage", ".fleet", ".live", ".calibrate", ".megatron.fits"]
)
def test_every_public_function_says_what_it_does_and_what_it_raises(module):
    home = import_module(f"carnet{module}")
    own = [name for name, each in vars(home).items() if getattr(each, "__module__", "") == home.__name__ and name[0] != "_"]
    functions = [each for name in getattr(home, "__all__", own) if isfunction(each := getattr(home, name))]
    assert functions
    verbs = [each for each in functions if hasattr(each, "__wrapped__")]  # what a log tells of
    assert [each.__name__ for each in verbs if "Raises " not in (each.__doc__ or "")] == []
    assert all(each.__doc__ for each in functions)


def test_a_strictly_typed_program_is_understood(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[1]
    # what is wrong inside of carnet is for `make check`; ignores that nothing needs are errors here
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", program]
    environment = {**os.environ, "MYPYPATH": str(root / "src"), "MYPY_CACHE_DIR": str(root / ".mypy_cache/strict")}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert found.stdout == "Success: no issues found in 1 source file\n"

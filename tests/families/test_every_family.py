"""Every family, there and back: from each program's layout to each other's, cut otherwise, and home again, nothing is different."""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

import carnet
from carnet.architectures.known import FAMILIES
from carnet.model.tensors import BY_PART
from tests.families.samples import NUMPY, SAMPLES, cut, draw, family_of, load, said, save

TRIPS = [
    (name, here, there)
    for name, sample in SAMPLES.items()
    for here, there in itertools.product(sample.dialects.split(), repeat=2)
]
PHASES = [phase for phase in Phase if phase is not Phase.shrink]  # the models are small as they are


def test_every_family_has_a_sample():
    assert {family_of(sample).name for sample in SAMPLES} == {family.name for family in FAMILIES}


def test_the_samples_of_a_family_name_every_program_that_has_a_class_for_it():
    spoken = {(family_of(name).name, dialect) for name, sample in SAMPLES.items() for dialect in sample.dialects.split()}
    for family in FAMILIES:
        assert (family.name, "hf") in spoken
        # what is computed of weights does not come back: tests/test_computed.py
        returns = family.trtllm is not None and not any(BY_PART[part].function for part in family.trtllm.parts)
        assert ((family.name, "trtllm") in spoken) == returns, family.name


# few examples a trip: there are many trips, and each example is three crossings at most
@settings(max_examples=5, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow], phases=PHASES)
@pytest.mark.parametrize(("name", "here", "there"), TRIPS)
@given(random=st.randoms(use_true_random=False))
def test_there_and_back_is_the_identity(name, here, there, random):
    made = "hf" if here == "megatron" else here  # what Megatron reads was made by a crossing: its files are not safetensors
    model = draw(name, random, ("hf", here, there))
    ways = {where: cut(model, where, random) for where in (made, here)}
    other = cut(model, there, random)  # from Megatron to Megatron, say, for other ranks
    note(f"{model.config}\n{ways}\n{other}")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")  # says the family where Megatron's arguments, which name none, say another
        config.write_text(json.dumps(said(model.family, "hf", model.config)))
        first = save(model, Path(folder, "made"), made, random, ways[made])
        at = crossed(first, Path(folder, "here"), here, ways[here]) if made != here else first
        away = crossed(at, Path(folder, "there"), there, other, unless_said(at, config, model.family))
        home = crossed(away, Path(folder, "home"), here, ways[here], unless_said(away, config, model.family))
        if here == "megatron" and (there != "trtllm" or contents(home) == contents(at)):
            assert contents(home) == contents(at)
            return
        if here == "megatron":  # NVIDIA's ranks have norms as they are and a router in f32, and so has what is made of them
            at, home = (
                crossed(way, Path(folder, f"{way.name}-hf"), "hf", {}, unless_said(way, config, model.family))
                for way in (at, home)
            )
        before, after = load(at), load(home)
        assert [name for name in before.keys() | after.keys() if not same(before.get(name), after.get(name))] == []
        assert json.loads((home / "config.json").read_text()) == json.loads((at / "config.json").read_text())


def crossed(source, target, to, options, config=None):
    if to == "megatron":  # whatever YaRN's numbers are: no flag of Megatron-LM says them
        options = {**options, "read_by": "megatron-bridge"}
    assert carnet.cross(source, target, to=to, config=config, **options).equal
    return target


def unless_said(at: Path, config: Path, family: str) -> Path | None:
    found = carnet.inspect(at).inventory
    return None if found is not None and found.family.name == family else config


def same(before, after) -> bool:
    """Say whether a tensor came back; a norm or a router may be wider than it was, as a sum or NVIDIA's f32 has made it."""
    if before is None or after is None or before == after:
        return before == after
    numbers = np.frombuffer(before[2], NUMPY[before[0]]).astype(np.float32)
    plain = bool((numbers * 128 % 1 == 0).all())  # no other tensor is made of such numbers
    return plain and after == ("F32", before[1], numbers.tobytes())


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "carnet.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}

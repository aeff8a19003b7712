"""An examination in parts, each of which another process could have done: it finds what the whole one does."""

import pickle
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import carnet
from carnet.examiner.desk import together
from carnet.examining import desk, examine
from carnet.plans.request import MEMORY, Request, as_data
from carnet.storage.schemes import folder_at

CODED = {"to": "hf", "dtype": "bf16", "quantize": "int8-channel", "style": "compressed-tensors"}


def damage(out: Path, coded: bool) -> None:
    """Exchange two heads' rows, and make one number another."""
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    first = tensors[name][:32].copy()
    tensors[name][:32], tensors[name][32:64] = tensors[name][32:64], first
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("asked", [{"to": "hf"}, CODED], ids=["plain", "coded"])
@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("of", [1, 3, 50])
def test_parts_of_an_examination_find_what_the_whole_does(source, tmp_path, asked, damaged, of):
    out = tmp_path / "out"
    assert carnet.cross(source, out, **asked).equal
    if damaged:
        damage(out, asked is CODED)
    request = as_data(Request.of(asked))
    sides = folder_at(str(source)), folder_at(str(out))
    sizes = []

    def elsewhere(add):
        parts = [desk(*sides, request, MEMORY, 2).part(number, of) for number in range(1, of + 1)]
        sizes.extend(sum(map(part.nbytes, part.tasks)) for part in parts)
        return together(pickle.loads(pickle.dumps(part.work(add))) for part in parts)

    found, whole = (examine(*sides, request, [], MEMORY, 2, None, elsewhere=each).verdict for each in (elsewhere, None))
    assert found.equal is not damaged
    assert found == whole
    assert sum(sizes) == sum(map((one := desk(*sides, request, MEMORY, 2)).nbytes, one.tasks))

"""A hybrid's own tensors under the names that its module has for them, which are not a store's: running, and in the file of a rank."""

from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

import carnet
from carnet.live import Grid, plan
from carnet.megatron.models import arguments
from carnet.megatron.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec
from tests.megatron.conftest import HYBRID, MOE, filled, save

pytestmark = [pytest.mark.referee, pytest.mark.usefixtures("megatron_world")]
PATTERN = {"hybrid_override_pattern": "M*-M-", "layernorm_epsilon": 1e-5, "vocab_size": 64}
SAID = {name: value for name, value in HYBRID.items() if name not in MOE} | PATTERN


@pytest.fixture
def model():
    return filled(SAID, lambda *_: get_hybrid_stack_modelopt_spec())


@pytest.fixture
def stored(model, tmp_path):
    """What the store of the model, whose names are the same in all releases, crosses to."""
    return crossed(save(model, SAID, tmp_path / "store"), tmp_path / "of the store")


def crossed(root, out):
    carnet.cross(root, out, to="hf")
    return load_file(next(out.glob("*.safetensors")))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    assert sum(".conv1d." in name for name in found) == 2 * SAID["hybrid_override_pattern"].count("M")


def test_a_running_hybrid_hands_over_what_its_store_holds(model, stored):
    with plan(arguments(model), source=Grid(), target=Grid()) as crossing:
        assert_same(crossing.run(model), stored)


def test_the_file_of_a_rank_holds_what_the_store_holds(model, stored, tmp_path):
    file = tmp_path / "ranks/iter_0000001/mp_rank_00/model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1}
    args = Namespace(**SAID, **sizes)
    torch.save({"args": args, "checkpoint_version": 3.0, "iteration": 1, "model": model.state_dict()}, file)
    assert_same(crossed(tmp_path / "ranks", tmp_path / "of the rank"), stored)

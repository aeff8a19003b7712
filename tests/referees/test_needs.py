"""What Megatron's arguments cannot say stands in carnet's own: the weights go to Megatron, and the same model comes back."""

import json

import pytest
import torch
from safetensors.torch import load_file

import carnet
from carnet.errors import BadCheckpoint, NotSupported
from tests.referees.test_megatron_core import REFUSED, UNTOLD

pytestmark = pytest.mark.referee

LACKED = {name: config for name, (config, what, _) in REFUSED.items() if what != UNTOLD}
CUT = {"to": "megatron", "tp": 2, "pp": 2, "accept": ["needs"]}


@pytest.mark.parametrize("name", LACKED)
def test_a_model_that_arguments_cannot_say_comes_back(name, saved, loaded, tmp_path):
    before = saved(LACKED[name])
    with pytest.raises(NotSupported) as refused:
        carnet.plan(before, to="megatron")
    assert "--accept needs" in str(refused.value.remedy)
    went = carnet.cross(before, tmp_path / "megatron", **CUT)
    assert went.equal
    lacked = went.needs["fields"]
    assert lacked
    assert json.loads((tmp_path / "megatron/carnet.json").read_text())["needs"]["fields"] == lacked
    assert carnet.verify(tmp_path / "megatron", before).equal
    assert carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf").equal
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", before))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    tokens = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found, expected = (loaded(folder)(tokens, use_cache=False).logits for folder in (tmp_path / "back", before))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("own", "fault"),
    [
        ({"qk_nrom": "whole"}, "there is no field 'qk_nrom' of a model"),
        ({"qk_norm": 3}, "the config sets 'qk_norm' to something that is not a str"),
        ({"layer_ffn": [1]}, "'layer_ffn' has another length than the model has layers"),
        ({"embed_scale": "nan"}, "the config sets 'embed_scale' to something that is not a float"),
    ],
)
def test_nonsense_in_them_is_refused_by_name(own, fault, saved, tmp_path):
    before = saved(LACKED["olmo2"])
    assert carnet.cross(before, tmp_path / "megatron", **CUT).equal
    said = carnet.inspect(tmp_path / "megatron").checkpoint.config
    (tmp_path / "args.json").write_text(json.dumps({**said, "carnet_needs": {**said["carnet_needs"], **own}}))
    with pytest.raises(BadCheckpoint, match=fault):
        carnet.plan(tmp_path / "megatron", to="hf", config=tmp_path / "args.json")


def test_a_run_that_goes_on_from_there_has_them_from_the_carnet(saved, tmp_path):
    before = saved(LACKED["olmo2"])
    assert carnet.cross(before, tmp_path / "megatron", **CUT).equal
    common = next((tmp_path / "megatron").glob("*/common.pt"))
    state = torch.load(common, weights_only=False)
    del state["args"].carnet_needs, state["carnet_meant_for"]  # as Megatron saves its own arguments
    torch.save(state, common)
    assert carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf").equal
    (tmp_path / "megatron/carnet.json").unlink()
    with pytest.raises(NotSupported, match="a tensor that carnet does not know"):
        carnet.plan(tmp_path / "megatron", to="hf")

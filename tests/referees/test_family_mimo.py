"""MiMo: Qwen2 as transformers has it, layers for further tokens as vLLM computes them, and what megatron-core makes of both."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

import carnet
from carnet.errors import NotSupported
from tests.referees import further
from tests.referees.sizes import HEADS, TOKENS

pytestmark = [
    pytest.mark.referee,
    # megatron-core 0.16 calls torch's older name
    pytest.mark.filterwarnings("ignore:.load_state_dict. is deprecated:FutureWarning"),
]

CONFIG = Qwen2Config(**HEADS, **TOKENS, intermediate_size=56)
OWN = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True, "use_mrope": False}
TEXTS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(3))


class Further(Qwen2DecoderLayer):
    """MiMoMultiTokenPredictorLayer of vLLM's models/mimo_mtp.py, under the names that its checkpoints have."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.token_layernorm, self.hidden_layernorm, self.final_layernorm = (
            Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(3)
        )
        self.input_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def beyond(self, embedded, hidden, **given):
        joined = torch.cat([self.hidden_layernorm(hidden), self.token_layernorm(embedded)], dim=-1)
        return self.final_layernorm(self(self.input_proj(joined), **given))


@pytest.fixture
def mimo(tmp_path):
    """Save a random model with one further layer; return the folder and the model."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="eager").eval()
    model.model.mtp_layers = nn.ModuleList([Further(model.config, CONFIG.num_hidden_layers - 1)]).eval()
    for tensor in model.parameters():
        nn.init.normal_(tensor, std=0.2)
    model.save_pretrained(tmp_path / "mimo")
    said = json.loads((tmp_path / "mimo/config.json").read_text())
    (tmp_path / "mimo/config.json").write_text(json.dumps({**said, **OWN, "num_nextn_predict_layers": 1}))
    return tmp_path / "mimo", model


def expected(model):
    return further.logits(model, model.model.mtp_layers[0], Further.beyond, TEXTS)


@pytest.mark.parametrize("cut", [{}, {"tp": 2, "pp": 2}])
def test_megatron_core_predicts_the_token_after_the_next_as_vllm_does(cut, mimo, megatron_core, tmp_path):
    folder, model = mimo
    assert carnet.cross(folder, tmp_path / "megatron", to="megatron", spelling="local", **cut).equal
    found = megatron_core(tmp_path / "megatron/iter_0000001")(TEXTS)
    following, beyond = expected(model)
    assert min(following.std(), beyond.std()) > 0.1
    torch.testing.assert_close(found[0][..., :97], following, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1][:, :-1, :97], beyond, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spelling", ["te", "local"])
def test_a_model_comes_back_as_it_went(spelling, mimo, tmp_path):
    folder, _ = mimo
    assert carnet.cross(folder, tmp_path / "megatron", to="megatron", spelling=spelling, tp=2).equal
    assert carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf").equal
    before, after = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    said = json.loads((tmp_path / "back/config.json").read_text())
    assert (said["architectures"], said["model_type"], said["num_nextn_predict_layers"]) == (["MiMoForCausalLM"], "mimo", 1)


def test_without_its_further_layers_it_computes_what_qwen2_does(mimo, loaded, tmp_path):
    folder, model = mimo
    assert carnet.cross(folder, tmp_path / "alone", to="hf", drop=("model.mtp_layers.*",)).equal
    assert not any("mtp" in name for name in load_file(tmp_path / "alone/model.safetensors"))
    said = json.loads((tmp_path / "alone/config.json").read_text())
    (tmp_path / "alone/config.json").write_text(
        json.dumps({**said, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"})
    )
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "alone")(TEXTS, use_cache=False).logits, expected(model)[0])


def test_positions_in_three_dimensions_are_refused_by_name(mimo, tmp_path):
    folder, _ = mimo
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "use_mrope": True}))
    with pytest.raises(NotSupported, match="use_mrope"):
        carnet.plan(folder, to="megatron")

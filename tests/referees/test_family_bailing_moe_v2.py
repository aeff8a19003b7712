"""Ling 2: what GLM-4.5's class in transformers computes of the same weights, under the names that the hub's class has for them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer, Glm4MoeRMSNorm

import carnet
from carnet.architectures.known import recognise
from carnet.errors import CarnetError
from tests.referees import further
from tests.referees.sizes import HEADS, TOKENS

pytestmark = [
    pytest.mark.referee,
    # megatron-core 0.16 calls torch's older name
    pytest.mark.filterwarnings("ignore:.load_state_dict. is deprecated:FutureWarning"),
]

GLM = Glm4MoeConfig(
    **{**HEADS, "num_hidden_layers": 3},
    **TOKENS,
    intermediate_size=56,
    n_routed_experts=8,
    num_experts_per_tok=4,
    moe_intermediate_size=20,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
    use_qk_norm=True,
    attention_bias=True,
    rope_parameters={"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5},
)
# as inclusionAI/Ling-mini-2.0 says it
LING = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe_v2",
    "vocab_size": 97,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 56,
    "max_position_embeddings": 128,
    "max_window_layers": 20,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 20,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "use_qk_norm": True,
    "use_qkv_bias": True,
    "use_bias": False,
    "use_rmsnorm": True,
    "rms_norm_eps": GLM.rms_norm_eps,
    "rope_theta": 50000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 12,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "attention_dropout": 0.0,
    "num_nextn_predict_layers": 1,
    "mtp_loss_scaling_factor": 0,
    "torch_dtype": "float32",
    **TOKENS,
}
NAMES = (
    ("embed_tokens", "word_embeddings"),
    ("self_attn.o_proj", "attention.dense"),
    ("self_attn.q_norm", "attention.query_layernorm"),
    ("self_attn.k_norm", "attention.key_layernorm"),
    ("gate.e_score_correction_bias", "gate.expert_bias"),
)
TEXTS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(3))


class Further(Glm4MoeDecoderLayer):
    """BailingMoeV2MTPLayer of the hub's modeling_bailing_moe_v2.py."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.enorm, self.hnorm, self.final_layernorm = (
            Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(3)
        )
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def beyond(self, embedded, hidden, **given):
        joined = torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1)
        return self.final_layernorm(self(self.eh_proj(joined), **given))


def renamed(tensors):
    """Return tensors of GLM-4.5 under the names of Ling 2, whose attention has one projection for queries, keys and values."""
    found = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{each}_proj.")] for each in "qkv"]
            found[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            for old, new in NAMES:
                name = name.replace(old, new)
            found[name] = tensor
    return found


@pytest.fixture
def ling(tmp_path):
    """Save a random model with one further layer; return its folder, and the model of GLM-4.5 that it is."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(GLM, attn_implementation="eager").eval()
    model.model.layers.append(Further(model.config, 3).eval())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "inv_freq" not in name:
            nn.init.normal_(tensor, std=0.2)
    model.save_pretrained(tmp_path / "glm")
    (tmp_path / "ling").mkdir()
    save_file(renamed(load_file(tmp_path / "glm/model.safetensors")), tmp_path / "ling/model.safetensors")
    (tmp_path / "ling/config.json").write_text(json.dumps(LING))
    layer = model.model.layers[3]
    model.model.layers = model.model.layers[:3]
    return tmp_path / "ling", model, layer


@pytest.mark.parametrize("cut", [{}, {"tp": 2, "pp": 2}, {"ep": 4}])
def test_megatron_core_computes_what_transformers_does_of_the_same_weights(cut, ling, megatron_core, tmp_path):
    folder, model, layer = ling
    assert carnet.cross(folder, tmp_path / "megatron", to="megatron", spelling="local", **cut).equal
    found = megatron_core(tmp_path / "megatron/iter_0000001")(TEXTS)
    following, beyond = further.logits(model, layer, Further.beyond, TEXTS)
    assert min(following.std(), beyond.std()) > 0.1
    torch.testing.assert_close(found[0][..., :97], following, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1][:, :-1, :97], beyond, atol=1e-4, rtol=1e-4)


def test_a_model_comes_back_as_it_went(ling, tmp_path):
    folder, _, _ = ling
    assert carnet.cross(folder, tmp_path / "megatron", to="megatron", tp=2, pp=2).equal
    assert carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf", family="bailing_moe_v2").equal
    before, after = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    # what says nothing about the model: of training, or of windows that there are not
    idle = {"max_window_layers", "output_dropout", "attention_dropout", "mtp_loss_scaling_factor", "rope_scaling"}
    said = json.loads((tmp_path / "back/config.json").read_text())
    assert {key: said[key] for key in LING if key not in idle} == {key: LING[key] for key in LING if key not in idle}


def test_a_store_of_it_is_a_model_of_glm_4_5_as_well(ling, loaded, tmp_path):
    folder, model, _ = ling
    assert carnet.cross(folder, tmp_path / "megatron", to="megatron", drop=("model.layers.3.*",)).equal
    assert carnet.cross(tmp_path / "megatron", tmp_path / "glm4", to="hf", family="glm4_moe").equal
    with torch.no_grad():
        found, expected = (each(TEXTS, use_cache=False).logits for each in (loaded(tmp_path / "glm4"), model))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("score_function", "softmax"),
        ("moe_router_enable_expert_bias", False),
        ("use_rmsnorm", False),
        ("use_bias", True),
        ("norm_topk_prob", False),
        ("rotary_dim", 24),
        ("norm_head", True),
        ("moe_shared_expert_intermediate_size", 24),
        ("use_sliding_window", True),
    ],
)
def test_what_the_class_or_vllm_computes_otherwise_is_refused_by_name(key, said):
    with pytest.raises(CarnetError) as caught:
        recognise("hf", {**LING, key: said}, "config.json", {})
    assert key in str(caught.value) + str(caught.value.facts)


def test_keys_that_are_not_there_are_what_the_hub_s_class_takes_them_for():
    # the defaults of configuration_bailing_moe_v2.py, and of the attention in modeling_bailing_moe_v2.py
    absent = {"use_qk_norm": True, "use_qkv_bias": False, "tie_word_embeddings": False, "num_nextn_predict_layers": 0}
    absent |= {"num_key_value_heads": 4, "head_dim": 128, "rope_theta": 600000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    absent |= {"first_k_dense_replace": 1, "num_shared_experts": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 1.0}
    absent |= {"partial_rotary_factor": 1.0, "pad_token_id": 156892, "eos_token_id": 156892}
    few = {key: said for key, said in LING.items() if key not in {*absent, "rotary_dim"}}
    assert recognise("hf", few, "config.json", {}) == recognise("hf", {**few, **absent}, "config.json", {})

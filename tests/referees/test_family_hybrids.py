"""Mamba-2 and its hybrids: what transformers saved comes back from Megatron tensor by tensor, and computes the same bits."""

import pytest
from transformers import Mamba2Config, NemotronHConfig

import carnet
from carnet.errors import BadRequest, NotSupported

pytestmark = [
    pytest.mark.referee,
    pytest.mark.filterwarnings("ignore:.*falling back to its reference PyTorch implementation"),
]

STATE = {"conv_kernel": 4, "n_groups": 2}
MAMBA2 = {"vocab_size": 97, "hidden_size": 40, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 10, "state_size": 12}
HYBRID = {
    "vocab_size": 97,
    "hidden_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 56,
    "mamba_num_heads": 6,
    "mamba_head_dim": 14,
    "ssm_state_size": 12,
    "max_position_embeddings": 128,
}
EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
}
M, A, P, E = "linear_attention", "full_attention", "mlp", "moe"
MODELS = {
    "mamba2": Mamba2Config(**MAMBA2, **{**STATE, "n_groups": 1}, tie_word_embeddings=False),
    "mamba2, tied": Mamba2Config(**MAMBA2, **{**STATE, "n_groups": 1}, tie_word_embeddings=True),
    "nemotron_h": NemotronHConfig(**HYBRID, **STATE, layers_block_type=[M, P, M, A, P]),
    "nemotron_h with mixtures": NemotronHConfig(
        **HYBRID, **STATE, **EXPERTS, layers_block_type=[M, E, A, E], n_group=2, topk_group=1, routed_scaling_factor=2.5
    ),
    "nemotron_h with latent mixtures": NemotronHConfig(
        **HYBRID, **STATE, **EXPERTS, layers_block_type=[M, E, A, E], moe_latent_size=16
    ),
    "nemotron_h of every kind": NemotronHConfig(
        **HYBRID, **STATE, **EXPERTS, layers_block_type=[E, M, A, P, M], norm_topk_prob=True
    ),
    "nemotron_h without attention": NemotronHConfig(**HYBRID, **STATE, layers_block_type=[M, P]),
}
# what a config says of blocks that the model has none of does not come back
IDLE = {
    "nemotron_h without attention": {"num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"},
}


@pytest.mark.parametrize("cut", [{"tp": 2, "pp": 2}, {"ep": 2, "spelling": "local"}], ids=["tp 2 pp 2", "ep 2"])
@pytest.mark.parametrize("which", MODELS)
def test_a_hybrid_comes_back_from_megatron(which, cut, there_and_again):
    if "mamba2" in which and "tp" in cut:
        cut = {"pp": 2}  # one group for all heads is not cut
    there_and_again(MODELS[which], {"to": "megatron", **cut}, spelled_otherwise=IDLE.get(which, ()))


def test_heads_that_share_one_group_are_not_cut(saved, tmp_path):
    with pytest.raises(BadRequest, match="'group'"):
        carnet.cross(saved(MODELS["mamba2"]), tmp_path / "out", to="megatron", tp=2)
    assert not (tmp_path / "out").exists()


def test_a_norm_over_all_groups_is_not_taken_for_one_over_each(saved, tmp_path):
    grouped = Mamba2Config(**MAMBA2, **{**STATE, "n_groups": 2})
    with pytest.raises(NotSupported, match="ssm_norm_groups"):
        carnet.cross(saved(grouped), tmp_path / "out", to="megatron")

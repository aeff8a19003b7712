"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, a mixture with a weighed shared expert in each.

transformers: modeling_qwen3_next.py. Rows of its projections are grouped by key head, and by query head. All norms scale by one more
than they store, but for the one that is gated. Layers that predict further tokens have no class there, and no word in the config.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import fuse, row
from carnet.dialects.senses import expect
from carnet.model.fields import MIXED, Config
from carnet.model.model import blocks, mixtures, number

ATTENTION = (
    fuse(LAYER + "self_attn.q_proj.weight", "(kv rep *) hidden", {"attention.q": "dim", "attention.gate": "dim"}),
    fuse(LAYER + "self_attn.q_proj.bias", "(kv rep *)", {"attention.q_bias": "dim", "attention.gate_bias": "dim"}),
    *(row for row in hf.ATTENTION if ".q_proj." not in row.name),
    *hf.QK_NORMS,
)
DELTA = LAYER + "linear_attn."
QKVZ = {"gdn.q": "key_dim", "gdn.k": "key_dim", "gdn.v": "value value_dim", "gdn.z": "value value_dim"}
CONV = {"gdn.conv_q": "key key_dim", "gdn.conv_k": "key key_dim", "gdn.conv_v": "key value value_dim"}
DELTA_NET = (
    fuse(DELTA + "in_proj_qkvz.weight", "(key *) hidden", QKVZ),
    fuse(DELTA + "in_proj_ba.weight", "(key *) hidden", {"gdn.b": "value", "gdn.a": "value"}),
    fuse(DELTA + "conv1d.weight", "* 1 gdn_conv", CONV),
    row(DELTA + "dt_bias", "(key value)", "gdn.dt_bias"),
    row(DELTA + "A_log", "(key value)", "gdn.a_log"),
    row(DELTA + "norm.weight", "value_dim", "gdn.out_norm", whole=True),
    row(DELTA + "out_proj.weight", "hidden (key value value_dim)", "gdn.o"),
)
MIXTURE = (
    *hf.experts(),
    *hf.gated("mlp.shared_expert", "shared", "shared_ffn"),
    row(LAYER + "mlp.shared_expert_gate.weight", "1 hidden", "shared.weigh"),
)
KINDS = ("linear_attention", "full_attention")


def _blocks(said: tuple[list[int] | None, int, list[str] | None, int], config: Config) -> str | None:
    """Return the blocks: mixtures as in other Qwens; layers are of the kinds that are listed, or every so manieth attends."""
    without, step, listed, every = said
    count = number(config, "layers")
    expect(listed or every, "a step")
    attends = hf.marks_of(listed, config, KINDS) if listed else [(layer + 1) % every == 0 for layer in range(count)]
    return mixtures(hf.mixed(without, step, config), "".join("G*"[mark] for mark in attends))


QWEN3_NEXT = Family(
    name="qwen3_next",
    needs=MIXED,
    traits={**LLAMA_TRAITS, "activation": "silu", "qk_norm": "head", "attention_gate": True, "shared_gate": True},
    hf=hf.dialect(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        (hf.EMBED, *hf.NORMS, *ATTENTION, *DELTA_NET, *hf.GATED_MLP, *MIXTURE, hf.FINAL_NORM, hf.HEAD),
        (
            *hf.LLAMA_FIELDS,
            hf.rope_percent(0.25),
            *hf.ATTENTION_BIASES,
            hf.TIED,
            place("linear_kind", default="gdn"),
            place("gdn_conv", "linear_conv_kernel_dim", default=4),
            place("gdn_key_dim", "linear_key_head_dim", default=128),
            place("gdn_value_dim", "linear_value_head_dim", default=128),
            place("gdn_keys", "linear_num_key_heads", default=16),
            place("gdn_values", "linear_num_value_heads", default=32),
            place("experts", "num_experts", default=512),
            place("topk", "num_experts_per_tok", default=10),
            place("moe_ffn", "moe_intermediate_size", default=512),
            place("shared_ffn", "shared_expert_intermediate_size", default=512),
            place("router_normed", "norm_topk_prob", default=True),
            Spread(
                *("blocks", "mlp_only_layers", (list[int], 1, list[str], 4), _blocks),
                lambda c: ((hf.dense(c), 1, [KINDS["*" in word] for word in blocks(c)], None),),
                more=("decoder_sparse_step", "layer_types", "full_attention_interval"),
            ),
        ),
        absent={"num_key_value_heads": 2, "head_dim": 256},
        fixed={"hidden_act": "silu"},
        ignored="output_router_logits router_aux_loss_coef use_sliding_window",
        zero_centred=True,
        dropped={"mtp.*": "layers that predict further tokens: transformers leaves them out, too"},
    ),
    trtllm=None,
)

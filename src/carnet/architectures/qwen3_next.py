"""Qwen3-Next, and the text models of Qwen3.5 and 3.6: three layers of Gated DeltaNet to one of gated attention.

transformers: modeling_qwen3_next.py, modeling_qwen3_5.py, modeling_qwen3_5_moe.py. Rows of Qwen3-Next's projections are grouped by key
head, those of Qwen3.5 lie apart; all are grouped by query head. All norms scale by one more than they store, but for the one that is
gated. A mixture has a weighed shared expert beside the others.
"""

from collections.abc import Iterator
from dataclasses import replace

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import gdn, hf, vllm
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.further import EMBED_FIRST
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import Dialect, Row, fuse, row
from carnet.dialects.senses import expect
from carnet.model.fields import MIXED, Config
from carnet.model.model import blocks, mixtures, number, unlike_last

ATTENTION = (
    fuse(LAYER + "self_attn.q_proj.weight", "(kv rep *) hidden", {"attention.q": "dim", "attention.gate": "dim"}),
    fuse(LAYER + "self_attn.q_proj.bias", "(kv rep *)", {"attention.q_bias": "dim", "attention.gate_bias": "dim"}),
    *(row for row in hf.ATTENTION if ".q_proj." not in row.name),
    *hf.QK_NORMS,
)
DELTA = LAYER + "linear_attn."
BY_KEY_HEAD, APART, DELTA_NET = (gdn.within(DELTA, rows) for rows in (gdn.BY_KEY_HEAD, gdn.APART, gdn.ROWS))
SHARED = (
    *hf.gated("mlp.shared_expert", "shared", "shared_ffn"),
    row(LAYER + "mlp.shared_expert_gate.weight", "1 hidden", "shared.weigh"),
)
# transformers leaves the layer for a further token out: vLLM's qwen3_next_mtp.py and qwen3_5_mtp.py, which join the normed embedding
# and the normed hidden state in this order
FURTHER = (
    row("/mtp.pre_fc_norm_embedding.weight", "hidden", "mtp.embed_norm"),
    row("/mtp.pre_fc_norm_hidden.weight", "hidden", "mtp.hidden_norm"),
    fuse("/mtp.fc.weight", "hidden *", EMBED_FIRST),
    row("/mtp.norm.weight", "hidden", "mtp.final_norm"),
)
KINDS = ("linear_attention", "full_attention")
TRAITS: Config = {**LLAMA_TRAITS, "activation": "silu", "qk_norm": "head", "attention_gate": True}
FIELDS: tuple[Field, ...] = (
    *hf.ATTENTION_BIASES,
    hf.TIED,
    place("variant", default="gdn"),
    place("gdn_conv", "linear_conv_kernel_dim", default=4),
    place("gdn_key_dim", "linear_key_head_dim", default=128),
    place("gdn_value_dim", "linear_value_head_dim", default=128),
    place("gdn_keys", "linear_num_key_heads", default=16),
    place("gdn_values", "linear_num_value_heads", default=32),
)
# vllm 0.32 model_executor/models/qwen3_next.py, qwen3_5.py, layers/mamba/gdn/qwen_gdn_linear_attn.py
ENGINE = vllm.Spelling(
    everywhere=("embed",),
    aliases={**vllm.ROUTER, **vllm.WEIGHED},
    rows=(row(DELTA + "A_log", "(key value)", "gdn.a_log", cut="key", dtype="f32"),),
    fixed={"attention_bias": False},  # it asks for qkv_bias, a key of no class of transformers', and o_proj never has one
)


def _further(config: Config) -> str | None:
    """Return what the layer for a further token is: it attends, and has the MLP of the first of the layers, whose number is its own."""
    return unlike_last(["*" + blocks(config)[0][-1]], config)


def _mtp(key: str) -> tuple[Field, ...]:
    """Write the rows of the layer for a further token: one norm and one projection stand before it, so that there is no second."""
    return (
        place("mtp", key, default=0, words=((0, 0), (1, 1)), omit=True),
        place("mtp_blocks", default=_further),
    )


def _mixture(experts: int, topk: int) -> tuple[Field, ...]:
    return (
        place("experts", "num_experts", default=experts),
        place("topk", "num_experts_per_tok", default=topk),
        place("moe_ffn", "moe_intermediate_size", default=512),
        place("shared_ffn", "shared_expert_intermediate_size", default=512),
    )


def _mixers(listed: list[str] | None, every: int, config: Config) -> str:
    """Return a letter a layer: of the kinds that are listed, or every so manieth attends."""
    expect(listed or every > 0, "a step")
    attends = hf.marks_of(listed, config, KINDS) if listed else hf.every(every, number(config, "layers"))
    return "".join("G*"[mark] for mark in attends)


def _listed(config: Config) -> list[str]:
    return [KINDS["*" in word] for word in blocks(config)]


def _blocks(said: tuple[list[int] | None, int, list[str] | None, int], config: Config) -> str | None:
    """Return the blocks: mixtures as in other Qwens."""
    without, step, listed, every = said
    return mixtures(hf.mixed(without, step, config), _mixers(listed, every, config))


QWEN3_NEXT = Family(
    name="qwen3_next",
    vllm=replace(ENGINE, everywhere=("embed", "head"), ties=False),
    needs=MIXED,
    traits={**TRAITS, "shared_gate": True},
    hf=hf.dialect(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        (
            *(hf.EMBED, *hf.NORMS, *ATTENTION, *BY_KEY_HEAD, *DELTA_NET),
            *(*hf.GATED_MLP, *hf.experts(), *SHARED, hf.FINAL_NORM, hf.HEAD, *FURTHER),
        ),
        (
            *hf.LLAMA_FIELDS,
            hf.rope_percent(0.25),
            *FIELDS,
            *_mixture(512, 10),
            place("router_normed", "norm_topk_prob", default=True),
            Spread(
                *("blocks", "mlp_only_layers", (list[int], 1, list[str], 4), _blocks),
                lambda c: ((hf.dense(c), 1, _listed(c), None),),
                more=("decoder_sparse_step", "layer_types", "full_attention_interval"),
            ),
            *_mtp("num_nextn_predict_layers"),
        ),
        absent={"num_key_value_heads": 2, "head_dim": 256},
        fixed={"hidden_act": "silu"},
        ignored="output_router_logits router_aux_loss_coef use_sliding_window",
        zero_centred=True,
        further=(LAYER, "/mtp.layers.{layer}."),
    ),
    trtllm=None,
)


FFN = place("ffn", "intermediate_size")
ROPED: tuple[Field, ...] = (
    *(field for field in hf.LLAMA_FIELDS if field not in hf.ROPE and field != FFN),
    *hf.ROPE_PARAMETERS,
    place("rope_percent", "rope_parameters.partial_rotary_factor", "partial_rotary_factor", default=0.25),
)


def _kinds(config: Config) -> Iterator[tuple[list[str], int | None]]:
    """Yield the list, with the step that says the same: transformers reads the one, SGLang the other."""
    listed = _listed(config)
    yield from ((listed, step) for step in ([*listed, KINDS[1]].index(KINDS[1]) + 1, None))


def _layers(mixed: bool) -> Spread:
    """Return the row of the blocks, all of them mixtures or none."""

    def meaning(said: tuple[list[str] | None, int], config: Config) -> str | None:
        mixers = _mixers(*said, config)
        return mixtures([mixed] * len(mixers), mixers) if "G" in mixers else None

    return Spread("blocks", "layer_types", (list[str], 4), meaning, _kinds, more=("full_attention_interval",))


def _hf(architecture: str, model_type: str, rows: tuple[Row, ...], fields: tuple[Field, ...], kv_heads: int) -> Dialect:
    """Write the dialect of Qwen3.5, as published: rotary positions below one key."""
    return hf.dialect(
        architecture,
        model_type,
        (hf.EMBED, *hf.NORMS, *ATTENTION, *APART, *DELTA_NET, *rows, hf.FINAL_NORM, hf.HEAD, *FURTHER),
        (*ROPED, *FIELDS, *fields, *_mtp("mtp_num_hidden_layers")),
        absent={"num_key_value_heads": kv_heads, "head_dim": 256},
        fixed={"hidden_act": "silu"},
        written={"rope_parameters.rope_type": "default", "mamba_ssm_dtype": "float32"},
        guards={
            "mlp_only_layers": ([],),
            "attn_output_gate": (True,),
            "output_gate_type": ("swish", "silu"),
            "mtp_use_dedicated_embeddings": (False,),
        },
        ignored="output_router_logits router_aux_loss_coef intermediate_size",
        zero_centred=True,
        further=(LAYER, "/mtp.layers.{layer}."),
    )


QWEN3_5 = Family(
    name="qwen3_5",
    vllm=ENGINE,
    traits=TRAITS,
    hf=_hf("Qwen3_5ForCausalLM", "qwen3_5_text", hf.gated("mlp", "mlp", "ffn"), (FFN, _layers(mixed=False)), 4),
    trtllm=None,
)
QWEN3_5_MOE = Family(
    name="qwen3_5_moe",
    vllm=ENGINE,
    needs=MIXED,
    traits={**TRAITS, "shared_gate": True},
    hf=_hf(
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        (*hf.stacked(), *SHARED),
        (
            *_mixture(256, 8),
            place("ffn", default=lambda c: c["moe_ffn"]),
            place("router_normed", default=True),
            _layers(mixed=True),
        ),
        2,
    ),
    trtllm=None,
)

"""ERNIE-4.5: Llama that rotates neighbouring dimensions of a head together; its mixtures score by a softmax and choose by a bias, too.

transformers: modeling_ernie4_5.py, modeling_ernie4_5_moe.py.
"""

from collections.abc import Iterator
from dataclasses import replace

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import fine_grained, hf, vllm
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import row
from carnet.dialects.senses import expect
from carnet.model.fields import MIXED, Config
from carnet.model.model import marks, mixtures, number

ERNIE4_5 = Family(
    name="ernie4_5",
    vllm=vllm.LLAMA,
    traits={**LLAMA_TRAITS, "rope_interleaved": True},
    hf=hf.dialect(
        "Ernie4_5ForCausalLM",
        "ernie4_5",
        hf.LLAMA_ROWS,
        (
            *hf.LLAMA_FIELDS,
            *(place(name, "use_bias", default=False) for name in ("qkv_bias", "out_bias", "mlp_bias")),
            hf.TIED,
        ),
        absent={
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
    ),
    trtllm=None,
)

ROUTER, *EXPERTS = fine_grained.ROWS
# as published: transformers leaves them out, and they end without a norm of their own (vLLM's models/ernie_mtp.py)
FURTHER = {"model.mtp_*": "layers that predict further tokens: transformers leaves them out, too"}


def _blocks(said: tuple[int, int, int], config: Config) -> str | None:
    """Return the blocks: each so manieth layer is a mixture, from one to another."""
    first, last, step = said
    count = number(config, "layers")
    expect(step > 0, "a step")
    last = count - 1 if last == -1 else last
    return mixtures([(layer + 1) % step == 0 and first <= layer <= last for layer in range(count)])


def _spelled(config: Config) -> Iterator[tuple[int, int, int]]:
    found = marks(config)
    mixed = [layer for layer, mark in enumerate(found) if mark] or [len(found)]
    yield from ((mixed[0], mixed[-1], step) for step in range(1, len(found) + 1))


ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    vllm=replace(vllm.GLM, ties=True),
    needs=MIXED,
    traits={**LLAMA_TRAITS, "rope_interleaved": True, "router_bias": True},
    hf=hf.dialect(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        (
            *(hf.EMBED, *hf.NORMS, *hf.ATTENTION, *hf.gated("mlp", "mlp", "ffn")),
            *(replace(ROUTER, dtype="f32"), *EXPERTS),
            row(LAYER + "mlp.moe_statics.e_score_correction_bias", "1 expert", "moe.router_bias", dtype="f32"),
            *(hf.FINAL_NORM, hf.HEAD),
        ),
        (
            *(*hf.LLAMA_FIELDS, hf.TIED),
            *fine_grained.sizes("moe_num_shared_experts", "moe_num_experts", "num_experts", topk="moe_k"),
            Spread(
                *("blocks", "moe_layer_start_index", (1, -1, 1), _blocks, _spelled),
                more=("moe_layer_end_index", "moe_layer_interval"),
            ),
            place("router_normed", default=True),
            place("router_wide", default=True),
        ),
        absent={
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "moe_num_experts": 64,
            "moe_k": 6,
            "moe_intermediate_size": 1536,
            "moe_num_shared_experts": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        fixed={"use_bias": False},  # its experts would have one, too
        guards={"use_rmsnorm": (True,), "moe_gate": ("topk",), "compression_ratio": (1.0,)},  # as published models say
        ignored=f"{fine_grained.IGNORED} moe_norm_min num_nextn_predict_layers moe_capacity moe_use_aux_free",
        pads=fine_grained.PADS,
        dropped=FURTHER,
    ),
    trtllm=None,
)

"""GPT-OSS: a mixture in every layer with biases everywhere, a score that goes to no token, a window in every other layer.

transformers: modeling_gpt_oss.py. All experts of a layer are one tensor, [expert, in, out], in which the columns of gate and up
projection alternate. The gate is x sigmoid(1.702 x) whatever ``hidden_act`` says. As published the experts are MXFP4 codes, each
tensor turned: [expert, out, in].
"""

from dataclasses import replace

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, vllm
from carnet.dialects.configs import Place, Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import fuse, row
from carnet.model.fields import MIXED, Config
from carnet.model.model import number

EXPERTS = LAYER + "mlp.experts."
ROWS = (
    *(hf.EMBED, *hf.NORMS, *hf.ATTENTION),
    row(LAYER + "self_attn.sinks", "(kv rep)", "attention.sinks"),
    row(LAYER + "mlp.router.weight", "expert hidden", "moe.router"),
    row(LAYER + "mlp.router.bias", "expert", "moe.router_shift"),
    fuse(EXPERTS + "gate_up_proj", "expert moe_hidden (moe_ffn *)", {"moe.gate": "", "moe.up": ""}),
    fuse(EXPERTS + "gate_up_proj_bias", "expert (moe_ffn *)", {"moe.gate_bias": "", "moe.up_bias": ""}),
    row(EXPERTS + "down_proj", "expert moe_ffn moe_hidden", "moe.down"),
    row(EXPERTS + "down_proj_bias", "expert moe_hidden", "moe.down_bias"),
    *(hf.FINAL_NORM, hf.HEAD),
)
# the type is always said: transformers takes a config without it for YaRN
ROPE = tuple(
    replace(field, default=..., omit=False) if isinstance(field, Place) and field.field == "rope_type" else field
    for field in hf.rope("rope_scaling", "rope_parameters", types=("default", "yarn"))
)


def _windows(said: list[str] | None, config: Config) -> tuple[int, ...]:
    """Return a mark a layer, 1 for each with the window: where nothing is said, every other from the first."""
    if said is None:
        return tuple(1 - layer % 2 for layer in range(number(config, "layers")))
    return hf.marks_of(said, config)


# vllm 0.32 model_executor/models/gpt_oss.py: gate and up alternate still, inputs are last; a bias of what ranks add up is one rank's
ROUTED = LAYER + "mlp.experts.routed_experts."
ENGINE = vllm.Spelling(
    everywhere=vllm.AROUND,
    ties=False,
    renames={"embed_tokens.": "embedding.", ".self_attn.": ".attn."},
    rows=(
        fuse(ROUTED + "w13_weight", "expert (moe_ffn *) moe_hidden", {"moe.gate": "", "moe.up": ""}, cut="expert"),
        fuse(ROUTED + "w13_bias", "expert (moe_ffn *)", {"moe.gate_bias": "", "moe.up_bias": ""}, cut="expert"),
        row(ROUTED + "w2_weight", "expert moe_hidden moe_ffn", "moe.down", cut="expert"),
        row(ROUTED + "w2_bias", "expert moe_hidden", "moe.down_bias", cut="once"),
    ),
)

GPT_OSS = Family(
    name="gpt_oss",
    vllm=ENGINE,
    needs=MIXED,
    traits={
        **LLAMA_TRAITS,
        "activation": "gelu_quick",
        "glu_offset": 1.0,
        "sinks": True,
        "router_shift": True,
        "moe_bias": True,
    },
    hf=hf.dialect(
        "GptOssForCausalLM",
        "gpt_oss",
        ROWS,
        (
            *hf.SAID_SIZES,
            place("moe_ffn", "intermediate_size"),
            place("norm_eps", "rms_norm_eps", default=1e-5),
            place("rope_theta", "rope_theta", "rope_parameters.rope_theta", default=150000.0),
            *ROPE,
            place("qkv_bias", "attention_bias", default=True),
            place("out_bias", "attention_bias", default=True),
            place("experts", "num_local_experts", "num_experts"),
            place("topk", "num_experts_per_tok", "experts_per_token"),
            place("router_normed", default=True),
            place("glu_limit", "swiglu_limit", default=7.0),
            place("window", "sliding_window", default=128),
            Spread("window_layers", "layer_types", list[str], _windows, lambda c: hf.kinds_of(c, "window_layers")),
            hf.TIED,
            hf.DTYPE,
            *hf.TOKENS,
        ),
        fixed={"hidden_act": "silu", "swiglu_alpha": 1.702},
        ignored="output_router_logits router_aux_loss_coef initial_context_length",
    ),
    trtllm=None,
)

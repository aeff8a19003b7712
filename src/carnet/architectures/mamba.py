"""Mamba, the first: a layer is one mixer of states alone, whose channels each have a state, a step and decays of their own.

transformers: modeling_mamba.py. x and z are rows of one projection; the low rank of the steps, B and C are rows of another, which reads
what the convolution makes of x.
"""

from carnet.architectures.family import Family
from carnet.dialects import hf, trtllm, trtllm_mamba
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import fuse, row
from carnet.dialects.senses import expect
from carnet.dialects.trtllm_mamba import SSM
from carnet.model.fields import Config, Value
from carnet.model.model import number

MIXER = LAYER + "mixer."
STEPS = {"s6.dt_low": "dt_rank", "s6.b": "state", "s6.c": "state"}
TRAITS: dict[str, Value] = {"norm": "rms", "hybrid": True}
ALL_ALIKE = place("blocks", default=lambda c: " ".join("S" * number(c, "layers")))


def _channels(expand: int, config: Config) -> int:
    return expand * number(config, "hidden")


def _expansion(config: Config) -> list[object]:
    return [number(config, "ssm_channels") // number(config, "hidden")]


def _alike(said: tuple[int, int, int], _: Config) -> int:
    expect(len(set(said)) == 1, "the channels three times")
    return said[0]


# tensorrt_llm 0.16 to 1.2, models/mamba/{config,convert}.py: every rank would hold all of a Mamba-1, examples' README: one GPU
RANKS = trtllm_mamba.dialect(
    "Mamba1",
    (
        row("vocab_embedding.weight", "vocab hidden", "embed"),
        row(trtllm.LAYER + "input_layernorm.weight", "hidden", "attention_norm"),
        row(SSM + "in_proj_x.weight", "channel hidden", "s6.x"),
        row(SSM + "in_proj_z.weight", "channel hidden", "s6.z"),
        row(SSM + "conv1d.weight", "channel 1 conv 1", "s6.conv"),
        row(SSM + "conv1d.bias", "channel", "s6.conv_bias"),
        fuse(SSM + "x_proj.weight", "* channel", STEPS),
        row(SSM + "dt_proj.weight", "channel dt_rank", "s6.dt"),
        row(SSM + "dt_bias", "channel", "s6.dt_bias", dtype="f32"),
        row(SSM + "A", "state channel", "s6.a", dtype="f32"),
        row(SSM + "D", "channel", "s6.d", dtype="f32"),
        row(SSM + "out_proj.weight", "hidden channel", "s6.o"),
        row("ln_f.weight", "hidden", "final_norm"),
        row("/lm_head.weight", "vocab hidden", "head"),
    ),
    (
        *trtllm.ONE_RANK,
        *trtllm_mamba.sizes(),
        ALL_ALIKE,
        Spread(
            *("ssm_channels", "rnn_hidden_size", (int, int, int), _alike, lambda c: ((c["ssm_channels"],) * 3,)),
            more=("intermediate_size", "rnn_conv_dim_size"),
        ),
        place("ssm_dt_rank", default=lambda c: -(-number(c, "hidden") // 16)),
        place("ssm_state", "state_size"),
    ),
    fixed={},
    written={"num_attention_heads": 1, "num_key_value_heads": 1},
)

FAMILY = Family(
    name="mamba",
    traits=TRAITS,
    hf=hf.dialect(
        "MambaForCausalLM",
        "mamba",
        (
            row("embeddings.weight", "vocab hidden", "embed"),
            row(LAYER + "norm.weight", "hidden", "attention_norm"),
            fuse(MIXER + "in_proj.weight", "* hidden", {"s6.x": "channel", "s6.z": "channel"}),
            row(MIXER + "conv1d.weight", "channel 1 conv", "s6.conv"),
            row(MIXER + "conv1d.bias", "channel", "s6.conv_bias"),
            fuse(MIXER + "x_proj.weight", "* channel", STEPS),
            row(MIXER + "dt_proj.weight", "channel dt_rank", "s6.dt"),
            row(MIXER + "dt_proj.bias", "channel", "s6.dt_bias"),
            row(MIXER + "A_log", "channel state", "s6.a_log"),
            row(MIXER + "D", "channel", "s6.d"),
            row(MIXER + "out_proj.weight", "hidden channel", "s6.o"),
            row("norm_f.weight", "hidden", "final_norm"),
            hf.HEAD,
        ),
        (
            place("layers", "num_hidden_layers", default=32),
            ALL_ALIKE,
            place("hidden", "hidden_size", default=768),
            place("vocab", "vocab_size", default=50280),
            place("norm_eps", "layer_norm_epsilon", default=1e-5),
            Spread("ssm_channels", "expand", 2, _channels, _expansion),
            place("ssm_dt_rank", "time_step_rank", default=lambda c: -(-number(c, "hidden") // 16)),
            place("ssm_state", "state_size", default=16),
            place("ssm_conv", "conv_kernel", default=4),
            place("ssm_conv_bias", "use_conv_bias", default=True),
            place("tied", "tie_word_embeddings", default=True),
            hf.DTYPE,
            *hf.TOKENS,
        ),
        fixed={"hidden_act": "silu"},
        guards={"use_bias": (False,), "rms_norm": (True,)},
        ignored="intermediate_size time_step_min time_step_max time_step_floor time_step_scale time_step_init_scheme "
        "residual_in_fp32 rescale_prenorm_residual use_mambapy use_associative_scan",
        prefixes=("backbone.", "model.", ""),
    ),
    trtllm=RANKS,
)

"""Mamba-2 and its hybrids: a layer is one block alone, a Mamba-2 mixer, attention without positions, an MLP or a mixture.

transformers: modeling_mamba2.py, modeling_nemotron_h.py. In both, z, x, B, C and dt are rows of one projection, x, B and C channels
of one convolution. Mamba-2's gated norm takes all channels at once, Nemotron-H's and Megatron's each group for itself.
"""

from collections.abc import Callable

from carnet.architectures.family import Family
from carnet.dialects import hf, trtllm, trtllm_mamba, vllm
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.further import EMBED_FIRST
from carnet.dialects.hf import LAYER
from carnet.dialects.mamba import CONV, CONV_BIAS, IN_PROJ
from carnet.dialects.rows import biased, fuse, row
from carnet.dialects.senses import expect
from carnet.dialects.trtllm_mamba import SSM
from carnet.model.fields import Config, Value
from carnet.model.model import blocks, further_blocks, number, unlike_last

MIXER = LAYER + "mixer."
MAMBA = (
    row("embeddings.weight", "vocab hidden", "embed"),
    row(LAYER + "norm.weight", "hidden", "attention_norm"),
    fuse(MIXER + "in_proj.weight", "* hidden", IN_PROJ),
    fuse(MIXER + "conv1d.weight", "* 1 conv", CONV),
    fuse(MIXER + "conv1d.bias", "*", CONV_BIAS),
    row(MIXER + "dt_bias", "(group head)", "mamba.dt_bias"),
    row(MIXER + "A_log", "(group head)", "mamba.a_log"),
    row(MIXER + "D", "(group head)", "mamba.d"),
    row(MIXER + "norm.weight", "(group head wide)", "mamba.gated_norm", whole=True),
    row(MIXER + "out_proj.weight", "hidden (group head wide)", "mamba.o"),
    row("norm_f.weight", "hidden", "final_norm"),
    hf.HEAD,
)
ROWS = (
    *MAMBA,
    row(LAYER + "norm.weight", "hidden", "mlp_norm", when={"mixer": ""}),  # a layer has one of the two
    row(MIXER + "q_proj.weight", "(kv rep dim) hidden", "attention.q"),
    row(MIXER + "k_proj.weight", "(kv dim) hidden", "attention.k"),
    row(MIXER + "v_proj.weight", "(kv dim) hidden", "attention.v"),
    row(MIXER + "o_proj.weight", "hidden (kv rep dim)", "attention.o"),
    *biased(MIXER + "up_proj", "ffn hidden", "mlp.up"),
    *biased(MIXER + "down_proj", "hidden ffn", "mlp.down"),
    row(MIXER + "gate.weight", "expert hidden", "moe.router"),
    row(MIXER + "gate.e_score_correction_bias", "expert", "moe.router_bias", dtype="f32"),
    row(MIXER + "fc1_latent_proj.weight", "moe_hidden hidden", "moe.latent_in"),
    row(MIXER + "fc2_latent_proj.weight", "hidden moe_hidden", "moe.latent_out"),
    row(MIXER + "experts.{expert}.up_proj.weight", "moe_ffn moe_hidden", "moe.up"),
    row(MIXER + "experts.{expert}.down_proj.weight", "moe_hidden moe_ffn", "moe.down"),
    row(MIXER + "shared_experts.up_proj.weight", "shared_ffn hidden", "shared.up"),
    row(MIXER + "shared_experts.down_proj.weight", "hidden shared_ffn", "shared.down"),
    # numbered on from one further token to the next; what stands around them lies in the first and the last: Megatron-Bridge's
    # nemotron_h_bridge.py
    row("/mtp.layers.{layer}.enorm.weight", "hidden", "mtp.embed_norm"),
    row("/mtp.layers.{layer}.hnorm.weight", "hidden", "mtp.hidden_norm"),
    fuse("/mtp.layers.{layer}.eh_proj.weight", "hidden *", EMBED_FIRST),
    row("/mtp.layers.{layer}.final_layernorm.weight", "hidden", "mtp.final_norm"),
)

# the kinds of a layer in transformers, in its words of 5.20 and of before, and their letters in NVIDIA's published configs
KINDS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E"}
WORDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def _pattern(kinds: list[str] | None, letters: str | None) -> str:
    """Return a letter a layer, from the list of kinds or from the pattern; both must agree where both are there."""
    listed = letters if kinds is None else "".join(KINDS.get(kind, "?") for kind in kinds)
    expect(listed and set(listed) <= set(WORDS) and letters in {None, listed}, "a kind for each layer")
    return listed or ""


def _spelled(config: Config, words: Callable[[Config], list[str]] = blocks) -> tuple[list[str], str]:
    letters = "".join(words(config))
    expect(set(letters) <= set(WORDS), "layers of these kinds")
    return [WORDS[letter] for letter in letters], letters


def _further(said: tuple[list[str] | None, str | None], config: Config) -> str | None:
    """Return what the layers for one further token are; transformers' config says the same where none is said."""
    return unlike_last(_pattern(*said) if any(said) else "*E", config) if number(config, "mtp") else None


def _further_spelled(config: Config) -> list[tuple[object, object]]:
    return [_spelled(config, further_blocks) if number(config, "mtp") else (None, None)]


def _layers(said: tuple[list[str] | None, str | None, int | None], _: Config) -> int:
    kinds, letters, count = said
    found = len(_pattern(kinds, letters))
    expect(count in {None, found}, "a kind for each layer")
    return found


PATTERN = ("layers_block_type", "hybrid_override_pattern")
STATE: tuple[Field, ...] = (
    place("ssm_conv", "conv_kernel", default=4),
    place("ssm_groups", "n_groups", default=8),
    place("ssm_conv_bias", "use_conv_bias", default=True),
    place("ssm_norm_eps", default=lambda c: c["norm_eps"]),
)


def _expanded(said: tuple[int, int], config: Config) -> int:
    """Return the heads, which together are as wide as the expanded stream: transformers' Mamba2Config refuses any other number."""
    expand, heads = said
    wide = heads * number(config, "ssm_head_dim")
    expect(expand * number(config, "hidden") == wide, "heads as wide as the expanded stream")
    return heads


# as Python's json writes it, as transformers 5 does, and as published models do for whom JSON has no such number
INFINITE = float("inf"), {"__float__": "Infinity"}, 1e308
GUARDS: dict[str, tuple[object, ...]] = {
    "time_step_limit": tuple([0.0, spelled] for spelled in INFINITE),
    "use_bias": (False,),
}
IGNORED = "time_step_min time_step_max time_step_floor time_step_rank residual_in_fp32 rescale_prenorm_residual chunk_size"
TRAITS: dict[str, Value] = {"norm": "rms", "hybrid": True}


def _inner(said: tuple[int, int, int], config: Config) -> int:
    """Return the heads, of three widths: of their channels, once more, and with what the convolution sees beside them."""
    inner, again, channels = said
    beside = 2 * number(config, "ssm_groups") * number(config, "ssm_state")
    expect(inner == again and channels == inner + beside, "channels of the heads, and of all that the convolution sees")
    return inner // number(config, "ssm_head_dim")


def _widths(config: Config) -> tuple[int, int, int]:
    inner = number(config, "ssm_heads") * number(config, "ssm_head_dim")
    return inner, inner, inner + 2 * number(config, "ssm_groups") * number(config, "ssm_state")


# layers/ssm.py Mamba2, whose norm takes each group for itself
RANKS = trtllm_mamba.dialect(
    "Mamba2",
    (
        row("vocab_embedding.weight", "vocab hidden", "embed"),
        row(trtllm.LAYER + "input_layernorm.weight", "hidden", "attention_norm"),
        fuse(SSM + "in_proj.weight", "* hidden", IN_PROJ, cut="group"),
        fuse(SSM + "conv1d.weight", "* 1 conv 1", CONV, cut="group"),
        fuse(SSM + "conv1d.bias", "*", CONV_BIAS, cut="group"),
        row(SSM + "dt_bias", "(group head)", "mamba.dt_bias", cut="group", dtype="f32"),
        row(SSM + "A", "(group head)", "mamba.a", cut="group", dtype="f32"),
        row(SSM + "D", "(group head)", "mamba.d", cut="group", dtype="f32"),
        row(SSM + "norm.weight", "(group head wide)", "mamba.gated_norm", cut="group"),
        row(SSM + "out_proj.weight", "hidden (group head wide)", "mamba.o", cut="group"),
        row("ln_f.weight", "hidden", "final_norm"),
        row("/lm_head.weight", "vocab hidden", "head", cut="vocab"),
    ),
    (
        *trtllm_mamba.sizes("tp", "world"),
        *trtllm.ONE_STAGE,
        place("world", "num_attention_heads", default=lambda c: c["world"]),
        place("world", "num_key_value_heads", default=lambda c: c["world"]),
        place("blocks", default=lambda c: " ".join("M" * number(c, "layers"))),
        place("ssm_head_dim", "rnn_head_size", default=64),
        place("ssm_groups", "ngroups", default=1),
        place("ssm_state", "state_size"),
        Spread(
            *("ssm_heads", "rnn_hidden_size", (int, int, int), _inner, lambda c: (_widths(c),)),
            more=("intermediate_size", "rnn_conv_dim_size"),
        ),
        place("ssm_norm_groups", default=lambda c: c["ssm_groups"]),
        place("ssm_norm_eps", default=1e-5),
    ),
    fixed={"ssm_rmsnorm": True},
    written={"chunk_size": 256},
)

# vllm 0.32 model_executor/layers/mamba/mamba_mixer2.py; models/mamba2.py, nemotron_h.py
MIXED = (
    row(MIXER + "A", "(group head)", "mamba.a", cut="group", dtype="f32"),
    row(MIXER + "norm.weight", "(group head wide)", "mamba.gated_norm", cut="group", whole=True),
)
# the router is f32 where a device has no kernel for it (fused_moe/router/gate_linear.py), and takes what a file has in bf16
RUN = ".mixer" + vllm.RUN
PURE = vllm.Spelling(everywhere=vllm.AROUND, renames={"embed_tokens.": "embeddings."}, rows=MIXED)
HYBRID = vllm.Spelling(
    everywhere=vllm.AROUND,
    ties=False,
    prefix="model.",
    aliases={
        ".mixer.shared_experts.": RUN,
        ".mixer.gate.e_score_correction_bias": ".mixer.experts.routed_experts.e_score_correction_bias",
        ".mixer.fc1_latent_proj.": ".mixer.experts.routed_input_transform.",
        ".mixer.fc2_latent_proj.": ".mixer.experts.routed_output_transform.",
    },
    rows=MIXED,
)

MAMBA2 = Family(
    name="mamba2",
    vllm=PURE,
    traits=TRAITS,
    hf=hf.dialect(
        "Mamba2ForCausalLM",
        "mamba2",
        MAMBA,
        (
            place("layers", "num_hidden_layers"),
            place("blocks", default=lambda c: " ".join("M" * number(c, "layers"))),
            place("hidden", "hidden_size"),
            place("vocab", "vocab_size"),
            place("norm_eps", "layer_norm_epsilon", default=1e-5),
            place("ssm_head_dim", "head_dim", default=64),
            place("ssm_heads", "num_heads", default=128),
            Spread(
                "ssm_heads",
                "expand",
                (2, 128),
                _expanded,
                lambda c: ((number(c, "ssm_heads") * number(c, "ssm_head_dim") // number(c, "hidden"), c["ssm_heads"]),),
                more=("num_heads",),
            ),
            place("ssm_state", "state_size", default=128),
            place("ssm_norm_groups", default=1),
            *STATE,
            hf.TIED,
            hf.DTYPE,
            *hf.TOKENS,
        ),
        fixed={"hidden_act": "silu"},
        guards={**GUARDS, "rms_norm": (True,)},  # of configs from before transformers 5
        ignored=IGNORED,
        prefixes=("backbone.", "model.", ""),
    ),
    trtllm=RANKS,
)

NEMOTRON_H = Family(
    name="nemotron_h",
    vllm=HYBRID,
    traits={**TRAITS, "gated": False, "position": "none"},
    hf=hf.dialect(
        "NemotronHForCausalLM",
        "nemotron_h",
        ROWS,
        (
            Spread(
                "layers",
                PATTERN[0],
                (list[str], str, int),
                _layers,
                lambda c: ((*_spelled(c), c["layers"]),),
                more=(PATTERN[1], "num_hidden_layers"),
            ),
            Spread(
                "blocks",
                PATTERN[0],
                (list[str], str),
                lambda said, _: " ".join(_pattern(*said)),
                lambda c: (_spelled(c),),
                more=PATTERN[1:],
            ),
            *(field for field in hf.SIZES_WITHOUT_HEAD if field.field not in {"layers", "head_dim"}),
            place("head_dim", "head_dim", "attention_head_dim", default=128),
            place("norm_eps", "layer_norm_epsilon", default=1e-5),
            # published configs say it once more, under names that no program reads
            *(place("norm_eps", key, default=lambda c: c["norm_eps"], omit=True) for key in ("norm_eps", "rms_norm_eps")),
            place("activation", "mlp_hidden_act", default="relu2", words=(*hf.ACTIVATIONS, ("relu2", "relu2"))),
            place("mlp_bias", "mlp_bias", default=False),
            place("ssm_state", "ssm_state_size", default=128),
            place("ssm_heads", "mamba_num_heads", default=128),
            place("ssm_head_dim", "mamba_head_dim", default=64),
            *STATE,
            place("ssm_norm_groups", default=lambda c: c["ssm_groups"]),
            place("experts", "n_routed_experts", default=8),
            place("topk", "num_experts_per_tok", default=2),
            place("moe_ffn", "moe_intermediate_size", default=7688),
            place("moe_latent", "moe_latent_size", default=0, omit=True),
            place("shared_ffn", "moe_shared_expert_intermediate_size", default=7688),
            place("router_normed", "norm_topk_prob", default=True),
            place("router_scale", "routed_scaling_factor", default=1.0),
            place("router_groups", "n_group", default=1),
            place("router_group_topk", "topk_group", default=1),
            place("router_group_best", default=lambda c: 2 if number(c, "router_groups") > 1 else None),
            place("router_score", default="sigmoid"),
            place("router_bias", default=True),
            place("router_wide", default=True),
            place("mtp", "num_nextn_predict_layers", default=0, omit=True),
            Spread(
                *("mtp_blocks", "mtp_layers_block_type", (list[str], str), _further, _further_spelled),
                more=("mtp_hybrid_override_pattern",),
            ),
            hf.DTYPE,
            *hf.TOKENS,
        ),
        fixed={"tie_word_embeddings": False},
        absent={"num_key_value_heads": 8},
        written={"num_key_value_heads": 1},  # where there is no attention nothing else says it, and the class takes no null
        guards={
            **GUARDS,
            "attention_bias": (False,),
            "mamba_proj_bias": (False,),
            "mamba_hidden_act": ("silu",),
            "n_shared_experts": (1,),
            "sliding_window": (),
            "time_step_min": (0.001,),  # transformers' class computes with no smaller step
        },
        # no layer has positions
        ignored=f"{IGNORED} rope_theta partial_rotary_factor expand mamba_ssm_cache_dtype moe_shared_expert_overlap"
        " num_logits_to_keep output_router_logits use_mamba_kernels",
        prefixes=("backbone.", "model.", ""),
        further=(LAYER, "/mtp.layers.{layer}."),
    ),
    trtllm=None,
)

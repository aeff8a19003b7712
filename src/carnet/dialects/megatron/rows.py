"""The Megatron dialect: one table for all families, because Megatron has one configurable GPT model.

Names and shapes as ``megatron.core`` writes them with ``dist_checkpointing`` (0.16 to 0.19): global tensors, the vocabulary padded,
query, key and value rows grouped by KV head, the gate's rows before the up projection's. A homogeneous model stores each tensor once
for all layers. Norms are named after the linear layer they are fused with, by Transformer Engine's spec and by the local one alike;
``input_layernorm`` and ``pre_mlp_layernorm`` are the module names of the local spec.
"""

from collections.abc import Callable

from carnet.dialects import gdn
from carnet.dialects.configs import Table
from carnet.dialects.further import EMBED_FIRST
from carnet.dialects.kinds import KINDS
from carnet.dialects.mamba import CONV, CONV_BIAS, IN_PROJ
from carnet.dialects.megatron.releases import PATTERNS
from carnet.dialects.megatron.table import FIELDS, GUARDS
from carnet.dialects.planes import OPTIMIZER
from carnet.dialects.rows import MODULE, Dialect, fuse, row
from carnet.model.fields import SET

LAYER = "decoder.layers.{layer}."
PLAIN = {"gated": False}  # without a gate
MTP = "mtp.layers.{layer}."
EAGLE = "eagle_module."  # what stands before the names of a head that guesses tokens: dialects/megatron/heads.py

QKV = {"attention.q": "rep dim", "attention.k": "dim", "attention.v": "dim"}
GATED_QKV = {"attention.q": "rep dim", "attention.gate": "rep dim", "attention.k": "dim", "attention.v": "dim"}
# keys are the values too, and stand in the place of both: Megatron-Bridge for Gemma 4
QKK = (("attention.q", "rep dim"), *(("attention.k", "dim"),) * 2)
QKK_BIAS = tuple((f"{name}_bias", axes) for name, axes in QKK)
QKV_BIAS, GATED_QKV_BIAS = ({f"{name}_bias": axes for name, axes in each.items()} for each in (QKV, GATED_QKV))
GATE_UP = {"mlp.gate": "ffn", "mlp.up": "ffn"}
GATE_UP_BIAS = {f"{name}_bias": axes for name, axes in GATE_UP.items()}
SPARSE = LAYER + "self_attention.core_attention.indexer."
INDEXER, NO_INDEXER = {"index_heads": SET}, {"index_heads": 0}
DELTA = LAYER + "self_attention."
DELTA_IN_PROJ = {
    "gdn.q": "key key_dim",
    "gdn.k": "key key_dim",
    "gdn.v": "key value value_dim",
    "gdn.z": "key value value_dim",
    "gdn.b": "key value",
    "gdn.a": "key value",
}
DELTA_CONV = {"gdn.conv_q": "key key_dim", "gdn.conv_k": "key key_dim", "gdn.conv_v": "key value value_dim"}
# Megatron keeps apart what others join: one letter, or a word, for each part
PARTS = tuple(zip(("z", "x", "B", "C", "dt"), IN_PROJ.items(), strict=True))
DELTA_PARTS = tuple(zip(("query", "key", "value", "z", "beta", "alpha"), DELTA_IN_PROJ.items(), strict=True))
DELTA_CHANNELS = tuple(zip(("query", "key", "value"), DELTA_CONV.items(), strict=True))
CHANNELS = tuple(zip(("x", "B", "C"), CONV.items(), strict=True))
EXPERT_GATE_UP = {"moe.gate": "moe_ffn", "moe.up": "moe_ffn"}
EXPERT_GATE_UP_BIAS = {f"{name}_bias": axes for name, axes in EXPERT_GATE_UP.items()}
SHARED_GATE_UP = {"shared.gate": "shared_ffn", "shared.up": "shared_ffn"}

# what holds a gate and an up projection, and the axes of each
GATED = (
    ("mlp.linear_fc1.weight", "ffn hidden", "ffn", GATE_UP),
    ("mlp.linear_fc1.bias", "ffn", "ffn", GATE_UP_BIAS),
    ("mlp.experts.linear_fc1.weight{expert}", "moe_ffn moe_hidden", "expert", EXPERT_GATE_UP),
    ("mlp.experts.local_experts.{expert}.linear_fc1.weight", "moe_ffn moe_hidden", "expert", EXPERT_GATE_UP),
    ("mlp.experts.experts.{expert}.linear_fc1.weight", "moe_ffn moe_hidden", "expert", EXPERT_GATE_UP),
    ("mlp.shared_experts.linear_fc1.weight", "shared_ffn hidden", "shared_ffn", SHARED_GATE_UP),
)

# each under a name of its own: handle_swiglu_in_state_dict in megatron/core/transformer/fsdp_dtensor_checkpoint.py for fsdp_dtensor,
# and what singleton_local_shards makes of torch_dist (megatron/core/transformer/mlp.py apply_swiglu_sharded_factory)
HALVES = tuple(
    row(LAYER + name + half, axes, part, cut=cut, written=MODULE)
    for name, axes, cut, parts in GATED
    for half, part in zip(("_w", "_v"), parts, strict=True)
)

ROWS = (
    row("embedding.word_embeddings.weight", "vocab hidden", "embed", cut="vocab"),
    row("embedding.position_embeddings.weight", "position hidden", "position"),
    row(LAYER + "self_attention.linear_qkv.layer_norm_weight", "hidden", "attention_norm", written={"mixer": "attention"}),
    row(LAYER + "self_attention.linear_qkv.layer_norm_bias", "hidden", "attention_norm_bias"),
    row(LAYER + "input_layernorm.weight", "hidden", "attention_norm", written={"mixer": "mla"}),
    # a linear layer in place of the attention or the MLP, its norm fused: megatron/core/transformer/heterogeneous/
    row(LAYER + "self_attention.layer_norm_weight", "hidden", "attention_norm", written={"mixer": "linear"}),
    row(LAYER + "self_attention.weight", "hidden hidden_in", "linear_mixer", cut="hidden"),
    row(LAYER + "mlp.layer_norm_weight", "hidden", "mlp_norm", written={"mlp": "linear"}),
    row(LAYER + "mlp.weight", "hidden hidden_in", "linear_mlp", cut="hidden"),
    row(LAYER + "input_layernorm.bias", "hidden", "attention_norm_bias", written=MODULE),
    *(
        fuse(f"{LAYER}self_attention.linear_qkv.{name}", text, parts, when={"attention_gate": gate}, cut="kv")
        for gate, weight, bias in ((False, QKV, QKV_BIAS), (True, GATED_QKV, GATED_QKV_BIAS))
        for name, text, parts in (("weight", "(kv *) hidden", weight), ("bias", "(kv *)", bias))
    ),
    fuse(LAYER + "self_attention.linear_qkv.weight", "(kv *) hidden", QKK, when={"own_values": False}, cut="kv"),
    fuse(LAYER + "self_attention.linear_qkv.bias", "(kv *)", QKK_BIAS, when={"own_values": False}, cut="kv"),
    row(LAYER + "self_attention.linear_proj.weight", "hidden (kv rep dim)", "attention.o", cut="kv"),
    row(LAYER + "self_attention.linear_proj.bias", "hidden", "attention.o_bias"),
    row(LAYER + "self_attention.core_attention.softmax_offset", "(kv rep)", "attention.sinks", cut="kv"),
    row(LAYER + "mixer.in_proj.layer_norm_weight", "hidden", "attention_norm", written={"mixer": "mamba"}),
    row(LAYER + "norm.weight", "hidden", "attention_norm", written=MODULE),
    *(row(f"{LAYER}mixer.in_proj.weight.{at}", f"({axes}) hidden", tensor, cut="group") for at, (tensor, axes) in PARTS),
    *(row(f"{LAYER}mixer.conv1d.weight.{at}", f"({axes}) 1 conv", tensor, cut="group") for at, (tensor, axes) in CHANNELS),
    *(row(f"{LAYER}mixer.conv1d.bias.{at}", f"({axes})", f"{tensor}_bias", cut="group") for at, (tensor, axes) in CHANNELS),
    fuse(LAYER + "mixer.in_proj.weight", "* hidden", IN_PROJ, cut="group", written=MODULE),
    # a module of its own up to 0.18, parameters of the mixer since: megatron/core/ssm/mamba_mixer.py
    *(fuse(f"{LAYER}mixer.conv1d{at}weight", "* 1 conv", CONV, cut="group", written=MODULE) for at in "._"),
    *(fuse(f"{LAYER}mixer.conv1d{at}bias", "*", CONV_BIAS, cut="group", written=MODULE) for at in "._"),
    row(LAYER + "mixer.dt_bias", "(group head)", "mamba.dt_bias", cut="group"),
    row(LAYER + "mixer.A_log", "(group head)", "mamba.a_log", cut="group"),
    row(LAYER + "mixer.D", "(group head)", "mamba.d", cut="group"),
    # mamba_ssm's, which knows nothing of less one: megatron/core/ssm/mamba_mixer.py ExtendedRMSNorm
    row(LAYER + "mixer.norm.weight", "(group head wide)", "mamba.gated_norm", cut="group", whole=True),
    row(LAYER + "mixer.out_proj.weight", "hidden (group head wide)", "mamba.o", cut="group"),
    # Gated DeltaNet: megatron/core/ssm/gated_delta_net.py
    row(LAYER + "self_attention.in_proj.layer_norm_weight", "hidden", "attention_norm", written={"mixer": "gdn"}),
    *(row(f"{DELTA}in_proj.weight.{at}", f"({axes}) hidden", tensor, cut="key") for at, (tensor, axes) in DELTA_PARTS),
    *(row(f"{DELTA}conv1d.weight.{at}", f"({axes}) 1 gdn_conv", tensor, cut="key") for at, (tensor, axes) in DELTA_CHANNELS),
    fuse(DELTA + "in_proj.weight", "* hidden", DELTA_IN_PROJ, cut="key", written=MODULE),
    fuse(DELTA + "conv1d.weight", "* 1 gdn_conv", DELTA_CONV, cut="key", written=MODULE),
    row(DELTA + "dt_bias", "(key value)", "gdn.dt_bias", cut="key"),
    row(DELTA + "A_log", "(key value)", "gdn.a_log", cut="key"),
    row(DELTA + "out_norm.weight", "value_dim", "gdn.out_norm"),
    row(DELTA + "out_proj.weight", "hidden (key value value_dim)", "gdn.o", cut="key"),
    row(LAYER + "mlp.linear_fc1.layer_norm_weight", "hidden", "mlp_norm", written={"mlp": "dense"}),
    row(LAYER + "mlp.linear_fc1.layer_norm_weight", "hidden", "mlp_norm", written={"mlp": "moe", "spelling": "local"}),
    row(LAYER + "mlp.linear_fc1.layer_norm_bias", "hidden", "mlp_norm_bias"),
    row(LAYER + "pre_mlp_layernorm.weight", "hidden", "mlp_norm", written={"mlp": "moe", "spelling": "te"}),
    row(LAYER + "pre_mlp_layernorm.bias", "hidden", "mlp_norm_bias", written=MODULE),
    row(LAYER + "self_attention.q_layernorm.weight", "dim", "attention.q_norm"),
    row(LAYER + "self_attention.k_layernorm.weight", "dim", "attention.k_norm"),
    # what no spec of megatron-core builds, as the specs of others do: norms over all heads, a share on each rank
    # (Megatron-Bridge, ms-swift and slime for OLMoE and MiniMax-M2; weights of each head's own, which no other has, lie alike), and
    # norms of what comes out (Megatron-Bridge for Gemma 2 and 3)
    row(LAYER + "self_attention.q_layernorm.weight", "(kv rep dim)", "attention.q_whole_norm", cut="kv"),
    row(LAYER + "self_attention.k_layernorm.weight", "(kv dim)", "attention.k_whole_norm", cut="kv"),
    row(LAYER + "self_attention.q_layernorm.weight", "(kv rep dim)", "attention.q_heads_norm", cut="kv"),
    row(LAYER + "self_attention.k_layernorm.weight", "(kv dim)", "attention.k_heads_norm", cut="kv"),
    row(LAYER + "self_attention.linear_proj.post_layernorm.weight", "hidden", "attention_out_norm"),
    row(LAYER + "mlp.linear_fc2.post_layernorm.weight", "hidden", "mlp_out_norm", written={"mlp": "dense"}),
    # a mixture beside an MLP that is normed for itself, and a number for each layer: Megatron-Bridge for Gemma 4
    row(LAYER + "post_ffn_layernorm.weight", "hidden", "mlp_out_norm", written={"mlp": "moe"}),
    row(LAYER + "mlp.post_moe_layernorm.weight", "hidden", "moe.out_norm"),
    row(LAYER + "pre_shared_expert_layernorm.weight", "hidden", "shared.norm"),
    row(LAYER + "mlp.post_shared_expert_layernorm.weight", "hidden", "shared.out_norm"),
    row(LAYER + "mlp.router.scale", "hidden", "moe.router_norm"),
    row(LAYER + "mlp.router.per_expert_scale", "expert", "moe.expert_scale"),
    row(LAYER + "layer_scalar", "one", "layer_scale"),
    # slime and mbridge for GLM-4: slime's Megatron, glm4_vl/transformer_layer.py
    row(LAYER + "post_self_attn_layernorm.weight", "hidden", "attention_out_norm", written=MODULE),
    row(LAYER + "post_mlp_layernorm.weight", "hidden", "mlp_out_norm", written=MODULE),
    # slime for Qwen3-Next and Qwen3.5, the same on every rank: slime_plugins/models/{hf_attention,qwen3_next,qwen3_5}.py
    row(DELTA + "input_layernorm.weight", "hidden", "attention_norm", when={"mixer": "gdn"}, written=MODULE),
    *gdn.within(DELTA + "linear_attn.", (*gdn.BY_KEY_HEAD, *gdn.APART, *gdn.ROWS), MODULE),
    row(LAYER + "self_attention.linear_q_proj.weight", "(kv qk) hidden", "mla.q", cut="kv"),
    row(LAYER + "self_attention.linear_q_down_proj.weight", "q_lora hidden", "mla.q_a"),
    # an indexer reads what is normed, so that beside one no norm is fused: megatron/core/transformer/mla_qk_norm_config.py
    row(LAYER + "self_attention.linear_q_up_proj.layer_norm_weight", "q_lora", "mla.q_a_norm", written=NO_INDEXER),
    row(LAYER + "self_attention.q_layernorm.weight", "q_lora", "mla.q_a_norm", written=INDEXER),
    row(LAYER + "self_attention.linear_q_up_proj.weight", "(kv qk) q_lora", "mla.q_b", cut="kv"),
    fuse(LAYER + "self_attention.linear_kv_down_proj.weight", "* hidden", {"mla.kv_a": "kv_lora", "mla.k_rope": "rope"}),
    row(LAYER + "self_attention.linear_kv_up_proj.layer_norm_weight", "kv_lora", "mla.kv_a_norm", written=NO_INDEXER),
    row(LAYER + "self_attention.kv_layernorm.weight", "kv_lora", "mla.kv_a_norm", written=INDEXER),
    fuse(LAYER + "self_attention.linear_kv_up_proj.weight", "(kv *) kv_lora", {"mla.k_b": "nope", "mla.v_b": "v"}, cut="kv"),
    row(LAYER + "self_attention.linear_proj.weight", "hidden (kv v)", "mla.o", cut="kv"),
    row(SPARSE + "linear_wq_b.weight", "(index_head index_dim) q_lora", "indexer.q"),
    row(SPARSE + "linear_wk.weight", "index_dim hidden", "indexer.k"),
    row(SPARSE + "k_norm.weight", "index_dim", "indexer.k_norm"),
    row(SPARSE + "k_norm.bias", "index_dim", "indexer.k_norm_bias"),
    row(SPARSE + "linear_weights_proj.weight", "index_head hidden", "indexer.weigh"),
    fuse(LAYER + "mlp.linear_fc1.weight", "* hidden", GATE_UP, cut="ffn"),
    fuse(LAYER + "mlp.linear_fc1.bias", "*", GATE_UP_BIAS, cut="ffn"),
    row(LAYER + "mlp.linear_fc1.weight", "ffn hidden", "mlp.up", when=PLAIN, cut="ffn"),
    row(LAYER + "mlp.linear_fc1.bias", "ffn", "mlp.up_bias", when=PLAIN, cut="ffn"),
    row(LAYER + "mlp.linear_fc2.weight", "hidden ffn", "mlp.down", cut="ffn"),
    row(LAYER + "mlp.linear_fc2.bias", "hidden", "mlp.down_bias"),
    row(LAYER + "mlp.router.weight", "expert hidden", "moe.router"),
    row(LAYER + "mlp.router.bias", "expert", "moe.router_shift"),
    row(LAYER + "mlp.router.expert_bias", "expert", "moe.router_bias", dtype="f32"),
    row(LAYER + "mlp.fc1_latent_proj.weight", "moe_hidden hidden", "moe.latent_in"),
    row(LAYER + "mlp.fc2_latent_proj.weight", "hidden moe_hidden", "moe.latent_out"),
    fuse(LAYER + "mlp.experts.experts.linear_fc1.bias", "expert *", EXPERT_GATE_UP_BIAS, cut="expert"),
    row(LAYER + "mlp.experts.experts.linear_fc2.bias", "expert moe_hidden", "moe.down_bias", cut="expert"),
    fuse(LAYER + "mlp.experts.experts.linear_fc1.weight", "expert * moe_hidden", EXPERT_GATE_UP, cut="expert"),
    row(LAYER + "mlp.experts.experts.linear_fc1.weight", "expert moe_ffn moe_hidden", "moe.up", when=PLAIN, cut="expert"),
    row(LAYER + "mlp.experts.experts.linear_fc2.weight", "expert moe_hidden moe_ffn", "moe.down", cut="expert"),
    fuse(
        LAYER + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        "* moe_hidden",
        EXPERT_GATE_UP,
        cut="expert",
        written=MODULE,
    ),
    fuse(LAYER + "mlp.experts.local_experts.{expert}.linear_fc1.bias", "*", EXPERT_GATE_UP_BIAS, cut="expert", written=MODULE),
    row(
        LAYER + "mlp.experts.local_experts.{expert}.linear_fc2.bias",
        "moe_hidden",
        "moe.down_bias",
        cut="expert",
        written=MODULE,
    ),
    row(
        LAYER + "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        "moe_hidden moe_ffn",
        "moe.down",
        cut="expert",
        written=MODULE,
    ),
    fuse(LAYER + "mlp.experts.linear_fc1.weight{expert}", "* moe_hidden", EXPERT_GATE_UP, cut="expert", written=MODULE),
    row(
        LAYER + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        "moe_ffn moe_hidden",
        "moe.up",
        when=PLAIN,
        cut="expert",
        written=MODULE,
    ),
    row(
        LAYER + "mlp.experts.linear_fc1.weight{expert}",
        "moe_ffn moe_hidden",
        "moe.up",
        when=PLAIN,
        cut="expert",
        written=MODULE,
    ),
    row(LAYER + "mlp.experts.linear_fc2.weight{expert}", "moe_hidden moe_ffn", "moe.down", cut="expert", written=MODULE),
    row(
        LAYER + "mlp.experts.experts.{expert}.linear_fc1.weight",
        "moe_ffn moe_hidden",
        "moe.up",
        when=PLAIN,
        cut="expert",
        written=MODULE,
    ),
    row(
        LAYER + "mlp.experts.experts.{expert}.linear_fc2.weight", "moe_hidden moe_ffn", "moe.down", cut="expert", written=MODULE
    ),
    # GroupedMLP: views of one parameter, transposed (megatron/core/transformer/moe/experts.py)
    fuse(
        LAYER + "mlp.experts.weight1",
        "expert moe_hidden *",
        EXPERT_GATE_UP,
        cut="expert",
        written=MODULE,
        stored="moe_hidden (expert *)",
    ),
    row(
        LAYER + "mlp.experts.weight1",
        "expert moe_hidden moe_ffn",
        "moe.up",
        when=PLAIN,
        cut="expert",
        written=MODULE,
        stored="moe_hidden (expert moe_ffn)",
    ),
    row(
        LAYER + "mlp.experts.weight2",
        "expert moe_ffn moe_hidden",
        "moe.down",
        cut="expert",
        written=MODULE,
        stored="(expert moe_ffn) moe_hidden",
    ),
    fuse(LAYER + "mlp.shared_experts.linear_fc1.weight", "* hidden", SHARED_GATE_UP, cut="shared_ffn"),
    row(LAYER + "mlp.shared_experts.linear_fc1.weight", "shared_ffn hidden", "shared.up", when=PLAIN, cut="shared_ffn"),
    row(LAYER + "mlp.shared_experts.linear_fc2.weight", "hidden shared_ffn", "shared.down", cut="shared_ffn"),
    fuse(LAYER + "mlp.experts.linear_fc1.bias{expert}", "*", EXPERT_GATE_UP_BIAS, cut="expert", written=MODULE),
    row(LAYER + "mlp.experts.linear_fc2.bias{expert}", "moe_hidden", "moe.down_bias", cut="expert", written=MODULE),
    row(LAYER + "mlp.shared_experts.gate_weight", "1 hidden", "shared.weigh"),
    row(MTP + "enorm.weight", "hidden", "mtp.embed_norm"),
    row(MTP + "hnorm.weight", "hidden", "mtp.hidden_norm"),
    fuse(MTP + "eh_proj.weight", "hidden *", EMBED_FIRST, cut="hidden"),
    row(MTP + "final_layernorm.weight", "hidden", "mtp.final_norm"),
    row("decoder.final_layernorm.weight", "hidden", "final_norm", written={"hybrid": False}),
    row("decoder.final_norm.weight", "hidden", "final_norm", written={"hybrid": True}),
    row("decoder.final_layernorm.bias", "hidden", "final_norm_bias"),
    row("output_layer.weight", "vocab hidden", "head", cut="vocab"),
    *HALVES,
)

DROPPED = {
    "optimizer.*": OPTIMIZER,
    "chained_*.optimizer.*": OPTIMIZER,
    "opt_param_scheduler*": "learning-rate schedule",
    "optimizer/*": OPTIMIZER,
    "distrib_optim.pt/*": OPTIMIZER,
    "num_floating_point_operations_so_far*": "training statistics",
    "rng_state*": "random state",
    "rerun_state_machine*": "rerun state",
    "content_metadata*": "facts about the store",
    "*_extra_state*": "module extra state",
    # of ModelOpt; not *_pre_quant_scale: the weights are not the model's without it
    "*_quantizer*._amax": "quantizer state",
    "*_quantizer*._global_amax": "quantizer state",
    "modelopt_state*": "quantizer state",
    # what only a training computes with: modelopt/torch/distill/plugins/megatron.py ProjectionLayer
    "*_loss_modules.*": "losses of a distillation",
    f"*{EAGLE}*": "a head of EAGLE, which --as eagle3 takes",
    "common_state*": "training arguments (read)",
}

# the layers that predict further tokens; a hybrid has their letters after a stroke: megatron/core/ssm/mamba_hybrid_layer_allocation.py
OPTIONAL: dict[str, dict[str, Callable[[object], object]]] = {
    "*mtp.*": {
        **dict.fromkeys(("mtp_num_layers", "mtp_use_repeated_layer", "mtp_hybrid_override_pattern"), lambda said: None),
        **dict.fromkeys(PATTERNS, lambda said: str(said).split("/")[0]),
    }
}

MEGATRON = Dialect(
    kind=KINDS["megatron"],
    architecture="",
    prefixes=("", "model.", "module.", "model.module.", "model.module.module."),
    rows=ROWS,
    stacked=True,
    writes_tied=False,
    # the module's own name since megatron-core 0.17: rename_mtp_inner_layer_keys in fsdp_dtensor_checkpoint.py; a hybrid's has layers
    further=(LAYER, *(f"{MTP}{name}." for name in ("transformer_layer", "mtp_model_layer", "mtp_model_layer.layers.{inner}"))),
    zero_centred=None,
    embedding="none",
    table=Table(FIELDS, guards=GUARDS, closed=False),
    dropped=DROPPED,
    optional=OPTIONAL,
    pads={},
)

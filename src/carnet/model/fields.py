"""The *words* in which carnet describes a model: every fact that a config can say and that some weight or some program depends on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import EllipsisType

Value = str | int | float | bool | tuple[int, ...] | tuple[float, ...] | None
Config = Mapping[str, Value]  # field name -> value; a field that is absent has its neutral value
SET = object()  # in a condition: any value but none, zero, false and the empty word
Condition = Mapping[str, object]  # field, or what a layer is -> the value that it must have, or SET
MIXED: Condition = {"experts": SET}  # a mixture: a dense model is never one


@dataclass(frozen=True, slots=True)
class Field:
    """One fact about a model."""

    name: str
    kind: type[int] | type[float] | type[bool] | type[str]  # what its value must be
    neutral: Value | EllipsisType  # the value of a model that knows nothing of it; ``...`` where every model must say it
    remark: str  # what it means
    storage: bool = False  # says how weights are stored, nothing about the model
    soft: bool = False  # says nothing about the weights' meaning: a target without a place for it may leave it out
    least: int | None = 1  # of an integer, the smallest that makes sense
    most: int | None = None  # of an integer, the largest that a machine can list
    many: bool = False  # may be several of them
    remedy: str | None = None  # what a person can do where no config says it
    moot: Callable[[Config], bool] | None = None  # where it changes nothing, whatever its value: a target may leave it out
    of: str = ""  # the blocks that it is about, as letters of the field ``blocks``; "" for the whole model


def _reach(config: Config, name: str) -> int:
    """Return how many tokens a field speaks of, 0 where it does not."""
    found = config.get(name)
    return found if isinstance(found, int) else 0


def _dense(config: Config) -> bool:
    """Say whether any layer has an MLP that is no mixture."""
    words = config.get("blocks")
    return "-" in words if isinstance(words, str) else not config.get("experts")


FIELDS = (
    Field("layers", int, ..., "decoder layers", most=1 << 16),
    Field("hidden", int, ..., "width of the residual stream"),
    Field("heads", int, 1, "query heads", of="*"),
    Field("kv_heads", int, 1, "key and value heads, of the first layer that has any", of="*"),
    Field("head_dim", int, 1, "width of one head", of="*"),
    Field(
        "ffn", int, 1, "width inside the MLP, of the first layer that has one", of="-E", moot=lambda config: not _dense(config)
    ),
    Field("vocab", int, ..., "true size of the vocabulary, without padding", remedy="name it with --vocab-size"),
    Field("positions", int, 1, "longest sequence; rows of a learned position table", of="*"),
    Field("norm", str, ..., "rms, layer (mean removed, with a bias) or centred (mean removed, without)"),
    Field("norm_eps", float, ..., "added to the variance"),
    Field(
        "activation",
        str,
        "gelu",
        "silu, gelu (exact), gelu_tanh, gelu_quick (x sigmoid(1.702 x)), relu2 (a ReLU, squared)",
        of="-E",
    ),
    Field("gated", bool, False, "the MLP multiplies its activation with a second projection", of="-E"),
    Field("position", str, "none", "rope, learned, alibi (a bias on the scores that grows with distance) or none", of="*"),
    Field("rope_theta", float, 10000.0, "base of the rotary frequencies"),
    Field(
        "rope_type",
        str,
        "default",
        "how rotary frequencies are stretched: default, linear, llama3, yarn, longrope (each by a factor of its own), alpha (the base "
        "is), proportional (a part is rotated by those of a whole)",
    ),
    Field("rope_factor", float, 1.0, "by how much"),
    Field("rope_alpha", float, None, "alpha: the base is multiplied by its power of d / (d - 2), d the width of a head"),
    Field("rope_beta_fast", float, 32.0, "yarn: rotations above which frequencies are left alone"),
    Field("rope_beta_slow", float, 1.0, "yarn: rotations below which frequencies are stretched fully"),
    Field("rope_attention", float, None, "yarn, longrope: factor on cosines and sines"),
    Field("rope_short", float, None, "longrope: what divides each frequency in texts as long as before stretching", many=True),
    Field("rope_long", float, None, "longrope: what divides each frequency in longer texts", many=True),
    Field(
        "rope_mscale_all", float, 0.0, "latent attention: its scores are multiplied by (0.1 x ln(rope_factor) + 1)^2 for this x"
    ),
    Field("rope_low", float, None, "llama3: wavelengths above original / low are stretched fully"),
    Field("rope_high", float, None, "llama3: wavelengths below original / high are left alone"),
    Field("rope_original", int, None, "sequence length before stretching"),
    Field(
        "rope_sections",
        int,
        None,
        "how many frequencies turn with the time, the height and the width of an image; of text these are one",
        soft=True,
        many=True,
    ),
    Field("rope_percent", float, 1.0, "part of a head that is rotated"),
    Field("qkv_bias", bool, False, "query, key and value projections have a bias", of="*"),
    Field("out_bias", bool, False, "the attention's output projection has a bias", of="*"),
    Field("mlp_bias", bool, False, "the MLP's projections have a bias", of="-"),
    Field("attention_gate", bool, False, "what comes out of the attention is weighed by the sigmoid of a projection", of="*"),
    Field(
        "qk_norm",
        str,
        "none",
        "query and key are normed: none, head (each head for itself), heads (each by weights of its own), whole (all heads at once), "
        "plain (each head, no weight); without a bias",
    ),
    Field(
        "qk_norm_rotated",
        bool,
        False,
        "query and key are normed once they are rotated, not before",
        moot=lambda config: config.get("qk_norm", "none") in ("none", "plain"),
    ),
    Field("v_norm", bool, False, "the values are normed, each head for itself, no weight", of="*"),
    Field(
        "window",
        int,
        None,
        "a token sees that many before it; None for all",
        moot=lambda config: _reach(config, "window") >= _reach(config, "positions"),
    ),
    Field(
        "window_layers",
        int,
        None,
        "1 for each layer that has the window, 0 for each that sees all; None where all are alike",
        many=True,
    ),
    Field("window_every", int, None, "a config's word: every n-th layer has no window", storage=True),
    Field("rope_local_theta", float, None, "base of the rotary frequencies in layers with the window; None for the same"),
    Field("norm_before", bool, True, "what goes into the attention and into the MLP is normed"),
    Field("norm_after", bool, False, "what comes out of them is normed, before it is added"),
    Field("embed_root", bool, False, "the embedding is multiplied by the square root of its width"),
    Field("embed_scale", float, 1.0, "factor on the embedding"),
    Field("layer_scale", bool, False, "what leaves a layer is multiplied by a number of the layer's own"),
    Field("residual_scale", float, 1.0, "factor on what a layer adds"),
    Field("logits_divisor", float, 1.0, "the logits are divided by it"),
    Field(
        "attention_scale",
        float,
        None,
        "factor on the attention scores; None for one over the root of a head's width",
        moot=lambda config: config.get("attention_scale") == max(1, _reach(config, "head_dim")) ** -0.5,
    ),
    Field("attention_root", int, None, "the attention scores are divided by its square root; None for a head's width"),
    Field("softcap_attention", float, None, "attention scores x become c tanh(x / c)"),
    Field("softcap_logits", float, None, "logits x become c tanh(x / c)"),
    Field("parallel_residual", bool, False, "attention and MLP read the same stream, and both are added to it at once"),
    Field("one_norm", bool, False, "the norm before the attention serves the MLP too"),
    Field("new_decoder", bool, False, "Falcon's newer decoder, which says how many KV heads it has"),
    Field("experts", int, 0, "experts of a mixture, 0 for none", least=0, of="E"),
    Field(
        "blocks",
        str,
        None,
        "what each layer is, a word each: * attention, M Mamba-2, S Mamba-1, G Gated DeltaNet, L a linear layer; then - an MLP, E a "
        "mixture, l a linear layer; . for none. None where all layers are attention and an MLP, or all attention and a mixture",
    ),
    Field("moe_ffn", int, None, "width inside one expert", of="E"),
    Field(
        "moe_latent",
        int,
        0,
        "width of what the experts read and write, a projection on either side of them; 0 for the model's own",
        least=0,
        of="E",
    ),
    Field("topk", int, None, "experts that a token goes to", of="E"),
    Field("shared_ffn", int, 0, "width of the shared experts together, 0 for none", least=0, of="E"),
    Field(
        "shared_norms",
        bool,
        False,
        "the shared expert reads by a norm of its own, and what comes out of it and of the others is normed, each for itself",
        of="E",
    ),
    Field("shared_gate", bool, False, "the shared expert is weighed by a gate of its own", of="E"),
    Field("router_score", str, "softmax", "how the router scores: softmax or sigmoid", of="E"),
    Field("router_wide", bool, None, "the router computes in f32, whatever the weights are", of="E", soft=True),
    Field(
        "router_norm",
        bool,
        False,
        "the router reads the stream by a norm of its own, divided by the square root of its width",
        of="E",
    ),
    Field(
        "expert_scale",
        bool,
        False,
        "the weight of an expert that is chosen is multiplied by a number of the expert's own",
        of="E",
    ),
    Field("router_bias", bool, False, "a bias chooses experts and does not weigh them", of="E"),
    Field("router_normed", bool, True, "the weights of the chosen experts sum to one", of="E"),
    Field("router_scale", float, 1.0, "factor on the routed experts' sum", of="E"),
    Field("router_groups", int, 1, "groups that the experts are chosen from", of="E"),
    Field("router_group_topk", int, 1, "groups that a token may use", of="E"),
    Field(
        "router_group_best",
        int,
        None,
        "a group counts as much as so many of its best experts together",
        of="E",
        moot=lambda config: _reach(config, "router_group_topk") >= _reach(config, "router_groups"),
    ),
    Field("router_shift", bool, False, "the router has a bias that weighs, as of any linear layer", of="E"),
    Field("router_on_input", bool, False, "the weight of an expert is a factor on what goes into it", of="E"),
    Field("moe_bias", bool, False, "the projections of every expert have a bias", of="E"),
    Field("glu_offset", float, 0.0, "added to what the gate multiplies"),
    Field("glu_limit", float, None, "the gate is cut off above it, what it multiplies on both sides; None for never"),
    Field("sinks", bool, False, "each query head has a score that goes to no token"),
    Field("rope_interleaved", bool, False, "neighbouring dimensions of a head are rotated together, not halves of it"),
    Field("rope_layers", int, None, "1 for each layer with rotary positions, 0 for each without; None for all", many=True),
    Field("rope_truncated", bool, True, "yarn: the dimensions between which frequencies are stretched partly are rounded"),
    Field("chunk", int, None, "a token sees those of its own chunk of so many alone; None for all"),
    Field("chunk_layers", int, None, "1 for each layer that has the chunks; None where all are alike", many=True),
    Field("temperature", bool, False, "layers without positions sharpen the attention of late tokens"),
    Field("temperature_floor", int, None, "tokens after which they do"),
    Field("temperature_scale", float, None, "by how much"),
    Field("query_growth", float, 0.0, "a query is multiplied by 1 + so much x ln(1 + its position // rope_original)"),
    Field("latent", bool, False, "keys and values are kept compressed (multi-head latent attention)"),
    Field("latent_norm_eps", float, None, "latent attention: added to the variance in the norms of what is compressed"),
    Field("kv_lora", int, 0, "latent attention: width of the compressed keys and values", least=0),
    Field("q_lora", int, 0, "latent attention: width of the compressed queries, 0 where they are not", least=0),
    Field("nope_dim", int, 0, "latent attention: width of a head that is not rotated", least=0),
    Field("rope_dim", int, 0, "latent attention: width of a head that is rotated", least=0),
    Field("v_dim", int, 0, "latent attention: width of a value head", least=0),
    Field("index_heads", int, 0, "sparse attention: heads of the indexer, 0 where there is none", least=0, of="*"),
    Field("index_dim", int, 0, "sparse attention: width of one of them", least=0, of="*"),
    Field("index_topk", int, None, "sparse attention: tokens that a token sees, those that score highest", of="*"),
    Field("index_norm_eps", float, None, "sparse attention: added to the variance in the norm of the indexer's keys", of="*"),
    Field(
        "index_interleaved", bool, False, "sparse attention: neighbouring dimensions of an indexer's head are rotated together"
    ),
    Field(
        "index_layers",
        int,
        None,
        "1 for each layer with an indexer of its own, 0 for each that sees what the one before chose; None where all have one",
        many=True,
    ),
    Field(
        "layer_kv_heads",
        int,
        None,
        "key and value heads of each layer, 1 where it has none; None where all are alike",
        many=True,
    ),
    Field("layer_head_dim", int, None, "width of one head in each layer; None where all are alike", many=True),
    Field(
        "value_layers",
        int,
        None,
        "1 for each layer that projects its values, 0 for each whose keys, before their norm, are the values; None where all do",
        least=0,
        many=True,
    ),
    Field(
        "layer_ffn", int, None, "width inside the MLP of each layer, 1 where it has none; None where all are alike", many=True
    ),
    Field("hybrid", bool, False, "a layer is one block alone, with one norm"),
    Field("halves", bool, False, "what mixes tokens and the MLP behind it are stored as two layers", storage=True),
    Field("ssm_channels", int, 0, "Mamba-1: channels, each with a state of its own", least=0, of="S"),
    Field("ssm_dt_rank", int, 0, "Mamba-1: rank of what the steps are made of", least=0, of="S"),
    Field("ssm_heads", int, 0, "Mamba-2: heads", least=0, of="M"),
    Field("ssm_head_dim", int, 0, "Mamba-2: width of one head", least=0, of="M"),
    Field("ssm_groups", int, 0, "Mamba-2: groups of heads that share B and C", least=0, of="M"),
    Field("ssm_state", int, 0, "Mamba: width of the state", least=0, of="MS"),
    Field("ssm_conv", int, 0, "Mamba: tokens that the convolution sees", least=0, of="MS"),
    Field("ssm_conv_bias", bool, False, "Mamba: the convolution has a bias", of="MS"),
    Field("ssm_norm_groups", int, 0, "Mamba-2: parts that the gated norm norms, each for itself", least=0, of="M"),
    Field("ssm_norm_eps", float, 0.0, "Mamba-2: added to the variance in the gated norm", of="M"),
    Field("variant", str, "none", "a config's word: what some or all of its attention is: none, gdn or dsa", storage=True),
    Field("gdn_keys", int, 0, "Gated DeltaNet: key heads", least=0, of="G"),
    Field("gdn_values", int, 0, "Gated DeltaNet: value heads", least=0, of="G"),
    Field("gdn_key_dim", int, 0, "Gated DeltaNet: width of a key head", least=0, of="G"),
    Field("gdn_value_dim", int, 0, "Gated DeltaNet: width of a value head", least=0, of="G"),
    Field("gdn_conv", int, 0, "Gated DeltaNet: tokens that the convolution sees", least=0, of="G"),
    Field("mtp", int, 0, "tokens that are predicted further, each by layers of its own after the others", least=0),
    Field(
        "mtp_blocks",
        str,
        None,
        "what the layers for one such token are, in words of ``blocks``; None for one like the last before",
        moot=lambda config: not config.get("mtp"),
    ),
    Field("aux", int, 0, "states of another model that are joined: this is a head that guesses its tokens (EAGLE)", least=0),
    Field("aux_layers", int, None, "the layers of that model that they leave", least=0, many=True),
    Field(
        "draft_vocab", int, None, "tokens that a head guesses among, None for all", moot=lambda config: not config.get("aux")
    ),
    Field("tied", bool, False, "the output head is the embedding"),
    Field("wrapper", str, "", "the rest of the config of a class that also sees or hears, as JSON"),
    Field("tower", str, "", "the tensors beside the text model, as JSON: name, element type and shape of each", storage=True),
    Field(
        "adapters",
        str,
        "",
        "the low-rank adapters beside its weights, as JSON: weight -> rank and alpha, of all layers or of each",
    ),
    Field("adapters_one", str, "", "the weights whose adapters have one A, as JSON: lists of them", storage=True),
    Field("adapters_alone", bool, False, "the weights that adapters are beside are not here", storage=True),
    Field("planes", str, "", "what an optimizer keeps of each weight and goes along, a word each", storage=True),
    Field("dtype", str, ..., "element type of the weights, in carnet's words", storage=True),
    Field("bos", int, None, "id of the first token of a text", soft=True, least=None, many=True),
    Field("eos", int, None, "id of the last token of a text, or of several", soft=True, least=None, many=True),
    Field("pad", int, None, "id of the padding token", soft=True, least=None, many=True),
    Field(
        "experts_by_output",
        bool,
        False,
        "experts in one tensor: what each computes stands before what it reads, where releases differ",
        storage=True,
    ),
    Field("zero_centred", bool, False, "norms are stored less one", storage=True),
    Field("padded_vocab", int, None, "rows that are stored for the vocabulary", storage=True),
    Field("tp", int, 1, "ranks that share every layer", storage=True),
    Field("pp", int, 1, "stages that share the layers", storage=True),
    Field("ep", int, 1, "ranks that share the experts instead of each expert", storage=True),
    Field("moe_tp", int, 1, "ranks that share each expert", storage=True),
    Field("world", int, 1, "ranks in all", storage=True),
    Field("embedding", str, "none", "how ranks share the embedding: none (a copy each), rows, columns", storage=True),
)
BY_NAME = {field.name: field for field in FIELDS}

# what fields say together that computes nothing -> what they say instead, and those that mean nothing then: positions stretched by one,
# or not at all
ROPE_WORDS = "alpha factor beta_fast beta_slow attention mscale_all low high original truncated short long"
UNSTRETCHED: tuple[Config, tuple[str, ...]] = {"rope_type": "default"}, tuple(f"rope_{word}" for word in ROPE_WORDS.split())
NOTHING: tuple[tuple[Condition, tuple[Config, tuple[str, ...]]], ...] = (
    ({"rope_type": "default"}, UNSTRETCHED),
    ({"rope_type": "linear", "rope_factor": 1.0}, UNSTRETCHED),
    ({"rope_type": "llama3", "rope_factor": 1.0}, UNSTRETCHED),
    ({"rope_type": "yarn", "rope_factor": 1.0, "rope_attention": 1.0}, UNSTRETCHED),
)

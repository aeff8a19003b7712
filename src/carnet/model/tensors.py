"""The two tables of the *model*: canonical tensors and named axes, each with every fact that more than one reader needs.

Which tensor is the weight of a linear layer, what it reads, what is an expert's, what ranks may cut and which stage holds it:
planner, examiner, quantizing and live weights read it here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Self

from carnet.model.fields import SET, Condition
from carnet.steps import Computed


@dataclass(frozen=True, slots=True)
class Axis:
    """One named axis of canonical tensors."""

    name: str
    size: str | int | Callable[[Callable[[str], int]], int]  # a field, a number, or what follows from the values of fields
    # how ranks share it: "evenly"; "padded" to a multiple of them; "repeated" where there are more; "" not at all
    cut: str = ""
    among: str = "tensor"  # which ranks: those that share every layer, the experts ("expert"), or each expert ("expert_tensor")
    inner: str = ""  # the axis inside of it that is cut too: by ranks that repeat this one, or that share each expert

    def length(self, field: Callable[[str], int]) -> int:
        """Return its true length, from the values of fields."""
        if isinstance(self.size, str):
            return field(self.size)
        return self.size if isinstance(self.size, int) else self.size(field)


AXES = {
    axis.name: axis
    for axis in (
        Axis("layer", "layers"),
        Axis("hidden", "hidden", cut="evenly"),
        Axis("hidden_in", "hidden"),
        Axis("one", 1),
        Axis("vocab", "vocab", cut="padded"),
        Axis("position", "positions"),
        Axis("kv", "kv_heads", cut="repeated", inner="rep"),
        Axis("rep", lambda field: field("heads") // field("kv_heads")),
        Axis("dim", "head_dim"),
        Axis("ffn", "ffn", cut="evenly"),
        Axis("expert", "experts", cut="evenly", among="expert", inner="moe_ffn"),
        Axis("moe_ffn", "moe_ffn", cut="evenly", among="expert_tensor"),
        Axis("moe_hidden", lambda field: field("moe_latent") or field("hidden")),  # what an expert reads and writes
        Axis("shared_ffn", "shared_ffn", cut="evenly"),
        Axis("kv_lora", "kv_lora"),
        Axis("q_lora", "q_lora"),
        Axis("qk", lambda field: field("nope_dim") + field("rope_dim")),
        Axis("nope", "nope_dim"),
        Axis("rope", "rope_dim"),
        Axis("v", "v_dim"),
        Axis("index_head", "index_heads"),
        Axis("index_dim", "index_dim"),
        Axis("group", "ssm_groups", cut="evenly"),
        Axis("head", lambda field: field("ssm_heads") // max(1, field("ssm_groups"))),
        Axis("wide", "ssm_head_dim"),
        Axis("state", "ssm_state"),
        Axis("conv", "ssm_conv"),
        Axis("channel", "ssm_channels"),
        Axis("dt_rank", "ssm_dt_rank"),
        Axis("key", "gdn_keys", cut="evenly"),
        Axis(
            "value", lambda field: field("gdn_values") // max(1, field("gdn_keys"))
        ),  # those of one key head follow each other
        Axis("key_dim", "gdn_key_dim"),
        Axis("value_dim", "gdn_value_dim"),
        Axis("gdn_conv", "gdn_conv"),
        Axis("aux", "aux"),
        Axis("both", 2),  # what a head that guesses tokens reads: the token before, and the states of the other model
        Axis("draft", "draft_vocab", cut="evenly"),
        Axis("rank", 0, cut="evenly"),  # of an adapter: each has its own, model/adapters.py
    )
}
RANK = "rank"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One canonical tensor."""

    part: str  # its name within its layer, or the model
    axes: tuple[str, ...]  # named axes, outermost first
    outputs: int  # of a matrix, how many of its axes are outputs, its experts included
    role: str  # what it is: one of the words below
    stage: str  # "first", "last" or "layer": the pipeline stage that holds it
    when: Condition  # what must hold for it to exist
    reads: str = ""  # of a linear layer: those of a layer with the same word read the same activations
    cached: str = ""  # what is kept of what it computes: "k" or "v"
    # of one that no model has by itself and some targets hold: what is computed of which others, each number of theirs in its place
    function: Computed = ""
    operands: tuple[str, ...] = ()
    of: str = ""  # of a part of an adapter, the weight that it is beside

    @property
    def each_expert(self) -> bool:
        """Say whether every expert has one of its own: the first axis."""
        return self.axes[0] == "expert" and len(self.axes) > 1 and self.role != GATE

    @property
    def half(self) -> int:
        """Return 1 for what is of a layer's MLP, 0 for what comes before."""
        return int("mlp" in self.when)

    def at(self, layer: int = 0) -> "Canonical":
        """Return its name, in a layer if it is one of a layer."""
        return _named(self.part, layer if self.stage == "layer" else None)


class Canonical(str):
    """The name of a canonical tensor of a model, ``layers.3.attention.q``, which knows its layer, its row and its plane."""

    __slots__ = ("layer", "plane", "tensor")
    layer: int | None
    tensor: Tensor
    plane: str  # what an optimizer keeps of a weight, "exp_avg"; "" for the weight itself

    def __new__(cls, tensor: Tensor, layer: int | None, plane: str = "") -> Self:
        """Name the tensor of a row."""
        name = tensor.part if layer is None else f"layers.{layer}.{tensor.part}"
        made = super().__new__(cls, f"{plane}:{name}" if plane else name)
        made.layer, made.tensor, made.plane = layer, tensor, plane
        return made

    def __reduce__(self) -> tuple[type[Self], tuple[Tensor, int | None, str]]:
        """Return what makes a copy."""
        return type(self), (self.tensor, self.layer, self.plane)

    def on(self, plane: str) -> "Canonical":
        """Return what an optimizer keeps of this weight on one of its planes."""
        return Canonical(self.tensor, self.layer, plane)

    @property
    def trained(self) -> bool:
        """Say whether an optimizer keeps anything of it: not of what other steps of a training set, or none."""
        return self.tensor.role != CARRIED and self.tensor.part not in BUFFERS

    @property
    def origins(self) -> tuple["Canonical", ...]:
        """Name what it is computed of; itself, where a model has it."""
        return tuple(_named(part, self.layer) for part in self.tensor.operands) or (self,)

    def fellows(self) -> list["Canonical"]:
        """Return the names of all that read what this one reads, its own among them, in the order of the table."""
        return [_named(part, self.layer) for part in READERS.get(self.tensor.reads, (self.tensor.part,))]


@cache
def _named(part: str, layer: int | None) -> Canonical:
    return Canonical(BY_PART[part], layer)


def canonical(name: str) -> Canonical:
    """Return a name that the model made as what it is."""
    assert isinstance(name, Canonical), f"{name!r} was not made by the model"
    return name


# --- tensors -------------------------------------------------------------------------------------------------------------------

LINEAR = "linear"  # the weight of a linear layer: outputs | inputs
PLAIN = "plain"  # of a linear layer that every program leaves as it is, and must be told so
GATE = "gate"  # of one that weighs experts: engines never look for codes there
HEAD = "head"  # of the one that ends the model
TABLE = "table"  # rows that are looked up
CONVOLUTION = "convolution"
NORM = "norm"
BIAS = "bias"
STATE = "state"  # numbers of a kind of their own
CARRIED = "carried"  # of no part of the text model: it goes along as it is
ADAPTER = "adapter"  # what is learned beside a weight: W + alpha / rank * B A
ADAPTED = (LINEAR, PLAIN)  # what adapters are beside
A, B, MAGNITUDE = "a", "b", "magnitude"  # the parts of one: rank | inputs, outputs | rank, and of DoRA outputs

GQA: dict[str, Any] = {"mixer": "attention"}
ALONE: dict[str, Any] = {**GQA, "paired": False}  # reads the stream; a head that guesses tokens reads these beside it
PAIRED: dict[str, Any] = {**GQA, "paired": True}
VALUES: dict[str, Any] = {"own_values": True}  # elsewhere keys are the values too
MAMBA: dict[str, Any] = {"mixer": "mamba"}
S6: dict[str, Any] = {"mixer": "s6"}  # Mamba-1's states
GDN: dict[str, Any] = {"mixer": "gdn"}
MLA: dict[str, Any] = {"mixer": "mla"}
DSA: dict[str, Any] = {"mixer": "mla", "indexed": SET}
DENSE: dict[str, Any] = {"mlp": "dense"}
MOE: dict[str, Any] = {"mlp": "moe"}
LATENT: dict[str, Any] = {"mlp": "moe", "moe_latent": SET}
SHARED: dict[str, Any] = {"mlp": "moe", "shared": True}


def _row(role: str, part: str, axes: str, reads: str = "", cached: str = "", *, stage: str = "layer", **when: object) -> Tensor:
    outputs, _, inputs = axes.partition("|")
    every = (*outputs.split(), *inputs.split())
    return Tensor(part, every, len(outputs.split()), role, stage, when, reads, cached)


def _made(function: Computed, part: str, axes: str, *operands: str, when: Condition) -> Tensor:
    return replace(_row(STATE, part, axes), when=when, function=function, operands=operands)


_linear, _plain, _gate, _norm, _bias, _state = (partial(_row, role) for role in (LINEAR, PLAIN, GATE, NORM, BIAS, STATE))

TENSORS = (
    _row(TABLE, "embed", "vocab | hidden", stage="first", aux=0),  # a head that guesses tokens has the other model's
    _norm("draft.embed_norm", "hidden", stage="first", aux=SET),
    _plain("draft.join", "hidden | aux hidden_in", stage="first", aux=SET),
    _row(TABLE, "position", "position | hidden", stage="first", position="learned"),
    _norm("mtp.embed_norm", "hidden", mtp_first=True),
    _norm("mtp.hidden_norm", "hidden", mtp_first=True),
    # of the two that a further layer joins; programs differ in which comes first
    _plain("mtp.project_embed", "hidden | hidden_in", mtp_first=True),
    _plain("mtp.project_hidden", "hidden | hidden_in", mtp_first=True),
    _norm("attention_norm", "hidden", norm_before=True, mixer=SET),
    _bias("attention_norm_bias", "hidden", norm="layer", mixer=SET),
    _linear("draft.q", "kv rep dim | both hidden", "draft", **PAIRED),
    _linear("draft.k", "kv dim | both hidden", "draft", "k", **PAIRED),
    _linear("draft.v", "kv dim | both hidden", "draft", "v", **PAIRED),
    _linear("attention.q", "kv rep dim | hidden", "attention", **ALONE),
    _linear("attention.gate", "kv rep dim | hidden", "attention", attention_gate=True, **GQA),
    _linear("attention.k", "kv dim | hidden", "attention", "k", **ALONE),
    _linear("attention.v", "kv dim | hidden", "attention", "v", **VALUES, **ALONE),
    _linear("attention.o", "hidden | kv rep dim", **GQA),
    _bias("attention.q_bias", "kv rep dim", qkv_bias=True, **GQA),
    _bias("attention.gate_bias", "kv rep dim", attention_gate=True, qkv_bias=True, **GQA),
    _bias("attention.k_bias", "kv dim", qkv_bias=True, **GQA),
    _bias("attention.v_bias", "kv dim", qkv_bias=True, **VALUES, **GQA),
    _bias("attention.o_bias", "hidden", out_bias=True, **GQA),
    _state("attention.sinks", "kv rep", sinks=True, **GQA),
    _norm("attention.q_norm", "dim", qk_norm="head", **GQA),
    _norm("attention.k_norm", "dim", qk_norm="head", **GQA),
    _norm("attention.q_whole_norm", "kv rep dim", qk_norm="whole", **GQA),
    _norm("attention.k_whole_norm", "kv dim", qk_norm="whole", **GQA),
    _norm("attention.q_heads_norm", "kv rep dim", qk_norm="heads", **GQA),
    _norm("attention.k_heads_norm", "kv dim", qk_norm="heads", **GQA),
    _norm("attention_out_norm", "hidden", norm_after=True, mixer=SET),
    _linear("mla.q", "kv qk | hidden", "latent", q_compressed=False, **MLA),
    _linear("mla.q_a", "q_lora | hidden", "latent", q_compressed=True, **MLA),
    _norm("mla.q_a_norm", "q_lora", q_compressed=True, **MLA),
    _linear("mla.q_b", "kv qk | q_lora", q_compressed=True, **MLA),
    _linear("mla.kv_a", "kv_lora | hidden", "latent", **MLA),
    _linear("mla.k_rope", "rope | hidden", "latent", **MLA),
    _norm("mla.kv_a_norm", "kv_lora", **MLA),
    _linear("mla.k_b", "kv nope | kv_lora", **MLA),
    _linear("mla.v_b", "kv v | kv_lora", **MLA),
    _linear("mla.o", "hidden | kv v", **MLA),
    # of queries as they meet the compressed keys: those of each head through its k_b, and their rotated part as it is
    _made("product", "mla.q_b_absorbed", "kv kv_lora | q_lora", "mla.q_b", "mla.k_b", when={"q_compressed": True, **MLA}),
    _made("tail", "mla.q_b_rope", "kv rope | q_lora", "mla.q_b", when={"q_compressed": True, **MLA}),
    _made("product", "mla.q_absorbed", "kv kv_lora | hidden", "mla.q", "mla.k_b", when={"q_compressed": False, **MLA}),
    _made("tail", "mla.q_rope", "kv rope | hidden", "mla.q", when={"q_compressed": False, **MLA}),
    # plain as NVIDIA publishes them; engines join the last two, and dequantize codes that they find: vLLM's deepseek_v2.py
    _plain("indexer.q", "index_head index_dim | q_lora", **DSA),
    _plain("indexer.k", "index_dim | hidden", **DSA),
    _norm("indexer.k_norm", "index_dim", **DSA),
    _bias("indexer.k_norm_bias", "index_dim", **DSA),
    _plain("indexer.weigh", "index_head | hidden", **DSA),
    _linear("mamba.z", "group head wide | hidden", "mamba", **MAMBA),
    _linear("mamba.x", "group head wide | hidden", "mamba", **MAMBA),
    _linear("mamba.b", "group state | hidden", "mamba", **MAMBA),
    _linear("mamba.c", "group state | hidden", "mamba", **MAMBA),
    _linear("mamba.dt", "group head | hidden", "mamba", **MAMBA),
    _row(CONVOLUTION, "mamba.conv_x", "group head wide | conv", **MAMBA),
    _row(CONVOLUTION, "mamba.conv_b", "group state | conv", **MAMBA),
    _row(CONVOLUTION, "mamba.conv_c", "group state | conv", **MAMBA),
    _bias("mamba.conv_x_bias", "group head wide", ssm_conv_bias=True, **MAMBA),
    _bias("mamba.conv_b_bias", "group state", ssm_conv_bias=True, **MAMBA),
    _bias("mamba.conv_c_bias", "group state", ssm_conv_bias=True, **MAMBA),
    _bias("mamba.dt_bias", "group head", **MAMBA),
    _state("mamba.a_log", "group head", **MAMBA),
    _made("minus_exp", "mamba.a", "group head", "mamba.a_log", when=MAMBA),
    _state("mamba.d", "group head", **MAMBA),
    _norm("mamba.gated_norm", "group head wide", **MAMBA),
    _linear("mamba.o", "hidden | group head wide", **MAMBA),
    _linear("s6.x", "channel | hidden", "s6", **S6),
    _linear("s6.z", "channel | hidden", "s6", **S6),
    _row(CONVOLUTION, "s6.conv", "channel | conv", **S6),
    _bias("s6.conv_bias", "channel", ssm_conv_bias=True, **S6),
    _linear("s6.dt_low", "dt_rank | channel", "steps", **S6),
    _linear("s6.b", "state | channel", "steps", **S6),
    _linear("s6.c", "state | channel", "steps", **S6),
    _linear("s6.dt", "channel | dt_rank", **S6),
    _bias("s6.dt_bias", "channel", **S6),
    _state("s6.a_log", "channel state", **S6),
    _made("minus_exp", "s6.a", "channel state", "s6.a_log", when=S6),
    _state("s6.d", "channel", **S6),
    _linear("s6.o", "hidden | channel", **S6),
    _linear("gdn.q", "key key_dim | hidden", "gdn", **GDN),
    _linear("gdn.k", "key key_dim | hidden", "gdn", **GDN),
    _linear("gdn.v", "key value value_dim | hidden", "gdn", **GDN),
    _linear("gdn.z", "key value value_dim | hidden", "gdn", **GDN),
    _plain("gdn.b", "key value | hidden", **GDN),
    _plain("gdn.a", "key value | hidden", **GDN),
    _row(CONVOLUTION, "gdn.conv_q", "key key_dim | gdn_conv", **GDN),
    _row(CONVOLUTION, "gdn.conv_k", "key key_dim | gdn_conv", **GDN),
    _row(CONVOLUTION, "gdn.conv_v", "key value value_dim | gdn_conv", **GDN),
    _bias("gdn.dt_bias", "key value", **GDN),
    _state("gdn.a_log", "key value", **GDN),
    _norm("gdn.out_norm", "value_dim", **GDN),
    _linear("gdn.o", "hidden | key value value_dim", **GDN),
    _plain("linear_mixer", "hidden | hidden_in", mixer="linear"),
    _norm("mlp_norm", "hidden", norm_before=True, one_norm=False, mlp=SET),
    _bias("mlp_norm_bias", "hidden", norm="layer", one_norm=False, mlp=SET),
    _plain("linear_mlp", "hidden | hidden_in", mlp="linear"),
    _linear("mlp.gate", "ffn | hidden", "mlp", gated=True, **DENSE),
    _linear("mlp.up", "ffn | hidden", "mlp", **DENSE),
    _linear("mlp.down", "hidden | ffn", **DENSE),
    _bias("mlp.gate_bias", "ffn", gated=True, mlp_bias=True, **DENSE),
    _bias("mlp.up_bias", "ffn", mlp_bias=True, **DENSE),
    _bias("mlp.down_bias", "hidden", mlp_bias=True, **DENSE),
    _norm("mlp_out_norm", "hidden", norm_after=True, mlp=SET),
    _norm("moe.router_norm", "hidden", router_norm=True, **MOE),
    _gate("moe.router", "expert | hidden", **MOE),
    _state("moe.router_bias", "expert", router_bias=True, **MOE),
    _state("moe.expert_scale", "expert", expert_scale=True, **MOE),
    _linear("moe.latent_in", "moe_hidden | hidden", **LATENT),
    _linear("moe.gate", "expert moe_ffn | moe_hidden", "experts", gated=True, **MOE),
    _linear("moe.up", "expert moe_ffn | moe_hidden", "experts", **MOE),
    _linear("moe.down", "expert moe_hidden | moe_ffn", **MOE),
    _linear("moe.latent_out", "hidden | moe_hidden", **LATENT),
    _bias("moe.router_shift", "expert", router_shift=True, **MOE),
    _bias("moe.gate_bias", "expert moe_ffn", gated=True, moe_bias=True, **MOE),
    _bias("moe.up_bias", "expert moe_ffn", moe_bias=True, **MOE),
    _bias("moe.down_bias", "expert moe_hidden", moe_bias=True, **MOE),
    _norm("moe.out_norm", "hidden", shared_norms=True, **MOE),
    _norm("shared.norm", "hidden", shared_norms=True, **SHARED),
    _linear("shared.gate", "shared_ffn | hidden", "shared", gated=True, **SHARED),
    _linear("shared.up", "shared_ffn | hidden", "shared", **SHARED),
    _linear("shared.down", "hidden | shared_ffn", **SHARED),
    _norm("shared.out_norm", "hidden", shared_norms=True, **SHARED),
    _gate("shared.weigh", "hidden", shared_gate=True, **SHARED),
    _state("layer_scale", "one", layer_scale=True),
    _norm("mtp.final_norm", "hidden", mtp_last=True),
    _norm("final_norm", "hidden", stage="last"),
    _bias("final_norm_bias", "hidden", stage="last", norm="layer"),
    _row(HEAD, "head", "vocab | hidden", stage="last", tied=False, draft_vocab=None),
    _row(HEAD, "draft.head", "draft | hidden", stage="last", draft_vocab=SET),
    _state("draft.tokens", "draft", stage="last", draft_vocab=SET),  # how far each is from its number among all tokens
)


def _beside(weight: Tensor) -> tuple[Tensor, ...]:
    """Return the parts of an adapter beside a weight; an expert has one of its own."""
    outputs, inputs = weight.axes[: weight.outputs], weight.axes[weight.outputs :]
    own = outputs[:1] if weight.each_expert else ()
    shapes = ((A, (*own, RANK, *inputs), len(own) + 1), (B, (*outputs, RANK), len(outputs)), (MAGNITUDE, outputs, len(outputs)))
    name, more = weight.part, (ADAPTER, weight.stage, weight.when)
    return tuple(Tensor(f"{name}.{end}", axes, count, *more, of=name) for end, axes, count in shapes)


ADAPTERS = {tensor.part: _beside(tensor) for tensor in TENSORS if tensor.role in ADAPTED}  # weight -> the parts of an adapter
BY_PART = {tensor.part: tensor for tensor in (*TENSORS, *(part for parts in ADAPTERS.values() for part in parts))}
READERS = {
    word: tuple(tensor.part for tensor in TENSORS if tensor.reads == word) for word in {t.reads for t in TENSORS} if word
}
BUFFERS = frozenset(
    ("moe.router_bias", "layer_scale", "draft.tokens")
)  # register_buffer: router.py, gemma4's layer of Megatron-Bridge
TIED = {"head": "embed"}  # what a tied model stores under the first name is the second

"""What vLLM's workers hold, a file a rank: the state between its loading and its packing, which ``sharded_state`` loads.

A family's tensors are those of its Hugging Face folder under the same names, but for what vLLM joins and cuts: so its rows follow from
those of the folder, and a ``Spelling`` says what differs. Cuts are Megatron's, whose layers vLLM took over. Names and shapes are of the
releases of the kind: vllm 0.32 model_executor/layers/linear.py, vocab_parallel_embedding.py, fused_moe/, models/.

A module that is registered twice has two names: the first is that of ``named_parameters()``, by which vLLM digests it, the smallest
that of its file (``_filter_subtensors`` of model_executor/model_loader/sharded_state_loader.py).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from carnet.algebra.layout import JOIN
from carnet.dialects.configs import keys_of
from carnet.dialects.kinds import KINDS
from carnet.dialects.rows import MODULE, Constant, Dialect, Row, fuse, row
from carnet.dialects.sharing import cuts
from carnet.model.fields import Config
from carnet.model.model import number, value
from carnet.model.tensors import BY_PART, NORM

GATED_QKV, GATED_QKV_BIAS, QKV, QKV_BIAS = (
    tuple(f"attention.{part}{end}" for part in parts) for parts in (("q", "gate", "k", "v"), "qkv") for end in ("", "_bias")
)
LATENT = ("mla.q_a", "mla.kv_a", "mla.k_rope")
# canonical tensors that are one here, in stored order -> the module that holds them
JOINED: Mapping[tuple[str, ...], str] = {
    **dict.fromkeys((GATED_QKV, GATED_QKV_BIAS, QKV, QKV_BIAS), "qkv_proj"),
    **{(f"{mlp}.gate{end}", f"{mlp}.up{end}"): "gate_up_proj" for mlp in ("mlp", "shared") for end in ("", "_bias")},
    LATENT: "fused_qkv_a_proj",
    tuple(f"gdn.{part}" for part in "qkvz"): "in_proj_qkvz",
    ("gdn.b", "gdn.a"): "in_proj_ba",
}
EXPERTS = {"moe.gate", "moe.up", "moe.down"}
# where the queries of latent attention are not compressed, what they are joined with stands alone
APART = {"q_compressed": False}

# attention.py of model_executor/layers/attention: buffers of every layer that attends, seen from the projection beside it
SCALES = tuple(Constant(f"_{of}_scale", "f32", (), 1.0) for of in ("k", "prob", "q", "v"))
BUFFERS = (*(f".{one.name}" for one in SCALES), ".layer_scalar")  # the last of models/gemma4.py
# and parameters of one whose weights are codes, until they are packed: quantization/kv_cache.py, compressed_tensors.py
CACHED = {"k": "k", "v": "v"}
OF_MODELOPT, OF_FP8 = (
    tuple(Constant(f"{of}_scale", "own", (), -1.0, style, CACHED.get(of, "")) for of in ("k", "prob", "q", "v"))
    for style in ("modelopt", "deepseek")
)
OF_PRESSED = (
    *(Constant(f"{of}_scale", "f32", (1,), 1.0, "compressed-tensors", CACHED.get(of, "")) for of in "kqv"),
    *(Constant(f"{of}_zero_point", "own", (1,), 0.0, "compressed-tensors") for of in "kqv"),
)
ATTENTION = {
    **dict.fromkeys(
        ("qkv_proj.weight", "query_key_value.weight", "c_attn.weight"), ("attn.", (*SCALES, *OF_MODELOPT, *OF_FP8, *OF_PRESSED))
    ),
    "kv_b_proj.weight": ("mla_attn.mla_attn.", (*SCALES, *OF_MODELOPT)),  # the others ask for no latent attention
}
CONSTANTS = {
    f".{beside}": tuple(replace(one, name=at + one.name) for one in those) for beside, (at, those) in ATTENTION.items()
}

HEAD = "/lm_head.weight"
AROUND = ("embed", "final_norm", "final_norm_bias", "head")  # what stands before and behind the layers


def _embed(**written: object) -> Row:
    return row("embed_tokens.weight", "vocab hidden", "embed", cut="vocab", written=written)


@dataclass(frozen=True, slots=True)
class Spelling:
    """What vLLM's class of a family calls otherwise, or stores otherwise, than a Hugging Face folder."""

    prefix: str | None = None  # what stands before every name, where a folder has something else
    renames: Mapping[str, str] = field(default_factory=dict)  # part of a folder's name -> what it is here
    aliases: Mapping[str, str] = field(default_factory=dict)  # part of a module's first name -> its smallest
    everywhere: tuple[str, ...] = ()  # what of that which stands before and behind all layers every stage has
    head: bool = True  # the head has a module of its own; elsewhere it is the embedding, whatever the folder says
    ties: bool = True  # a tied head and its embedding are one, which has the smaller name; else each is stored
    written: Mapping[str, object] = field(default_factory=dict)  # what its class reads in a config that transformers' does not
    rows: tuple[Row, ...] = ()  # in the place of those that follow from the folder's for the same tensors
    fixed: Mapping[str, object] = field(default_factory=dict)  # keys of a config of which its class can do one value alone


# the runner of the experts holds the router and the shared experts: layers/fused_moe/layer.py, runner/shared_experts.py
ROUTER = {".mlp.gate.": ".mlp.experts.gate."}
RUN = ".experts._shared_experts._layer."
SHARED = {".mlp.shared_experts.": f".mlp{RUN}"}
WEIGHED = {".mlp.shared_expert.": f".mlp{RUN}", ".mlp.shared_expert_gate.": f".mlp{RUN}expert_gate."}
# layers/mla.py holds what comes before its kernel, and behind
TWICE = {f".self_attn.{name}": f".self_attn.mla_attn.{name}" for name in ("o_proj.", "q_a_layernorm.", "q_b_proj.", "q_proj.")}

LLAMA, EVERYWHERE = Spelling(), Spelling(everywhere=AROUND)
HEADLESS = Spelling(everywhere=AROUND, head=False)
MIXED = Spelling(everywhere=AROUND, aliases=ROUTER)
# of classes that keep the router in f32, and whose experts hold the bias that chooses them instead
CHOSEN = {".mlp.gate.e_score_correction_bias": ".mlp.experts.routed_experts.e_score_correction_bias", **SHARED}
WIDE = (
    row("layers.{layer}.mlp.gate.weight", "expert hidden", "moe.router", dtype="f32"),
    row("layers.{layer}.mlp.gate.e_score_correction_bias", "expert", "moe.router_bias", dtype="f32"),
)
GLM = Spelling(ties=False, aliases=CHOSEN, rows=WIDE)
DEEPSEEK = Spelling(ties=False, aliases={**ROUTER, **SHARED, **TWICE})


def dialect(folder: Dialect, spelling: Spelling) -> Dialect:
    """Return how vLLM stores a family, from how a Hugging Face folder does."""
    rows = [*_ends(spelling), *spelling.rows]
    own = {"head", *(part for each in rows for part in _parts(each))}
    own |= {part for each in own for part in BY_PART[each].operands}  # what is computed of them stands in their place
    others = [each for each in folder.rows if _is_written(each) and own.isdisjoint(_parts(each))]
    rows += [*_follows(others)]
    named = tuple(replace(each, name=_spelled(each.name, {**spelling.renames, **spelling.aliases})) for each in rows)
    return replace(
        folder,
        kind=KINDS["vllm"],
        prefixes=folder.prefixes[:1] if spelling.prefix is None else (spelling.prefix,),
        rows=named,
        table=replace(
            folder.table,
            rows=tuple(each for each in folder.table.rows if spelling.fixed.keys().isdisjoint(keys_of(each))),
            fixed={**folder.table.fixed, **spelling.fixed},
            written={**folder.table.written, **spelling.written},
        ),
        writes_tied=spelling.head,
        constants=CONSTANTS,
        dropped={**folder.dropped, **{f"*.{one.name}": CONSTANT for one in chain.from_iterable(CONSTANTS.values())}},
        told_by={**folder.told_by, "ep": _shared_by, "moe_tp": lambda shapes, c: number(c, "tp") // _shared_by(shapes, c)},
        aliases=spelling.aliases,
        on_all_stages=frozenset(part for part in spelling.everywhere if spelling.head or part != "head"),
    )


def _ends(spelling: Spelling) -> Iterator[Row]:
    """Yield the rows of embedding and head: of tied ones the first stage has the one, the last the other, or all have the head."""
    if not spelling.head or not spelling.ties:
        yield _embed()
    else:
        yield _embed(tied=False)
        yield from () if "head" in spelling.everywhere else [_embed(tied=True, last=False)]
    if spelling.head:
        yield row(HEAD, "vocab hidden", "head", cut="vocab")


CONSTANT = "a constant of the engine"


def digest_key(dialect: Dialect, name: str, config: Config) -> str:
    """Return the name by which vLLM digests a stored tensor, that of ``named_parameters()``; "" for a buffer, which has no digest.

    >>> from carnet.architectures.qwen import QWEN3_MOE
    >>> made = dialect(QWEN3_MOE.hf, MIXED)
    >>> digest_key(made, "model.layers.0.mlp.experts.gate.weight", {}), digest_key(made, "lm_head.weight", {"tied": True})
    ('model.layers.0.mlp.gate.weight', 'model.embed_tokens.weight')
    """
    if name.endswith(BUFFERS):
        return ""
    embed = next(each for each in dialect.rows if _parts(each) == ["embed"])
    if value(config, "tied") and embed.written and name == HEAD[1:]:
        return dialect.prefixes[0] + embed.name
    longest = sorted(dialect.aliases.items(), key=lambda each: -len(each[1]))
    return _spelled(name, {smallest: first for first, smallest in longest})


def _spelled(name: str, renames: Mapping[str, str]) -> str:
    for old, new in renames.items():
        name = name.replace(old, new)
    return name


def _parts(of: Row) -> list[str]:
    return [part for part, _ in of.pattern.parts]


def _is_written(of: Row) -> bool:
    """Say whether a row of a folder is what its class stores: not a module of its own for codes, nor of layers after the others."""
    further = "is_mtp" in of.when or any(part.startswith("mtp.") for part in _parts(of))
    return of.written != MODULE and not of.written.get("coded") and not further


def _follows(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows that follow from a folder's, in its order: joined, or as they stand, and cut."""
    held, done = {part for each in rows for part in _parts(each)}, set[str]()
    for each in rows:
        parts = _parts(each)
        whole = next((all_ for all_ in JOINED if {*parts} < {*all_} <= held), None)
        if done.issuperset(parts):
            continue
        if not EXPERTS.isdisjoint(parts):
            done |= EXPERTS
            yield from _mixture(each)
        elif whole is not None:
            done |= {*whole}
            yield _joined(whole, [other for other in rows if {*_parts(other)} <= {*whole}])
        else:
            # norms of all heads are whole, and each rank takes its part
            yield replace(each, cut="" if BY_PART[parts[0]].role == NORM else cuts().get(parts[0], ""))
        if whole == LATENT:
            yield from (replace(other, when=APART) for other in rows if _parts(other) == [*LATENT[1:]])


def _joined(parts: Sequence[str], members: Sequence[Row]) -> Row:
    """Return the row of what a folder has apart: the same rows one after the other."""
    first = next(each for each in members if _parts(each)[0] == parts[0])
    path, _, last = first.name.rsplit(".", 2)
    inside = {part: axes for each in members for part, axes in _outputs(each)}
    columns = (f"({' '.join(axes)})" if len(axes) > 1 else axes[0] for axes in first.pattern.dims[1:])
    name = f"{path}.{JOINED[tuple(parts)]}.{last}"
    return fuse(name, " ".join(("*", *columns)), {part: inside[part] for part in parts}, cut=cuts()[parts[0]])


def _outputs(of: Row) -> Iterable[tuple[str, str]]:
    """Return the tensors of a row, each with the axes of its rows."""
    inside = (axes if of.pattern.dims[0] == (JOIN,) else (*of.pattern.dims[0], *axes) for _, axes in of.pattern.parts)
    return [*zip(_parts(of), map(" ".join, inside), strict=True)]


def _mixture(of: Row) -> Iterator[Row]:
    """Yield the two tensors of all experts of a layer, from a row of any of them."""
    at = of.name.partition(".{expert}")[0] if "{expert}" in of.name else of.name.rsplit(".", 1)[0]
    both = {"moe.gate": "moe_ffn", "moe.up": "moe_ffn"}
    yield fuse(f"{at}.routed_experts.w13_weight", "expert * moe_hidden", both, cut="expert", when={"gated": True})
    yield row(f"{at}.routed_experts.w13_weight", "expert moe_ffn moe_hidden", "moe.up", cut="expert", when={"gated": False})
    yield row(f"{at}.routed_experts.w2_weight", "expert moe_hidden moe_ffn", "moe.down", cut="expert")


def _shared_by(shapes: Mapping[str, tuple[int, ...]], config: Config) -> int:
    """Return how many ranks share the experts, as the number that a rank holds tells."""
    held = next((shape[0] for name, shape in shapes.items() if name.endswith(".w2_weight")), 0)
    tp = number(config, "tp")
    return tp if held and held * tp == number(config, "experts") else 1

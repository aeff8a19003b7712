"""The rows of adapters, derived from those of the weights that they are beside: no program's are written by hand.

::

    X.weight                      outputs | inputs    Megatron-Bridge
    X.adapter.linear_in.weight    rank | inputs
    X.adapter.linear_out.weight   outputs | rank      PEFT: X.lora_A.weight, X.lora_B.weight

A weight that Megatron joins has one A for all parts, or, of its canonical LoRA, an adapter for each part: ``X.adapter.adapter_q``.
A folder of PEFT's has one for each of its own modules, so that one A for several of them is written as often.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from carnet.algebra.layout import JOIN
from carnet.dialects.kinds import KINDS
from carnet.dialects.rows import MODULE, Dialect, Row, fuse
from carnet.model.tensors import ADAPTED, BY_PART, MAGNITUDE, RANK, A, B

WEIGHT, IN_PROJ, MIXER = ".weight", ".in_proj.weight", "mixer.in_proj.weight"


@dataclass(frozen=True, slots=True)
class Spelling:
    """What the parts of an adapter are called below the module of a weight."""

    a: str
    b: str
    magnitude: str
    # part of a joined weight -> what stands between where it has an adapter of its own; never of experts
    parts: Mapping[str, str]


# NVIDIA-NeMo/Megatron-Bridge 0.6: src/megatron/bridge/peft/{adapter_wrapper,utils,dora_layers}.py; canonical_lora.py for the parts
BRIDGE = Spelling(
    ".adapter{part}.linear_in.weight",
    ".adapter{part}.linear_out.weight",
    ".adapter{part}.weight_magnitude",
    {
        "attention.q": ".adapter_q",
        "attention.k": ".adapter_k",
        "attention.v": ".adapter_v",
        "mlp.gate": ".adapter_gate",
        "mlp.up": ".adapter_up",
        "shared.gate": ".adapter_gate",
        "shared.up": ".adapter_up",
    },
)
# modelscope/ms-swift swift/megatron/tuners/lora.py, and mcore-bridge: what a run saves is the adapters alone; read, never written
SWIFT = Spelling(".lora_A.default.weight", ".lora_B.default.weight", ".no_magnitude", {})
# huggingface/peft 0.21: src/peft/utils/save_and_load.py get_peft_model_state_dict
PEFT = Spelling(".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", {})
MODULES = {"NemotronHForCausalLM": "model."}  # class -> what its files call otherwise than its modules, which peft names
PEFT_TOP = "base_model.model."  # PeftModel and LoraModel around the model


def adapted(dialect: Dialect, base: Dialect) -> Dialect:
    """Return a dialect with the rows of adapters beside the weights of ``base``, which are its own or those that it leaves out."""
    if dialect.kind.arguments:
        swift = _rows([replace(row, written=MODULE) for row in _whole(base.rows)], SWIFT)
        return replace(dialect, rows=(*dialect.rows, *_rows([*_whole(base.rows)], BRIDGE), *_split(base.rows), *swift))
    named = [replace(row, name=f"/{PEFT_TOP}{row.name[1:]}" if row.name[0] == "/" else row.name) for row in base.rows]
    # experts are modules, whether they are codes or not: peft itself stacks them where a class has them in one parameter
    plain = [replace(row, written={name: each for name, each in row.written.items() if name != "coded"}) for row in named]
    rows = (*_rows(plain, PEFT), *_stacked(plain))
    first = MODULES.get(base.architecture, base.prefixes[0])
    return replace(dialect, prefixes=tuple(dict.fromkeys(PEFT_TOP + each for each in (first, *base.prefixes))), rows=rows)


def _whole(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows of Megatron's weights, those as if they were written that are stored in parts: their adapters have one A."""
    for row in rows:
        yield replace(row, written={}) if row.name.endswith(IN_PROJ) else row


def _split(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows of B beside Mamba's weight, which is stored in parts, and so is B: ParallelLinearAdapter.sharded_state_dict.

    That of Gated DeltaNet is not: src/megatron/bridge/peft/adapter_wrapper.py.
    """
    group = tuple(dict(next(row for row in rows if row.name.endswith(MIXER)).pattern.parts))
    for row in rows:
        module, found, part = row.name.partition(f"{MIXER}.")
        if found:
            ((tensor, _),) = row.pattern.parts
            name, text = f"{module}mixer.in_proj{BRIDGE.b.format(part='')}.{part}", _text([row.pattern.dims[0], (RANK,)])
            yield replace(fuse(name, text, {f"{tensor}.{B}": ""}, cut=row.cut, written={"joined": True}), joined=group)


def of_peft(base: Dialect) -> Dialect:
    """Return how a folder of PEFT's stores the adapters of a family: nothing but those."""
    return replace(base, kind=KINDS["peft"], rows=(), dropped={}, told_by={}, constants={})


def _rows(rows: Sequence[Row], spelling: Spelling) -> Iterator[Row]:
    known = dict[tuple[str, str], int]()
    for row in rows:
        for made in _beside(row, spelling):
            key = made.name, repr((made.pattern, made.when))
            if key not in known:  # a weight that is there under several names of a source
                known[key] = 1
                yield made


# of a class whose experts are parameters of one module, which peft wraps one around the other: what reads the model's stream inside
STACKED = {"moe.gate": "base_layer.", "moe.up": "base_layer.", "moe.down": ""}
EXPERT = ".{expert}."
RENAMED = ("block_sparse_moe.", "mlp.")  # of transformers 5, whose files have the old name


def _stacked(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows of adapters beside experts in one parameter; not written where a file has a module for each expert.

    A has the ranks of all experts behind each other, B the experts of each rank: ParamWrapper in src/peft/tuners/lora/layer.py.
    """
    apart = {module for row in rows if EXPERT in row.name for module in [row.name.partition(EXPERT)[0].replace(*RENAMED)]}
    for module in sorted(apart):
        facts = dict(BY_PART["moe.gate"].when)
        both = fuse("", "expert * moe_hidden", {"moe.gate": "moe_ffn", "moe.up": "moe_ffn"}, when=facts)
        up = fuse("", "expert moe_ffn moe_hidden", {"moe.up": ""}, when={"gated": False})
        for each in (both, up, fuse("", "expert moe_hidden moe_ffn", {"moe.down": ""})):
            yield from _of_parameter(module, each, MODULE)
    for row in rows if not apart else ():
        if row.pattern.parts[0][0] in STACKED and not row.name.endswith(WEIGHT) and not row.stored:
            yield from _of_parameter(row.name.rpartition(".")[0], row, {})


def _of_parameter(module: str, row: Row, written: Mapping[str, object]) -> Iterator[Row]:
    """Yield the rows of the adapters beside experts that a row has in one parameter of a module."""
    names = dict(row.pattern.parts)
    first = BY_PART[next(iter(names))]
    inputs = {*first.axes[first.outputs :]}
    into, out = ([dim for dim in row.pattern.dims[1:] if ({*dim} <= inputs) == wanted] for wanted in (True, False))
    joined = tuple(names) if len(names) > 1 else ()
    said = {**written, **({"joined": True} if joined else {})}
    top = f"{module}.{STACKED[first.part]}"
    a = fuse(f"{top}lora_A.weight", _text([("expert", RANK), *into]), {f"{first.part}.{A}": ""}, when=row.when, written=said)
    of = {f"{part}.{B}": " ".join(axes) for part, axes in names.items()}
    b = fuse(f"{top}lora_B.weight", _text([*out, (RANK, "expert")]), of, when=row.when, written=said)
    yield from (replace(each, joined=joined) for each in (a, b))


def _beside(row: Row, spelling: Spelling) -> Iterator[Row]:
    """Yield the rows of the adapter beside a stored weight; of one that joins several also those of each part."""
    parts = [*dict.fromkeys(part for part, _ in row.pattern.parts)]
    tensors = [BY_PART[part] for part in parts]
    if not (row.name.endswith(WEIGHT) and all(tensor.role in ADAPTED for tensor in tensors)) or row.stored:
        return
    inputs = tensors[0].axes[tensors[0].outputs :]
    into = [dim for dim in row.pattern.dims if dim and {*dim} <= {*inputs}]
    if len(into) != 1:
        return  # what is joined is what it reads
    own = [dim for dim in row.pattern.dims if dim == ("expert",)] if tensors[0].each_expert else []
    out = [dim for dim in row.pattern.dims if dim not in into]
    facts = {name: wanted for tensor in tensors for name, wanted in tensor.when.items()} | {**row.when}
    module = row.name.removesuffix(WEIGHT)
    cut_in, cut_out = _cuts(row, inputs, out)
    apart = len(parts) > 1 and all(part in spelling.parts for part in parts)
    joined = tuple(parts) if len(parts) > 1 else ()
    one = {**row.written, **({"joined": True} if joined else {})}

    def made(
        end: str, dims: Sequence[tuple[str, ...]], names: Mapping[str, str], cut: str, written: Mapping[str, object]
    ) -> Row:
        return replace(fuse(module + end, _text(dims), names, cut=cut, when=facts, written=written), joined=joined)

    inner = dict(row.pattern.parts)
    yield made(spelling.a.format(part=""), [*own, (RANK,), *into], {f"{parts[0]}.{A}": ""}, cut_in, one)
    for end, name, dims in ((B, spelling.b, [*out, (RANK,)]), (MAGNITUDE, spelling.magnitude, out)):
        names = {f"{part}.{end}": " ".join(inner[part]) for part in parts}
        apart_too = {**one, **MODULE} if spelling is BRIDGE and row.name.endswith(MIXER) else one
        yield made(name.format(part=""), dims, names, cut_out, apart_too)
    for part in parts if apart else ():
        alone, each = spelling.parts[part], {**row.written, "joined": False}
        whole = [tuple(axis for one in dim for axis in (inner[part] if one == JOIN else (one,))) for dim in out]
        yield made(spelling.a.format(part=alone), [*own, (RANK,), *into], {f"{part}.{A}": ""}, cut_in, each)
        yield made(spelling.b.format(part=alone), [*whole, (RANK,)], {f"{part}.{B}": ""}, cut_out, each)


def _cuts(row: Row, inputs: Sequence[str], out: Sequence[tuple[str, ...]]) -> tuple[str, str]:
    """Return what ranks cut of A and of B: the rank where the weight's outputs are cut, else what it reads, and the outputs of B.

    Megatron-Bridge: src/megatron/bridge/peft/utils.py ParallelLinearAdapter.
    """
    if row.cut in ("", "expert"):
        return row.cut, row.cut
    return (row.cut, out[0][0]) if row.cut in inputs else (RANK, row.cut)


def _text(dims: Sequence[tuple[str, ...]]) -> str:
    return " ".join("1" if not dim else dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in dims)

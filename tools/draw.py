"""Draw what the documentation shows of the algebra, from the program's own plans, views and boxes: docs/drawings/*.svg.

Without options the files are compared with what would be drawn today; with ``--write`` they are replaced.
"""

import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from math import prod
from os import curdir
from pathlib import Path

sys.path.insert(0, curdir)  # this is run as a file, and the folder of headers is the benchmarks'

import carnet
from bench.skeleton import write as write_headers
from carnet.algebra.box import Box, intersect
from carnet.algebra.layout import Share, cut_or_repeat, cut_padded, fold, parse, view
from carnet.steps import Move

DRAWINGS = Path("docs/drawings")
INK, FAINT, PAPER = "#24292f", "#8c959f", "#ffffff"
COLOURS = {"q": "#9ec9e8", "k": "#f5b97a", "v": "#a8d5a2"}
MEGATRON = ("(kv *) hidden", {"q": "rep dim", "k": "dim", "v": "dim"})  # per KV head its query heads, its key, its value
VLLM = ("* hidden", {"q": "kv rep dim", "k": "kv dim", "v": "kv dim"})
AXES = {"q": ("kv", "rep", "dim", "hidden"), "k": ("kv", "dim", "hidden"), "v": ("kv", "dim", "hidden")}
WIDTHS = {"bf16": 2}


def main() -> int:
    """Compare or write every drawing."""
    DRAWINGS.mkdir(exist_ok=True)
    drawn = {"crossing": crossing(), "pattern": patterns(), "share": shares(), "boxes": boxes()}
    stale = [name for name, svg in drawn.items() if not (path := place(name)).exists() or path.read_text() != svg]
    if "--write" in sys.argv:
        for name in stale:
            place(name).write_text(drawn[name])
        return 0
    for name in stale:
        print(f"{place(name)} is not what the program draws: run make format")
    return bool(stale)


def place(name: str) -> Path:
    """Return where a drawing lies."""
    return DRAWINGS / f"{name}.svg"


# --- SVG ---------------------------------------------------------------------------------------------------------------------


def svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """Return a drawing: text of its own size on paper of its own, so that it looks the same on any page."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {num(width)} {num(height)}" width="{num(width)}" role="img" '
        f'font-family="ui-sans-serif, system-ui, Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", rect(0, 0, width, height, PAPER), *parts, "</svg>", ""])


def num(value: float) -> str:
    """Return a number without what says nothing."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def rect(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", more: str = "") -> str:
    """Return a rectangle."""
    return (
        f'<rect x="{num(x)}" y="{num(y)}" width="{num(width)}" height="{num(height)}" fill="{fill}" stroke="{stroke}"{more}/>'
    )


def text(x: float, y: float, words: str, *, size: float = 12, at: str = "start", fill: str = INK, mono: bool = False) -> str:
    """Return words; ``at`` says what of them stands at x."""
    face = ' font-family="ui-monospace, Menlo, Consolas, monospace"' if mono else ""
    return (
        f'<text x="{num(x)}" y="{num(y)}" font-size="{num(size)}" text-anchor="{at}" fill="{fill}"{face}>{escape(words)}</text>'
    )


def ribbon(x0: float, y0: float, x1: float, y1: float, thick: float, fill: str) -> str:
    """Return a band from one height to another."""
    half = (x0 + x1) / 2
    there = f"M{num(x0)},{num(y0)} C{num(half)},{num(y0)} {num(half)},{num(y1)} {num(x1)},{num(y1)}"
    back = (
        f"L{num(x1)},{num(y1 + thick)} C{num(half)},{num(y1 + thick)} {num(half)},{num(y0 + thick)} {num(x0)},{num(y0 + thick)}"
    )
    return f'<path d="{there} {back} Z" fill="{fill}" fill-opacity="0.55"/>'


def legend(x: float, y: float) -> Iterator[str]:
    """Yield what the colours mean."""
    for at, (part, said) in enumerate({"q": "queries", "k": "keys", "v": "values"}.items()):
        yield rect(x + 95 * at, y - 11, 14, 14, COLOURS[part], INK, ' stroke-width="0.5"')
        yield text(x + 95 * at + 20, y, f"{part}: {said}")


# --- one tensor from four files to two: a real plan ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Bytes that lie together in the source and in the target: the heads of one KV head."""

    part: str
    kv: int
    source: tuple[str, int]  # file, offset
    target: tuple[str, int]
    nbytes: int


def crossing() -> str:
    """Draw the fused weight of an attention, TP 4 to TP 2: every run of bytes that the plan's steps move."""
    runs = [*planned()]
    unit, gap, left, right, broad = 11 / min(run.nbytes for run in runs), 22, 150, 600, 120
    sources, targets = (sorted({getattr(run, side)[0] for run in runs}) for side in ("source", "target"))
    total = sum(run.nbytes for run in runs) * unit
    height = 96 + total + gap * len(sources) + 10
    tops = {
        **stacked(sources, runs, "source", 96, total + gap * 3, unit),
        **stacked(targets, runs, "target", 96, total + gap * 3, unit),
    }

    def parts() -> Iterator[str]:
        yield text(left + broad / 2, 28, "Megatron, TP 4", size=15, at="middle")
        yield text(left + broad / 2, 46, "linear_qkv.weight, (kv *) hidden", size=11, at="middle", mono=True)
        yield text(right + broad / 2, 28, "vLLM, TP 2", size=15, at="middle")
        yield text(right + broad / 2, 46, "qkv_proj.weight, * hidden", size=11, at="middle", mono=True)
        yield from legend(300, 84)
        for run in runs:
            thick = run.nbytes * unit
            ends = [tops[file] + offset * unit for file, offset in (run.source, run.target)]
            yield ribbon(left + broad, ends[0], right, ends[1], thick, COLOURS[run.part])
            for x, y in zip((left, right), ends, strict=True):
                yield rect(x, y, broad, thick, COLOURS[run.part], INK, ' stroke-width="0.5"')
                yield text(x + broad / 2, y + thick / 2 + 3.5, f"{run.part} of KV head {run.kv}", size=9, at="middle")
        for names, x, at in ((sources, left - 8, "end"), (targets, right + broad + 8, "start")):
            side = "source" if names is sources else "target"
            for file in names:
                middle = tops[file] + unit * sum(run.nbytes for run in runs if getattr(run, side)[0] == file) / 2
                shown = file.removeprefix("model-") if side == "target" else file
                yield text(x, middle + 4, shown, size=11, at=at, mono=True)

    return svg(900, height, "A weight of attention crosses from four files to two", parts())


def stacked(files: Sequence[str], runs: Sequence[Run], side: str, top: float, room: float, unit: float) -> dict[str, float]:
    """Return where each file's tensor begins, the files spread over some room."""
    tall = [unit * sum(run.nbytes for run in runs if getattr(run, side)[0] == file) for file in files]
    space = (room - sum(tall)) / max(1, len(files) - 1)
    return {file: top + sum(tall[:at]) + space * at for at, file in enumerate(files)}


def planned() -> Iterator[Run]:
    """Yield what a plan moves of one weight, run by run; its offsets count from where the weight begins in a file."""
    with tempfile.TemporaryDirectory() as folder:
        hf, megatron = Path(folder, "hf"), Path(folder, "megatron")
        hf.mkdir()
        write_headers(hf, {name: ("BF16", shape) for name, shape in TENSORS.items()}, CONFIG)
        carnet.cross(hf, megatron, to="megatron", tp=4)
        steps = carnet.plan(megatron, to="vllm", tp=2).steps
    moves = [step for step in steps.only(Move) if step.tensor.rpartition(".")[2] in COLOURS and ".attention." in step.tensor]
    begins = {
        place.file: min(other.offset for move in moves for other in (move.source, move.target) if other.file == place.file)
        for move in moves
        for place in (move.source, move.target)
    }
    for move in moves:
        width = WIDTHS[move.source.dtype]
        for at in range(move.shape[0]):  # a run for each KV head: the rest of the axes lies together on both sides
            source, target = (
                (place.file, place.offset + at * place.strides[0] * width - begins[place.file])
                for place in (move.source, move.target)
            )
            yield Run(move.tensor[-1], move.start[0] + at, source, target, prod(move.shape[1:]) * width)


HIDDEN, HEADS, KV, DIM, FFN, VOCAB = 32, 16, 8, 4, 64, 64
LAYER = "model.layers.0."
TENSORS: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    LAYER + "input_layernorm.weight": (HIDDEN,),
    LAYER + "post_attention_layernorm.weight": (HIDDEN,),
    LAYER + "self_attn.q_proj.weight": (HEADS * DIM, HIDDEN),
    LAYER + "self_attn.k_proj.weight": (KV * DIM, HIDDEN),
    LAYER + "self_attn.v_proj.weight": (KV * DIM, HIDDEN),
    LAYER + "self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
    LAYER + "mlp.gate_proj.weight": (FFN, HIDDEN),
    LAYER + "mlp.up_proj.weight": (FFN, HIDDEN),
    LAYER + "mlp.down_proj.weight": (HIDDEN, FFN),
}
CONFIG: Mapping[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": DIM,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


# --- rows of a folded pattern: what the views say ------------------------------------------------------------------------------


def rows_of(pattern: tuple[str, Mapping[str, str]], shares: Mapping[str, Share]) -> dict[int, tuple[str, Mapping[str, int]]]:
    """Return of each stored row the part that lies there and its canonical indices, as the views of a fold have it."""
    folded, found = fold(parse(*pattern), shares), dict[int, tuple[str, Mapping[str, int]]]()
    for slot in folded.slots:
        seen, axes = view(slot, slot.tensor, AXES[slot.tensor], shares, {}), AXES[slot.tensor]
        for index in product(*(range(length) for length in seen.box.shape[:-1])):
            row = seen.origin[0] + sum(at * stride for at, (_, stride) in zip(index, seen.places, strict=False))
            there = {axis: start + at for axis, start, at in zip(axes, seen.box.start, index, strict=False)}
            found[row] = slot.tensor, there
    return found


def whole(**sizes: int) -> dict[str, Share]:
    """Return whole axes."""
    return {axis: Share(0, size, size) for axis, size in sizes.items()}


def drawn_rows(
    x: float, y: float, broad: float, tall: float, rows: Mapping[int, tuple[str, Mapping[str, int]]]
) -> Iterator[str]:
    """Yield the rows of a stored tensor, each with the part and the indices that it holds."""
    for row, (part, at) in sorted(rows.items()):
        yield rect(x, y + row * tall, broad, tall, COLOURS[part], INK, ' stroke-width="0.5"')
        said = " ".join(f"{axis} {index}" for axis, index in at.items())
        yield text(x + 8, y + row * tall + tall / 2 + 4, part, size=11, mono=True)
        yield text(x + 26, y + row * tall + tall / 2 + 4, said, size=10)


def strides(pattern: tuple[str, Mapping[str, str]], sizes: Mapping[str, Share]) -> dict[str, str]:
    """Return of each part what its view says: its first row, and the rows between neighbours along an axis."""
    said = {}
    for slot in fold(parse(*pattern), sizes).slots:
        steps = ", ".join(f"{axis} {slot.places[axis][1]}" for axis in AXES[slot.tensor][:-1])
        said[slot.tensor] = f"from row {slot.origin[0]}; {steps}"
    return said


def patterns() -> str:
    """Draw one attention's weight under the patterns of two programs, and between them what the views say."""
    sizes = whole(kv=2, rep=2, dim=2, hidden=8)
    tall, broad, top = 20, 150, 78
    sides = [(30.0, "Megatron", MEGATRON), (590.0, "vLLM", VLLM)]

    def parts() -> Iterator[str]:
        for x, name, pattern in sides:
            yield text(x, 28, name, size=15)
            yield text(x, 46, pattern[0], size=11, mono=True)
            yield text(x, 62, ", ".join(f"{part}: {axes}" for part, axes in pattern[1].items()), size=10, mono=True)
            yield from drawn_rows(x, top, broad, tall, rows_of(pattern, sizes))
        yield text(385, 28, "the same axes, two places", size=15, at="middle")
        for at, part in enumerate("qkv"):
            y = top + 18 + at * 108
            yield rect(210, y, 350, 84, COLOURS[part], INK, ' stroke-width="0.5" rx="5" fill-opacity="0.35"')
            yield text(222, y + 22, f"{part}: {' '.join(AXES[part])}", size=13, mono=True)
            for line, (_, name, pattern) in enumerate(sides):
                yield text(222, y + 46 + 22 * line, f"{name}: {strides(pattern, sizes)[part]}", size=12)

    return svg(800, top + 16 * tall + 24, "One weight under the patterns of two programs", parts())


def shares() -> str:
    """Draw a pattern folded with the shares of 1, 2 and 4 ranks: two KV heads are cut, and then repeated."""
    tall, broad, top = 18, 128, 84
    worlds = (1, 2, 4)

    def parts() -> Iterator[str]:
        x = 24.0
        for world in worlds:
            yield text(x, 28, f"TP {world}", size=15)
            said = ("the whole axis kv", "kv is cut: a head on each rank", "kv is repeated, rep is cut")[worlds.index(world)]
            yield text(x, 48, said, size=12)
            for rank in range(world):
                cut = cut_or_repeat("kv", 2, "rep", 2, world, rank)
                rows = rows_of(MEGATRON, {**whole(dim=2, hidden=8), **cut})
                yield text(x, 76, f"rank {rank}", size=11, fill=FAINT)
                yield from drawn_rows(x, top, broad, tall, rows)
                x += broad + 12
            x += 26

    return svg(24 + 7 * (broad + 12) + 2 * 26, top + 16 * tall + 20, "Shares of the axis kv", parts())


def boxes() -> str:
    """Draw an embedding that four ranks cut by rows and two by columns, and the boxes that a plan moves."""
    vocab, hidden, tall, broad, top = 10, 8, 20, 24, 70
    rows = [cut_padded(vocab, 4, rank) for rank in range(4)]
    source = [Box((share.start, 0), (share.held, hidden)) for share in rows]
    target = [Box((0, rank * hidden // 2), (vocab, hidden // 2)) for rank in range(2)]
    shared = [
        (a, b, both) for a, left in enumerate(source) for b, right in enumerate(target) if (both := intersect(left, right))
    ]
    fills = ("#9ec9e8", "#f5b97a", "#a8d5a2", "#d8b4e2")

    def drawn(x: float, box: Box, fill: str, words: str) -> Iterator[str]:
        at = (x + box.start[1] * broad, top + box.start[0] * tall, box.shape[1] * broad, box.shape[0] * tall)
        yield rect(*at, fill, INK, ' stroke-width="1"')
        yield text(at[0] + at[2] / 2, at[1] + at[3] / 2 + 4, words, size=11, at="middle")

    def parts() -> Iterator[str]:
        columns = (30.0, 290.0, 550.0)
        heads = ("source: vocab in 4", "target: hidden in 2", f"moved: {len(shared)} boxes")
        for x, head in zip(columns, heads, strict=True):
            yield text(x, 30, head, size=15)
        yield text(columns[0], 52, f"{rows[-1].stop} rows stored, {vocab} are tokens", size=12)
        yield text(columns[1], 52, "each rank some columns of all rows", size=12)
        yield text(columns[2], 52, "where both overlap: start, shape", size=12)
        for rank, box in enumerate(source):
            yield from drawn(columns[0], box, fills[rank], f"rank {rank}")
        pad = top + vocab * tall
        yield rect(columns[0], pad, hidden * broad, (rows[-1].stop - vocab) * tall, "none", FAINT, ' stroke-dasharray="4 3"')
        yield text(columns[0] + hidden * broad / 2, pad + tall + 4, "padding: left out", size=11, at="middle", fill=FAINT)
        for rank, box in enumerate(target):
            yield from drawn(columns[1], box, "#e6e9ec", f"rank {rank}")
        for from_, _, box in shared:
            yield from drawn(columns[2], box, fills[from_], f"{box.start} {box.shape}")

    return svg(770, top + (vocab + 2) * tall + 24, "Boxes of a source and a target, intersected", parts())


if __name__ == "__main__":
    sys.exit(main())

"""Small crossings drawn from a seed: source files on disk, the plan, and the target's bytes by plain numpy assignment."""

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from carnet.algebra.box import Box, intersect
from carnet.dtypes import BY_NAME, array_type
from carnet.formats.safetensors import render_header
from carnet.plans.columns import Plan, Steps
from carnet.plans.request import MEMORY
from carnet.steps import Fill, Move, Place, Same, Step, TargetFile, TargetTensor, TextFile

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 16,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
    "lm_head.weight": (16, 8),
}

HEADER = 16  # bytes before the first tensor of a source file


@dataclass(frozen=True)
class Crossing:
    plan: Plan
    source: Path
    expected: dict[str, bytes]  # target file -> content


def make_plan(source: Path, files, steps, *, window=1 << 20, texts=(TextFile("config.json", "{}\n"),), assets=()):
    return Plan(str(source), "f", {}, "toy", tuple(files), tuple(texts), assets, Steps.of(steps), {}, {}, MEMORY, window)


def make_file(name: str, tensors: list[tuple[str, str, tuple[int, ...]]]) -> TargetFile:
    def laid(start: int) -> TargetFile:
        rows, offset = [], start
        for tensor, dtype, shape in tensors:
            rows.append(TargetTensor(tensor, dtype, shape, offset))
            offset += BY_NAME[dtype].nbytes * int(np.prod(shape, dtype=np.int64))
        return TargetFile(name, offset, tuple(rows), {})

    return laid(len(render_header(laid(0))))


class Draw:
    """Everything random about one crossing."""

    def __init__(self, folder: Path, seed: int, scale: int) -> None:
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.source = folder / "source"
        self.source.mkdir(parents=True)
        self.scale = scale
        self.sources: dict[str, bytearray] = {}
        self.steps: list[Step] = []

    def cuts(self, shape):
        edges = []
        for n in shape:
            inner = self.random.sample(range(1, n), min(n - 1, self.random.choice((0, 0, 1, 2)))) if n > 1 else []
            edges.append([0, *sorted(inner), n])
        spans = [[(a, b - a) for a, b in itertools.pairwise(edge)] for edge in edges]
        return [Box(tuple(s for s, _ in each), tuple(n for _, n in each)) for each in itertools.product(*spans)]

    def order(self, rank):
        axes = list(range(rank))
        if self.random.random() < 0.5:
            self.random.shuffle(axes)
        return axes

    def stored(self, values, dtype) -> Place:
        """Put an array into a source file, its axes in any order and with room between."""
        order = self.order(values.ndim)
        pad = [self.random.choice((0, 0, 1, 3)) for _ in order]
        room = np.zeros([values.shape[axis] + extra for axis, extra in zip(order, pad, strict=True)], values.dtype)
        part = room[(..., *(slice(extra // 2, extra // 2 + values.shape[a]) for a, extra in zip(order, pad, strict=True)))]
        view = part.transpose(np.argsort(order)) if order else part
        view[...] = values
        file = self.sources.setdefault(f"part{self.random.randrange(3)}.bin", bytearray(HEADER))
        file += bytes(-len(file) % 8)
        start = len(file) + view.__array_interface__["data"][0] - room.__array_interface__["data"][0]
        file += room.tobytes()
        name = next(name for name, data in self.sources.items() if data is file)
        return Place(name, start, tuple(s // values.itemsize for s in view.strides), dtype)

    def tensor(self, name):
        rank = self.random.choice((0, 1, 2, 2, 3, 4))
        shape = tuple(self.random.choice((1, 2, 3, 5, 8)) for _ in range(rank))
        if rank and self.random.random() < 0.2 and self.scale > 1:
            shape = (*shape[:-1], shape[-1] * self.scale)
        if rank and self.random.random() < 0.05:
            shape = (*shape[:-1], 0)
        kind = self.random.choice(
            (("bf16", "bf16"), ("u8", "u8"), ("f32", "f32"), ("f32", "bf16"), ("bf16", "f32"), ("f64", "f16"))
        )
        values = np.asarray(self.numbers.standard_normal(shape)).astype(array_type(kind[0]))
        return name, kind, values

    def target(self, file, name, kind, values, tile):
        """Return the tile of a canonical tensor as a target tensor, and its places: offset within the tensor, strides."""
        order = self.order(len(tile.shape))
        dense = np.zeros([tile.shape[axis] for axis in order], array_type(kind[1]))
        view = dense.transpose(np.argsort(order)) if order else dense
        return dense, view


def draw(folder: Path, seed: int, *, window: int, scale: int = 1) -> Crossing:
    d = Draw(folder, seed, scale)
    made = []  # file, tensor name, kind, dense array, pending steps
    for number in range(d.random.randint(1, 4)):
        name, kind, values = d.tensor(f"t{number}")
        boxes = [(box, d.random.random() < 0.1) for box in d.cuts(values.shape)]
        placed = [(box, None if gone else d.stored(_part(values, box), kind[0])) for box, gone in boxes]
        for box, place in placed:
            if place is not None and d.random.random() < 0.3:
                other = d.stored(_part(values, box), kind[0])
                d.steps.append(Same(name, box.start, box.shape, place, other))
        for tile in d.cuts(values.shape):
            dense, view = d.target("", name, kind, values, tile)
            strides = tuple(s // view.itemsize for s in view.strides)
            file, pending = f"out{d.random.randrange(2)}.safetensors", []
            for box, place in placed:
                shared = intersect(box, tile)
                if shared is None:
                    continue
                local = (
                    ...,
                    *(slice(s - t, s - t + n) for s, t, n in zip(shared.start, tile.start, shared.shape, strict=True)),
                )
                if place is not None:
                    with np.errstate(over="ignore"):
                        view[local] = _part(values, shared).astype(view.dtype)
                at = sum((s - t) * k for s, t, k in zip(shared.start, tile.start, strides, strict=True)) * view.itemsize
                pending.append((shared, box, place, at, strides))
            made.append((file, f"{name}.{len(made)}", kind, dense, pending))
    files = []
    for file in sorted({row[0] for row in made}):
        rows = [row for row in made if row[0] == file]
        files.append(make_file(file, [(name, kind[1], dense.shape) for _, name, kind, dense, _ in rows]))
        for (_, name, kind, _, pending), tensor in zip(rows, files[-1].tensors, strict=True):
            for shared, box, place, at, strides in pending:
                target = Place(file, tensor.offset + at, strides, kind[1])
                if place is None:
                    d.steps.append(Fill(name, shared.shape, target))
                    continue
                skip = sum((s - b) * k for s, b, k in zip(shared.start, box.start, place.strides, strict=True))
                begin = Place(place.file, place.offset + skip * BY_NAME[kind[0]].nbytes, place.strides, kind[0])
                d.steps.append(Move(name, shared.start, shared.shape, begin, target))
    for name, data in d.sources.items():
        (d.source / name).write_bytes(data)
    d.random.shuffle(d.steps)
    expected = {
        file.name: render_header(file) + b"".join(row[3].tobytes() for row in made if row[0] == file.name) for file in files
    }
    return Crossing(make_plan(d.source, files, d.steps, window=window), d.source, expected)


def _part(values, box):
    return values[(..., *(slice(s, s + n) for s, n in zip(box.start, box.shape, strict=True)))]


def straight(folder: Path, *, tensors: int, rows: int, width: int, short: bool, **options) -> Crossing:
    """Return u8 tensors [rows, width], from one file: in long runs, or with its columns from the two halves of a file."""
    source = folder / "source"
    source.mkdir(parents=True)
    file = make_file("model.safetensors", [(f"t{n}", "u8", (rows, width)) for n in range(tensors)])
    steps, data = [], []
    for n, tensor in enumerate(file.tensors):
        values = np.random.default_rng(n).integers(0, 256, (rows, width), np.uint8)
        parts = np.split(values, 2, axis=1) if short else np.split(values, 2, axis=0)
        with open(source / "all.bin", "ab") as file_:
            base = file_.tell()
            file_.write(b"".join(part.tobytes() for part in parts))
        for half, part in enumerate(parts):
            at = (width // 2 if short else rows * width // 2) * half
            begin = Place("all.bin", base + rows * width // 2 * half, (part.shape[1], 1), "u8")
            target = Place(file.name, tensor.offset + at, (width, 1), "u8")
            steps.append(Move(f"t{n}", (0, at) if short else (rows // 2 * half, 0), part.shape, begin, target))
        data.append(values.tobytes())
    return Crossing(make_plan(source, [file], steps, **options), source, {file.name: render_header(file) + b"".join(data)})


def turned(folder: Path, *, rows: int, columns: int, types: tuple[str, str], **options) -> Crossing:
    """Return one matrix that is stored [rows, columns], with room after each row, and wanted [columns, rows]."""
    source = folder / "source"
    source.mkdir(parents=True)
    values = np.random.default_rng(0).standard_normal((rows, columns + 3)).astype(array_type(types[0]))
    (source / "all.bin").write_bytes(values.tobytes())
    file = make_file("model.safetensors", [("t", types[1], (columns, rows))])
    begin = Place("all.bin", 0, (columns + 3, 1), types[0])
    target = Place(file.name, file.tensors[0].offset, (1, rows), types[1])
    step = Move("t", (0, 0), (rows, columns), begin, target)
    turned_ = values[:, :columns].T.astype(array_type(types[1]))
    return Crossing(make_plan(source, [file], [step], **options), source, {file.name: render_header(file) + turned_.tobytes()})


@pytest.fixture(scope="session")
def transposed() -> Callable[..., Crossing]:
    return turned


@pytest.fixture(scope="session")
def crossing() -> Callable[..., Crossing]:
    return draw


@pytest.fixture(scope="session")
def halves() -> Callable[..., Crossing]:
    return straight


def make_source(folder: Path) -> Path:
    """Make a Hugging Face folder: one layer of a Llama."""
    folder.mkdir()
    random = np.random.default_rng(0)
    save_file(
        {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def small_llama() -> Callable[[Path], Path]:
    return make_source


@pytest.fixture
def source(small_llama, tmp_path):
    return small_llama(tmp_path / "source")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"

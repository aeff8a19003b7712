"""What a target stores beside its weights under names that no row has: buffers that follow from the config, and nothing else.

Programs of the past saved the frequencies of rotary positions and causal masks, and TensorRT-LLM saves tables of positions. A loader
may read them, so each must be what the model computes. What cannot be computed here and is not in the source either is a finding; of
TensorRT-LLM's, whose loader makes them anew, it is said that nobody compared them.
"""

from collections.abc import Callable, Iterator, Mapping
from math import pi, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carnet.algebra.box import Box, whole
from carnet.dialects.entries import constants
from carnet.dialects.entry import Entry
from carnet.dialects.rows import Constant
from carnet.dialects.vllm import CONSTANT
from carnet.dtypes import BY_NAME, FLOATS, array_type
from carnet.examiner.compare import Finding, Side
from carnet.examiner.tensor_files import blocks, digest, region
from carnet.formats.stored import Stored, label_of, reshaped
from carnet.model.fields import Config
from carnet.model.model import number, value
from carnet.model.tensors import Canonical
from carnet.quantize.styles import beside

Numbers = NDArray[np.floating[Any]]
Rule = Callable[[Side, Stored, Config], bool | None]  # None where it cannot say
ULPS = 4  # of a frequency in f32: programs raise to a power in more than one way, and take sines in more than one
BASE = 10_000.0  # of TensorRT-LLM's embed_positions, whatever the model's is


def check_buffers(source: Side, target: Side) -> tuple[list[Finding], list[str]]:
    """Return what is wrong with the tensors of a target that are no weights, and those of which nobody says what they must hold."""
    findings, unsure = [], []
    labels = {label_of(key): key for key in target.inventory.checkpoint.tensors}
    for reason, names in target.inventory.dropped.items():
        for label in names:
            stored = target.inventory.checkpoint.tensors[labels[label]] if label in labels else None
            if reason == CONSTANT or stored is None or not stored.chunks or _is_of_source(source, target, stored):
                continue  # an object, or what only training reads: no tensor that a model computes with
            right = RULES[reason](target, stored, source.inventory.config) if reason in RULES else None
            if right is None and target.inventory.dialect.ranked:
                unsure.append(label)
            elif not right:
                what = f"{reason}: {'nothing here says what it must be' if right is None else 'wrong values'}"
                findings.append(Finding(what, stored.name, label, "no weight of the model, and not in the source; remove it"))
    return [*findings, *check_constants(source, target)], unsure


def _cached(source: Side) -> dict[tuple[Canonical, str], float]:
    """Return the scales that a source has of cached keys and values."""
    said, found = source.inventory.said, dict[tuple[Canonical, str], float]()
    if said is None or not said.cache:
        return found
    for (unit, name), entry in source.inventory.entries.items():
        for tensor in (tensor for tensor in entry.reading.tensors[0] if tensor.tensor.cached):
            what = tensor.tensor.cached
            stored = source.inventory.scales.get((unit, beside(name, said.style.cache["kv".index(what)])))
            if stored is not None:
                found[tensor, what] = float(_values(source, stored, whole(stored.shape)).reshape(-1)[0])
    return found


def _right(one: Constant, entry: Entry, cached: Mapping[tuple[Canonical, str], float]) -> float:
    """Return what a constant must be: the number that it always is, or the scale that takes its place."""
    names = entry.reading.tensors[0] if one.cached else ()
    right = next((cached[name, one.cached] for name in names if (name, one.cached) in cached), one.value)
    return float(np.float64(right).astype(array_type(one.dtype)))


def check_constants(source: Side, target: Side) -> Iterator[Finding]:
    """Yield what is wrong with the numbers that a program stores beside weights: each is there, and what it always is."""
    there, stored = target.inventory.dialect, target.inventory.checkpoint.tensors
    said, own = target.inventory.said, str(value(target.inventory.config, "dtype"))
    style, held = "" if said is None else said.style.name, target.inventory.entries.values()
    cached = _cached(source)
    wanted = {(entry.unit, name): (one, _right(one, entry, cached)) for entry, one, name in constants(there, held, style, own)}
    for key, (one, right) in wanted.items():
        label, found = label_of(key), stored.get(key)
        if found is None:
            yield Finding("missing", label, label, f"{there.name} loads no file without it: {one.dtype} {right}")
        elif (found.dtype, found.shape) != (one.dtype, one.shape):
            detail = f"expected {one.dtype} {list(one.shape)}, found {found.dtype} {list(found.shape)}"
            yield Finding("another type or shape", label, label, detail)
        elif (_values(target, found, whole(found.shape)) != right).any():
            yield Finding("not the number that it always is", label, label, f"expected {right}")
    for label in sorted({*target.inventory.dropped.get(CONSTANT, ())} - {label_of(key) for key in wanted}):
        yield Finding("not in the source", label, label, "no layer of the model has it")


def _is_of_source(source: Side, target: Side, stored: Stored) -> bool:
    """Say whether the source holds the same tensor, bit for bit."""
    own = source.inventory.checkpoint.tensors.get((stored.unit, stored.name))
    same = own is not None and (own.dtype, own.shape) == (stored.dtype, stored.shape)
    return same and own is not None and digest(source.tensor_files, own) == digest(target.tensor_files, stored)


def _values(of: Side, stored: Stored, box: Box) -> Numbers:
    bits = np.ascontiguousarray(region(of.tensor_files, stored, box))
    found: Numbers = bits.view(array_type(stored.dtype)).astype(np.float64)
    return found


def _width(config: Config) -> int:
    """Return how many dimensions of a head are rotated."""
    return number(config, "rope_dim") or int(number(config, "head_dim") * float(str(value(config, "rope_percent"))))


def _is_rotary(target: Side, stored: Stored, config: Config) -> bool | None:
    """Say whether a tensor holds the inverse frequencies of rotary positions."""
    if not stored.name.endswith("inv_freq") or value(config, "position") != "rope":
        return None
    width = _width(config)
    bases = {float(str(base)) for name in ("rope_theta", "rope_local_theta") if (base := value(config, name)) is not None}
    known = _of_ranks if target.inventory.dialect.ranked else _frequencies
    candidates = [each for base in sorted(bases) for each in known(config, base, width)]
    if not candidates:
        return None
    if stored.shape != (width // 2,) or stored.dtype not in FLOATS:
        return False
    found = _values(target, stored, whole(stored.shape))
    return any(_is_near(found, right, stored.dtype) for right in candidates)


def _is_near(found: Numbers, right: Numbers, dtype: str) -> bool:
    cast = right.astype(np.float32).astype(array_type(dtype)).astype(np.float64)
    slack = ULPS * 2.0**-23 if BY_NAME[dtype].nbytes >= 4 else 2.0**-8 if dtype == "bf16" else 2.0**-11
    return bool((np.abs(found - cast) <= slack * np.abs(cast)).all())


def _frequencies(config: Config, base: float, width: int) -> Iterator[Numbers]:
    """Yield the frequencies that a model may store: stretched as it computes with them; linear ones unstretched too.

    transformers/modeling_rope_utils.py; before 4.38 LlamaLinearScalingRotaryEmbedding stretched positions and stored plain ones.
    """
    kind = value(config, "rope_type")
    plain: Numbers = base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    factor = float(str(value(config, "rope_factor")))
    if kind in ("default", "linear"):
        yield plain
    if kind == "linear":
        yield plain / factor
    if kind == "longrope":
        yield from (plain / np.asarray(value(config, name), dtype=np.float64) for name in ("rope_short", "rope_long"))
    if kind == "llama3":
        low, high, original = (float(str(value(config, name))) for name in ("rope_low", "rope_high", "rope_original"))
        waves = 2 * pi / plain
        smooth = np.clip((original / waves - low) / (high - low), 0, 1)
        yield (1 - smooth) * plain / factor + smooth * plain


def _of_ranks(config: Config, base: float, width: int) -> Iterator[Numbers]:
    """Yield TensorRT-LLM's frequencies to the bit: they are in f32, as tensorrt_llm/functional.py RopeEmbeddingUtils computes them."""
    powers = (base ** (np.arange(0, width, 2) / width)).astype(np.float32)
    kind, factor = value(config, "rope_type"), float(str(value(config, "rope_factor")))
    if kind in ("default", "linear"):
        yield np.float32(1 / factor if kind == "linear" else 1) / powers
    if kind == "llama3":  # apply_llama3_scaling takes them one by one: numpy 1 computes each in f64 then, numpy 2 in f32
        low, high, original = (float(str(value(config, name))) for name in ("rope_low", "rope_high", "rope_original"))
        for wide in ("f8", "f4"):
            each: Numbers = (np.float32(1) / powers).astype(wide)
            waves = 2 * pi / each
            smooth = (original / waves - low) / (high - low)
            between = (1 - smooth) * each / factor + smooth * each
            stretched = np.where(waves > original / low, each / factor, between)
            yield np.where(waves < original / high, each, stretched).astype(np.float32)


def _is_table(target: Side, stored: Stored, config: Config) -> bool | None:
    """Say whether a tensor is one of TensorRT-LLM's tables of sines and cosines, a row for each position.

    ``embed_positions`` has the sines of a position before its cosines, the attention plugin's table each cosine before its sine
    (tensorrt_llm/layers/attention.py create_attention_const_params). Angles are products in f32, which has no choice how to round.
    """
    if value(config, "position") != "rope" or value(config, "rope_type") == "longrope":  # whose tables nobody compares
        return None
    by_halves, width, positions = stored.name == "embed_positions", _width(config), number(config, "positions")
    if stored.shape != ((1, positions, width) if by_halves else (1, positions * width)) or stored.dtype != "f32":
        return False
    plain: Config = {**config, "rope_type": "default"}
    left = [
        *(_of_ranks(plain, BASE, width) if by_halves else _of_ranks(config, float(str(value(config, "rope_theta"))), width))
    ]
    if not left:
        return None
    flat = reshaped(stored, (positions * width,))
    for box in blocks(whole(flat.shape), max(1, target.tensor_files.block // 16)):
        found = _values(target, flat, box)
        position, column = np.divmod(np.arange(box.start[0], box.start[0] + box.shape[0]), width)
        which, is_sine = (column % (width // 2), column < width // 2) if by_halves else (column // 2, column % 2 == 1)
        turned = np.where(is_sine, pi / 2, 0)  # a sine is the cosine of a quarter turn less
        angles = ((position.astype(np.float32) * each[which]).astype(np.float64) for each in left)
        left = [
            each
            for each, angle in zip(left, angles, strict=True)
            if (abs(np.cos(angle - turned) - found) <= ULPS * 2.0**-23).all()
        ]
        if not left:
            return False
    return True


def _is_mask(target: Side, stored: Stored, config: Config) -> bool | None:
    """Say whether a tensor is a causal mask, ones on and below the diagonal, or the number that masked places get."""
    if stored.name.endswith("masked_bias"):  # GPT-2 -1e4, GPT-NeoX -1e9, later the least number of the type
        return prod(stored.shape) == 1 and bool((_values(target, stored, whole(stored.shape)) <= -9000).all())
    size = number(config, "positions")
    if stored.shape != (1, 1, size, size):
        return False
    for box in blocks(whole(stored.shape), target.tensor_files.block // 8):
        rows = np.arange(box.start[2], box.start[2] + box.shape[2])[:, None]
        columns = np.arange(box.start[3], box.start[3] + box.shape[3])[None, :]
        if not (_values(target, stored, box)[0, 0] == (rows >= columns)).all():
            return False
    return True


RULES: dict[str, Rule] = {"rotary buffer": _is_rotary, "table of positions": _is_table, "causal mask": _is_mask}

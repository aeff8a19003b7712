"""Bringing what the steps of a plan write side by side into a window, each number as its source has it."""

from collections.abc import Iterable

from carnet.executor.assemble import Want, gather, want
from carnet.executor.dequantizing import dequantize, pieces_of
from carnet.executor.geometry import Piece, clip, volume
from carnet.executor.jobs import Part
from carnet.executor.products import multiply, products_of
from carnet.executor.worker import Worker
from carnet.steps import Fill, Make, Move, Product


def place(worker: Worker, parts: Iterable[Part]) -> None:
    """Bring the bytes of some parts side by side into the window, from its start."""
    wants, coded, base = list[Want](), list[tuple[Make | Product, Piece, int]](), 0
    for part in parts:
        for step in part.steps:
            match step:
                case Fill():
                    worker.window[base : base + volume(part.tile)] = 0
                case Make():
                    coded += [(step, piece, base) for piece in pieces_of(step, step.target, part.tile)]
                case Product():
                    coded += [(step, piece, base) for piece in products_of(step, part.tile)]
                case Move():
                    types = step.source.dtype, step.target.dtype
                    for piece in clip(step.shape, step.source, step.target, part.tile):
                        wants.append(want(step, step.source.file, piece, types, base))
        base += volume(part.tile)
    gather(worker, wants)
    for step, piece, at in coded:
        if isinstance(step, Product):
            multiply(worker, step, piece, at)
        else:
            dequantize(worker, step, piece, at)

"""Sliding windows as Hugging Face's configs say them: which layers have one, by a list, by a step, or from a layer on.

transformers: configuration_qwen2.py, configuration_gemma2.py, configuration_exaone4.py.
"""

from collections.abc import Iterator

from carnet.dialects import hf
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER_TYPES
from carnet.model.fields import SET, Config
from carnet.model.model import number, several, value

KEYS = ("sliding_window", "max_window_layers", "layer_types")  # mean nothing without use_sliding_window
Windows = tuple[bool, int | None, int, list[str] | None]  # what use_sliding_window and KEYS say


def _windowed(said: Windows, config: Config) -> tuple[int, ...]:
    """Return a mark a layer, 1 for each that has the window: those that are listed, or all from the first that has it."""
    use, size, first, kinds = said
    count = number(config, "layers")
    if not use or size is None:
        return (0,) * count
    if kinds is None:
        return tuple(int(layer >= first) for layer in range(count))
    return hf.marks_of(kinds, config)


def window(said: Windows, config: Config) -> int | None:
    """Return the window, None where no layer has it."""
    return said[1] if any(_windowed(said, config)) else None


def window_layers(said: Windows, config: Config) -> tuple[int, ...] | None:
    """Return the marks, None where every layer has the window."""
    found = _windowed(said, config)
    return None if all(found) else found


def spelled(config: Config) -> Iterator[Windows | tuple[None, ...]]:
    """Yield what says the window; transformers reads the list of layers, releases before 4.53 and vLLM the first."""
    size, found = value(config, "window"), several(config, "window_layers") or (1,) * number(config, "layers")
    if not isinstance(size, int):
        yield (None,) * 4
        return
    first = found.index(1) if 1 in found else len(found)
    yield True, size, first, [LAYER_TYPES[mark] for mark in found]


def _after(key: str, absent: tuple[object, ...], more: tuple[str, ...]) -> tuple[Spread, Spread]:
    """Write the rows of a window that layers have from one on; where no flag says that it is used, it is."""
    flag = (True,) * (4 - len(absent))

    def choices(config: Config) -> Iterator[tuple[object, ...]]:
        return (each[len(flag) :] for each in spelled(config))

    return (
        Spread("window", key, absent, lambda said, c: window((*flag, *said), c), choices, more=more),
        Spread("window_layers", key, absent, lambda said, c: window_layers((*flag, *said), c), choices, {"window": SET}, more),
    )


USED = _after("use_sliding_window", (False, int, 28, list[str]), KEYS)  # of Qwen
UNASKED = _after("sliding_window", (int, 62, list[str]), KEYS[1:])  # of dots.llm1


def by_step(kinds: list[str] | None, config: Config) -> tuple[int, ...]:
    """Return a mark for each layer that has the window: those that a config lists, or all but every n-th."""
    if kinds is None:
        every = number(config, "window_every")
        return tuple(int((layer + 1) % every > 0) for layer in range(number(config, "layers")))
    return hf.marks_of(kinds, config)


def listed(config: Config) -> list[list[str]]:
    """Return the one list that says which layers have the window."""
    return hf.kinds_of(config, "window_layers")


# of Gemma, and whoever has a step
STEPPED = (
    place("window", "sliding_window", "sliding_window_size"),
    Spread("window_layers", "layer_types", list[str], by_step, listed),
)


def _rotated(kinds: list[str] | None, config: Config) -> tuple[int, ...] | None:
    found = by_step(kinds, config)
    return found if 0 in found else None


# only layers that have the window have positions: Cohere 2, EXAONE 4
ROTATED = Spread("rope_layers", "layer_types", list[str], _rotated, listed)

"""What of a model its stored tensors tell, where no config does: ranks, padding, layers that predict further tokens."""

from collections.abc import Mapping

from carnet.algebra.layout import round_up
from carnet.dialects.kinds import RANKS
from carnet.dialects.rows import Dialect
from carnet.dialects.units import told_ranks
from carnet.formats.stored import Key, Stored
from carnet.model.fields import Config
from carnet.model.model import number


def told_by_store(dialect: Dialect, config: Config, kept: Mapping[Key, Stored]) -> Config:
    """Return what the units, names and shapes that are stored say of a model where its config does not."""
    kind, said = dialect.kind, dict(config)
    if kind.files == RANKS and kind.companions:  # a config that other programs have, too
        said |= told_ranks({unit for unit, _ in kept})
    if kind.pads_to:
        said["padded_vocab"] = round_up(number(config, "vocab"), kind.pads_to)
    shapes = {name: stored.shape for (_, name), stored in kept.items()} if dialect.told_by else {}
    return said | {name: tell(shapes, said) for name, tell in dialect.told_by.items()}


def further_stored(dialect: Dialect, config: Config, kept: Mapping[Key, Stored]) -> int:
    """Return how many further tokens have layers: transformers leaves them out, and their number in the config.

    Where their names are those of nothing else, they are there whatever a config says: Qwen3-Next's says nothing.
    """
    apart = dialect.further[1].strip("/").partition("{layer}")[0]
    there = any((apart or f"layers.{config['layers']}.") in name for _, name in kept)
    return max(number(config, "mtp"), int(bool(apart))) if there else 0

"""What of a model its stored tensors tell, where no config does: ranks, padding, layers that predict further tokens."""

from collections.abc import Mapping
from dataclasses import replace

from carnet.algebra.layout import round_up
from carnet.architectures.known import names_none
from carnet.dialects.configs import lookup
from carnet.dialects.kinds import KINDS, RANKS
from carnet.dialects.megatron.heads import EAGLE3, config_of
from carnet.dialects.megatron.pruned import PRUNED, of_ranks, true_arguments
from carnet.dialects.megatron.releases import Arguments
from carnet.dialects.rows import Dialect
from carnet.dialects.units import told_ranks
from carnet.dialects.vocabulary import Vocabulary
from carnet.formats.stored import Checkpoint, Key, Stored
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


def true_widths(checkpoint: Checkpoint, own: Arguments) -> tuple[Arguments, str]:
    """Return Megatron's arguments with the true widths of a pruned model, and in words what they said."""
    if not KINDS[checkpoint.dialect].arguments or lookup(own, "architectures"):
        return own, ""  # a Hugging Face config in their place
    stored = {key: each.shape for key, each in checkpoint.tensors.items()}
    ranks = {unit for unit, _ in stored} - {""}
    whole = of_ranks(stored) if ranks else {name: shape for (_, name), shape in stored.items()}
    return true_arguments(own, whole, told=checkpoint.pruned or PRUNED in checkpoint.accept)


def as_head(checkpoint: Checkpoint, own: Arguments, vocabulary: Vocabulary | None) -> tuple[Checkpoint, Arguments]:
    """Return a checkpoint and its arguments, with the config of a head that guesses tokens where Megatron's is asked for."""
    if checkpoint.family != EAGLE3 or not names_none(KINDS[checkpoint.dialect], own):
        return checkpoint, own
    head = config_of(own, vocabulary, checkpoint.head, str(checkpoint.root))
    return replace(checkpoint, config=head), head


def further_stored(dialect: Dialect, config: Config, kept: Mapping[Key, Stored]) -> int:
    """Return how many further tokens have layers: transformers leaves them out, and their number in the config.

    Where their names are those of nothing else, they are there whatever a config says: Qwen3-Next's says nothing.
    """
    apart = dialect.further[1].strip("/").partition("{layer}")[0]
    there = any((apart or f"layers.{config['layers']}.") in name for _, name in kept)
    return max(number(config, "mtp"), int(bool(apart))) if there else 0

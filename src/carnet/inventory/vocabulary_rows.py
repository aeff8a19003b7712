"""How many rows of the vocabulary a checkpoint stores, and what that says of how many tokens there are."""

from collections.abc import Mapping

from carnet.algebra.layout import round_up
from carnet.dialects.configs import lookup
from carnet.dialects.entry import Entry
from carnet.dialects.megatron.programs import known_release
from carnet.dialects.vocabulary import Json, Vocabulary, counts_anew, given, vocabulary
from carnet.errors import BadCheckpoint, BadRequest, CarnetError
from carnet.formats.stored import Checkpoint, Key, Stored, label_of
from carnet.model.fields import Config
from carnet.model.model import number

ENDS = frozenset({"embed", "head"})  # canonical tensors with the rows of the vocabulary
EMBEDDING = "word_embeddings.weight"  # Megatron's, whatever stands before it


def told_of(
    checkpoint: Checkpoint, own: Json, vocab: int | None, counted: int | None, like: Config | None
) -> Vocabulary | None:
    """Return the vocabulary of a Megatron checkpoint: as a person says, its arguments tell, or the model has that it should be."""
    where, padded = str(checkpoint.root), own.get("padded_vocab_size")
    rows = padded if type(padded) is int and padded > 0 else stored_rows(checkpoint)
    if not rows:
        return None if vocab is None else Vocabulary(vocab, vocab, "--vocab-size")
    if vocab is not None:
        return given(vocab, rows, where)
    if lookup(own, "architectures"):
        return None  # a Hugging Face config in place of the arguments
    release = known_release(checkpoint.program, checkpoint.era)
    try:
        return vocabulary(own, rows, where, counted=counted, new=counts_anew(release))
    except BadRequest:
        if like is None:
            raise
        return Vocabulary(min(rows, number(like, "vocab")), rows, "the model that it should be")


def stored_rows(checkpoint: Checkpoint) -> int:
    """Return how many rows the tensor-parallel ranks' parts of the embedding have together."""
    found = {unit.split("-")[0]: stored for (unit, name), stored in checkpoint.tensors.items() if name.endswith(EMBEDDING)}
    return sum(stored.shape[0] for stored in found.values() if stored.shape)


def enough(rows: int, config: Config, where: str) -> int | None:
    """Return how many rows are stored, None where that is not known; refuse fewer than the config's."""
    if 0 < rows < number(config, "vocab"):
        facts = {"where": where, "expected": f"at least {number(config, 'vocab')} rows", "found": f"{rows} rows"}
        raise BadCheckpoint(f"the shape of {EMBEDDING!r} contradicts the config", facts)
    return rows or None


def other_rows(config: Config, named: Mapping[Key, Entry], kept: Mapping[Key, Stored]) -> int:
    """Return how many rows of the vocabulary are stored where the config says another number, 0 where it is right."""
    size, world = number(config, "vocab"), number(config, "tp")
    found = set()
    for key, entry in named.items():
        stored = kept[key].shape
        if not ENDS.isdisjoint(entry.tensors[0]) and stored[1:] == entry.stored[1:] != ():
            found.add(stored[0] * (1 if entry.stored[0] == size else world))
    return found.pop() if len(found) == 1 and not found <= {round_up(size, world), size} else 0


def contradicted(config: Config, rows: int, named: Mapping[Key, Entry], kept: Mapping[Key, Stored], where: str) -> CarnetError:
    """Return the refusal of a config whose number of tokens is not that of the rows that are stored."""
    key = next(key for key, entry in named.items() if not ENDS.isdisjoint(entry.names))
    label, size = label_of(key), number(config, "vocab")
    facts = {"where": where, "tensor": label, "expected": [*named[key].stored], "found": [*kept[key].shape], "vocab_size": size}
    remedy = f"name the number of tokens, at most {rows}, with --vocab-size N"
    return BadCheckpoint("the config's vocab_size contradicts the rows that are stored", facts, remedy=remedy)

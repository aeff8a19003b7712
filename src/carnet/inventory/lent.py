"""What another folder lends: adapters, or a tower, with which a Megatron checkpoint of text becomes a model that also sees."""

from collections.abc import Mapping
from dataclasses import replace

from carnet.architectures.known import dialect_of, names_none, of_class, text_of
from carnet.architectures.wrappers import beside, is_of_tower, text_inside
from carnet.dialects.kinds import KINDS, OWN
from carnet.dialects.megatron.providers import UNSAID, lacked
from carnet.dialects.rows import Dialect
from carnet.dialects.towers import found
from carnet.errors import BadRequest
from carnet.formats.adapters import with_alpha
from carnet.formats.detect import open_checkpoint
from carnet.formats.files import digest_of
from carnet.formats.stored import Checkpoint, Key, Stored
from carnet.model.fields import Config
from carnet.storage.lent import ADAPTER, TOWER, WithLent
from carnet.storage.schemes import PathLike, folder_at

OPTION = "--tower"
WIDTH = "hidden_size"  # which Megatron and every class call the same


def with_lent(
    checkpoint: Checkpoint, tower: PathLike | None, adapter: PathLike | None, alpha: float | None = None
) -> Checkpoint:
    """Return a checkpoint with what folders lend it, if any is named: a tower, and adapters, of which a person may say the alpha."""
    checkpoint = checkpoint if tower is None else _with_tower(checkpoint, tower)
    return checkpoint if adapter is None or adapter == OWN else _with_adapter(checkpoint, adapter, alpha)


def _with_tower(checkpoint: Checkpoint, path: PathLike) -> Checkpoint:
    """Return a Megatron checkpoint with what a Hugging Face folder has beside its text model.

    Raises BadRequest where the folder is of no class that also sees or hears, holds no tower or one for another width, and where the
    checkpoint has a tower of its own: one that was trained is never replaced.
    """
    if not KINDS[checkpoint.dialect].arguments:
        facts = {"found": f"{checkpoint.dialect} ({checkpoint.format})"}
        raise BadRequest(f"{OPTION} is for a checkpoint of Megatron's", facts, remedy="leave it out: a folder has its own")
    other = open_checkpoint(folder_at(path))
    where = str(other.root)
    text, rest = text_of(other.config, where)
    config: Config = {"wrapper": rest}
    if not KINDS[other.dialect].companions or not config["wrapper"]:
        facts = {"where": where, "expected": "a Hugging Face folder of a class that also sees or hears"}
        raise BadRequest(f"{OPTION} names a folder without a tower", facts)
    names = {name for _, name in other.tensors}
    family = of_class(text_inside(config))
    apart = beside(dialect_of(family, "hf", config, names), names)
    if not apart:
        facts = {"where": where, "expected": "a text model, and what is beside it"}
        raise BadRequest(f"{OPTION} names a folder without a tower", facts)
    _refuse_width(checkpoint.config, text, where)
    _refuse_own(checkpoint, config, dialect_of(family, checkpoint.dialect, config))
    lent = _marked({key: stored for key, stored in other.tensors.items() if key[1] in apart}, TOWER)
    said = checkpoint.config
    if names_none(KINDS[checkpoint.dialect], said):
        said = {**said, UNSAID: {**lacked(said), **config}}
    return replace(
        _reading(checkpoint, other, TOWER),
        tensors={**checkpoint.tensors, **lent},
        config=said,
        notes={**checkpoint.notes, "tower": f"{len(lent)} tensors of {where}"},
    )


def _with_adapter(checkpoint: Checkpoint, path: PathLike, alpha: float | None) -> Checkpoint:
    """Return a checkpoint with the adapters of another folder beside it; raise BadRequest where that holds none."""
    other = with_alpha(open_checkpoint(folder_at(path)), alpha)
    where = str(other.root)
    if not KINDS[other.dialect].adapters:
        facts = {"where": where, "found": f"{other.dialect} ({other.format})"}
        raise BadRequest("--adapter names a folder without adapters", facts, remedy="name one of PEFT's or Megatron-Bridge's")
    lent = replace(other, root=WithLent(other.root, other.root, ADAPTER), tensors=_marked(other.tensors, ADAPTER))
    return replace(_reading(checkpoint, other, ADAPTER), adapter=lent)


def _reading(checkpoint: Checkpoint, other: Checkpoint, mark: str) -> Checkpoint:
    """Return a checkpoint in whose folder the files of another are read, too, under marked names: both say what it is."""
    stamps = tuple(replace(stamp, file=mark + stamp.file) for stamp in other.stamps)
    return replace(
        checkpoint,
        root=WithLent(checkpoint.root, other.root, mark),
        stamps=(*checkpoint.stamps, *stamps),
        digest=digest_of(f"{checkpoint.digest} {other.digest}".encode()),
    )


def _refuse_width(said: Mapping[str, object], text: Mapping[str, object], where: str) -> None:
    """Refuse a tower whose text model is as wide as none that was trained: what it makes of an image does not fit."""
    wide, trained = text.get(WIDTH), said.get(WIDTH)
    if isinstance(wide, int) and isinstance(trained, int) and wide != trained:
        facts = {"where": where, "found": wide, "expected": trained}
        raise BadRequest(f"{OPTION} names a tower for a text model of another {WIDTH}", facts)


def _refuse_own(checkpoint: Checkpoint, config: Config, dialect: Dialect) -> None:
    """Refuse a checkpoint that has a tower itself, under the names of Megatron-Bridge's or of a folder."""
    where = str(checkpoint.root)

    def is_of(stored: Stored) -> bool:
        held = found(dialect, stored.name, stored.dtype, stored.shape, where)
        return any(is_of_tower(config, each.name) for each in held)

    own = sorted(stored.name for stored in checkpoint.tensors.values() if is_of(stored))
    if own:
        facts = {"where": where, "tensor": own[0], "others": len(own) - 1}
        raise BadRequest("the checkpoint has a tower of its own, which was trained", facts, remedy=f"leave out {OPTION}")


def _marked(tensors: Mapping[Key, Stored], mark: str) -> dict[Key, Stored]:
    return {
        key: replace(stored, chunks=tuple(replace(chunk, file=mark + chunk.file) for chunk in stored.chunks))
        for key, stored in tensors.items()
    }


def is_of_lent_tower(stored: Stored) -> bool:
    """Say whether a tensor is of a tower that another folder lends."""
    return any(chunk.file.startswith(TOWER) for chunk in stored.chunks)

"""A checkpoint as a person says that it is to be understood: with another config, program, tower or alpha than it shows by itself."""

from collections.abc import Sequence
from dataclasses import replace

from carnet.architectures.known import STORAGE, names_none
from carnet.dialects.kinds import KINDS
from carnet.dialects.megatron.programs import program
from carnet.dialects.megatron.providers import UNSAID
from carnet.errors import BadRequest
from carnet.formats.adapters import BRIDGE, SAID, with_alpha
from carnet.formats.jsons import read_object
from carnet.formats.side_files import DOCUMENT
from carnet.formats.stored import Checkpoint
from carnet.formats.wrapped import arguments_of, program_of, read_config
from carnet.inventory.lent import with_lent
from carnet.inventory.planes import open_with
from carnet.storage.protocol import FILE, Folder
from carnet.storage.schemes import PathLike, file_at


def opened(
    path: PathLike | Folder,
    config: PathLike | None,
    written_by: str | None,
    accept: Sequence[str],
    family: str | None,
    tower: PathLike | None = None,
    alpha: float | None = None,
    adapter: PathLike | None = None,
    also: str | None = None,
) -> Checkpoint:
    """Open a checkpoint; a config that is given stands in place of its own, what a person names in place of what shows.

    ``tower`` is a folder that lends what is beside a text model, ``alpha`` that of adapters, ``adapter`` a folder that lends these,
    or ``OWN``; ``also`` is what shall go along with the weights.
    """
    checkpoint = replace(open_with(path, also), accept=tuple(accept), family=family, also=also)
    if config is None and names_none(KINDS[checkpoint.dialect], checkpoint.config):
        checkpoint = _with_needs(checkpoint)
    if config is not None:
        said = read_config(config)
        if KINDS[checkpoint.dialect].arguments:
            own = {key: checkpoint.config[key] for key in STORAGE if key in checkpoint.config}
            checkpoint = replace(checkpoint, program=program_of(said))
            said = {**own, **arguments_of(said, str(config))}
        kept = {key: checkpoint.config[key] for key in (SAID, BRIDGE) if key in checkpoint.config}
        checkpoint = replace(checkpoint, config={**said, **kept})
    checkpoint = with_alpha(with_lent(checkpoint, tower, adapter, alpha), alpha)
    if written_by is None:
        return checkpoint
    if not KINDS[checkpoint.dialect].arguments:
        facts = {"found": f"{checkpoint.dialect} ({checkpoint.format})"}
        raise BadRequest("--written-by is for a checkpoint of Megatron's", facts, remedy="leave it out")
    program(written_by, "--written-by")  # now, whatever else may be wrong
    return replace(checkpoint, program=written_by)


def _with_needs(checkpoint: Checkpoint) -> Checkpoint:
    """Return a Megatron checkpoint with the fields that no argument says, as the carnet beside its iterations has them.

    A run that goes on from a store that carnet wrote saves its own arguments, without those.
    """
    root = file_at(str(checkpoint.root))[0]
    if UNSAID in checkpoint.config or root.kind(DOCUMENT) != FILE:
        return checkpoint
    needs = read_object(root, DOCUMENT).get("needs")
    fields = needs.get("fields") if isinstance(needs, dict) else None
    return replace(checkpoint, config={**checkpoint.config, UNSAID: fields}) if isinstance(fields, dict) else checkpoint

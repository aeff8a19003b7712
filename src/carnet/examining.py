"""Examining a target as a request asks for it: both sides opened as it says, and the examiner asked."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from carnet.dialects.kinds import KINDS, SHARDS
from carnet.dialects.megatron.needs import needs
from carnet.dialects.megatron.programs import LM, program
from carnet.errors import CarnetError
from carnet.examiner import document as documents
from carnet.examiner.account import Known
from carnet.examiner.asked import asked_of, words
from carnet.examiner.desk import Desk, Elsewhere, desk_of, means_for
from carnet.examiner.means import Order
from carnet.examiner.verdict import Proof, examine_target
from carnet.formats.side_files import DOCUMENT
from carnet.formats.stored import Checkpoint
from carnet.inventory.adapting import adapted
from carnet.inventory.bridge import vouched
from carnet.inventory.merged import Merged
from carnet.inventory.opening import opened
from carnet.inventory.planes import open_with
from carnet.inventory.survey import Inventory, survey, take
from carnet.plans.options import local
from carnet.plans.request import Request
from carnet.pool import Progress, silent
from carnet.storage.protocol import Folder, names_in
from carnet.storage.schemes import PathLike


def examine(
    source: Folder,
    target: Folder,
    request: Mapping[str, object],
    known: Sequence[Known],
    memory: int,
    threads: int | None,
    progress: Progress | None,
    *,
    staged: bool = False,
    order: Order | None = None,
    elsewhere: Elsewhere | None = None,
    merged: Merged | None = None,
) -> Proof:
    """Compare a target with its source; ``staged``, ``order`` and ``elsewhere`` are as for ``examine_target``;
    ``merged`` is what is added to the source.
    """
    asked = replace(asked_of(request), foreign=not staged and DOCUMENT not in names_in(target))
    said = asked.request
    try:
        inventory = replace(understood(source, said), merged=merged)
    except CarnetError as error:
        raise error if staged else _with_claims(error, target) from None
    arriving = _meant(open_with(target, said.also), said.reader)
    known = [*known, Known("the arguments", vouched(arriving))]
    if inventory.dialect.kind.companions and KINDS[arriving.dialect].companions and not any(each.whole for each in known):
        known = [*known, Known("the source", folder=source)]
    return examine_target(
        inventory,
        target,
        checkpoint=arriving,
        source_path=source,
        needs=lambda arrived: _needs(arrived, said.reader),
        asked=asked,
        request=request,
        known=known,
        memory=memory,
        threads=threads,
        progress=progress or silent,
        staged=staged,
        order=order,
        elsewhere=elsewhere,
    )


def desk(source: Folder, target: Folder, request: Mapping[str, object], memory: int, threads: int | None) -> Desk:
    """Return the desk of an examination that another process began."""
    said = asked_of(request).request
    inventory, arriving = understood(source, said), _meant(open_with(target, said.also), said.reader)
    means = means_for(inventory, arriving, memory, threads)
    return desk_of(
        inventory, survey(arriving, like=inventory.config, carried=inventory.said)[0], means, said.dtype, said.digest
    )


def understood(source: Folder, said: Request) -> Inventory:
    """Return a source as a request says that it is to be understood; raise CarnetError where it is not."""
    checkpoint = open_source(source, said)
    inventory = take(checkpoint, said.drop, said.vocab_size, said.tokens, alone=KINDS[said.to].alone)
    return adapted(inventory, said.adapter, said.adapter_scale)


def families(found: Sequence[Checkpoint], said: Request) -> list[str | None]:
    """Return whose model each of several checkpoints of one is to be understood as, unless a person says it.

    Megatron's arguments fit several families, a Hugging Face folder's config one: the first such folder says it for the others.
    """
    stored = [KINDS[each.dialect].files == SHARDS for each in found]
    family = said.family
    if family is None and any(stored) and not all(stored):
        with suppress(CarnetError):  # one that is not understood has that said where it is read
            family = understood(found[stored.index(True)].root, said).family.name
    return [said.family if whole else family for whole in stored]


def _with_claims(error: CarnetError, target: Folder) -> CarnetError:
    """Return a refusal of a source, with the options that the target's document names: perhaps one of them was forgotten."""
    try:
        said = documents.load(target)
    except CarnetError:
        return error
    request = said.data.get("request") if said is not None else None
    claimed = " ".join(words(request)) if isinstance(request, Mapping) else ""
    return type(error)(error.what, {**error.facts, "its carnet": claimed}, remedy=error.remedy) if claimed else error


def _meant(target: Checkpoint, read_by: str | None) -> Checkpoint:
    """Return a target as the program reads it that a person names; its own word for another program than Megatron-LM does not count."""
    own = target.program if target.program.startswith(LM) else LM
    return replace(target, program=read_by or own) if KINDS[target.dialect].arguments else target


def _needs(target: Inventory, read_by: str | None) -> Mapping[str, object]:
    """Return what the program that loads a target must be told."""
    if not target.dialect.kind.arguments:
        return {}
    reader = None if read_by is None else program(read_by, "--read-by")
    # a norm of its own has a state with Transformer Engine alone
    norms = any(name.endswith("norm.weight") for _, name in target.checkpoint.tensors)
    local_spec = norms and not any("norm._extra_state" in name for name in target.checkpoint.objects)
    return needs(target.checkpoint.config, reader, local=local_spec).data


def open_source(path: PathLike | Folder, said: Request) -> Checkpoint:
    """Return a source as a request says that it is to be understood."""
    own = None if said.config is None else local("config", said.config)
    tower = None if said.tower is None else local("tower", said.tower)
    adapter = None if said.adapter is None else local("adapter", said.adapter)
    return opened(path, own, said.written_by, said.accept, said.family, tower, said.adapter_alpha, adapter, said.also)

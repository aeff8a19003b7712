"""Owning the target of a plan whose source is still the one that was planned, alone or for one part of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from carnet.errors import BadCheckpoint, BadOption, BadRequest
from carnet.executor.staging import owned
from carnet.formats.detect import fingerprint, open_checkpoint
from carnet.formats.files import check_unchanged, digest_of
from carnet.formats.stored import Checkpoint
from carnet.inventory.lent import with_lent
from carnet.planner.reproof import reprove
from carnet.plans import saved
from carnet.plans.columns import Plan
from carnet.storage.protocol import Crossing, Draft, Folder, Part
from carnet.storage.schemes import folder_at


@dataclass(frozen=True, slots=True)
class Held:
    """A target that is owned, and its source as it was at the beginning."""

    source: Checkpoint
    staging: Draft

    def check(self) -> None:
        """Raise BadCheckpoint where the source changed since."""
        check_unchanged(self.source.root, self.source.stamps)

    def publish(self) -> None:
        """Put the target in place, if its source is what it was."""
        self.check()
        self.staging.publish()


@dataclass(frozen=True, slots=True)
class Known:
    """A plan, and its source as this machine sees it."""

    plan: Plan
    source: Checkpoint
    crossing: Crossing


def known(made: Plan, digest: str) -> Known:
    """Open the source of a plan (digest); raise BadRequest where it is not the one that was planned."""
    source, asked = folder_at(made.source), (made.request.get(name) for name in ("tower", "adapter"))
    tower, adapter = (None if each is None else str(each) for each in asked)
    checkpoint = with_lent(open_checkpoint(source), tower, adapter)
    if fingerprint(checkpoint) != made.fingerprint:
        raise BadRequest("the source is not the one that was planned", {"where": source}, remedy="plan again")
    everywhere = digest_of(repr([(stamp.file, stamp.nbytes, stamp.version) for stamp in checkpoint.stamps]).encode())
    return Known(made, checkpoint, Crossing(digest, everywhere, digest_of(repr(checkpoint.stamps).encode())))


def proven(made: Plan) -> Known:
    """Open the source of a plan, whoever made it: it is proven once more."""
    found = known(made, saved.digest(made))
    reprove(made, {stamp.file: stamp.nbytes for stamp in found.source.stamps})
    return found


@contextmanager
def held(of: Known, out: Folder, part: Part | None = None) -> Iterator[Held]:
    """Own a target; what was written of it goes where the source turns out to be damaged, or changes, but for what others write."""
    with owned(of.plan, of.crossing, of.source.root, out, part) as staging:
        try:
            yield Held(of.source, staging)
        except BadCheckpoint:
            if part is None:
                staging.discard()  # what was written is of no state that the source ever had, or never will be right
            raise


def part_of(said: tuple[int, int]) -> Part:
    """Return a part as a person names it; raise BadOption where there can be none such."""
    number, of = said
    if not 1 <= number <= of:
        raise BadOption(f"there is no part {number}/{of}", {"expected": "a number from 1 on, and of how many: 3/64"})
    return Part(number, of)

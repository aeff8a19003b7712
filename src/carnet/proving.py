"""Proving a target while it is written: an examination on a thread of its own is told of every tensor that is whole.

::

    writing    |embed|layer 0|layer 1|layer 2|...|flushing|
    examining        |embed  |layer 0|layer 1|layer 2|...|the files beside|     then: carnet.json, and the target is put in place

It reads the bytes from the target's files. A job that wrote into a tensor that is not its own would leave its own unwritten, which
is found.
"""

from concurrent.futures import Future, ThreadPoolExecutor, wait

from carnet.examiner import document as documents
from carnet.examiner.account import Known
from carnet.examiner.desk import Elsewhere
from carnet.examiner.means import LEAST, Order
from carnet.examiner.verdict import PLAN, Proof, Verdict
from carnet.examining import examine
from carnet.executor.adapting import held_window
from carnet.executor.arrivals import Arrivals
from carnet.executor.memory import choose_halves
from carnet.executor.owning import Held
from carnet.executor.run import codes, write
from carnet.executor.summing import Sums
from carnet.formats.files import check_unchanged
from carnet.formats.side_files import DOCUMENT
from carnet.inventory.merged import Merged
from carnet.plans.columns import Plan
from carnet.pool import Phase, Progress, Stopped
from carnet.storage.ahead import Ahead
from carnet.storage.protocol import Folder
from carnet.storage.schemes import folder_at

LOOK = 0.1  # seconds between two looks at how far the examination is


def write_and_prove(
    made: Plan,
    target: Held,
    memory: int,
    threads: int | None,
    progress: Progress,
    phase: Phase,
    sums: Sums | None = None,
    merged: Merged | None = None,
) -> Verdict:
    """Write a target, examine it, and put it in place with its document where it is equal; both at once where the memory has room.

    ``sums`` and ``merged`` say what is added to the plan's source, to who writes and to who examines.
    """
    shown = Shown(made, progress)
    root, staging = target.source.root, target.staging
    if sums is None:
        workers, rest = choose_halves(memory, held_window(made), len(made.steps), threads, coding=codes(made))
    else:
        workers, rest = choose_halves(memory, *sums.needs(made), threads, coding=True)
    if rest < LEAST or staging.whole or staging.in_order:
        write(made, root, staging, progress=shown.writing, phase=phase, threads=threads, sums=sums)
        _check(target, merged)
        return prove(made, target, memory, threads, shown.examining, phase, merged=merged)
    there = Ahead(folder_at(staging.where), {text.name: text.text.encode() for text in made.texts})
    with ThreadPoolExecutor(1) as thread:
        begun = list[Future[Proof]]()

        def begin(arrivals: Arrivals) -> None:
            begun.append(thread.submit(_examined, made, there, rest, threads, shown.heard, arrivals.order, None, merged))

        def writing(done: int, total: int) -> None:
            shown.writing(done, total)
            if begun and begun[0].done():  # it failed: it cannot be done before everything is written
                begun[0].result()

        try:
            write(made, root, staging, progress=writing, phase=phase, threads=workers, begun=begin, sums=sums)
            phase("examining")
            while wait(begun, LOOK).not_done:
                shown.both()
            shown.both()
            proof = begun[0].result()
        except BaseException:
            shown.stop()
            raise
    _check(target, merged)
    return _placed(target, proof)


def prove(
    made: Plan,
    target: Held,
    memory: int,
    threads: int | None,
    progress: Progress,
    phase: Phase,
    elsewhere: Elsewhere | None = None,
    merged: Merged | None = None,
) -> Verdict:
    """Examine what was written, and put it in place with its document where it is equal; others may do it (``elsewhere``)."""
    phase("examining")
    there = folder_at(target.staging.where)
    return _placed(target, _examined(made, there, memory, threads, progress, None, elsewhere, merged))


def _examined(
    made: Plan,
    there: Folder,
    memory: int,
    threads: int | None,
    progress: Progress,
    order: Order | None,
    elsewhere: Elsewhere | None = None,
    merged: Merged | None = None,
) -> Proof:
    known, source = [Known(PLAN, documents.planned(made), whole=True)], folder_at(made.source)
    return examine(
        source,
        there,
        made.request,
        known,
        memory,
        threads,
        progress,
        staged=True,
        order=order,
        elsewhere=elsewhere,
        merged=merged,
    )


def _check(target: Held, merged: Merged | None) -> None:
    """Raise BadCheckpoint where a source changed since."""
    target.check()
    for other in merged.others if merged is not None else ():
        check_unchanged(other.checkpoint.root, other.checkpoint.stamps)


def _placed(target: Held, proof: Proof) -> Verdict:
    if proof.data is not None:
        target.staging.put(DOCUMENT, [documents.text(proof.data).encode()], sync=True)
        target.publish()
    return proof.verdict


class Shown:
    """The progress of writing and of examining under one total in bytes, which is known from the start."""

    def __init__(self, made: Plan, progress: Progress) -> None:
        self._examining = made.proof["source bytes"] + 2 * made.proof["target bytes"]  # read to compare, and for digests
        self._progress, self._written, self._writing, self._examined, self._stopped = progress, 0, 0, 0, False

    def writing(self, done: int, total: int) -> None:
        """Take what is written; show both."""
        self._written, self._writing = done, total
        self.both()

    def heard(self, done: int, total: int) -> None:
        """Take what is examined, on its own thread; end that where nobody waits for it any more."""
        self._examined = self._examining * done // total if total else self._examining
        if self._stopped:
            raise Stopped

    def examining(self, done: int, total: int) -> None:
        """Take what is examined; show both."""
        self.heard(done, total)
        self.both()

    def both(self) -> None:
        """Show how far both are."""
        self._progress(self._written + self._examined, self._writing + self._examining)

    def stop(self) -> None:
        """Let the examination end."""
        self._stopped = True

"""Three waves of tasks: nodes measure, then write, then examine; between them the one who called prepares, gathers and publishes.

::

    plan, prove -> prepare -> | measure 1/n ... | -> | write 1/n ... | -> config, document -> | examine 1/n ... | -> OUT
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Unpack

from carnet import api
from carnet.examiner.desk import together
from carnet.examiner.means import choose_means
from carnet.examiner.order import Found
from carnet.examiner.verdict import Verdict
from carnet.executor import parts
from carnet.executor.jobs import Jobs, jobs_of
from carnet.executor.owning import held, proven
from carnet.executor.run import finish, prepared
from carnet.fleet import tasks
from carnet.fleet.cluster import Cluster, Node, Seen, look_at, reached
from carnet.plans.options import local
from carnet.plans.request import memory_of, threads_of
from carnet.plans.request_file import gathered
from carnet.plans.typed import Options
from carnet.pool import Phase, Progress
from carnet.progress import Callback, Told, verb
from carnet.proving import Shown, prove
from carnet.storage.journal_lines import NAME
from carnet.storage.protocol import Part, read_at
from carnet.storage.schemes import PathLike, folder_at

TASK = 1 << 30  # bytes of a part
BEGIN = 200  # bytes of a journal: the digests in its first line
FEWEST = 16  # parts: even a small crossing goes to several machines


@verb
def cross(
    path: PathLike,
    out: PathLike,
    *,
    on: str,
    progress: Callback | None = None,
    nodes: Callable[[Sequence[Node]], None] | None = None,
    **options: Unpack[Options],
) -> Verdict:
    """Plan here; measure, write and examine on the nodes of a Ray cluster; the target appears only when it is proven.

    ``on`` is "ray://head:10001", or "ray" for the cluster of RAY_ADDRESS or of this machine. Source and target lie where every node and
    this machine see them under the same path. ``nodes`` hears who has done what, whenever a task is done. Everything else is as
    ``carnet.cross`` has it; called again after an interruption, the function does what is left. Raises CarnetError as that does, and
    MachineFailed where the cluster cannot be reached, or a node does not see the files.
    """
    said, wish, told = local("out", out, out=True), gathered(options), Told(progress, "planning")
    tell = nodes or _untold
    with reached(on, tell) as cluster:
        made = api.plan(path, **wish)
        choose_means(memory_of(wish), len(made.steps))  # refused here, not when all is written
        shown = Shown(made, told.amount)
        of, target = tasks.patient(proven(made)), folder_at(said)
        count = max(FEWEST, -(-made.proof["source bytes"] // TASK))
        with ExitStack() as stack:
            staging = stack.enter_context(held(of, target, Part(1, count))).staging
            whole = staging.whole
            jobs = jobs_of(made, in_order=staging.in_order)
            if not whole:
                prepared(made, staging, () if staging.in_order else None)
            where = str(staging.where)
        threads = threads_of(wish) or cluster.threads
        if not whole:
            look_at(cluster, _sought(made.source, where))
            sent = tasks.Sent(of.crossing.plan, cluster.keep((made, jobs)), said, threads)
            _write(cluster, sent, jobs, count, shown.writing, told.phase)
        with held(of, target) as complete:
            finish(made, complete.source.root, complete.staging, phase=told.phase)
            complete.check()

            def examine(add: Callable[[int], None]) -> Found:
                sought = tasks.Examined(
                    of.crossing.plan, made.source, str(complete.staging.where), made.request, memory_of(wish), threads
                )
                calls = [(sought, Part(number, count)) for number in range(1, count + 1)]
                return together(cluster.all(tasks.examine, calls, add))

            verdict = prove(made, complete, memory_of(wish), threads_of(wish), shown.examining, told.phase, examine)
    return replace(verdict, source=local("ckpt", path), target=said)


def _write(cluster: Cluster, sent: tasks.Sent, jobs: Jobs, count: int, progress: Progress, begin: Phase) -> None:
    """Measure what is measured, then write everything."""
    total, done = int(jobs.rows["nbytes"].sum()), 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    progress(0, total)
    every = [Part(number, count, joins=True) for number in range(1, count + 1)]
    measured = dict[int, float]()
    if len(parts.measuring(jobs)):
        begin("scales")
        for found in cluster.all(tasks.measure, [(sent, part) for part in every], add):
            measured |= found
    begin("writing")
    kept = [cluster.keep(measured)]
    cluster.all(tasks.write, [(sent, part, kept) for part in every], add)


def _sought(source: str, staging: str) -> list[Seen]:
    """Return what every node must see: the source, and the target that was prepared."""
    journal = folder_at(staging).open(NAME)
    return [(source, "", b""), (staging, NAME, read_at(journal, 0, min(BEGIN, journal.stamp.nbytes)))]


def _untold(nodes: Sequence[Node]) -> None:
    """Show nothing."""

"""What nodes do: parts of a crossing. A process keeps the plan, and the source's headers, for the tasks that follow."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from carnet.errors import CarnetError
from carnet.examiner.desk import Desk
from carnet.examiner.order import Found
from carnet.examining import desk
from carnet.executor.jobs import Jobs
from carnet.executor.owning import Known, held, known
from carnet.executor.run import write_part
from carnet.fleet.cluster import Done
from carnet.plans.columns import Plan
from carnet.storage.protocol import Part
from carnet.storage.schemes import folder_at

PATIENCE = 100.0  # seconds for which a lost machine may keep its locks: those of NFS end after 90


@dataclass(frozen=True, slots=True)
class Sent:
    """A plan on its way to nodes: each process fetches it once."""

    digest: str
    reference: Any = field(compare=False)  # Ray's, of the plan and its jobs
    out: str  # the target
    threads: int


def patient(of: Known) -> Known:
    """Wait for locks as long as a machine may keep them that is lost."""
    return replace(of, crossing=replace(of.crossing, patience=PATIENCE))


@lru_cache(maxsize=1)
def _fetched(sent: Sent) -> tuple[Known, Jobs]:
    import ray

    plan, jobs = ray.get(sent.reference)
    assert isinstance(plan, Plan), "that is what was sent"
    return patient(known(plan, sent.digest)), jobs


def measure(sent: Sent, part: Part) -> Done[Mapping[int, float]]:
    """Measure a part of what is measured."""
    return _do(sent, part, measures=True, measured=None)


def write(sent: Sent, part: Part, measured: Any) -> Done[Mapping[int, float]]:  # noqa: ANN401  as Ray's own
    """Write a part, with what all parts have measured."""
    import ray

    return _do(sent, part, measures=False, measured=ray.get(measured[0]))


def _do(sent: Sent, part: Part, *, measures: bool, measured: Mapping[int, float] | None) -> Done[Mapping[int, float]]:
    begun = time.monotonic()
    with _here():
        of, jobs = _fetched(sent)
        with held(of, folder_at(sent.out), part) as target:
            root, staging = target.source.root, target.staging
            done = write_part(
                of.plan, root, staging, part, jobs=jobs, measures=measures, measured=measured, threads=sent.threads
            )
            target.check()
    return Done(node(), done.nbytes, time.monotonic() - begun, done.measured)


@dataclass(frozen=True, slots=True)
class Examined:
    """A target that is to be examined, on its way to nodes."""

    digest: str  # of its plan
    source: str
    target: str  # where it is while it is written
    request: Mapping[str, object] = field(compare=False)
    memory: int
    threads: int


@lru_cache(maxsize=1)
def _desk(of: Examined) -> Desk:
    return desk(folder_at(of.source), folder_at(of.target).meanwhile(), of.request, of.memory, of.threads)


def examine(of: Examined, part: Part) -> Done[Found]:
    """Do a part of the examination."""
    begun = time.monotonic()
    with _here():
        own = _desk(of).part(part.number, part.of)
        found = own.work(lambda nbytes: None)
    return Done(node(), sum(map(own.nbytes, own.tasks)), time.monotonic() - begun, found)


def node() -> str:
    """Return Ray's name of this node."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


@contextmanager
def _here() -> Iterator[None]:
    """Say of an error on which node it came up."""
    try:
        yield
    except CarnetError as error:
        error.facts["node"] = os.uname().nodename
        raise


Task = Callable[..., Done[Any]]

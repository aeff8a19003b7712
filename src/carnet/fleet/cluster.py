"""A running Ray cluster: how it is reached, what its nodes must have, and tasks of which each is done once, wherever.

Ray sends a task elsewhere when its worker or its machine is lost. An error of carnet's own is the same everywhere: the first stops all.
"""

import logging
import os
import re
import signal
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from carnet import __version__
from carnet.errors import BadOption, CarnetError, MachineFailed

RETRIES = 8  # how often a task may lose its machine
KNOCKS = 3  # how often a door that answers may fail to open
THREADS = 4  # of one task, because threads take turns at Python; a larger node has several tasks
AGAIN = "run the same command again: it goes on where it stopped"
INSTALL = "pip install 'carnet[ray]'"
T = TypeVar("T")


@dataclass(slots=True)
class Node:
    """A machine of the cluster, and what it has done."""

    name: str  # of the host
    address: str
    cores: int
    tasks: int = 0
    nbytes: int = 0
    seconds: float = 0.0  # in which tasks ran, all added


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """What a task gives back."""

    node: str  # Ray's name of it
    nbytes: int
    seconds: float
    result: T


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that can be used."""

    ray: Any  # the module
    nodes: dict[str, Node]  # by Ray's name
    threads: int  # of one task
    ours: bool  # whether the session ends with the crossing
    tell: Callable[[Sequence[Node]], None] = field(default=lambda nodes: None)  # hears of every task that is done

    def keep(self, value: object) -> Any:  # noqa: ANN401  as Ray's own
        """Put a value where every node can get it."""
        return self.ray.put(value)

    def all(self, task: Callable[..., Done[T]], calls: Sequence[tuple[object, ...]], add: Callable[[int], None]) -> list[T]:
        """Do a task for each of some arguments, and return what they gave; ``add`` gets the bytes of each that is done."""
        options = {"num_cpus": self.threads, "max_retries": RETRIES, "scheduling_strategy": "SPREAD"}
        remote = self.ray.remote(**options)(task)
        numbers = {remote.remote(*call): number for number, call in enumerate(calls)}
        found, left = dict[int, T](), [*numbers]
        try:
            while left:
                ready, left = self.ray.wait(left, timeout=1.0)
                for ref in ready:
                    done = self._got(ref)
                    found[numbers[ref]] = done.result
                    node = self.nodes.setdefault(done.node, Node(done.node[:8], "", 0))  # it came later
                    node.tasks, node.nbytes, node.seconds = (
                        node.tasks + 1,
                        node.nbytes + done.nbytes,
                        node.seconds + done.seconds,
                    )
                    add(done.nbytes)
                    self.tell([*self.nodes.values()])
        except ConnectionError:
            raise  # nobody is there who could cancel
        except BaseException:
            # tasks end with a session of ours; to cancel one that ends just now is what Ray 2.60 may die of (task_manager.cc, "Tried to
            # complete task that was not pending")
            for ref in () if self.ours else left:
                self.ray.cancel(ref, force=True)
            raise
        return [found[number] for number in range(len(calls))]

    def _got(self, ref: Any) -> Any:  # noqa: ANN401  as Ray's own
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, CarnetError):
                raise error.cause from None
            raise
        except self.ray.exceptions.RayError as error:
            facts = {"tried": f"{RETRIES + 1} times", "reason": str(error).splitlines()[0]}
            remedy = "see what ends workers there (memory?); the same command goes on where it stopped"
            raise MachineFailed("a task lost its machine again and again", facts, remedy=remedy) from error


@contextmanager
def reached(on: str, tell: Callable[[Sequence[Node]], None]) -> Iterator[Cluster]:
    """Reach a cluster: "ray://head:10001", or "ray" for that of RAY_ADDRESS or, without it, of this machine."""
    if on != "ray" and re.fullmatch(r"ray://.+:[0-9]+", on) is None:  # without a port Ray would ask nobody, for half a minute
        raise BadOption(
            f"on cannot be {on!r}", {"known": "ray://HOST:10001, or ray for the cluster of this machine or RAY_ADDRESS"}
        )
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError as missing:
        raise MachineFailed("a cluster is reached with Ray", {"missing": missing.name}, remedy=INSTALL) from missing
    address = os.environ.get("RAY_ADDRESS", "auto") if on == "ray" else on
    ours = not ray.is_initialized()
    try:
        if ours:
            _knock(address)
            _enter(ray, address)
        nodes = {
            each["NodeID"]: Node(each["NodeManagerHostname"], each["NodeManagerAddress"], int(each["Resources"].get("CPU", 0)))
            for each in ray.nodes()  # type: ignore[no-untyped-call]  # Ray's own
            if each["Alive"] and each["Resources"].get("CPU", 0) >= 1
        }
    except (OSError, RuntimeError, ValueError) as error:
        facts = {"where": address, "reason": str(error).splitlines()[0] if str(error) else type(error).__name__}
        remedy = "start it (ray start --head), or name it in --on: a head answers a ray:// at its client server's port, 10001"
        raise MachineFailed("the Ray cluster cannot be used", facts, remedy=remedy) from error
    try:
        if not nodes:
            raise MachineFailed("no node of the Ray cluster has a processor to lend", {"where": address})
        yield Cluster(ray, nodes, min(THREADS, *(node.cores for node in nodes.values())), ours, tell)
    except ConnectionError as error:
        facts = {"where": address, "reason": str(error).splitlines()[0]}
        raise MachineFailed("the Ray cluster does not answer any more", facts, remedy=AGAIN) from error
    finally:
        if ours:
            ray.shutdown()


def _enter(ray: Any, address: str) -> None:  # noqa: ANN401  as Ray's own
    """Connect to a cluster. The server that Ray's proxy starts for a client dies at times as it starts: the next one does not."""
    for knock in range(KNOCKS):
        try:
            with _deaf_to_ray(), warnings.catch_warnings(action="ignore", category=UserWarning):  # the error says what these do
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionAbortedError:  # ray/util/client/worker.py: "Initialization failure from server"
            if knock == KNOCKS - 1:
                raise
        else:
            return


@contextmanager
def _deaf_to_ray() -> Iterator[None]:
    """Have SIGTERM do what it did: Ray has a handler of its own, that ends the process without a word (ray/_private/worker.py init)."""
    before, ended = signal.getsignal(signal.SIGTERM), False
    try:
        yield
    except SystemExit:
        ended = True
        raise
    finally:
        if before is not None and signal.getsignal(signal.SIGTERM) is not before:
            signal.signal(signal.SIGTERM, before)
        if ended:
            signal.raise_signal(signal.SIGTERM)


def _knock(address: str) -> None:
    """Raise OSError where nobody answers: Ray would ask again for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


Seen = tuple[str, str, bytes]  # a folder, a file in it, "" for the folder itself, and what that begins with


def _looker() -> Callable[[str, Sequence[Seen]], tuple[str, str | None, list[str]]]:
    """Return a function that needs nothing of carnet's where it runs: pickle sends one that is defined in another by its code."""

    def look(version: str, sought: Sequence[Seen]) -> tuple[str, str | None, list[str]]:
        import os

        host, unseen = os.uname().nodename, list[str]()
        try:
            from carnet import __version__ as found

            if found != version:
                return host, found, []
            from carnet.errors import CarnetError
            from carnet.storage.protocol import read_at
            from carnet.storage.schemes import folder_at
        except ImportError:
            return host, None, []
        for folder, name, begin in sought:
            try:
                there = folder_at(folder)
                same = there.kind() == "folder" if not name else read_at(there.open(name), 0, len(begin)) == begin
            except CarnetError:
                same = False
            unseen += [] if same else [f"{folder}/{name}".rstrip("/")]
        return host, found, unseen

    return look


def look_at(cluster: Cluster, sought: Sequence[Seen]) -> None:
    """Raise MachineFailed unless every node has this carnet and sees some files and folders."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = cluster.ray.remote(num_cpus=0)(_looker())
    there = [look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True)) for node in cluster.nodes]
    for name, version, unseen in cluster.ray.get([each.remote(__version__, sought) for each in there]):
        if version != __version__:
            facts = {"node": name, "expected": __version__, "found": version or "none"}
            what = "a node of the cluster has no carnet" if version is None else "a node of the cluster has another carnet"
            raise MachineFailed(what, facts, remedy=f"pip install carnet=={__version__} on every node")
        if unseen:
            facts = {"node": name, "not seen": unseen[0]}
            remedy = "give every machine the same disk under the same path, or use a store"
            raise MachineFailed("a node of the cluster does not see the same files", facts, remedy=remedy)

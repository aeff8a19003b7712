"""What a verb tells while it works: a callback how far it is, the logger ``carnet`` where it starts, what begins, and how it ends.

::

    start ── phase planning ── phase writing ── phase flushing ── phase examining ── end | refusal | interrupted | failed
"""

import inspect
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from math import isfinite
from typing import ParamSpec, TypeVar

from carnet.errors import CarnetError
from carnet.version import __version__

LOG = logging.getLogger("carnet")
LOG.addHandler(logging.NullHandler())  # else Python prints what nobody asked for

CREDENTIALS = re.compile(r"://[^/\s]*@")  # s3://KEY:SECRET@bucket is no URL of carnet's, and yet somebody types it
P = ParamSpec("P")
R = TypeVar("R")
Plain = str | int | float | bool | None  # what a log may hold of an argument: keys and headers are none of it


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a verb is: what ``progress=`` of each long one is called with, on the thread that called the verb.

    A call comes when a phase begins and whenever bytes are done. ``done`` never goes back, and what an earlier, interrupted run did is
    in it from the start. ``total`` is the one amount of all phases together, known before the first byte moves. A callback that raises
    stops the verb, which puts away what it must and raises the same; what is written stays, and the same call goes on. Of a delta
    nothing stays.
    """

    phase: str  # planning, preparing, scales, writing, flushing, examining, comparing, hashing, calibrating, signing
    done: int  # bytes (of a calibration: texts)
    total: int  # in the same unit; 0 while it is not known


Callback = Callable[[Progress], None]


class Told:
    """What a verb has said of its progress, handed on to who listens."""

    def __init__(self, callback: Callback | None, phase: str) -> None:
        self._callback, self._at = callback, Progress(phase, 0, 0)
        self.phase(phase)

    def phase(self, name: str) -> None:
        """Say what begins."""
        log("phase", phase=name, done=self._at.done, total=self._at.total)
        self._say(Progress(name, self._at.done, self._at.total))

    def amount(self, done: int, total: int) -> None:
        """Say how much is done, and of how much."""
        self._say(Progress(self._at.phase, done, total))

    def _say(self, at: Progress) -> None:
        self._at = at
        if self._callback is not None:
            self._callback(at)


@dataclass(frozen=True, slots=True)
class _Running:
    verb: str
    since: float  # of the monotonic clock


_RUNNING: ContextVar[_Running | None] = ContextVar("running", default=None)


def log(event: str, **facts: object) -> None:
    """Log what happens to the verb that runs; ``facts`` go along as ``record.carnet``."""
    running = _RUNNING.get()
    if running is not None:
        said = {"event": event, "verb": running.verb, "seconds": round(time.monotonic() - running.since, 3), **facts}
        LOG.info("%s: %s", running.verb, facts.get("phase", event), extra={"carnet": said})


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function log where it starts and how it ends; what it calls of its like is a part of it."""

    @wraps(function)
    def logged(*args: P.args, **given: P.kwargs) -> R:
        if _RUNNING.get() is not None or not LOG.isEnabledFor(logging.INFO):
            return function(*args, **given)
        before = _RUNNING.set(_Running(function.__name__, time.monotonic()))
        try:
            log(
                "start",
                version=__version__,
                process=os.getpid(),
                arguments=_plain(inspect.signature(function).bind(*args, **given)),
            )
            found = function(*args, **given)
            log("end", good=found is None or bool(found), result=repr(found))
        except CarnetError as error:
            facts = {name: _value(str(value)) for name, value in error.facts.items()}
            log("refusal", kind=type(error).__name__, error=error.what, facts=facts, **{"try": error.remedy})
            raise
        except KeyboardInterrupt:
            log("interrupted")
            raise
        except BaseException as error:
            log("failed", kind=type(error).__name__, error=str(error))
            raise
        else:
            return found
        finally:
            _RUNNING.reset(before)

    return logged


def _plain(bound: inspect.BoundArguments) -> Mapping[str, object]:
    """Return the arguments of a call that a log may hold."""
    kinds = bound.signature.parameters
    flat = dict[str, object]()
    for name, value in bound.arguments.items():
        flat |= value if kinds[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return {name: said for name, value in flat.items() if (said := _value(value)) not in (None, [])}


def _value(value: object) -> Plain | list[Plain]:
    if isinstance(value, list | tuple):
        return [said for each in value if not isinstance(said := _value(each), list | None)]
    if isinstance(value, os.PathLike | str):
        return CREDENTIALS.sub("://", str(value))
    if isinstance(value, float) and not isfinite(value):
        return str(value)  # JSON has no such number
    return value if isinstance(value, Plain) else None

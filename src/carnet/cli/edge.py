"""The edge of the process: whatever happens, one message of a line or a few, an exit code, and no traceback.

A full or closed stdout does not undo what a command has done; a signal that asks for the end (Ctrl-C, SIGTERM, SIGHUP) ends the process
at once while nothing has begun, from then on unwinds it, a second one ends it at once; an error that nobody foresaw says where it is.
"""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, ClassVar

from carnet.errors import NO_MORE_FILES

if TYPE_CHECKING:
    from typing_extensions import Buffer  # of collections.abc since 3.12

MADE_ELSEWHERE = {
    "calibrate",
    "cross",
    "finish",
    "report",
    "run",
    "verify",
}  # commands whose work is done whether or not somebody reads what they print
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what asks a process to end
# where an interrupt leaves a lock as it must not be, or a thread that nobody knows of, and others wait for either for ever
FRAGILE = {
    vars(kind)[name].__code__
    for kind, names in (
        (threading.Condition, ("__enter__", "__exit__", "_acquire_restore", "_release_save")),
        (threading.Thread, ("start",)),
    )
    for name in names
}
LATER = 0.001  # seconds
SHOW_CURSOR = "\x1b[?25h"  # a bar hides it
INTERRUPTED = "carnet: interrupted\n"
REMEMBERS = "carnet: interrupted; the same command goes on where it stopped"


class Ended(KeyboardInterrupt):
    """A signal asked the process to end."""

    last: ClassVar[int] = signal.SIGINT  # libraries whose loops a signal ends raise an interrupt of their own (Ray, in C++)

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = Ended.last = signum


class Kept(io.RawIOBase):
    """A descriptor that takes everything, and remembers when it could not."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.failed: OSError | None = None

    def write(self, data: "Buffer", /) -> int:
        """Write what can be written."""
        if self.failed is None:
            try:
                return os.write(self._descriptor, data)
            except OSError as error:
                self.failed = error
        return memoryview(data).nbytes

    def writable(self) -> bool:
        """Say yes."""
        return True

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Say whether a person looks on."""
        return os.isatty(self._descriptor)


def open_streams() -> tuple[Kept, Kept]:
    """Put streams in the place of stdout and stderr that never fail, and hold descriptors that were closed."""
    for descriptor in range(3):  # a file that is opened later must not become stdout
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    out, err = Kept(1), Kept(2)
    closed = sys.stdout is None
    for name, raw in (("stdout", out), ("stderr", err)):
        before = getattr(sys, name)
        encoding = before.encoding if before is not None else "utf-8"
        # names of files need not be Unicode, and a terminal need not know all of it
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=raw.isatty() or raw is err
        )
        setattr(sys, name, stream)
    if closed:
        out.failed = OSError(errno.EBADF, "it is closed")
    return out, err


def stop_at_once(signum: int, _frame: FrameType | None) -> None:
    """End the process: nothing has begun that would have to be put away, or there is no time to put it away."""
    try:
        os.write(2, ((SHOW_CURSOR if os.isatty(2) else "") + INTERRUPTED).encode())
    finally:
        os._exit(128 + signum)


def unwind(signum: int, frame: FrameType | None) -> None:
    """Unwind what the process does, as soon as no lock breaks of it; the next signal does not wait for that."""
    heed(stop_at_once)
    while frame is not None:
        if frame.f_code in FRAGILE:
            signal.signal(signal.SIGALRM, lambda _, later: unwind(signum, later))
            signal.setitimer(signal.ITIMER_REAL, LATER)
            return
        frame = frame.f_back
    raise Ended(signum)


def heed(handler: Callable[[int, FrameType | None], object]) -> None:
    """Say what the signals do that ask for the end, but those that are ignored, as SIGHUP is under nohup."""
    for signum in STOPS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


def heeded() -> bool:
    """Say whether a signal would end the process at once."""
    return any(signal.getsignal(signum) is stop_at_once for signum in STOPS)


def code_of(interrupt: BaseException | None) -> int:
    """Return the exit code of a process that was asked to end, as shells count: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (interrupt.signum if isinstance(interrupt, Ended) else Ended.last)


def interrupt_of(error: BaseException | None) -> BaseException | None:
    """Return the interrupt that an error comes of."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


def guarded(command: Callable[[], object], name: str) -> int:
    """Run a command to its exit code; ``name`` is the verb."""
    out, _ = open_streams()
    try:
        code = _code(command)
    except KeyboardInterrupt as interrupt:
        heed(stop_at_once)
        code = _say(code_of(interrupt), REMEMBERS)
    except Exception as error:  # noqa: BLE001  this is where every error ends
        asked = interrupt_of(error)
        code = _say(1, explained(error)) if asked is None else _say(code_of(asked), REMEMBERS)
    heed(stop_at_once)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if out.failed is None:
        return code
    if name in MADE_ELSEWHERE:
        return _say(code, f"carnet: stdout takes nothing ({out.failed.strerror}), what was done stays done")
    # somebody like `head` has read enough
    return 1 if isinstance(out.failed, BrokenPipeError) else _say(1, f"carnet: cannot write to stdout: {out.failed.strerror}")


def _code(command: Callable[[], object]) -> int:
    import click

    try:
        found = command()
    except click.exceptions.Exit as left:
        return left.exit_code
    except click.ClickException as usage:
        usage.show()
        return usage.exit_code
    except click.Abort as left:
        return _say(code_of(left.__cause__), REMEMBERS)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return found if isinstance(found, int) else 0


def _say(code: int, text: str) -> int:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    return code


def explained(error: BaseException) -> str:
    """Return what is said of an error that no command has explained."""
    if isinstance(error, MemoryError):
        return "carnet: the machine has no memory left\n  try: give less --memory, or the process more"
    if isinstance(error, RecursionError):
        return "carnet: something is nested too deeply"
    if isinstance(error, RuntimeError) and "new thread" in str(error):
        return "carnet: the machine starts no more threads\n  try: raise the limit of processes (ulimit -u)"
    if isinstance(error, OSError):
        return f"carnet: {_of_the_machine(error)}"
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = "" if place is None else f"\n  where     {os.path.basename(place.tb_frame.f_code.co_filename)}:{place.tb_lineno}"
    text = " ".join(str(error).split())[:300]
    return f"carnet: this is a mistake in carnet: {type(error).__name__}: {text}{where}\n  try: report it, with these lines"


def _of_the_machine(error: OSError) -> str:
    try:
        os.getcwd()
    except OSError:
        return "the working directory is not there any more\n  try: cd to one that is"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "\n  try: ".join(NO_MORE_FILES)
    where = f"\n  where     {os.fsdecode(error.filename)!r}" if isinstance(error.filename, str | bytes) else ""
    return f"the machine refused: {error.strerror or error}{where}"

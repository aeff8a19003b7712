"""Four ranks of gloo that stay for all tests: each is a process of its own, with torch and megatron-core imported once."""

import multiprocessing
import socket
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # the ranks import what they run from here


class World:
    """Processes that do what they are told; a crossing's errors come back as errors."""

    def __init__(self, size, backend="gloo"):
        # a process that looked at a GPU cannot be forked
        context = multiprocessing.get_context("forkserver" if backend == "gloo" else "spawn")
        multiprocessing.set_forkserver_preload(["tests.live.ranks"])
        from tests.live import ranks

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=ranks.serve, args=(theirs, rank, size, port, backend), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, what, *args, ranks=None):
        """Call a function of ``jobs`` on every rank, and return what each returns; raise the first error."""
        found = self.ask(what, *args, ranks=ranks)
        for value in found:
            if isinstance(value, BaseException):
                raise value
        return found

    def ask(self, what, *args, ranks=None, gone=()):
        """Call a function of ``jobs`` on every rank, and return what each returns or raises; nothing comes from those that go."""
        pipes = self._pipes if ranks is None else [self._pipes[rank] for rank in ranks]
        for pipe in pipes:
            pipe.send((what, args))
        return [pipe.recv() for rank, pipe in enumerate(pipes) if rank not in gone]

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()


@pytest.fixture(scope="session")
def world():
    made = World(4)
    yield made
    made.close()

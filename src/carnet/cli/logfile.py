"""The file of --log: what the logger ``carnet`` hears, a line of JSON each, written at once."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TextIO

from carnet.plans.options import here
from carnet.progress import LOG
from carnet.storage.opening import appending

BEGINS = b'{"time": '  # what every line begins with: to the end of anything else, of weights say, nothing is written


class Lines(logging.StreamHandler[TextIO]):
    """Writes what verbs say of themselves; a disk that takes no more of it stops no verb."""

    failed = False

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": time, **vars(record).get("carnet", {"event": record.getMessage()})})

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802  logging's own
        """Say once that the log ends here."""
        if not self.failed:
            self.failed = True
            print(f"carnet: the log takes nothing more: {sys.exc_info()[1]}", file=sys.stderr)


@contextmanager
def logged(path: str) -> Iterator[None]:
    """Append to a file what is logged meanwhile."""
    handler, before = Lines(appending(here("log", path, out=True), BEGINS)), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.setLevel(before)
        LOG.removeHandler(handler)
        with suppress(OSError):  # it was said already
            handler.stream.close()

"""One S3 server for all tests of stores; each test has a bucket of its own in it."""

import shutil
from pathlib import Path

import pytest

from tests.stores.server import environment, serving

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s3")
    with serving(folder) as relay:
        yield folder, relay


class Store:
    """A bucket, as a URL and as the folder that the server keeps it in."""

    def __init__(self, folder, relay, name):
        self.folder, self.relay, self.url = folder / name, relay, f"s3://{name}"
        self.folder.mkdir()

    def fill(self, source, name):
        """Put a folder into the bucket and return its URL."""
        shutil.copytree(source, self.folder / name)
        return f"{self.url}/{name}"

    def requests(self):
        """Return what was asked for since the last call."""
        found, self.relay.seen[:] = list(self.relay.seen), []
        return found


@pytest.fixture
def store(served, request, monkeypatch):
    folder, relay = served
    for name, value in environment(relay.port).items():
        monkeypatch.setenv(name, value)
    made = Store(folder, relay, f"bucket-{len(list(folder.iterdir()))}")
    relay.seen.clear()
    yield made
    relay.fault = lambda asked: None

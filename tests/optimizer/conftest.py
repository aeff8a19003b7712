"""Trainings with the real megatron-core, each a few processes on gloo."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.megatron.test_newest import NEWEST

ROOT = Path(__file__).parents[2]


def train(folder, name, *, newest=False, **job):
    """Let ranks train, with the newest megatron-core or with the one that is installed; return the losses of every step."""
    path = folder / f"{name}.json"
    job = {"tp": 1, "pp": 1, "form": "fully_reshardable", **job, "out": str(folder / f"{name}.losses")}
    path.write_text(json.dumps(job))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-W", "ignore", "-m", f"tests.optimizer.{'newest_' if newest else ''}ranks", str(path)]
    paths = [*([str(NEWEST)] if newest else []), str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    ranks = [
        subprocess.Popen([*command, str(rank), port], cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(job["tp"] * job["pp"] * job.get("dp", 1))
    ]
    said = [rank.communicate(timeout=300)[0].decode() for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(each[-2000:] for each in said)
    return json.loads(Path(job["out"]).read_text())


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Return (a checkpoint after three steps, the losses of the three after it) of a run that nobody stopped."""
    folder, made = tmp_path_factory.mktemp("trained"), {}

    def of(name, **job):
        if name not in made:
            done = train(folder, name, steps=6, save=str(folder / name), save_at=3, **job)
            made[name] = folder / name, done["losses"][3:]
        return made[name]

    return of

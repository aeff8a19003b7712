"""Crossings on a real Ray cluster: the bytes of one machine, whatever dies on the way, and one clear error."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import carnet
from carnet import fleet
from carnet.errors import BadCheckpoint, BadOption, MachineFailed
from carnet.storage.drafts import staging_of
from tests.fleet.conftest import new_node
from tests.terminal import on_a_terminal

PLAIN = {"to": "trtllm", "tp": 2}
CODED = {"to": "hf", "dtype": "bf16", "quantize": "fp8", "style": "compressed-tensors", "activations": "dynamic"}


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def alone(source, tmp_path_factory):
    """What one machine makes of the source, by what was asked for."""
    made = {}
    for name, asked in (("plain", PLAIN), ("coded", CODED)):
        out = tmp_path_factory.mktemp("alone") / "out"
        assert carnet.cross(source, out, **asked).equal
        made[name] = content(out)
    return made


def raylets(cluster):
    """Return the processes whose children the workers of a cluster are."""
    return {info.process.pid for node in cluster.list_all_nodes() for info in node.all_processes["raylet"]}


class Sighted(threading.Thread):
    """Do something when a task is seen to run, the first of its name in a cluster."""

    def __init__(self, cluster, task, act):
        super().__init__(daemon=True)
        self.title, self.act, self.pid, self.parents = f"ray::{task}".encode(), act, None, raylets(cluster)
        self.start()

    def run(self):
        until = time.monotonic() + 60
        while self.pid is None and time.monotonic() < until:
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if path.read_bytes().startswith(self.title) and self.is_ours(path.parent):
                        self.pid = int(path.parent.name)
                        self.act(self.pid)
                        break
                except OSError:
                    continue
            time.sleep(0.002)

    def is_ours(self, process):
        return int((process / "stat").read_text().rpartition(")")[2].split()[1]) in self.parents


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def servers():
    """Return the processes that are, or are about to be, what Ray's proxy starts for a new client."""
    found = set[int]()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"specific-server" in path.read_bytes():
                found.add(int(path.parent.name))
    return found


def command(*words, **given):
    return [sys.executable, "-m", "carnet", *map(str, words)]


@pytest.mark.parametrize("asked", [PLAIN, CODED], ids=["plain", "coded"])
def test_a_cluster_writes_the_bytes_of_one_machine_with_one_document(cluster, source, alone, tmp_path, asked):
    nodes, told = [], []
    verdict = fleet.cross(
        source,
        tmp_path / "out",
        on="ray",
        nodes=lambda found: nodes.append([(node.tasks, node.nbytes) for node in found]),
        progress=told.append,
        **asked,
    )
    assert verdict.equal
    assert content(tmp_path / "out") == alone["plain" if asked is PLAIN else "coded"]
    phases = [*dict.fromkeys(at.phase for at in told)]
    assert phases == ["planning", *(["scales"] if asked is CODED else []), "writing", "flushing", "examining"]
    assert len(nodes[-1]) == 3
    assert told[-1].done == told[-1].total
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_in_a_store_is_written_by_all_nodes_whatever_is_killed(cluster, source, alone, store):
    killed = Sighted(cluster, "write", kill)
    asked = {**PLAIN, "pp": 3}
    assert fleet.cross(store.fill(source, "source"), f"{store.url}/out", on="ray", **asked).equal
    assert killed.pid is not None
    expected = carnet.cross(source, store.folder / "alone", **asked)
    assert expected.equal
    found, wanted = content(store.folder / "out"), content(store.folder / "alone")
    assert found.keys() == wanted.keys()
    assert {name for name in found if found[name] != wanted[name]} <= {"carnet.json"}  # it names its source


@pytest.mark.parametrize("task", ["measure", "write", "examine"])
def test_a_worker_that_is_killed_costs_its_task_alone(cluster, source, alone, tmp_path, task):
    killed = Sighted(cluster, task, kill)
    assert fleet.cross(source, tmp_path / "out", on="ray", **CODED).equal
    assert killed.pid is not None
    assert content(tmp_path / "out") == alone["coded"]


def test_a_node_that_is_lost_costs_its_tasks_alone(cluster, source, alone, tmp_path):
    node = new_node(cluster)
    cluster.wait_for_nodes()
    lost = Sighted(cluster, "write", lambda pid: cluster.remove_node(node, allow_graceful=False))
    assert fleet.cross(source, tmp_path / "out", on="ray", **PLAIN).equal
    lost.join()
    assert content(tmp_path / "out") == alone["plain"]


def test_the_same_command_goes_on_after_its_process_is_killed(cluster, source, alone, tmp_path):
    words = command("cross", source, tmp_path / "out", "--to", "trtllm", "--tp", 2, "--on", "ray")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as first:
        Sighted(cluster, "write", lambda pid: first.kill()).join()
    assert first.returncode == -signal.SIGKILL
    assert staging_of(tmp_path / "out").exists()
    killed = Sighted(cluster, "write", kill)
    again = subprocess.run([*words, "--json"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert killed.pid is not None
    assert json.loads(again.stdout)["equal"]  # whatever Ray has to say of that
    assert content(tmp_path / "out") == alone["plain"]
    head, _, *nodes = [line for line in again.stderr.splitlines() if "raylet" not in line][-5:]
    assert head.split() == ["node", "address", "cores", "tasks", "bytes", "a", "task's", "rate"]
    assert len(nodes) == 3
    assert all(line.split()[0] == os.uname().nodename for line in nodes)


def test_a_crossing_that_is_asked_to_end_says_how_to_go_on(cluster, source, tmp_path):
    words = command("cross", source, tmp_path / "out", "--to", "trtllm", "--tp", 2, "--on", "ray")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as crossing:
        Sighted(cluster, "write", lambda pid: crossing.terminate()).join()
        said = crossing.communicate(timeout=60)[1]
    assert crossing.returncode == 143, said
    assert said.splitlines()[-1] == "carnet: interrupted; the same command goes on where it stopped"
    assert not (tmp_path / "out").exists()


def test_on_a_terminal_the_nodes_stand_below_the_bar_while_they_work(cluster, source, tmp_path):
    shown = on_a_terminal("-m", "carnet", "cross", source, tmp_path / "out", "--to", "hf", "--on", "ray")
    heads = [at for at, line in enumerate(shown) if line.startswith("node ")]
    assert len(heads) > 1
    assert "━" in shown[heads[0] - 1]  # the bar
    assert all(shown[heads[-1] + row].startswith(os.uname().nodename) for row in (2, 3, 4))


def test_a_cluster_is_reached_from_outside_of_it(cluster, source, alone, tmp_path):
    url = f"ray://127.0.0.1:{cluster.head_node._ray_params.ray_client_server_port}"
    words = command("cross", source, tmp_path / "out", "--to", "trtllm", "--tp", 2, "--on", url)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == alone["plain"]


def test_a_client_whose_server_dies_as_it_starts_asks_for_another(cluster, source, alone, tmp_path):
    url = f"ray://127.0.0.1:{cluster.head_node._ray_params.ray_client_server_port}"
    before = servers()
    with subprocess.Popen(command("cross", source, tmp_path / "out", "--to", "trtllm", "--tp", 2, "--on", url)) as crossing:
        while not (started := servers() - before):
            assert crossing.poll() is None
        kill(started.pop())
    assert crossing.returncode == 0
    assert content(tmp_path / "out") == alone["plain"]


def test_damage_of_the_source_comes_up_as_it_is_and_is_not_tried_again(cluster, source, tmp_path):
    import shutil

    shutil.copytree(source, tmp_path / "source")
    seen = []

    def act(pid):
        os.truncate(tmp_path / "source/model.safetensors", 9000)
        seen.append(pid)

    Sighted(cluster, "write", act)
    with pytest.raises(BadCheckpoint) as caught:
        fleet.cross(tmp_path / "source", tmp_path / "out", on="ray", **PLAIN)
    assert seen
    assert caught.value.facts["node"] == os.uname().nodename
    assert not (tmp_path / "out").exists()


# --- a cluster that cannot do it -----------------------------------------------------------------------------------------------


def test_a_node_that_does_not_see_the_files_is_named(cluster, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # what this path means is every process's own affair
    with pytest.raises(MachineFailed, match="a node of the cluster does not see the same files") as caught:
        fleet.cross(source, "/proc/self/cwd/out", on="ray", **PLAIN)
    assert caught.value.facts["not seen"] == "/proc/self/cwd/out.partial/journal.jsonl"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("version", ["0.0.1", None])
def test_a_node_with_another_carnet_or_none_is_named(cluster, source, tmp_path, version):
    package = tmp_path / "other/carnet"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__version__ = {version!r}" if version else "raise ImportError")
    node = new_node(cluster, env_vars={"PYTHONPATH": str(tmp_path / "other")})
    cluster.wait_for_nodes()
    try:
        with pytest.raises(MachineFailed, match="has another carnet" if version else "has no carnet") as caught:
            fleet.cross(source, tmp_path / "out", on="ray", **PLAIN)
    finally:
        cluster.remove_node(node)
    assert caught.value.facts["found"] == (version or "none")
    assert "on every node" in caught.value.remedy


def test_what_is_no_cluster_and_no_ray_are_said(source, tmp_path):
    for on in ("slurm", "ray://", "ray://head", "ray://:10001"):  # without a port Ray would wait for nobody
        with pytest.raises(BadOption, match=f"on cannot be '{on}'"):
            fleet.cross(source, tmp_path / "out", on=on, **PLAIN)
    code = f"import sys; sys.modules['ray'] = None\nfrom carnet import fleet\nfleet.cross({str(source)!r}, 'out', on='ray', to='hf')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "MachineFailed: a cluster is reached with Ray" in found.stderr
    assert "pip install 'carnet[ray]'" in found.stderr
    words = command("cross", source, tmp_path / "out", "--to", "hf", "--on", "ray")
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    found = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 1
    assert found.stderr.startswith("carnet: the Ray cluster cannot be used\n  where     127.0.0.1:1\n")
    assert not any(tmp_path.iterdir())

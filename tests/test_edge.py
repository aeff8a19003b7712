"""What a person sees where the machine refuses, or a key is pressed: one message, an exit code, no traceback."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import pytest

GOLDEN = Path(__file__).parent / "goldens/megatron/llama_te_pp2_vpp"
# everything is imported before the limit holds: another user may not read where Python lies
CHILD = """
import os, resource, sys
import carnet.api, carnet.cli.commands, carnet.report.terminal
from carnet.__main__ import main
exec(sys.argv.pop(1))
main()
"""
PRESSED = """
from carnet.__main__ import main
from carnet.cli import edge
edge.heed(edge.stop_at_once)
print("here", flush=True)
main()
"""
NOBODY = "os.setgid(65534); os.setuid(65534)"


def carnet(
    *words: object, limit: str = "pass", cwd: Path | None = None, stdout: IO[str] | int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, limit, *map(str, words)]

    done = subprocess.run(command, text=True, timeout=120, check=False, cwd=cwd, stdout=stdout, stderr=subprocess.PIPE)
    assert "Traceback" not in (done.stderr or "")
    return done


@pytest.mark.parametrize("target", ["/", ".."])
def test_a_target_that_cannot_be_is_refused(tmp_path, target):
    done = carnet("cross", GOLDEN, target, "--to", "hf", cwd=tmp_path)
    assert done.returncode in {1, 2}
    assert done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", ["pass", "os.close(1)", "os.close(1); os.close(2)"])
def test_a_crossing_that_nobody_reads_of_is_done(tmp_path, limit):
    with open("/dev/full", "w") as full:
        done = carnet("cross", GOLDEN, tmp_path / "out", "--to", "hf", limit=limit, stdout=full)
    assert done.returncode == 0
    assert (tmp_path / "out/model.safetensors").exists()


def test_what_only_prints_fails_where_it_cannot(tmp_path):
    with open("/dev/full", "w") as full:
        done = carnet("inspect", GOLDEN, stdout=full)
    assert (done.returncode, done.stderr) == (1, "carnet: cannot write to stdout: No space left on device\n")


def test_a_working_directory_that_is_gone_is_said(tmp_path):
    limit = f"os.mkdir({str(tmp_path / 'gone')!r}); os.chdir({str(tmp_path / 'gone')!r}); os.rmdir({str(tmp_path / 'gone')!r})"
    done = carnet("cross", GOLDEN, "out", "--to", "hf", limit=limit)
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "carnet: the working directory is not there any more")


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (f"resource.setrlimit(resource.RLIMIT_NPROC, (1, 1)); {NOBODY}", "starts no more threads"),
        ("resource.setrlimit(resource.RLIMIT_AS, (90 << 20, 90 << 20))", "no memory left"),
        *((f"resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, {most}))", "opens no more files") for most in (4, 5, 6, 7, 8)),
    ],
)
def test_a_machine_that_has_no_more_is_said(limit, said):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are shut to others
        out = Path(folder) / "out"
        out.parent.chmod(0o777)
        done = carnet("cross", GOLDEN, out, "--to", "hf", limit=limit)
        assert done.returncode == 1
        assert said in done.stderr
        assert not out.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    "words", [("inspect", "{shut}/g"), ("verify", "{shut}/g"), ("cross", GOLDEN, "{shut}/out", "--to", "hf")]
)
def test_a_folder_that_may_not_be_searched_is_said(tmp_path, words):
    shut = tmp_path / "shut"
    shutil.copytree(GOLDEN, shut / "g")
    shut.chmod(0o700)
    done = carnet(*(str(word).format(shut=shut) for word in words), limit=NOBODY)
    assert done.returncode in {1, 2}
    assert done.stderr


def test_folders_whose_names_are_no_unicode_are_crossed(tmp_path):
    source, out = (Path(os.fsdecode(os.fsencode(tmp_path) + name)) for name in (b"/\xffsource", b"/\xffout"))
    shutil.copytree(GOLDEN, source)
    assert carnet("cross", source, out, "--to", "hf").returncode == 0
    done = carnet("verify", out)
    assert (done.returncode, done.stdout.split()[0]) == (0, "equal")


def test_an_interrupt_that_a_library_raises_in_the_place_of_a_signal_s_ends_as_that_signal(tmp_path):
    """As Ray does whose loop in C++ a signal ends."""
    program = (
        "import sys\nfrom carnet.cli import edge\n"
        "def asked():\n    edge.Ended(15)\n    raise KeyboardInterrupt\n"
        "sys.exit(edge.guarded(asked, 'cross'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("delay", [0.03, 0.06, 0.1, 0.2, 0.4])
def test_ctrl_c_at_any_time_is_one_line(tmp_path, delay):
    command = [
        sys.executable,
        "-c",
        PRESSED,
        "cross",
        str(GOLDEN),
        str(tmp_path / "out"),
    ]
    child = subprocess.Popen([*command, "--to", "hf"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "here\n"  # Python itself has begun
    time.sleep(delay)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode in {0, 130}
    assert "Traceback" not in said
    assert child.returncode == 0 or said.startswith("carnet: interrupted")

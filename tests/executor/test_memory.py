"""The promise about memory is kept, and a budget too small is refused."""

import pickle
import subprocess
import sys

import pytest

from carnet.errors import BadRequest
from carnet.executor.memory import LEAST, choose_threads, choose_window, promised_memory
from carnet.plans.request import MEMORY
from tests.peak import SAMPLED

# anonymous memory is sampled beside the run: VmHWM would count the pages of libraries too
CHILD = f"""
{SAMPLED}
import pickle
from carnet.storage.protocol import Crossing
from carnet.executor.run import write
from carnet.executor.staging import owned

thread.start()
folder = Path(sys.argv[1])
plan = pickle.loads((folder / "plan").read_bytes())
with owned(plan, Crossing("p"), folder / "source", folder / "out") as staging:
    write(plan, folder / "source", staging, threads=4)
stop()
print(peak)
"""


HASHING = (
    CHILD.replace("from carnet.executor.run import write", "import hashlib\nfrom carnet.executor.digesting import digests")
    .replace(
        """with owned(plan, Crossing("p"), folder / "source", folder / "out") as staging:
    write(plan, folder / "source", staging, threads=4)""",
        """wanted = {(file.name, tensor.name) for file in plan.files for tensor in file.tensors}
digests(plan, folder_at(folder / "source"), wanted, [lambda _: hashlib.sha256()], threads=4)""",
    )
    .replace("from carnet.executor.staging import owned", "from carnet.storage.schemes import folder_at")
)


@pytest.mark.parametrize("child", [CHILD, HASHING], ids=["written", "hashed"])
@pytest.mark.parametrize(
    ("tensors", "rows", "width", "short"),
    [
        (4, 5000, 5000, True),  # 100 MB through windows, from columns
        (4, 5000, 5000, False),  # 100 MB through the kernel
        (10_000, 2, 64, False),  # 20,000 steps
        (10_000, 2, 64, True),
    ],
)
def test_the_measured_peak_stays_inside_the_promise(halves, tmp_path, tensors, rows, width, short, child):
    case = halves(tmp_path, tensors=tensors, rows=rows, width=width, short=short, window=8 << 20)
    (tmp_path / "plan").write_bytes(pickle.dumps(case.plan))
    ended = subprocess.run([sys.executable, "-c", child, str(tmp_path)], capture_output=True, text=True, check=True)
    promised = promised_memory(8 << 20, 4, len(case.plan.steps))
    print("measured", int(ended.stdout) >> 20, "promised", promised >> 20)
    assert int(ended.stdout) <= promised


def test_a_trillion_weights_in_codes_are_written_inside_the_default_budget():
    assert choose_window(MEMORY, 209_435) == 8 << 20  # Kimi-K2's shape, 384 experts in 60 layers, to NVFP4


def test_a_large_budget_gets_the_largest_window():
    assert choose_window(1 << 40, 1000) == 8 << 20


@pytest.mark.parametrize("budget", [70 << 20, 80 << 20, 100 << 20, 200 << 20, 1 << 30])
def test_a_chosen_window_keeps_its_promise(budget):
    window = choose_window(budget, 100)
    assert window >= LEAST
    for wanted in (None, 1, 64):
        threads = choose_threads(budget, window, 100, wanted)
        assert 1 <= threads <= (wanted or 64)
        assert promised_memory(window, threads, 100) <= budget


def test_a_budget_below_the_least_is_refused_with_what_it_takes():
    with pytest.raises(BadRequest, match="too small") as refused:
        choose_window(10 << 20, 100)
    assert "expected  at least" in str(refused.value)

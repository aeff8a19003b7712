"""Any crossing gives the bytes that numpy's own assignment gives."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from carnet.executor.jobs import Windows, jobs_of
from carnet.executor.run import write
from carnet.executor.staging import owned
from carnet.storage.protocol import Crossing

WINDOWS = st.sampled_from((64, 200, 1000, 4096, 1 << 20))


def placed(case, out, progress=None):
    with owned(case.plan, Crossing("p"), case.source, out) as staging:
        found = write(case.plan, case.source, staging, progress=progress)
        staging.publish()
    return found


def crossed(make, *args, **options):
    with tempfile.TemporaryDirectory() as folder:
        case = make(Path(folder), *args, **options)
        out = Path(folder) / "out"
        told = []
        staged = placed(case, out, progress=lambda done, total: told.append((done, total)))
        found = {path.name: path.read_bytes() for path in out.iterdir()}
        assert found == case.expected | {"config.json": b"{}\n"}
        assert told[-1] == (staged.nbytes, staged.nbytes)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 32), window=WINDOWS)
def test_any_crossing_gives_the_bytes_of_numpy_assignment(crossing, seed, window):
    crossed(crossing, seed, window=window)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 32), window=st.sampled_from((4096, 100_000)))
def test_crossings_with_long_runs_give_the_bytes_of_numpy_assignment(crossing, seed, window):
    crossed(crossing, seed, window=window, scale=20_000)


@pytest.mark.parametrize("types", [("u8", "u8"), ("bf16", "bf16"), ("f32", "bf16"), ("bf16", "f32")])
@pytest.mark.parametrize(
    ("rows", "columns", "window"), [(700, 300, 4096), (300, 700, 4096), (3000, 20, 1000), (20, 3000, 9000)]
)
def test_a_transposed_matrix_is_the_transposed_matrix(transposed, types, rows, columns, window):
    crossed(transposed, rows=rows, columns=columns, types=types, window=window)


def test_a_matrix_is_turned_in_squares_where_ranges_would_read_it_again_and_again(transposed, tmp_path):
    case = transposed(tmp_path, rows=700, columns=300, types=("u8", "u8"), window=4096)
    tiles = [part.tile for job in jobs_of(case.plan) if isinstance(job, Windows) for part in job.parts]
    assert tiles[0].rows == tiles[0].columns == (0, 63)


@pytest.mark.parametrize("short", [True, False])
def test_halves_longer_than_one_copy_of_the_kernel_arrive_whole(halves, short):
    crossed(halves, tensors=1, rows=2, width=9 << 20, short=short, window=8 << 20)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_a_source_on_another_file_system_is_copied_without_the_kernels_help(halves, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        case = halves(Path(memory), tensors=2, rows=2, width=200_000, short=False, window=4096)
        placed(case, tmp_path / "out")
        assert (tmp_path / "out/model.safetensors").read_bytes() == case.expected["model.safetensors"]

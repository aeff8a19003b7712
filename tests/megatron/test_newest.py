"""The newest megatron-core beside the one that is installed: the tests of its specs, stores and export run with it, each file apart.

`make test` puts it into the environment, in a folder of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.referee

ROOT = Path(__file__).parents[2]
NEWEST = next(iter(sorted(Path(sys.prefix).glob("megatron-core-*"))), None)
TESTS = (
    "test_paths.py",
    "test_refusals.py",
    "test_sparse_attention.py",
    "test_specs_build.py",
    "test_specs_load.py",
    "test_specs_arguments.py",
    "test_fits_stores.py",
    "test_hybrid_names.py",
    "test_hybrid_of_gpt.py",
    "test_further_by_pattern.py",
    "test_further_of_qwen.py",
    "test_export_layers.py",
    "test_export_helper.py",
    "test_export_single_device.py",
)


@pytest.mark.skipif(NEWEST is None, reason="`make test` fetches it")
@pytest.mark.parametrize("name", TESTS)
def test_what_needs_megatron_works_with_its_newest_release(name):
    paths = (str(NEWEST), str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-x", "-p", "tests.megatron.newest", "-p", "no:cacheprovider"]
    here = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command.append(f"tests/megatron/{name}")
    said = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout[-4000:] + said.stderr[-2000:]
    assert f"with {NEWEST.name.replace('core-', 'core ')}" in said.stdout

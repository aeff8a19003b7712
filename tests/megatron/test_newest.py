"""The newest megatron-core beside the one that is installed: the tests of its specs, stores and export run with it.

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
# a process each: most of one's time is the import
TESTS = {
    "specs and stores": "paths refusals specs_build specs_load specs_arguments fits_stores hybrid_names hybrid_of_gpt",
    "layers and export": "sparse_attention further_by_pattern further_of_qwen export_layers export_helper export_single_device",
}


@pytest.mark.skipif(NEWEST is None, reason="`make test` fetches it")
@pytest.mark.parametrize("names", TESTS.values(), ids=TESTS)
def test_what_needs_megatron_works_with_its_newest_release(names):
    paths = (str(NEWEST), str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-x", "-p", "tests.megatron.newest", "-p", "no:cacheprovider"]
    here = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command += [f"tests/megatron/test_{name}.py" for name in names.split()]
    said = subprocess.run(command, cwd=ROOT, env=here, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout[-4000:] + said.stderr[-2000:]
    assert f"with {NEWEST.name.replace('core-', 'core ')}" in said.stdout

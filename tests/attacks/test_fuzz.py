"""Any damage to any header gives a checkpoint or a CarnetError: never another exception, and nothing runs."""

import random
import shutil
from pathlib import Path

import pytest

from carnet.errors import CarnetError
from carnet.formats.detect import fingerprint, open_checkpoint

ROUNDS = 400


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return the bytes with one kind of damage somewhere."""
    place = chance.randrange(len(data))
    match chance.randrange(6):
        case 0 | 1:
            return data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]
        case 2:
            return data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :]
        case 3:
            return data[:place] + data[place + chance.randrange(1, 9) :]
        case 4:
            return data[:place] + chance.randbytes(chance.randrange(1, 9)) + data[place:]
        case _:
            other = chance.randrange(len(data))
            return data[:place] + data[other : other + 8] + data[place + 8 :]


def survived(root: Path, file: str, seed: int) -> int:
    """Damage a file many times; return how often the reader refused it."""
    honest = (root / file).read_bytes()
    refused = 0
    for number in range(ROUNDS):
        chance = random.Random(f"{seed} {file} {number}")
        (root / file).write_bytes(damaged(honest, chance))
        try:
            assert fingerprint(open_checkpoint(root))
        except CarnetError as error:
            assert str(error)
            refused += 1
    return refused


@pytest.mark.parametrize("file", [".metadata", "metadata.json", "common.pt", "__0_0.distcp"])
def test_a_damaged_torch_dist_file_is_read_or_refused(megatron, file):
    assert survived(megatron.root, file, seed=1) > ROUNDS // 20


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_safetensors_folder_is_read_or_refused(hf, file):
    assert survived(hf, file, seed=2) > ROUNDS // 20


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_damaged_megatron_checkpoint_is_read_or_refused(tmp_path, marker, file):
    golden = Path(__file__).parents[1] / "goldens/megatron/v019_llama_te_tp2/iter_0000001"
    shutil.copytree(golden, tmp_path / "golden")
    assert survived(tmp_path / "golden", file, seed=3) > 0

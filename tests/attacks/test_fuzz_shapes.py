"""Real files with parts exchanged for strange ones: a result or a CarnetError, never another exception. `make fuzz` runs it longer."""

import copy
import json
import os
import pickle
import random
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash

from carnet import api
from carnet.errors import CarnetError
from carnet.report.data import dump, error_data, inspection_data, verdict_data

SECONDS = float(os.environ.get("CARNET_FUZZ_SECONDS", "0"))  # of each test
TURNS = 50  # at least, the same on every machine
GOLDEN = Path(__file__).parents[1] / "goldens/megatron/llama_te_pp2_vpp"
STRANGE = (
    None, True, 0, 1, -1, 2, 3, 1 << 31, 1 << 62, 1 << 63, -(1 << 70), 0.5, -0.0, 1e308, "", "/", ".", "..", "a", "\0", "\ud800",
    "x" * 300, "../up", "[/red]", "[", "layers.0.attention.q", "bf16", "f32", "u8", "safetensors", [], [0], [[]], ["a"], [1, 2],
    [-1], {}, {"a": 1}, {"": None}, [1 << 62] * 3, {"a": {"a": {}}}, [None],
)  # fmt: skip


def turns(seed: int) -> Iterator[random.Random]:
    """Yield sources of chance: so many, and more until the time is up."""
    end, number = time.monotonic() + SECONDS, 0
    while number < TURNS or time.monotonic() < end:
        yield random.Random(f"{seed} {number}")
        number += 1


def strange(value: object, chance: random.Random) -> object:
    """Return a value with one part of it, at any depth, removed, doubled or exchanged."""
    value = copy.deepcopy(value)
    places: list[tuple[object, object]] = []
    waiting = [value]
    while waiting:
        part = waiting.pop()
        keys = list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        places += [(part, key) for key in keys]
        waiting += [part[key] for key in keys]
    if not places:
        return chance.choice(STRANGE)
    part, key = chance.choice(places)
    match chance.randrange(6):
        case 0:
            del part[key]
        case 1 if isinstance(part, dict):
            part[chance.choice(["a", "", "__metadata__", "carnet", "\ud800"])] = part[key]
        case 2:
            other, place = chance.choice(places)
            part[key] = copy.deepcopy(other[place])
        case _:
            part[key] = copy.deepcopy(chance.choice(STRANGE))
    return value


def endures(action: Callable[[], object], seen: object) -> None:
    """Do something that may be refused, and nothing else; what is said can be written."""
    try:
        action()
    except CarnetError as error:
        assert str(error).encode("utf-8", "backslashreplace")
        assert dump(error_data(error))
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}\n{seen!r:.2000}") from error


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """A crossing to Hugging Face, proven."""
    out = tmp_path_factory.mktemp("fuzz") / "hf"
    assert api.cross(GOLDEN, out, to="hf").equal
    return out


@pytest.mark.parametrize(
    "wish", [{"to": "hf"}, {"to": "megatron"}, {"to": "hf", "quantize": "fp8-channel", "style": "compressed-tensors"}]
)
def test_a_plan_with_any_field_changed_is_run_or_refused(tmp_path, wish):
    from carnet.plans import saved

    rows = [json.loads(line) for line in saved.lines(api.plan(GOLDEN, **wish))]
    for chance in turns(1):
        at = chance.choice([0, chance.randrange(len(rows)), chance.randrange(min(8, len(rows)))])
        changed = [strange(row, chance) if number == at else row for number, row in enumerate(rows)]
        body = "".join(json.dumps(row) + "\n" for row in changed).encode()
        digest = json.dumps({"digest": xxhash.xxh3_128_hexdigest(body)}).encode()
        (tmp_path / "plan").write_bytes(body + digest + b"\n")
        endures(lambda: api.run(tmp_path / "plan", tmp_path / "out"), changed[at])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "carnet.json", "hf_quant_config.json", "header"]
)
def test_json_of_a_target_with_any_part_changed_is_read_or_refused(tmp_path, target, name):
    shutil.copytree(target, tmp_path / "hf")
    weights = (tmp_path / "hf/model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    beside = {
        "model.safetensors.index.json": {
            "metadata": {"total_size": 1},
            "weight_map": dict.fromkeys(header, "model.safetensors"),
        },
        "hf_quant_config.json": {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
        },
    }
    honest = header if name == "header" else beside.get(name) or json.loads((target / name).read_text())
    for chance in turns(2):
        changed = strange(honest, chance)
        raw = json.dumps(changed).encode()
        if name == "header":
            (tmp_path / "hf/model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + weights[8 + length :])
        else:
            (tmp_path / "hf" / name).write_bytes(raw)
        for action in (
            lambda: dump(inspection_data(api.inspect(tmp_path / "hf"))),
            lambda: dump(verdict_data(api.verify(tmp_path / "hf"))),
            lambda: dump(verdict_data(api.verify(GOLDEN, tmp_path / "hf"))),
        ):
            endures(action, changed)


def test_metadata_with_any_part_changed_is_read_or_refused(megatron):
    honest = (megatron.root / ".metadata").read_bytes()
    for chance in turns(3):
        metadata = pickle.loads(honest)
        described = metadata.state_dict_metadata
        name = chance.choice(sorted(described))
        match chance.randrange(5):
            case 0:
                described[chance.choice(["\ud800", "", "a/b", "[/red]", "x" * 5000])] = described[name]
            case 1:
                described[name] = chance.choice(STRANGE)
            case 2:
                index = chance.choice(list(metadata.storage_data))
                metadata.storage_data[index] = chance.choice(STRANGE)
            case 3 if hasattr(described[name], "size"):
                setattr(described[name], chance.choice(["size", "chunks", "properties"]), chance.choice(STRANGE))
            case _:
                index = chance.choice(list(metadata.storage_data))
                place = metadata.storage_data[index]
                object.__setattr__(place, chance.choice(["relative_path", "offset", "length"]), chance.choice(STRANGE))
        try:
            raw = pickle.dumps(metadata, protocol=chance.choice([2, 4]))
        except (UnicodeEncodeError, TypeError):  # protocol 2 has its own texts
            continue
        (megatron.root / ".metadata").write_bytes(raw)
        endures(lambda: dump(inspection_data(api.inspect(megatron.root))), raw)

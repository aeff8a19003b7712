"""What calibration found: a safetensors file of f32 scalars, named after the modules of the Hugging Face model."""

import struct
from math import isfinite, prod
from pathlib import Path

from carnet.errors import BadRequest
from carnet.formats.files import open_file, read_at
from carnet.formats.safetensors import read_header


def read_amax(path: Path) -> dict[str, float]:
    """Return every scalar of a file: ``model.layers.0.self_attn.q_proj.input_amax`` -> the largest magnitude seen.

    Raises BadRequest where one is no f32 scalar, or no magnitude.
    """
    header = read_header(path.parent, path.name)
    found = {}
    with open_file(path.parent, path.name) as file:
        for entry in header.entries:
            if entry.dtype != "f32" or prod(entry.shape) != 1:
                facts = {
                    "where": path,
                    "tensor": entry.name,
                    "expected": "one f32",
                    "found": f"{entry.dtype} {list(entry.shape)}",
                }
                raise BadRequest("the file of calibration holds something else", facts)
            (value,) = struct.unpack("<f", read_at(file, entry.offset, 4))
            if not (isfinite(value) and value > 0):
                raise BadRequest(
                    "the file of calibration holds no magnitude", {"where": path, "tensor": entry.name, "found": value}
                )
            found[entry.name] = value
    return found

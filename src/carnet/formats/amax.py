"""What calibration found: a safetensors file of f32 scalars, named after the modules of the Hugging Face model."""

import struct
from math import isfinite, prod

from carnet.errors import BadRequest
from carnet.formats.safetensors import read_header
from carnet.storage.protocol import read_at
from carnet.storage.schemes import PathLike, file_at


def read_amax(path: PathLike) -> dict[str, float]:
    """Return every scalar of a file: ``model.layers.0.self_attn.q_proj.input_amax`` -> the largest magnitude seen.

    Raises BadRequest where one is not an f32 scalar, or no magnitude.
    """
    folder, name = file_at(path)
    header, file = read_header(folder, name), folder.open(name)
    found = {}
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

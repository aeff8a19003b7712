"""How a person may write the value of an option, on the command line as in Python: sizes, paths, patterns, words.

Each reader takes the option's name and what was given, and returns what carnet works with. It raises BadOption where that can never be.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import get_args, get_origin

from carnet.errors import BadOption, shown

PathLike = str | os.PathLike[str]

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
FAR = 3.4028235e38  # the largest f32
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", re.IGNORECASE)
DTYPES = {  # as carnet, PyTorch, its command line and other converters' say them
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
    **dict.fromkeys(("f16", "fp16", "float16", "half"), "f16"),
    **dict.fromkeys(("f32", "fp32", "float32", "float"), "f32"),
}

STORE = re.compile(r"([a-z][a-z0-9+.-]+):/(/?)(.*)", re.IGNORECASE | re.DOTALL)
OF_HUBS = ("ckpt", "hf_dir", "tokenizer")  # what people are used to name by an owner and a model
HUB = "a model of Hugging Face's hub has to be brought here first: hf download {} --local-dir FOLDER"
BROUGHT = {"hf": HUB}  # scheme -> how what is there comes here
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def local(name: str, path: object, *, out: bool = False) -> str:
    """Return the path or URL of something in a store of carnet's; raise BadOption for a URL of any other.

    So is what can only be a model's name on a hub, with how to bring it here.

    >>> local("ckpt", "./models/llama"), local("ckpt", "S3://models/llama"), local("ckpt", "file:///models/llama")
    ('./models/llama', 's3://models/llama', '/models/llama')
    """
    if not isinstance(path, str | os.PathLike):
        raise wrong(name, path, "a path")
    said = os.fspath(path)
    if not isinstance(said, str) or not _can_be_a_path(said):
        raise wrong(name, path, "a path")
    found = STORE.fullmatch(said)
    if found is None and not out and name.lower() in OF_HUBS and HUB_NAME.fullmatch(said) and not Path(said).parent.exists():
        raise BadOption(f"{name} is not a folder of this machine", {"found": said}, remedy=HUB.format(said))
    if found is None or (not found[2] and Path(f"{found[1]}:").exists()):  # a Path has lost one of a URL's slashes
        return said
    from carnet.storage.schemes import SCHEMES, local_path  # not sooner: --help need not know a store

    scheme = found[1].lower()
    if scheme == "file":
        return local_path(f"file://{found[3] if found[2] else '/' + found[3].lstrip('/')}")
    url = f"{scheme}://{found[3]}"
    if scheme not in SCHEMES:
        facts = {"found": url, "known": ", ".join(f"{known}://" for known in SCHEMES if known)}
        brought = BROUGHT.get(scheme)
        remedy = brought and brought.format(found[3].strip("/"))
        raise BadOption(f"{name} is a URL of a kind that carnet does not know", facts, remedy=remedy)
    return url


def here(name: str, path: object, *, out: bool = False) -> Path:
    """Return the path of a file that has to be of this machine."""
    said = local(name, path, out=out)
    if "://" in said:
        raise BadOption(f"{name} is a URL, and has to be a path of this machine", {"found": said})
    return Path(said)


def _can_be_a_path(said: str) -> bool:
    try:
        return b"\0" not in os.fsencode(said) and said != ""
    except UnicodeEncodeError:  # half of a surrogate pair, which stands for no byte
        return False


def located(name: str, value: object) -> str | None:
    """Return a path that holds wherever it is read again."""
    from carnet.storage.schemes import folder_at

    return None if value is None else str(folder_at(local(name, value)))


def nbytes(name: str, value: object) -> int:
    """Return the bytes of a size, decimal as carnet prints them; those of KiB, MiB and GiB are binary.

    >>> nbytes("memory", "512M"), nbytes("memory", "512MB"), nbytes("memory", "512MiB"), nbytes("memory", 1 << 20)
    (512000000, 512000000, 536870912, 1048576)
    """
    if isinstance(value, str):
        found = SIZE.fullmatch(value.strip().replace(",", "").replace("_", ""))
        if found is None or found[2].lower() not in {**UNITS, **BINARY}:
            raise wrong(name, value, "a size: 512M, 2G, 512MiB or a number of bytes")
        value = int(Fraction(found[1]) * {**UNITS, **BINARY}[found[2].lower()])
    return whole(name, value)


def whole(name: str, value: object) -> int:
    """Return a whole number from 1 to 2**62, as a saved plan has them."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise wrong(name, value, "a whole number")
    if value < 1:
        raise BadOption(f"{name} must be at least 1", {"found": value})
    if int(value) > 1 << 62:
        raise BadOption(f"{name} is larger than anything of this world")
    return int(value)


def number(name: str, value: object) -> float:
    """Return a positive number that fits 32 bits."""
    if isinstance(value, bool) or not isinstance(value, Real) or value <= 0 or not value < FAR:
        raise wrong(name, value, "a positive number")
    return float(value)


def factor(name: str, value: object) -> float:
    """Return a number other than zero that fits 32 bits."""
    if isinstance(value, bool) or not isinstance(value, Real) or value == 0 or value <= -FAR or not value < FAR:
        raise wrong(name, value, "a number other than zero")
    return float(value)


def patterns(name: str, value: object) -> tuple[str, ...]:
    """Return patterns of names; a text is one pattern.

    >>> patterns("exclude", "*.o_proj"), patterns("drop", ["a.*", "b.*"]), patterns("drop", None)
    (('*.o_proj',), ('a.*', 'b.*'), ())
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable):
        raise wrong(name, value, "a pattern of names, or several")
    found = tuple(value)
    for each in found:
        if not isinstance(each, str):
            raise wrong(name, each, "a pattern of names")
    return found


def word(name: str, value: object, known: Mapping[str, str]) -> str:
    """Return what one of some words stands for.

    >>> word("dtype", "torch.float16", DTYPES)
    'f16'
    """
    if not isinstance(value, str):
        said = str(value)  # torch.bfloat16 prints its own name
        if said not in {f"torch.{each}" for each in known}:
            raise wrong(name, value, f"one of {', '.join(known)}")
        value = said
    plain = value if value in known else value.lower().removeprefix("torch.")
    if plain not in known:
        raise BadOption(f"{name} cannot be {shown(repr(value))}{near(plain, known)}", {"known": ", ".join(known)})
    return known[plain]


# programs, by the layout that they read
ALIKE = {
    **dict.fromkeys(("transformers", "huggingface", "hugging-face", "safetensors", "nim"), "hf"),
    **dict.fromkeys(("tensorrt", "tensorrt-llm", "tensorrt_llm", "trt", "trt-llm"), "trtllm"),
    **dict.fromkeys(("mcore", "megatron-core", "megatron-lm", "megatron-bridge", "nemo", "torch_dist"), "megatron"),
}


def near(word: str, known: Iterable[str]) -> str:
    """Return a question where a known word is near.

    >>> near("megaton", ["hf", "megatron"]), near("onnx", ["hf", "megatron"])
    ("; did you mean 'megatron'?", '')
    """
    plain, words = word.lower(), list(known)
    found: Sequence[str] = [ALIKE[plain]] if ALIKE.get(plain) in words else get_close_matches(plain, words, 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def wrong(name: str, value: object, expected: str) -> BadOption:
    """Return the error of a value that an option never has."""
    return BadOption(f"{name} cannot be {shown(repr(value))}", {"expected": expected, "found": type(value).__name__})


def fits(value: object, kind: object) -> bool:
    """Say whether a plain value is of the kind of a field; a list stands for a tuple."""
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    kinds = get_args(kind) or (kind,)
    return type(value) in kinds or (float in kinds and type(value) is int)

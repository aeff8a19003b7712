"""Calibration: run texts through a Hugging Face model and note the largest activation of every linear layer, key and value.

NVIDIA's ModelOpt does the noting; this module gives it the texts and writes what it found for ``--amax``: f32 scalars, named after
the modules of the checkpoint. It is the one module of carnet that runs a model: torch, transformers and ModelOpt come with the extra
``carnet[modelopt]`` and are imported when it is called, not before.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import StringIO, TextIOWrapper
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carnet.api import inspect
from carnet.dialects.kinds import KINDS
from carnet.errors import BadCheckpoint, BadRequest, CarnetError, MachineFailed, NotSupported
from carnet.formats.amax import read_amax
from carnet.plans.options import here
from carnet.pool import Progress
from carnet.progress import Callback, Told, verb
from carnet.storage.opening import check_plain_file, failed, reading, replace_file
from carnet.storage.schemes import PathLike

if TYPE_CHECKING:
    import torch

PROGRAMS = ("torch", "transformers", "safetensors", "modelopt")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")  # one of them is always there
INSTALL = "pip install 'carnet[modelopt]'"
# the projection that keys and values come from; where one makes both, the first
KEYS = ("k_proj", "qkv_proj", "query_key_value", "c_attn")
VALUES = ("v_proj", "qkv_proj", "query_key_value", "c_attn")


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found, and from how much."""

    amaxes: int  # magnitudes written
    texts: int
    tokens: int


@verb
def calibrate(
    folder: PathLike,
    data: PathLike,
    output: PathLike,
    *,
    samples: int = 512,
    length: int = 512,
    device: str | None = None,
    progress: Callback | None = None,
) -> Calibration:
    """Write the file for ``--amax`` from a Hugging Face folder and texts, one ``{"text": "..."}`` a line.

    The first ``samples`` texts are read, ``length`` tokens of each. Raises BadRequest where there is no text, and MachineFailed where
    the programs that run a model are not installed.
    """
    told = Told(progress, "calibrating")
    home, texts_file, out = here("hf_dir", folder), here("data", data), here("output", output, out=True)
    if not out.absolute().parent.is_dir():
        raise BadRequest("the folder of the output does not exist", {"where": out.absolute().parent})
    _refuse_other(out)
    texts = read_texts(texts_file, samples)
    names = _modules(folder)
    missing = [name for name in PROGRAMS if find_spec(name) is None]
    if missing:
        raise MachineFailed("the programs that run a model are not installed", {"missing": ", ".join(missing)}, remedy=INSTALL)
    with _quiet():
        model, tokenizer = _load(home, device)
        cut = [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts]
        tokens = [ids for ids in cut if ids]
        if not tokens:
            raise BadRequest("the texts have no tokens", {"where": data})
        amaxes = _observe(model, tokens, told.amount)
    unknown = sorted(name for name in amaxes if name.rsplit(".", 1)[0] not in names)
    if unknown:
        facts = {"name": unknown[0], "others": len(unknown) - 1}
        raise NotSupported("ModelOpt names a module that the checkpoint does not have", facts)
    count = sum(map(len, tokens))
    _write(out, amaxes, {"texts": str(len(tokens)), "tokens": str(count), "length": str(length)})
    return Calibration(len(amaxes), len(tokens), count)


def _refuse_other(out: Path) -> None:
    """Raise BadRequest where the output is there and is neither empty nor of an earlier calibration, which is replaced."""
    try:
        there = os.lstat(out)
        check_plain_file(there, writes=False)
        if there.st_size:
            read_amax(out)
    except FileNotFoundError:
        pass
    except (OSError, CarnetError) as error:
        raise BadRequest(f"{out} exists and is not a file of magnitudes", remedy="choose another file") from error


def read_texts(path: Path, samples: int) -> list[str]:
    """Return the first texts of a file of JSON lines."""
    found: list[str] = []
    try:
        with TextIOWrapper(reading(path), encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                found.append(_text(path, number, line))
                if len(found) == samples:
                    break
    except OSError as error:
        raise failed("the texts cannot be read", path, error) from error
    except UnicodeDecodeError as error:
        raise BadRequest("the texts are no UTF-8", {"where": path}) from error
    if not found:
        raise BadRequest("there is no text to calibrate with", {"where": path}, remedy='write {"text": "..."}, one a line')
    return found


def _text(path: Path, number: int, line: str) -> str:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        said = None
    text = said.get("text") if isinstance(said, dict) else None
    if not isinstance(text, str):
        raise BadRequest("a line of the texts is something else", {"where": f"{path}:{number}", "expected": '{"text": "..."}'})
    return text


def _modules(folder: PathLike) -> set[str]:
    """Return the modules of a folder that carnet knows as a Hugging Face checkpoint."""
    found = inspect(folder)
    if found.refusal is not None:
        raise found.refusal
    if not KINDS[found.checkpoint.dialect].companions:
        facts = {"where": folder, "found": found.checkpoint.dialect}
        raise BadRequest("only a Hugging Face folder can be calibrated", facts, remedy="carnet cross CKPT OUT --to hf")
    if not any(Path(folder, name).is_file() for name in TOKENIZER):
        facts = {"where": folder, "looked for": ", ".join(TOKENIZER)}
        raise BadRequest("the folder holds no tokenizer", facts, remedy="put the model's own into it")
    return {name.removesuffix(".weight") for _, name in found.checkpoint.tensors}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the programs say to a person off stdout, which is data, and off a progress bar."""
    with redirect_stdout(StringIO()):
        try:
            import_module("modelopt.torch.quantization")  # it also has transformers say everything
            logging: Any = import_module("transformers.utils.logging")
        except ImportError as error:
            raise MachineFailed("the programs that run a model do not start", {"reason": error}, remedy=INSTALL) from error
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield


def _load(folder: Path, device: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # no pickle is opened, no code of the checkpoint is run; experts one by one, as ModelOpt needs them
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True, trust_remote_code=False)
        return model.to(torch.device(where)).eval(), tokenizer
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BadCheckpoint("transformers cannot load the model", {"where": folder, "reason": reason}) from error


def _observe(model: "torch.nn.Module", tokens: list[list[int]], progress: Progress) -> dict[str, float]:
    """Run the texts through the model under ModelOpt's eyes; return the magnitudes under the checkpoint's names."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.quantization.nn import TensorQuantizer

    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def run(model: "torch.nn.Module") -> None:
        device = next(model.parameters()).device
        with torch.no_grad():
            for done, ids in enumerate(tokens, 1):
                model(torch.tensor([ids], device=device), use_cache=False)
                progress(done, len(tokens))

    wish = mtq.update_quant_cfg_with_kv_cache_quant(mtq.FP8_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"])
    mtq.quantize(model, wish, run)
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if not isinstance(module, TensorQuantizer) or not module.is_enabled or "weight_quantizer" in name:
            continue
        for key in _checkpoint_names(model, name, parameters):
            found[key] = _magnitude(key, module.amax)
    return found


def _magnitude(name: str, amax: "torch.Tensor | None") -> float:
    value = 0.0 if amax is None else float(amax.float().max())
    if not (isfinite(value) and value > 0):
        facts = {"name": name, "found": "nothing" if amax is None else value}
        raise BadRequest("the texts leave a module without a magnitude", facts, remedy="use more texts")
    return value


def _checkpoint_names(model: "torch.nn.Module", quantizer: str, parameters: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return under which names the checkpoint would hold what a quantizer saw: several where the model keeps experts in one tensor."""
    if quantizer.endswith("input_quantizer"):  # of the module that holds it, or of the parameter whose name stands before it
        place = quantizer.removesuffix("input_quantizer")
        candidates, what = [place + "weight" if place.endswith(".") else place.removesuffix("_")], "input"
    else:
        attention, cached = quantizer.rsplit(".", 1)
        if cached not in ("k_bmm_quantizer", "v_bmm_quantizer"):
            return []
        what = cached[0]
        candidates = [f"{attention}.{projection}.weight" for projection in (KEYS if what == "k" else VALUES)]
    parameter = next((name for name in candidates if name in parameters), None)
    if parameter is None:  # keys and values of latent attention are no projection's output
        return []
    return [f"{name.removesuffix('.weight')}.{what}_amax" for name in _saved_as(model, parameter, parameters[parameter])]


def _saved_as(model: "torch.nn.Module", parameter: str, shape: tuple[int, ...]) -> list[str]:
    """Return the names that transformers saves a parameter under."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    return list(revert_weight_conversion(model, {parameter: torch.empty(shape, device="meta")}))  # type: ignore[arg-type]


def _write(path: Path, amaxes: Mapping[str, float], notes: Mapping[str, str]) -> None:
    """Write the file in one go."""
    import numpy as np
    from safetensors.numpy import save

    try:
        replace_file(path, [save({name: np.asarray(amaxes[name], np.float32) for name in sorted(amaxes)}, dict(notes))])
    except OSError as error:
        raise failed("the magnitudes cannot be written", path, error) from error

"""Plan published models in their own sizes to every target that can say them: headers only, the files sparse.

The configs are those that aiconfigurator-core brings (``make test`` puts it into the environment); names and shapes are what
transformers saves of the class, which is built on no device. Layers that predict further tokens, which transformers does not save, are
not among them. Words behind the command choose by name: ``python -m bench.published DeepSeek-V3 gpt-oss``.
"""

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict
from itertools import chain
from math import prod
from pathlib import Path

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion

from bench.measure import record, run, table, work_folder
from bench.skeleton import Tensors, write
from carnet.architectures.known import FAMILIES, text_of
from carnet.architectures.wrappers import WRAPPERS
from carnet.quantize.reading import CONFIG_KEY
from tools.list_published import BROUGHT, CONFIG, targets

CLAIMED = {family.hf.architecture for family in FAMILIES} | {*WRAPPERS}
DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
ELSE = {"*": ("--accept", "needs"), "+": ("--read-by", "megatron-bridge")}  # where Megatron's arguments cannot say a model
TARGETS = {
    "hf": (),
    "megatron": ("--tp", "2", "--ep", "2"),
    "trtllm": ("--tp", "2"),
    "vllm": ("--tp", "2"),
    "sglang": ("--tp", "2"),
}


def published() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield name and config, without what it says of codes, of each model whose class carnet and transformers know."""
    for path in sorted(Path(sys.prefix).glob(f"{BROUGHT}/*{CONFIG}")):
        config = json.loads(path.read_text())
        (architecture,) = config.get("architectures") or [""]
        if architecture in CLAIMED and hasattr(transformers, architecture):
            yield path.name.removesuffix(CONFIG).replace("--", "/"), _plain(config)


def shapes(config: dict[str, object]) -> Tensors:
    """Return every tensor that transformers saves of a model with this config in bf16."""
    kind = getattr(transformers, str(*config["architectures"]))  # type: ignore[misc]  # a list of one
    own = deepcopy({key: each for key, each in config.items() if key != "model_type"})  # the class changes what it is given
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.device("meta"):
        model = kind._from_config(kind.config_class(**own), dtype=torch.bfloat16)  # noqa: SLF001  # what every auto class calls
    tied = model.all_tied_weights_keys
    saved = revert_weight_conversion(model, {name: each for name, each in model.state_dict().items() if name not in tied})
    return {name: (DTYPES[each.dtype], tuple(each.shape)) for name, each in saved.items()}


def _plain(said: dict[str, object]) -> dict[str, object]:
    """Return a config, however deep, without what it says of codes."""
    return {key: _plain(each) if isinstance(each, dict) else each for key, each in said.items() if key != CONFIG_KEY}


def words_of(config: dict[str, object], name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each target whose config can say a model, and the options that it takes."""
    for word in targets(*text_of(config, name), name).split():
        kind = word.rstrip("".join(ELSE))
        yield kind, (*TARGETS[kind], *chain(*(ELSE[mark] for mark in word[len(kind) :])))


def main() -> None:
    """Show a line for each model and target: what a plan took, and its peak of private memory."""
    folder, rows, results = work_folder() / "published", list[list[str]](), list[dict[str, object]]()
    seen = set[str]()  # those that differ in their codes alone are one
    for name, config in published():
        if not any(word in name for word in sys.argv[1:] or ("",)):
            continue
        tensors = shapes(config)
        if (spelled := json.dumps(tensors)) in seen:
            continue
        seen.add(spelled)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(folder, tensors, config)
        size = sum(prod(shape) for _, shape in tensors.values())
        for kind, words in words_of(config, name):
            one = run(["carnet", "plan", str(folder), "--to", kind, *words, "--memory", "2G"], sync=False)
            cells = (f"{size / 1e9:,.1f}", f"{len(tensors):,}", f"{one.processor:.2f}", f"{one.private / 1e6:,.0f}")
            rows.append([f"{name}, to {kind}", *cells])
            results.append({"model": name, "to": kind, "parameters": size, "tensors": len(tensors), **asdict(one)})
            print(".", end="", flush=True, file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    print(table([["", "billions", "tensors", "processor s", "private MB"], *rows]))
    record("published", {"plans": results})


if __name__ == "__main__":
    main()

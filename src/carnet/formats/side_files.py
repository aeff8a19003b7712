"""A *side file* is a file of a model's folder that holds none of its tensors: a tokenizer, a licence, code. A table says what each is.

The table says what a loader reads or executes, and what goes along to another folder of the same layout; what has no row is unknown.
Names: transformers/utils/__init__.py and hub.py, mistral_common, tiktoken, sentence-transformers, and folders as they are published.
"""

import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from carnet.errors import BadCheckpoint
from carnet.formats.files import list_names, shown

DEPTH = 4  # of folders in folders
Along = Literal["tokenizer", "model", "named", "anew", ""]


@dataclass(frozen=True, slots=True)
class Kind:
    """What files with certain names are."""

    what: str  # for people
    names: tuple[
        str, ...
    ]  # patterns of paths below the folder; a star stays inside one name, a slash at the end means all below
    loaded: bool  # a program that loads the model or its tokenizer reads or executes it
    along: Along  # goes with the tokenizer, with the model, where a config names it, is written anew; "" stays behind


def _kind(what: str, names: str, along: Along, *, loaded: bool = True) -> Kind:
    return Kind(what, tuple(names.split()), loaded, along)


WEIGHTS = "weights of another kind"
UNKNOWN = Kind("files that carnet does not know", (), True, "")
CODE = _kind("code that no config names", "*.py", "named")
TOKENIZER = _kind(
    "tokenizer",
    """tokenizer.json tokenizer.*.json tokenizer_config.json special_tokens_map.json added_tokens.json
    vocab.json merges.txt vocab.txt vocab.bpe encoder.json bpe.codes dict.txt normalizer.json emoji.json
    *.tiktoken tiktoken.model tekken.json tokenizer.model tokenizer.model.* *.spm spiece.model spm.model sentencepiece.model
    sentencepiece.*.model""",
    "tokenizer",
)
KINDS = (
    _kind(
        "the model's own config",
        "config.json model.safetensors.index.json hf_quant_config.json carnet.json",
        "anew",
    ),
    TOKENIZER,
    _kind(
        "chat templates",
        "chat_template.jinja chat_template.json additional_chat_templates/*.jinja *.jinja SYSTEM_PROMPT.txt",
        "tokenizer",
    ),
    _kind(
        "processors",
        """processor_config.json preprocessor_config.json video_preprocessor_config.json image_processor_config.json
        feature_extractor_config.json audio_tokenizer_config.json""",
        "tokenizer",
    ),
    _kind("generation", "generation_config.json", "tokenizer"),
    _kind("code of generate", "custom_generate/", "model"),
    CODE,
    _kind(
        "sentence-transformers",
        "modules.json config_sentence_transformers.json sentence_*_config.json [0-9]_*/",
        "model",
    ),
    _kind(
        WEIGHTS,
        """*.safetensors *.bin *.bin.index.json *.safetensors.index.json *.h5 *.msgpack *.ckpt *.index *.pt *.pth *.gguf *.onnx
        *.onnx_data *.nemo *.tflite *.mlmodel *.llamafile params.json original/ consolidated/ onnx/ openvino/ gguf/ metal/""",
        "",
    ),
    # README.md and the like: nothing reads them; the licence has to go along with the weights
    _kind(
        "papers",
        "README* LICENSE* LICENCE* COPYING* NOTICE* USE_POLICY* *.md THIRD_PARTY* CITATION*",
        "model",
        loaded=False,
    ),
    # from_pretrained looks for an adapter beside the weights and adds it where peft is installed
    _kind("an adapter, which is not applied", "adapter_config.json adapter_model.*", ""),
    # GPTQ and AWQ before config.json had quantization_config; vLLM still reads them
    _kind("how other weights were quantized", "quantize_config.json quant_config.json", ""),
    # Megatron-Bridge and NeMo build what `_target_` names in them (megatron/bridge/utils/instantiate_utils.py, nemo/lightning/io)
    _kind("how a run is built", "run_config.yaml modelopt_run_config.yaml model.yaml context/", ""),
    _kind(
        "notes of a run",
        "trainer_state.json all_results.json train_results.json eval_results.json *.yaml *.yml *.log runs/ global_step*/ latest",
        "",
        loaded=False,
    ),
    _kind("the repository's own", ".* .*/ *.lock", "", loaded=False),
    _kind(
        "pictures and texts",
        "*.png *.jpg *.jpeg *.gif *.svg *.webp *.pdf *.txt *.csv *.html figures/ assets/ images/",
        "",
        loaded=False,
    ),
)
# the first two of WEIGHTS' patterns would take these
TRAINING = _kind(
    "notes of a run", "training_args.bin optimizer.pt optimizer.bin scheduler.* rng_state*.pth scaler.pt", "", loaded=False
)


def kind_of(name: str) -> Kind:
    """Return what a side file is.

    >>> [kind_of(name).what for name in ("tekken.json", "additional_chat_templates/tool.jinja", "pytorch_model.bin", "x.dat")]
    ['tokenizer', 'chat templates', 'weights of another kind', 'files that carnet does not know']
    """
    return next((kind for kind in (TRAINING, *KINDS) if any(_is(name, pattern) for pattern in kind.names)), UNKNOWN)


def side_files(root: Path, own: Collection[str], enter: Collection[str] = ()) -> list[str]:
    """Return the paths below a folder of every file that is none of its ``own``, sorted.

    Only folders of which something goes along are looked into, and those to ``enter``; any other is one name with a slash at its end.
    """
    return [name for name in _walk(root, "", frozenset(enter), DEPTH) if name not in own]


def _walk(root: Path, above: str, enter: Collection[str], depth: int) -> Iterator[str]:
    for each in list_names(root / above):
        name = f"{above}{each}"
        path = root / name
        if path.is_symlink() or not path.is_dir():
            yield name
        elif depth and (name in enter or above or kind_of(f"{name}/x.jinja").along in ("model", "tokenizer")):
            yield from _walk(root, f"{name}/", enter, depth - 1)
        else:
            yield f"{name}/"


def check_asset(root: Path, name: str) -> Path:
    """Return the path of a side file that is to be read; refuse what is no regular file, and a link that leads elsewhere.

    A link may stay in the folder or, as every file of the Hugging Face cache, lead from ``snapshots/x`` to ``blobs`` beside it.
    """
    path = root / name
    try:
        real, home = path.resolve(strict=True), root.resolve(strict=True)
        regular = stat.S_ISREG(os.stat(real).st_mode)
    except (OSError, RuntimeError, ValueError) as error:
        raise BadCheckpoint(f"{shown(name)} cannot be read", {"where": root, "reason": error}) from None
    if not regular:
        raise BadCheckpoint(f"{shown(name)} is not a regular file", {"where": root})
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(cache)):
        facts = {"where": root, "expected": "a file of this folder"}
        raise BadCheckpoint(f"{shown(name)} is a link that leads out of the folder", facts, remedy="put the file itself there")
    return path


def _is(name: str, pattern: str) -> bool:
    parts, wanted = name.split("/"), pattern.split("/")
    if pattern.endswith("/"):
        wanted.pop()
        parts = parts[: len(wanted)] if len(parts) > len(wanted) else []
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))

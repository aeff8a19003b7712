"""A *side file* is a file of a model's folder that holds none of its tensors: a tokenizer, a licence, code. A table says what each is.

The table says what a loader reads or executes, and what goes along to another folder of the same layout; what has no row is unknown.
Names: transformers/utils/__init__.py and hub.py, mistral_common, tiktoken, sentence-transformers, and folders as they are published.
"""

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from carnet.errors import BadCheckpoint, shown
from carnet.storage.protocol import FILE, FOLDER, LAST, Folder, walk

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
DOCUMENT = LAST
SIGNATURE, STATEMENT = "model.sig", "carnet.intoto.jsonl"  # of one folder's very files, and of no copy in another layout
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
    _kind("signatures", f"{SIGNATURE} {STATEMENT}", "", loaded=False),
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


def side_files(root: Folder, own: Collection[str], enter: Collection[str] = ()) -> list[str]:
    """Return the paths below a folder of every file that is none of its ``own``, sorted.

    Only folders of which something goes along are looked into, and those to ``enter``; any other is one name with a slash at its end.
    """

    def enters(name: str) -> bool:
        known = name in enter or "/" in name or kind_of(f"{name}/x.jinja").along in ("model", "tokenizer")
        return known and name.count("/") < DEPTH

    found = [f"{name}/" if kind == FOLDER else name for name, kind in walk(root, enters)]
    return sorted(name for name in found if name not in own)


def check_asset(root: Folder, name: str) -> None:
    """Refuse to read a side file that is not a regular file, or a link that leads elsewhere."""
    kind = root.kind(name)
    if kind in ("", "a link"):
        facts = {"where": root, "found": "a link that leads nowhere" if kind else "nothing"}
        raise BadCheckpoint(f"{shown(name)} cannot be read", facts, remedy="put the file itself there, or remove the link")
    if kind != FILE:
        remedy = "put the file itself there, or remove it"
        raise BadCheckpoint(f"{shown(name)} is not a regular file", {"where": root, "found": kind}, remedy=remedy)
    if not root.holds(name):
        facts = {"where": root, "expected": "a file of this folder"}
        raise BadCheckpoint(f"{shown(name)} is a link that leads out of the folder", facts, remedy="put the file itself there")


def _is(name: str, pattern: str) -> bool:
    parts, wanted = name.split("/"), pattern.split("/")
    if pattern.endswith("/"):
        wanted.pop()
        parts = parts[: len(wanted)] if len(parts) > len(wanted) else []
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))

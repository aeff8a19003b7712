"""What ModelOpt did to a model, as it says itself: the ``modelopt_state`` that it saves beside Megatron's weights.

::

    iter_*/modelopt_state/                a store of its own, of nothing but a common state     torch_dist
    mp_rank_*/model_optim_rng.pt          the key modelopt_state                                a file a rank

    {"modelopt_state_dict": [("quantize", {"config": {"quant_cfg": [...]}, "metadata": {}}), ...], "modelopt_version": "0.47.0"}

A *mode* is one thing that was done. modelopt/torch/opt/conversion.py, opt/plugins/mcore_dist_checkpointing.py of 0.47; quantizers say
of themselves what modelopt/torch/quantization/config.py has.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from carnet.errors import BadCheckpoint, shown
from carnet.formats.files import Sighting
from carnet.formats.torch_dist import read_common, read_plain_store
from carnet.storage.protocol import FOLDER, Folder

NAME = "modelopt_state"
PRUNING = frozenset({"mcore_minitron", "mcore_gpt_minitron"})  # modes that make a model narrower; the second until 0.30
HEAD = "eagle"  # the mode that gives a model a head of EAGLE
WORDS = ("num_hidden_layers", "num_attention_heads", "intermediate_size", "draft_vocab_size")  # what is told of one
BITS = {(4, 3): "e4m3", (5, 2): "e5m2", (2, 1): "e2m1", (8, 0): "e8m0", 8: "int8", 4: "int4"}
# what a quantizer of weights says -> the word of --quantize that writes it: its codes, rows and columns of a block, type of its scales
SCHEMES = {
    ("e4m3", None, None, ""): "fp8",
    ("e4m3", 128, 128, ""): "fp8-block",
    ("e4m3", None, 32, "e8m0"): "mxfp8",
    ("e2m1", None, 16, "e4m3"): "nvfp4",
    ("e2m1", None, 32, "e8m0"): "mxfp4",
    ("int4", None, 128, ""): "int4-group",
}
BY_ROWS = {"e4m3": "fp8-channel", "int8": "int8-channel"}  # a scale for each row
QUANTIZERS = {"weight": "weights", "input": "inputs", "k_bmm": "keys", "v_bmm": "values", "[kv]_bmm": "keys and values"}


@dataclass(frozen=True, slots=True)
class Modes:
    """What was done to a model."""

    said: str  # for people, "quantize: weights e4m3, inputs e4m3 (ModelOpt 0.47.0)"
    schemes: tuple[str, ...] = ()  # words of --quantize that write what its weights were trained as
    sightings: tuple[Sighting, ...] = ()
    pruned: bool = False
    head: Mapping[str, object] | None = None  # what a head of EAGLE is made by


def read_modes(root: Folder, name: str = NAME) -> Modes | None:
    """Return what a folder beside a store says, None where there is none.

    It is no part of the weights: where it is damaged, or names code, that is said and nothing more.
    """
    folder = root / name
    if root.kind(name) != FOLDER or not folder.kind(".metadata"):
        return None
    try:
        store = read_plain_store(folder, lambda _: False)
        found = read_common(folder, store)
    except BadCheckpoint as error:
        return Modes(f"not read: {error.what}")
    seen = (*store.sightings, *(found.sightings if found else ()))
    placed = tuple(replace(each, stamp=replace(each.stamp, file=f"{name}/{each.stamp.file}")) for each in seen)
    return replace(modes_of(found.value if found else None), sightings=placed)


def modes_of(value: object) -> Modes:
    """Return what a state says."""
    value = value if isinstance(value, dict) else {}
    version, listed = value.get("modelopt_version"), value.get("modelopt_state_dict")
    modes = [mode for mode in listed if isinstance(mode, (tuple, list)) and len(mode) == 2] if isinstance(listed, list) else []
    quantizers = [each for name, said in modes if name == "quantize" for each in _quantizers(said)]
    said = "; ".join(text for name, said in modes if (text := _mode(str(name), said))) or "nothing"
    schemes = dict.fromkeys(scheme for what, _, scheme in quantizers if what == "weight" and scheme)
    text = shown(f"{said} (ModelOpt {version})" if isinstance(version, str) else said)[:400]
    pruned = any(name in PRUNING for name, _ in modes if isinstance(name, str))
    head = next((said.get("config") for name, said in modes if name == HEAD and isinstance(said, dict)), None)
    return Modes(text, tuple(schemes), pruned=pruned, head=head if isinstance(head, dict) else None)


def _mode(name: str, said: object) -> str:
    """Return a mode in words, nothing where another says it."""
    if name.endswith("calibrate"):
        return ""
    config = said.get("config") if isinstance(said, dict) else None
    config = config if isinstance(config, dict) else {}
    if name != "quantize":
        made = config.get("eagle_architecture_config")
        config = {key: made[key] for key in WORDS if key in made} if isinstance(made, dict) else config
        numbers = {key: each for key, each in config.items() if type(each) in (int, str, bool) and len(str(each)) < 40}
        return name + (f": {', '.join(f'{key} {each}' for key, each in [*numbers.items()][:6])}" if numbers else "")
    by_kind: dict[str, list[str]] = {}
    for what, text, _ in _quantizers(said):
        by_kind.setdefault(QUANTIZERS[what], []).append(text)
    words = [f"{what} {' and '.join(dict.fromkeys(texts))}" for what, texts in by_kind.items()]
    return f"quantize: {', '.join(words) or 'nothing'}"


def _quantizers(said: object) -> Iterator[tuple[str, str, str]]:
    """Yield of the quantizers that a config turns on: what they quantize, in words how, and a scheme of --quantize or ""."""
    config = said.get("config") if isinstance(said, dict) else None
    listed = config.get("quant_cfg") if isinstance(config, dict) else None
    pairs: list[tuple[object, object]] = []
    if isinstance(listed, dict):  # before 0.43
        pairs = [*listed.items()]
    elif isinstance(listed, list):
        pairs = [
            (each.get("quantizer_name"), each.get("cfg"))
            for each in listed
            if isinstance(each, dict) and each.get("enable", True)
        ]
    for name, cfg in pairs:
        what = next((what for what in QUANTIZERS if isinstance(name, str) and f"{what}_quantizer" in name), None)
        for one in cfg if isinstance(cfg, list) else [cfg]:
            if what is not None and isinstance(one, dict) and one.get("enable", True) is not False:
                yield (what, *_worded(one))


def _worded(cfg: Mapping[object, object]) -> tuple[str, str]:
    """Return how a quantizer codes, in words, and as a scheme of --quantize.

    >>> _worded({"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}})
    ('e2m1 in blocks of 16 under e4m3', 'nvfp4')
    >>> _worded({"num_bits": (4, 3), "axis": None}), _worded({"num_bits": 8, "axis": 0})
    (('e4m3', 'fp8'), ('int8 by rows', 'int8-channel'))
    """
    bits, blocks = _bits(cfg.get("num_bits")), cfg.get("block_sizes")
    if not isinstance(blocks, dict):
        by_rows = cfg.get("axis") == 0
        return f"{bits} by rows" if by_rows else bits, BY_ROWS.get(bits, "") if by_rows else SCHEMES.get(
            (bits, None, None, ""), ""
        )
    rows, columns = (size if isinstance(size := blocks.get(axis), int) else None for axis in (-2, -1))
    under = _bits(blocks["scale_bits"]) if blocks.get("scale_bits") else ""
    block = f"{rows} x {columns}" if rows else str(columns)
    return f"{bits} in blocks of {block}" + (f" under {under}" if under else ""), SCHEMES.get((bits, rows, columns, under), "")


def _bits(said: object) -> str:
    key = tuple(said) if isinstance(said, (list, tuple)) else said
    try:
        return BITS.get(key, f"{key} bits")[:20]
    except TypeError:  # what has no hash is no number of bits
        return "unknown codes"

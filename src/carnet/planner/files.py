"""The files of a target: which tensors lie in which file, and the small text files beside them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod

from carnet.algebra.box import Box, whole
from carnet.architectures.family import Family
from carnet.architectures.known import padded
from carnet.architectures.wrappers import rewrapped
from carnet.dialects.entry import Entry
from carnet.dialects.kinds import STORE
from carnet.dialects.megatron.needs import NEEDS, NOTHING, Needs, needs
from carnet.dialects.megatron.programs import program
from carnet.dialects.megatron.providers import UNSAID
from carnet.dialects.rows import Dialect
from carnet.dialects.writing import Misfit, write, written
from carnet.dtypes import BY_NAME
from carnet.errors import Obstacles
from carnet.formats.adapters import SAID
from carnet.formats.folder import CONFIG
from carnet.formats.safetensors import layout_file
from carnet.formats.stored import Key
from carnet.formats.torch_dist_files import CONTENT, common_pt, folder_of, layout_store, store_texts, torch_type
from carnet.formats.torch_opcodes import Value
from carnet.formats.training import FORM, SHARDING, Training, common_state, iteration_of, run_arguments
from carnet.formats.wrapped import MEANT_FOR, RUN_CONFIG
from carnet.inventory.bridge import checked, of_adapters
from carnet.model.adapters import bare
from carnet.model.fields import Config
from carnet.model.model import number, value
from carnet.planner.adapters import bridge_section, peft_config
from carnet.planner.choosing import Coded, kinds, plain_modules
from carnet.planner.coding import Coding, Laid, Scaled, scratch
from carnet.planner.store import chunks, states
from carnet.plans.request import BRIDGE, Request
from carnet.quantize.configs import BESIDE, Codes, with_codes
from carnet.quantize.styles import Kept
from carnet.steps import NO_SCRATCH, RawFile, TargetFile, TargetTensor, TextFile

PT = {"format": "pt"}  # transformers refuses a file without it


@dataclass(frozen=True, slots=True)
class Made:
    """The files of a target."""

    files: tuple[TargetFile, ...]
    places: tuple[tuple[Entry, Box, TargetFile, TargetTensor], ...]  # entry, the box of it, and where that lies
    raws: tuple[RawFile, ...]
    laid: Laid  # of an entry, its scales included
    scratch: TargetFile
    matrices: Mapping[Key, list[tuple[Box, TargetTensor]]]  # entry that is coded -> its matrices in the scratch space
    needs: Needs = NOTHING  # what the program that loads them must be told


def target_files(
    target: Dialect,
    wanted: Sequence[Entry],
    dtypes: Mapping[Key, str],
    config: Config,
    request: Request,
    coded: Mapping[Key, Coded],
    cache: Mapping[Key, Scaled],
    ranks: Sequence[str],
    base: str | None = None,
    training: Training | None = None,
) -> Made:
    """Return the tensor files of a target, with every tensor's offset, in the order of the entries.

    ``ranks`` are the units that have a file each, where the target has such; ``base`` names the model that adapters are of;
    ``training`` is how far one is that goes on.
    """
    if target.kind.files == STORE:
        return _store(target, wanted, dtypes, config, request, base, training)
    scales: dict[Key, list[Kept]] = {}
    for scaled in cache.values():
        scales.setdefault(scaled.beside, []).append(scaled.kept)
    held = {(entry.unit, entry.name): _held(entry, dtypes, coded, scales) for entry in wanted}
    files = _ranks(held, ranks, target.kind.file) if target.ranked else _shards(held, request.shard_size, target.kind.single)
    placed = ((file, tensor) for file in files for tensor in file.tensors)
    laid = {key: [*islice(placed, len(tensors))] for key, tensors in held.items()}
    assembled, matrices = scratch(coded)
    boxes = {like: whole(entry.shape) for like, entry in kinds(wanted).items()}
    places: list[tuple[Entry, Box, TargetFile, TargetTensor]] = []
    for entry in wanted:
        key = entry.unit, entry.name
        if key in coded:
            places += [(entry, box, assembled, tensor) for box, tensor in matrices[key]]
        else:
            places.append((entry, boxes[id(entry.like)], *laid[key][0]))
    return Made(files, tuple(places), (), laid, assembled, matrices)


Tensor = tuple[str, str, tuple[int, ...]]  # name, element type, shape


def _held(
    entry: Entry, dtypes: Mapping[Key, str], coded: Mapping[Key, Coded], scales: Mapping[Key, Sequence[Kept]]
) -> list[Tensor]:
    """Return the stored tensors of an entry: itself, or its codes and scales; and the scales that stand beside it."""
    key = entry.unit, entry.name
    one = coded.get(key)
    own = (
        [(entry.name, dtypes[key], entry.like.shape)]
        if one is None
        else [(one.base + k.name, k.dtype, k.shape) for k in one.kept]
    )
    return own + [(k.name, k.dtype, k.shape) for k in scales[key]] if key in scales else own


def _ranks(held: Mapping[Key, list[Tensor]], names: Sequence[str], file: str) -> tuple[TargetFile, ...]:
    """Return a file for every rank, one whose layers all do nothing included."""
    ranks: dict[str, list[Tensor]] = {name: [] for name in names}
    for (unit, _), tensors in held.items():
        ranks[unit] += tensors
    return tuple(layout_file(file.format(unit=unit), tensors, {}) for unit, tensors in ranks.items())


def _shards(held: Mapping[Key, list[Tensor]], most: int, single: str) -> tuple[TargetFile, ...]:
    if single:
        return (layout_file(single, [tensor for tensors in held.values() for tensor in tensors], PT),)
    shards: list[list[Tensor]] = [[]]
    filled, sizes = 0, dict[tuple[str, tuple[int, ...]], int]()  # of thousands of tensors few differ in size
    for tensors in held.values():
        nbytes = 0
        for _, dtype, shape in tensors:
            if (size := sizes.get((dtype, shape))) is None:
                size = sizes[dtype, shape] = BY_NAME[dtype].nbytes * prod(shape)
            nbytes += size
        if filled and filled + nbytes > most:
            shards.append([])
            filled = 0
        shards[-1] += tensors
        filled += nbytes
    return tuple(layout_file(_shard_name(i, len(shards)), shard, PT) for i, shard in enumerate(shards))


def _store(
    target: Dialect,
    wanted: Sequence[Entry],
    dtypes: Mapping[Key, str],
    config: Config,
    request: Request,
    base: str | None,
    training: Training | None,
) -> Made:
    iteration = iteration_of(training)
    folder = folder_of(iteration)
    cut = chunks(wanted, dtypes, config, request)
    empty = [("__0_1.distcp", states(wanted, config, request.names))]
    store = layout_store(folder, [(file, [chunk for _, chunk in held]) for file, held in cut.items()], empty)
    places = []
    for file, held in zip(store.files, cut.values(), strict=True):
        places += [(entry, chunk.box, file, t) for (entry, chunk), t in zip(held, file.tensors, strict=True)]
    section, config = bridge_section(config, wanted, base), bare(config)
    said, lacking = written(target.table, config, {}, "Megatron's arguments")
    if NEEDS not in request.accept:
        _refuse(lacking)
    elif lacking:
        said[UNSAID] = {name: value(config, name) for misfit in lacking for name in misfit.fields}
    kinds = {
        name: torch_type(str(config["dtype"])) if name == "params_dtype" else _plain(value) for name, value in said.items()
    }
    reader = None if request.reader is None else program(request.reader, "--read-by")
    told = needs(said, reader, local=request.names == "local")
    beside = []
    ranks = {"tp": request.tp, "pp": request.pp, "ep": request.ep}
    if request.spelling == BRIDGE:
        beside = [RawFile(f"{folder}/{RUN_CONFIG}", checked({**said, **section}, config, ranks))]
    elif section:  # adapters are Megatron-Bridge's
        beside = [RawFile(f"{folder}/{RUN_CONFIG}", of_adapters({**said, **section}, config, ranks))]
    content, more = dict[str, Value](CONTENT), dict[str, Value]({MEANT_FOR: told.word})
    if training is not None:
        experts = bool(number(config, "experts"))
        kinds |= run_arguments(training, tp=request.tp, pp=request.pp)
        content[SHARDING], more = FORM, {**more, **common_state(training, experts=experts, chained=experts and request.ep > 1)}
    common = RawFile(f"{folder}/common.pt", common_pt(kinds, iteration, content, more))
    return Made(store.files, tuple(places), (*store.raws, *beside, common), {}, NO_SCRATCH, {}, told)


def _refuse(lacking: Sequence[Misfit]) -> None:
    """Refuse what the arguments cannot say, with the way out: the weights are right, and so is a model that is told the rest."""
    if lacking:  # the others stand in the first one's error
        remedy = f"--accept {NEEDS} writes the weights, and lists what else the program that loads them must be told"
        lacking[0].error.remedy = remedy
    Obstacles(misfit.error for misfit in lacking).stop()


def _plain(value: object) -> Value:
    if isinstance(value, tuple):
        return [*value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    assert value is None or isinstance(value, str | int | float | bool | list), f"no argument can be {value!r}"
    return value


def target_texts(
    family: Family,
    target: Dialect,
    config: Config,
    files: Sequence[TargetFile],
    coding: Coding | None,
    wanted: Sequence[Entry],
    coded: Mapping[Key, Coded],
    more: Mapping[str, object],
    base: str | None = None,
    training: Training | None = None,
) -> tuple[TextFile, ...]:
    """Return config.json, with what it says ``more``, what stands beside it about quantized weights, and the index of several files."""
    if target.kind.arguments:
        return store_texts(iteration_of(training))
    said = write(target.table, padded(target, bare(config)), family.traits, f"{target.name} config.json")
    said |= more
    written = {CONFIG: said}
    if isinstance(beside := said.pop(BESIDE, None), Mapping):
        written[BESIDE] = {**beside}
    if coding is not None:
        ignored = plain_modules(coding.recipe, target, config, wanted, coded)
        written = with_codes(said, target.kind.codes_key, Codes(coding.recipe, ignored, coding.cache, coding.static))
    written[CONFIG] = rewrapped(written[CONFIG])
    if target.kind.alone:
        written[SAID] = peft_config(family, config, wanted, base)
    texts = [TextFile(name, _json(text)) for name, text in written.items()]
    if not target.ranked and len(files) > 1:
        weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
        total = sum(file.nbytes - file.tensors[0].offset for file in files)
        # as json.dumps with an indent would write it, which takes ten times as long
        listed = json.dumps(weight_map, separators=(",\n    ", ": "))[1:-1]
        index = f'{{\n  "metadata": {{\n    "total_size": {total}\n  }},\n  "weight_map": {{\n    {listed}\n  }}\n}}\n'
        texts.append(TextFile("model.safetensors.index.json", index))
    return tuple(texts)


def _shard_name(at: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{at + 1:05}-of-{count:05}.safetensors"


def _json(data: Mapping[str, object]) -> str:
    return json.dumps(data, indent=2) + "\n"

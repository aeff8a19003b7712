"""What the ranks of inference hold of a tensor of a state dict: carnet's entries of both sides, tied as a running model's are.

The planner proves whole models, each of one config. A script may hand over any tensors under any names, of layers that no family joins
and of widths that no config says; so every tensor is a model of its own here, whose sizes its dimensions tell. Only what no length can
tell comes from the config: KV heads, query heads for each, the width of a head.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch

from carnet.algebra.layout import JOIN, Pattern, Share, fold
from carnet.architectures.nemotron_nas import TRTLLM_LINEAR
from carnet.dialects import trtllm
from carnet.dialects.entries import entries
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.rows import MODULE, Dialect, Row, row
from carnet.dialects.units import Unit, units
from carnet.errors import BadRequest
from carnet.live.binding import Located, strided
from carnet.live.virtual import MODULES
from carnet.megatron.export.trtllm.trtllm_layers import TRTLLMLayers, numbered
from carnet.megatron.refusals import Misshapen, Uneven
from carnet.model.fields import Config, Value
from carnet.model.tensors import AXES

EXPERT = ".expert"  # behind the name of a layer whose tensor has all experts
# experts without a gate have their up projection alone; the original exchanges its halves
SIZES = {"moe_hidden": "hidden"}  # axis -> the field of its size: no model here has latent mixtures
PLAIN_EXPERTS = row(trtllm.LAYER + "mlp.fc.weight", "expert moe_ffn moe_hidden", "moe.up", cut="expert")
Rows = tuple[Row, ...]
BLOCKS = {"linear_mixer": "L-", "linear_mlp": "*l", "moe": "*E"}  # what begins the name of a tensor -> the layer that has it
# a layer has whatever a layer can have: the state dict says what is there
EVERYTHING: Config = {
    "layers": 1,
    "norm": "layer",
    "position": "learned",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}


def _rows(mlp: Rows, *experts: Row) -> Rows:
    """Return all that a layer may be, NVIDIA's own names for the MLPs of Nemotron-NAS included."""
    router, *_, down = trtllm.MIXTURE
    mixture = (router, *(replace(each, name=each.name + EXPERT) for each in (*experts, down)))
    nas = (replace(each, name=each.name.replace(".mlp.", ".ffn.")) for each in (*mlp, *trtllm.COMMON) if ".mlp." in each.name)
    return *trtllm.COMMON, *mlp, *nas, *TRTLLM_LINEAR, *mixture


ROWS = {True: _rows(trtllm.GATED_MLP, trtllm.MIXTURE[1]), False: _rows(trtllm.PLAIN_MLP, PLAIN_EXPERTS)}  # with a gate, without


def dialects(layer: TRTLLMLayers, *, gated: bool) -> tuple[Dialect, Dialect]:
    """Return both sides of a layer: what may hold it in Megatron, and the rows of TensorRT-LLM's that hold the same tensors.

    >>> theirs, ours = dialects(TRTLLMLayers.mlp_fc_weight, gated=True)
    >>> [each.name for each in (*theirs.rows, *ours.rows)]  # doctest: +NORMALIZE_WHITESPACE
    ['decoder.layers.{layer}.mlp.linear_fc1.weight', 'layers.{layer}.mlp.fc.weight', 'layers.{layer}.mlp.gate.weight']
    """
    every = set().union(*(_tensors(each) for each in ROWS[gated]))
    own = next(each for each in ROWS[gated] if _spelled(each) == layer.value)
    sources = [each for each in MEGATRON.rows if each.written != MODULE and _tensors(own) <= _tensors(each) <= every]
    module = own.name.split(".")[:-2]
    targets = [each for each in ROWS[gated] if each.name.split(".")[:-2] == module and _tensors(each) <= _tensors(sources[0])]
    plain = [replace(each, name=each.name.removesuffix(EXPERT)) for each in targets]
    return replace(MODULES, rows=tuple(sources)), trtllm.dialect("", tuple(plain), (), common=())


def names_of(layer: TRTLLMLayers, number: int | None, *, gated: bool) -> list[str]:
    """Return what TensorRT-LLM calls the tensors that a layer becomes."""
    return [numbered(_spelled(each), number) for each in dialects(layer, gated=gated)[1].rows]


def _spelled(row: Row) -> str:
    """Return what TensorRT-LLM calls a row's tensor, without the number of its layer."""
    return row.name[1:] if row.name.startswith("/") else "transformer." + row.name.replace("{layer}.", "")


def _tensors(row: Row) -> set[str]:
    return {tensor for tensor, _ in row.pattern.parts}


def recut(
    value: torch.Tensor,
    layer: TRTLLMLayers,
    number: int | None,
    *,
    gated: bool,
    heads: Mapping[str, int],
    world: int,
    treat: Callable[[str, torch.Tensor], torch.Tensor],
) -> Iterator[tuple[str, int | None, torch.Tensor]]:
    """Yield the name and what each of ``world`` ranks holds of a tensor, with the rank; with None what is the same on all of them.

    ``number`` is that of the layer in the names, ``heads`` are the axes that the config knows; ``treat`` is given a name and a part of
    the tensor, and returns it as the name has it. Raises Misshapen where the tensor has another shape than its layer, Uneven where it
    cannot be cut so.
    """
    source, target = dialects(layer, gated=gated)
    pattern, at = source.rows[0].pattern, -(number or 0)
    if any("kv" in each for each in pattern.dims) and heads["kv"] % world and world % heads["kv"]:
        raise Uneven(query_groups(heads["kv"]))
    narrow = value.ndim == 2 and len(pattern.dims) == 3  # experts whose weights are columns, as Megatron's own tests have them
    if narrow:
        value = value.T.unsqueeze(pattern.dims.index(("moe_hidden",)))
    fields = _fields(pattern, value.shape, heads) | {"tp": world, "gated": gated}
    (held,) = entries(source, fields, None, "", [Unit("", (0,), at, first=True, last=True)])
    if held.shape != tuple(value.shape):
        shape = {"layout": pattern.text, "found": list(value.shape), "config": dict(heads)}
        raise Misshapen(f"{numbered(layer.value, number)} has a shape that its layer cannot have", shape)
    located = Located()
    for view in held.views:
        located.add(view.tensor, view.box, strided(value, held.shape, view))
    try:
        wanted = [*entries(target, fields, None, "", [replace(unit, base=at) for unit in units(target, fields)])]
    except BadRequest as refusal:
        facts = {**refusal.facts, "tensor": numbered(layer.value, number)}
        raise Uneven(refusal.what, facts, remedy=refusal.remedy) from None
    for entry in wanted:
        rank = int(entry.unit.removeprefix("rank"))
        if rank and not entry.reading.cut:
            continue
        made = treat(entry.name, value[:0]).new_empty(entry.shape)
        for view in entry.views:
            into = strided(made, entry.shape, view)
            for inside, part in located.find(view.tensor, view.box):
                into[inside] = treat(entry.name, part)
        shown = made.squeeze(entry.reading.pattern.dims.index(("moe_hidden",))) if narrow else made
        yield entry.name, rank if entry.reading.cut else None, shown


def _fields(pattern: Pattern, shape: torch.Size, heads: Mapping[str, int]) -> dict[str, Value]:
    """Return a model of one layer that has a tensor: the axes that are no heads are as long as its dimensions say."""
    said: dict[str, Value] = {"kv_heads": heads["kv"], "heads": heads["kv"] * heads["rep"], "head_dim": heads["dim"]}
    inner = {axis for _, axes in pattern.parts for axis in axes}
    unit = fold(pattern, {axis: Share(0, heads.get(axis, 1), heads.get(axis, 1)) for axis in AXES}).shape
    for dims, each, length in zip(pattern.dims, unit, shape, strict=False):
        for axis in {*dims, *(inner if JOIN in dims else ())} - {JOIN} - heads.keys():
            said[SIZES.get(axis, str(AXES[axis].size))] = length // max(1, each)
    return {**EVERYTHING, "blocks": BLOCKS.get(pattern.parts[0][0].split(".")[0], "*-"), **said}


def query_groups(count: int) -> str:
    """Return what Megatron's users know: KV heads that the ranks can neither share nor repeat."""
    return (
        f"Number of query groups of the models is {count}. Please select tensor parallelism size that can duplicate or split "
        "the number of query groups to equal number of query matrices in the each GPU."
    )

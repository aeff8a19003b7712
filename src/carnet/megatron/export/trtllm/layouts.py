"""What a layer of TensorRT-LLM is in Megatron: a row of carnet's table on either side, met on the canonical tensors in them.

A layer names its row in Megatron's table. The rows of TensorRT-LLM's that hold the same tensors are its places there: one, or two where
Megatron joins a gate and an up projection that TensorRT-LLM keeps apart. From the rows and the sizes follow the views on both sides,
for whichever rank; a move is ``target[...] = source[...]``.

The sizes are those of the tensors themselves: where a pattern leaves one axis of a dimension open, the dimension's length says it.
Only what no length can say comes from the config: KV heads, query heads for each, the width of a head.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from carnet.algebra.layout import JOIN, Pattern, Share, Slot, cut_evenly, cut_or_repeat, fold
from carnet.architectures.nemotron_nas import TRTLLM_LINEAR
from carnet.dialects import trtllm
from carnet.dialects.megatron.rows import LAYER, MEGATRON
from carnet.dialects.rows import Row, row
from carnet.errors import BadRequest
from carnet.megatron.export.trtllm.trtllm_layers import TRTLLMLayers
from carnet.megatron.refusals import Misshapen, NoTensor, Uneven
from carnet.model.tensors import TENSORS

AXES = {tensor.part: tensor.axes for tensor in TENSORS}
Rows = tuple[Row, ...]
Table = Mapping[bool, Rows]  # with a gate and without

DENSE: Table = {True: (*trtllm.COMMON, *trtllm.GATED_MLP), False: (*trtllm.COMMON, *trtllm.PLAIN_MLP)}
# experts without a gate have their up projection alone; the original exchanges its halves
PLAIN_EXPERTS = row(trtllm.LAYER + "mlp.fc.weight", "expert moe_ffn hidden", "moe.up", cut="expert")
MIXTURE: Table = {True: trtllm.MIXTURE, False: (PLAIN_EXPERTS, *(each for each in trtllm.MIXTURE if ".fc." not in each.name))}
NAS: Table = {
    gated: (*TRTLLM_LINEAR, *(replace(each, name=each.name.replace(".mlp.", ".ffn.")) for each in rows))
    for gated, rows in DENSE.items()
}

PLACES: Mapping[TRTLLMLayers, tuple[str, Table]] = {
    TRTLLMLayers.vocab_embedding: ("embedding.word_embeddings.weight", DENSE),
    TRTLLMLayers.position_embedding: ("embedding.position_embeddings.weight", DENSE),
    TRTLLMLayers.lm_head: ("output_layer.weight", DENSE),
    TRTLLMLayers.final_layernorm_weight: ("decoder.final_layernorm.weight", DENSE),
    TRTLLMLayers.final_layernorm_bias: ("decoder.final_layernorm.bias", DENSE),
    TRTLLMLayers.input_layernorm_weight: (LAYER + "self_attention.linear_qkv.layer_norm_weight", DENSE),
    TRTLLMLayers.input_layernorm_bias: (LAYER + "self_attention.linear_qkv.layer_norm_bias", DENSE),
    TRTLLMLayers.attention_qkv_weight: (LAYER + "self_attention.linear_qkv.weight", DENSE),
    TRTLLMLayers.attention_qkv_bias: (LAYER + "self_attention.linear_qkv.bias", DENSE),
    TRTLLMLayers.attention_dense_weight: (LAYER + "self_attention.linear_proj.weight", DENSE),
    TRTLLMLayers.attention_dense_bias: (LAYER + "self_attention.linear_proj.bias", DENSE),
    TRTLLMLayers.attention_linear_weight: (LAYER + "self_attention.weight", NAS),
    TRTLLMLayers.post_layernorm_weight: (LAYER + "mlp.linear_fc1.layer_norm_weight", DENSE),
    TRTLLMLayers.post_layernorm_bias: (LAYER + "mlp.linear_fc1.layer_norm_bias", DENSE),
    TRTLLMLayers.mlp_fc_weight: (LAYER + "mlp.linear_fc1.weight", DENSE),
    TRTLLMLayers.mlp_fc_bias: (LAYER + "mlp.linear_fc1.bias", DENSE),
    TRTLLMLayers.mlp_projection_weight: (LAYER + "mlp.linear_fc2.weight", DENSE),
    TRTLLMLayers.mlp_projection_bias: (LAYER + "mlp.linear_fc2.bias", DENSE),
    TRTLLMLayers.ffn_fc_weight: (LAYER + "mlp.linear_fc1.weight", NAS),
    TRTLLMLayers.ffn_projection_weight: (LAYER + "mlp.linear_fc2.weight", NAS),
    TRTLLMLayers.ffn_linear_weight: (LAYER + "mlp.weight", NAS),
    TRTLLMLayers.mlp_router_weight: (LAYER + "mlp.router.weight", MIXTURE),
    TRTLLMLayers.mlp_fc_weight_mixture_of_experts: (LAYER + "mlp.experts.experts.linear_fc1.weight", MIXTURE),
    TRTLLMLayers.mlp_projection_weight_mixture_of_experts: (LAYER + "mlp.experts.experts.linear_fc2.weight", MIXTURE),
}
NORMS = (TRTLLMLayers.input_layernorm_weight, TRTLLMLayers.post_layernorm_weight, TRTLLMLayers.final_layernorm_weight)


@dataclass(frozen=True, slots=True)
class Tie:
    """What a layer is on both sides."""

    source: Row  # in Megatron
    targets: Rows  # in TensorRT-LLM


def tie(layer: TRTLLMLayers, *, gated: bool) -> Tie:
    """Return the rows of a layer.

    >>> both = tie(TRTLLMLayers.mlp_fc_weight, gated=True)
    >>> both.source.pattern.text, [each.name for each in both.targets]
    ('* hidden', ['layers.{layer}.mlp.fc.weight', 'layers.{layer}.mlp.gate.weight'])
    """
    name, table = PLACES[layer]
    held = {tensor for each in table[gated] for tensor in _tensors(each)}
    source = next(each for each in MEGATRON.rows if each.name == name and _tensors(each) <= held)
    return Tie(source, tuple(each for each in table[gated] if _tensors(each) <= _tensors(source)))


def target_name(row: Row, number: int | None) -> str:
    """Return what TensorRT-LLM calls a row's tensor."""
    return row.name[1:] if row.name.startswith("/") else "transformer." + row.name.replace("{layer}", str(number))


def recut(
    value: torch.Tensor,
    source: Row,
    target: Row,
    *,
    name: str,
    heads: Mapping[str, int],
    world: int,
    dtype: torch.dtype,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield what each of ``world`` ranks holds of a tensor, rank by rank; once where the target is not cut.

    ``source`` is the row of the tensor, ``target`` that of its ranks'. ``heads`` are the sizes that the config says, ``change`` is done
    to each element on its way, in the type that it has; ``name`` is for messages. Raises CarnetError where the tensor has another shape
    than its row or cannot be cut so.
    """
    if target.cut == "kv" and heads["kv"] % world and world % heads["kv"]:
        raise Uneven(query_groups(heads["kv"]))
    missing = value.ndim == 2 and len(source.pattern.dims) == 3
    if missing:  # experts without a width, each a column: Megatron's own tests have such
        value = value.T.unsqueeze(source.pattern.dims.index(("hidden",)))
    whole = {axis: Share(0, size, size) for axis, size in _sizes(source.pattern, value, heads, name).items()}
    slots = {slot.tensor: slot for slot in fold(source.pattern, whole).slots}
    for rank in range(world if target.cut else 1):
        held = _held(target.cut, whole, world, rank, name)
        folded = fold(target.pattern, held)
        made = value.new_empty(folded.shape, dtype=dtype)
        for slot in folded.slots:
            _part(made, slot, held, held).copy_(change(_part(value, slots[slot.tensor], whole, held)))
        yield rank, made.squeeze(target.pattern.dims.index(("hidden",))) if missing else made


def _tensors(row: Row) -> set[str]:
    return {tensor for tensor, _ in row.pattern.parts}


def _part(stored: torch.Tensor, slot: Slot, has: Mapping[str, Share], wanted: Mapping[str, Share]) -> torch.Tensor:
    """Return the wanted box of a canonical tensor, where it lies in a stored one that has another."""
    axes, steps = AXES[slot.tensor], stored.stride()
    strides = [stride * steps[dim] for dim, stride in (slot.places[axis] for axis in axes)]
    first = stored.storage_offset() + sum(at * step for at, step in zip(slot.origin, steps, strict=True))
    first += sum((wanted[axis].start - has[axis].start) * stride for axis, stride in zip(axes, strides, strict=True))
    return stored.as_strided([wanted[axis].held for axis in axes], strides, first)


def _sizes(pattern: Pattern, value: torch.Tensor, known: Mapping[str, int], name: str) -> dict[str, int]:
    """Return the length of every axis of a pattern: the known ones, and each other one from the length of its dimension."""
    inner = [axis for _, axes in pattern.parts for axis in axes]
    axes = [{axis for each in dims for axis in (inner if each == JOIN else [each])} for dims in pattern.dims]
    sizes = {axis: known.get(axis, 1) for axis in set().union(*axes)}
    shape = fold(pattern, {axis: Share(0, size, size) for axis, size in sizes.items()}).shape
    fits = len(shape) == value.ndim
    for each, unit, length in zip(axes, shape, value.shape, strict=False):
        if axis := (each - known.keys()):
            (only,) = axis
            fits = fits and unit > 0 and length % unit == 0
            sizes[only] = length // max(1, unit)
        else:
            fits = fits and unit == length
    if not fits:
        said = {axis: size for axis, size in known.items() if axis in sizes}
        facts = {"layout": pattern.text, "found": list(value.shape), "config": said or "nothing about it"}
        raise Misshapen(f"{name} has a shape that its layer cannot have", facts)
    return sizes


def query_groups(count: int) -> str:
    """Return what Megatron's users know: KV heads that the ranks can neither share nor repeat."""
    return (
        f"Number of query groups of the models is {count}. Please select tensor parallelism size that can duplicate or split "
        "the number of query groups to equal number of query matrices in the each GPU."
    )


def _held(cut: str, whole: Mapping[str, Share], world: int, rank: int, name: str) -> dict[str, Share]:
    """Return what a rank has of every axis; experts are all on every rank, each cut."""
    try:
        match cut:
            case "" | "vocab" | "embedding":  # these are dealt out by themselves
                return dict(whole)
            case "kv":
                kv, rep = whole["kv"].size, whole["rep"].size
                return {**whole, **cut_or_repeat("kv", kv, "rep", rep, world, rank)}
            case _:
                axis = "moe_ffn" if cut == "expert" else cut
                return {**whole, axis: cut_evenly(axis, whole[axis].size, world, rank)}
    except BadRequest as refusal:
        raise Uneven(refusal.what, {"tensor": name, **refusal.facts}, remedy=refusal.remedy) from None


def tensor_of(value: object, name: str) -> torch.Tensor:
    """Return a value of a state dict that is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise NoTensor(f"Expected a tensor for {name} but got {type(value)}")
    return value

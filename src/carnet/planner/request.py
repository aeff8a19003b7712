"""What a person asks for."""

from collections.abc import Mapping
from dataclasses import dataclass

from carnet.dtypes import named
from carnet.errors import BadRequest
from carnet.families.known import TARGETS

EMBEDDINGS = ("none", "rows", "columns")  # how ranks may share the embedding
CASTS = ("bf16", "f16", "f32")
SHARD = 5_000_000_000  # bytes; transformers' own default


@dataclass(frozen=True, slots=True)
class Request:
    """A wish for a target."""

    to: str  # "hf", "trtllm" or "megatron"
    tp: int = 1  # ranks that share every layer
    pp: int = 1  # pipeline stages
    ep: int = 1  # ranks that share the experts; they are among the tp
    dtype: str | None = None  # carnet's name of the element type to cast to; None keeps each tensor's own
    spelling: str = "te"  # megatron: the names of Transformer Engine's spec, or of the local one
    embedding: str | None = None  # trtllm: none (a copy on every rank), rows or columns shared; None as the family's class does
    drop: tuple[str, ...] = ()  # patterns of source names to leave behind
    vocab: int | None = None  # true size of the vocabulary where the source does not say it
    shard: int = SHARD  # hf: bytes of one file, at most (one tensor may be larger)
    config: str | None = None  # path of a config that stands in place of the source's own
    quantize: str | None = None  # scheme: carnet.quantize.recipes
    style: str | None = None  # whose names and arithmetic: "modelopt", "compressed-tensors", "deepseek"; trtllm has its own
    cache: str | None = None  # "fp8" for scales of the cache of keys and values
    cache_scale: float | None = None  # the scale of that cache in all layers, in place of what calibration found
    activations: str | None = None  # "static" or "dynamic" (no scale is stored for them); None as the scheme has it
    amax: str | None = None  # path of what calibration found
    exclude: tuple[str, ...] = ()  # patterns of module names that stay as they are


def as_data(request: Request) -> Mapping[str, object]:
    """Return a request as plain values, for the plan and the document."""
    plain = {name: getattr(request, name) for name in Request.__dataclass_fields__}
    return {**plain, "drop": list(request.drop), "exclude": list(request.exclude)}


def cast_to(word: str | None) -> str | None:
    """Return carnet's name of an element type that weights can be cast to; raise BadRequest for any other."""
    if word is None:
        return None
    dtype = named(word).name
    if dtype not in CASTS:
        raise BadRequest(f"weights cannot be cast to {dtype}", {"known": ", ".join(CASTS)})
    return dtype


def check(request: Request) -> None:
    """Raise BadRequest where a wish is none, whatever the checkpoint."""
    if request.to not in TARGETS:
        raise BadRequest(f"no target is called {request.to!r}", {"known": ", ".join(TARGETS)})
    if request.embedding not in (None, *EMBEDDINGS):
        raise BadRequest(f"the embedding cannot be shared by {request.embedding!r}", {"known": ", ".join(EMBEDDINGS)})
    if request.cache not in (None, "fp8"):
        raise BadRequest(f"a cache of keys and values cannot be {request.cache!r}", {"known": "fp8"})
    for name in ("tp", "pp", "ep", "shard"):
        if getattr(request, name) < 1:
            raise BadRequest(f"{name} must be at least 1", {"found": getattr(request, name)})

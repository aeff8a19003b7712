"""The engines: where each says what it holds, in which words, and by which hashes. A new engine is a row."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from carnet.engines.mixing import Mixed

Answer = Mapping[str, object]


class Unread(Exception):
    """An answer does not say what its engine says."""


class First:
    """The first 64 bits of SHA-256."""

    def __init__(self, nbytes: int) -> None:  # noqa: ARG002  as every hash is begun
        self._whole = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        """Hear what comes next."""
        self._whole.update(data)

    def hexdigest(self) -> str:
        """Return the digest of everything."""
        return self._whole.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine's way to say which weights it holds."""

    name: str  # of the kind of target that has its names
    path: str  # of its endpoint, which is asked by POST
    asks: Mapping[str, object]
    read: Callable[[Answer], Iterator[tuple[str, str]]]  # the digests in an answer, each under rank and name; raises Unread
    rank: str  # what stands before the names of a rank's parameters
    copies: re.Pattern[str]  # what of that another rank may have otherwise that holds the same weights; replaced by ``copy``
    copy: str
    hashes: tuple[Callable[[int], Any], ...]  # of which an engine uses one: the first on a GPU
    nothing: tuple[str, ...]  # the digests of no bytes
    absent: str  # what to do where there is no such endpoint
    buffers: bool  # it tells of buffers, too, of which no checkpoint knows
    plain: bool  # it tells of weights in codes what they mean


def _of_vllm(answer: Answer) -> Iterator[tuple[str, str]]:
    found = answer.get("checksums")
    if not isinstance(found, Mapping):
        raise Unread("no 'checksums'")
    yield from _digests(found, "", 64)


def _of_sglang(answer: Answer) -> Iterator[tuple[str, str]]:
    if not answer.get("success"):
        raise Unread(str(answer.get("message", "no success")))
    ranks = answer.get("ranks")
    if not isinstance(ranks, list):
        raise Unread("no 'ranks'")
    for at, rank in enumerate(ranks):
        infos = rank.get("parallelism_info") if isinstance(rank, Mapping) else None
        places = [each for each in infos if isinstance(each, Mapping)] if isinstance(infos, list) else []
        where = {"dp_rank": 0, "pp_rank": 0, "tp_rank": at, "dp_size": 1, **(places[0] if places else {})}
        if where["dp_size"] != 1:
            raise Unread("attention is shared among data-parallel ranks, which carnet does not cut")
        checksums = rank.get("checksums") if isinstance(rank, Mapping) else None
        if not isinstance(checksums, Mapping):
            raise Unread(f"no 'checksums' of rank {at}")
        yield from _digests(checksums, "dp{dp_rank}:pp{pp_rank}:tp{tp_rank}:".format(**where), 16)


def _digests(found: Mapping[object, object], before: str, letters: int) -> Iterator[tuple[str, str]]:
    for name, digest in found.items():
        if not isinstance(digest, str) or not re.fullmatch(f"[0-9a-f]{{{letters}}}", digest):
            raise Unread(f"{name} has no digest of {letters} hexadecimal digits")
        yield f"{before}{name}", digest


ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        # vllm 0.32: entrypoints/rl/online/api_router.py, model_executor/model_loader/weight_checksum.py,
        # v1/worker/gpu_worker.py _weight_checksum_prefix
        Engine(
            "vllm",
            "/weight_checker",
            {"action": "checksum"},
            _of_vllm,
            rank="dp0:pp{pp}:pcp0:tp{tp}:",
            copies=re.compile(r"^dp\d+:(pp\d+:)pcp\d+:"),
            copy=r"dp0:\1pcp0:",
            hashes=(lambda _: hashlib.sha256(),),
            nothing=(hashlib.sha256().hexdigest(),),
            absent="start vLLM (0.32 or newer) with VLLM_SERVER_DEV_MODE=1 in its environment; its URL has no /v1",
            buffers=False,
            plain=False,
        ),
        # sglang 0.5.23: srt/entrypoints/http_server.py, srt/managers/io_struct.py CheckWeightsReqInput, srt/utils/weight_checker.py,
        # srt/managers/mm_utils.py tensor_hash
        Engine(
            "sglang",
            "/weights_checker",
            {"action": "checksum", "selector": "target"},
            _of_sglang,
            rank="dp0:pp{pp}:tp{tp}:",
            copies=re.compile(r"^dp\d+:"),
            copy="dp0:",
            hashes=(Mixed, First),
            nothing=(f"{0:016x}", hashlib.sha256().hexdigest()[:16]),
            absent="use an SGLang that has /weights_checker: 0.5.23 does; its URL has no /v1",
            buffers=True,
            plain=True,
        ),
    )
}

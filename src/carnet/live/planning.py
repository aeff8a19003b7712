"""A live crossing is planned: what every rank must say alike, and what is refused before anything moves."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

import torch
import torch.distributed as dist

from carnet.dialects.megatron.programs import release_of
from carnet.errors import BadRequest
from carnet.live.control import Control, together
from carnet.live.crossing import Crossing, States
from carnet.live.grid import Grid
from carnet.live.virtual import aim, describe
from carnet.plans.request import Request, only
from carnet.plans.typed import Common

MEMORY = 2 << 30  # bytes of all buckets of a rank: a message of half a gigabyte comes near the speed of the link
TIMEOUT = 600.0  # seconds
BUCKETS = 4  # of a rank: two each way
Config = Mapping[str, object] | str | Path


def plan(
    config: Config,
    *,
    source: Grid,
    target: Grid,
    to: str = "hf",
    group: dist.ProcessGroup | None = None,
    dtypes: Mapping[str, str] | None = None,
    calibration: Mapping[str, float] | None = None,
    padded_vocab_size: int | None = None,
    target_padded_vocab_size: int | None = None,
    memory: int = MEMORY,
    timeout: float = TIMEOUT,
    states: States = None,
    written_by: str | None = None,
    accept: Sequence[str] = (),
    **options: Unpack[Common],
) -> Crossing:
    """Plan how the ranks of a running Megatron model hand their weights to the ranks of a target; called by every rank of ``group``.

    config: what describes the model: a mapping, or the path of a JSON or YAML file. Megatron's training arguments (``vars(args)``) mean
    what the builder of Megatron-LM's release made of them, which is that of the megatron-core that the ranks of the source run;
    ``carnet.megatron.models.arguments(model)``, a config of Megatron-Bridge or NeMo and one of Hugging Face mean what they say.
    source, target: how the model is shared, before and after. A target of the kind "hf" that is not shared is whole on each rank.
    to: "hf", "trtllm", "vllm" or "sglang" for tensors under these names, "megatron" for the modules of another running model.
    group: None for all ranks of the job, which then get groups of their own with the time limit.
    dtypes: patterns of Megatron's names -> element type, where a tensor is not of the config's type (``{"*router.weight": "f32"}``).
    calibration: largest magnitudes, as in a file of ``--amax``. states: this rank's tensors, needed before the first run only where
    ``quantize`` is to follow scales that the training brings along. memory: bytes of all buckets of a rank. timeout: seconds.
    written_by: the program that built the model, where it is another; accept: arguments whose effect the target may do without.
    The other options are those of ``carnet.plan``.

    Raises CarnetError on all ranks where it cannot be, or where the ranks were not given the same.
    """
    control = Control(group, timeout)
    try:
        versions = dict(zip(control.ranks, control.gather(_version()), strict=True))
        with together(control) as same:
            only(Common.__optional_keys__, options)
            said = {"written_by": written_by, "accept": accept}
            request = Request.of({**options, **said, "to": to, "tp": target.tp, "pp": target.pp, "ep": target.ep})
            bucket = _bucket(memory)
            ranks = _ranks(source, control)
            described = describe(
                *(_plain(config), source, ranks, dtypes or {}, padded_vocab_size),
                written_by=request.written_by,
                era=_era([versions[rank] for rank in ranks]),
                accept=request.accept,
                family=request.family,
            )
            destination = aim(described, request, target, _ranks(target, control), target_padded_vocab_size)
            same(described.inventory.checkpoint.digest, request, target, memory, calibration)
        return Crossing(control, described, destination, request, bucket, calibration or {}, states)
    except BaseException:
        control.close()
        raise


def _version() -> str:
    """Return the version of the megatron-core that this process runs, "" where it runs none."""
    return str(getattr(sys.modules.get("megatron.core"), "__version__", ""))


def _era(versions: Sequence[str]) -> str:
    """Return what the versions of the ranks that train say of the release, nothing where they have no one."""
    releases = {release_of(version) for version in versions}
    return f"=={releases.pop()}" if len(releases) == 1 and "" not in releases else ""


def _bucket(memory: object) -> int:
    """Return the bytes of one bucket."""
    if not isinstance(memory, int) or memory < BUCKETS << 10:
        facts = {"expected": f"at least {BUCKETS << 10} bytes", "found": str(memory)}
        raise BadRequest("the memory for buckets is too little", facts)
    return memory // BUCKETS


def _plain(config: Config) -> dict[str, object] | str | Path:
    """Return arguments as a checkpoint has them, or the path of a config."""
    if isinstance(config, str | Path):
        return config
    if not isinstance(config, Mapping):
        raise BadRequest("a config is a mapping, or the path of a file", {"found": type(config).__name__})
    return {key: str(value) if isinstance(value, torch.dtype) else value for key, value in config.items()}


def _ranks(grid: Grid, control: Control) -> Sequence[int]:
    given: object = grid.ranks
    ranks = control.ranks if given is None else given
    if not isinstance(ranks, Sequence) or len(set(ranks)) != len(ranks) or not set(ranks) <= set(control.ranks):
        facts = {"grid": str(ranks), "group": str(list(control.ranks))}
        raise BadRequest("the ranks of a grid are not ranks of the group, each once", facts)
    return ranks

"""What an engine must hold of a checkpoint, told from its bytes in one pass, and what a running engine says that it holds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypedDict, Unpack

from carnet.architectures.known import dialect_of
from carnet.dialects.configs import lookup
from carnet.engines.asking import ask
from carnet.engines.comparing import Comparison, compare
from carnet.engines.expected import Expected, load, parameters
from carnet.engines.table import ENGINES
from carnet.errors import BadOption, BadRequest, NotSupported
from carnet.examining import open_source
from carnet.executor.digesting import digests
from carnet.executor.memory import choose_window
from carnet.formats.files import check_unchanged
from carnet.inventory.survey import Inventory, take
from carnet.planner.build import build
from carnet.plans.options import PathLike, local
from carnet.plans.request import Request, memory_of, only, threads_of
from carnet.progress import Callback, Told, verb
from carnet.quantize.recipes import SQUARE
from carnet.storage.protocol import FILE
from carnet.storage.schemes import file_at

ENGINE = "vllm"
MEANT = "bf16"
TIMEOUT = 600.0  # seconds: an engine reads all that it holds before it answers


class Expecting(TypedDict, total=False):
    """The options of ``carnet.expect``: ``tp``, ``pp``, ``ep``, ``dtype`` as the engine was started, the others as for a crossing."""

    engine: str
    engine_version: str | None
    tp: int
    pp: int
    ep: int
    dtype: str | None
    config: PathLike | None
    family: str | None
    vocab_size: int | None
    drop: str | Sequence[str]
    written_by: str | None
    accept: str | Sequence[str]
    memory: int | str
    threads: int | None


@verb
def expect(path: PathLike, *, progress: Callback | None = None, **options: Unpack[Expecting]) -> Expected:
    """Return the digest of every parameter on every rank of an engine that has loaded a checkpoint, without the engine or a GPU.

    ``path`` is a checkpoint or a target of any kind that carnet reads, or a file in which an earlier call's digests were saved.
    Every byte is read once and nothing is written. Raises CarnetError where ``carnet.plan`` would.
    """
    only(Expecting.__optional_keys__, options)
    told = Told(progress, "hashing")
    where, engine = local("ckpt", path), options.get("engine", ENGINE)
    folder, name = file_at(where)
    if folder.kind(name) == FILE:
        return _kept(where, options)
    if engine not in ENGINES:
        raise BadOption(f"no engine is called {engine!r}", {"known": ", ".join(ENGINES)})
    said = {"to": engine, **{key: value for key, value in options.items() if key != "engine"}}
    request = Request.of({key: value for key, value in said.items() if key not in ("memory", "threads")})
    checkpoint = open_source(where, request)
    inventory = take(checkpoint, request.drop, request.vocab_size, request.tokens)
    if inventory.coded:
        request = replace(request, dtype=_meant(inventory, request))
    memory = memory_of(options)
    made = build(checkpoint, request)
    made = replace(made, memory=memory, window=choose_window(memory, len(made.steps)))
    dialect = dialect_of(inventory.family, engine, inventory.config)
    known = {(each.file, each.name): each for each in parameters(made.files, dialect, inventory.config, request.tp)}
    hashes = ENGINES[engine].hashes
    found = digests(made, checkpoint.root, known, hashes, progress=told.amount, threads=threads_of(options))
    check_unchanged(checkpoint.root, checkpoint.stamps)
    return Expected(
        engine,
        str(request.engine_version),
        where,
        *(request.tp, request.pp, request.ep),
        {each.key: found[spot] for spot, each in known.items()},
        frozenset(each.key for each in known.values() if each.coded),
    )


def _meant(inventory: Inventory, request: Request) -> str | None:
    """Return the type in which an engine hashes what codes mean, None where it hashes codes; refuse where carnet cannot say.

    sglang 0.5.23 srt/utils/weight_checker_comparator.py: weights in blocks of FP8 become bf16, all others are as a kernel packed them.
    """
    recipes = () if inventory.said is None else inventory.said.recipes
    facts = {"where": inventory.checkpoint.root, "found": ", ".join(each.name for each in recipes)}
    if not ENGINES[request.to].plain:
        if request.dtype is not None:
            raise NotSupported(f"{request.to} holds codes, not what they mean in {request.dtype}", facts)
        return None
    method = lookup(inventory.checkpoint.config, "quantization_config.quant_method")  # of its class Fp8Config alone
    if any(each.block != SQUARE for each in recipes) or method != "fp8":
        raise NotSupported(f"{request.to} hashes these codes as its kernels have packed them", facts)
    if request.dtype not in (None, MEANT):
        raise NotSupported(f"{request.to} hashes what codes mean in {MEANT}", facts, remedy="leave out --dtype")
    return MEANT


def _kept(path: str, options: Mapping[str, object]) -> Expected:
    """Return what was saved; raise BadRequest where other options were said than it was made with."""
    kept = load(path)
    own = {"engine": kept.engine, "engine_version": kept.release, "tp": kept.tp, "pp": kept.pp, "ep": kept.ep}
    for name, said in options.items():
        if said not in (None, (), own.get(name)) and name not in ("memory", "threads"):
            facts = {"where": path, "option": name, "expected": own.get(name, "nothing"), "found": said}
            raise BadRequest("the digests were saved with other options", facts, remedy="leave it out, or name the checkpoint")
    return kept


def against(expected: Expected, url: str, *, timeout: float = TIMEOUT, headers: Mapping[str, str] | None = None) -> Comparison:
    """Ask a running engine (``http://host:port``) what it holds, and compare it with what it must hold.

    ``timeout`` is how many seconds it may be silent; ``headers`` go along with the request. Nothing of the engine is changed.
    Raises BadRequest and MachineFailed where it does not answer as such an engine does; what differs is a comparison that is false.
    """
    return compare(expected, ask(ENGINES[expected.engine], url, timeout=timeout, headers=headers), url)

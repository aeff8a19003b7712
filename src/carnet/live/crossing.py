"""A live crossing: planned once on every rank, run as often as the training wants to hand over its weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist

from carnet.errors import BadRequest, CarnetError
from carnet.examiner import document as documents
from carnet.executor import files
from carnet.families.entries import Unit
from carnet.families.known import TARGETS
from carnet.live import coding, saving
from carnet.live.binding import TORCH, Book, State, Watch, bind, chunks_of
from carnet.live.checking import Digests, compare, copies_of, joined, read_again
from carnet.live.control import Control
from carnet.live.grid import Grid, unit_name
from carnet.live.landing import Module, Tensors
from carnet.live.moves import Atlas, Move, by_tensor, moves, rounds, traffic
from carnet.live.virtual import Goal, Holding, Source, aim, describe
from carnet.live.wire import Acts, Wire
from carnet.planner.build import Drawing, draw
from carnet.planner.request import Request
from carnet.seeds import NOTHING, Seeds
from carnet.steps import Fill, Step, TargetTensor, TextFile

MEMORY = 2 << 30  # bytes of all buckets of a rank: a message of half a gigabyte comes near the speed of the link
TIMEOUT = 600.0  # seconds
BUCKETS = 4  # of a rank: two each way
Config = Mapping[str, object] | str | Path
States = State | Sequence[State] | None


def plan(
    config: Config,
    *,
    source: Grid,
    target: Grid,
    to: str = "hf",
    group: dist.ProcessGroup | None = None,
    dtype: str | None = None,
    dtypes: Mapping[str, str] | None = None,
    quantize: str | None = None,
    style: str | None = None,
    kv_cache: str | None = None,
    kv_scale: float | None = None,
    activations: str | None = None,
    calibration: Mapping[str, float] | None = None,
    exclude: Sequence[str] = (),
    parallel_embedding: str | None = None,
    padded_vocab_size: int | None = None,
    target_padded_vocab_size: int | None = None,
    memory: int = MEMORY,
    timeout: float = TIMEOUT,
    states: States = None,
) -> "Crossing":
    """Plan how the ranks of a running Megatron model hand their weights to the ranks of a target; called by every rank of ``group``.

    config: Megatron's training arguments (``vars(args)``), or a Hugging Face config: a mapping, or the path of a JSON or YAML file.
    source, target: how the model is shared, before and after. A target of the kind "hf" that is not shared is whole on each rank.
    to: "hf" or "trtllm" for tensors under these names, "megatron" for the modules of another running model.
    group: None for all ranks of the job, which then get groups of their own with the time limit.
    dtypes: patterns of Megatron's names -> element type, where a tensor is not of the config's type (``{"*router.weight": "f32"}``).
    calibration: largest magnitudes, as in a file of ``--amax``. states: this rank's tensors, needed before the first run only where
    ``quantize`` is to follow scales that the training brings along. memory: bytes of all buckets of a rank. timeout: seconds.
    The other options are those of ``carnet.plan``.

    Raises CarnetError on all ranks where it cannot be, or where the ranks were not given the same.
    """
    control = Control(group, timeout)
    request = Request(
        to=to,
        tp=target.tp,
        pp=target.pp,
        ep=target.ep,
        dtype=dtype,
        embedding=parallel_embedding,
        quantize=quantize,
        style=style,
        cache=kv_cache,
        cache_scale=kv_scale,
        activations=activations,
        exclude=tuple(exclude),
    )
    with _together(control) as same:
        if to not in TARGETS:
            raise BadRequest(f"no target is called {to!r}", {"known": ", ".join(TARGETS)})
        if memory < BUCKETS << 10:
            raise BadRequest("the memory for buckets is too little", {"expected": f"at least {BUCKETS << 10}", "found": memory})
        raw = config if isinstance(config, str | Path) else _plain(config)
        described = describe(raw, source, _ranks(source, control), dtypes or {}, padded_vocab_size)
        goal = aim(described, request, target, _ranks(target, control), target_padded_vocab_size)
        same(described.inventory.checkpoint.digest, request, target, memory, calibration)
    return Crossing(control, described, goal, request, memory // BUCKETS, calibration or {}, states)


class Crossing:
    """A plan that every rank has, and the memory that it runs in."""

    def __init__(
        self,
        control: Control,
        source: Source,
        goal: Goal,
        request: Request,
        bucket: int,
        calibration: Mapping[str, float],
        states: States,
    ) -> None:
        self._control, self._source, self._goal, self._request, self._bucket = control, source, goal, request, bucket
        self._book, self._watch, self._watch_target = Book(), Watch(()), Watch(())
        self._landing: Module | Tensors
        self._acts: list[Acts] = []
        self._wires: dict[str, Wire] = {}
        self._drawing, self._atlas, self._moves = self._draw(states, calibration)
        self._fills = [step for step in self._drawing.plan.steps if isinstance(step, Fill)]
        self._steps: list[Step] = []  # of coding, in this run
        self._scales: Mapping[str, coding.Scale] = {}
        self._known = NOTHING  # what the states brought along the last time

    def _draw(self, states: States, calibration: Mapping[str, float]) -> tuple[Drawing, Atlas, list[Move]]:
        """Draw the plan; where something is quantized, with the scales that the states bring along."""
        seeds = NOTHING
        if self._request.quantize is not None and self._control.any(coding.brings(states)):
            self._bind(states)
            seeds = self._seeds(states)
        goal = self._goal
        with _together(self._control):
            units = None if goal.units is None else list(goal.units)
            made = draw(
                self._source.inventory,
                goal.dialect,
                self._request,
                among=units,
                said=goal.said,
                calibration=calibration,
                seeds=seeds,
            )
            atlas = Atlas(made.plan)
            found = list(moves(made.plan, atlas, self._source, lambda spot: goal.holders(spot.file), self._bucket))
        return made, atlas, found

    # --- what it is ----------------------------------------------------------------------------------------------------------

    @property
    def texts(self) -> dict[str, str]:
        """Return the small files of the target: ``config.json`` and what stands beside it."""
        return {text.name: text.text for text in self._drawing.plan.texts}

    @property
    def family(self) -> str:
        """Name the family of the model."""
        return self._drawing.plan.family

    def traffic(self) -> Mapping[str, int]:
        """Return what a run amounts to: rounds, bytes sent from rank to rank and kept where they are, and the buckets of this rank."""
        return {**traffic(self._rounds("all")), "bytes of buckets": self._wire("all").nbytes}

    def close(self) -> None:
        """Give up buckets and groups; every rank must. A crossing that is closed cannot run."""
        self._wires.clear()
        self._acts.clear()
        self._control.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- running it ----------------------------------------------------------------------------------------------------------

    def run(self, states: States = None, into: Mapping[str, torch.Tensor] | States = None) -> dict[str, torch.Tensor]:
        """Hand over the weights; return the target's tensors of this rank by name, none on a rank that is not of the target.

        states: the module or state dict of this rank (a sequence of them for virtual chunks), None on a rank of the target alone.
        into: tensors to write into, by name: those that an earlier run returned, or an engine's own. For a target of the kind
        "megatron" the module or state dict of the target, which then has the weights.

        Raises CarnetError on all ranks where one of them cannot go on.
        """
        same = self._watch.same(states) and self._watch_target.same(into) and into is not None
        if self._control.any(not same):
            self._bind(states)
            self._land(into)
        self._weigh(states)
        for _ in self._wire("all").run(self._acts):
            pass
        self._landing.settle([*self._fills, *self._steps], self._scales)
        return self._landing.held

    def check(self) -> int:
        """Compare what the last ``run`` brought with what it came from, both read again; return how many digests were compared.

        Also compares what several ranks hold of the source. Raises MachineFailed where something arrived otherwise than it left,
        BadCheckpoint where copies differ; on all ranks.
        """
        copies = list(copies_of(self._source, self._drawing.plan))

        def read(move: Move) -> torch.Tensor:
            return self._dress(move, joined(move.box, self._book.find(move.tensor, move.box))).to(TORCH[move.dtype])

        found: Digests = {}, {}, {}
        with _together(self._control):
            found = read_again(self._control.rank, self._moves, copies, read, self._landing.find, self._book)
        return compare(dict(zip(self._control.ranks, self._control.gather(found), strict=True)), self._moves, copies)

    def stream(self, states: States = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Hand over the weights tensor by tensor, as an engine's ``load_weights`` takes them; every rank must go to the end.

        A tensor that was yielded belongs to who took it; one that is let go of makes room for the next.
        """
        if self._request.to == "megatron":
            raise BadRequest("the tensors of a running module are written in place", remedy="run(states, into=model)")
        yield from self._arriving(states, self._tensors(), self._wire("stream"))

    def _arriving(self, states: States, landing: Tensors, wire: Wire) -> Iterator[tuple[str, torch.Tensor]]:
        if self._control.any(not self._watch.same(states)):
            self._bind(states)
        self._weigh(states)
        steps, left = [*self._fills, *self._steps], landing.names
        for one in wire.run(self._lay(wire, landing)):
            own = (move.spot.name for move in one.moves if move.receiver == self._control.rank)
            arrived = [name for name in dict.fromkeys(own) if name in left]
            landing.settle(steps, self._scales, frozenset(arrived))
            left = [name for name in left if name not in arrived]
            yield from landing.take(arrived)
        landing.settle(steps, self._scales, frozenset(left))
        yield from landing.take(left)  # scales

    def save(self, out: str | Path, states: States = None) -> Path:
        """Write the target's files together, each rank its part; ``out`` is one folder for all ranks, and appears when it is whole.

        The bytes are those of a crossing of files. The ranks of the target write: of a target that is whole on several, each a part.
        Raises CarnetError on all ranks where one cannot write; then there is no target.
        """
        out, plan = Path(out), self._drawing.plan
        leader = self._control.rank == self._control.ranks[0]
        with _together(self._control) as same:
            if self._goal.units is not None and self._goal.dialect.name != "trtllm":
                remedy = "plan a target that is not shared: target=Grid(ranks=[0])"
                raise BadRequest("a checkpoint of this kind is not cut for ranks", {"to": self._request.to}, remedy=remedy)
            same(str(out.absolute()))
        try:
            with _together(self._control):
                if leader:
                    saving.begin(plan, out)
            self._write(out, states)
            with _together(self._control):
                if leader:
                    note = documents.draft(plan.request, plan.dropped, plan.family, plan.fingerprint)
                    saving.end(replace(plan, texts=(TextFile(documents.NAME, note), *plan.texts)), out)
        except BaseException:
            if leader:
                saving.abandon(out)
            raise
        return out

    def _write(self, out: Path, states: States) -> None:
        writers = saving.Writers(self._drawing.plan, self._goal.holders)
        own = writers.tensors.get(self._control.rank, {})
        landing = Tensors(
            {name: tensor for name, (_, tensor) in own.items()},
            self._atlas,
            [file for file, _ in own.values()],
            self._control.device(),
        )
        found = moves(self._drawing.plan, self._atlas, self._source, writers.of, self._bucket)
        wire = Wire(self._control, rounds(by_tensor(found), self._bucket, kept=True))
        with _together(self._control):
            folder = saving.opened(out)
        refusal: Exception | None = None
        for name, tensor in self._arriving(states, landing, wire):
            try:
                if refusal is None:
                    saving.write(folder, *own[name], tensor)
            except CarnetError as error:
                refusal = error  # the others still wait for what comes from here
        with _together(self._control):
            files.close(folder)
            if refusal is not None:
                raise refusal

    # --- inside --------------------------------------------------------------------------------------------------------------

    def _bind(self, states: States) -> None:
        """Tie the tensors of this rank to what it should hold."""
        self._book, self._watch = self._tie(states, self._source.holding), Watch(states)

    def _land(self, into: Mapping[str, torch.Tensor] | States) -> None:
        """Find the memory of the target, and lay down what is copied where."""
        if self._request.to == "megatron":
            self._landing = Module(self._tie(into, self._goal.holding))
        else:
            self._landing = self._tensors()
            with _together(self._control):
                if into is not None:
                    assert isinstance(into, Mapping), "a target by names is written into tensors by names"
                    self._landing.accept(into, self._control.rank)
            self._landing.make()
        self._watch_target = Watch(into)
        self._acts = list(self._lay(self._wire("all"), self._landing))

    def _lay(self, wire: Wire, landing: Module | Tensors) -> Iterator[Acts]:
        return (wire.lay(one, self._book, landing.find, self._dress) for one in wire.rounds)

    def _weigh(self, states: States) -> None:
        """Find the scales of this run."""
        if self._request.quantize is None:
            return
        seeds = self._seeds(states) if self._control.any(coding.brings(states)) else NOTHING
        if seeds != self._known or not self._steps:
            self._known, self._steps = seeds, list(self._drawing.coding(seeds))
        amaxes = coding.measure(self._control, self._source, self._book, self._steps)
        with _together(self._control):
            coding.refuse_infinite(self._book, (move for move in self._moves if move.sender == self._control.rank), self._steps)
            self._scales = coding.scales(self._steps, amaxes, self._control.device())

    def _tie(self, states: object, holding: Holding) -> Book:
        """Return where everything lies that a rank of one side must hold."""
        with _together(self._control):
            book, chunks, units = Book(), chunks_of(states), self._units(holding)
            if len(chunks) != len(units):
                facts = {"on": f"rank {self._control.rank}", "expected": len(units), "found": len(chunks)}
                raise BadRequest("a rank must hand over a state for each of its chunks, and no other", facts)
            for unit, state in zip(units, chunks, strict=True):
                config = {**self._source.inventory.config, **(self._goal.said if holding is self._goal.holding else {})}
                bind(book, unit, config, self._source.dtypes, state, self._control.rank)
        return book

    def _units(self, holding: Holding) -> list[Unit]:
        seat = holding.seats.get(self._control.rank)
        names = [] if seat is None else [unit_name(seat, chunk) for chunk in range(len(holding.units))]
        return [holding.units[name][0] for name in names if name in holding.units]

    def _seeds(self, states: States) -> Seeds:
        units = [unit.name for unit in self._units(self._source.holding)]
        return coding.seeds_of(self._control, self._book.entries, list(zip(units, chunks_of(states), strict=True)))

    def _rounds(self, way: str) -> list[list[Move]]:
        if way == "all":
            return rounds(([move] for move in self._moves), self._bucket)
        return rounds(by_tensor(self._moves), self._bucket, kept=True)

    def _wire(self, way: str) -> Wire:
        if way not in self._wires:
            self._wires[way] = Wire(self._control, self._rounds(way))
        return self._wires[way]

    def _tensors(self) -> Tensors:
        held = [file for file in self._drawing.plan.files if self._control.rank in self._goal.holders(file.name)]
        wanted: dict[str, TargetTensor] = {tensor.name: tensor for file in held for tensor in file.tensors}
        return Tensors(wanted, self._atlas, [file.name for file in held], self._control.device())

    def _dress(self, move: Move, view: torch.Tensor) -> torch.Tensor:
        if move.code:
            return coding.encode(view, self._scales[move.code])
        return view.float() + move.add if move.add else view


@contextmanager
def _together(control: Control) -> Iterator[Callable[..., None]]:
    """Do something on every rank, and go on where it went well on all; what is handed to ``same`` must be the same on all.

    What is done must not talk to other ranks.
    """
    refusal: Exception | None = None
    said: list[str] = []
    try:
        yield lambda *facts: said.append(repr(facts))
    except Exception as error:  # noqa: BLE001  whatever it is, the other ranks must not wait
        refusal = error
    control.agree(refusal, "".join(said))


def _plain(config: Mapping[str, object]) -> dict[str, object]:
    """Return arguments as a checkpoint has them."""
    return {key: str(value) if isinstance(value, torch.dtype) else value for key, value in config.items()}


def _ranks(grid: Grid, control: Control) -> Sequence[int]:
    ranks = control.ranks if grid.ranks is None else list(grid.ranks)
    if len(set(ranks)) != len(ranks) or not set(ranks) <= set(control.ranks):
        facts = {"grid": str(list(ranks)), "group": str(list(control.ranks))}
        raise BadRequest("the ranks of a grid are not ranks of the group, each once", facts)
    return ranks

"""A live crossing: planned once on every rank, run as often as the training wants to hand over its weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

import torch

from carnet.dialects.kinds import KINDS, RANKS
from carnet.dialects.units import Unit
from carnet.engines.expected import Expected, Parameter
from carnet.errors import BadRequest, CarnetError
from carnet.examiner import document as documents
from carnet.formats.side_files import DOCUMENT
from carnet.inventory.source_scales import NOTHING, SourceScales
from carnet.live import coding, digesting, saving
from carnet.live.binding import TORCH, Located, State, Watch, bind, chunks_of
from carnet.live.checking import Digests, compare, copies_of, read_again
from carnet.live.control import Control, together
from carnet.live.copying import acts, reads
from carnet.live.encoding import Coder
from carnet.live.grid import unit_name
from carnet.live.landing import Module, Tensors
from carnet.live.moves import TargetIndex, Transfer, by_tensor, moves, rounds, traffic
from carnet.live.virtual import Destination, Placement, Source
from carnet.live.wire import Acts, Buckets, Wire
from carnet.planner.build import Planned, make_plan
from carnet.plans.request import Request
from carnet.steps import Fill, Put, Step, TargetTensor, TextFile
from carnet.storage.schemes import folder_at

States = State | Sequence[State] | None


class Crossing:
    """A plan that every rank has, and the memory that it runs in."""

    def __init__(
        self,
        control: Control,
        source: Source,
        destination: Destination,
        request: Request,
        bucket: int,
        calibration: Mapping[str, float],
        states: States,
    ) -> None:
        self._control, self._source, self._destination, self._request, self._bucket = (
            control,
            source,
            destination,
            request,
            bucket,
        )
        self._located, self._watch, self._watch_target = Located(), Watch(()), Watch(())
        self._landing: Module | Tensors
        self._acts: list[Acts] = []
        self._wires: dict[str, Wire] = {}
        self._planned, self._index, self._moves = self._draw(states, calibration)
        steps = self._planned.plan.steps
        # what does not travel: zeros, and the constants of a program; scales of what is coded are found in every run
        self._fills = [*steps.only(Fill), *(steps.only(Put) if request.quantize is None else ())]
        self._steps: list[Step] = []  # of coding, in this run
        self._gauge: coding.Gauge | None = None
        self._coder = Coder(self._index.matrices)
        self._known = NOTHING  # what the states brought along the last time

    def _draw(self, states: States, calibration: Mapping[str, float]) -> tuple[Planned, TargetIndex, list[Transfer]]:
        """Draw the plan; where something is quantized, with the scales that the states bring along."""
        source_scales = NOTHING
        if self._request.quantize is not None and self._bring(states):
            self._bind(states)
            source_scales = self._source_scales(states)
        destination = self._destination
        with together(self._control):
            units = None if destination.units is None else list(destination.units)
            made = make_plan(
                self._source.inventory,
                destination.dialect,
                self._request,
                among=units,
                said=destination.said,
                calibration=calibration,
                source_scales=source_scales,
            )
            index = TargetIndex(made.plan)
            found = list(moves(made.plan, index, self._source, lambda spot: destination.holders(spot.file), self._bucket))
        return made, index, found

    # --- what it is ----------------------------------------------------------------------------------------------------------

    @property
    def texts(self) -> dict[str, str]:
        """Return the small files of the target: ``config.json`` and what stands beside it."""
        return {text.name: text.text for text in self._planned.plan.texts}

    @property
    def family(self) -> str:
        """Name the family of the model."""
        return self._planned.plan.family

    def traffic(self) -> Mapping[str, int]:
        """Return what a run amounts to: rounds, bytes sent from rank to rank and kept where they are, and the buckets of this rank."""
        count = len(self._wire("all").rounds)
        return {"rounds": count, **traffic(self._moves), "bytes of buckets": self._buckets.nbytes}

    def close(self) -> None:
        """Give up buckets and groups; every rank must. A crossing that is closed cannot run."""
        self._wires.clear()
        self._acts.clear()
        self.__dict__.pop("_buckets", None)
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
        wire = self._wire("all")
        moved, other = self._control.each(not self._watch.same(states), into is None or not self._watch_target.same(into))
        if moved:
            self._bind(states)
        if moved or other:
            self._land(into)
        self._look(states)
        for _ in wire.run(self._acts, self._weigh):
            pass
        self._landing.settle([*self._fills, *self._steps], self._coder)
        return self._landing.held

    def check(self) -> int:
        """Compare what the last ``run`` brought with what it came from, both read again; return how many digests were compared.

        Also compares what several ranks hold of the source. Raises MachineFailed where something arrived otherwise than it left,
        BadCheckpoint where copies differ; on all ranks.
        """
        copies = list(copies_of(self._source, self._planned.plan))

        def read(move: Transfer) -> torch.Tensor:
            made = torch.empty(move.spot.shape, dtype=TORCH[move.dtype], device=self._control.device())
            for act in acts(reads(made, move, self._located.find(move.tensor, move.box)), self._coder):
                act()
            return made

        found: Digests = {}, {}, {}
        with together(self._control):
            found = read_again(self._control.rank, self._moves, copies, read, self._landing.find, self._located)
        return compare(dict(zip(self._control.ranks, self._control.gather(found), strict=True)), self._moves, copies)

    def expected(self) -> Expected:
        """Return what every rank of the engine must hold after the last ``run``, told from what that came from, read again.

        Every rank must call it, and gets the digests of all; ``carnet.against(found, url)`` asks the engine. Raises BadRequest where
        the target is no engine's, or nothing was run.
        """
        plan, known, engine = self._planned.plan, list[Parameter](), self._request.to
        with together(self._control):
            if not self._acts:
                raise BadRequest("nothing was run that an engine could hold", remedy="call run first")
            known = digesting.parameters_of(plan, self._destination, self._source.inventory.config, self._request)
        mine = {each.name: each for each in known if self._control.rank in self._destination.holders(each.file)}
        own = digesting.digests(engine, self._streaming(self._tensors(), self._wire("stream")), mine)
        return digesting.merged(self._control, own, known, self._request, plan.source)

    def stream(self, states: States = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Hand over the weights tensor by tensor, as an engine's ``load_weights`` takes them; every rank must go to the end.

        A tensor that was yielded belongs to who took it; one that is let go of makes room for the next.
        """
        if self._destination.dialect.kind.arguments:
            raise BadRequest("the tensors of a running module are written in place", remedy="run(states, into=model)")
        yield from self._arriving(states, self._tensors(), self._wire("stream"))

    def _arriving(self, states: States, landing: Tensors, wire: Wire) -> Iterator[tuple[str, torch.Tensor]]:
        if self._control.any(not self._watch.same(states)):
            self._bind(states)
        self._look(states)
        yield from self._streaming(landing, wire)

    def _streaming(self, landing: Tensors, wire: Wire) -> Iterator[tuple[str, torch.Tensor]]:
        left, beside = dict.fromkeys(landing.names), landing.beside([*self._fills, *self._steps])

        def settle(names: Iterable[str]) -> None:
            landing.settle([step for name in names for step in beside.get(name, ())], self._coder)

        for one in wire.run(self._lay(wire, landing), self._weigh):
            own = (move.spot.name for move in one.moves if move.receiver == self._control.rank)
            arrived = [name for name in dict.fromkeys(own) if name in left]
            settle(arrived)
            for name in arrived:
                del left[name]
            yield from landing.take(arrived)
        settle(left)
        yield from landing.take(left)  # scales

    def save(self, out: str | Path, states: States = None) -> Path:
        """Write the target's files together, each rank its part; ``out`` is one folder for all ranks, and appears when it is whole.

        The bytes are those of a crossing of files. The ranks of the target write: of a target that is whole on several, each a part.
        Raises CarnetError on all ranks where one cannot write; then there is no target.
        """
        out, plan = Path(out), self._planned.plan
        leader = self._control.rank == self._control.ranks[0]
        with together(self._control) as same:
            if self._destination.units is not None and KINDS[self._request.to].files != RANKS:
                remedy = "plan a target that is not shared: target=Grid(ranks=[0])"
                raise BadRequest("a checkpoint of this kind is not cut for ranks", {"to": self._request.to}, remedy=remedy)
            same(str(folder_at(out)))
        note = documents.draft(plan)
        plan = replace(plan, texts=(TextFile(DOCUMENT, note), *plan.texts))
        with ExitStack() as stack:
            with together(self._control):
                held = stack.enter_context(saving.begun(plan, out)) if leader else None
            self._write(out, states)
            with together(self._control):
                if held is not None:
                    saving.end(plan, held)
        return out

    def _write(self, out: Path, states: States) -> None:
        writers = saving.Writers(self._planned.plan, self._destination.holders)
        own = writers.tensors.get(self._control.rank, {})
        landing = Tensors(
            {name: tensor for name, (_, tensor) in own.items()},
            self._index,
            [file for file, _ in own.values()],
            self._control.device(),
        )
        found = moves(self._planned.plan, self._index, self._source, writers.of, self._bucket)
        wire = Wire(self._control, rounds(by_tensor(found), self._bucket, kept=True), self._buckets)
        with together(self._control):
            files = saving.opened(out)
        refusal: Exception | None = None
        for name, tensor in self._arriving(states, landing, wire):
            try:
                if refusal is None:
                    file, place = own[name]
                    saving.write(files(file), place, tensor)
            except CarnetError as error:
                refusal = error  # the others still wait for what comes from here
        with together(self._control):
            files.close()
            if refusal is not None:
                raise refusal

    # --- inside --------------------------------------------------------------------------------------------------------------

    def _bind(self, states: States) -> None:
        """Tie the tensors of this rank to what it should hold."""
        self._gauge = None
        self._located, self._watch = self._tie(states, self._source.placement), Watch(states)

    def _land(self, into: Mapping[str, torch.Tensor] | States) -> None:
        """Find the memory of the target, and lay down what is copied where."""
        if self._destination.dialect.kind.arguments:
            self._landing = Module(self._tie(into, self._destination.placement))
        else:
            self._landing = self._tensors()
            with together(self._control):
                if into is not None:
                    if not isinstance(into, Mapping):
                        raise BadRequest("a target by names is written into tensors by names", {"found": type(into).__name__})
                    self._landing.accept(into, self._control.rank)
            self._landing.make()
        self._watch_target = Watch(into)
        self._acts = list(self._lay(self._wire("all"), self._landing))

    def _lay(self, wire: Wire, landing: Module | Tensors) -> Iterator[Acts]:
        return (wire.lay(one, self._located, landing.find, self._coder) for one in wire.rounds)

    def _look(self, states: States) -> None:
        """See what of this run is to be measured, and which scales the states bring along."""
        if self._request.quantize is None:
            return
        source_scales = self._source_scales(states) if self._bring(states) else NOTHING
        if source_scales != self._known or not self._steps:
            self._known, self._steps, self._gauge = source_scales, list(self._planned.coding(source_scales)), None
        if self._gauge is None:
            self._gauge = coding.Gauge(self._control, self._source, self._located, self._moves, self._steps)

    def _weigh(self) -> None:
        """Find the scales of this run."""
        if self._gauge is not None:
            coding.weigh(self._coder, self._steps, self._gauge.read(), self._control.device())

    def _tie(self, states: object, placement: Placement) -> Located:
        """Return where everything lies that a rank of one side must hold."""
        with together(self._control):
            located, chunks, units = Located(), chunks_of(states), self._units(placement)
            config = {
                **self._source.inventory.config,
                **(self._destination.said if placement is self._destination.placement else {}),
            }
            dtypes = self._source.dtypes
            if len(chunks) != len(units):
                facts = {"on": f"rank {self._control.rank}", "expected": len(units), "found": len(chunks)}
                raise BadRequest("a rank must hand over a state for each of its chunks, and no other", facts)
            for unit, state in zip(units, chunks, strict=True):
                bind(located, unit, config, dtypes, state, self._control.rank)
        return located

    def _units(self, placement: Placement) -> list[Unit]:
        seat = placement.seats.get(self._control.rank)
        names = [] if seat is None else [unit_name(seat, chunk) for chunk in range(len(placement.units))]
        return [placement.units[name][0] for name in names if name in placement.units]

    def _bring(self, states: States) -> bool:
        """Say whether the states of any rank may have scales of their own."""
        found = False
        with together(self._control):
            found = coding.brings(states)
        return self._control.any(found)

    def _source_scales(self, states: States) -> SourceScales:
        units = [unit.name for unit in self._units(self._source.placement)]
        return coding.source_scales_of(self._control, self._located.entries, list(zip(units, chunks_of(states), strict=True)))

    def _rounds(self, way: str) -> list[list[Transfer]]:
        if way == "all":  # what is not coded first: scales are found meanwhile
            return rounds(([move] for move in sorted(self._moves, key=lambda move: move.coded is not None)), self._bucket)
        return rounds(by_tensor(self._moves), self._bucket, kept=True)

    def _wire(self, way: str) -> Wire:
        if way not in self._wires:
            self._wires[way] = Wire(self._control, self._rounds(way), self._buckets)
        return self._wires[way]

    @cached_property
    def _buckets(self) -> Buckets:
        return Buckets(self._control, self._moves, self._bucket)

    def _tensors(self) -> Tensors:
        held = [file for file in self._planned.plan.files if self._control.rank in self._destination.holders(file.name)]
        wanted: dict[str, TargetTensor] = {tensor.name: tensor for file in held for tensor in file.tensors}
        return Tensors(wanted, self._index, [file.name for file in held], self._control.device())

"""One worker doing one job: runs by the kernel, windows through buffers, checks by comparing."""

import numpy as np

from carnet.dtypes import BY_NAME
from carnet.errors import BadCheckpoint
from carnet.executor import files
from carnet.executor.adapting import assemble
from carnet.executor.assemble import gather, want
from carnet.executor.cutting import cuts
from carnet.executor.geometry import clip, linear, run, runs, segments, volume
from carnet.executor.jobs import Check, Direct, Encode, Gauge, Job, Windows
from carnet.executor.quantizing import code, measure
from carnet.executor.worker import Worker
from carnet.formats.stored import dense_strides
from carnet.steps import Place


def work(worker: Worker, job: Job) -> float | None:
    """Do a job, and return what it measured; when this returns, its bytes are with the kernel."""
    match job:
        case Direct():
            _direct(worker, job)
        case Windows():
            _windows(worker, job)
        case Check():
            _check(worker, job)
        case Gauge():
            return measure(worker, job.step)
        case Encode():
            assemble(worker, (job.part,))
            code(worker, job.step, job.part.tile)
    return None


def _direct(worker: Worker, job: Direct) -> None:
    source, target = worker.sources(job.step.source.file), worker.targets(job.step.target.file)
    spare, size = worker.window.data, run(job.piece)
    for begin, end in runs(job.piece):
        done = 0
        while done < size:
            moved = files.copy(source, begin + done, target, end + done, min(size - done, files.CHUNK), spare)
            done += moved
            worker.tell(moved)


def _windows(worker: Worker, job: Windows) -> None:
    """Assemble the parts side by side in the window, then write each where it belongs."""
    if worker.adder is None:
        assemble(worker, job.parts)
    else:
        worker.adder.fill(worker, job.parts)
    base = 0
    for part in job.parts:
        file = worker.targets(part.file)
        first, lines, width, pitch = segments(part.tile)
        for place in range(first, first + lines * pitch, pitch):
            file.write(place, worker.window.data[base : base + width])
            base += width
        worker.tell(volume(part.tile))


def _check(worker: Worker, job: Check) -> None:
    """Gather both places, each into its half of the window, and compare the halves."""
    step = job.step
    dtype = step.source.dtype
    item = BY_NAME[dtype].nbytes
    half = worker.window.size // 16 * 8
    dense = Place("", 0, dense_strides(step.shape), dtype)
    for low, high in cuts(step.shape, item, half):
        wants = []
        for place, base in ((step.source, 0), (step.other, half)):
            for piece in clip(step.shape, place, dense, linear(0, item, low, high)):
                wants.append(want(step, place.file, piece, (dtype, dtype), base))
        gather(worker, wants)
        if not _equal(worker, high - low, half):
            facts = {"where": step.source.file, "other": step.other.file, "expected": "the same bytes in both"}
            remedy = "find out which of the two is damaged; weights that were trained apart must not be tied by the config"
            raise BadCheckpoint(f"two copies of {step.tensor} differ", facts, remedy=remedy)
        worker.tell(high - low)


def _equal(worker: Worker, size: int, half: int) -> bool:
    unequal = worker.temporary.view(np.bool_)
    for low in range(0, size, unequal.size):
        high = min(size, low + unequal.size)
        found = np.not_equal(worker.window[low:high], worker.window[half + low : half + high], out=unequal[: high - low])
        if found.any():
            return False
    return True

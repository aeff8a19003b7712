"""What a report tells, as data: everything that is drawn or listed, before any of it has a place on a page."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite

from carnet.examiner.compare import Finding
from carnet.examiner.document import decibel
from carnet.examiner.pictures import Picture
from carnet.lineage import Lineage
from carnet.report.column import Block
from carnet.report.flow import Flow
from carnet.report.loss import Kind, Sum
from carnet.report.running import Run

EQUAL, DIFFERENT, SAID, UNEXAMINED, REFUSED, SEEN = "equal", "different", "said", "unexamined", "refused", "seen"
WORDS = {  # state -> what that means
    EQUAL: "Equal: every element was compared with the source",
    DIFFERENT: "Different from the source",
    SAID: "As its carnet.json says; nothing was examined for this report",
    UNEXAMINED: "Written, and compared with its source by nobody",
    REFUSED: "Not understood",
    SEEN: "A checkpoint, by its headers",
}
NAMED = 200  # findings, files and names that a page lists of each sort


@dataclass(frozen=True, slots=True)
class Loss:
    """What codes lose over all weights."""

    weights: int
    saturated: int
    snr: float | None  # dB, None where nothing is lost
    worst: tuple[tuple[str, float | None, int], ...]  # name, dB, numbers cut off
    kinds: tuple[Kind, ...] = ()  # where the codes were examined for this report


@dataclass(frozen=True, slots=True)
class Page:
    """A report."""

    name: str  # of the folder
    source: str  # of the one that it was made from, "" for none
    state: str
    facts: Mapping[str, str]  # what a person reads first: label -> line
    flow: Flow
    blocks: Sequence[Block] = ()
    loss: Loss | None = None
    losses: Sequence[Picture] = ()
    damages: Sequence[Picture] = ()
    findings: Sequence[Finding] = ()  # some of them
    counted: Mapping[str, int] | None = None  # what is wrong -> how often
    run: Run | None = None
    why_no_run: str = ""
    dropped: Mapping[str, Sequence[str]] | None = None
    request: Mapping[str, str] | None = None  # option -> value
    origin: Mapping[str, str] | None = None  # versions, digests, programs
    lineage: Lineage | None = None
    files: Mapping[str, str] | None = None  # of the target, which hold no tensors: name -> digest


def page_data(page: Page) -> dict[str, object]:
    """Return a report as plain values; of pictures what they are of."""
    return {
        "name": page.name,
        "source": page.source or None,
        "state": page.state,
        "facts": dict(page.facts),
        "flow": {
            "sources": dict(page.flow.sources),
            "components": {name: {"in": ins, "out": outs} for name, (ins, outs) in page.flow.components.items()},
            "targets": dict(page.flow.targets),
            "streams": [asdict(stream) for stream in (*page.flow.arriving, *page.flow.leaving)],
        },
        "blocks": [asdict(block) for block in page.blocks],
        "loss": None if page.loss is None else _loss_data(page.loss),
        "findings": [asdict(finding) for finding in page.findings],
        "counted": dict(page.counted or {}),
        "pictures": {
            sort: [{"name": str(each.name), "stored": each.label, "shape": list(each.shape)} for each in found]
            for sort, found in (("lost", page.losses), ("differs", page.damages))
        },
        "run": None if page.run is None else [asdict(sample) for sample in page.run.samples],
        "dropped": {reason: len(names) for reason, names in (page.dropped or {}).items()},
        "request": dict(page.request or {}),
        "origin": dict(page.origin or {}),
    }


def _loss_data(loss: Loss) -> dict[str, object]:
    return {
        "weights": loss.weights,
        "saturated": loss.saturated,
        "snr dB": loss.snr,
        "worst": [{"tensor": name, "snr dB": snr, "saturated": saturated} for name, snr, saturated in loss.worst],
        "kinds": [
            {
                "name": kind.name,
                "recipe": kind.recipe,
                **_sum_data(kind.all),
                "layers": {str(layer): _sum_data(found) for layer, found in kind.layers.items()},
            }
            for kind in loss.kinds
        ],
    }


def _sum_data(found: Sum) -> dict[str, object]:
    return {
        "weights": found.weights,
        "elements": found.elements,
        "saturated": found.saturated,
        "snr dB": decibel(found.snr),
        "octaves": dict(sorted(found.octaves.items())),
    }


def finite(ratio: float) -> float | None:
    """Return a ratio in dB, None where it is infinite."""
    return ratio if isfinite(ratio) else None

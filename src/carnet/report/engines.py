"""What a person and a machine read of the weights that an engine must hold, and of those that it holds."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from carnet.engines.comparing import Comparison, Finding
from carnet.engines.expected import Expected
from carnet.report.tables import facts_in_lines, table

MOST = 40  # rows that a person reads


def expected_lines(expected: Expected, width: int | None) -> Iterator[str]:
    """Yield what an engine must hold, in a few words: the digests are for machines."""
    digest = "no parameter"
    if expected.checksums:
        key, digest = next(iter(expected.checksums.items()))
        digest = f"{digest} {key}"
    yield from facts_in_lines(
        {
            "engine": _engine(expected.engine, expected.release),
            "source": expected.source,
            "ranks": f"{expected.tp * expected.pp}: tp={expected.tp} pp={expected.pp} ep={expected.ep}",
            "parameters": f"{len(expected.digests):,} of all ranks; -o FILE saves their digests, --json prints them",
            "the first": digest,
        },
        width,
    )


def comparison_lines(found: Comparison, width: int | None) -> Iterator[str]:
    """Yield whether an engine holds what it must, and where it does not."""
    total = found.compared + len(found.apart)
    said = "equal" if found else "different" if found.different else "not comparable"
    facts = {
        said: f"{found.url} {'holds' if found else 'does not hold' if found.different else 'may hold'} {found.source}",
        "engine": _engine(found.engine, found.release),
        "compared": f"{found.compared:,} of {total:,} parameters of all ranks: {found.equal:,} equal, "
        f"{len(found.different):,} different",
    }
    reasons = Counter(finding.what for finding in found.apart)
    facts |= {
        ("not compared" if at == 0 else " " * at): f"{count:,}: {what}" for at, (what, count) in enumerate(reasons.items())
    }
    yield from facts_in_lines(facts, width)
    if found.different:
        yield from _rows("different", found.different, width)
    if found.apart:
        yield from _rows("not comparable", found.apart, width)


def _rows(title: str, findings: Sequence[Finding], width: int | None) -> Iterator[str]:
    """Yield a table of findings, those of several ranks that are alike in one row."""
    alike: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        alike.setdefault((finding.name, finding.what), []).append(finding.rank)
    rows = [(name, " ".join(ranks), what) for (name, what), ranks in alike.items()]
    yield from table((title, "ranks", "what"), rows[:MOST], width)
    if len(rows) > MOST:
        yield f"and {len(rows) - MOST:,} more: --json lists them all"


def comparison_data(found: Comparison) -> dict[str, object]:
    """Return a comparison as plain values."""
    return {
        "equal": bool(found),
        "engine": found.engine,
        "engine version": found.release,
        "source": found.source,
        "asked": found.url,
        "parameters": {
            "compared": found.compared,
            "equal": found.equal,
            "different": len(found.different),
            "not comparable": len(found.apart),
        },
        "different": [asdict(finding) for finding in found.different],
        "not comparable": [asdict(finding) for finding in found.apart],
    }


def _engine(name: str, release: str) -> str:
    return f"{name}, with the names of its release {release}"

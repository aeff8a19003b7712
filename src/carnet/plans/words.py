"""What a word of an option may be: each list is asked for when it is needed, for most come from tables that --help need not read."""

from collections.abc import Iterable

from carnet.dialects.kinds import KINDS


def families() -> Iterable[str]:
    """Return the families."""
    from carnet.architectures.known import FAMILIES

    return [family.name for family in FAMILIES]


def programs() -> Iterable[str]:
    """Return the programs that write and read Megatron's checkpoints."""
    from carnet.dialects.megatron.programs import PROGRAMS

    return PROGRAMS


def schemes() -> Iterable[str]:
    """Return the schemes of codes, of any style."""
    from carnet.quantize.recipes import schemes

    return schemes()


def styles() -> Iterable[str]:
    """Return the styles."""
    from carnet.quantize.recipes import by_style

    return [*by_style()]


def embeddings() -> Iterable[str]:
    """Return how ranks of any kind may share the embedding."""
    return [*dict.fromkeys(way for kind in KINDS.values() for way in kind.embeddings)]


def releases() -> Iterable[str]:
    """Return the releases of engines whose names are known."""
    return [*dict.fromkeys(release for kind in KINDS.values() for release in kind.releases)]

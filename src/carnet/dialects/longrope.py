"""LongRoPE divides each frequency by a factor of its own, in longer texts by others, and multiplies all cosines and sines by one.

transformers/modeling_rope_utils.py _compute_longrope_parameters. TensorRT-LLM, which has the last by its rule alone:
tensorrt_llm/layers/attention.py create_attention_const_params, tensorrt_llm/functional.py RopeEmbeddingUtils.
"""

from collections.abc import Iterator
from math import log, sqrt

from carnet.dialects.configs import Spread
from carnet.dialects.senses import expect
from carnet.dialects.yarn import rounded
from carnet.model.fields import Condition, Config
from carnet.model.model import number, real, value

LONGROPE: Condition = {"rope_type": "longrope"}


def rotated(config: Config) -> int:
    """Return how much of a head is rotated, in whole dimensions."""
    return int(number(config, "head_dim") * real(config, "rope_percent"))


def factors(field: str, key: str, *others: str) -> Spread:
    """Write the row of a list of factors, one for each frequency."""

    def meaning(said: list[float] | None, config: Config) -> tuple[float, ...]:
        expect(said and len(said) == rotated(config) // 2, f"{rotated(config) // 2} numbers, one for each frequency")
        expect(all(said or ()), "factors that are not 0")
        return tuple(said or ())

    def choices(config: Config) -> list[list[float]]:
        found = value(config, field)
        return [[*found]] if isinstance(found, tuple) else []

    return Spread(field, key, list[float], meaning, choices, LONGROPE, others=tuple((other,) for other in others))


def hf(*tops: str) -> tuple[Spread, ...]:
    """Write the rows of transformers' words below the key that is written, and the others that are read."""
    (key, factor), *others = ((f"{top}.attention_factor", f"{top}.factor") for top in tops)
    return (
        factors("rope_short", *(f"{top}.short_factor" for top in tops)),
        factors("rope_long", *(f"{top}.long_factor" for top in tops)),
        Spread("rope_attention", key, (float, float), _of_hf, _hf_words, LONGROPE, (factor,), tuple(others)),
    )


def _of_hf(said: tuple[float | None, float | None], config: Config) -> float:
    given, factor = said
    return by_rule(config, factor) if given is None else rounded(given)


def _hf_words(config: Config) -> Iterator[tuple[float | None, None]]:
    """Yield nothing first: transformers 4 reads three keys and no more (configuration_phi3.py _rope_scaling_validation)."""
    yield from ((None, None), (real(config, "rope_attention"), None))


def by_rule(config: Config, factor: float | None = None) -> float:
    """Return the factor on cosines and sines that follows from how far a text is stretched."""
    original = number(config, "rope_original")
    stretched = number(config, "positions") / original if factor is None else factor
    if stretched <= 1:
        return 1.0
    expect(original > 1, "more than one position before stretching")
    return rounded(sqrt(1 + log(stretched) / log(original)))

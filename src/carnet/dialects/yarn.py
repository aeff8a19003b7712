"""YaRN multiplies cosines and sines by a factor, which programs say by other words, each by a rule of its own.

transformers/modeling_rope_utils.py _compute_yarn_parameters, with the scale of the scores in modeling_deepseek_v3.py yarn_apply_mscale;
megatron/core/models/common/embeddings/yarn_rotary_pos_embedding.py _yarn_get_concentration_factor.
"""

from collections.abc import Iterator
from math import log
from typing import Any

from carnet.dialects.configs import Spread
from carnet.dialects.senses import expect
from carnet.model.fields import Condition, Config
from carnet.model.model import real, value

YARN: Condition = {"rope_type": "yarn"}
DIGITS = 12  # of a factor that are looked at: more than f32 has, and words give it no better than that


def hf(*tops: str) -> Spread:
    """Write the row of transformers' words: the factor itself, or two words that count only together."""
    names = ("attention_factor", "mscale", "mscale_all_dim")
    first, *others = (tuple(f"{top}.{name}" for name in names) for top in tops)
    return Spread("rope_attention", first[0], (float,) * 3, _of_hf, _hf_words, YARN, first[1:], tuple(others))


def megatron(only: Condition, *others: tuple[str, str]) -> Spread:
    """Write the row of Megatron's two words, which count each for itself."""
    return Spread(
        "rope_attention", "mscale", (1.0, 0.0), _of_megatron, _megatron_words, only, more=("mscale_all_dim",), others=others
    )


def _of_hf(said: tuple[Any, ...], config: Config) -> float:
    given, mscale, every = said
    if given is not None:
        return rounded(given)
    return _ratio(config, mscale, every) if mscale and every else _ratio(config, 1.0, 0.0)


def _hf_words(config: Config) -> Iterator[tuple[object, ...]]:
    """Yield the words from which others than transformers make the same first: vLLM knows the factor by no word."""
    every = value(config, "rope_mscale_all") or None
    yield from ((None, word, every) for word in (_solved(config) if every else ()))
    yield None, None, every
    yield real(config, "rope_attention"), None, every


def _of_megatron(said: tuple[Any, ...], config: Config) -> float:
    return _ratio(config, *said)


def _megatron_words(config: Config) -> Iterator[tuple[float, ...]]:
    yield from ((word, real(config, "rope_mscale_all")) for word in _solved(config))


def _solved(config: Config) -> Iterator[float]:
    """Yield words for the numerator that give a factor, a short one first."""
    grown = log(max(real(config, "rope_factor"), 1.0)) / 10
    wanted = real(config, "rope_attention") * _grown(config, real(config, "rope_mscale_all")) - 1.0
    exact = wanted / grown if grown else 1.0
    yield from (*(round(exact, digits) for digits in (2, 4, 6, 9, DIGITS)), exact)


def _ratio(config: Config, numerator: float, denominator: float) -> float:
    below = _grown(config, denominator)
    expect(below, "a factor that is not by nothing")
    return rounded(_grown(config, numerator) / below)


def rounded(factor: float) -> float:
    """Return a factor as far as it is looked at."""
    return float(f"{factor:.{DIGITS}g}")


def _grown(config: Config, word: float) -> float:
    """Return what a word makes of the factor by which positions are stretched."""
    factor = real(config, "rope_factor")
    return 0.1 * word * log(factor) + 1.0 if factor > 1 else 1.0

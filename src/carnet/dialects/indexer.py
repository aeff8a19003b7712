"""Sparse attention: beside latent attention a small *indexer* scores all tokens, and a token sees those that score highest.

Layers may see what the one before them chose, and have no indexer then. transformers: modeling_deepseek_v32.py and, with layers that
share, modeling_glm_moe_dsa.py; Megatron: megatron/core/transformer/experimental_attention_variant/dsa.py.
"""

from collections.abc import Sequence

from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import row
from carnet.dialects.senses import expect
from carnet.model.fields import SET, Condition, Config
from carnet.model.model import number, several, value

INDEXER = LAYER + "self_attn.indexer."
ROWS = (
    row(INDEXER + "wq_b.weight", "(index_head index_dim) q_lora", "indexer.q"),
    row(INDEXER + "wk.weight", "index_dim hidden", "indexer.k"),
    row(INDEXER + "k_norm.weight", "index_dim", "indexer.k_norm"),
    row(INDEXER + "k_norm.bias", "index_dim", "indexer.k_norm_bias"),
    row(INDEXER + "weights_proj.weight", "index_head hidden", "indexer.weigh"),
)


def heads(said: int | None, config: Config) -> int:
    """Return how many heads an indexer has, which reads compressed queries."""
    expect(said and said > 0 and number(config, "q_lora"), "heads, beside queries that are compressed")
    return said or 0


def heads_said(config: Config) -> tuple[int]:
    """Return how many heads an indexer has."""
    return (number(config, "index_heads"),)


FIELDS: tuple[Field, ...] = (
    place("variant", default="dsa"),
    Spread("index_heads", "index_n_heads", int, heads, heads_said),
    place("index_dim", "index_head_dim"),
    place("index_topk", "index_topk"),
    place("index_norm_eps", default=1e-6),
)


def own(step: int, first: int, config: Config) -> tuple[int, ...] | None:
    """Return a mark a layer: the ``first`` have an indexer, then the last of every ``step``; None where all have one.

    >>> own(2, 1, {"layers": 4}), own(4, 3, {"layers": 7})
    ((1, 0, 1, 0), (1, 1, 1, 0, 0, 0, 1))
    """
    expect(step > 0 and first >= 0, "a step, and how many layers are before it")
    marks = tuple(int(max(layer + 1 - first, 0) % step == 0) for layer in range(number(config, "layers")))
    return _checked(marks, config)


def steps(config: Config) -> list[tuple[int, int]]:
    """Return the step and the number of first layers that may say which layers have an indexer."""
    marks = value(config, "index_layers")
    if not isinstance(marks, tuple):
        return [(1, 0)]
    first = marks.index(0)
    return [(marks.index(1, first) - first + 1 if 1 in marks[first:] else len(marks), first)]


def _checked(marks: Sequence[int], config: Config) -> tuple[int, ...] | None:
    expect(len(marks) == number(config, "layers") and marks[0], "a kind a layer, the first of them full")
    return tuple(marks) if 0 in marks else None


# what the families have in common besides: what all of their models have, the defaults of their classes, what has one value, and what
# their classes replace or never read
NEEDS: Condition = {"index_heads": SET, "q_lora": SET}
ABSENT: dict[str, object] = {"index_head_dim": 128, "index_topk": 2048, "n_shared_experts": 1, "norm_topk_prob": True}
ABSENT |= {"routed_scaling_factor": 2.5}
FIXED: dict[str, object] = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
FIXED |= {"attention_bias": False, "mlp_bias": False}
IGNORED = "head_dim layer_types index_share_for_mtp_iteration"

WORDS = ("shared", "full")
Said = tuple[list[str] | None, str | list[str] | None, int | None, int | None]


def _listed(said: Said, config: Config) -> tuple[int, ...] | None:
    """Return a mark a layer: as listed, or as a pattern says, or by a step; what is said twice must be the same."""
    listed, pattern, step, first = said
    words = [{"F": "full", "S": "shared"}.get(word, word) for word in pattern] if pattern is not None else None
    found = [_checked([*map(_mark, each)], config) for each in (listed, words) if each is not None]
    if step is not None or not found:
        found.append(own(step or 1, 2 if first is None else first, config))
    expect(all(each == found[0] for each in found), "the same layers, however they are said")
    return found[0]


def _mark(word: str) -> int:
    expect(word in WORDS, " or ".join(WORDS))
    return WORDS.index(word)


def _spelled(config: Config) -> list[Said]:
    """Return the list, with a step where one says the same: transformers reads the one, vLLM the other; nothing where all are full."""
    marks = several(config, "index_layers")
    if marks is None:
        return [(None, None, None, None)]
    words = [WORDS[mark] for mark in marks]
    stepped = [(words, None, *said) for said in steps(config) if own(*said, config) == marks]
    return [*stepped, (words, None, None, None)]


# configuration_glm_moe_dsa.py
SHARED = Spread(
    *("index_layers", "indexer_types", (list[str], str | list[str], int, int), _listed, _spelled),
    more=("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"),
)

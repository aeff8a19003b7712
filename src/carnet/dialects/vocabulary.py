"""How many tokens the vocabulary of a Megatron model has: the rows of its embedding without those that only pad it.

Megatron saves ``vocab_size``, which is what was typed as ``--vocab-size``, and ``padded_vocab_size``. The number of tokens is neither:
it is what the tokenizer counts, n, and it is forgotten. One rule ties it to what is stored, unless the padded size was given by hand::

    padded_vocab_size = n rounded up to a multiple of make_vocab_size_divisible_by x TP

TP is that of the run which first built the model: a later one keeps the padded size (_vocab_size_with_padding in
megatron/training/tokenizer/tokenizer.py at 0.16, since 0.17 megatron/core/tokenizers/utils/build_tokenizer.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from carnet.algebra.layout import round_up
from carnet.errors import BadCheckpoint, BadRequest, CarnetError
from carnet.model.fields import Config
from carnet.model.model import number, value

Json = Mapping[str, object]
MULTIPLE = 128  # make_vocab_size_divisible_by where nobody says it
MOST = 1 << 12  # ranks that share a layer, at most


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How many rows are tokens, and who says so."""

    tokens: int
    rows: int  # that are stored, with padding
    because: str  # for people

    @property
    def padding(self) -> int:
        """Return how many rows are left out."""
        return self.rows - self.tokens

    def __str__(self) -> str:
        if not self.padding:
            return f"{self.tokens:,} rows, none left out as padding"
        return f"{self.tokens:,} of {self.rows:,} rows, {self.padding:,} left out as padding ({self.because})"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What one of Megatron's tokenizers makes of --vocab-size."""

    old: int | None  # tokens that it counts on top of it, up to 0.17; None where it does not look at it
    new: int | None  # and since 0.18
    without: int | None = None  # tokens where --vocab-size is not given
    remark: str = ""


DEAF = Tokenizer(None, None, remark="its tokens are those of its files, whatever --vocab-size says")
TOKENIZERS = {
    # its end token is one more up to 0.17, the last one since: core/tokenizers/text/libraries/null_tokenizer.py
    "NullTokenizer": Tokenizer(1, 0, remark="--vocab-size, up to 0.17 and one more"),
    "NullMultimodalTokenizer": Tokenizer(1, 1, remark="--vocab-size and one more"),
    # CustomTikTokenizer in training/tokenizer/tokenizer.py; core/tokenizers/text/libraries/tiktoken_tokenizer.py
    "TikTokenizer": Tokenizer(0, 0, 1 << 17, remark="--vocab-size, or 131072"),
    # no program of Megatron's: whoever wrote these arguments says what he means
    None: Tokenizer(0, 0, remark="vocab_size"),
}
COUNTS_ANEW = "0.18"  # the first release of which ``new`` is true
# arguments that every run of one side saves and none of the other: megatron/training/arguments.py, training/config/training_config.py
OLD = ("tokenizer_hf_use_fast", "tokenizer_hf_include_special_tokens", "use_legacy_models")  # up to 0.17
NEW = ("pad_vocab_size", "tokenizer_hf_no_use_fast")  # since 0.18


def vocabulary(raw: Json, rows: int, where: str, *, counted: int | None = None, new: bool | None = None) -> Vocabulary:
    """Return the vocabulary that Megatron's arguments tell of a model with so many rows, or refuse what they leave open.

    ``counted``: how many tokens the tokenizer of --tokenizer has; ``new``: 0.18 or a later one built the model, where that is known.
    """
    typed, kind = _whole(raw.get("vocab_size")), raw.get("tokenizer_type")
    tokenizer = TOKENIZERS.get(kind, DEAF) if kind is None or isinstance(kind, str) else DEAF
    new = _is_new(raw) if new is None else new
    likely = _likely(tokenizer, typed, new, rows, raw)
    if len(likely) == 1:
        return Vocabulary(likely[0], rows, _because(kind, typed, likely[0]))
    if typed == rows:  # nothing would be left out
        return Vocabulary(rows, rows, f"vocab_size {rows} is what is stored")
    possible = tokenizer is DEAF or typed is None or counted in likely
    if counted is not None and counted <= rows and possible and _fits(counted, rows, raw, first=False):
        return Vocabulary(counted, rows, "the tokenizer")
    raise _open(raw, rows, where, tokenizer, likely, counted)


def padded_rows(tokens: int, ranks: int, multiple: int = MULTIPLE) -> int:
    """Return how many rows Megatron stores for a vocabulary that so many ranks share.

    >>> padded_rows(50257, 2)
    50432
    """
    return round_up(tokens, multiple * ranks)


def counts_anew(release: str) -> bool | None:
    """Say whether a release of Megatron-LM counts as 0.18 and later do; None of one that is not known."""
    return release >= COUNTS_ANEW if release else None


def by_config(config: Config) -> Vocabulary:
    """Return the vocabulary of a model whose config tells it."""
    tokens = number(config, "vocab")
    return Vocabulary(tokens, number(config, "padded_vocab") if value(config, "padded_vocab") else tokens, "the config")


def given(size: int, rows: int, where: str) -> Vocabulary:
    """Return the vocabulary that a person names with --vocab-size; refuse one that is larger than what is stored."""
    if size > rows:
        facts = {"where": where, "--vocab-size": size, "stored": f"{rows} rows"}
        raise BadRequest(f"--vocab-size {size} is more than the {rows} rows that are stored", facts, remedy=f"at most {rows}")
    return Vocabulary(size, rows, "--vocab-size")


def _whole(found: object) -> int | None:
    return found if type(found) is int and found > 0 else None


def _is_new(raw: Json) -> bool | None:
    """Say whether 0.18 or a later one saved these arguments, None where they do not tell."""
    old, new = (any(name in raw for name in names) for names in (OLD, NEW))
    return None if old == new else new


def _likely(tokenizer: Tokenizer, typed: int | None, new: bool | None, rows: int, raw: Json) -> list[int]:
    """Return how many tokens there may be: what the rule allows of this version and this TP, or else of others."""
    for version, first in ((new, True), (new, False), (None, True), (None, False)):
        fitting = {n for n in _counts(tokenizer, typed, version) if 0 < n <= rows and _fits(n, rows, raw, first=first)}
        if fitting:
            return sorted(fitting)
    return []


def _counts(tokenizer: Tokenizer, typed: int | None, new: bool | None) -> list[int]:
    if typed is None:
        return [] if tokenizer.without is None else [tokenizer.without]
    more = {tokenizer.old, tokenizer.new} if new is None else {tokenizer.new if new else tokenizer.old}
    return [typed + each for each in more if each is not None]


def _because(kind: object, typed: int | None, tokens: int) -> str:
    if kind is None:
        return f"vocab_size {tokens}"
    more = f" and {tokens - typed} more" if typed is not None and tokens > typed else ""
    return f"{kind} without --vocab-size" if typed is None else f"{kind}: --vocab-size {typed}{more}"


def _fits(tokens: int, rows: int, raw: Json, *, first: bool) -> bool:
    """Say whether so many tokens are padded to so many rows: by the saved run's TP, or any that divides the heads (not ``first``)."""
    unit, ranks = (_whole(raw.get(name)) for name in ("make_vocab_size_divisible_by", "tensor_model_parallel_size"))
    if unit is None:
        return True  # no rule
    heads = _whole(raw.get("num_attention_heads")) or 1
    others = (world for world in range(1, min(heads, rows // unit, MOST) + 1) if heads % world == 0)
    return any(padded_rows(tokens, world, unit) == rows for world in ([ranks or 1] if first else others))


def _open(raw: Json, rows: int, where: str, tokenizer: Tokenizer, likely: Sequence[int], counted: int | None) -> CarnetError:
    """Return why the number of tokens does not follow."""
    kind, typed = raw.get("tokenizer_type"), raw.get("vocab_size")
    unit, ranks = (raw.get(name) for name in ("make_vocab_size_divisible_by", "tensor_model_parallel_size"))
    facts: dict[str, object] = {"where": where}
    facts |= {} if kind is None else {"tokenizer": f"{kind!s:.80}: {tokenizer.remark or DEAF.remark}"}
    facts |= {"vocab_size": f"{typed!s:.80}", "stored": f"{rows} rows"}
    facts |= {} if unit is None else {"padded to": f"a multiple of {unit!s:.20} x {ranks!s:.20} (the TP of the run that began)"}
    facts |= {} if counted is None else {"--tokenizer": f"{counted} tokens"}
    if likely:
        facts["tokens"] = f"{likely[0]} of 0.18 and later, {likely[-1]} of 0.17 and older"
        remedy = f"--written-by megatron-lm==0.17, or ==0.18; or --vocab-size {likely[-1]}, or {likely[0]}"
        return BadRequest("the training arguments leave two sizes of the vocabulary open", facts, remedy=remedy)
    if tokenizer is DEAF or typed is None:
        remedy = "name the number of tokens with --vocab-size N, or the tokenizer's folder with --tokenizer"
        return BadRequest("the training arguments do not say how many tokens the vocabulary has", facts, remedy=remedy)
    remedy = f"name the number of tokens, at most {rows}, with --vocab-size N"
    return BadCheckpoint("the size of the vocabulary contradicts the rows that are stored", facts, remedy=remedy)

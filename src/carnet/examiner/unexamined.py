"""Every key of a target's configs is computed and compared, or it is named as not examined.

What the tables of a dialect write of this model is held against what the target says. A key that they read means what the canonical
fields mean, which are compared; of the others each must say what would be written, or what the source says. Keys that nothing depends
on are known by the tables.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from carnet.architectures.known import padded, types_of
from carnet.dialects.configs import Table, keys_of, lookup
from carnet.dialects.hf import GENERATION, generation
from carnet.dialects.megatron.providers import UNSAID
from carnet.dialects.writing import written
from carnet.errors import CarnetError
from carnet.examiner.compare import Finding
from carnet.formats.folder import CONFIG, INDEX
from carnet.formats.jsons import read_object
from carnet.formats.wrapped import MEANT_FOR
from carnet.inventory.survey import Inventory
from carnet.model.keys import equal, leaves
from carnet.model.model import value
from carnet.quantize.configs import BESIDE, Codes, with_codes
from carnet.quantize.reading import CONFIG_KEY, RECORD

Json = Mapping[str, object]

ARGUMENTS = "the training arguments"
NAMES = ("architectures", "model_type")  # of a Hugging Face config: which class loads it
ENDS = ("bos", "eos", "pad")
# modules that stay plain: beside.py compares what each file's list matches
EXCLUDED = {f"{CONFIG_KEY}.ignore", f"{CONFIG_KEY}.modules_to_not_convert", f"{RECORD}.exclude_modules"}
TOTALS = ("total_size", "total_parameters")  # of an index: containers.py compares them
# arguments that --use-checkpoint-args takes over, and that say which tokenizer a run has: megatron/training/checkpointing.py
TOKENIZER = ("tokenizer_type", "tokenizer_model", "tiktoken_pattern", "tiktoken_num_special_tokens", "tiktoken_special_tokens")


def check_words(source: Inventory, target: Inventory) -> Iterator[Finding]:
    """Yield what a target's configs say otherwise than they must, besides what its model is."""
    ours, theirs = source.checkpoint.config, target.checkpoint.config
    if source.dialect.kind.arguments and target.dialect.kind.arguments:
        both = [key for key in TOKENIZER if ours.get(key) is not None and theirs.get(key) is not None]
        yield from (_other(key, ARGUMENTS, ours[key], theirs[key]) for key in both if ours[key] != theirs[key])
    if not target.dialect.kind.companions:
        return
    for key, right in zip(NAMES, (([target.dialect.architecture],), types_of(target.dialect)), strict=True):
        if theirs.get(key) not in right:
            detail = f"expected {right[0]!r}, found {theirs.get(key)!r}"
            yield Finding("the config does not name the model's class", key, CONFIG, detail[:200])
    for end in ENDS:
        if value(source.config, end) is not None and value(target.config, end) is None:
            yield _other(f"{end}_token_id", CONFIG, value(source.config, end), None)
    if source.dialect.kind.companions:
        said, found = generation(ours), generation(theirs)
        yield from (_other(key, CONFIG, said.get(key), found.get(key)) for key in GENERATION if said.get(key) != found.get(key))


def _other(key: str, where: str, expected: object, found: object) -> Finding:
    return Finding("config differs", key, where, f"expected {expected!r}, found {found!r}"[:200])


def unexamined(source: Inventory, target: Inventory, vouched: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the keys of a target's configs that nothing was compared with: file -> keys.

    ``vouched`` are the files that someone else than the target says to be right, byte for byte.
    """
    table, found = target.dialect.table, dict(target.checkpoint.config)
    own = source.checkpoint.config if source.dialect.kind is target.dialect.kind else {}
    # what these words cannot say of a model has its findings, or stands in carnet's own
    said, _ = written(table, padded(target.dialect, target.config), target.family.traits, "")
    if target.dialect.kind.arguments:
        return _kept({ARGUMENTS: _strange(found, (said, own), _compared(table), {MEANT_FOR, UNSAID})}, vouched)
    beside, expected = found.pop(BESIDE, None), _with_codes(said, source, target)
    beside_expected = expected.pop(BESIDE, {})
    hf = target.dialect.kind.companions
    ignored = table.ignored - GENERATION.keys() if hf else table.ignored
    compared = {*NAMES, *EXCLUDED, *_compared(table)}
    left = {CONFIG: [*_strange(found, (expected, own), compared, ignored), *_lacking(found, expected, compared, table)]}
    if isinstance(beside, Mapping) and isinstance(beside_expected, Mapping):
        left[BESIDE] = [*_strange(beside, (beside_expected,), EXCLUDED, ()), *_lacking(beside, beside_expected, EXCLUDED)]
    if hf:
        left[INDEX] = _strange(_index(target), (_index(source),), (), ("weight_map",))
    return _kept(left, vouched)


def _kept(found: Mapping[str, Sequence[str]], vouched: Collection[str]) -> dict[str, tuple[str, ...]]:
    return {file: tuple(keys) for file, keys in found.items() if keys and file not in vouched}


def _compared(table: Table) -> set[str]:
    """Return the keys whose meaning is compared, as fields or with the values that are known."""
    return {key for row in table.rows for key in keys_of(row)} | {*table.guards}


def _with_codes(said: Json, source: Inventory, target: Inventory) -> dict[str, object]:
    """Return what a config says, with what the program of a style says of its codes, or the source of its own."""
    codes, key, own = target.said, target.dialect.kind.codes_key, source.checkpoint.config
    if codes is None:
        return dict(said)
    if codes == source.said:
        return {**said, **{each: own[each] for each in (key, BESIDE) if own.get(each) is not None}}
    if codes.recipe is None:  # of a record that stands there anyhow
        record = said.get(key)
        return (
            {**said, key: {**record, **({"kv_cache_quant_algo": "FP8"} if codes.cache else {})}}
            if isinstance(record, Mapping)
            else dict(said)
        )
    texts = with_codes(said, key, Codes(codes.recipe, (), codes.cache, codes.static))
    return {**texts.pop(CONFIG), **texts}


def _strange(found: Json, known: Sequence[Json], compared: Collection[str], ignored: Collection[str]) -> list[str]:
    """Return the keys that say something else than all who say it, and that nothing compares."""
    return [
        key
        for key in leaves(found)
        if key not in compared
        and key.split(".")[0] not in ignored
        and not any(equal(lookup(each, key), lookup(found, key)) for each in known)
    ]


def _lacking(found: Json, expected: Json, compared: Collection[str], table: Table | None = None) -> Iterator[str]:
    """Yield the keys that are expected and not there, but for those that a config may leave out: ``table`` knows them."""
    among = None if table is None else {*table.fixed, CONFIG_KEY, RECORD}
    for key in leaves(expected):
        needed = among is None or key in among or key.split(".")[0] in among
        if needed and key not in compared and lookup(found, key) is None:
            yield f"{key} (not there)"


def _index(of: Inventory) -> Json:
    """Return what an index says beside where the tensors are and how large they are together; nothing where there is none."""
    if INDEX not in {stamp.file for stamp in of.checkpoint.stamps}:
        return {}
    try:
        said = read_object(of.checkpoint.root, INDEX)
    except CarnetError:
        return {}
    inner = said.get("metadata")
    if not isinstance(inner, Mapping):
        return said
    return {**said, "metadata": {key: each for key, each in inner.items() if key not in TOTALS}}

"""What no crossing may pass over, for every family in every program's layout: each is refused by name, and leaves nothing behind."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

import carnet
from carnet.architectures.known import FAMILIES, SPELLED, dialect_of, recognise
from carnet.dialects.configs import Choice, Flagged, Place, Spread, Table
from carnet.dialects.kinds import KINDS
from carnet.errors import BadCheckpoint, CarnetError, NotSupported
from carnet.formats.detect import open_checkpoint
from carnet.inventory.survey import Inventory, take
from carnet.model.adapters import FIELD, TARGETS
from carnet.model.fields import BY_NAME, FIELDS
from carnet.model.model import canonical_shapes, matters, number
from tests.families.samples import MAYBE, SAMPLES, Model, cut, draw, family_of, fits, load, said, save, save_file

SPOKEN = [(name, dialect) for name, sample in SAMPLES.items() for dialect in sample.dialects.split()]
FILES = [pair for pair in SPOKEN if pair[1] != "megatron"]  # safetensors, which a test can damage tensor by tensor
SPOKEN_OF = {(family_of(name).name, dialect) for name, dialect in SPOKEN}
SPOKEN_OF |= {(family.name, name) for family in FAMILIES for name in KINDS if name != "megatron" and SPELLED[name](family)}
UNSPOKEN = [(name, dialect) for name in SAMPLES for dialect in KINDS if (family_of(name).name, dialect) not in SPOKEN_OF]
NONSENSE = "no such word"


def plain(name: str) -> Model:
    """Return a small model that every program of a sample can say, the same in every run."""
    return draw(name, Random(name), tuple(SAMPLES[name].dialects.split()))


def unsayable():
    """Yield what a sample's model may be in Hugging Face's layout, and in no other program's that says the plain one."""
    for name, dialect in SPOKEN:
        model = plain(name)
        for more in MAYBE:
            if fits(model.family, model.config, more, ("hf",)) and not fits(model.family, model.config, more, (dialect,)):
                yield name, dialect, more


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return the folder of a sample's checkpoint in a program's layout, made once."""
    made: dict[tuple[str, str], Path] = {}

    def find(name: str, dialect: str) -> Path:
        if (name, dialect) not in made:
            model, random, path = plain(name), Random(name), tmp_path_factory.mktemp("checkpoint") / dialect
            if dialect == "megatron":
                assert carnet.cross(find(name, "hf"), path, to="megatron", **cut(model, "megatron", random)).equal
            else:
                save(model, path, dialect, random, cut(model, dialect, random))
            made[name, dialect] = path
        return made[name, dialect]

    return find


def refused(source: Path, out: Path, **options) -> CarnetError:
    """Return why a crossing stops, before anything of the target is there."""
    out.parent.mkdir()
    with pytest.raises(CarnetError) as caught:
        carnet.cross(source, out, **options)
    assert [path.name for path in out.parent.iterdir()] == []
    return caught.value


# --- tensors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dialect"), SPOKEN)
def test_a_tensor_that_nobody_knows_is_refused_by_name(name, dialect, stored, tmp_path):
    source = shutil.copytree(stored(name, dialect), tmp_path / "source")
    if dialect == "megatron":
        stranger = renamed(source, "embedding.word_embeddings.weight", "embedding.work_embeddings.weight")
    else:
        path = min(source.glob("*.safetensors"))
        tensors = content(path)
        stranger = f"{max(tensors)}_of_nobody"
        save_file({**tensors, stranger: tensors[max(tensors)]}, path)
    error = refused(source, tmp_path / "target/out", to="hf")
    assert error.what == "the checkpoint holds a tensor that carnet does not know"
    assert str(error.facts["tensor"]).endswith(stranger)


@pytest.mark.parametrize(("name", "dialect"), SPOKEN)
def test_any_tensor_that_lacks_is_refused_by_name_unless_others_hold_all_of_it(name, dialect, stored):
    checkpoint = open_checkpoint(stored(name, dialect))
    whole = take(checkpoint)
    for key in one_of_each(whole):
        lost = holes(whole, key)
        without = replace(checkpoint, tensors={other: tensor for other, tensor in checkpoint.tensors.items() if other != key})
        if not lost:
            assert set(take(without).entries) == set(whole.entries) - {key}
            continue
        with pytest.raises(BadCheckpoint) as caught:
            take(without)
        assert caught.value.what in {f"the checkpoint lacks {tensor!r}" for tensor in lost}
        assert caught.value.facts["looked for"]


@pytest.mark.parametrize(("name", "dialect"), SPOKEN)
def test_a_target_is_not_begun_where_a_tensor_lacks(name, dialect, stored, tmp_path):
    source = shutil.copytree(stored(name, dialect), tmp_path / "source")
    whole = take(open_checkpoint(source))
    key = next(key for key, entry in whole.entries.items() if any(view.tensor == "final_norm" for view in entry.views))
    if dialect == "megatron":
        renamed(source, key[1], "optimizer.".ljust(len(key[1]), "x"))  # set aside as what is not a weight
    else:
        for path in source.glob("*.safetensors"):
            save_file({tensor: kept for tensor, kept in content(path).items() if tensor != key[1]}, path)
    assert refused(source, tmp_path / "target/out", to="hf").what == "the checkpoint lacks 'final_norm'"


@pytest.mark.parametrize(("name", "dialect"), SPOKEN)
def test_any_tensor_of_another_shape_is_refused_with_both_shapes(name, dialect, stored):
    checkpoint = open_checkpoint(stored(name, dialect))
    whole = take(checkpoint)
    for key in one_of_each(whole):
        shape = whole.entries[key].shape
        for dim in range(len(shape)):
            other = tuple(length + (at == dim) for at, length in enumerate(shape))
            tensors = {**checkpoint.tensors, key: replace(checkpoint.tensors[key], shape=other)}
            with pytest.raises(BadCheckpoint) as caught:
                take(replace(checkpoint, tensors=tensors))
            found = {fact: caught.value.facts[fact] for fact in ("tensor", "expected", "found")}
            assert found == {"tensor": "/".join(filter(None, key)), "expected": [*shape], "found": [*other]}


@pytest.mark.parametrize(("name", "dialect"), FILES)
def test_a_target_is_not_begun_where_a_shape_is_another(name, dialect, stored, tmp_path):
    source = shutil.copytree(stored(name, dialect), tmp_path / "source")
    path = min(source.glob("*.safetensors"))
    tensors = content(path)
    tensor = next(tensor for tensor, (_, shape, _) in tensors.items() if len(shape) == 2 and shape[0] != shape[1])
    dtype, shape, data = tensors[tensor]
    save_file({**tensors, tensor: (dtype, (*reversed(shape),), data)}, path)
    error = refused(source, tmp_path / "target/out", to="hf")
    assert str(error.facts["tensor"]).endswith(tensor)
    assert (error.facts["expected"], error.facts["found"]) == ([*shape], [*reversed(shape)])


# --- configs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dialect"), FILES)
def test_a_key_that_nobody_knows_is_refused_by_name(name, dialect, stored, tmp_path):
    source = shutil.copytree(stored(name, dialect), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "a_new_feature": True}))
    error = refused(source, tmp_path / "target/out", to="hf")
    assert error.what == "the config sets 'a_new_feature', which carnet does not know"


@pytest.mark.parametrize(("name", "dialect"), SPOKEN)
def test_any_key_that_is_set_to_nonsense_is_refused_by_name_unless_it_means_nothing_beside_the_others(name, dialect):
    model = plain(name)
    table = dialect_of(family_of(name), dialect).table
    config = said(model.family, dialect, model.config)
    meant = recognise(dialect, config, "a config", {})
    # Megatron's arguments are all there, whether they mean anything or not
    known = [key for key in keys(table) if table.closed or key in config or key in table.guards]
    assert len(known) > 12
    accepted = []
    for key in known:
        try:
            assert recognise(dialect, changed(config, key, NONSENSE), "a config", {}) == meant, key
            accepted.append(key)
        except CarnetError as error:
            assert key in str(error), key
    assert len(accepted) < len(known) / 4


@pytest.mark.parametrize(("name", "dialect"), SPOKEN)
def test_any_field_that_a_program_has_no_place_for_is_refused_by_name(name, dialect):
    model, family = plain(name), family_of(name)
    placed = {field for row in dialect_of(family, dialect).table.rows for field in fields(row)} | family.traits.keys()
    strange = [field for field in FIELDS if field.name not in placed and not (field.storage or field.soft)]
    assert strange
    for field in strange:
        odd = {
            bool: field.neutral is False,
            int: (3,) * number(model.config, "layers") if field.many else 3,
            float: 2.5,
            str: json.dumps({TARGETS: {}}) if field.name == FIELD else "odd",
        }[field.kind]
        other = {**model.config, "positions": 99, field.name: odd}  # within a window
        if matters(other, field.name):
            with pytest.raises(NotSupported) as caught:
                said(model.family, dialect, other)
            # layers that a config describes one by one may be what cannot be said
            assert caught.value.what.endswith((f"has no place for {field.name!r}", "cannot say blocks"))


@pytest.mark.parametrize(
    ("name", "dialect", "more"), [pytest.param(*each, id=f"{each[0]}-{each[1]}-{each[2]}") for each in unsayable()]
)
def test_a_target_is_not_begun_where_its_config_cannot_say_the_model(name, dialect, more, tmp_path):
    model = plain(name)
    source = save(replace(model, config={**model.config, **more}), tmp_path / "source", "hf", Random(name), {})
    error = refused(source, tmp_path / "target/out", to=dialect)
    assert isinstance(error, NotSupported)
    assert named(error)


@pytest.mark.parametrize(("name", "dialect"), UNSPOKEN)
def test_a_program_that_cannot_say_a_family_is_refused_with_the_family_or_the_field(name, dialect, stored, tmp_path):
    error = refused(stored(name, "hf"), tmp_path / "target/out", to=dialect)
    assert isinstance(error, NotSupported)
    assert plain(name).family in str(error) or named(error)


# --- tools ---------------------------------------------------------------------------------------------------------------------


def named(error: CarnetError) -> list[str]:
    """Return the canonical fields that an error names, as words of its first line or as labels of its facts."""
    words = re.findall(r"\w+", f"{error.what} {error.facts.get('field', '')}")
    return [field for field in BY_NAME if field in words or field in error.facts]


def one_of_each(whole: Inventory):
    """Return the first stored tensor of each kind: layers, experts and ranks have the same again."""
    found: dict[str, tuple[str, str]] = {}
    for key in whole.entries:
        found.setdefault(re.sub(r"\d+", "0", key[1]), key)
    return found.values()


def holes(whole: Inventory, key: tuple[str, str]) -> set[str]:
    """Return the canonical tensors of which nobody else holds all."""
    shapes: dict[str, tuple[int, ...]] = {**canonical_shapes(whole.config)}
    lost = set()
    for tensor in {view.tensor for view in whole.entries[key].views}:
        held = np.zeros(shapes[tensor], bool)
        for other, entry in whole.entries.items():
            for view in entry.views:
                if other != key and view.tensor == tensor:
                    held[tuple(slice(s, s + n) for s, n in zip(view.box.start, view.box.shape, strict=True))] = True
        lost |= set() if held.all() else {tensor}
    return lost


def content(path: Path):
    """Return the tensors of one file."""
    return {name.split("/")[-1]: tensor for name, tensor in load(path.parent, path.name).items()}


def renamed(folder: Path, name: str, other: str) -> str:
    """Write another name of the same length wherever a checkpoint of Megatron says this one."""
    assert len(name) == len(other)
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes().replace(name.encode(), other.encode()))
    return other


def keys(table: Table) -> list[str]:
    """Return every key that a table reads."""
    return sorted({key for row in table.rows for key in keys_of(row)} | {*table.fixed, *table.guards})


def keys_of(row: Place | Choice | Flagged | Spread) -> tuple[str, ...]:
    match row:
        case Place():
            return row.keys
        case Choice():
            return tuple(key for key, _ in row.keys)
        case Spread():
            return (row.key, *row.more)
        case Flagged():
            return (row.key, row.flag)


def fields(row: Place | Choice | Flagged | Spread) -> tuple[str, ...]:
    return row.fields if isinstance(row, Choice) else (row.field,)


def changed(config, key: str, word: object):
    """Return a config with another value under a dotted key."""
    first, _, rest = key.partition(".")
    inner = config.get(first)
    return {**config, first: changed(inner if isinstance(inner, dict) else {}, rest, word) if rest else word}

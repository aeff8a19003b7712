"""The code of docs/add-a-layer-kind.md stands in the files that it names, and leaves out nothing of the kind of layer."""

import re
from importlib import import_module
from pathlib import Path

from carnet.architectures.qwen3_next import QWEN3_NEXT
from carnet.dialects.configs import place
from carnet.dialects.megatron.rows import MEGATRON
from carnet.dialects.rows import MODULE
from carnet.model.fields import FIELDS
from carnet.model.tensors import AXES, TENSORS

PAGE = Path(__file__).parents[2] / "docs/add-a-layer-kind.md"
BLOCKS = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def made(name, what):
    """Return what a block of the page makes, run in the namespace of the file that it is a part of."""
    (code,) = (code for module, code in BLOCKS if module == name)
    space = {"place": place, **vars(import_module(name))}
    exec(code, space)
    return [*space[what]]


def without(found, table):
    return [row for row in found if row not in table]


def test_every_block_names_its_file():
    assert len(BLOCKS) == PAGE.read_text().count("```python")


def test_the_facts_are_all_that_there_are():
    assert made("carnet.model.fields", "FIELDS") == [field for field in FIELDS if field.of == "G"]


def test_the_tensors_are_all_that_there_are_and_have_these_axes():
    assert made("carnet.model.tensors", "TENSORS") == [tensor for tensor in TENSORS if tensor.part.startswith("gdn.")]
    axes = made("carnet.model.tensors", "NEW_AXES")
    assert without(axes, AXES.values()) == []
    needed = {axis for tensor in TENSORS if tensor.part.startswith("gdn.") for axis in tensor.axes}
    assert needed == {axis.name for axis in axes} | {"value", "hidden"}


def test_the_names_are_all_that_either_program_has():
    for dialect, module in ((MEGATRON, "carnet.dialects.megatron.rows"), (QWEN3_NEXT.hf, "carnet.architectures.qwen3_next")):
        shown = made(module, "ROWS")
        assert without(shown, dialect.rows) == []
        own = [row for row in dialect.rows if row.pattern.parts[0][0].startswith("gdn.") and row.written != MODULE]
        assert without(own, shown) == []


def test_the_arguments_stand_in_megatron_s_table():
    assert without(made("carnet.dialects.megatron.table", "FIELDS"), MEGATRON.table.rows) == []

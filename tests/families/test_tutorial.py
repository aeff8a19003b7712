"""The code of docs/add-a-family.md does what its text says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import carnet
from carnet.architectures.family import Family
from carnet.architectures.qwen import QWEN3
from carnet.dialects.configs import read
from carnet.dialects.entries import entries
from carnet.dialects.writing import write
from carnet.model.fields import BY_NAME

PAGE = Path(__file__).parents[2] / "docs/add-a-family.md"
CODE = "\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL))
SOURCE = Path(carnet.__file__).parent
OTHERS = {"__init__.py", "__main__.py", "known.py", "wrappers.py"}  # of the architectures, those that are no family
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}


def test_the_family_of_the_tutorial_is_qwen3_in_under_25_lines():
    made = {}
    exec(CODE, made)
    family = made["FAMILY"]
    assert isinstance(family, Family)
    assert len([line for line in CODE.splitlines() if line.strip() and "import" not in line]) < 25
    config = {**family.traits, **read(family.hf.table, CONFIG, "a config")}
    theirs = {**QWEN3.traits, **read(QWEN3.hf.table, CONFIG, "a config")}
    assert config == {name: said for name, said in theirs.items() if name in config or said != BY_NAME[name].neutral}
    tensors = [(entry.name, entry.shape, entry.views) for entry in entries(family.hf, config, None)]
    assert sorted(tensors) == sorted((e.name, e.shape, e.views) for e in entries(QWEN3.hf, config, None))
    assert ("model.layers.2.self_attn.q_norm.weight", (16,)) in [tensor[:2] for tensor in tensors]
    ours, there = write(family.hf.table, config, family.traits, "x"), write(QWEN3.hf.table, config, QWEN3.traits, "x")
    assert ours == {key: said for key, said in there.items() if said is not None}


def helpers(tree: ast.AST) -> Iterator[str]:
    """Yield what a family's file takes from carnet: names that it imports, and what it asks imported modules for."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("carnet"):
            names = {each.name for each in node.names}
            modules |= names if node.module == "carnet.dialects" else set()
            yield from names if node.module != "carnet.dialects" else ()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield node.attr


def test_the_page_names_every_helper_that_a_family_uses():
    files = [path for path in (SOURCE / "architectures").glob("*.py") if path.name not in OTHERS]
    used = {name for path in files for name in helpers(ast.parse(path.read_text()))}
    assert len(used) > 50
    assert used - set(re.findall(r"\b\w+\b", PAGE.read_text())) == set()

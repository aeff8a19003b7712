"""What carnet has in place of megatron-core's own lies where it lies there: a script changes the prefix of its imports alone."""

import ast
import importlib
import inspect
import pkgutil
from enum import EnumMeta
from pathlib import Path

import pytest
from megatron.core import export
from megatron.core.post_training import modelopt

pytestmark = pytest.mark.referee

MODULES = [
    *(each.name for each in pkgutil.walk_packages(export.__path__, f"{export.__name__}.")),
    *(each.name for each in pkgutil.walk_packages(modelopt.__path__, f"{modelopt.__name__}.") if each.name.endswith("_specs")),
]
LEFT_OUT = {  # carnet shows no bar, needs no stand-in for a module, and builds the spec of training when it is asked for
    *("HAVE_TQDM", "tensorrt_llm", "hybrid_stack_spec_no_moe_grouped_gemm"),
}


def ours(module):
    return importlib.import_module(module.replace("megatron.core.", "carnet.megatron.", 1))


def public(module):
    """Yield what a module defines itself, be it in a branch."""
    for node in ast.walk(ast.parse(Path(inspect.getsourcefile(module)).read_text())):
        match node:
            case ast.ClassDef() | ast.FunctionDef() if hasattr(module, node.name):
                yield node.name
            case ast.Assign(targets=[ast.Name(id=name)]) if hasattr(module, name):
                yield name


def parameters(called):
    return [(each.name, each.kind, each.default) for each in inspect.signature(called).parameters.values()]


def assert_same_call(ours, theirs):
    found, expected = parameters(ours), parameters(theirs)
    assert found[: len(expected)] == expected
    assert all(
        default is not inspect.Parameter.empty for *_, default in found[len(expected) :]
    )  # carnet's own, and a later release's


def assert_same(ours, theirs):
    if isinstance(theirs, EnumMeta):
        assert {each.name: each.value for each in ours} == {each.name: each.value for each in theirs}
    elif inspect.isclass(theirs) or inspect.isfunction(theirs):
        assert_same_call(ours, theirs)
    else:
        assert type(ours) is type(theirs)
    methods = inspect.getmembers(theirs, inspect.isroutine) if inspect.isclass(theirs) else ()
    for name, each in methods:
        if not name.startswith("_") and name in vars(theirs):
            assert_same_call(getattr(ours, name), each)


def test_modules_are_found():
    assert len(MODULES) > 12


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_of_megatrons_is_at_its_place_and_is_called_alike(name):
    theirs = importlib.import_module(name)
    for each in sorted({*public(theirs)} - LEFT_OUT):
        if not each.startswith("_"):
            assert_same(getattr(ours(name), each), getattr(theirs, each))


def test_a_difference_is_seen():
    with pytest.raises(AssertionError):
        assert_same_call(lambda a, b=1: 0, lambda a, b=2: 0)
    with pytest.raises(AssertionError):
        assert_same_call(lambda a, b=1, *, c: 0, lambda a, b=1: 0)

"""Which modules a config names as not quantized, or as quantized, read as the program of the style reads its lists.

compressed-tensors 0.19 utils/match.py: a name is one module, an expression begins with "re:", a class has a name of its own. ModelOpt's
names are patterns (vLLM's modelopt.py), TensorRT-LLM's too (quantization/quantize.py quantize_layers); these and DeepSeek's
(transformers quantizers/quantizers_utils.py should_convert_module) name what lies below them as well.
"""

import re
from collections.abc import Callable, Collection
from fnmatch import translate

from carnet.quantize.reading import Said
from carnet.quantize.styles import Style

# the accused wrote the expression: one that repeats what repeats, or often, takes longer to match than anybody waits
SLOW, REPEATS = re.compile(r"\)[*+{]"), re.compile(r"(?<!\()[*+?{]")
NEVER = re.compile(r"(?!)")
CLASS = re.compile(r"[A-Z]\w*")  # "Linear": every module that is looked at here is of one


def naming(style: Style, names: Collection[str]) -> Callable[[str], bool]:
    """Return what says whether a list names the module of a weight, or one that holds a parameter of its own.

    >>> from carnet.quantize.styles import STYLES
    >>> named = naming(STYLES["modelopt"], ["lm_head", "layers.0.mlp*"])
    >>> named("lm_head.weight"), named("layers.0.mlp.up.weight"), named("layers.0.attn.q.weight")
    (True, True, False)
    """
    exact = {name for name in names if not name.startswith("re:")}
    expressions = [_expression(name[3:]) for name in names if name.startswith("re:")]
    if not style.one_module and (patterns := [translate(name) for name in exact if set(name) & set("*?[")]):
        expressions.append(re.compile("|".join(patterns)))

    def named(weight: str) -> bool:
        module = weight.removesuffix(".weight")
        own = [module] if module != weight else [module, module.rpartition(".")[0]]
        above = [] if style.one_module else [module[:at] for at, letter in enumerate(module) if letter == "."]
        matched = own + above if style.reaches else own
        return any(each.match(name) for each in expressions for name in matched) or not exact.isdisjoint(own + above)

    return named


def _expression(text: str) -> re.Pattern[str]:
    """Compile an expression; one that makes no sense or might take for ever matches nothing."""
    try:
        return NEVER if SLOW.search(text) or len(REPEATS.findall(text)) > 4 else re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return NEVER


def excluding(said: Said) -> Callable[[str], str | None]:
    """Return what names the words of a config that say that a weight is not quantized, None where none do."""
    lists = [(file, names, naming(said.style, names)) for file, names in said.lists.items()]
    aimed = naming(said.style, said.targets)
    all_linear = not said.targets or any(CLASS.fullmatch(target) for target in said.targets)

    def excluded(weight: str) -> str | None:
        for file, names, named in lists:
            if named(weight):
                return next(f"{name!r} in {file}" for name in names if naming(said.style, (name,))(weight))
        return None if all_linear or aimed(weight) else "no target has its name"

    return excluded

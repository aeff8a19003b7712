"""What a config says about quantized weights, read back: the recipe, or a refusal that names what is not known.

A key that is not known stops here, as in the configs of families: a number format that is read wrongly gives weights that look right.
Facts: modelopt 0.47 torch/export/convert_hf_config.py (hf_quant_config.json and its flat form in config.json), compressed-tensors 0.19
quantization/quant_config.py and quant_args.py, the config.json of DeepSeek's and OpenAI's published models, TensorRT-LLM's QuantConfig.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from carnet.errors import BadCheckpoint, NotSupported
from carnet.quantize.configs import ALGORITHMS, ARGUMENTS, BESIDE, BITS, CONFIG, GROUPS, PRESSED, WEIGHTS_ALONE
from carnet.quantize.recipes import BY_NAME, Recipe
from carnet.quantize.styles import STYLES, Style

Json = Mapping[str, object]

CONFIG_KEY, RECORD = "quantization_config", "quantization"  # where a config.json says it, and a rank's

# ways out of a refusal; a config that is given stands in place of config.json and of modelopt's file
ANEW = "cross the weights that these were made of, as they were before"
BY_TRANSFORMERS = (
    "dequantize it with transformers: from_pretrained(DIR, quantization_config={}(dequantize=True)), then "
    "save_pretrained(OUT, save_original_format=False); OUT is plain"
)
PRESSED_TOO, FP8_TOO = (BY_TRANSFORMERS.format(name) for name in ("CompressedTensorsConfig", "FineGrainedFP8Config"))
MENDED = "--config with a config.json that says it as it is"
WITHOUT = "--config with a config.json without it, if it changes no weight"
NO_CACHE = "--config with a config.json that says nothing of the cache: the weights are read without it"


@dataclass(frozen=True, slots=True)
class Said:
    """What a config says about quantized weights."""

    style: Style
    recipe: Recipe | None  # None where the cache alone has scales, or modules have recipes of their own
    static: bool  # the scale of activations is stored
    cache: bool  # scales of an FP8 cache of keys and values are stored
    lists: Mapping[str, tuple[str, ...]]  # file -> the modules that it names as not quantized
    targets: tuple[str, ...] = ()  # the modules that alone are quantized; all linear ones where none is named
    each: Mapping[str, Recipe] = field(default_factory=dict)  # module, or what it is part of -> its own recipe

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """Return the recipes of all modules, each once."""
        return (self.recipe,) if self.recipe else tuple(dict.fromkeys(self.each.values()))

    @property
    def coded_as(self) -> str:
        """Name them."""
        return ", ".join(recipe.name for recipe in self.recipes)

    def recipe_of(self, name: str) -> Recipe | None:
        """Return the recipe of a stored tensor's module."""
        if not self.each:
            return self.recipe
        ends = [at for at, letter in enumerate(name) if letter == "."]
        return next((self.each[name[:at]] for at in reversed(ends) if name[:at] in self.each), None)


def plain(key: str, config: Json) -> Json:
    """Return a config without what it says under ``key`` about quantized weights: the family's tables know nothing of that."""
    return READERS[key][1](config) if key else config


def read(key: str, config: Json, where: str) -> Said | None:
    """Return what a config says under ``key``, None where it says nothing; raise NotSupported where that is not known."""
    return READERS[key][0](config, where) if key else None


def _plain_folder(config: Json) -> Json:
    return {key: value for key, value in config.items() if key not in (CONFIG_KEY, BESIDE)}


def _plain_ranks(config: Json) -> Json:
    record = config.get(RECORD)
    return (
        {**config, RECORD: {**record, "quant_algo": None, "kv_cache_quant_algo": None}}
        if isinstance(record, Mapping)
        else config
    )


def _of_folder(config: Json, where: str) -> Said | None:
    found = {key: _hf(_record(config, key, where), key, where) for key in (CONFIG_KEY, BESIDE) if config.get(key) is not None}
    silent, spoken = found.get(CONFIG_KEY), found.get(BESIDE)
    if silent and spoken and spoken.cache and silent.each:
        found[CONFIG_KEY] = replace(silent, cache=True)  # of mixed precision modelopt 0.37 says the cache in its own file alone
    facts = {key: _facts(said) for key, said in found.items()}
    if len({*facts.values()}) > 1 or len({_modules(said) for said in found.values()}) > 1:
        what = f"config.json and {BESIDE} disagree about the quantized weights"
        raise BadCheckpoint(what, {"where": where, **facts}, remedy=MENDED)
    said = [each for each in found.values() if each is not None]
    return replace(said[0], lists={file: names for each in said for file, names in each.lists.items()}) if said else None


def _facts(said: Said | None) -> str:
    if said is None:
        return "nothing is quantized"
    weights = said.coded_as or "plain weights"
    return f"{weights}, {'with' if said.cache else 'without'} scales of the cache"


def _modules(said: Said | None) -> frozenset[tuple[str, str]]:
    return frozenset((module, recipe.name) for module, recipe in said.each.items()) if said else frozenset()


def _record(config: Json, key: str, where: str) -> Json:
    found = config[key]
    if not isinstance(found, Mapping):
        raise BadCheckpoint(f"{key} is not a record", {"where": where, "found": repr(found)[:80]}, remedy=MENDED)
    return found


def _hf(record: Json, key: str, where: str) -> Said | None:
    method = record.get("quant_method")
    if method == "compressed-tensors":
        return _pressed(record, where)
    if method == "fp8":
        return _deepseek(record, where)
    if method == "mxfp4":
        return _openai(record, where)
    if method in (None, "modelopt") and (key == BESIDE or "quant_algo" in record or "quantization" in record):
        return _modelopt(record, key, where)
    if method == "modelopt":
        raise BadCheckpoint(f"{key} has no quant_algo", {"where": where, "found": ", ".join(record)[:120]}, remedy=MENDED)
    raise _unknown(f"{key}.quant_method", method, where, ("modelopt", "compressed-tensors", "fp8", "mxfp4"))


def _unknown(key: str, found: object, where: str, known: Sequence[object], remedy: str = ANEW) -> NotSupported:
    facts = {"where": where, "found": repr(found)[:120], "known": ", ".join(map(str, known))}
    return NotSupported(f"carnet does not know this {key}", facts, remedy=remedy)


def _closed(record: Json, known: Collection[str], key: str, where: str) -> None:
    for name in record:
        # null, false or nothing asks for nothing: programs write all fields of a class, those of later versions too
        if name not in known and record[name]:
            facts = {"where": where, "found": repr(record[name])[:120]}
            raise NotSupported(f"carnet does not know the config field {f'{key}.{name}'!r}", facts, remedy=WITHOUT)


def _only(record: Json, key: str, where: str, values: Mapping[str, Collection[object]], remedy: str = ANEW) -> None:
    """Refuse a field that has another value than those known; one that is not there passes."""
    for name, known in values.items():
        if name in record and not any(record[name] == value and type(record[name]) is type(value) for value in known):
            raise _unknown(f"{key}.{name}", record[name], where, [repr(value) for value in known], remedy)


def _names(record: Json, key: str, where: str) -> tuple[str, ...]:
    found = record.get(key) or ()
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise BadCheckpoint(f"{key} is not a list of names", {"where": where, "found": repr(found)[:80]}, remedy=MENDED)
    return tuple(found)


def _algorithm(record: Json, style: str, key: str, where: str) -> Recipe | None:
    """Return the recipe of a ``quant_algo``."""
    algorithm = record.get("quant_algo")
    if algorithm is None:
        return None
    spelled = {**{word: scheme for scheme, word in ALGORITHMS.items()}, **WEIGHTS_ALONE}
    known = {word: scheme for word, scheme in spelled.items() if f"{style}/{scheme}" in BY_NAME}
    meant = (scheme for word, scheme in known.items() if isinstance(algorithm, str) and word.lower() == algorithm.lower())
    scheme = next(meant, None)
    if scheme is None:
        raise _unknown(f"{key}.quant_algo", algorithm, where, [*known])
    return BY_NAME[f"{style}/{scheme}"]


OF_RECORD = "quant_algo kv_cache_quant_algo exclude_modules group_size has_zero_point pre_quant_scale".split()
FLAT = "quant_algo quant_method producer ignore config_groups kv_cache_scheme".split()


def _modelopt(record: Json, key: str, where: str) -> Said | None:
    """Read hf_quant_config.json, whose record is one level down (in a config.json, too), or the flat form that config.json has."""
    file = BESIDE if key == BESIDE else CONFIG
    if "quantization" in record:
        _closed(record, ("producer", "quant_method", "quantization"), key, where)
        inner, key = _record(record, "quantization", where), f"{key}.quantization"
        each = _each(inner, key, where)
        recipe = None if each else _algorithm(inner, "modelopt", key, where)
        _closed(inner, [*OF_RECORD, *((LAYERS,) if each else ())], key, where)
        ignored, cache = _names(inner, "exclude_modules", where), inner.get("kv_cache_quant_algo")
        _cache_word(inner, "kv_cache_quant_algo", key, where)
    else:
        inner, each = record, _each(record, key, where)
        recipe = None if each else _algorithm(record, "modelopt", key, where)
        _closed(inner, [*FLAT, *OF_RECORD, *((LAYERS,) if each else ())], key, where)
        ignored = _names(inner, "ignore", where) or _names(inner, "exclude_modules", where)
        _cache_word(inner, "kv_cache_quant_algo", key, where)
        cache = inner.get("kv_cache_quant_algo") or _cache(inner, key, where)
    _only(inner, key, where, {"has_zero_point": (None, False), "pre_quant_scale": (None, False)})
    if recipe is not None:
        _only(inner, key, where, {"group_size": (None, GROUPS.get(recipe.scheme))})
    for name, group in _groups(inner, key, where):
        _group_of(recipe, each, group, name, where)
    said = Said(STYLES["modelopt"], recipe, _has_inputs(inner, each), bool(cache), {file: ignored}, (*each,), each)
    return said if said.recipes or cache else None


LAYERS = "quantized_layers"


def _each(record: Json, key: str, where: str) -> dict[str, Recipe]:
    """Return the recipe of each module, or of what modules are part of, where a model has several."""
    if str(record.get("quant_algo")).upper() != "MIXED_PRECISION" or record.get(LAYERS) is None:
        return {}
    found: dict[str, Recipe] = {}
    key = f"{key}.{LAYERS}"
    for module, said in _record(record, LAYERS, where).items():
        own = _record({module: said}, module, where)
        recipe = _algorithm(own, "modelopt", f"{key}.{module}", where)
        _closed(own, ("quant_algo", "group_size"), f"{key}.{module}", where)
        if recipe is not None:
            _only(own, f"{key}.{module}", where, {"group_size": (None, GROUPS.get(recipe.scheme))})
            found[_unmarked(module)] = recipe
    return found


def _unmarked(module: str) -> str:
    """Return a name without the mark that modelopt 0.47 lets stand behind those of Nemotron-H."""
    return module.partition(".\0")[0]


def _has_inputs(record: Json, each: Mapping[str, Recipe]) -> bool:
    """Say whether activations have scales that are stored."""
    layers = record[LAYERS] if each else {}
    said = [record, *(layers.values() if isinstance(layers, Mapping) else ())]
    algorithms = {own["quant_algo"] for own in said if isinstance(own, Mapping) and isinstance(own.get("quant_algo"), str)}
    return any(algorithm.upper() == ALGORITHMS[scheme] for algorithm in algorithms for scheme in STYLES["modelopt"].inputs)


def _group_of(recipe: Recipe | None, each: Mapping[str, Recipe], group: Json, name: str, where: str) -> None:
    """Refuse a group of modules whose numbers are not those of its recipe."""
    recipes = {each.get(_unmarked(module)) for module in _names(group, "targets", where)} if each else {recipe}
    if len(recipes) > 1 or (each and None in recipes):
        raise BadCheckpoint(f"{name} and {LAYERS} disagree about the quantized weights", {"where": where}, remedy=MENDED)
    weights = group.get("weights")
    for one in recipes - {None} if isinstance(weights, Mapping) else ():
        assert isinstance(weights, Mapping)
        assert one is not None
        bits = {"num_bits": (BITS.get(one.scheme),), "group_size": (None, GROUPS.get(one.scheme)), "type": ("float",)}
        if one.scheme in BITS:
            _only(weights, f"{name}.weights", where, {**bits, "dynamic": (False,)})


def _groups(record: Json, key: str, where: str) -> list[tuple[str, Json]]:
    groups = record.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        facts = {"where": where, "found": repr(groups)[:80]}
        raise BadCheckpoint(f"{key}.config_groups is not a record of groups", facts, remedy=MENDED)
    return [(f"{key}.config_groups.{name}", group) for name, group in groups.items()]


def _cache_word(record: Json, name: str, key: str, where: str) -> None:
    """Refuse a word for the numbers of the cache other than FP8's: the scales of other caches mean something else."""
    found = record.get(name)
    if found is not None and (not isinstance(found, str) or found.lower() != "fp8"):
        facts = {"where": where, "field": f"{key}.{name}", "known": "FP8"}
        what = f"the cache of keys and values is {found!r}, whose scales carnet does not know"
        raise NotSupported(what, facts, remedy=NO_CACHE)


def _cache(record: Json, key: str, where: str) -> bool:
    """Say whether ``kv_cache_scheme`` asks for FP8, one scale a tensor; nothing else is known."""
    if isinstance(record.get("kv_cache_scheme"), str):  # a word in place of the record
        _cache_word(record, "kv_cache_scheme", key, where)
        return True
    if record.get("kv_cache_scheme") is None:
        return False
    scheme = _record(record, "kv_cache_scheme", where)
    numbers: dict[str, Collection[object]] = {"num_bits": (8,), "type": ("float",), "dynamic": (False,)}
    _closed(scheme, ARGUMENTS, f"{key}.kv_cache_scheme", where)
    _only(scheme, f"{key}.kv_cache_scheme", where, {**numbers, "strategy": ("tensor",), "symmetric": (True,)}, NO_CACHE)
    return True


OF_DEEPSEEK = """activation_scheme fmt quant_method weight_block_size modules_to_not_convert scale_fmt expert_dtype
    dequantize""".split()


def _deepseek(record: Json, where: str) -> Said:
    key = CONFIG_KEY
    _closed(record, OF_DEEPSEEK, key, where)
    # "ue8m0" says that the scales are powers of two; they are stored as f32 all the same
    blocks = record.get("weight_block_size", "")  # what its absence means differs from program to program
    static = blocks is None and record.get("activation_scheme") == "static"
    wanted: dict[str, Collection[object]] = {
        "activation_scheme": ("dynamic", *(["static"] if static else [])),
        "fmt": (None, "e4m3", "float8_e4m3fn"),
        "scale_fmt": (None, "float", "ue8m0"),
        "expert_dtype": (None, "fp8"),
        "dequantize": (None, False),
    }
    _only(record, key, where, wanted, FP8_TOO)
    if blocks not in ([128, 128], None):
        raise _unknown(f"{key}.weight_block_size", blocks, where, ([128, 128], None), FP8_TOO)
    lists = {CONFIG: _names(record, "modules_to_not_convert", where)}
    recipe = BY_NAME["deepseek/fp8-block" if blocks else "deepseek/fp8"]
    return Said(STYLES["deepseek"], recipe, static=static, cache=False, lists=lists)


def _openai(record: Json, where: str) -> Said:
    # "dequantize" is a wish of whoever loads it: transformers' Mxfp4Config
    _closed(record, ("quant_method", "modules_to_not_convert", "dequantize"), CONFIG_KEY, where)
    lists = {CONFIG: _names(record, "modules_to_not_convert", where)}
    return Said(STYLES["openai"], BY_NAME["openai/mxfp4"], static=False, cache=False, lists=lists)


OF_PRESSED = """config_groups format global_compression_ratio ignore kv_cache_scheme quant_method quantization_status sparsity_config
    transform_config version""".split()
OF_GROUP = "format input_activations output_activations targets weights".split()
TELLING = (
    "num_bits",
    "type",
    "strategy",
    "group_size",
    "block_structure",
)  # of the arguments: those that tell the schemes apart


def _pressed(record: Json, where: str) -> Said:
    key = CONFIG_KEY
    _closed(record, OF_PRESSED, key, where)
    _only(record, key, where, {"transform_config": (None, {}), "sparsity_config": (None, {}, {"format": "dense"})})
    _only(record, key, where, {"quantization_status": ("compressed", "frozen")})
    found = {_group(group, record.get("format"), name, where) for name, group in _groups(record, key, where)}
    if len(found) != 1:
        groups = ", ".join(sorted(recipe.scheme for recipe, _ in found)) or "none"
        facts = {"where": where, "found": groups, "known": "one scheme"}
        raise NotSupported("the groups of quantized layers differ", facts, remedy=ANEW)
    ((recipe, static),) = found
    cache, lists = _cache(record, key, where), {CONFIG: _names(record, "ignore", where)}
    targets = [target for _, group in _groups(record, key, where) for target in _names(group, "targets", where)]
    return Said(STYLES["compressed-tensors"], recipe, static, cache, lists, (*targets,))


def _group(group: Json, usual: object, key: str, where: str) -> tuple[Recipe, bool]:
    """Return the recipe of a group of layers, and whether its activations have stored scales."""
    _closed(group, OF_GROUP, key, where)
    _only(group, key, where, {"output_activations": (None,)})
    weights = _record({"weights": None, **group}, "weights", where)
    _closed(weights, ARGUMENTS, f"{key}.weights", where)
    # codes in another order of columns would need their "g_idx"; these two words mean that they are in order
    fixed: dict[str, Collection[object]] = {"symmetric": (True,), "dynamic": (False,), "actorder": (None, "weight", "static")}
    _only(weights, f"{key}.weights", where, fixed, PRESSED_TOO)
    format_ = group.get("format") or usual
    telling = [weights.get(name, ARGUMENTS[name]) for name in TELLING]
    for scheme, (of, arguments, _) in PRESSED.items():
        if of == format_ and telling == [{**ARGUMENTS, **arguments}[name] for name in TELLING]:
            types = ("scale_dtype", "zp_dtype")
            _only(weights, f"{key}.weights", where, {name: (None, arguments.get(name)) for name in types}, PRESSED_TOO)
            return BY_NAME[f"compressed-tensors/{scheme}"], _is_static(group, scheme, key, where)
    shown = {name: value for name, value in zip(TELLING, telling, strict=True) if value is not None}
    facts = {"where": where, "format": format_, "weights": shown, "known": ", ".join(PRESSED)}
    raise NotSupported("carnet does not know this scheme of compressed-tensors", facts, remedy=PRESSED_TOO)


def _is_static(group: Json, scheme: str, key: str, where: str) -> bool:
    inputs = group.get("input_activations")
    if inputs is None:
        return False
    arguments = _record(group, "input_activations", where)
    _closed(arguments, ARGUMENTS, f"{key}.input_activations", where)
    dynamic = arguments.get("dynamic", False)
    if dynamic is not True and (scheme not in STYLES["compressed-tensors"].inputs or arguments.get("symmetric") is False):
        raise _unknown(f"{key}.input_activations.dynamic", dynamic, where, ("True",), PRESSED_TOO)
    return dynamic is not True


# what TensorRT-LLM leaves alone where a config names nothing (quantization/mode.py)
USUAL = tuple("*lm_head *router *vocab_embedding *position_embedding *block_embedding *shared_expert_gate *fused_a".split())


def _ranks(config: Json, where: str) -> Said | None:
    record = config.get(RECORD)
    if not isinstance(record, Mapping):
        return None
    _cache_word(record, "kv_cache_quant_algo", RECORD, where)
    recipe = _algorithm(record, "trtllm", RECORD, where)
    cache = record.get("kv_cache_quant_algo") is not None
    if recipe is not None:
        _only(record, RECORD, where, {"has_zero_point": (None, False), "pre_quant_scale": (None, False)})
    ignored = USUAL if record.get("exclude_modules") is None else _names(record, "exclude_modules", where)
    static = recipe is not None and recipe.scheme in STYLES["trtllm"].inputs
    return Said(STYLES["trtllm"], recipe, static, cache, {CONFIG: ignored}) if recipe or cache else None


# where a config says of codes -> what reads it, and what leaves it out
READERS: Mapping[str, tuple[Callable[[Json, str], Said | None], Callable[[Json], Json]]] = {
    CONFIG_KEY: (_of_folder, _plain_folder),
    RECORD: (_ranks, _plain_ranks),
}

"""The configs of programs that wrap Megatron, as plain values in Megatron's own words.

::

    Megatron-Bridge   iter_0000010/run_config.yaml      model: {_target_: ...Provider, num_moe_experts: 8, ...}
    NeMo 2            context/model.yaml                config: {_target_: ...Llama3Config8B, ...}   weights: weights/

Both write the fields of megatron-core's TransformerConfig; Megatron-LM saves its arguments, a few of which are called otherwise.
YAML is read as JSON is: texts, numbers, lists and tables. No tag is followed, ``_target_`` is a text like any other.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import yaml

from carnet.algebra.layout import round_up
from carnet.errors import MADE_AGAIN, BadCheckpoint, BadRequest, NotSupported, shown
from carnet.formats.files import Sighting, check_inside, read_whole
from carnet.formats.jsons import CONFIG, infinity, parse_object
from carnet.storage.protocol import FILE, Folder
from carnet.storage.schemes import PathLike, file_at

RUN_CONFIG = "run_config.yaml"  # Megatron-Bridge: training/utils/checkpoint_utils.py
NEMO_CONTEXT, NEMO_MODEL, NEMO_WEIGHTS = "context", "context/model.yaml", "weights"
MEANT_FOR = "carnet_meant_for"  # in or beside arguments that carnet writes: the program whose words they are, as a requirement
YAML_LIMIT = 16 << 20  # bytes: real ones have less than 100 kB
_NODES = 100_000  # values written out, aliases each time
_DEPTH = 64
_NUMBER = 100  # characters: beyond, int() and float() only cost time
_EXPONENT = re.compile(r"[-+]?[0-9]{1,50}[eE][-+]?[0-9]{1,4}")

# a field of TransformerConfig, GPTModelProvider or GPTConfig -> the argument of the same meaning; all others are called the same:
# megatron/training/arguments.py core_transformer_config_from_args, megatron/training/models/gpt.py
RENAMED = (
    ("num_moe_experts", "num_experts"),
    ("num_layers_in_first_pipeline_stage", "decoder_first_pipeline_num_layers"),
    ("num_layers_in_last_pipeline_stage", "decoder_last_pipeline_num_layers"),
    ("seq_len_interpolation_factor", "rotary_seq_len_interpolation_factor"),
    ("rope_scaling", "use_rope_scaling"),
    ("fp8_param", "fp8_param_gather"),
)

# last name of activation_func, gated_linear_unit -> the arguments that say so (Megatron-LM has no gated GELU: its words stay)
_PLAIN = {"swiglu": False, "squared_relu": False, "openai_gelu": False, "quick_geglu": False}
ACTIVATIONS: Mapping[tuple[str, bool], Mapping[str, object]] = {
    ("silu", True): {**_PLAIN, "swiglu": True},
    ("gelu", False): _PLAIN,
    ("squared_relu", False): {**_PLAIN, "squared_relu": True},
    ("openai_gelu", False): {**_PLAIN, "openai_gelu": True},
    ("fast_gelu", False): {**_PLAIN, "openai_gelu": True},  # the same tanh form: megatron/core/activations.py
    ("quick_gelu", True): {**_PLAIN, "quick_geglu": True},
    ("gelu", True): {**_PLAIN, "gated_linear_unit": True, "activation_func": "gelu"},
    ("openai_gelu", True): {**_PLAIN, "gated_linear_unit": True, "activation_func": "fast_gelu"},
    ("fast_gelu", True): {**_PLAIN, "gated_linear_unit": True, "activation_func": "fast_gelu"},
}

# what RotaryEmbedding._apply_scaling has as constants, and the Llama31 classes as fields
_LLAMA31 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}


def read_config(path: PathLike) -> Mapping[str, object]:
    """Return the plain values of a JSON or YAML file that a person names; raise BadRequest where there is no such file."""
    folder, name = file_at(path)
    if folder.kind(name) != FILE:
        fault = "is not a file" if folder.kind(name) else "does not exist"
        raise BadRequest(f"{folder / name} {fault}", {"expected": "a config in JSON or YAML"})
    data = read_whole(folder, name, YAML_LIMIT)[0]
    is_json = name.endswith(".json") or (not name.endswith((".yaml", ".yml")) and data.lstrip()[:1] == b"{")
    return parse_object(data, name, folder, CONFIG, infinity) if is_json else parse_yaml(data, name, folder)


def arguments_of(config: Mapping[str, object], where: object) -> dict[str, object]:
    """Return a config in Megatron's words: a run_config.yaml's or a model.yaml's model translated, any other as it is.

    >>> arguments_of({"model": {"_target_": "x.GPTModelProvider", "num_moe_experts": 8}}, "-")["num_experts"]
    8
    >>> arguments_of({"num_layers": 2}, "-")
    {'num_layers': 2}
    """
    for section in ("model", "config"):
        inner = config.get(section)
        if isinstance(inner, dict) and "_target_" in inner:
            # `carnet` may be handed NeMo's whole task: model: {_target_: LlamaModel, config: {...}}
            return translate(inner, where) if "config" not in inner else arguments_of(inner, where)
    return dict(config)


def program_of(config: Mapping[str, object]) -> str:
    """Return the program whose config this is: "megatron-bridge", "nemo", or "" for Megatron-LM's arguments and all others.

    Arguments of a model that is built say it themselves: carnet.megatron.models.

    >>> program_of({"model": {"_target_": "x.GPTModelProvider", "num_moe_experts": 8}})
    'megatron-bridge'
    """
    for section, program in (("model", "megatron-bridge"), ("config", "nemo")):
        inner = config.get(section)
        if isinstance(inner, dict) and "_target_" in inner:
            return program if "config" not in inner else program_of(inner)
    meant = config.get(MEANT_FOR)
    return meant if isinstance(meant, str) else ""


def read_bridge(root: Folder) -> tuple[dict[str, object], Sighting]:
    """Return the arguments that Megatron-Bridge's run_config.yaml says."""
    check_inside(root, RUN_CONFIG, "the folder's listing")
    data, seen = read_whole(root, RUN_CONFIG, YAML_LIMIT)
    model = parse_yaml(data, RUN_CONFIG, root).get("model")
    if not isinstance(model, dict):
        raise BadCheckpoint(f"{RUN_CONFIG} has no section 'model'", {"where": root})
    return translate(model, root / RUN_CONFIG), seen


def read_nemo(root: Folder) -> tuple[dict[str, object], list[Sighting]]:
    """Return the arguments that NeMo 2's context/model.yaml says; nothing where it is not there."""
    check_inside(root, NEMO_MODEL, "the folder's listing")
    if not root.kind(NEMO_MODEL):  # io.json says the same in a form of fiddle's own
        return {}, []
    data, seen = read_whole(root, NEMO_MODEL, YAML_LIMIT)
    config = parse_yaml(data, NEMO_MODEL, root).get("config")
    if not isinstance(config, dict):
        raise BadCheckpoint(f"{NEMO_MODEL} has no section 'config'", {"where": root})
    return translate(config, root / NEMO_MODEL), [seen]


def translate(fields: Mapping[str, object], where: object) -> dict[str, object]:
    """Return the arguments that say what these fields of a model's config say; unknown fields keep their names."""
    inner = fields.get("transformer")
    if isinstance(inner, dict):  # what a builder of Megatron-Bridge's is given: models/gpt/model_config.py
        fields = {**inner, **{name: value for name, value in fields.items() if name != "transformer"}}
    model = {name: _plain(value) for name, value in fields.items()}
    for theirs, ours in RENAMED:
        if theirs in model:
            model.setdefault(ours, model.pop(theirs))
    _say_rope(model, where)
    _say_activation(model, where)
    _say_vocabulary(model)
    if "share_embeddings_and_output_weights" in model:
        model["untie_embeddings_and_output_weights"] = not model.pop("share_embeddings_and_output_weights")
    if "num_query_groups" in model:
        model["group_query_attention"] = model["num_query_groups"] is not None
    if "seq_length" in model:  # the providers build max_sequence_length from it
        model.setdefault("max_position_embeddings", model["seq_length"])
    return model


def _plain(value: object) -> object:
    """Return a function or an enum member as the pickled arguments say it: ``torch.bfloat16``, ``AttnBackend(5)``."""
    target = value.get("_target_") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(target, str):
        return value
    if set(value) <= {"_target_", "_call_"} and not value.get("_call_"):
        return target
    arguments = value.get("_args_")
    if set(value) <= {"_target_", "_call_", "_args_"} and isinstance(arguments, list) and value.get("_call_"):
        return f"{target.rpartition('.')[2]}({', '.join(map(repr, arguments))})"
    return value


def _say_rope(model: dict[str, object], where: object) -> None:
    """Say Llama 3.1's scaling as Megatron does: a flag and a factor, all else constants."""
    if model.get("scale_factor") is None or not _LLAMA31.keys() <= model.keys():
        return
    found = {name: model.pop(name) for name in _LLAMA31}
    if found != _LLAMA31:
        facts = {"where": where, "expected": _LLAMA31, "found": found}
        raise NotSupported("Megatron's arguments cannot say this rope scaling", facts)
    model["use_rope_scaling"], model["rope_scaling_factor"] = True, model.pop("scale_factor")


def _say_activation(model: dict[str, object], where: object) -> None:
    """Say the activation as Megatron's flags do."""
    if "activation_func" not in model and "gated_linear_unit" not in model:
        return
    function, gated = model.pop("activation_func", None), bool(model.pop("gated_linear_unit", False))
    name = "gelu" if function is None else str(function).rpartition(".")[2]  # TransformerConfig's own default
    said = ACTIVATIONS.get((name, gated))
    if said is None:
        facts = {"where": where, "activation_func": shown(str(function)), "gated_linear_unit": gated}
        raise NotSupported("Megatron's arguments cannot say this activation", facts)
    model.update(said)
    fused = model.pop("bias_activation_fusion", False)
    if name in ("silu", "gelu"):  # no other activation has a fused kernel that changes numbers
        model["bias_swiglu_fusion" if name == "silu" else "bias_gelu_fusion"] = fused


def _say_vocabulary(model: dict[str, object]) -> None:
    """Say how many rows the embedding has, where the config tells: calculate_padded_vocab_size in the providers."""
    size, pad = model.get("vocab_size"), model.get("should_pad_vocab")
    unit, ranks = model.get("make_vocab_size_divisible_by"), model.get("tensor_model_parallel_size", 1)
    if type(size) is not int or not isinstance(pad, bool):
        return
    if not pad:
        model["padded_vocab_size"] = size
    elif type(unit) is int and type(ranks) is int and unit > 0 and ranks > 0:
        model["padded_vocab_size"] = round_up(size, unit * ranks)


def parse_yaml(data: bytes, name: str, where: object) -> dict[str, object]:
    """Return the table that some YAML bytes hold; ``name`` and ``where`` are for the error.

    >>> parse_yaml(b"model:\\n  rope: [1e-05, null]\\n  _target_: os.system\\n", "run_config.yaml", "-")
    {'model': {'rope': [1e-05, None], '_target_': 'os.system'}}
    """
    import yaml

    loader: type[yaml.SafeLoader | yaml.CSafeLoader] = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    try:
        text = data.decode("utf-8")
        _check_events(yaml.parse(text, Loader=loader))
        node = yaml.compose(text, Loader=loader)
        parsed = _Reader(yaml.constructor.SafeConstructor().construct_object).value(node, 0) if node else {}
    except RecursionError:
        raise BadCheckpoint(f"{name} is nested too deeply", {"where": where}) from None
    except (yaml.YAMLError, ValueError, LookupError) as error:  # LookupError: what `!!bool maybe` and `!!int ""` raise
        facts = {"where": where, "reason": shown(" ".join(str(error).split()))}
        raise BadCheckpoint(f"{name} is not plain YAML", facts, remedy=MADE_AGAIN) from None
    if not isinstance(parsed, dict):
        raise BadCheckpoint(f"{name} is not a YAML table", {"where": where, "found": type(parsed).__name__})
    return parsed


def _check_events(events: Iterator[yaml.Event]) -> None:
    """Raise ValueError where a text nests deeply or says much: the loader composes it whole, by recursion in C without a guard."""
    depth = 0
    for number, event in enumerate(events):
        kind = type(event).__name__
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        if depth > _DEPTH or number > 2 * _NODES:
            raise ValueError("it is too large or nested too deeply")


class _Reader:
    """Turn YAML's nodes into plain values within a budget: an alias counts with all that it stands for."""

    def __init__(self, scalar: Callable[[yaml.ScalarNode], object]) -> None:
        self._scalar = scalar  # reads numbers and truth values as YAML spells them
        self._left = _NODES

    def value(self, node: yaml.Node, depth: int) -> object:
        """Return the value of one node."""
        self._left -= 1
        if self._left < 0 or depth > _DEPTH:
            raise ValueError("it is too large or nested too deeply")
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._table(node.value, depth)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and kind in ("int", "float", "bool", "null") and len(node.value) <= _NUMBER:
            return self._scalar(node)
        if isinstance(node, yaml.ScalarNode) and kind in ("str", "timestamp"):
            # YAML 1.1 asks for a point in a number, JSON and other writers of YAML do not
            bare = not node.style and _EXPONENT.fullmatch(node.value)
            return float(node.value) if bare else str(node.value)
        raise ValueError(f"{node.tag!r}{node.start_mark}: only texts, numbers, lists and tables are read")

    def _table(self, pairs: list[tuple[yaml.Node, yaml.Node]], depth: int) -> dict[str, object]:
        table: dict[str, object] = {}
        for key, item in pairs:
            name = self.value(key, depth + 1) if isinstance(key, yaml.ScalarNode) else None
            text = str(name)
            if name is None or text in table:
                raise ValueError(f"it has a key that is doubled or no text{key.start_mark}")
            table[text] = self.value(item, depth + 1)
        return table

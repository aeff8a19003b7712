"""Classes that also see or hear: a text model under a prefix of its own, its config below a key, and a tower that goes along.

What is not the text model's is carried: every other tensor as it is, and the rest of the config. transformers: the configuration_*.py
of each class; ``_checkpoint_conversion_mapping`` of its modeling_*.py has the names of older releases, which the hub's files have.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import translate
from typing import Any

from carnet.dialects.configs import lookup, place
from carnet.dialects.hf import IDLE, LAYER, stacked
from carnet.dialects.kinds import KINDS
from carnet.dialects.rows import Dialect, Row, ToldBy, TowerRow, fuse, row
from carnet.dialects.tower_rows import ASKED, GEMMA_TOWER, GLM_TOWER, QWEN_TOWER, RADIO_TOWER
from carnet.errors import BadCheckpoint, NotSupported
from carnet.model.fields import Config
from carnet.model.keys import leaves, left_out, put
from carnet.model.model import number
from carnet.model.tower import tower

Json = Mapping[str, object]
HEADS, MANY = "vision_config.num_heads", 1 << 16
WHOLE = "carnet_wrapper"  # a key that stands in no file: the rest of the config, until the text model's own is put into it
CLASS = KINDS["hf"].class_key
CODES = KINDS["hf"].codes_key
HEAD, MAP = "/lm_head.", "auto_map"
# what a wrapper's config says of the text model, above its config
SHARED = ("tie_word_embeddings", "torch_dtype", "dtype", CODES)
TYPES = ("torch_dtype", "dtype")
NAMES = (CLASS, "model_type")
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
IDLE_HERE = (*SHARED, *(IDLE - {*NAMES}))  # of a wrapper's config: what is no part of the rest


@dataclass(frozen=True, slots=True)
class Spelling:
    """Where the text model stands among the names of a checkpoint."""

    prefix: str
    head: str = "lm_head."  # what stands before the name of the head's weight


MODERN = Spelling("model.language_model.")
INSIDE = Spelling("language_model.model.", "language_model.lm_head.")
FLAT = Spelling("model.")
BACKBONE = Spelling("language_model.backbone.", "language_model.lm_head.")
ABOVE = r"(?:(?:model|language_model|backbone|module)\.)*"  # what may stand above a text model's tensors, in any release
MEGATRON = "language_model."  # Megatron-Bridge: models/qwen_vl/modelling_qwen3_vl/model.py, models/gemma_vl, ...


@dataclass(frozen=True, slots=True)
class Wrapper:
    """One class, and where its text model is."""

    architecture: str
    text: str  # the class of the text model, by which a family is known
    types: tuple[str, ...] = ()  # what the text model's config calls it, where that is not what its own class is called
    spellings: tuple[Spelling, ...] = (MODERN, INSIDE, FLAT)  # the first is written where the source has none of them
    tower: tuple[str, ...] = ("model.visual.", "visual.")  # what the names of a tower begin with
    rows: tuple[TowerRow, ...] = ()  # what Megatron-Bridge calls otherwise there; of heads that are ASKED the config speaks
    key: str = "text_config"  # where the text model's config stands
    flat: bool = False  # where that is not there, the keys of the text model stand among the others: configs of old releases
    # keys of that config that are of no concern to the text alone -> the values that are, None for all
    own: Mapping[str, tuple[object, ...] | None] = field(default_factory=dict)
    # what its config class takes a key for that is not there, other than the text class
    absent: Json = field(default_factory=dict)
    experts: tuple[Row, ...] = ()  # the rows of the experts where they are stored otherwise than in the text class
    told_by: ToldBy = field(default_factory=dict)  # as in a Dialect
    texts: Mapping[str, str] = field(
        default_factory=dict
    )  # what another text model is called -> its class, of which that is then


PROJECTED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
# of Nemotron's that see or hear, whose code lies beside published weights: vLLM's models/nano_nemotron_vl.py and nemotron_vl.py
HEARD = ("vision_model.", "mlp1.", "sound_encoder.", "sound_projection.")

# positions in three dimensions, which are the same three for a text
TOPS = ("rope_scaling", "rope_parameters")
SECTIONS: dict[str, tuple[object, ...] | None] = {
    f"{top}.mrope_{name}": None for top in TOPS for name in ("section", "interleaved")
}
# and what such positions are called by classes that do not read a type
MROPE = SECTIONS | {f"{top}.{name}": ("default", "mrope") for top in TOPS for name in ("rope_type", "type")}

QWEN2_ABSENT: Json = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0}  # of Qwen2-VL and Qwen2.5-VL
# of GLM-4.1V, whose heads share the width of the stream
GLM4V_ABSENT: Json = {"head_dim": None, "rms_norm_eps": 1e-5, "partial_rotary_factor": 1.0, "pad_token_id": None}
AT = LAYER + "mlp.experts."
BY_OUTPUT, BY_INPUT, PLAIN = {"experts_by_output": True}, {"experts_by_output": False}, {"coded": False}
# Qwen3-VL's are published with the inputs of an expert before its outputs, as vLLM takes them (models/qwen3_vl_moe.py), and saved by
# transformers 5 the other way round, which loads both (conversion_mapping.py: qwen3_vl_moe)
QWEN_EXPERTS = (
    *(replace(each, when=BY_OUTPUT if "{expert}" not in each.name else {}) for each in stacked() if "experts." in each.name),
    fuse(
        AT + "gate_up_proj", "expert moe_hidden *", {"moe.gate": "moe_ffn", "moe.up": "moe_ffn"}, when=BY_INPUT, written=PLAIN
    ),
    row(AT + "down_proj", "expert moe_ffn moe_hidden", "moe.down", when=BY_INPUT, written=PLAIN),
)


def _by_output(shapes: Mapping[str, tuple[int, ...]], config: Config) -> bool:
    """Return whether what an expert computes stands before what it reads, as the shapes that are stored tell."""
    hidden, ffn = number(config, "hidden"), number(config, "moe_ffn")
    found = next((shape for name, shape in shapes.items() if name.endswith("mlp.experts.down_proj")), ())
    if len(found) == 3 and hidden in (ffn, 2 * ffn):
        facts = {"hidden_size": hidden, "moe_intermediate_size": ffn}
        raise NotSupported("which dimension of the experts is which cannot be told: both are as long", facts)
    return found[1:] == (hidden, ffn)


WRAPPERS = {
    wrapper.architecture: wrapper
    for wrapper in (
        Wrapper(
            "Qwen3VLForConditionalGeneration",
            "Qwen3ForCausalLM",
            ("qwen3_vl_text",),
            rows=QWEN_TOWER,
            own=MROPE,
            absent={"rope_theta": 500000.0},
        ),
        Wrapper(
            "Qwen2VLForConditionalGeneration", "Qwen2ForCausalLM", ("qwen2_vl_text",), flat=True, own=MROPE, absent=QWEN2_ABSENT
        ),
        Wrapper(
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2ForCausalLM",
            ("qwen2_5_vl_text",),
            flat=True,
            own=MROPE,
            absent=QWEN2_ABSENT,
        ),
        Wrapper(
            "Qwen3VLMoeForConditionalGeneration",
            "Qwen3MoeForCausalLM",
            ("qwen3_vl_moe_text",),
            rows=QWEN_TOWER,
            own=MROPE,
            absent={"norm_topk_prob": True, "num_key_value_heads": 16, "rope_theta": 500000.0},
            experts=QWEN_EXPERTS,
            told_by={"experts_by_output": _by_output},
        ),
        Wrapper("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM", rows=QWEN_TOWER, own=SECTIONS),
        Wrapper("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM", rows=QWEN_TOWER, own=SECTIONS),
        *(
            Wrapper(name, "Glm4ForCausalLM", ("glm4v_text",), own=MROPE, absent=GLM4V_ABSENT)
            for name in ("Glm4vForConditionalGeneration", "Glm46VForConditionalGeneration")
        ),
        Wrapper(
            "Glm4vMoeForConditionalGeneration",
            "Glm4MoeForCausalLM",
            ("glm4v_moe_text",),
            rows=GLM_TOWER,
            own=MROPE,
            absent={"attention_bias": True},
        ),
        Wrapper(
            "Mistral3ForConditionalGeneration",
            "MistralForCausalLM",
            tower=PROJECTED,
            texts={"ministral3": "Ministral3ForCausalLM"},
        ),
        Wrapper("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM", tower=PROJECTED, rows=GEMMA_TOWER),
        Wrapper(
            "Gemma4ForConditionalGeneration",
            "Gemma4ForCausalLM",
            tower=("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio."),
            own={"use_bidirectional_attention": ("vision",)},
        ),
        Wrapper(
            "Llama4ForConditionalGeneration",
            "Llama4ForCausalLM",
            spellings=(INSIDE, MODERN),
            tower=("vision_model.", "multi_modal_projector.", "model.vision_model.", "model.multi_modal_projector."),
        ),
        *(
            Wrapper(name, "DeepseekV3ForCausalLM", spellings=(INSIDE,), tower=("vision_tower.", projector))
            for name, projector in (  # vLLM's models/kimi_k25.py and kimi_vl.py
                ("KimiK25ForConditionalGeneration", "mm_projector."),
                ("KimiVLForConditionalGeneration", "multi_modal_projector."),
            )
        ),
        Wrapper(
            "Llama_Nemotron_Nano_VL", "LlamaForCausalLM", spellings=(INSIDE,), tower=HEARD, rows=RADIO_TOWER, key="llm_config"
        ),
        *(
            Wrapper(name, "NemotronHForCausalLM", spellings=(BACKBONE,), tower=HEARD, rows=RADIO_TOWER, key="llm_config")
            for name in (
                "NemotronH_Nano_VL_V2",
                "NemotronH_Nano_Omni_Reasoning_V3",
                "NemotronH_Omni_Reasoning_V3",
                "NemotronH_Super_Omni_Reasoning_V3",
            )
        ),
    )
}


def wrapper_of(raw: Json) -> Wrapper | None:
    """Return the wrapper that a Hugging Face config is of, with the class of its text model; None where it is of a text model."""
    names = raw.get(CLASS)
    found = [WRAPPERS[name] for name in names if isinstance(name, str) and name in WRAPPERS] if isinstance(names, list) else []
    return next((replace(each, text=text_class(each, raw)) for each in found), None)


def text_class(wrapper: Wrapper, raw: Json) -> str:
    """Return the class of the text model inside a wrapper's config."""
    inner = lookup(raw, f"{wrapper.key}.model_type")
    return wrapper.texts.get(inner, wrapper.text) if isinstance(inner, str) else wrapper.text


def around(config: Config) -> tuple[dict[str, Any], Wrapper | None]:
    """Return the rest of the config that surrounds a text model, and its wrapper; nothing and None where none does."""
    said = config.get("wrapper")
    if not said:
        return {}, None
    try:
        rest = json.loads(str(said))
    except (ValueError, RecursionError):  # of a store's arguments, which anyone may have written
        rest = None
    wrapper = wrapper_of(rest) if isinstance(rest, dict) else None
    if rest is None or wrapper is None or not isinstance(rest.get(wrapper.key, {}), dict):
        facts = {"found": str(said)[:80], "expected": f"the config of one of {', '.join(WRAPPERS)}"}
        raise BadCheckpoint("what surrounds the text model is of no class that carnet knows", facts)
    return rest, wrapper


def text_inside(config: Config) -> str:
    """Return the class of the text model that a model is inside of another one, "" where it is in none."""
    wrapper = around(config)[1]
    return "" if wrapper is None else wrapper.text


def inside_of(config: Config) -> dict[str, str]:
    """Return in a line which class a text model is inside of, none where it stands alone."""
    wrapper, beside = around(config)[1], tower(config)
    return {} if wrapper is None else {"inside": f"{wrapper.architecture}, with {len(beside)} tensors beside the text model"}


def unwrapped(raw: Json, model_type: object, where: str) -> tuple[Json, str]:
    """Return the config of the text model inside a wrapper's, and the rest of that as the field ``wrapper`` says it.

    ``model_type`` is what the text model's own class is called.
    """
    wrapper = wrapper_of(raw)
    assert wrapper is not None, "the config is a wrapper's"
    files = {key: value for key, value in raw.items() if key.endswith(".json")}  # that stand beside the config
    rest = {key: value for key, value in raw.items() if key not in (*IDLE_HERE, *files, wrapper.key)}
    text = raw.get(wrapper.key)
    if text is None and wrapper.flat:
        rest = {key: value for key, value in rest.items() if _is_beside(key)}
        text = {key: value for key, value in raw.items() if key not in rest}
    elif not isinstance(text, Mapping):
        facts = {"where": where, "class": wrapper.architecture, "found": repr(text)[:80], "expected": "the text model's config"}
        raise BadCheckpoint(f"the config's {wrapper.key!r} is not a record", facts)
    kept: dict[str, object] = {}
    own = [key for key in leaves(text) if _is_own(wrapper, key, lookup(text, key))]
    for key in own:
        put(kept, key, lookup(text, key))
    if wrapper.key in raw:
        kept |= {key: text[key] for key in NAMES if key in text}
        kept |= {CODES: None} if text.get(CODES) is not None else {}  # where it stands
        rest[wrapper.key] = kept
    else:
        rest |= kept
    typed = any(text.get(key) is not None for key in TYPES)
    shared = {key: raw[key] for key in SHARED if raw.get(key) is not None and not (typed and key in TYPES)}
    named = {CLASS: [wrapper.text], "model_type": model_type}
    return {**left_out(text, own), **shared, **files, **named}, json.dumps(rest, sort_keys=True)


def _is_own(wrapper: Wrapper, key: str, found: object) -> bool:
    values = wrapper.own.get(key, ())
    return values is None or found in values


def _is_beside(key: str) -> bool:
    """Say whether a key is not the text model's where all stand together."""
    return key in NAMES or key.endswith("_config") or (key.endswith(("_token_id", "_token_index")) and key not in ENDS)


def rewrapped(said: dict[str, object]) -> dict[str, object]:
    """Return the config of a text model as a wrapper says it, where it has the rest of one."""
    rest, wrapper = around({"wrapper": str(said.pop(WHOLE, ""))})
    if wrapper is None:
        return said
    top = {key: said[key] for key in (*SHARED, MAP) if key in said}
    text = {key: value for key, value in said.items() if key not in (*NAMES, MAP, CODES)}
    if wrapper.key not in rest:
        return merged({**text, **top}, rest)
    inside = dict(rest[wrapper.key])
    if CODES in inside and inside.pop(CODES, None) is None and CODES in top:
        text[CODES] = top.pop(CODES)
    return {**{key: rest[key] for key in NAMES if key in rest}, **top, **rest, wrapper.key: merged(text, inside)}


def merged(below: Json, above: Json) -> dict[str, object]:
    """Return two configs in one, what stands in both as the second says it."""
    both: dict[str, object] = {**below, **above}
    for key, over in above.items():
        under = below.get(key)
        if isinstance(under, Mapping) and isinstance(over, Mapping):
            both[key] = merged(under, over)
    return both


def wrapped(dialect: Dialect, config: Config, names: Collection[str] = ()) -> Dialect:
    """Return a dialect as a wrapper has it, where the model is inside of one; ``names`` are those of a checkpoint of the kind."""
    rest, wrapper = around(config)
    if wrapper is None:
        return dialect
    stored = tuple(replace(row, heads=_heads(rest, row)) if row.heads == ASKED else row for row in wrapper.rows)
    if dialect.kind.arguments:
        prefixes = (*(prefix + MEGATRON for prefix in dialect.prefixes), *dialect.prefixes)
        return replace(dialect, prefixes=prefixes, tower=stored)
    if not dialect.kind.companions or dialect.ranked:
        remedy = "--drop with the names of what is beside the text model takes that alone"
        remedy = f"add adapters of such a model with peft's merge_and_unload; {remedy}" if dialect.kind.alone else remedy
        raise NotSupported(f"{dialect.name} has no place for what a model sees or hears with", remedy=remedy)
    spelling = max(wrapper.spellings, key=lambda each: _below(each.prefix, names))
    rows = tuple(replace(row, name=row.name.replace(HEAD, "/" + spelling.head)) for row in dialect.rows)
    rows = (*(row for row in rows if "experts." not in row.name), *wrapper.experts) if wrapper.experts else rows
    absent = {**dialect.table.absent, **wrapper.absent}
    table = replace(dialect.table, rows=(*dialect.table.rows, place("wrapper", WHOLE)), absent=absent)
    own = tuple(replace(row, stored=row.name, order=()) for row in stored if row.heads)
    return replace(dialect, prefixes=(spelling.prefix,), rows=rows, table=table, tower=own, told_by=wrapper.told_by)


def _below(prefix: str, names: Collection[str]) -> tuple[int, bool]:
    """Count the names of layers below a prefix, and say whether there is any name; a stray one makes no spelling."""
    return sum(name.startswith(f"{prefix}layers.") for name in names), any(name.startswith(prefix) for name in names)


def _heads(rest: Json, row: TowerRow) -> int:
    """Return the heads of a tower's attention; refuse a config that does not say them."""
    said = lookup(rest, HEADS)
    if type(said) is not int or not 0 < said < MANY:
        facts = {"found": repr(said)[:80], "tensor": row.name}
        raise BadCheckpoint(f"the config does not say {HEADS!r}", facts)
    return said


def is_of_tower(config: Config, name: str) -> bool:
    """Say whether a name in a Hugging Face folder is one that a tensor of the model's tower has there."""
    wrapper = around(config)[1]
    return wrapper is not None and name.startswith(wrapper.tower)


def beside(dialect: Dialect, names: Collection[str]) -> set[str]:
    """Return the names that are none of the text model's: those of a tower.

    A tensor of the text under the prefix of another release is none of a tower's, nor what stands beside the codes of a head.
    """
    prefix = next((each for each in dialect.prefixes if any(name.startswith(each) for name in names)), "")
    named = (*(row.name for row in dialect.rows), *(f"{other}*" for other in dialect.further if other))
    own = {re.sub(rf"^/?{ABOVE}", "", name) for name in named}
    text = re.compile(f"{ABOVE}(?:{'|'.join(translate(re.sub('{.*?}', '*', name)) for name in own)})").fullmatch
    return {name for name in names if not (name.startswith(prefix) or text(name) or text(f"{name.rpartition('.')[0]}.weight"))}

"""Heads of EAGLE-3, which guess tokens of the model that they are saved with: its tensors below ``eagle_module``.

A head is a model of its own: a layer that reads the embedding of a token and some of the other model's states. ModelOpt trains it,
and says in its ``modelopt_state`` how: modelopt 0.47 torch/speculative/plugins/megatron_eagle.py dict_to_config, EagleModule.
"""

from collections.abc import Mapping
from dataclasses import replace

from carnet.dialects.megatron.rows import EAGLE, LAYER, MEGATRON
from carnet.dialects.rows import fuse, row
from carnet.dialects.vocabulary import Vocabulary
from carnet.errors import BadCheckpoint, NotSupported

EAGLE3 = "eagle3"  # the family, as --as calls it
MODEL = "the model whose tokens it guesses"
PAIR = {"draft.q": "rep dim", "draft.k": "dim", "draft.v": "dim"}

HEAD = replace(
    MEGATRON,
    prefixes=tuple(prefix + EAGLE for prefix in MEGATRON.prefixes),
    rows=(
        *(row for row in MEGATRON.rows if row.name != "output_layer.weight"),
        row("enorm.weight", "hidden", "draft.embed_norm"),
        row("fc.weight", "hidden (aux hidden_in)", "draft.join"),
        fuse(LAYER + "self_attention.linear_qkv.weight", "(kv *) (both hidden)", PAIR, cut="kv"),
        row("eagle_output_layer.weight", "vocab hidden", "head", cut="vocab"),
        row("eagle_output_layer.weight", "draft hidden", "draft.head", cut="draft"),
        row("d2t", "draft", "draft.tokens", dtype="i64"),
    ),
    dropped={
        **{name: why for name, why in MEGATRON.dropped.items() if EAGLE not in name},
        **{
            f"{prefix}{top}*": MODEL
            for prefix in MEGATRON.prefixes
            for top in ("embedding.", "decoder.", "output_layer.", "mtp.")
        },
    },
)
# what ModelOpt may say -> the values that engines' classes compute with
GUARDS: Mapping[str, tuple[object, ...]] = {
    "num_hidden_layers": (1,),  # vLLM and SGLang call further ones otherwise
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
    "parallel_draft_step": (1,),
    "position_embedding_type": ("rope", "yarn"),  # both are rotated alike there
}
SAID = ("rms_norm_eps", "rope_theta")  # for which a class of transformers' would take numbers of its own
SIZES = ("num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def config_of(
    arguments: Mapping[str, object], vocabulary: Vocabulary | None, said: Mapping[str, object] | None, where: str
) -> dict[str, object]:
    """Return the config.json of a head: of the true arguments and the vocabulary of its model, and what ModelOpt says of it."""
    made = said.get("eagle_architecture_config") if said else None
    if not isinstance(made, Mapping):
        remedy = "--config with the config.json of the head"
        raise BadCheckpoint(
            "nothing says how the head of EAGLE is made", {"where": where, "looked for": "modelopt_state"}, remedy=remedy
        )
    found = {"eagle_reuse_base_decoder": (said or {}).get("eagle_reuse_base_decoder"), **made}
    for key, known in {"eagle_reuse_base_decoder": (False,), **GUARDS}.items():
        if found.get(key) not in (None, *known):
            facts = {"where": where, "found": repr(found[key]), "known": ", ".join(map(repr, known))}
            raise NotSupported(f"the head of EAGLE has {key!r}, which carnet cannot carry over", facts)
    for key in SAID:
        if made.get(key) is None:
            facts = {"where": where, "looked for": f"modelopt_state: eagle_architecture_config.{key}"}
            raise BadCheckpoint(f"ModelOpt's state does not say {key!r} of the head of EAGLE", facts)
    biased, scaling, draft = bool(made.get("mlp_bias")), made.get("rope_scaling"), made.get("draft_vocab_size")
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    vocab, rows = (vocabulary.tokens, vocabulary.rows) if vocabulary is not None else (arguments.get("vocab_size"), None)
    own_head = bool(draft not in (None, rows) or made.get("has_lm_head"))
    # RotaryEmbedding with its own numbers: megatron/core/models/common/embeddings/rotary_pos_embedding.py _apply_scaling
    llama3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **{key: made[key] for key in SIZES if key in made},
        "hidden_size": arguments.get("hidden_size"),
        "vocab_size": vocab,
        "draft_vocab_size": (vocab if draft in (None, rows) else draft) if own_head else None,
        "max_position_embeddings": arguments.get("max_position_embeddings"),
        "hidden_act": "silu",
        "rms_norm_eps": made.get("rms_norm_eps"),
        "attention_bias": biased,
        "mlp_bias": biased,
        "rope_theta": made.get("rope_theta"),
        "rope_scaling": {**llama3, "factor": factor} if factor else None,
        "torch_dtype": str(made.get("torch_dtype")),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": _layers(
                made.get("eagle_aux_hidden_state_layer_ids"), arguments.get("num_layers"), where
            )
        },
    }


def _layers(ids: object, count: object, where: str) -> list[int]:
    """Return the layers whose states are taken, in their order.

    Where none is said: _set_default_aux_hidden_state_layers in megatron_eagle.py.
    """
    if not ids:
        return sorted({1, max(0, count // 2 - 1), max(0, count - 4)}) if isinstance(count, int) else []
    known = range(count) if isinstance(count, int) else ()
    fitting = {each for each in ids if type(each) is int and each in known} if isinstance(ids, (list, tuple)) else set[int]()
    if not isinstance(ids, (list, tuple)) or len(fitting) != len(ids):
        facts = {"where": where, "found": f"{ids!r:.200}", "expected": f"some of the model's {count} layers, each once"}
        raise BadCheckpoint("ModelOpt's state names layers that the model of a head of EAGLE has not", facts)
    return sorted(fitting)

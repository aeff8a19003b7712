"""EAGLE-3: a head that guesses the tokens of another model, from the embedding of a token and from states of that model.

As vLLM and SGLang load it: vllm 0.32 model_executor/models/llama_eagle3.py; sglang srt/models/llama_eagle3.py. Embedding, and the head
where it has none of its own, are the other model's.
"""

from dataclasses import replace
from typing import Any

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.megatron import heads
from carnet.dialects.rows import row
from carnet.dialects.senses import expect
from carnet.model.fields import SET, Config, Value
from carnet.model.model import number, several, value

MIDDLE = "midlayer."
PAIRED = (
    row(MIDDLE + "input_layernorm.weight", "hidden", "draft.embed_norm"),
    row(MIDDLE + "hidden_norm.weight", "hidden", "attention_norm"),
    row(MIDDLE + "self_attn.q_proj.weight", "(kv rep dim) (both hidden)", "draft.q"),
    row(MIDDLE + "self_attn.k_proj.weight", "(kv dim) (both hidden)", "draft.k"),
    row(MIDDLE + "self_attn.v_proj.weight", "(kv dim) (both hidden)", "draft.v"),
)
OF_LLAMA = {LAYER + name for name in ("input_layernorm.weight", *(f"self_attn.{part}_proj.weight" for part in "qkv"))}
ROWS = (
    row("fc.weight", "hidden (aux hidden_in)", "draft.join"),
    *PAIRED,
    *(
        replace(each, name=each.name.replace(LAYER, MIDDLE))
        for each in (*hf.NORMS, *hf.ATTENTION, *hf.GATED_MLP)
        if each.name not in OF_LLAMA
    ),
    hf.FINAL_NORM,
    hf.HEAD,
    row(hf.HEAD.name, "draft hidden", "draft.head"),
    row("d2t", "draft", "draft.tokens", dtype="i64"),
)
# SGLang takes the states that leave these layers (set_eagle3_layers_to_capture adds one), as ModelOpt does; vLLM, those that enter the
# layers that stand outside of the record: gpu_model_runner.py _get_eagle3_aux_layers_from_config, which looks there first
LEAVE, ENTER = "eagle_config.eagle_aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids"
USUAL = 3  # where nothing is said


def _left(said: tuple[list[int] | None, list[int] | None], _: Config) -> tuple[int, ...] | None:
    leave, enter = said
    expect(not (leave and enter) or [layer + 1 for layer in leave] == enter, "the same layers, numbered from 0 and from 1")
    return tuple(leave or [layer - 1 for layer in enter or ()]) or None


def _listed(config: Config) -> tuple[object, ...]:
    layers = several(config, "aux_layers")
    return (([*layers], [layer + 1 for layer in layers]) if layers else (None, None),)


def _aux(said: tuple[list[int] | None, list[int] | None], config: Config) -> int:
    return len(_left(said, config) or range(USUAL))


def _guessed(said: int | None, config: Config) -> int | None:
    return None if said == number(config, "vocab") else said


def _drafts(config: Config) -> tuple[Value, ...]:
    return (None if value(config, "tied") else value(config, "draft_vocab") or number(config, "vocab"),)


IDS: dict[str, Any] = {"more": (ENTER,)}
FIELDS: tuple[Field, ...] = (
    *hf.LLAMA_FIELDS,
    *hf.ATTENTION_BIASES,
    place("mlp_bias", "mlp_bias", default=False),
    Spread("aux", LEAVE, (list[int], list[int]), _aux, _listed, **IDS),
    Spread("aux_layers", LEAVE, (list[int], list[int]), _left, _listed, **IDS),
    Spread("tied", "draft_vocab_size", int, lambda said, _: said is None, _drafts),
    Spread("draft_vocab", "draft_vocab_size", int, _guessed, _drafts),
)
RECORD = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
}
# what other trainers' heads have, and this one has not
OTHERS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "bias", "parallel_drafting")

EAGLE3 = Family(
    name=heads.EAGLE3,
    traits={**LLAMA_TRAITS, "layers": 1},
    needs={"aux": SET},
    hf=replace(
        hf.dialect(
            "LlamaForCausalLMEagle3",
            "llama",
            ROWS,
            FIELDS,
            fixed={
                "num_hidden_layers": 1,
                "tie_word_embeddings": False,
                **{f"eagle_config.{key}": said for key, said in RECORD.items()},
            },
            written={"eagle_config.parallel_draft_heads_num_layers": 1},
            guards={
                **dict.fromkeys(OTHERS, (False,)),
                "target_hidden_size": (),
                "num_aux_hidden_states": (),
                "logit_scale": (1.0,),
            },
            prefixes=("",),
            # an embedding is none of them: vLLM computes with a head's own, where it is another than the model's
            dropped={"t2d": "what follows from d2t"},
        ),
        plain=True,
        texts=False,
    ),
    megatron=heads.HEAD,
    trtllm=None,
    without="carnet does not know what TensorRT-LLM stores of a head that guesses tokens",
)

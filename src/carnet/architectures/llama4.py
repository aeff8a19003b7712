"""Llama 4, the text model: mixtures in every or every other layer, layers without positions, attention in chunks.

transformers: modeling_llama4.py. All experts of a layer are one tensor, [expert, in, out]. The score of an expert is a factor on what
goes into it. Neighbouring dimensions of a head are rotated together, as in Meta's own code.
"""

from collections.abc import Iterator

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf
from carnet.dialects.configs import Spread, place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import fuse, row
from carnet.dialects.senses import expect
from carnet.model.fields import MIXED, Config
from carnet.model.model import marks, mixtures, number

MLP = "feed_forward."
ROWS = (
    *(hf.EMBED, *hf.NORMS, *hf.ATTENTION),
    *hf.gated("feed_forward", "mlp", "ffn"),
    row(LAYER + MLP + "router.weight", "expert hidden", "moe.router"),
    fuse(LAYER + MLP + "experts.gate_up_proj", "expert moe_hidden *", {"moe.gate": "moe_ffn", "moe.up": "moe_ffn"}),
    row(LAYER + MLP + "experts.down_proj", "expert moe_ffn moe_hidden", "moe.down"),
    *hf.gated("feed_forward.shared_expert", "shared", "shared_ffn"),
    *(hf.FINAL_NORM, hf.HEAD),
)


def _mixtures(said: tuple[list[int] | None, int], config: Config) -> str | None:
    """Return the blocks: the layers that are listed are mixtures, else every step-th."""
    listed, step = said
    count = number(config, "layers")
    if listed is None:
        return mixtures(hf.every(step, count))
    expect(set(listed) <= set(range(count)), "numbers of layers")
    return mixtures([layer in listed for layer in range(count)])


def _spellings(config: Config) -> Iterator[tuple[list[int], int]]:
    """Yield the list with the step that says the same: transformers reads the one, vLLM the other."""
    found = marks(config)
    for step in range(1, len(found) + 1):
        if hf.every(step, len(found)) == found:
            yield [layer for layer, mixed in enumerate(found) if mixed], step


def _chunked(said: list[str] | None, config: Config) -> tuple[int, ...]:
    """Return a mark a layer, 1 for each that sees its chunk: where nothing is said, those with positions."""
    if said is None:
        return tuple(hf.rotated_layers(config))
    return hf.marks_of(said, config, KINDS)


KINDS = ("full_attention", "chunked_attention")

LLAMA4 = Family(
    name="llama4",
    needs=MIXED,
    traits={
        **LLAMA_TRAITS,
        "router_score": "sigmoid",
        "router_normed": False,
        "router_on_input": True,
        "rope_interleaved": True,
    },
    hf=hf.dialect(
        "Llama4ForCausalLM",
        "llama4_text",
        ROWS,
        (
            place("layers", "num_hidden_layers"),
            place("hidden", "hidden_size"),
            place("heads", "num_attention_heads"),
            place("kv_heads", "num_key_value_heads"),
            place("head_dim", "head_dim"),
            place("ffn", "intermediate_size_mlp"),
            place("moe_ffn", "intermediate_size"),
            place("shared_ffn", "intermediate_size"),
            place("vocab", "vocab_size"),
            place("positions", "max_position_embeddings"),
            place("norm_eps", "rms_norm_eps", default=1e-5),
            place("activation", "hidden_act", default="silu", words=hf.ACTIVATIONS),
            place("rope_theta", "rope_theta", "rope_parameters.rope_theta", default=500000.0),
            *hf.rope("rope_scaling", "rope_parameters", types=("default", "llama3")),
            *hf.ATTENTION_BIASES,
            place("qk_norm", "use_qk_norm", default="plain", words=(("plain", True), ("none", False))),
            place("experts", "num_local_experts", default=16),
            place("topk", "num_experts_per_tok", default=1),
            Spread("blocks", "moe_layers", (list[int], 1), _mixtures, _spellings, more=("interleave_moe_layer_step",)),
            hf.ROPE_LAYERS,
            # null means no chunks and an absent key 8192: a config has to say it
            place("chunk", "attention_chunk_size"),
            Spread("chunk_layers", "layer_types", list[str], _chunked, lambda c: hf.kinds_of(c, "chunk_layers", KINDS)),
            place("temperature", "attn_temperature_tuning", default=True),
            place("temperature_floor", "floor_scale", default=8192),
            place("temperature_scale", "attn_scale", default=0.1),
            hf.TIED,
            hf.DTYPE,
            *hf.TOKENS,
        ),
        ignored="output_router_logits router_aux_loss_coef router_jitter_noise for_llm_compressor",
    ),
    trtllm=None,
)

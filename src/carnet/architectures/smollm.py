"""SmolLM3: Llama with layers that have no positions.

transformers: modeling_smollm3.py, whose windows are refused: no published model has one.
"""

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf
from carnet.dialects.configs import place

SMOLLM3 = Family(
    name="smollm3",
    traits=LLAMA_TRAITS,
    hf=hf.dialect(
        "SmolLM3ForCausalLM",
        "smollm3",
        hf.LLAMA_ROWS,
        (
            *hf.LLAMA_FIELDS,
            *hf.ATTENTION_BIASES,
            place("mlp_bias", "mlp_bias", default=False),
            hf.ROPE_LAYERS,
            hf.TIED,
        ),
        absent={"num_key_value_heads": 4, "rope_theta": 2000000.0, "tie_word_embeddings": True},
        written=hf.NO_PADDING,
        guards={"use_sliding_window": (False,)},
        ignored="sliding_window layer_types max_window_layers",
    ),
    trtllm=None,
)

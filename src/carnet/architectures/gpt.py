"""Nemotron and StarCoder2: LayerNorm with bias, rotary positions, plain MLP, grouped queries; TensorRT-LLM builds both from its GPT.

transformers: modeling_nemotron.py (its norms scale by one more than they store), modeling_starcoder2.py. TensorRT-LLM:
tensorrt_llm/models/gpt/config.py and convert.py.
"""

from carnet.architectures.family import Family
from carnet.dialects import hf, trtllm, vllm
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import place
from carnet.dialects.hf import LAYER
from carnet.dialects.rows import biased
from carnet.model.fields import Value
from carnet.model.model import head_share

TRAITS: dict[str, Value] = {"norm": "layer", "gated": False, "position": "rope"}

HF_ROWS = (hf.EMBED, *hf.NORMS, *hf.ATTENTION, hf.FINAL_NORM, hf.HEAD, *hf.NORM_BIASES)
NEMOTRON_MLP = (
    *biased(LAYER + "mlp.up_proj", "ffn hidden", "mlp.up"),
    *biased(LAYER + "mlp.down_proj", "hidden ffn", "mlp.down"),
)
STARCODER2_MLP = (
    *biased(LAYER + "mlp.c_fc", "ffn hidden", "mlp.up"),
    *biased(LAYER + "mlp.c_proj", "hidden ffn", "mlp.down"),
)

TRTLLM_FIELDS: tuple[Field, ...] = (
    *trtllm.SIZES,
    *trtllm.ROPE,
    place("rope_percent", "rotary_pct", default=1.0),
    # one flag gives every linear layer a bias
    place("qkv_bias", "bias", default=True),
    place("out_bias", "bias", default=True),
    place("mlp_bias", "bias", default=True),
)
TRTLLM_FIXED = {**trtllm.GPT_FIXED, "position_embedding_type": "rope_gpt_neox"}

NEMOTRON = Family(
    name="nemotron",
    vllm=vllm.LLAMA,
    traits=TRAITS,
    hf=hf.dialect(
        "NemotronForCausalLM",
        "nemotron",
        (*HF_ROWS, *NEMOTRON_MLP),
        (
            *hf.SIZES,
            place("norm_eps", "norm_eps", default=1e-5),
            place("activation", "hidden_act", default="relu2", words=(("relu2", "relu2"), *hf.ACTIVATIONS)),
            *hf.ROPE,
            place(
                "rope_percent", "partial_rotary_factor", "rope_parameters.partial_rotary_factor", "rope_percent", default=0.5
            ),
            *hf.ATTENTION_BIASES,
            place("mlp_bias", "mlp_bias", default=False),
            hf.TIED,
            hf.DTYPE,
            *hf.TOKENS,
        ),
        zero_centred=True,
    ),
    trtllm=trtllm.dialect(
        "NemotronForCausalLM",
        trtllm.PLAIN_MLP,
        (
            *TRTLLM_FIELDS,
            place("activation", "hidden_act", words=(("relu2", "squared-relu"),)),
            # NVIDIA's config does not say it, and neither does carnet's unless it must
            place("tied", "tie_word_embeddings", "share_embedding_table", default=False, omit=True),
        ),
        fixed={**TRTLLM_FIXED, "gpt_variant": "nemotron"},
        written=trtllm.GPT_WRITTEN,
    ),
)

STARCODER2 = Family(
    name="starcoder2",
    traits=TRAITS,
    hf=hf.dialect(
        "Starcoder2ForCausalLM",
        "starcoder2",
        (*HF_ROWS, *STARCODER2_MLP),
        (
            *(field for field in hf.SIZES if field.field != "head_dim"),
            place("head_dim", "head_dim", default=head_share, omit=True),
            place("norm_eps", "norm_epsilon", default=1e-5),
            place("activation", "hidden_act", default="gelu_tanh", words=hf.ACTIVATIONS),
            *hf.ROPE,
            place("window", "sliding_window", default=None),
            place("qkv_bias", "use_bias", default=True),
            place("out_bias", "use_bias", default=True),
            place("mlp_bias", "use_bias", default=True),
            place("tied", "tie_word_embeddings", default=True),
            hf.DTYPE,
            *hf.TOKENS,
        ),
        absent={"num_key_value_heads": 2},
        # the released configs say these too, and modeling_starcoder2.py reads none of them
        guards={"mlp_type": ("default",), "norm_type": ("layer_norm",), "scale_attn_weights": (True,)},
        ignored="activation_function attention_softmax_in_fp32 embedding_dropout layer_norm_epsilon residual_dropout "
        "scale_attention_softmax_in_fp32",
    ),
    trtllm=trtllm.dialect(
        "Starcoder2ForCausalLM",
        trtllm.PLAIN_MLP,
        (
            *TRTLLM_FIELDS,
            # its only gelu is the tanh form: tensorrt_llm/functional.py
            place("activation", "hidden_act", words=(("gelu_tanh", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"))),
            place("tied", "tie_word_embeddings", "share_embedding_table", default=True, omit=True),
        ),
        fixed={**TRTLLM_FIXED, "gpt_variant": "starcoder2"},
        written=trtllm.GPT_WRITTEN,
    ),
)

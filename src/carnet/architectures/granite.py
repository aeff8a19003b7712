"""Granite 3: Llama with four factors, on the embedding, the attention scores, what a layer adds, and under the logits.

transformers: modeling_granite.py.
"""

from collections.abc import Iterator

from carnet.architectures.family import LLAMA_TRAITS, Family
from carnet.dialects import hf, vllm
from carnet.dialects.configs import Spread, place
from carnet.model.fields import Config, Value
from carnet.model.model import number, value


def _scale(said: float, config: Config) -> Value:
    return None if said == number(config, "head_dim") ** -0.5 else said


def _multiplier(config: Config) -> Iterator[Value]:
    scale = value(config, "attention_scale")
    yield number(config, "head_dim") ** -0.5 if scale is None else scale


GRANITE = Family(
    name="granite",
    vllm=vllm.LLAMA,
    traits=LLAMA_TRAITS,
    hf=hf.dialect(
        "GraniteForCausalLM",
        "granite",
        hf.LLAMA_ROWS,
        (
            *hf.SIZES_WITHOUT_HEAD,
            place("norm_eps", "rms_norm_eps", default=1e-6),
            place("activation", "hidden_act", default="silu", words=hf.ACTIVATIONS),
            *hf.ROPE,
            hf.DTYPE,
            *hf.TOKENS,
            *hf.ATTENTION_BIASES,
            place("mlp_bias", "mlp_bias", default=False),
            place("embed_scale", "embedding_multiplier", default=1.0),
            # a config that is silent means 1, not one over the root of a head's width
            Spread("attention_scale", "attention_multiplier", 1.0, _scale, _multiplier),
            place("residual_scale", "residual_multiplier", default=1.0),
            place("logits_divisor", "logits_scaling", default=1.0),
            hf.TIED,
        ),
    ),
    trtllm=None,
    without="NVIDIA's later classes know its factors, in a form that carnet does not write",
)

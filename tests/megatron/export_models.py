"""Random models as Megatron names their tensors, and Megatron's own converters beside ours.

Megatron's need two functions of TensorRT-LLM, which its own tests replace; here they do what TensorRT-LLM's do.
"""

import importlib
import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from megatron.core.export.data_type import DataType as OriginalType
from megatron.core.export.export_config import ExportConfig as OriginalExport
from megatron.core.export.trtllm.trtllm_layers import TRTLLMLayers as OriginalLayers
from megatron.core.transformer import TransformerConfig

from carnet.megatron.export.data_type import DataType
from carnet.megatron.export.export_config import ExportConfig
from carnet.megatron.export.trtllm.model_to_trllm_mapping.default_conversion_dict import DEFAULT_CONVERSION_DICT
from carnet.megatron.export.trtllm.trtllm_layers import TRTLLMLayers
from carnet.megatron.export.trtllm.trtllm_weights_converter.single_device_trtllm_model_weights_converter import (
    SingleDeviceTRTLLMModelWeightsConverter,
)

CONVERTERS = "megatron.core.export.trtllm.trtllm_weights_converter"
single, distributed = (
    importlib.import_module(f"{CONVERTERS}.{kind}_trtllm_model_weights_converter") for kind in ("single_device", "distributed")
)
single.pad_vocab_size = lambda vocab_size, tp_size: math.ceil(vocab_size / tp_size) * tp_size
single.str_dtype_to_torch = distributed.str_dtype_to_torch = lambda dtype: getattr(torch, dtype.name)

NAMES = DEFAULT_CONVERSION_DICT | {  # a user's own, for what the default has no name
    "decoder.layers.attention.replaced.weight": TRTLLMLayers.attention_linear_weight,
    "decoder.layers.ffn.replaced.weight": TRTLLMLayers.ffn_linear_weight,
    "decoder.layers.ffn.fc.weight": TRTLLMLayers.ffn_fc_weight,
    "decoder.layers.ffn.proj.weight": TRTLLMLayers.ffn_projection_weight,
}
ORIGINAL_NAMES = {name: OriginalLayers[layer.name] for name, layer in NAMES.items()}


@dataclass(frozen=True)
class Model:
    tp: int
    pp: int
    kv: int
    rep: int
    dim: int
    hidden: int
    ffn: int
    layers: int
    vocab: int
    experts: int  # 0 for a plain MLP
    activation: str
    gated_linear_unit: bool
    normalization: str
    zero_centred: bool
    bias: bool
    tied: bool
    positions: int  # 0 for none
    parallel_embedding: bool
    stacked: bool
    nas: bool
    source: torch.dtype
    target: str

    @property
    def gated(self):
        return self.gated_linear_unit or self.activation.endswith("glu")

    def config(self):
        return TransformerConfig(
            num_layers=self.layers,
            num_attention_heads=self.kv * self.rep,
            num_query_groups=self.kv,
            kv_channels=self.dim,
            hidden_size=self.hidden,
            ffn_hidden_size=self.ffn,
            num_moe_experts=self.experts or None,
            gated_linear_unit=self.gated_linear_unit,
            normalization=self.normalization,
            layernorm_zero_centered_gamma=self.zero_centred,
            add_bias_linear=self.bias and not self.experts,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
        )

    def layer(self):
        """Return name and shape of what a layer holds, as Megatron names it."""
        rows = self.kv * (self.rep + 2) * self.dim
        fc = self.ffn * (2 if self.gated else 1)
        shapes = {
            "input_layernorm.weight": [self.hidden],
            "self_attention.linear_qkv.weight": [rows, self.hidden],
            "self_attention.linear_proj.weight": [self.hidden, self.kv * self.rep * self.dim],
            "mlp.linear_fc1.layer_norm_weight": [self.hidden],
        }
        if self.normalization == "LayerNorm":
            shapes |= {"input_layernorm.bias": [self.hidden], "mlp.linear_fc1.layer_norm_bias": [self.hidden]}
        if self.bias:
            shapes |= {"self_attention.linear_qkv.bias": [rows], "self_attention.linear_proj.bias": [self.hidden]}
        if self.nas:
            shapes |= {
                "attention.replaced.weight": [self.hidden, self.hidden],
                "ffn.replaced.weight": [self.hidden, self.hidden],
                "ffn.fc.weight": [fc, self.hidden],
                "ffn.proj.weight": [self.hidden, self.ffn],
            }
        if self.experts:
            return shapes | {
                "mlp.router.weight": [self.experts, self.hidden],
                "mlp.experts.experts.linear_fc1.weight": [self.experts, fc, self.hidden],
                "mlp.experts.experts.linear_fc2.weight": [self.experts, self.hidden, self.ffn],
            }
        if self.bias:
            shapes |= {"mlp.linear_fc1.bias": [fc], "mlp.linear_fc2.bias": [self.hidden]}
        return shapes | {"mlp.linear_fc1.weight": [fc, self.hidden], "mlp.linear_fc2.weight": [self.hidden, self.ffn]}

    def state(self):
        made = torch.Generator().manual_seed(3)

        def random(*shape):
            return torch.randn(*shape, generator=made).to(self.source)

        state = {"embedding.word_embeddings.weight": random(self.vocab, self.hidden)}
        if self.positions:
            state["embedding.position_embeddings.weight"] = random(self.positions, self.hidden)
        for name, shape in self.layer().items():
            if self.stacked:
                state[f"decoder.layers.{name}"] = random(self.layers, *shape)
            else:
                state |= {f"decoder.layers.{layer}.{name}": random(*shape) for layer in range(self.layers)}
        state["decoder.final_layernorm.weight"] = random(self.hidden)
        if self.normalization == "LayerNorm":
            state["decoder.final_layernorm.bias"] = random(self.hidden)
        if not self.tied:
            state["output_layer.weight"] = random(self.vocab, self.hidden)
        return state


PLAIN = Model(
    tp=2,
    pp=1,
    kv=2,
    rep=2,
    dim=3,
    hidden=4,
    ffn=12,
    layers=2,
    vocab=12,
    experts=0,
    activation="gelu",
    gated_linear_unit=False,
    normalization="LayerNorm",
    zero_centred=False,
    bias=True,
    tied=False,
    positions=4,
    parallel_embedding=False,
    stacked=False,
    nas=False,
    source=torch.float32,
    target="float32",
)


@st.composite
def models(draw):
    tp = draw(st.sampled_from((1, 2, 4)))
    kv = draw(st.sampled_from((1, 2, 4, 8)))
    experts = draw(st.sampled_from((0, 0, 3)))
    parallel, tied = draw(st.booleans()), draw(st.booleans())
    whole = draw(st.integers(2, 6)) * tp
    gated = draw(st.booleans()) or bool(experts)
    pp = draw(st.sampled_from((1, 2)))
    return Model(
        tp=tp,
        pp=pp,
        kv=kv,
        rep=draw(st.integers(1, 3)) * max(1, tp // kv),
        dim=draw(st.integers(1, 4)),
        hidden=draw(st.integers(1, 3)) * tp,
        ffn=draw(st.integers(1, 4)) * tp,
        layers=draw(st.integers(pp, 3)),
        # the original leaves the ranks shares of a head that no engine takes, where the vocabulary does not divide
        vocab=whole - draw(st.integers(0, 1)) if tied and parallel else whole,
        experts=experts,
        activation=draw(st.sampled_from(("swiglu", "geglu", "fast-swiglu", "fast-geglu"))) if gated else "gelu",
        gated_linear_unit=gated and draw(st.booleans()),
        normalization=draw(st.sampled_from(("LayerNorm", "RMSNorm"))),
        zero_centred=draw(st.booleans()),
        bias=draw(st.booleans()),
        tied=tied,
        positions=draw(st.sampled_from((0, tp, 3 * tp))),
        parallel_embedding=parallel,
        stacked=draw(st.booleans()),
        nas=draw(st.booleans()) and not experts,
        source=draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        target=draw(st.sampled_from(("bfloat16", "float16", "float32"))),
    )


def convert_both(model, scales=None):
    """Return both converters after the same call."""
    cut = {"inference_tp_size": model.tp, "inference_pp_size": model.pp, "use_parallel_embedding": model.parallel_embedding}
    said = {"activation": model.activation, "scales": scales}
    ours = SingleDeviceTRTLLMModelWeightsConverter(ExportConfig(**cut), model.config(), DataType[model.target], **said)
    theirs = single.SingleDeviceTRTLLMModelWeightsConverter(
        OriginalExport(**cut), model.config(), OriginalType[model.target], **said
    )
    ours.convert(model.state(), NAMES, state_dict_split_by_layer_numbers=not model.stacked)
    theirs.convert(model.state(), ORIGINAL_NAMES, state_dict_split_by_layer_numbers=not model.stacked)
    return ours, theirs


def assert_same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].is_contiguous(), name
        assert not found[name].requires_grad, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def bits(tensor):
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])

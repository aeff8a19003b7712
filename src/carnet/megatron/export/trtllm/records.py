"""What TensorRT-LLM's classes say of a model and of a rank's place, as records that need no TensorRT-LLM.

Fields, defaults and what follows from what: tensorrt_llm/models/modeling_utils.py PretrainedConfig and the config.py of each model;
tensorrt_llm/mapping.py; tensorrt_llm/layers/moe.py. Megatron's helper says more than some of the classes ask for; they keep that as
attributes, and so it is a field here.
"""

import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

from carnet.algebra.layout import cut_unevenly
from carnet.dialects.heterogeneous import Layer, read_blocks

LEFT_OUT = ("moe_num_experts", "moe_top_k", "moe_normalization_mode", "block_configs")  # ``moe`` and ``layer_configs`` say them
IMPLEMENTATIONS = {"*": "attention", "L": "linear", "-": "mlp", "l": "linear"}


class Place(Protocol):
    """A rank's place in the inference: TensorRT-LLM's ``Mapping``, carnet's, or what a script makes in its stead."""

    tp_size: int
    tp_rank: int

    def pp_layers(self, num_layers: int) -> Sequence[int]:
        """Return the layers of its stage."""

    def is_first_pp_rank(self) -> bool:
        """Say whether the stage holds what comes before the layers."""

    def is_last_pp_rank(self) -> bool:
        """Say whether the stage holds what comes after them."""


class EngineConfig(Protocol):
    """What an engine is built for: a config of TensorRT-LLM's, or a record in its stead."""

    architecture: str
    use_parallel_embedding: bool
    share_embedding_table: bool
    mapping: Place


@dataclass
class Mapping:
    """A rank's place in the inference: stages one after the other, neighbours share a stage."""

    world_size: int = 1
    rank: int = 0
    gpus_per_node: int = 8
    _: KW_ONLY
    cp_size: int = 1
    tp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        if self.tp_size * self.pp_size * self.cp_size != self.world_size:
            sizes = f"{self.tp_size} * {self.pp_size} * {self.cp_size}"
            raise ValueError(f"world_size is tp_size * pp_size * cp_size, and not {self.world_size} where these are {sizes}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"there is no rank {self.rank} of {self.world_size}")

    @property
    def tp_rank(self) -> int:
        """Return the place among the ranks that share every layer."""
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        """Return the stage."""
        return self.rank // (self.tp_size * self.cp_size)

    def is_first_pp_rank(self) -> bool:
        """Say whether the stage holds what comes before the layers."""
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        """Say whether the stage holds what comes after them."""
        return self.pp_rank == self.pp_size - 1

    def pp_layers(self, num_layers: int) -> list[int]:
        """Return the layers of the stage; the first stages have one more where the number does not divide.

        >>> [Mapping(world_size=2, rank=rank, pp_size=2).pp_layers(5) for rank in range(2)]
        [[0, 1, 2], [3, 4]]
        """
        held = cut_unevenly(num_layers, self.pp_size, self.pp_rank)
        return list(range(held.start, held.stop))

    def to_dict(self) -> dict[str, int]:
        """Return the fields, and how experts are shared: cut like everything else."""
        return asdict(self) | {"moe_tp_size": self.tp_size, "moe_ep_size": 1}


@dataclass(kw_only=True)
class QuantConfig:
    """How the weights and the cache of keys and values are quantized: not, or "FP8"."""

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    group_size: int | None = 128
    smoothquant_val: float = 0.5
    clamp_val: list[float] | None = None
    use_meta_recipe: bool = False
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    exclude_modules: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


class ExpertScaleNormalizationMode(IntEnum):
    """What becomes of the weights of the chosen experts."""

    NONE = 0
    RENORMALIZE = 1
    SPARSE_MIXER = 2
    DEVICE_LIMITED = 3
    DEVICE_LIMITED_RENORM = 4


@dataclass(kw_only=True)
class MoeConfig:
    """A mixture of experts; none where there is no more than one."""

    ExpertScaleNormalizationMode = ExpertScaleNormalizationMode

    num_experts: int = 0
    top_k: int = 0
    normalization_mode: int = ExpertScaleNormalizationMode.RENORMALIZE

    def has_moe(self) -> bool:
        """Say whether there is a mixture."""
        return self.num_experts > 1

    def to_dict(self) -> dict[str, int]:
        """Return the fields."""
        return {name: int(value) for name, value in asdict(self).items()}


@dataclass(kw_only=True)
class PretrainedConfig:
    """What every model of TensorRT-LLM has a word for, and what Megatron's helper says of all of them."""

    architecture: str
    dtype: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int | None = None
    hidden_act: str = "gelu"
    logits_dtype: str = "float32"
    norm_epsilon: float = 1e-5
    position_embedding_type: str = "learned_absolute"
    max_position_embeddings: int | None = None
    rotary_embedding_dim: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    mapping: Any = field(default_factory=Mapping)
    quantization: QuantConfig | dict[str, Any] = field(default_factory=QuantConfig)
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0
    share_embedding_table: bool = False
    head_size: int | None = None
    qk_layernorm: bool = False
    runtime_defaults: None = None
    bias: bool = True
    apply_query_key_layer_scaling: bool = False
    rotary_pct: float = 1.0
    rotary_base: float = 10000.0
    rotary_scaling: dict[str, Any] | None = None
    moe_num_experts: int = 0
    moe_top_k: int = 0
    moe_normalization_mode: int = ExpertScaleNormalizationMode.RENORMALIZE
    moe_tp_mode: int = 0
    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        if isinstance(self.quantization, dict):
            self.quantization = QuantConfig(**self.quantization)
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.head_size = self.head_size or self.hidden_size // self.num_attention_heads
        self.rotary_embedding_dim = self.rotary_embedding_dim or int(self.head_size * self.rotary_pct)

    @property
    def moe(self) -> MoeConfig:
        """Return the mixture of experts."""
        mode = self.moe_normalization_mode
        return MoeConfig(num_experts=self.moe_num_experts, top_k=self.moe_top_k, normalization_mode=mode)

    @property
    def quant_algo(self) -> str | None:
        """Return how the weights are quantized."""
        return self.quantization.quant_algo if isinstance(self.quantization, QuantConfig) else None

    def set_rank(self, rank: int) -> None:
        """Make this the config of a rank."""
        self.mapping.rank = rank

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as ``config.json`` has them, which is every rank's: what others follow from is left out."""
        found = asdict(self) | {"mapping": self.mapping.to_dict(), "moe": self.moe.to_dict()}
        del found["mapping"]["rank"]
        return {name: value for name, value in found.items() if name not in LEFT_OUT}

    def to_json_file(self, config_file: str) -> None:
        """Write ``config.json``."""
        Path(config_file).write_text(json.dumps(self.to_dict(), indent=4))


@dataclass(kw_only=True)
class GPTConfig(PretrainedConfig):
    """Of tensorrt_llm/models/gpt/config.py."""

    gpt_variant: str = "gpt2"
    q_scaling: float = 1.0
    embedding_scale: float | None = None
    inner_layernorm: bool = False
    norm_before_bmm1: bool = False


@dataclass(kw_only=True)
class LLaMAConfig(PretrainedConfig):
    """Of tensorrt_llm/models/llama/config.py."""

    mlp_bias: bool = False
    attn_bias: bool = False
    residual_mlp: bool = False
    disable_weight_only_quant_plugin: bool = False
    remove_duplicated_kv_heads: bool = False
    fc_after_embed: bool = False
    use_input_layernorm_in_first_layer: bool = True
    use_last_layernorm: bool = True
    layer_idx_offset: int = 0


@dataclass(kw_only=True)
class GemmaConfig(PretrainedConfig):
    """Of tensorrt_llm/models/gemma/config.py."""

    mlp_bias: bool = False
    attn_bias: bool = False
    inter_layernorms: bool = False


@dataclass(kw_only=True)
class FalconConfig(PretrainedConfig):
    """Of tensorrt_llm/models/falcon/config.py."""

    parallel_attention: bool = False
    new_decoder_architecture: bool = False


@dataclass(kw_only=True)
class DeciConfig(PretrainedConfig):
    """Of tensorrt_llm/models/nemotron_nas/config.py: what each layer is, out of the blocks of a Hugging Face config."""

    block_configs: list[dict[str, Any]] | None = None
    layer_configs: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_configs is not None:
            sizes = {"layers": self.num_hidden_layers, "hidden": self.hidden_size}
            self.layer_configs = [self._layer(layer) for layer in read_blocks(self.block_configs, sizes)]

    def _layer(self, layer: Layer) -> dict[str, Any]:
        mixer, mlp = (next((IMPLEMENTATIONS[each] for each in layer.word if each in some), "no_op") for some in ("*L", "-l"))
        return {
            "attention": {
                "impl": mixer,
                "num_key_value_heads": self.num_attention_heads // layer.group if layer.group else None,
            },
            "ffn": {"impl": mlp, "intermediate_size": layer.ffn or None},
        }

    @property
    def layer_types(self) -> list[str]:
        """Return what is in place of each layer's attention."""
        return [layer["attention"]["impl"] for layer in self.layer_configs or ()]

    @property
    def num_kv_heads_per_layer(self) -> list[int]:
        """Return the KV heads of each layer that attends."""
        heads = [layer["attention"]["num_key_value_heads"] for layer in self.layer_configs or ()]
        return [each for each in heads if each]

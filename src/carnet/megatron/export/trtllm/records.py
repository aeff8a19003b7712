"""What TensorRT-LLM's classes say of a model and of a rank's place, as records that need no TensorRT-LLM.

What a class says of itself is what its family's table writes into ``config.json``; what follows from what:
tensorrt_llm/models/modeling_utils.py PretrainedConfig, tensorrt_llm/mapping.py, tensorrt_llm/layers/moe.py. Megatron's helper says more
than some of the classes ask for; they keep that as attributes, and so do these.
"""

import json
from dataclasses import KW_ONLY, asdict, dataclass
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from carnet.algebra.layout import cut_unevenly
from carnet.architectures.falcon import FALCON
from carnet.architectures.family import Family
from carnet.architectures.gemma import GEMMA
from carnet.architectures.gpt2 import GPT2
from carnet.architectures.llama import LLAMA
from carnet.architectures.nemotron_nas import NEMOTRON_NAS, spelled_layers
from carnet.dialects.heterogeneous import MEANINGS, read_blocks
from carnet.model.keys import put

LEFT_OUT = ("moe_num_experts", "moe_top_k", "moe_normalization_mode", "block_configs")  # ``moe`` and ``layer_configs`` say them


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


class QuantConfig(SimpleNamespace):
    """How the weights and the cache of keys and values are quantized: not, or "FP8"."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return dict(vars(self))


class PretrainedConfig(SimpleNamespace):
    """A model: every key that its family's table writes, and every keyword that it is made with, is an attribute."""

    family: Family
    mapping: Any  # the record above, or TensorRT-LLM's own
    quantization: QuantConfig

    def __init__(self, **said: Any) -> None:  # noqa: ANN401  # the keys of all classes
        assert self.family.trtllm is not None, "the classes are those of NVIDIA's models"
        table, known = self.family.trtllm.table, dict[str, Any]()
        for key, value in {**table.fixed, **table.written, "rotary_scaling": None}.items():
            put(known, key, value)
        known["quantization"] = QuantConfig(**known["quantization"] | said.pop("quantization", {}))
        super().__init__(**known | {"mapping": Mapping()} | said)
        had = said.get
        self.num_key_value_heads = had("num_key_value_heads") or self.num_attention_heads
        self.intermediate_size = had("intermediate_size") or 4 * self.hidden_size
        self.head_size = had("head_size") or self.hidden_size // self.num_attention_heads
        self.rotary_embedding_dim = had("rotary_embedding_dim") or int(self.head_size * had("rotary_pct", 1.0))
        mode = had("moe_normalization_mode", ExpertScaleNormalizationMode.RENORMALIZE)
        self.moe = MoeConfig(num_experts=had("moe_num_experts", 0), top_k=had("moe_top_k", 0), normalization_mode=mode)

    @property
    def quant_algo(self) -> str | None:
        """Return how the weights are quantized."""
        found: str | None = self.quantization.quant_algo
        return found

    def set_rank(self, rank: int) -> None:
        """Make this the config of a rank."""
        self.mapping.rank = rank

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as ``config.json`` has them, which is every rank's: what others follow from is left out."""
        inner = {name: getattr(self, name).to_dict() for name in ("mapping", "moe", "quantization")}
        del inner["mapping"]["rank"]
        return {name: value for name, value in (vars(self) | inner).items() if name not in LEFT_OUT}

    def to_json_file(self, config_file: str) -> None:
        """Write ``config.json``."""
        Path(config_file).write_text(json.dumps(self.to_dict(), indent=4))


class GPTConfig(PretrainedConfig):
    """Of tensorrt_llm/models/gpt/config.py."""

    family = GPT2


class LLaMAConfig(PretrainedConfig):
    """Of tensorrt_llm/models/llama/config.py."""

    family = LLAMA


class GemmaConfig(PretrainedConfig):
    """Of tensorrt_llm/models/gemma/config.py."""

    family = GEMMA


class FalconConfig(PretrainedConfig):
    """Of tensorrt_llm/models/falcon/config.py."""

    family = FALCON


class DeciConfig(PretrainedConfig):
    """Of tensorrt_llm/models/nemotron_nas/config.py: what each layer is, out of the blocks of a Hugging Face config."""

    family = NEMOTRON_NAS

    def __init__(self, *, block_configs: list[dict[str, Any]] | None = None, **said: Any) -> None:  # noqa: ANN401
        super().__init__(**said)
        if block_configs is not None:
            sizes = {"layers": self.num_hidden_layers, "hidden": self.hidden_size, "heads": self.num_attention_heads}
            each = read_blocks(block_configs, sizes)
            config = sizes | {name: meaning(each, sizes) for name, meaning in MEANINGS.items()}
            self.layer_configs, self.layer_types, self.num_kv_heads_per_layer, *_ = spelled_layers(config)
            self.block_configs = block_configs

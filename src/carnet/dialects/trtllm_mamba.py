"""What NVIDIA's ranks of Mamba, 1 and 2, share: tensorrt_llm 0.16 to 1.2, models/mamba/config.py and convert.py."""

from collections.abc import Mapping
from dataclasses import replace

from carnet.dialects import trtllm
from carnet.dialects.configs import Row as Field
from carnet.dialects.configs import place
from carnet.dialects.rows import Dialect, Row

SSM = trtllm.LAYER + "ssm."
SIZED = {"layers", "hidden", "vocab", "norm_eps", "dtype", "ep", "moe_tp"}


def sizes(*more: str) -> tuple[Field, ...]:
    """Return the fields of these that NVIDIA's classes share which a Mamba has, too, and ``more``."""
    return tuple(field for field in trtllm.SIZES if getattr(field, "field", "") in {*SIZED, *more})


def dialect(
    version: str,
    rows: tuple[Row, ...],
    fields: tuple[Field, ...],
    *,
    fixed: Mapping[str, object],
    written: Mapping[str, object],
) -> Dialect:
    """Write the dialect of a version; ``fixed`` and ``written`` are what its config has beside."""
    made = trtllm.dialect(
        "MambaForCausalLM",
        rows,
        (
            *fields,
            place("ssm_conv", "conv_kernel"),
            place("ssm_conv_bias", default=True),
            place("tied", "tie_word_embeddings", default=True),  # NVIDIA's config has no such field
        ),
        common=(),
        fixed={
            "position_embedding_type": "learned_absolute",
            "hidden_act": "silu",
            "mamba_version": version,
            "rms_norm": True,
            **fixed,
            "use_bias": False,
            "layer_types": ["recurrent"],
            "use_parallel_embedding": False,
        },
        written={"residual_in_fp32": True, "pad_vocab_size_multiple": 1, "embedding_sharding_dim": 0, **written},
        ignored="head_size rotary_embedding_dim max_position_embeddings",
        plain=True,  # examples/models/core/mamba/README.md: FP16 and BF16
    )
    return replace(made, prefixes=("backbone.",))

"""Where the spec of a hybrid's stack was before 0.18."""

from carnet.megatron.post_training.modelopt.hybrid.model_specs import (
    get_hybrid_stack_modelopt_spec,
    get_mamba_stack_modelopt_spec,
)

__all__ = ["get_hybrid_stack_modelopt_spec", "get_mamba_stack_modelopt_spec"]

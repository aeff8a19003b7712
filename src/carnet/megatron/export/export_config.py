"""The cut of the inference."""

import warnings
from dataclasses import dataclass


@dataclass
class ExportConfig:
    """How the inference is cut: as ``megatron.core.export.export_config`` has it."""

    inference_tp_size: int = 1  # ranks that share every layer
    inference_pp_size: int = 1  # stages that share the layers
    use_parallel_embedding: bool = False  # each rank holds a part of the embedding's rows
    use_embedding_sharing: bool | None = None  # deprecated

    def __post_init__(self) -> None:
        if self.use_embedding_sharing is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("always")  # shown, and no error, whatever the program's filters: as the original does
                message = "use_embedding_sharing of ExportConfig is share_embeddings_and_output_weights of TRTLLMHelper"
                warnings.warn(message, DeprecationWarning, stacklevel=3)

"""Quantize a Hugging Face folder to FP8 with NVIDIA's ModelOpt, as its own examples do: load, calibrate, export.

Calibration is one batch of 16 tokens, which costs next to nothing: what remains is what carnet does too.
"""

import sys


def main(source: str, target: str) -> None:
    """Load, quantize, export."""
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization import FP8_DEFAULT_CFG, quantize
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    with torch.inference_mode():
        quantize(model, FP8_DEFAULT_CFG, lambda model: model(torch.arange(16)[None]))
        export_hf_checkpoint(model, export_dir=target)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

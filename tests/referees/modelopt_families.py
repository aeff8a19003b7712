"""A program for tests: have ModelOpt export Hugging Face folders in one format, with no help of carnet.

It runs in a process of its own, because ModelOpt changes transformers and torch where it is imported::

    python modelopt_families.py "mxfp8" OUT HF_DIR ...
"""

import copy
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM

# as NVIDIA publishes hybrids: experts of four bits whose activations stay as they are, all that mixes tokens in FP8, the cache too
FP8 = {"num_bits": (4, 3), "axis": None}
MIXERS = [
    {"quantizer_name": f"*{module}.{which}_quantizer", "cfg": FP8}
    for module in ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj")
    for which in ("weight", "input")
]
MIXED = {**mtq.W4A16_NVFP4_CFG, "quant_cfg": [*mtq.W4A16_NVFP4_CFG["quant_cfg"], *MIXERS, *mtq.FP8_KV_CFG["quant_cfg"]]}
WISHES = {
    "mixed": MIXED,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8-channel": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
    "mxfp4": mtq.MXFP4_DEFAULT_CFG,
}


def main() -> None:
    """Export every folder."""
    wish, _, without = sys.argv[1].partition(" without ")
    config = copy.deepcopy(WISHES[wish])
    if without:
        config["quant_cfg"].append({"quantizer_name": f"*{without}*", "enable": False})
    out, *folders = map(Path, sys.argv[2:])
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        with torch.no_grad():
            mtq.quantize(model, config, lambda model: model(torch.arange(24)[None]))
            export_hf_checkpoint(model, export_dir=out / folder.name)


if __name__ == "__main__":
    main()

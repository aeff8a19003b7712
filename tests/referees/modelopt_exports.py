"""A program for tests: have ModelOpt calibrate and export a Hugging Face folder, one folder for each wish, with no help of carnet.

It runs in a process of its own, because ModelOpt changes transformers and torch where it is imported::

    python modelopt_exports.py HF_DIR TEXTS.jsonl OUT fp8 nvfp4 ...
"""

import json
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

WISHES = {
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8-kv": mtq.update_quant_cfg_with_kv_cache_quant(mtq.FP8_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"]),
    "fp8-channel": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "fp8-block": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
    "mxfp4": mtq.MXFP4_DEFAULT_CFG,
}


def main() -> None:
    """Export every wish."""
    folder, texts, out = map(Path, sys.argv[1:4])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(json.loads(line)["text"])["input_ids"] for line in texts.read_text().splitlines()]

    def run(model: torch.nn.Module) -> None:
        for each in ids:
            model(torch.tensor([each]))

    for wish in sys.argv[4:]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        with torch.no_grad():
            mtq.quantize(model, WISHES[wish], run)
            export_hf_checkpoint(model, export_dir=out / wish)


if __name__ == "__main__":
    main()

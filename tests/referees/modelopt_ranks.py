"""A program for tests: have ModelOpt calibrate Hugging Face folders in FP8 and export them as ranks, with no help of carnet.

It runs in a process of its own, because ModelOpt changes transformers and torch where it is imported. JOBS.json is a list of
``{"folder": ..., "decoder": ModelOpt's word for the model, "tp": 2, "pp": 2, "cache": true}``. Beside a folder come ``ranks``,
the export, and ``amax.safetensors``, what calibration found, as ``carnet calibrate`` names it::

    python modelopt_ranks.py JOBS.json
"""

import json
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_tensorrt_llm_checkpoint, model_config_export
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

WITH_CACHE = mtq.update_quant_cfg_with_kv_cache_quant(mtq.FP8_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"])
AMAX = {  # what follows the name of a module in ModelOpt, and in the file of calibration
    ".input_quantizer": ".input_amax",
    ".self_attn.k_bmm_quantizer": ".self_attn.k_proj.k_amax",
    ".self_attn.v_bmm_quantizer": ".self_attn.v_proj.v_amax",
}


class Expert(nn.Module):
    """One expert of Mixtral, in linear layers."""

    def __init__(self, gate_up, down):
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.w1, self.w2, self.w3 = map(linear, (gate, down, up))

    def forward(self, hidden):
        """Apply the gated layers."""
        return self.w2(nn.functional.silu(self.w1(hidden)) * self.w3(hidden))


class OfLinearSparseMoeBlock(nn.Module):
    """Mixtral's experts as transformers had them before version 5: ModelOpt 0.47 exports no others as ranks, and knows them by name."""

    def __init__(self, block):
        super().__init__()
        self.gate = linear(block.gate.weight)
        self.experts = nn.ModuleList(map(Expert, block.experts.gate_up_proj, block.experts.down_proj))
        self.top_k = block.gate.top_k

    def forward(self, hidden):
        """Send each token to the experts that the router likes most."""
        tokens = hidden.flatten(0, -2)
        likes, chosen = self.gate(tokens).float().softmax(-1).topk(self.top_k)
        likes = (likes / likes.sum(-1, keepdim=True)).to(tokens.dtype)
        said = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            said.index_add_(0, token, expert(tokens[token]) * likes[token, place, None])
        return said.view_as(hidden)


def linear(weight):
    """Return a linear layer of this weight."""
    layer = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def found(model):
    """Return what calibration found, under the names of the modules in the model's files."""
    amaxes = {}
    for name, module in model.named_modules():
        for end, instead in AMAX.items():
            if name.endswith(end) and module.is_enabled:
                name_in_file = name.removesuffix(end).replace(".mlp.experts.", ".block_sparse_moe.experts.") + instead
                amaxes[name_in_file] = module.amax.float()
    return amaxes


def or_no_config(write):
    """Let ModelOpt say nothing about a model whose tensors it can export and whose config it cannot write any more (Falcon)."""

    def said(config, *args, **kwargs):
        try:
            return write(config, *args, **kwargs)
        except NotImplementedError:
            world = config.tensor_parallel * config.pipeline_parallel
            return {
                "rank": config.rank,
                "mapping": {"world_size": world},
                "decoder": config.layers[0].decoder_type,
                "quantization": {},
            }

    return said


def main() -> None:
    """Calibrate and export."""
    write = model_config_export.convert_to_tensorrt_llm_config
    model_config_export.convert_to_tensorrt_llm_config = or_no_config(write)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype="auto")
        for layer in model.model.layers if model.config.model_type == "mixtral" else ():
            layer.mlp = OfLinearSparseMoeBlock(layer.mlp)
        tokens = torch.randint(model.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(5))
        out = Path(job["folder"]).parent
        with torch.no_grad():
            wish = WITH_CACHE if job["cache"] else mtq.FP8_DEFAULT_CFG
            mtq.quantize(model, wish, lambda model, tokens=tokens: model(tokens, use_cache=False))
            save_file(found(model), out / "amax.safetensors")
            export_tensorrt_llm_checkpoint(model, job["decoder"], model.dtype, out / "ranks", job["tp"], job["pp"])


if __name__ == "__main__":
    main()

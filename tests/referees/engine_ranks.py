"""What each of vLLM's workers holds before it packs its weights, made from a Hugging Face folder by rules of its own.

The rules are those of vLLM 0.32's layers (model_executor/layers/linear.py, vocab_parallel_embedding.py, fused_moe/) and models, carried
out with torch as a person would: nothing here knows a pattern or an axis. tests/vllm asks vLLM itself.
"""

import json
import re

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import carnet

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
PADDED = 64
ENDS = ("q", "k", "v", "o", "gate", "up", "down", "q_a", "q_b", "kv_b")
SCALES = ("_k_scale", "_prob_scale", "_q_scale", "_v_scale")


def save_random(config, folder, seed):
    """Write a folder of transformers, no number of which is what it would be before training."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    for name, parameter in model.named_parameters():  # norms and biases too
        parameter.data.normal_()
        if name.endswith("A_log"):  # which is published in f32, as are other bits that engines hold in their own type
            parameter.data = torch.randn(len(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # which is published in f32
            buffer.data = torch.randn(len(buffer))
    model.save_pretrained(
        folder, save_original_format=config.model_type != "qwen3_5_moe_text"
    )  # published with its experts in one
    return folder


def save_codes(folder, out, words):
    """Write a folder of transformers as codes, the words for which are a style and a scheme, and "static" for scales of activations.

    Each linear layer has seen another magnitude of its activations.
    """
    style, scheme, *more = words.split()
    static, cache = "static" in more, "cache" in more
    if style == "openai":
        save_open(folder, out)
        return
    options = {"activations": "dynamic"} if scheme in ("fp8", "nvfp4") else {}
    if static:
        tensors = load_file(folder / "model.safetensors")
        linear = [name for name in tensors if name.endswith((*(f"{one}_proj.weight" for one in ENDS), "_with_mqa.weight"))]
        amax = {name.replace("weight", "input_amax"): torch.tensor(1 + at / 8) for at, name in enumerate(linear)}
        for what in "kv" if cache else "":
            ends = [name.replace("weight", f"{what}_amax") for name in linear if name.endswith(f"{what}_proj.weight")]
            amax |= {name: torch.tensor(100.0 + 7 * at) for at, name in enumerate(ends)}
        save_file(amax, out.with_name(f"{out.name}.amax.safetensors"))
        options = {"amax": out.with_name(f"{out.name}.amax.safetensors")}
    options |= {"kv_cache": "fp8"} if cache else {}
    assert carnet.cross(folder, out, to="hf", quantize=scheme, style=style, **options).equal


def save_open(folder, out):
    """Write a GPT-OSS of transformers as OpenAI publishes it, its experts as random blocks of MXFP4."""
    tensors, said = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, rows, columns = tensors.pop(name).shape
        shape = experts, columns, rows // 32
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(110, 130, shape, dtype=torch.uint8)
    plain = [f"model.layers.*.{part}" for part in ("self_attn", "mlp.router")] + ["model.embed_tokens", "lm_head"]
    said["quantization_config"] = {"modules_to_not_convert": plain, "quant_method": "mxfp4"}
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(said))


class Worker:
    """One rank of some that share every layer."""

    def __init__(self, tensors, said, rank, ranks, *, shares_experts=False):
        self.hf, self.said, self.rank, self.ranks, self.shares_experts = tensors, said, rank, ranks, shares_experts

    def part(self, tensor, dim=0):
        assert tensor.shape[dim] % self.ranks == 0
        return tensor.chunk(self.ranks, dim)[self.rank].contiguous()

    def vocabulary(self, tensor):
        rows = -(-len(tensor) // PADDED) * PADDED
        whole = torch.zeros(rows, *tensor.shape[1:], dtype=tensor.dtype)
        whole[: len(tensor)] = tensor
        return self.part(whole)

    def heads(self, tensor, count):
        """The heads of keys or values: some of them, or one that other ranks have too."""
        if count >= self.ranks:
            return self.part(tensor)
        return tensor.chunk(count)[self.rank // (self.ranks // count)].contiguous()

    def qkv(self, at, end):
        count = self.said["num_key_value_heads"]
        q, k, v = (self.hf[f"{at}{one}_proj.{end}"] for one in "qkv")
        return torch.cat([self.part(q), self.heads(k, count), self.heads(v, count)])

    def gated(self, at, to):
        yield f"{to}gate_up_proj.weight", torch.cat([self.part(self.hf[f"{at}{one}_proj.weight"]) for one in ("gate", "up")])
        yield f"{to}down_proj.weight", self.part(self.hf[f"{at}down_proj.weight"], 1)

    def experts(self, at, names):
        gate, up, down = names
        if f"{at}experts.gate_up_proj" in self.hf:
            both = (self.hf[f"{at}experts.{one}"] for one in ("gate_up_proj", "down_proj"))
            for number, (first, last) in enumerate(zip(*both, strict=True)):
                each = zip(names, (*first.chunk(2), last), strict=True)
                self.hf |= {f"{at}experts.{number}.{name}.weight": tensor for name, tensor in each}
        numbers = sorted({int(found[1]) for name in self.hf if (found := re.match(re.escape(at) + r"experts\.(\d+)\.", name))})
        first, second = [], []
        for number in self.part(torch.tensor(numbers)).tolist() if self.shares_experts else numbers:
            ws = [self.hf[f"{at}experts.{number}.{one}.weight"] for one in (gate, up, down)]
            if self.shares_experts:
                first.append(torch.cat(ws[:2]))
                second.append(ws[2])
            else:
                first.append(torch.cat([self.part(ws[0]), self.part(ws[1])]))
                second.append(self.part(ws[2], 1))
        yield f"{at}experts.routed_experts.w13_weight", torch.stack(first)
        yield f"{at}experts.routed_experts.w2_weight", torch.stack(second)

    def stacked_experts(self, at, to):
        """Those of GPT-OSS: a folder has inputs before outputs, and columns of gate and up that alternate."""
        hf = {name: self.hf[f"{at}{name}"] for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")}
        if self.shares_experts:
            hf = {name: self.part(tensor) for name, tensor in hf.items()}
            wide, mine = hf["gate_up_proj"].shape[2], slice(None)
        else:
            wide = hf["gate_up_proj"].shape[2] // self.ranks
            mine = slice(self.rank * wide, (self.rank + 1) * wide)
        yield f"{to}w13_weight", hf["gate_up_proj"][:, :, mine].permute(0, 2, 1).contiguous()
        yield f"{to}w13_bias", hf["gate_up_proj_bias"][:, mine].contiguous()
        rows = slice(None) if self.shares_experts else slice(self.rank * wide // 2, (self.rank + 1) * wide // 2)
        yield f"{to}w2_weight", hf["down_proj"][:, rows].permute(0, 2, 1).contiguous()
        adds = self.shares_experts or not self.rank
        yield f"{to}w2_bias", hf["down_proj_bias"] if adds else torch.zeros_like(hf["down_proj_bias"])

    def open_weights(self):
        """All tensors of a GPT-OSS."""
        yield "model.embedding.weight", self.vocabulary(self.hf["model.embed_tokens.weight"])
        yield "lm_head.weight", self.vocabulary(self.hf["lm_head.weight"])
        yield "model.norm.weight", self.hf["model.norm.weight"]
        for layer in range(self.said["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight", "mlp.router.weight", "mlp.router.bias"):
                yield at + name, self.hf[at + name]
            yield from ((name.replace("self_attn.", "attn."), tensor) for name, tensor in self.attention(f"{at}self_attn."))
            yield f"{at}attn.sinks", self.part(self.hf[f"{at}self_attn.sinks"])
            yield from self.stacked_experts(f"{at}mlp.experts.", f"{at}mlp.experts.routed_experts.")

    def everything(self):
        """All tensors of a model that is no pipeline."""
        if self.said["model_type"] == "gpt_oss":
            yield from self.open_weights()
            return
        tied = self.said.get("tie_word_embeddings", False)
        embed = self.vocabulary(self.hf["model.embed_tokens.weight"])
        if not tied:
            yield "model.embed_tokens.weight", embed
        yield "lm_head.weight", embed if tied else self.vocabulary(self.hf["lm_head.weight"])
        yield "model.norm.weight", self.hf["model.norm.weight"]
        for layer in range(self.said["num_hidden_layers"]):
            yield from self.layer(f"model.layers.{layer}.")

    def layer(self, at):
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield at + name, self.hf[at + name]
        yield from self.delta(at + "linear_attn.") if f"{at}linear_attn.A_log" in self.hf else self.attention(at + "self_attn.")
        yield from self.mlp(at)

    def delta(self, at):
        """Gated DeltaNet: rows by key head as Qwen3-Next has them, which are cut as they lie, or each part apart as in Qwen3.5."""
        key, value = (self.said[f"linear_num_{one}_heads"] * self.said[f"linear_{one}_head_dim"] for one in ("key", "value"))
        if f"{at}in_proj_qkvz.weight" in self.hf:
            qkvz, ba = ([self.hf[f"{at}in_proj_{one}.weight"]] for one in ("qkvz", "ba"))
        else:
            qkv, z, b, a = (self.hf[f"{at}in_proj_{one}.weight"] for one in ("qkv", "z", "b", "a"))
            qkvz, ba = [*qkv.split([key, key, value]), z], [b, a]
        conv = self.hf[f"{at}conv1d.weight"].split([key, key, value])
        for name, parts in (("in_proj_qkvz", qkvz), ("in_proj_ba", ba), ("conv1d", conv)):
            yield f"{at}{name}.weight", torch.cat([self.part(each) for each in parts])
        yield f"{at}A_log", self.part(self.hf[f"{at}A_log"]).float()
        yield f"{at}dt_bias", self.part(self.hf[f"{at}dt_bias"])
        yield f"{at}norm.weight", self.hf[f"{at}norm.weight"]
        yield f"{at}out_proj.weight", self.part(self.hf[f"{at}out_proj.weight"], 1)

    def attention(self, at):
        if self.said.get("kv_lora_rank"):
            yield from self.latent(at)
            return
        yield f"{at}qkv_proj.weight", self.qkv(at, "weight")
        if f"{at}q_proj.bias" in self.hf:
            yield f"{at}qkv_proj.bias", self.qkv(at, "bias")
        yield f"{at}o_proj.weight", self.part(self.hf[f"{at}o_proj.weight"], 1)
        for name in ("o_proj.bias", "q_norm.weight", "k_norm.weight"):
            if at + name in self.hf:
                yield at + name, self.hf[at + name]
        yield from ((f"{at}attn.{one}", torch.tensor(1.0)) for one in SCALES)

    def latent(self, at):
        twice = f"{at}mla_attn."  # what the wrapper of the kernel has, too
        yield (
            f"{at}fused_qkv_a_proj.weight",
            torch.cat([self.hf[f"{at}{one}.weight"] for one in ("q_a_proj", "kv_a_proj_with_mqa")]),
        )
        yield f"{at}kv_a_layernorm.weight", self.hf[f"{at}kv_a_layernorm.weight"]
        yield f"{twice}q_a_layernorm.weight", self.hf[f"{at}q_a_layernorm.weight"]
        yield f"{twice}q_b_proj.weight", self.part(self.hf[f"{at}q_b_proj.weight"])
        yield f"{at}kv_b_proj.weight", self.part(self.hf[f"{at}kv_b_proj.weight"])
        yield f"{twice}o_proj.weight", self.part(self.hf[f"{at}o_proj.weight"], 1)
        yield from ((f"{twice}mla_attn.{one}", torch.tensor(1.0)) for one in SCALES)

    def mlp(self, at):
        if f"{at}mlp.gate_proj.weight" in self.hf:
            yield from self.gated(f"{at}mlp.", f"{at}mlp.")
        elif f"{at}block_sparse_moe.gate.weight" in self.hf:
            yield f"{at}block_sparse_moe.gate.weight", self.hf[f"{at}block_sparse_moe.gate.weight"]
            yield from self.experts(f"{at}block_sparse_moe.", ("w1", "w3", "w2"))
        else:
            for name in ("weight", "e_score_correction_bias"):
                if f"{at}mlp.gate.{name}" in self.hf:
                    yield f"{at}mlp.experts.gate.{name}", self.hf[f"{at}mlp.gate.{name}"]
            yield from self.experts(f"{at}mlp.", ("gate_proj", "up_proj", "down_proj"))
            for name in ("shared_experts", "shared_expert"):
                if f"{at}mlp.{name}.gate_proj.weight" in self.hf:
                    yield from self.gated(f"{at}mlp.{name}.", f"{at}mlp.experts._shared_experts._layer.")
            if f"{at}mlp.shared_expert_gate.weight" in self.hf:
                yield (
                    f"{at}mlp.experts._shared_experts._layer.expert_gate.weight",
                    self.hf[f"{at}mlp.shared_expert_gate.weight"],
                )

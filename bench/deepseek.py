"""Inspect and plan a checkpoint of 671 billion parameters: DeepSeek-V3's true shapes, headers only, the files sparse.

The folder is what Hugging Face holds of it in bf16: 61 layers, 256 experts in 58 of them, one further-token layer.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SHARD = 4 << 30  # bytes


def shapes() -> dict[str, tuple[int, ...]]:
    """Return every tensor of the published model with its shape."""
    hidden, heads = 7168, 128
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (129280, hidden), "model.norm.weight": (hidden,)}
    found["lm_head.weight"] = (129280, hidden)
    for layer in range(62):
        at = f"model.layers.{layer}."
        found |= {at + "input_layernorm.weight": (hidden,), at + "post_attention_layernorm.weight": (hidden,)}
        found |= {at + "self_attn.q_a_proj.weight": (1536, hidden), at + "self_attn.q_a_layernorm.weight": (1536,)}
        found |= {at + "self_attn.q_b_proj.weight": (heads * 192, 1536), at + "self_attn.kv_a_layernorm.weight": (512,)}
        found |= {
            at + "self_attn.kv_a_proj_with_mqa.weight": (576, hidden),
            at + "self_attn.kv_b_proj.weight": (heads * 256, 512),
        }
        found[at + "self_attn.o_proj.weight"] = (hidden, heads * 128)
        mlps = {"": 18432} if layer < 3 else {f"experts.{expert}.": 2048 for expert in range(256)} | {"shared_experts.": 2048}
        for name, width in mlps.items():
            found |= {f"{at}mlp.{name}{part}_proj.weight": (width, hidden) for part in ("gate", "up")}
            found[f"{at}mlp.{name}down_proj.weight"] = (hidden, width)
        if layer >= 3:
            found |= {at + "mlp.gate.weight": (256, hidden), at + "mlp.gate.e_score_correction_bias": (256,)}
        if layer == 61:
            found |= {
                at + "enorm.weight": (hidden,),
                at + "hnorm.weight": (hidden,),
                at + "eh_proj.weight": (hidden, 2 * hidden),
            }
            found |= {at + "embed_tokens.weight": (129280, hidden), at + "shared_head.head.weight": (129280, hidden)}
            found[at + "shared_head.norm.weight"] = (hidden,)
    return found


def write(folder: Path) -> int:
    """Write the folder with files that are all holes but for their headers; return the number of parameters."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    found = shapes()
    for name, shape in found.items():
        nbytes = prod(shape) * _width(name)
        if filled and filled + nbytes > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_header(folder / name, shard)
    index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return sum(map(prod, found.values()))


def _width(name: str) -> int:
    return 4 if name.endswith("e_score_correction_bias") else 2


def _write_header(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    header, offset = {}, 0
    for name, shape in tensors.items():
        end = offset + prod(shape) * _width(name)
        header[name] = {"dtype": {2: "BF16", 4: "F32"}[_width(name)], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def main() -> None:
    """Time each command, and say what it needed at most."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("CARNET_BENCH_DIR")) as folder:
        source = Path(folder, "deepseek-v3")
        source.mkdir()
        print(f"{write(source):,} parameters, {len(shapes()):,} tensors, no bytes")
        for words in (
            ["inspect", str(source)],
            ["plan", str(source), "--to", "hf", "--memory", "2G"],
            ["plan", str(source), "--to", "megatron", "--tp", "8", "--pp", "4", "--ep", "8", "--memory", "2G"],
        ):
            began = time.perf_counter()
            done = subprocess.run(["carnet", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            took = time.perf_counter() - began
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
            print(f"carnet {' '.join(word for word in words if word != str(source)):55} {took:6.2f} s  at most {peak:,.0f} MB")
            if done.returncode:
                sys.exit(done.stdout)


if __name__ == "__main__":
    main()

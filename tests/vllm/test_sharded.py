"""vLLM as referee of the folders for its workers: what each rank holds is what vLLM's own classes make of the Hugging Face folder.

Without an engine: the workers of ``workers.py`` load the folder as vLLM does, and ours by ``sharded_state``; both states are compared
with the files, bit for bit, as are names and digests. With one: the same tokens, and the same log-probabilities.
"""

import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import carnet
from carnet.dialects.vllm import digest_key
from carnet.inventory.opening import opened
from carnet.inventory.survey import take
from tests.referees.engine_ranks import save_codes

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning:vllm")  # of what it calls in torch

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 2}
EVEN = {"num_attention_heads": 8, "num_key_value_heads": 4}
LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
FEW = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
QWEN_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WEIGHED = {**QWEN_MOE, "shared_expert_intermediate_size": 32}
DELTA = {
    **SIZES,
    **HEADS,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MIX = {"num_local_experts": 8, "num_experts_per_tok": 2}
MAMBA = {"n_groups": 4, "conv_kernel": 4}
TOKENS = {name: size for name, size in SIZES.items() if name.endswith("token_id")} | {"vocab_size": 97}
FALCON = {
    **TOKENS,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "alibi": False,
    "new_decoder_architecture": False,
}
GEMMA4 = {
    **SIZES,
    **HEADS,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "global_head_dim": 64,
    "num_kv_shared_layers": 0,
    "tie_word_embeddings": True,
}
# vLLM's module of these classes has the one that sees, too, and asks for torchvision
SEES = importlib.util.find_spec("torchvision") is not None


@dataclass(frozen=True)
class Case:
    """A class of transformers' configs, and how a model of it is made small."""

    of: str
    said: dict[str, object] = field(default_factory=dict)
    coded: str = ""  # as codes: style and scheme, and "static" where activations have a scale


BLOCKS = {
    **SIZES,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}

EXPERTS = {**BLOCKS, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
DEEP = {
    **BLOCKS,
    **FEW,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 512,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
del DEEP["head_dim"]
OPEN = {
    **BLOCKS,
    "head_dim": 64,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
MIXTURES = {"qwen3_moe": ("Qwen3Moe", EXPERTS), "deepseek_v3": ("DeepseekV3", DEEP)}
DENSE = {"llama": ("Llama", BLOCKS)}
TIED = {"qwen3, tied": ("Qwen3", {**BLOCKS, "tie_word_embeddings": True})}
MODELS = {**DENSE, **MIXTURES}
CODED = {
    "modelopt fp8 static": MODELS,
    "modelopt fp8 static cache": DENSE,
    "compressed-tensors fp8 static cache": DENSE,
    "modelopt fp8-channel": DENSE,
    "modelopt fp8-block": DENSE,
    "modelopt nvfp4 static": MODELS,
    "modelopt mxfp8": MODELS,
    "compressed-tensors fp8": DENSE,
    "compressed-tensors fp8 static": MODELS,
    "compressed-tensors fp8-channel": MODELS,
    "compressed-tensors fp8-block": {**MODELS, **TIED},
    "compressed-tensors nvfp4": DENSE,
    "compressed-tensors nvfp4 static": MODELS,
    "compressed-tensors mxfp8": MODELS,
    "compressed-tensors mxfp4": MODELS,
    "compressed-tensors int8-channel": MODELS,
    "deepseek fp8-block": MODELS,
    "openai mxfp4": {"gpt_oss": ("GptOss", OPEN)},
}
CASES = {
    **{f"{model}, {coded}": Case(*each, coded) for coded, models in CODED.items() for model, each in models.items()},
    "llama": Case("Llama", {**SIZES, **HEADS}),
    "llama, tied": Case("Llama", {**SIZES, **HEADS, "tie_word_embeddings": True}),
    "llama, biases": Case("Llama", {**SIZES, **HEADS, "attention_bias": True, "mlp_bias": True}),
    "mistral": Case("Mistral", {**SIZES, **HEADS}),
    "qwen2": Case("Qwen2", {**SIZES, **EVEN}),
    "qwen3": Case("Qwen3", {**SIZES, **HEADS, "tie_word_embeddings": True}),
    "qwen3_moe": Case("Qwen3Moe", {**SIZES, **HEADS, **QWEN_MOE, "mlp_only_layers": [1]}),
    "mixtral": Case("Mixtral", {**SIZES, **EVEN, "num_local_experts": 8}),
    "deepseek_v3": Case("DeepseekV3", {**SIZES, **LATENT, **FEW, "q_lora_rank": 24}),
    "deepseek_v3, queries not compressed": Case("DeepseekV3", {**SIZES, **LATENT, **FEW, "q_lora_rank": None}),
    "gpt_oss": Case(
        "GptOss",
        {
            **SIZES,
            **HEADS,
            "num_key_value_heads": 4,
            "intermediate_size": 128,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_next": Case("Qwen3Next", {**DELTA, **WEIGHED, "mlp_only_layers": [1]}),
    **({"qwen3_5": Case("Qwen3_5Text", {**DELTA, "tie_word_embeddings": True})} if SEES else {}),
    **({"qwen3_5_moe": Case("Qwen3_5MoeText", {**DELTA, **WEIGHED})} if SEES else {}),
    "gemma": Case("Gemma", {**SIZES, **HEADS}),
    "gemma2": Case("Gemma2", {**SIZES, **HEADS}),
    "gemma3": Case("Gemma3Text", {**SIZES, **HEADS}),
    "phi3": Case("Phi3", {**SIZES, **EIGHT}),
    "granite": Case("Granite", {**SIZES, **EIGHT}),
    "qwen2_moe": Case("Qwen2Moe", {**SIZES, **EVEN, **WEIGHED, "mlp_only_layers": [1]}),
    "olmoe": Case("Olmoe", {**SIZES, **EVEN, "num_experts": 8, "num_experts_per_tok": 2}),
    "deepseek_v2": Case("DeepseekV2", {**SIZES, **LATENT, **FEW, "q_lora_rank": 24, "topk_method": "group_limited_greedy"}),
    "nemotron": Case("Nemotron", {**SIZES, **HEADS}),
    "glm4": Case("Glm4", {**SIZES, **HEADS}),
    "glm4_moe": Case("Glm4Moe", {**SIZES, **HEADS, **FEW, "use_qk_norm": True}),
    "glm4_moe_lite": Case(
        "Glm4MoeLite", {**SIZES, **LATENT, **FEW, "q_lora_rank": 24, "mlp_layer_types": ["dense", "sparse", "sparse"]}
    ),
    "ernie4_5": Case("Ernie4_5", {**SIZES, **HEADS}),
    "exaone4": Case(
        "Exaone4",
        {**SIZES, **EIGHT, "sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "cohere": Case("Cohere", {**SIZES, **EVEN}),
    "cohere2": Case("Cohere2", {**SIZES, **HEADS}),
    "stablelm": Case("StableLm", {**SIZES, **EVEN, "num_key_value_heads": 8}),
    "ministral3": Case("Ministral3", {**SIZES, **HEADS}),
    "minimax_m2": Case(
        "MiniMaxM2",
        {**SIZES, **HEADS, **MIX, "rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    ),
    "gemma4": Case("Gemma4Text", GEMMA4),
    "gemma4, mixtures, keys that are values": Case(
        "Gemma4Text",
        {
            **GEMMA4,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "falcon": Case("Falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon, one KV head": Case("Falcon", {**FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon, biases": Case(
        "Falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "tie_word_embeddings": False}
    ),
    "gpt2": Case("GPT2", {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mamba2": Case(
        "Mamba2",
        {
            **TOKENS,
            **MAMBA,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "expand": 2,
        },
    ),
    "nemotron_h": Case(
        "NemotronH",
        {
            **SIZES,
            **HEADS,
            **MAMBA,
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
        },
    ),
}


def save(case, folder):
    """Save a model whose every number is random, in the type that it is served in."""
    torch.manual_seed(17)
    config = getattr(transformers, f"{case.of}Config")(**case.said)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "inv_freq" not in name:
            tensor.data = torch.randn(tensor.shape).to(torch.float32 if "e_score_correction_bias" in name else torch.bfloat16)
    model.save_pretrained(folder)
    if case.coded:
        save_codes(folder.rename(folder.with_name(f"{folder.name}, plain")), folder, case.coded)
    said = json.loads((folder / "config.json").read_text())
    if said["model_type"] == "deepseek_v3":
        said["topk_method"] = "noaux_tc"  # vLLM asks for it, transformers does not write it
        (folder / "config.json").write_text(json.dumps(said))


def hold(jobs, tp, pp, folder):
    """Let so many workers of vLLM do some jobs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([[str(model), form, experts, str(out)] for model, form, experts, out in jobs]))
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "VLLM_DIST_IDENT": f"carnet{port}"}
    words = [tp, pp, port, folder / "jobs.json"]
    ranks = [
        subprocess.Popen(
            [sys.executable, HERE / "workers.py", str(rank), *map(str, words)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for rank in range(tp * pp)
    ]
    said = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(each[-2000:] for each in said)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The models, as transformers saves them."""
    top = tmp_path_factory.mktemp("models")
    for name, case in CASES.items():
        save(case, top / name)
    return top


GRIDS = {"TP 1": (1, 1, 1), "TP 2": (2, 1, 1), "TP 4": (4, 1, 1), "TP 2, all experts whole": (2, 1, 2), "two stages": (1, 2, 1)}


UNSHARED = ("modelopt nvfp4 static",)  # whose kernels decide what a rank has of all experts
ONE_STAGE = ("mamba2",)  # vLLM shares it among no stages


def is_mixture(case):
    return any("experts" in key for key in case.said)


@pytest.mark.parametrize("grid", GRIDS)
def test_each_worker_of_vllm_holds_what_its_file_says(folders, tmp_path, grid):
    tp, pp, ep = GRIDS[grid]
    names = [name for name, case in CASES.items() if ep == 1 or (is_mixture(case) and case.coded not in UNSHARED)]
    names = [name for name in names if pp == 1 or name not in ONE_STAGE]
    jobs, wrong = [], {}
    for name in names:
        ours = tmp_path / name / "ours"
        try:
            verdict = carnet.cross(folders / name, ours, to="vllm", tp=tp, pp=pp, ep=ep)
            assert verdict.equal, verdict.findings
        except carnet.CarnetError as error:
            wrong[name] = str(error)
            continue
        jobs += [
            (folders / name, "auto", ep > 1, tmp_path / name / "theirs"),
            (ours, "sharded_state", ep > 1, tmp_path / name / "back"),
        ]
    hold(jobs, tp, pp, tmp_path / "work")
    for name in [name for name in names if name not in wrong]:
        found = [*compared(tmp_path / name, tp, pp)]
        if found:
            wrong[name] = found
    assert not wrong, "\n".join(f"{name}: {said}" for name, said in wrong.items())


def compared(at, tp, pp):
    """Yield what is wrong with the files of a model."""
    checkpoint = opened(at / "ours", None, None, (), None)
    held = take(checkpoint)
    for rank in range(tp * pp):
        where = {
            name: (at / name / f"{rank}.error").read_text()
            for name in ("theirs", "back")
            if (at / name / f"{rank}.error").exists()
        }
        if where:
            yield where
            return
        stage = f"pp-{rank // tp}-tp-{rank % tp}" if pp > 1 else f"rank-{rank}"
        ours = load_file(at / f"ours/model-{stage}-part-0.safetensors")
        for name in ("theirs", "back"):
            yield from differences(ours, load_file(at / name / f"{rank}.safetensors"), name)
        digests = {
            key: hashlib.sha256(tensor.flatten().view(torch.uint8).numpy()).hexdigest()
            for name, tensor in ours.items()
            if (key := digest_key(held.dialect, name, held.config))
        }
        theirs = json.loads((at / "theirs" / f"{rank}.json").read_text())
        if digests != theirs:
            yield "digests", sorted(key for key in {*digests, *theirs} if digests.get(key) != theirs.get(key))[:4]


def differences(ours, theirs, which):
    if ours.keys() != theirs.keys():
        yield which, "names", sorted(ours.keys() - theirs.keys())[:4], sorted(theirs.keys() - ours.keys())[:4]
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if (
            a.dtype != b.dtype
            or a.shape != b.shape
            or not torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
        ):
            yield which, name, f"{a.dtype} {list(a.shape)}", f"{b.dtype} {list(b.shape)}"
            return


SERVED = {
    "llama": (1, "llama, tied"),
    "qwen3": (1, "qwen3"),
    "qwen3_moe": (1, "qwen3_moe"),
    "llama, two ranks": (2, "llama"),
}


@pytest.mark.parametrize("which", SERVED)
def test_an_engine_says_the_same_of_every_token(folders, tmp_path, by_vllm, which):
    tp, name = SERVED[which]
    assert carnet.cross(folders / name, tmp_path / "ranks", to="vllm", tp=tp).equal
    settings = {"tensor_parallel_size": tp}
    expected = by_vllm(folders / name, settings, "bfloat16")
    assert expected.std() > 0.3
    assert torch.equal(by_vllm(tmp_path / "ranks", {**settings, "load_format": "sharded_state"}, "bfloat16"), expected)

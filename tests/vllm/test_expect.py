"""vLLM as referee of what it must hold: its own digests of every parameter are those that carnet expects, and what is bent is named.

On a CPU a running engine keeps embeddings and norms alone as they are loaded. So it is asked twice: as a real server over HTTP, and, of
all of its parameters, between its loading and its packing (``workers.py``), with two ranks.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import carnet
from carnet.engines.comparing import compare
from tests.vllm.test_sharded import hold

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "deepseek_v3": DeepseekV3Config(**{**{name: size for name, size in SIZES.items() if name != "head_dim"}, **LATENT}),
    "gpt_oss": GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"]
    ),
}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def made(config, folder):
    """Write a model of transformers, tiny and random; no two of its tensors are alike."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(folder)
    if config.model_type == "deepseek_v3":  # published configs say it, and vLLM has no bias of the router where none does
        said = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(said | {"topk_method": "noaux_tc"}))
    return folder


# --- what is bent: a change of the folder's tensors, and the parameters that it shows in, by rank -----------------------------------


def head_on_the_wrong_rank(tensors):
    """Exchange the KV heads of two ranks in one layer."""
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].roll(len(tensors[name]) // 2, 0)


def gate_and_up_exchanged(tensors):
    """Exchange the two halves of a gated MLP."""
    gate, up = (f"model.layers.0.mlp.{half}_proj.weight" for half in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def one_bit(tensors):
    """Flip the lowest bit of one number, in the columns of the last rank."""
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name].view(torch.int16)[3, -1] ^= 1


def expert_of_another_rank(tensors):
    """Exchange an expert of the first rank with one of the last, in one layer."""
    names = [name for name in tensors if "layers.1." in name and ".experts.0." in name]
    assert names
    for name in names:
        other = name.replace(".experts.0.", ".experts.3.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


ATTENTION, BOTH = "model.layers.1.self_attn.", (0, 1)
BENT = {
    "llama": [
        (head_on_the_wrong_rank, [(rank, ATTENTION + "qkv_proj.weight") for rank in BOTH]),
        (gate_and_up_exchanged, [(rank, "model.layers.0.mlp.gate_up_proj.weight") for rank in BOTH]),
        (one_bit, [(1, ATTENTION + "o_proj.weight")]),
    ],
    "qwen3": [
        (head_on_the_wrong_rank, [(rank, ATTENTION + "qkv_proj.weight") for rank in BOTH]),
        (one_bit, [(1, ATTENTION + "o_proj.weight")]),
    ],
    "mixtral": [
        (
            expert_of_another_rank,
            [
                (rank, f"model.layers.1.block_sparse_moe.experts.routed_experts.{w}_weight")
                for rank in BOTH
                for w in ("w13", "w2")
            ],
        ),
        (one_bit, [(1, ATTENTION + "o_proj.weight")]),
    ],
    "qwen3_moe": [
        (
            expert_of_another_rank,
            [(rank, f"model.layers.1.mlp.experts.routed_experts.{w}_weight") for rank in BOTH for w in ("w13", "w2")],
        ),
    ],
    "gpt_oss": [(one_bit, [(1, "model.layers.1.attn.o_proj.weight")])],
    "deepseek_v3": [
        (
            expert_of_another_rank,
            [(rank, f"model.layers.1.mlp.experts.routed_experts.{w}_weight") for rank in BOTH for w in ("w13", "w2")],
        ),
        (gate_and_up_exchanged, [(rank, "model.layers.0.mlp.gate_up_proj.weight") for rank in BOTH]),
        (one_bit, [(1, ATTENTION + "o_proj.weight")]),
    ],
}


def bent(folder, change):
    """Return a copy of a folder in which something is changed."""
    other = shutil.copytree(folder, folder.with_name(f"{folder.name}-{change.__name__}"))
    tensors = load_file(other / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    return other


def held(folders, tmp_path, *, tp=1, pp=1, ep=False):
    """Return vLLM's digests of each folder, of all ranks together."""
    outs = [tmp_path / f"held {at}" for at in range(len(folders))]
    hold([(folder, "auto", ep, out) for folder, out in zip(folders, outs, strict=True)], tp, pp, tmp_path / "work")
    assert [error.read_text() for out in outs for error in out.glob("*.error")] == []
    said = [[json.loads((out / f"{rank}.json").read_text()) for rank in range(tp * pp)] for out in outs]
    return [
        {f"dp0:pp{rank // tp}:pcp0:tp{rank % tp}:{name}": digest for rank, of in enumerate(each) for name, digest in of.items()}
        for each in said
    ]


@pytest.mark.parametrize("family", CONFIGS)
def test_vllm_holds_what_is_expected_on_every_rank_and_what_is_bent_is_named(family, tmp_path):
    folder = made(CONFIGS[family], tmp_path / family)
    ep = "experts" in "".join(change.__name__ + str(names) for change, names in BENT[family])
    whole, *changed = held([folder, *(bent(folder, change) for change, _ in BENT[family])], tmp_path, tp=2, ep=ep)
    expected = carnet.expect(folder, tp=2, ep=2 if ep else 1)
    assert expected.checksums == whole
    assert compare(expected, whole).compared == len(whole) > 20
    for (change, names), found in zip(BENT[family], changed, strict=True):
        seen = compare(expected, found)
        assert not seen, change.__name__
        assert sorted((each.rank, each.name) for each in seen.different) == sorted(
            (f"dp0:pp0:pcp0:tp{rank}", name) for rank, name in names
        ), change.__name__


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_every_stage_holds_what_is_expected(family, tmp_path):
    folder = made(CONFIGS[family], tmp_path / family)
    (found,) = held([folder], tmp_path, pp=2)
    assert carnet.expect(folder, pp=2).checksums == found


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return made(CONFIGS["llama"], tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def server(llama, tmp_path_factory):
    """A server of vLLM on loopback that holds the model."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    settings = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "2",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    said = f"--model {llama} --dtype bfloat16 --max-model-len 64 --enforce-eager --skip-tokenizer-init --host 127.0.0.1 --port {port}"
    with log.open("w") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *said.split()],
            stdout=told,
            stderr=told,
            env={**os.environ, **settings},
        )
    try:
        until = time.monotonic() + 600
        while not _answers(port):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _answers(port):
    try:
        return _asked(port, "GET", "/health")[0] == 200
    except OSError:
        return False


def _asked(port, how, path, body=None):
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(how, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    return answer.status, said


def command(*words):
    return subprocess.run(
        [sys.executable, "-m", "carnet", "expect", *map(str, words)], capture_output=True, text=True, check=False
    )


def test_a_running_server_is_asked_and_a_weight_that_its_own_update_bent_is_named(llama, server, tmp_path):
    url = f"http://127.0.0.1:{server}"
    saved = tmp_path / "expected.json"
    equal = command(llama, "-o", saved, "--against", url)
    assert equal.returncode == 0, equal.stdout + equal.stderr
    assert "7 of 15 parameters of all ranks: 7 equal, 0 different" in equal.stdout
    assert "8: packed by the engine: no bytes are left" in equal.stdout

    def one_norm(tensors):
        tensors["model.layers.1.post_attention_layernorm.weight"].view(torch.int16)[5] ^= 1

    reload = {"method": "reload_weights", "kwargs": {"weights_path": str(bent(llama, one_norm))}}
    assert _asked(server, "POST", "/collective_rpc", reload)[0] == 200
    different = command(saved, "--against", url, "--json")
    assert different.returncode == 3, different.stdout + different.stderr
    said = json.loads(different.stdout)
    assert [(each["rank"], each["name"]) for each in said["different"]] == [
        ("dp0:pp0:pcp0:tp0", "model.layers.1.post_attention_layernorm.weight")
    ]
    assert said["parameters"] == {"compared": 7, "equal": 6, "different": 1, "not comparable": 8}


def test_vllms_own_comparison_takes_the_digests_for_a_baseline(llama, server, tmp_path):
    saved = tmp_path / "expected.json"
    assert command(llama, "-o", saved).returncode == 0
    assert (
        _asked(server, "POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(llama)}})[0]
        == 200
    )
    baseline = json.loads(saved.read_text())["checksums"]
    status, said = _asked(server, "POST", "/weight_checker", {"action": "compare", "baseline": baseline})
    assert status == 200
    packed = [name for name in baseline if name.endswith("proj.weight")]
    assert sorted(json.loads(said)["mismatches"]) == sorted(packed)


def test_ranks_of_another_number_are_refused(llama, server):
    asked = command(llama, "--tp", "2", "--against", f"http://127.0.0.1:{server}")
    assert asked.returncode == 1
    assert "say how the engine is shared: --tp" in asked.stderr

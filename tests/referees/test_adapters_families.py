"""Adapters beside every kind of weight: what peft makes of a class goes to Megatron-Bridge's names and back, and computes the same.

Megatron's cut of them is held against that of the weights: the base model there, with B A added, is what the merged model becomes.
"""

import json
import re
import shutil

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader, load

import carnet
from carnet.errors import NotSupported

pytestmark = [
    pytest.mark.referee,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    # peft's own pattern for the parameter that it makes of experts' modules, which counts all the same
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
LATENT = {
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DELTA = {
    **GROUPED,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
HYBRID = {
    **GROUPED,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "hybrid_override_pattern": "M-*-",
    "intermediate_size": 48,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
}
MIXED = {"intermediate_size": 24, "num_local_experts": 4}
# config, modules and parameters that have adapters, ranks of the Megatron target
FAMILIES = {
    "gemma2": (hf.Gemma2Config(**GROUPED, head_dim=8, intermediate_size=48), [*QKVO, *MLP], [], 2),
    "phi3": (
        hf.Phi3Config(**GROUPED, intermediate_size=48, pad_token_id=0, eos_token_id=1),
        ["qkv_proj", "gate_up_proj"],
        [],
        2,
    ),
    "gpt2": (
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=1),
        ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
        [],
        2,
    ),
    "mixtral": (hf.MixtralConfig(**GROUPED, **MIXED), QKVO, EXPERTS, 2),
    "gpt_oss": (hf.GptOssConfig(**GROUPED, **MIXED, head_dim=8, num_experts_per_tok=2), QKVO, EXPERTS, 2),
    "deepseek_v3": (
        hf.DeepseekV3Config(**LATENT),
        ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        EXPERTS,
        2,
    ),
    "qwen3_next": (hf.Qwen3NextConfig(**DELTA), [*QKVO, "in_proj_qkvz", "in_proj_ba", "out_proj"], [], 1),
    "nemotron_h": (hf.NemotronHConfig(**HYBRID), [*QKVO, "up_proj", "down_proj", "in_proj"], [], 2),
}
TOKENS = torch.arange(32).reshape(2, 16)
JOINED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("in_proj_qkvz", "in_proj_ba")]
SCALE = 2.0  # alpha 8 over rank 4


def drawn(name, out, patterns=None):
    """Save a tiny model, and adapters of random numbers with one A where Megatron joins weights."""
    config, modules, parameters, _ = FAMILIES[name]
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(out / "base")
    more = {**({"target_parameters": parameters} if parameters else {}), **(patterns or {})}
    made = peft.get_peft_model(base(out), peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, **more))
    for parameter_name, parameter in made.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = torch.randn_like(parameter) * 0.2
    made.save_pretrained(out / "source")
    shutil.copy(out / "base/config.json", out / "source")
    found = load_file(out / "source/adapter_model.safetensors")
    for key in found:
        for first, *others in JOINED:
            for other in others:
                if f".{other}.lora_A" in key and (one := key.replace(f".{other}.", f".{first}.")) in found:
                    found[key] = found[one].clone()
    save_file(found, out / "source/adapter_model.safetensors", {"format": "pt"})
    return out / "source"


def base(out):
    return hf.AutoModelForCausalLM.from_pretrained(out / "base")


def logits(out, folder):
    made = peft.PeftModel.from_pretrained(base(out), folder).eval()
    with torch.no_grad():
        return made(TOKENS).logits


def stored(folder):
    """Return the tensors of a store, as torch reads them."""
    reader = FileSystemReader(next(folder.glob("iter_*")))
    metadata = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in metadata.items() if hasattr(each, "size")
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.mark.parametrize("name", FAMILIES)
def test_what_peft_makes_of_a_class_goes_there_and_back(name, tmp_path):
    source, ranks = drawn(name, tmp_path), FAMILIES[name][3]
    expected = logits(tmp_path, source)
    assert carnet.cross(source, tmp_path / "peft", to="peft").equal
    assert (logits(tmp_path, tmp_path / "peft") - expected).abs().max() < 1e-5
    with torch.no_grad():
        assert (base(tmp_path).eval()(TOKENS).logits - expected).abs().max() > 1e-2
    assert carnet.cross(source, tmp_path / "megatron", to="megatron", tp=ranks, accept=["needs"]).equal
    assert carnet.cross(tmp_path / "megatron", tmp_path / "back", to="peft", family=name).equal
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "back", tmp_path / "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", FAMILIES)
def test_megatrons_cut_of_adapters_is_that_of_their_weights(name, tmp_path):
    source, ranks = drawn(name, tmp_path), FAMILIES[name][3]
    peft.PeftModel.from_pretrained(base(tmp_path), source).merge_and_unload().save_pretrained(tmp_path / "merged")
    for each in ("base", "merged", "source"):
        carnet.cross(tmp_path / each, tmp_path / f"megatron-{each}", to="megatron", tp=ranks, accept=["needs"])
    plain, merged, adapters = (stored(tmp_path / f"megatron-{each}") for each in ("base", "merged", "source"))
    pairs = 0
    for key, b in adapters.items():
        found = re.fullmatch(r"(.*)\.adapter\.linear_out\.weight(.*)", key)
        if found:
            weight, pairs = f"{found[1]}.weight{found[2]}", pairs + 1
            product = SCALE * b @ adapters[f"{found[1]}.adapter.linear_in.weight"]
            if weight not in plain:  # Megatron stores that of Gated DeltaNet in parts
                names = [f"{weight}.{part}" for part in ("query", "key", "value", "z", "beta", "alpha")]
                plain[weight], merged[weight] = (torch.cat([each[one] for one in names], -2) for each in (plain, merged))
            torch.testing.assert_close(plain[weight] + product, merged[weight], atol=2e-5, rtol=0)
            assert (plain[weight] - merged[weight]).abs().max() > 1e-3
    assert pairs == len([key for key in adapters if ".linear_out.weight" in key]) > 1


PATTERNS = {
    "alpha of one": {"alpha_pattern": {"experts.down_proj": 3}},
    "rank of the other": {"rank_pattern": {"experts.gate_up_proj": 6}, "use_rslora": True},
    "layers": {"rank_pattern": {"0.mlp.experts.gate_up_proj": 3}, "alpha_pattern": {"1.mlp.experts.down_proj": 5}},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_peft_takes_ranks_and_alphas_of_experts_that_carnet_wrote_as_modules(name, tmp_path):
    source = drawn("mixtral", tmp_path, PATTERNS[name])
    assert carnet.cross(source, tmp_path / "peft", to="peft").equal
    assert (logits(tmp_path, tmp_path / "peft") - logits(tmp_path, source)).abs().max() < 1e-5


def test_a_gate_with_another_factor_than_what_it_multiplies_is_refused(tmp_path):
    source = drawn("mixtral", tmp_path)
    assert carnet.cross(source, tmp_path / "peft", to="peft").equal
    file = tmp_path / "peft/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha_pattern": {"w1": 3}}))
    with pytest.raises(NotSupported, match="one factor"):
        carnet.plan(tmp_path / "peft", to="peft")


def test_experts_exchanged_are_found(tmp_path):
    source = drawn("mixtral", tmp_path)
    assert carnet.cross(source, tmp_path / "peft", to="peft").equal
    file = tmp_path / "peft/adapter_model.safetensors"
    (tmp_path / "peft/carnet.json").unlink()
    found = load_file(file)
    one, other = (f"base_model.model.model.layers.1.block_sparse_moe.experts.{expert}.w2.lora_A.weight" for expert in (1, 2))
    found[one], found[other] = found[other], found[one]
    save_file(found, file, {"format": "pt"})
    verdict = carnet.verify(source, tmp_path / "peft")
    assert not verdict.equal
    assert {finding.where for finding in verdict.findings} == {"layers.1.moe.down.a"}

"""What adapters add is what the definition says, bit for bit, whatever the layouts, the memory and who works."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import carnet
from carnet.cli import main
from carnet.errors import BadRequest, CarnetError, NotSupported
from carnet.plans import saved
from tests.adapting.conftest import ALL, same, summed, tensors, with_adapters

pytestmark = [pytest.mark.referee, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")]

GOLDENS = Path(__file__).parents[1] / "goldens/adapters"
BESIDE, ALONE = GOLDENS / "v0192_lora_llama_te_tp2", GOLDENS / "v0192_loraonly_llama_te_tp2"
TOKENS = torch.arange(32).reshape(2, 16)


def files(folder):
    """Return the bytes of every file of tensors."""
    kinds = (".safetensors", ".distcp")
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.suffix in kinds}


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.mark.parametrize("dtype", [None, "f32", "f16"])
@pytest.mark.parametrize("factor", [None, -0.75])
def test_a_merge_is_what_the_definition_says(llama, adapter, dtype, factor, tmp_path):
    assert carnet.cross(llama, tmp_path / "out", to="hf", adapter=adapter, adapter_scale=factor, dtype=dtype).equal
    expected = summed(llama, adapter, factor or 1.0)
    if dtype is not None:
        kind = {"f32": torch.float32, "f16": torch.float16}[dtype]
        wide = tmp_path / "wide"
        shutil.copytree(llama, wide)
        found = {name: value.to(kind) for name, value in tensors(llama).items()}
        save_file({name: value.float() for name, value in found.items()}, wide / "model.safetensors")
        expected = {name: value.to(kind) for name, value in summed(wide, adapter, factor or 1.0).items()}
    assert same(tensors(tmp_path / "out"), expected)
    assert not same(tensors(tmp_path / "out"), {name: value.to(expected[name].dtype) for name, value in tensors(llama).items()})


def test_bytes_depend_on_neither_memory_nor_threads(llama, adapter, tmp_path):
    carnet.cross(llama, tmp_path / "out", to="hf", adapter=adapter)
    for number, options in enumerate(({"memory": "75M"}, {"threads": 1}, {"threads": 5})):
        assert carnet.cross(llama, tmp_path / str(number), to="hf", adapter=adapter, **options).equal
        assert files(tmp_path / str(number)) == files(tmp_path / "out")


def test_peft_merges_the_same_but_for_the_order_of_its_sums(llama, adapter, tmp_path):
    carnet.cross(llama, tmp_path / "out", to="hf", adapter=adapter, dtype="f32")
    model = peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), adapter)
    beside = logits(model)
    merged = model.merge_and_unload()
    ours = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = dict(merged.named_parameters())
    for name, value in ours.named_parameters():
        assert (value - theirs[name]).abs().max() < 1e-7, name
    assert (logits(ours) - beside).abs().max() < 1e-5
    assert (logits(hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)) - beside).abs().max() > 1e-2


def test_magnitudes_are_those_of_peft(llama, tmp_path):
    adapter = with_adapters(llama, tmp_path / "adapter", use_dora=True)
    assert carnet.cross(llama, tmp_path / "out", to="hf", adapter=adapter, dtype="f32").equal
    model = peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), adapter)
    theirs = dict(model.merge_and_unload().named_parameters())
    ours = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, value in ours.named_parameters():
        assert (value - theirs[name]).abs().max() < 1e-6, name
    assert (logits(ours) - logits(hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32))).abs().max() > 1e-2
    assert carnet.cross(llama, tmp_path / "half", to="hf", adapter=adapter).equal
    expected = {name: value.to(torch.bfloat16) for name, value in tensors(tmp_path / "out").items()}
    assert same(tensors(tmp_path / "half"), expected)
    for number, (to, cut) in enumerate(LAYOUTS):  # which cut rows
        carnet.cross(tmp_path / "half", tmp_path / f"crossed {number}", to=to, **cut)
        assert carnet.cross(llama, tmp_path / str(number), to=to, adapter=adapter, memory="75M", **cut).equal
        assert files(tmp_path / str(number)) == files(tmp_path / f"crossed {number}")

    def longer(found):
        found["base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector"][7] *= 2

    verdict = carnet.verify(llama, tmp_path / "half", adapter=changed(adapter, tmp_path / "longer", longer))
    assert {f.where for f in verdict.findings if f.what == "elements differ"} == {"layers.1.mlp.down"}


LAYOUTS = [("megatron", {"tp": 2, "pp": 3}), ("megatron", {"spelling": "local"}), ("trtllm", {"tp": 4}), ("vllm", {"tp": 2})]


@pytest.mark.parametrize(("to", "cut"), LAYOUTS)
def test_a_merge_in_another_layout_is_the_merge_crossed(llama, adapter, to, cut, tmp_path):
    carnet.cross(llama, tmp_path / "hf", to="hf", adapter=adapter)
    carnet.cross(tmp_path / "hf", tmp_path / "crossed", to=to, **cut)
    assert carnet.cross(llama, tmp_path / "out", to=to, adapter=adapter, **cut).equal
    assert files(tmp_path / "out") == files(tmp_path / "crossed")


@pytest.mark.parametrize("alike", [True, False], ids=["one A for what Megatron joins", "an A for each"])
def test_base_and_adapters_may_have_any_layouts(llama, tmp_path, alike):
    adapter = with_adapters(llama, tmp_path / "adapter")
    if alike:
        found = load_file(adapter / "adapter_model.safetensors")
        for name in found:
            for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
                if "lora_A" in name and any(other in name for other in others):
                    found[name] = found[name.replace(next(o for o in others if o in name), first)].clone()
        save_file(found, adapter / "adapter_model.safetensors")
    carnet.cross(llama, tmp_path / "hf", to="hf", adapter=adapter)
    carnet.cross(llama, tmp_path / "megatron", to="megatron", tp=2, pp=3)
    config = llama / "config.json"
    carnet.cross(adapter, tmp_path / "bridge", to="megatron", tp=2, config=config, adapter_base="base")
    for number, (base, beside) in enumerate(
        [(llama, tmp_path / "bridge"), (tmp_path / "megatron", adapter), (tmp_path / "megatron", tmp_path / "bridge")]
    ):
        out = tmp_path / str(number)
        assert carnet.cross(base, out, to="hf", adapter=beside, vocab_size=97).equal
        assert files(out) == files(tmp_path / "hf")


@pytest.mark.parametrize("scheme", ["fp8", "fp8-block", "int4-group"])
def test_what_is_merged_and_quantized_is_the_merge_quantized(scheme, tmp_path):
    how = {"quantize": scheme, "style": "compressed-tensors", "activations": "dynamic" if scheme == "fp8" else None}
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=256, intermediate_size=256, num_key_value_heads=2, num_attention_heads=2, num_hidden_layers=2, vocab_size=97
    )
    hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = with_adapters(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj", "up_proj", "o_proj"])
    carnet.cross(tmp_path / "base", tmp_path / "hf", to="hf", adapter=adapter)
    carnet.cross(tmp_path / "hf", tmp_path / "later", to="hf", **how)
    assert carnet.cross(tmp_path / "base", tmp_path / "out", to="hf", adapter=adapter, **how).equal
    assert files(tmp_path / "out") == files(tmp_path / "later")


def test_adapters_in_the_checkpoint_itself_become_what_megatron_computed(tmp_path):
    assert carnet.cross(BESIDE, tmp_path / "own", to="hf", adapter="own", adapter_alpha=16.0, dtype="f32").equal
    reference = load_file(BESIDE / "reference.safetensors")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=torch.float32)
    assert (logits(model, reference["tokens"]) - reference["logits"][..., :250]).abs().max() < 1e-4
    assert carnet.cross(BESIDE, tmp_path / "base", to="hf", drop="*.adapter.*").equal
    assert carnet.cross(tmp_path / "base", tmp_path / "lent", to="hf", adapter=ALONE, dtype="f32").equal
    assert files(tmp_path / "lent") == files(tmp_path / "own")


SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97}
FAMILIES = {
    "Qwen3Moe": (
        {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ),
    "DeepseekV3": (
        {
            "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
            "v_head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        },
        {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    ),
    "GPT2": (
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", ["Qwen3Moe", "DeepseekV3", "GPT2"])
def test_families_are_merged_and_proven_in_any_layout(family, tmp_path):
    sizes, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**{**SMALL, **sizes})
    model = hf.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    adapter = with_adapters(tmp_path / "base", tmp_path / "adapter", **options)
    assert carnet.cross(tmp_path / "base", tmp_path / "out", to="hf", adapter=adapter).equal
    expected, found = summed(tmp_path / "base", adapter), tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    made = peft.PeftModel.from_pretrained(
        hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), adapter
    )
    carnet.cross(tmp_path / "base", tmp_path / "wide", to="hf", adapter=adapter, dtype="f32")
    ours = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)
    assert (logits(ours) - logits(made)).abs().max() < 1e-4
    carnet.cross(tmp_path / "base", tmp_path / "megatron", to="megatron", tp=2, adapter=adapter)
    carnet.cross(tmp_path / "megatron", tmp_path / "back", to="hf", vocab_size=97)
    assert same(tensors(tmp_path / "back"), tensors(tmp_path / "out"))


@pytest.fixture(scope="session")
def mixture(tmp_path_factory):
    """Return a tiny mixture and adapters of its experts, a module each as vLLM and older releases of peft have them."""
    folder = tmp_path_factory.mktemp("mixture")
    sizes, _ = FAMILIES["Qwen3Moe"]
    torch.manual_seed(0)
    hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**{**SMALL, **sizes})).to(torch.bfloat16).save_pretrained(folder / "base")
    with_adapters(folder / "base", folder / "adapter", target_modules=["q_proj"])
    found = load_file(folder / "adapter/adapter_model.safetensors")
    for name, weight in tensors(folder / "base").items():
        if ".experts." in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            found[f"{module}.lora_A.weight"] = torch.randn(4, weight.shape[1]) * 0.1
            found[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 4) * 0.1
    save_file(found, folder / "adapter/adapter_model.safetensors", {"format": "pt"})
    return folder


def test_adapters_of_experts_are_added_each_to_its_own(mixture, tmp_path):
    base, adapter = mixture / "base", mixture / "adapter"
    assert carnet.cross(base, tmp_path / "out", to="hf", adapter=adapter).equal
    assert same(tensors(tmp_path / "out"), summed(base, adapter))
    carnet.cross(base, tmp_path / "megatron", to="megatron", adapter=adapter)
    carnet.cross(tmp_path / "out", tmp_path / "crossed", to="megatron")
    assert files(tmp_path / "megatron") == files(tmp_path / "crossed")

    def exchanged(found):
        for end in ("A", "B"):
            one, other = (f"base_model.model.model.layers.1.mlp.experts.{at}.up_proj.lora_{end}.weight" for at in (1, 3))
            found[one], found[other] = found[other], found[one]

    wrong = changed(adapter, tmp_path / "wrong", exchanged)
    verdict = carnet.verify(base, tmp_path / "out", adapter=wrong)
    assert {f.where for f in verdict.findings if f.what == "elements differ"} == {"layers.1.moe.up"}


def without_a_gate(folder, wide, **options):
    """Save a tiny Nemotron-H, whose experts have no gate, and adapters of parameters that all experts share."""
    sizes = {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 4, "hybrid_override_pattern": "ME*E"}
    states = {"ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    torch.manual_seed(0)
    config = hf.NemotronHConfig(
        **{**SMALL, **sizes, **states, **experts}, moe_intermediate_size=wide, moe_shared_expert_intermediate_size=32
    )
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    return folder / "base", with_adapters(folder / "base", folder / "adapter", target_modules=["in_proj"], **options)


# which counts all the same
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_patterns_match_the_parameters_of_experts_by_their_own_names(tmp_path):
    both = ["experts.up_proj", "experts.down_proj"]
    patterns = {"alpha_pattern": {"experts.up_proj": 3}, "rank_pattern": {"experts.up_proj": 2}}
    base, adapter = without_a_gate(tmp_path, 32, target_parameters=both, **patterns)
    assert carnet.cross(base, tmp_path / "out", to="hf", adapter=adapter).equal
    theirs = peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    expected = dict(theirs.named_parameters())
    for name, value in hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters():
        assert (value - expected[name]).abs().max() < 1e-6, name


def test_a_parameter_of_experts_whose_adapters_have_the_names_of_anothers_is_refused(tmp_path):
    # as wide as the model, so that no shape tells them apart
    base, adapter = without_a_gate(tmp_path, 64, target_parameters=["experts.up_proj"])
    with pytest.raises(NotSupported, match=r"(?s)down_proj alone.*merge_and_unload"):
        carnet.plan(base, to="hf", adapter=adapter)


def test_adapters_of_a_model_that_also_sees_are_refused_with_the_way_out(tmp_path):
    turns = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**SMALL, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "rope_parameters": turns}
    sight = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = hf.Qwen2_5_VLConfig(text_config=text, vision_config={**sight, "fullatt_block_indexes": [0]})
    model = hf.Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "base")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(NotSupported, match=r"(?s)sees or hears.*merge_and_unload"):
        carnet.plan(tmp_path / "base", to="hf", adapter=tmp_path / "adapter")


# --- what is wrong is found ----------------------------------------------------------------------------------------------------


def changed(folder, out, change):
    """Copy a folder with tensors changed."""
    shutil.copytree(folder, out)
    (file,) = out.glob("*.safetensors")
    found = load_file(file)
    change(found)
    save_file(found, file, {"format": "pt"})
    (out / "carnet.json").unlink(missing_ok=True)
    return out


@pytest.fixture(scope="session")
def merged(llama, adapter, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out"
    carnet.cross(llama, out, to="hf", adapter=adapter)
    return out


def test_one_weight_that_is_off_by_its_last_bit_is_found(llama, adapter, merged, tmp_path):
    names = [name for name in tensors(merged) if "_proj" in name]
    random = np.random.default_rng(3)
    for number, name in enumerate(random.choice(names, 12, replace=False)):

        def off(found, name=name):
            flat = found[name].view(torch.int16).reshape(-1)
            flat[int(random.integers(len(flat)))] ^= 1

        verdict = carnet.verify(llama, changed(merged, tmp_path / str(number), off), adapter=adapter)
        assert [finding.stored for finding in verdict.findings] == [name]


def test_a_scale_that_is_twice_as_large_is_found(llama, adapter, merged):
    assert carnet.verify(llama, merged, adapter=adapter).equal
    assert not carnet.verify(llama, merged, adapter=adapter, adapter_scale=2.0).equal
    assert not carnet.verify(llama, merged).equal


def test_a_layer_without_its_adapter_is_named(llama, adapter, merged, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    target = changed(merged, tmp_path / "out", lambda found: found.update({name: tensors(llama)[name]}))
    (finding,) = carnet.verify(llama, target, adapter=adapter).findings
    assert (finding.what, finding.where) == ("holds the weight without its adapter", "layers.1.mlp.up")


def test_the_document_tells_of_the_adapters(llama, adapter, merged):
    said = json.loads((merged / "carnet.json").read_text())
    assert said["request"]["adapter"] == "adapter"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert said["source"]["tensors"][name]["layout"] == "rank hidden: layers.0.attention.q.a"
    assert carnet.verify(merged).equal


def test_a_plan_is_run_elsewhere_and_refused_where_the_adapters_changed(llama, adapter, merged, tmp_path):
    again = tmp_path / "adapter"
    shutil.copytree(adapter, again)
    plan = carnet.plan(llama, to="hf", adapter=again)
    saved.save(plan, tmp_path / "plan")
    carnet.run(tmp_path / "plan", tmp_path / "out")
    assert files(tmp_path / "out") == files(merged)
    changed(adapter, tmp_path / "other", lambda found: found.popitem())
    shutil.copy(tmp_path / "other/adapter_model.safetensors", again)
    with pytest.raises(BadRequest, match="not the one that was planned"):
        carnet.run(tmp_path / "plan", tmp_path / "late")


# --- what is refused -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_added_is_refused_by_name(llama, adapter, tmp_path):
    with pytest.raises(BadRequest, match="no adapters of its own"):
        carnet.plan(llama, to="hf", adapter="own")
    with pytest.raises(BadRequest, match="without adapters"):
        carnet.plan(llama, to="hf", adapter=llama)
    assert carnet.cross(llama, tmp_path / "coded", to="hf", quantize="fp8", style="compressed-tensors", activations="dynamic")
    with pytest.raises(CarnetError, match="the weights of the source are quantized"):
        carnet.plan(tmp_path / "coded", to="hf", adapter=adapter)
    with pytest.raises(BadRequest, match="--adapter-scale"):
        carnet.plan(llama, to="hf", adapter_scale=2.0)
    words = ["plan", str(llama), "--to", "hf", *["--adapter", str(adapter)] * 2]
    assert "one folder at a time" in CliRunner().invoke(main, words).stderr
    with pytest.raises(CarnetError, match="adapter"):
        carnet.plan(llama, to="peft", adapter=adapter)
    for name, value in (("adapter_scale", 0), ("adapter_scale", float("nan"))):
        with pytest.raises(BadRequest, match="zero"):
            carnet.plan(llama, to="hf", adapter=adapter, **{name: value})

    def deeper(found):
        for name in [name for name in found if ".layers.2." in name]:
            found[name.replace(".layers.2.", ".layers.7.")] = found.pop(name)

    with pytest.raises(CarnetError, match=r"layers\.7"):
        carnet.plan(llama, to="hf", adapter=changed(adapter, tmp_path / "deeper", deeper))

    def infinite(found):
        found["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = float("inf")

    def undefined(found):
        found["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"][0, 0] = float("nan")

    def too_large(found):
        for end in "AB":
            found[f"base_model.model.model.layers.1.mlp.up_proj.lora_{end}.weight"][0, 0] = 1e30

    for change in (infinite, undefined, too_large):
        wrong = changed(adapter, tmp_path / change.__name__, change)
        with pytest.raises(CarnetError, match=r"layers\.1\.mlp\.up with its adapter is not finite"):
            carnet.cross(llama, tmp_path / f"out {change.__name__}", to="hf", adapter=wrong)

    def orphan(found):
        del found["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]

    with pytest.raises(CarnetError, match=r"layers\.1\.mlp\.up"):
        carnet.plan(llama, to="hf", adapter=changed(adapter, tmp_path / "orphan", orphan))
    assert ALL

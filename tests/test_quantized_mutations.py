"""Damage is planted in proven quantized targets: in codes, in scales, in what the config says of them. Each must be found and named.

Weights are damaged with the safetensors library, never with carnet's own code.
"""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import carnet
from carnet.errors import CarnetError

HIDDEN, HEADS, KV, DIM, FFN, VOCAB = 256, 8, 2, 32, 384, 160  # keys and values have 64 rows: half a block of 128
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "head_dim": DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "max_position_embeddings": 128,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "num_key_value_heads": KV,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}
LINEAR = {
    "self_attn.q_proj": (HEADS * DIM, HIDDEN),
    "self_attn.k_proj": (KV * DIM, HIDDEN),
    "self_attn.v_proj": (KV * DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * DIM),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
PRESSED = "compressed-tensors"
TARGETS = {
    "fp8": {"to": "hf", "quantize": "fp8", "kv_cache": "fp8", "amax": True},
    "nvfp4": {"to": "hf", "quantize": "nvfp4", "amax": True},
    "ct fp8": {"to": "hf", "quantize": "fp8", "style": PRESSED, "kv_cache": "fp8", "amax": True},
    "ct nvfp4": {"to": "hf", "quantize": "nvfp4", "style": PRESSED, "amax": True},
    "channel": {"to": "hf", "quantize": "fp8-channel", "style": PRESSED},
    "modelopt channel": {"to": "hf", "quantize": "fp8-channel"},
    "block": {"to": "hf", "quantize": "fp8-block", "style": PRESSED},
    "modelopt block": {"to": "hf", "quantize": "fp8-block"},
    "deepseek": {"to": "hf", "quantize": "fp8-block", "style": "deepseek"},
    "mxfp8": {"to": "hf", "quantize": "mxfp8"},
    "ct mxfp8": {"to": "hf", "quantize": "mxfp8", "style": PRESSED},
    "mxfp4": {"to": "hf", "quantize": "mxfp4"},
    "ct mxfp4": {"to": "hf", "quantize": "mxfp4", "style": PRESSED},
    "int8": {"to": "hf", "quantize": "int8-channel", "style": PRESSED},
    "int4": {"to": "hf", "quantize": "int4-group", "style": PRESSED},
    "int4 f16": {"to": "hf", "quantize": "int4-group", "style": PRESSED, "dtype": "f16"},
    "deepseek f32": {"to": "hf", "quantize": "fp8-block", "style": "deepseek", "dtype": "f32"},
    "ranks": {"to": "trtllm", "tp": 2, "pp": 2, "quantize": "fp8", "kv_cache": "fp8", "amax": True},
}
MODEL = "model.safetensors"
UP, DOWN, KEY = (f"model.layers.1.{name}" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.k_proj"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Make a small Llama and what calibration says of it."""
    folder, random = tmp_path_factory.mktemp("source"), torch.Generator().manual_seed(3)
    (folder / "hf").mkdir()
    tensors, amax = {}, {}
    for layer in range(2):
        for name, shape in LINEAR.items():
            module = f"model.layers.{layer}.{name}"
            tensors[f"{module}.weight"] = torch.randn(shape, generator=random).mul(0.08).bfloat16()
            amax[f"{module}.input_amax"] = torch.rand((), generator=random) * 9 + 1
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"][3] = 0  # a row without any weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(HIDDEN).bfloat16()
        for what in "kv":
            amax[f"model.layers.{layer}.self_attn.{what}_proj.{what}_amax"] = torch.rand((), generator=random) * 900 + 1
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = torch.randn((VOCAB, HIDDEN), generator=random).bfloat16()
    tensors["model.norm.weight"] = torch.ones(HIDDEN).bfloat16()
    save_file(tensors, folder / "hf" / MODEL, {"format": "pt"})
    (folder / "hf/config.json").write_text(json.dumps(CONFIG))
    save_file(amax, folder / "amax.safetensors")
    return folder


ASKED = {}  # target -> what is repeated to compare it


def verify(source, target):
    return carnet.verify(source, target, **ASKED.get(target, {}))


@pytest.fixture(scope="module")
def proven(source, tmp_path_factory):
    """Return (source, a fresh copy of its proven target)."""
    folder, made = tmp_path_factory.mktemp("proven"), {}

    def copy(which, to):
        given = {**TARGETS[which], **({"amax": source / "amax.safetensors"} if TARGETS[which].get("amax") else {})}
        if which not in made:
            verdict = carnet.cross(source / "hf", folder / which, **given)
            assert verdict.findings == ()
            made[which] = folder / which
        shutil.copytree(made[which], to / "target")
        ASKED[to / "target"] = {name: given[name] for name in ("dtype", "amax") if name in given}
        return source / "hf", to / "target"

    return copy


def rewrite(file, damage):
    """Let ``damage`` change the tensors of a file, by name, and save them with the safetensors library."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    damage(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata)


def findings(source, target):
    """Return {(where, what)} after asking that the target is not equal."""
    verdict = verify(source, target)
    assert not verdict.equal
    assert all(finding.what and finding.where for finding in verdict.findings)
    return {(finding.where, finding.what) for finding in verdict.findings}


def reconfigure(target, change, file="config.json"):
    config = json.loads((target / file).read_text())
    change(config)
    (target / file).write_text(json.dumps(config, indent=2))


def raw(tensor):
    """Return the bytes of codes, to write to."""
    return tensor.view(torch.uint8)


def codes_of(which, module=UP):
    return f"{module}.weight_packed" if which in ("ct nvfp4", "ct mxfp4", "int4", "int4 f16") else f"{module}.weight"


def scales_of(which, module=UP):
    return f"{module}.weight_scale_inv" if which.startswith("deepseek") else f"{module}.weight_scale"


HF = [which for which in TARGETS if which != "ranks"]
POWERS = [which for which in HF if "mx" in which]
SCALARS = ["fp8", "ct fp8"]
PACKED = [which for which in HF if "fp4" in which or "int4" in which]


# --- it can pass ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", TARGETS)
def test_an_undamaged_target_is_equal_with_its_source_and_alone(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    verdict = verify(source, target)
    assert verdict.findings == ()
    assert carnet.verify(target).findings == ()
    quality = verdict.examination.quality
    assert quality.weights == (2 * 4 * 2 if which == "ranks" else 2 * 7) + (2 * 2 if which == "ranks" else 0)
    assert quality.saturated == 0 or which.startswith("int4")  # whose scale lets a half step be cut off, and is rounded
    least = {"fp8": 31, "int8": 42, "fp4": 18, "int4": 18}
    assert quality.snr > (least["fp4"] if which in PACKED else least["int8"] if which == "int8" else least["fp8"])
    assert list(quality.worst) == sorted(quality.worst, key=lambda one: one[1])


@pytest.mark.parametrize("which", TARGETS)
def test_a_target_is_equal_whoever_wrote_its_files(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    for file in sorted(target.glob("*.safetensors")):
        rewrite(file, lambda tensors: None)
    (target / "carnet.json").unlink()
    assert verify(source, target).findings == ()


def test_the_document_and_a_machine_are_told_what_the_codes_lose(proven, tmp_path):
    from carnet.report.data import verdict_data

    source, target = proven("nvfp4", tmp_path)
    told = json.loads((target / "carnet.json").read_text())["proof"]["codes"]
    assert told == verdict_data(verify(source, target))["codes"]
    assert (told["weights"], told["saturated"], len(told["worst"])) == (14, 0, 5)
    assert 20 < told["snr dB"] < 21
    assert told["worst"][0]["snr dB"] < told["snr dB"]


def test_the_signal_to_noise_is_that_of_the_numbers_which_the_codes_mean(proven, tmp_path):
    source, target = proven("channel", tmp_path)
    before, after = load_file(source / MODEL), load_file(target / MODEL)
    signal = noise = 0.0
    for name in before:
        if f"{name}_scale" in after:
            meant = after[name].double() * after[f"{name}_scale"].double()
            signal += float(before[name].double().square().sum())
            noise += float((before[name].double() - meant).square().sum())
    expected = 10 * torch.log10(torch.tensor(signal / noise))
    assert verify(source, target).examination.quality.snr == pytest.approx(float(expected), abs=1e-3)


# --- scales --------------------------------------------------------------------------------------------------------------------


def times(factor):
    def change(scale):
        if scale.dtype == torch.uint8:
            return scale + int(torch.log2(torch.tensor(factor)))
        return (scale.float() * factor).to(scale.dtype)

    return change


def inverted(scale):
    return 254 - scale if scale.dtype == torch.uint8 else (1 / scale.float()).to(scale.dtype)


SCALINGS = {"doubled": times(2.0), "halved": times(0.5), "inverted": inverted}


@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize("which", [which for which in HF if "nvfp4" not in which])
def test_scales_that_are_doubled_halved_or_inverted(which, how, proven, tmp_path):
    source, target = proven(which, tmp_path)
    name = scales_of(which)
    rewrite(target / MODEL, lambda tensors: tensors.update({name: SCALINGS[how](tensors[name])}))
    verdict = verify(source, target)
    assert [(f.what, f.where, f.stored) for f in verdict.findings] == [(f"scales are {how}", "layers.1.mlp.up", name)]
    if how == "halved":
        assert verdict.examination.quality.saturated > 0


@pytest.mark.parametrize("how", SCALINGS)
@pytest.mark.parametrize("which", ["nvfp4", "ct nvfp4"])
def test_a_scale_over_the_others_that_is_doubled_halved_or_inverted(which, how, proven, tmp_path):
    source, target = proven(which, tmp_path)
    name = f"{UP}.weight_scale_2" if which == "nvfp4" else f"{UP}.weight_global_scale"
    rewrite(target / MODEL, lambda tensors: tensors.update({name: SCALINGS[how](tensors[name])}))
    found = verify(source, target).findings
    assert [(f.what, f.where, f.stored) for f in found] == [(f"scales are {how}", "layers.1.mlp.up", name)]


@pytest.mark.parametrize("which", ["nvfp4", "ct nvfp4"])
def test_blocks_scales_of_e4m3_that_are_halved(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    name = scales_of(which)
    rewrite(target / MODEL, lambda tensors: tensors.update({name: (tensors[name].float() / 2).to(torch.float8_e4m3fn)}))
    found = verify(source, target).findings
    assert [(f.what, f.where, f.stored) for f in found] == [("scales are halved", "layers.1.mlp.up", name)]


def test_a_global_scale_in_the_other_program_s_convention(proven, tmp_path):
    source, target = proven("ct nvfp4", tmp_path)
    for_all = [f"model.layers.{layer}.{name}.weight_global_scale" for layer in (0, 1) for name in LINEAR]
    rewrite(target / MODEL, lambda tensors: tensors.update({name: 1 / tensors[name] for name in for_all}))
    assert {what for _, what in findings(source, target)} == {"scales are inverted"}


@pytest.mark.parametrize("which", [which for which in HF if which not in SCALARS])
def test_one_block_whose_scale_is_stale(which, proven, tmp_path):
    source, target = proven(which, tmp_path)

    def damage(tensors):
        scales = tensors[scales_of(which)].view(torch.uint8).reshape(-1)
        each = tensors[scales_of(which)].element_size()
        scales[each - 1] ^= 1 if each < 4 else 2  # the byte of the exponent

    rewrite(target / MODEL, damage)
    (found,) = verify(source, target).findings
    assert found.stored == scales_of(which)
    assert "1 of " in found.detail
    assert "scales" in found.what


@pytest.mark.parametrize("which", HF)
def test_scales_that_another_weight_has(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    gate = scales_of(which, UP.replace("up", "gate"))
    rewrite(target / MODEL, lambda tensors: tensors.update({scales_of(which): tensors[gate].clone()}))
    if which in SCALARS:
        ((where, what),) = findings(source, target)
        assert (where, what.split(":")[0]) == ("layers.1.mlp.up", "stale scales")
    else:
        assert ("layers.1.mlp.up", f"the scales of {codes_of(which, UP.replace('up', 'gate'))}") in findings(source, target)


@pytest.mark.parametrize("value", [0.0, float("nan"), -1.0])
@pytest.mark.parametrize("which", ["fp8", "channel", "block", "deepseek", "int8", "int4"])
def test_a_scale_that_is_no_positive_number(which, value, proven, tmp_path):
    source, target = proven(which, tmp_path)
    rewrite(target / MODEL, lambda tensors: tensors[scales_of(which)].reshape(-1)[:1].fill_(value))
    assert ("layers.1.mlp.up", "scales that are no positive numbers") in findings(source, target)


def requantized(weight, scale):
    """Return the codes of a weight under a scale for all of it."""
    return (weight.float() / scale).bfloat16().float().clamp(-448, 448).to(torch.float8_e4m3fn)


def test_codes_that_were_made_under_a_stale_scale_with_it(proven, tmp_path):
    source, target = proven("fp8", tmp_path)
    weight, name = load_file(source / MODEL)[f"{UP}.weight"], f"{UP}.weight"

    def damage(tensors):
        tensors[f"{name}_scale"] *= 1.5
        tensors[name] = requantized(weight, tensors[f"{name}_scale"])

    rewrite(target / MODEL, damage)
    assert ("layers.1.mlp.up", "stale scales: they do not follow from the weights") in findings(source, target)


def test_a_scale_that_is_not_shared_by_what_an_engine_fuses(proven, tmp_path):
    """Queries, keys and values need one scale over their blocks; here the keys have one that suits them alone."""
    source, target = proven("nvfp4", tmp_path)
    weight = load_file(source / MODEL)[f"{KEY}.weight"]
    alone = weight.abs().max().float() / (6 * 448)
    rewrite(target / MODEL, lambda tensors: tensors[f"{KEY}.weight_scale_2"].fill_(alone))
    (found, *_) = verify(source, target).findings
    assert (found.where, found.stored) == ("layers.1.attention.k", f"{KEY}.weight_scale_2")


def test_a_rank_that_has_a_scale_of_its_own(proven, tmp_path):
    source, target = proven("ranks", tmp_path)
    name = "transformer.layers.0.mlp.proj.weight"  # the first layer of the second stage
    weight = load_file(source / MODEL)[f"{DOWN}.weight"]
    halves = weight[:, : FFN // 2], weight[:, FFN // 2 :]
    rank = min((0, 1), key=lambda rank: halves[rank].abs().max())  # the one whose own largest is not the largest of all
    own = halves[rank].abs().max().float() / 448

    def damage(tensors):
        tensors[f"{name.removesuffix('weight')}weights_scaling_factor"].fill_(own)
        tensors[name] = requantized(halves[rank], own)

    rewrite(target / f"rank{2 + rank}.safetensors", damage)
    found = verify(source, target).findings
    assert (found[0].where, found[0].stored) == (
        "layers.1.mlp.down",
        f"rank{2 + rank}/transformer.layers.0.mlp.proj.weights_scaling_factor",
    )


def test_fused_queries_keys_and_values_under_the_scale_of_one_of_them(proven, tmp_path):
    source, target = proven("ranks", tmp_path)
    weights = [load_file(source / MODEL)[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
    own = min(weight.abs().max() for weight in weights).float() / 448
    name = "transformer.layers.0.attention.qkv.weights_scaling_factor"
    rewrite(target / "rank0.safetensors", lambda tensors: tensors[name].fill_(own))
    (found,) = verify(source, target).findings
    assert found.stored == f"rank0/{name}"
    assert found.where == "layers.0.attention.q, layers.0.attention.k, layers.0.attention.v"


# --- codes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("which", HF)
def test_one_flipped_bit_of_a_code(which, bit, proven, tmp_path):
    source, target = proven(which, tmp_path)
    name = codes_of(which)

    def damage(tensors):
        flat = raw(tensors[name]).reshape(-1)
        flat[3] ^= 1 << bit  # zeros may become the other zero: e4m3 keeps the sign, and so must the code

    rewrite(target / MODEL, damage)
    (found,) = verify(source, target).findings
    assert (found.what, found.where, found.stored) == ("1 bit of one code flipped", "layers.1.mlp.up", name)


@pytest.mark.parametrize("which", HF)
def test_two_rows_of_codes_exchanged(which, proven, tmp_path):
    source, target = proven(which, tmp_path)

    def damage(tensors):
        rows = raw(tensors[codes_of(which)])
        rows[[5, 9]] = rows[[9, 5]]

    rewrite(target / MODEL, damage)
    assert findings(source, target) == {("layers.1.mlp.up", "rows: 5 and 9 exchanged")}


@pytest.mark.parametrize("which", PACKED)
def test_swapped_nibbles(which, proven, tmp_path):
    source, target = proven(which, tmp_path)

    def damage(tensors):
        codes = raw(tensors[codes_of(which)])
        codes.copy_((codes << 4) | (codes >> 4))

    rewrite(target / MODEL, damage)
    assert findings(source, target) == {("layers.1.mlp.up", "nibbles swapped")}


def test_words_of_codes_that_begin_at_the_other_end(proven, tmp_path):
    source, target = proven("int4", tmp_path)

    def damage(tensors):
        codes = raw(tensors[codes_of("int4")])
        codes = ((codes << 4) | (codes >> 4)).reshape(-1, 4).flip(1)
        raw(tensors[codes_of("int4")]).reshape(-1, 4).copy_(codes)

    rewrite(target / MODEL, damage)
    assert findings(source, target) == {("layers.1.mlp.up", "nibbles in reverse order")}


def test_integers_that_are_not_stored_plus_eight(proven, tmp_path):
    source, target = proven("int4", tmp_path)
    rewrite(target / MODEL, lambda tensors: raw(tensors[codes_of("int4")]).bitwise_xor_(0x88))
    assert findings(source, target) == {("layers.1.mlp.up", "codes are not offset as they must be")}


@pytest.mark.parametrize("which", [which for which in HF if "int" not in which])
def test_signs_inverted(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    flip = 0x88 if which in PACKED else 0x80
    rewrite(target / MODEL, lambda tensors: raw(tensors[codes_of(which)]).bitwise_xor_(flip))
    assert findings(source, target) == {("layers.1.mlp.up", "signs inverted")}


@pytest.mark.parametrize("which", HF)
def test_codes_that_are_all_zero(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    rewrite(target / MODEL, lambda tensors: raw(tensors[codes_of(which)]).zero_())
    assert findings(source, target) == {("layers.1.mlp.up", "all codes zero")}


@pytest.mark.parametrize("which", HF)
def test_the_codes_of_two_weights_exchanged_with_their_scales(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    gate = UP.replace("up", "gate")

    def damage(tensors):
        for ours in [name for name in tensors if name.startswith(f"{UP}.")]:
            theirs = ours.replace(UP, gate)
            tensors[ours], tensors[theirs] = tensors[theirs], tensors[ours]

    rewrite(target / MODEL, damage)
    found = findings(source, target)
    assert ("layers.1.mlp.up", "holds layers.1.mlp.gate") in found
    assert ("layers.1.mlp.gate", "holds layers.1.mlp.up") in found


@pytest.mark.parametrize("which", ["fp8", "channel", "deepseek", "mxfp8"])
def test_codes_that_were_cut_off_and_not_rounded(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    weight = load_file(source / MODEL)[f"{DOWN}.weight"].float()

    def damage(tensors):
        codes, scale = tensors[codes_of(which, DOWN)], tensors[scales_of(which, DOWN)].float()
        if which == "mxfp8":
            scale = torch.exp2(scale - 127).repeat_interleave(32, 1)
        elif which == "deepseek":
            scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        too_large = (codes.float() * scale).abs() > weight.abs()
        raw(codes)[too_large] -= 1  # towards zero

    rewrite(target / MODEL, damage)
    assert findings(source, target) == {("layers.1.mlp.down", "codes are not the nearest")}


def test_a_nan_among_the_codes(proven, tmp_path):
    source, target = proven("channel", tmp_path)
    rewrite(target / MODEL, lambda tensors: raw(tensors[f"{UP}.weight"])[2, 2].fill_(0x7F))
    (found,) = verify(source, target).findings
    assert (found.where, "[2, 2]" in found.detail) == ("layers.1.mlp.up", True)


def test_the_codes_of_two_ranks_exchanged(proven, tmp_path):
    source, target = proven("ranks", tmp_path)
    first, second = target / "rank0.safetensors", target / "rank1.safetensors"
    first.rename(target / "held")
    second.rename(first)
    (target / "held").rename(second)
    where = {each for each, _ in findings(source, target)}
    assert {
        "layers.0.attention.q",
        "layers.0.attention.o",
        "layers.0.mlp.gate",
        "layers.0.mlp.up",
        "layers.0.mlp.down",
    } <= where


def test_a_code_of_fused_values_is_named_after_the_values(proven, tmp_path):
    source, target = proven("ranks", tmp_path)
    name = "transformer.layers.0.attention.qkv.weight"
    rewrite(target / "rank1.safetensors", lambda tensors: raw(tensors[name])[-1, 7].bitwise_xor_(4))
    (found,) = verify(source, target).findings
    expected = ("1 bit of one code flipped", "layers.0.attention.v", f"rank1/{name}")
    assert (found.what, found.where, found.stored) == expected


def test_a_plain_tensor_of_a_quantized_target_is_compared_as_ever(proven, tmp_path):
    source, target = proven("nvfp4", tmp_path)
    rewrite(target / MODEL, lambda tensors: tensors["lm_head.weight"][3, 3].neg_())
    assert findings(source, target) == {("head", "1 bit of one element flipped")}


# --- what stands beside --------------------------------------------------------------------------------------------------------

INPUTS = {"fp8": "input_scale", "ct fp8": "input_scale", "nvfp4": "input_scale", "ct nvfp4": "input_global_scale"}


@pytest.mark.parametrize("which", INPUTS)
def test_a_scale_of_activations_that_is_not_what_calibration_found(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    name = f"{DOWN}.{INPUTS[which]}"
    rewrite(target / MODEL, lambda tensors: tensors.update({name: tensors[name] * 2}))
    assert findings(source, target) == {("layers.1.mlp.down", "activations: scales are doubled")}


@pytest.mark.parametrize("which", INPUTS)
def test_without_calibration_what_reads_the_same_activations_must_agree(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    (target / "carnet.json").unlink()
    del ASKED[target]
    rewrite(target / MODEL, lambda tensors: tensors.update({f"{KEY}.{INPUTS[which]}": tensors[f"{KEY}.{INPUTS[which]}"] * 2}))
    ((where, what),) = findings(source, target)
    assert ("layers.1.attention.k" in where, what) == (True, "activations: scales differ")


def test_a_rank_whose_activations_have_another_scale(proven, tmp_path):
    source, target = proven("ranks", tmp_path)
    (target / "carnet.json").unlink()
    del ASKED[target]
    name = "transformer.layers.0.attention.dense.activation_scaling_factor"
    rewrite(target / "rank1.safetensors", lambda tensors: tensors[name].mul_(3))
    (found,) = verify(source, target).findings
    assert (found.what, found.stored) == ("activations: scales differ", f"rank1/{name}")


@pytest.mark.parametrize(
    ("which", "file", "name"),
    [
        ("fp8", MODEL, f"{KEY}.k_scale"),
        ("ct fp8", MODEL, "model.layers.1.self_attn.k_scale"),
        ("ranks", "rank3.safetensors", "transformer.layers.0.attention.kv_cache_scaling_factor"),
    ],
)
def test_the_scale_of_a_cache_that_is_not_what_calibration_found(which, file, name, proven, tmp_path):
    source, target = proven(which, tmp_path)
    rewrite(target / file, lambda tensors: tensors.update({name: tensors[name] / 2}))
    found = verify(source, target).findings
    assert [(f.what, f.stored.removeprefix("rank3/")) for f in found] == [("cache: scales are halved", name)]


def test_a_shape_beside_packed_codes_that_is_another(proven, tmp_path):
    source, target = proven("int4", tmp_path)
    rewrite(target / MODEL, lambda tensors: tensors[f"{UP}.weight_shape"].copy_(torch.tensor([HIDDEN, FFN])))
    assert findings(source, target) == {(f"{UP}.weight_shape", "another shape")}


# --- names, shapes and types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", HF)
def test_codes_without_their_scale(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    rewrite(target / MODEL, lambda tensors: tensors.pop(scales_of(which)))
    assert (scales_of(which), f"the scale {scales_of(which)!r} is missing") in findings(source, target)


@pytest.mark.parametrize("which", HF)
def test_a_scale_without_codes(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    rewrite(target / MODEL, lambda tensors: tensors.pop(codes_of(which)))
    name = scales_of(which)
    assert (name, f"{name!r} is a scale that stands beside no codes") in findings(source, target)


@pytest.mark.parametrize("which", HF)
def test_a_scale_of_another_shape(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    name = scales_of(which)
    rewrite(target / MODEL, lambda tensors: tensors.update({name: tensors[name].reshape(1, -1, 1)}))
    assert (name, f"the scale {name!r} has another type or shape than it must have") in findings(source, target)


@pytest.mark.parametrize("which", HF)
def test_a_scale_of_another_type(which, proven, tmp_path):
    source, target = proven(which, tmp_path)
    name = scales_of(which)
    other = torch.bfloat16 if which == "int4 f16" else torch.float16
    rewrite(target / MODEL, lambda tensors: tensors.update({name: tensors[name].to(other)}))
    what = f"the scale {name!r} has another type or shape than it must have"
    assert findings(source, target) & {(name, what), (name, "scales of another type")}


def test_a_weight_that_was_left_plain_among_codes_is_seen_as_such(proven, tmp_path):
    source, target = proven("channel", tmp_path)
    weight = load_file(source / MODEL)[f"{UP}.weight"]

    def damage(tensors):
        tensors[f"{UP}.weight"] = weight
        del tensors[f"{UP}.weight_scale"]

    rewrite(target / MODEL, damage)
    assert (UP, "the config does not exclude what is plain") in findings(source, target)


# --- config --------------------------------------------------------------------------------------------------------------------


def quantization(**fields):
    return lambda config: config["quantization_config"].update(fields)


CONFIGS = {
    "another algorithm": ("fp8", quantization(quant_algo="FP8_PER_CHANNEL_PER_TOKEN")),
    "no cache": ("fp8", lambda config: config["quantization_config"].pop("kv_cache_scheme")),
    "a head that is not excluded": ("channel", quantization(ignore=[])),
    "a weight that is excluded": ("channel", quantization(ignore=["lm_head", UP])),
    "blocks of another size": ("deepseek", quantization(weight_block_size=[64, 64])),
    "nothing quantized": ("deepseek", lambda config: config.pop("quantization_config")),
    "activations without a scale": (
        "ct fp8",
        lambda config: config["quantization_config"]["config_groups"]["group_0"].update(input_activations=None),
    ),
    "ranks that say nothing": ("ranks", lambda config: config["quantization"].update(quant_algo=None)),
    "ranks without a cache": ("ranks", lambda config: config["quantization"].update(kv_cache_quant_algo=None)),
}


@pytest.mark.parametrize("which", CONFIGS)
def test_a_config_that_does_not_say_what_is_stored(which, proven, tmp_path):
    target, change = CONFIGS[which]
    source, folder = proven(target, tmp_path)
    reconfigure(folder, change)
    assert findings(source, folder)


def test_two_configs_that_disagree(proven, tmp_path):
    source, target = proven("fp8", tmp_path)
    reconfigure(target, lambda config: config["quantization"].update(kv_cache_quant_algo=None), "hf_quant_config.json")
    said = {what for _, what in findings(source, target)}
    assert "config.json and hf_quant_config.json disagree about the quantized weights" in said


# --- codes that come from codes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", HF)
def test_a_quantized_checkpoint_is_equal_to_itself_and_a_changed_code_is_found(which, proven, tmp_path):
    _, target = proven(which, tmp_path)
    shutil.copytree(target, tmp_path / "other")
    assert carnet.verify(target, tmp_path / "other").findings == ()
    rewrite(tmp_path / "other" / MODEL, lambda tensors: raw(tensors[codes_of(which)]).reshape(-1)[3].bitwise_xor_(4))
    assert {where for where, _ in findings(target, tmp_path / "other")} == {"layers.1.mlp.up"}


@pytest.mark.parametrize("which", [*HF, "ranks"])
def test_a_quantized_checkpoint_that_was_dequantized_is_equal_to_it(which, proven, tmp_path):
    _, target = proven(which, tmp_path)
    assert carnet.cross(target, tmp_path / "plain", to="hf", dtype="bf16").findings == ()
    ASKED[tmp_path / "plain"] = {"dtype": "bf16"}
    name = f"{UP}.weight"
    rewrite(tmp_path / "plain" / MODEL, lambda tensors: tensors[name][3, 3].add_(1))
    ((where, _),) = findings(target, tmp_path / "plain")
    assert where == "layers.1.mlp.up"


@pytest.mark.parametrize(
    ("before", "after"), [("deepseek", "mxfp4"), ("int4", "channel"), ("channel", "deepseek"), ("ct fp8", "int8")]
)
def test_codes_of_one_kind_that_were_made_from_codes_of_another(before, after, source, proven, tmp_path):
    _, target = proven(before, tmp_path)
    wish = {name: value for name, value in TARGETS[after].items() if name != "amax"}
    assert carnet.cross(target, tmp_path / "again", dtype="bf16", **wish).findings == ()
    ASKED[tmp_path / "again"] = {"dtype": "bf16"}
    rewrite(tmp_path / "again" / MODEL, lambda tensors: raw(tensors[codes_of(after)]).reshape(-1)[3].bitwise_xor_(4))
    ((where, what),) = findings(target, tmp_path / "again")
    assert (where, what) == ("layers.1.mlp.up", "1 bit of one code flipped")


def test_a_damaged_checkpoint_is_refused_as_a_source(proven, tmp_path):
    _, target = proven("channel", tmp_path)
    rewrite(target / MODEL, lambda tensors: tensors.pop(f"{UP}.weight_scale"))
    with pytest.raises(CarnetError, match="weight_scale' is missing"):
        carnet.cross(target, tmp_path / "plain", to="hf", dtype="bf16")

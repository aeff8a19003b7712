"""Every family in every style: transformers runs it as the dequantized model, ModelOpt exports it to the same bits.

A new family is in here by its line in ``tests/families/samples.py``. What a program cannot do is listed, and fails where it can.
`make test` runs a part of it, `make test-quantized` the whole.
"""

import functools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig
from transformers.pytorch_utils import Conv1D

from carnet import api
from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.quantize.recipes import RECIPES
from tests.quantize.test_published import four_bits
from tests.referees import roomy
from tests.referees.roomy import NAMES, loaded, logits, tensors

pytestmark = pytest.mark.referee

LOADED = [recipe.name for recipe in RECIPES if recipe.style in ("compressed-tensors", "deepseek")]
DYNAMIC = ("compressed-tensors/fp8", "compressed-tensors/nvfp4")  # whose activations may do without a stored scale
# transformers/integrations/compressed_tensors.py, CompressedTensorsDequantize, of experts that it joins in one parameter
OF_EXPERTS = {
    "compressed-tensors/nvfp4": "transformers forgets the scale over those of the blocks of experts",
    "compressed-tensors/mxfp8": "transformers multiplies the codes of experts with exponents",
    "compressed-tensors/fp8-block": "transformers multiplies the codes of experts with scales of another shape",
    "compressed-tensors/int8-channel": "transformers looks for packed codes of experts",
}
# transformers/quantizers/base.py, _convert_model_for_quantization
STACKED = ("gpt_oss", "llama4")  # whose experts are one parameter
# whose experts are one tensor, and coded a module each, as ModelOpt writes and vLLM reads them: transformers looks for the one tensor
TAKEN_APART = ("gemma4, mixtures",)
APART = {
    **{(name, style): "transformers knows no modules" for name in TAKEN_APART for style in ("compressed-tensors", "deepseek")},
    (
        "llama4",
        "compressed-tensors",
    ): "transformers takes the experts apart where anything is quantized, and looks for them one by one",
}
# transformers/models/falcon/modeling_falcon.py and mamba2/modeling_mamba2.py, _init_weights: it asks modules for their weight after
# loading, and one whose codes are packed has none; where weights are dequantized as they are loaded it has
ASKS_FOR_WEIGHTS = ("falcon", "mamba2")
# transformers/integrations/finegrained_fp8.py: a block has as many rows as rows of the weight by rows of scales
RAGGED = {"mamba2", "nemotron_h", "nemotron_h, mixtures", "nemotron_h, latent mixtures"}


@functools.cache
def conv1ds(name):
    """Return the modules of a model that are no linear layers, though they have a weight as such."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(made(name)))
    return [at for at, module in model.named_modules() if isinstance(module, Conv1D)]


@functools.cache
def parameters(name):
    """Return the experts of a layer that are stored as one tensor, coded or not."""
    return (
        []
        if name in TAKEN_APART
        else [at for at, tensor in tensors(made(name)).items() if tensor.ndim == 3 and not at.endswith(".weight")]
    )


@functools.cache
def made(name, **more):
    folder = Path(str(SCRATCH[0])) / re.sub(r"\W+", "-", f"{name} {more or ''}")
    return roomy.save(name, folder, **more)


SCRATCH = []


@pytest.fixture(scope="module", autouse=True)
def scratch(tmp_path_factory):
    SCRATCH[:] = [tmp_path_factory.mktemp("families")]


def planned(folder, recipe, **more):
    style, scheme = recipe.split("/")
    return api.plan(
        folder, to="hf", quantize=scheme, style=style, **more, **({"activations": "dynamic"} if recipe in DYNAMIC else {})
    )


def excludes(refusal):
    return tuple(re.findall(r"--exclude '([^']+)'", refusal.value.remedy))


def pairs():
    """Yield every family with every recipe; `make test` runs one recipe for each family, the next for the next."""
    for at, name in enumerate(NAMES):
        for nth, recipe in enumerate(LOADED):
            yield pytest.param(name, recipe, marks=() if nth == at % len(LOADED) else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:You passed .quantization_config.")
@pytest.mark.parametrize(("name", "recipe"), [*pairs()])
def test_transformers_runs_every_family_as_the_dequantized_model(name, recipe, tmp_path):
    source, exclude = made(name), ()
    lost = conv1ds(name) + parameters(name)
    if lost:
        with pytest.raises(NotSupported) as refusal:
            planned(source, recipe)
        assert any(module in str(refusal.value) for module in lost)
        exclude = excludes(refusal)
    if conv1ds(name):
        with pytest.raises(BadRequest, match="nothing is left to quantize"):
            planned(source, recipe, exclude=exclude)
        return
    out = api.run(planned(source, recipe, exclude=exclude), tmp_path / "out")
    experts = [tensor for at, tensor in tensors(out).items() if re.search(r"experts\.\d+\..*weight_scale", at)]
    experts = [
        scale for scale in experts if recipe != "compressed-tensors/fp8-block" or scale.numel() > 1
    ]  # one fits any shape
    why = APART.get((name, recipe.split("/")[0]), "") or (OF_EXPERTS.get(recipe, "") if experts else "")
    if recipe.startswith("deepseek") and name in RAGGED:
        why = "transformers dequantizes ragged blocks with a wrong height"
    plain = api.run(api.plan(out, to="hf", dtype="bf16"), tmp_path / "plain")
    expected = logits(loaded(plain))
    assert expected.std() > 0.1
    how = {}
    if name.startswith(ASKS_FOR_WEIGHTS) and any(at.endswith("weight_packed") for at in tensors(out)):
        with pytest.raises(AttributeError, match="no attribute 'weight'"):
            loaded(out)
        how["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    try:
        same = torch.equal(logits(loaded(out, **how)), expected)
    except (RuntimeError, AssertionError):
        same = False
    assert same == (not why), why


UNTIED = {"nemotron_h", "nemotron_h, mixtures", "nemotron_h, latent mixtures"}  # its config cannot say it
TIED = [name for name in NAMES if name not in UNTIED and name not in ("gpt2", "llama4", *TAKEN_APART)]  # looked at above


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if at % 3 else ()) for at, name in enumerate(TIED)])
def test_a_head_without_a_tensor_is_named_where_a_program_looks_for_it(name, tmp_path):
    source = made(name) if roomy.fields(name)["tied"] else made(name, tied=True)
    out = api.run(planned(source, "compressed-tensors/fp8-channel", exclude=tuple(parameters(name))), tmp_path / "out")
    plain = api.run(api.plan(out, to="hf", dtype="bf16"), tmp_path / "plain")
    assert torch.equal(logits(loaded(out)), logits(loaded(plain)))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["ignore"].remove("lm_head")
    (out / "config.json").write_text(json.dumps(config))
    verdict = api.verify(source, out)
    assert [finding.where for finding in verdict.findings if "does not exclude" in finding.what] == ["lm_head"]


# --- ModelOpt ------------------------------------------------------------------------------------------------------------------

# ModelOpt 0.47 knows no class derived from a linear layer (FalconLinear): it codes nothing and says that it did
NOT_BY_MODELOPT = {name for name in NAMES if name.startswith("falcon")}
SENTINEL = re.compile(r"\.\x00.*")  # 0.47 lets its own mark of a changed prefix stand in the lists of Nemotron-H


def exported(wish, folders, out):
    program = Path(__file__).with_name("modelopt_families.py")
    done = subprocess.run([sys.executable, program, wish, out, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def differing(ours, theirs):
    found = dict.fromkeys(ours.keys() ^ theirs.keys(), "only one has it")
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            found[name] = f"{a.dtype} {tuple(a.shape)}, theirs {b.dtype} {tuple(b.shape)}"
        elif not torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (a, b))):
            found[name] = "values"
    return found


def same_as_modelopt(name, wish, theirs, tmp_path, **more):
    out = api.run(api.plan(made(name), to="hf", quantize=wish, **more), tmp_path / f"{made(name).name}-{wish}")
    assert (name, differing(tensors(out), tensors(theirs))) == (name, {})
    lists = [json.loads((at / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"] for at in (out, theirs)]
    assert (name, sorted(lists[0])) == (name, sorted(SENTINEL.sub("", module) for module in lists[1]))
    marked = {SENTINEL.sub("", module) for module in lists[1] if SENTINEL.search(module)}  # a name that no engine finds
    for folder, unnamed in ((out, set()), (theirs, marked)):
        found = api.verify(made(name), folder, amax=more.get("amax")).findings
        assert [finding for finding in found if finding.where not in unnamed] == []


@pytest.mark.slow
def test_modelopt_exports_the_same_of_every_family(tmp_path):
    names = [name for name in NAMES if name not in NOT_BY_MODELOPT and not parameters(name)]
    exported("mxfp8 without indexer", [made(name) for name in names], tmp_path / "theirs")  # as NVIDIA publishes such models
    for name in names:
        same_as_modelopt(name, "mxfp8", tmp_path / "theirs" / made(name).name, tmp_path)


def test_several_recipes_of_modelopt_s_are_read_at_once(tmp_path):
    name = "nemotron_h, latent mixtures"
    exported("mixed", [made(name)], tmp_path / "theirs")
    theirs = tmp_path / "theirs" / made(name).name
    stored, plain = tensors(theirs), tensors(api.run(api.plan(theirs, to="hf", dtype="bf16"), tmp_path / "plain"))
    kinds = Counter(stored[at].dtype for at in plain)
    assert (kinds[torch.float8_e4m3fn], kinds[torch.uint8]) == (6, 8)
    for at, found in plain.items():
        if stored[at].dtype == torch.float8_e4m3fn:
            expected = stored[at].float() * stored[f"{at}_scale"]
        elif stored[at].dtype == torch.uint8:
            expected = four_bits(stored[at], stored[f"{at}_scale"], stored[f"{at}_scale_2"])
        else:
            expected = stored[at]
        assert torch.equal(found, expected.to(found.dtype)), at
    assert api.verify(theirs, tmp_path / "plain", dtype="bf16").equal


@pytest.mark.slow
@pytest.mark.parametrize("wish", ["fp8", "fp8-channel", "nvfp4", "mxfp4"])
def test_modelopt_turns_the_weights_of_a_conv1d(wish, tmp_path):
    exported(wish, [made("gpt2")], tmp_path / "theirs")
    theirs = tmp_path / "theirs" / made("gpt2").name
    found = {at: tensor for at, tensor in tensors(theirs).items() if at.endswith("input_scale")}
    more = {}
    if found:
        whole = 448.0 * (6 if wish == "nvfp4" else 1)
        more["amax"] = tmp_path / "amax.safetensors"
        save_file({at.removesuffix("scale") + "amax": tensor * whole for at, tensor in found.items()}, more["amax"])
    same_as_modelopt("gpt2", wish, theirs, tmp_path, **more)


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKED)
def test_experts_in_one_tensor_are_refused_by_name_and_can_be_left_plain(name, tmp_path):
    said = []
    for recipe in ("modelopt/mxfp8", "modelopt/mxfp4", "modelopt/fp8-channel"):
        with pytest.raises(NotSupported, match=r"experts\.gate_up_proj") as refusal:
            planned(made(name), recipe)
        said.append(excludes(refusal))
    exported("mxfp8 without experts", [made(name)], tmp_path / "theirs")
    same_as_modelopt(name, "mxfp8", tmp_path / "theirs" / made(name).name, tmp_path, exclude=said[0])


@pytest.fixture(scope="module", params=["fp8", "nvfp4"])
def coded_by_modelopt(request, tmp_path_factory):
    """Return a scheme, and the folder in which ModelOpt left models whose experts are one tensor."""
    theirs = tmp_path_factory.mktemp("theirs")
    exported(request.param, [made(name) for name in STACKED], theirs)
    return request.param, theirs


def test_experts_in_one_tensor_that_modelopt_coded_are_read_bit_for_bit(coded_by_modelopt, tmp_path):
    """Codes of experts lie [in, out], two in a byte along the inputs, under names that are longer than the parameter's."""
    wish, folder = coded_by_modelopt
    for name in STACKED:
        theirs = folder / made(name).name
        stored, plain = tensors(theirs), tensors(api.run(api.plan(theirs, to="hf", dtype="bf16"), tmp_path / f"{name} plain"))
        assert {at for at in plain if stored[at].dtype != torch.bfloat16} >= {*parameters(name)}
        for at, found in plain.items():
            beside = f"{at}_weight_scale" if at in parameters(name) else f"{at}_scale"
            codes, scale = (stored.get(each, torch.ones(())) for each in (at, beside))
            if codes.dtype == torch.uint8:
                turn = (lambda each: each.mT) if at in parameters(name) else (lambda each: each)
                expected = turn(four_bits(turn(codes), turn(scale), stored[f"{beside}_2"]))
            else:
                expected = codes.float() * scale
            assert torch.equal(found, expected.to(found.dtype)), at
        assert api.verify(theirs, tmp_path / f"{name} plain", dtype="bf16").equal
        seen = {at: scale for at, scale in stored.items() if at.endswith("input_scale")}
        amax, whole = tmp_path / f"{name} amax", 448.0 * (6 if wish == "nvfp4" else 1)
        save_file({re.sub(r"[._]input_scale$", ".input_amax", at): scale * whole for at, scale in seen.items()}, amax)
        assert api.verify(made(name), theirs, amax=amax).findings == ()
        assert differing(tensors(api.run(api.plan(theirs, to="hf"), tmp_path / f"{name} same")), stored) == {}


def test_a_wrong_scale_of_experts_in_one_tensor_is_found(coded_by_modelopt, tmp_path):
    theirs = shutil.copytree(coded_by_modelopt[1] / made("gpt_oss").name, tmp_path / "theirs")
    plain = api.run(api.plan(theirs, to="hf", dtype="bf16"), tmp_path / "plain")
    stored = tensors(theirs)
    at = parameters("gpt_oss")[0]
    scale = stored[f"{at}_weight_scale"]
    stored[f"{at}_weight_scale"] = (scale.float() * 2).to(scale.dtype)
    save_file(stored, theirs / "model.safetensors")
    assert not api.verify(theirs, plain, dtype="bf16").equal
    del stored[f"{at}_weight_scale"]
    save_file(stored, theirs / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=f"the scale '{at}_weight_scale' is missing"):
        api.plan(theirs, to="hf", dtype="bf16")

"""`carnet fits`: what fills a model, part by part, and every way in which a checkpoint and a spec can fail to go together."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp

import carnet
from carnet.algebra.box import Box
from carnet.cli import main
from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.formats.detect import open_checkpoint
from carnet.formats.stored import Stored
from carnet.megatron import asks
from carnet.megatron.asks import Ask, of_ranks, spec_of
from carnet.megatron.fits import _compare, fits
from carnet.megatron.fused import keys_map
from carnet.megatron.meta import FIRST, Cut
from carnet.megatron.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec
from carnet.megatron.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec
from tests.megatron.conftest import BASE, HYBRID, MLA, MODELS, MOE, PATTERN, PLACES

pytestmark = pytest.mark.referee
GOLDENS = Path(__file__).parents[1] / "goldens/megatron"


def spec(config, stage):
    return get_gpt_modelopt_spec(config, remap_te_layernorm=True, vp_stage=stage)


def stack(config, stage):
    return get_hybrid_stack_modelopt_spec(remap_te_layernorm=True)


def misfits(found):
    return {(each.what, each.name) for each in found.misfits}


# --- what fits -----------------------------------------------------------------------------------------------------------------

# golden -> the cut that it was saved with
SAVED = {
    "llama_tp2pp2": {"tp": 2, "pp": 2},
    "gemma_te_tp2": {"tp": 2},
    "gpt_te_tp2": {"tp": 2},
    "qwen2_tp2": {"tp": 2},
    "mixtral_ep2": {"ep": 2},
    "deepseek_mtp_te_pp2": {"pp": 2},
    "v019_deepseek_te_ep2": {"ep": 2},
    "v019_llama_te_tp2": {"tp": 2},
    "mamba_te_tp2": {"tp": 2},
}


@pytest.mark.parametrize("golden", SAVED)
def test_each_part_of_a_parameter_is_filled_with_the_box_that_its_rank_saved(golden):
    found = fits(GOLDENS / golden, **SAVED[golden])
    stored = open_checkpoint(GOLDENS / golden).tensors
    assert found.good
    assert found.cast == ()
    boxes: dict[str, set[Box]] = {}
    for ask, dtype in found.fills:
        boxes.setdefault(ask.key, set()).add(ask.box)
        assert (ask.shape, dtype) == (stored["", ask.key].shape, stored["", ask.key].dtype)
    assert boxes == {key: {chunk.box for chunk in stored["", key].chunks} for key in boxes}
    assert boxes.keys() == {name for _, name in stored if "optimizer" not in name}


FIT = {  # golden, spec -> whether it fits
    **{(golden, spec): True for golden in SAVED for spec in ("modelopt", "te")},
    ("mixtral_ep2", "te"): False,  # the local spec names the norm before a mixture otherwise
    **{(golden, "local"): True for golden in ("llama_tp2pp2", "gpt_te_tp2", "qwen2_tp2", "mixtral_ep2", "v019_llama_te_tp2")},
    **{(golden, "local"): False for golden in ("deepseek_mtp_te_pp2", "v019_deepseek_te_ep2")},
    ("llama_legacy", "modelopt"): True,
    ("llama_legacy", "local"): True,
    ("llama_legacy", "te"): False,  # saved by the local spec, whose modules' own names a file a rank has
    ("mixtral_gg_te_ep2_legacy", "te"): True,
    ("mixtral_gg_te_ep2_legacy", "modelopt"): False,  # its experts are one module
    ("mixtral_gg_te_ep2_legacy", "local"): False,
}


@pytest.mark.parametrize(("golden", "spec"), FIT)
@pytest.mark.parametrize("cut", [{}, {"tp": 2, "pp": 2, "ep": 2}])
def test_a_golden_fits_the_specs_that_load_it_and_no_others(golden, spec, cut):
    if "legacy" in golden and cut:
        with pytest.raises(BadRequest, match="fills the ranks that saved it"):
            fits(GOLDENS / golden, spec, tp=4)
        return
    if cut and not open_checkpoint(GOLDENS / golden).config["num_experts"]:
        with pytest.raises(BadRequest, match="cuts no such model so"):
            fits(GOLDENS / golden, spec, **cut)
        cut = {**cut, "ep": 1}
    found = fits(GOLDENS / golden, spec, **cut)
    assert found.good == FIT[golden, spec], found.misfits[:3]


def test_the_spec_is_said_as_it_is_called_in_python(default_spec, saved):
    said = {
        ("llama_tp2pp2", "modelopt"): "get_gpt_modelopt_spec(config, remap_te_layernorm=True)",
        ("mixtral_ep2", "modelopt"): "get_gpt_modelopt_spec(config, remap_te_layernorm=True, saved_by='local')",
        ("llama_legacy", "modelopt"): "get_gpt_modelopt_spec(config, remap_te_layernorm=False)",
        ("mamba_te_tp2", "modelopt"): "get_hybrid_stack_modelopt_spec(remap_te_layernorm=True)",
        ("llama_tp2pp2", "local"): "get_gpt_decoder_block_spec(config, use_transformer_engine=False)",
    }
    assert {each: fits(GOLDENS / each[0], each[1]).spec for each in said} == said


def test_a_checkpoint_under_the_modules_own_names_fits_the_spec_that_does_not_remap(saved):
    root = saved(BASE, lambda config, stage: get_gpt_modelopt_spec(config))
    found = fits(root)
    assert found.good
    assert found.spec == "get_gpt_modelopt_spec(config, remap_te_layernorm=False)"


def test_files_of_ranks_under_the_names_of_fused_norms_fit_what_renames_them(tmp_path):
    """As megatron/core/post_training/modelopt/gpt/state_dict_hooks.py does when they are loaded."""
    root = tmp_path / "legacy"
    shutil.copytree(GOLDENS / "llama_legacy", root)
    for file in root.glob("iter_*/mp_rank_*/model_optim_rng.pt"):
        state = torch.load(file, weights_only=False)
        for old, new in keys_map("attention dense", "te").items():
            state["model"] = {name.replace(f".{old}", f".{new}"): held for name, held in state["model"].items()}
        torch.save(state, file)
    assert fits(root, "modelopt").good
    assert fits(root, "te").good
    norms = {ask.parameter: ask.key for ask, _ in fits(root).fills if "norm" in ask.parameter and ".1." in ask.parameter}
    assert norms == {
        "decoder.layers.1.input_layernorm.weight": "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.pre_mlp_layernorm.weight": "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
    }
    assert {what for what, _ in misfits(fits(root, "local"))} == {"missing", "left over"}


def test_what_stands_before_all_names_is_looked_through(saved):
    found = fits(saved(BASE, spec, prefix="module."), tp=2)
    assert found.good
    assert {ask.key.partition(".")[0] for ask, _ in found.fills} == {"embedding", "decoder", "output_layer"}


def test_layers_under_names_of_their_own_are_asked_for_so(saved):
    """As Megatron-Bridge saves them: a flag of sharded_state_dict's says so, no argument does."""
    root = saved({**BASE, "hetereogenous_dist_checkpoint": True}, spec, args=BASE)
    found = fits(root)
    assert found.good
    assert any(ask.key == "decoder.layers.3.mlp.linear_fc2.weight" for ask, _ in found.fills)


def test_another_element_type_fits_and_is_said(saved):
    root = saved(BASE, spec, args={**BASE, "params_dtype": "torch.bfloat16", "bf16": True})
    found = fits(root)
    assert found.good
    assert len(found.cast) == len({ask.key for ask, _ in found.fills})
    assert {(ask.dtype, stored) for ask, stored in found.fills} == {("bf16", "f32")}


def test_a_config_of_hugging_face_stands_in_place_of_the_arguments(saved, tmp_path):
    root = GOLDENS / "llama_tp2pp2"
    carnet.cross(root, tmp_path / "hf", to="hf")
    found = fits(root, config=tmp_path / "hf/config.json", tp=2)
    assert [(ask.parameter, ask.box) for ask, _ in found.fills] == [
        (ask.parameter, ask.box) for ask, _ in fits(root, tp=2).fills
    ]
    bare = saved(BASE, spec, args={})
    with pytest.raises(BadCheckpoint, match="training arguments are missing"):
        fits(bare)
    (tmp_path / "args.yaml").write_text(json.dumps(BASE))
    assert fits(bare, config=tmp_path / "args.yaml").good


def test_how_many_rows_the_embedding_has_is_seen_where_no_argument_says_it(saved, tmp_path):
    bare = {**BASE, "padded_vocab_size": None}
    assert fits(saved(BASE, spec, args=bare), tp=2).good
    for golden in ("llama_legacy", "mixtral_gg_te_ep2_legacy"):  # two ranks that share it, two that do not
        said = {**open_checkpoint(GOLDENS / golden).config, "padded_vocab_size": None}
        (tmp_path / "args.json").write_text(json.dumps(said))
        assert fits(GOLDENS / golden, "te" if "te" in golden else "local", config=tmp_path / "args.json").good


STRETCHED = {"rotary_seq_len_interpolation_factor": 4}


@pytest.mark.parametrize(
    "more",
    [
        # no release that builds such a model looks at the text without a path
        {"heterogeneous_layers_config_encoded_json": '{"block_configs": []}'},
        {"group_query_attention": True, "num_query_groups": 2, "hybrid_attention_ratio": 0.0},
        {**MOE, "moe_expert_capacity_factor": 0.5},  # nothing is stored otherwise
    ],
)
def test_arguments_that_reach_no_parameter_are_nothing_to_a_spec(saved, more):
    model = {**BASE, **{name: value for name, value in more.items() if name in MOE}}
    assert fits(saved(model, spec, args={**model, **more})).good


def test_arguments_that_releases_read_otherwise_want_the_program_that_wrote_them(tmp_path):
    root, said = GOLDENS / "llama_legacy", tmp_path / "args.json"  # a file a rank tells of no release
    ended = ("use_legacy_models", "legacy_tokenizer", "moe_use_legacy_grouped_gemm", "rl_parallel_generation_tasks")
    ended += ("hybrid_attention_ratio", "hybrid_mlp_ratio", "norm_epsilon", "apply_layernorm_1p")
    own = {name: value for name, value in open_checkpoint(root).config.items() if name not in ended} | STRETCHED
    said.write_text(json.dumps(own, default=str))
    with pytest.raises(BadRequest, match="releases of megatron-lm compute different models") as caught:
        fits(root, "local", config=said)
    assert "--written-by" in caught.value.remedy
    words = ["--spec", "local", "--config", str(said), "--written-by", "megatron-lm==0.19"]
    result = CliRunner().invoke(main, ["fits", str(root), *words])
    assert result.exit_code == 0, result.output
    said.write_text(json.dumps({**own, "carnet_meant_for": "megatron-core"}, default=str))
    assert fits(root, "local", config=said).good


# --- what does not -------------------------------------------------------------------------------------------------------------


def rename(state, old, new):
    """Save what one name ends with under another."""
    for held in [*state.values()]:
        for shard in held if isinstance(held, list) else [held]:
            shard.key = shard.key.replace(old, new)


def test_a_norm_that_is_not_remapped_is_missing_and_left_over(saved):
    norm, plain = "self_attention.linear_qkv.layer_norm_", "input_layernorm."
    root = saved(BASE, spec, lambda state: rename(state, norm, plain))
    expected = {("missing", f"decoder.layers.{norm}weight"), ("left over", f"decoder.layers.{plain}weight")}
    for cut in ({}, {"tp": 2, "pp": 2}):
        assert misfits(fits(root, **cut)) == expected
    assert misfits(fits(root, "te")) == misfits(fits(root, "local")) == expected


def test_an_expert_that_is_missing_is_found(saved):
    experts = "decoder.layers.mlp.experts.experts.linear_fc"
    root = saved({**BASE, **MOE, "num_experts": 3}, spec, args={**BASE, **MOE})
    found = fits(root, ep=2)
    router = ("another shape", "decoder.layers.mlp.router.weight")
    shapes = {("another shape", f"{experts}{n}.weight") for n in (1, 2)}
    states = {each for each in misfits(found) if "_extra_state" in each[1]}
    assert misfits(found) - states == {router, *shapes}
    assert {each.found for each in found.misfits if each.name == f"{experts}1.weight"} == {"4 x 3 x 48 x 32"}
    assert {each.wanted.partition(" for")[0] for each in found.misfits if each.name == f"{experts}1.weight"} == {
        "4 x 4 x 48 x 32"
    }


def test_an_expert_that_is_missing_in_one_ranks_file_is_named(tmp_path):
    root = tmp_path / "legacy"
    shutil.copytree(GOLDENS / "mixtral_gg_te_ep2_legacy", root)
    [file] = root.glob("iter_*/mp_rank_00_001/model_optim_rng.pt")
    state = torch.load(file, weights_only=False)
    gone = "decoder.layers.2.mlp.experts.linear_fc2.weight1"
    del state["model"][gone]
    torch.save(state, file)
    assert misfits(fits(root, "te")) == {("missing", f"tp0-pp0-ep1-vp0/{gone}")}


def test_layers_of_latent_attention_in_a_hybrid_are_not_lost(saved):
    """Its arguments say attention, its store holds latent attention; and then the arguments say so, too."""

    def plant(state):
        layer = "decoder.layers.1.self_attention."
        for name in [name for name in state if name.startswith(f"{layer}linear_qkv")]:
            del state[name]
        for name in ("linear_q_down_proj", "linear_kv_down_proj", "linear_kv_up_proj"):
            key = f"{layer}{name}.weight"
            state[key] = ShardedTensor.from_rank_offsets(key, torch.zeros(4, 32))

    root = saved(HYBRID, stack, plant)
    left = {
        f"decoder.layers.1.self_attention.{name}.weight"
        for name in ("linear_q_down_proj", "linear_kv_down_proj", "linear_kv_up_proj")
    }
    qkv = "decoder.layers.1.self_attention.linear_qkv."
    expected = {("missing", f"{qkv}weight"), *(("left over", name) for name in left)}
    found = misfits(fits(root))
    assert {each for each in found if "_extra_state" not in each[1]} == expected
    latent = saved(HYBRID, stack, plant, args={**HYBRID, "hybrid_override_pattern": "M+-ME"})
    if "mla_layer" in PLACES:
        with pytest.raises(BadCheckpoint, match="refuses to build"):  # for want of its sizes
            fits(latent)
        return
    [said] = fits(latent).misfits
    assert (said.what, said.name) == ("no place", "decoder.layers.1")
    assert "(MLA)" in said.found


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"ffn_hidden_size": 56}, {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}),
        ({"kv_channels": 16}, {"self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"}),
        ({"num_query_groups": 4}, {"self_attention.linear_qkv.weight"}),
    ],
)
def test_a_wrong_width_is_found_where_it_is(wrong, where, saved):
    found = fits(saved(BASE, spec, args={**BASE, **wrong}), pp=2)
    assert misfits(found) == {("another shape", f"decoder.layers.{name}") for name in where}


def test_layers_that_are_too_many_are_left_over(saved):
    """One name for all layers has another shape then; where each has its own, the last ones are left."""
    stacked = fits(saved({**BASE, "num_layers": 5}, spec, args=BASE))
    assert {what for what, name in misfits(stacked) if "_extra_state" not in name} == {"another shape"}
    apart = {**BASE, **MOE, **PATTERN}
    more = {**apart, "num_layers": 5, "moe_layer_freq": [0, 1, 0, 1, 1]}
    found = misfits(fits(saved(more, spec, args=apart)))
    assert {what for what, _ in found} == {"left over"}
    assert {name.split(".")[2] for _, name in found} == {"4"}
    assert ("left over", "decoder.layers.4.mlp.router.weight") in found


def test_layers_that_are_too_few_are_missing(saved):
    apart = {**BASE, **MOE, **PATTERN}
    fewer = {**apart, "num_layers": 3, "moe_layer_freq": [0, 1, 0]}
    found = misfits(fits(saved(fewer, spec, args=apart), pp=2))
    assert {what for what, _ in found} == {"missing"}
    assert {name.split(".")[2] for _, name in found} == {"3"}


def test_a_module_that_a_spec_builds_as_nothing_leaves_its_weights_over(saved, monkeypatch):
    said = MODELS["llama tied, its queries and keys normed"]
    root = saved(said, spec)
    assert fits(root).good

    def forgetful(config, **given):
        made = get_gpt_modelopt_spec(config, **given)
        made.layer_specs[0].submodules.self_attention.submodules.q_layernorm = IdentityOp
        return made

    monkeypatch.setattr(asks, "get_gpt_modelopt_spec", forgetful)
    assert misfits(fits(root)) == {("left over", "decoder.layers.self_attention.q_layernorm.weight")}


def test_a_parameter_that_nothing_would_fill_is_named(saved, monkeypatch):
    class Silent(ColumnParallelLinear):
        def sharded_state_dict(self, *given, **more):
            return {}

    root = saved(BASE, spec)

    def silent(config, **given):
        made = get_gpt_modelopt_spec(config, **given)
        made.layer_specs[0].submodules.self_attention.submodules.linear_qkv = Silent
        return made

    monkeypatch.setattr(asks, "get_gpt_modelopt_spec", silent)
    found = misfits(fits(root))
    never = {("never loaded", f"decoder.layers.{layer}.self_attention.linear_qkv.weight") for layer in range(4)}
    assert found == {*never, ("left over", "decoder.layers.self_attention.linear_qkv.weight")}


def test_a_module_s_state_that_is_not_there_is_missing(saved):
    """megatron-core asks for it, and does not load without; which states Transformer Engine's modules have, they know alone."""
    key = "decoder.layers.self_attention.linear_proj._extra_state"

    def drop(state):
        for name in [name for name, held in state.items() if isinstance(held, ShardedObject) and held.key == key]:
            del state[name]

    root = saved(BASE, spec, drop)
    assert misfits(fits(root)) == {("missing", f"{key}/shard_{layer}_4") for layer in range(4)}
    assert fits(root, "te").good


def test_an_object_that_no_one_knows_is_left_over(saved):
    def add(state):
        state["strange"] = ShardedObject("decoder.strange", {"a": 1}, (1,), (0,))

    assert misfits(fits(saved(BASE, spec, add))) == {("left over", "decoder.strange/shard_0_1")}


def test_the_state_of_a_module_is_no_parameter_of_a_rank():
    class Scaled(torch.nn.Linear):
        def get_extra_state(self):
            return torch.zeros(3, dtype=torch.uint8)  # as Transformer Engine's modules have it

    model = torch.nn.ModuleDict({"output_layer": Scaled(2, 2, bias=False)})
    assert [ask.key for ask in asks._of_state(model, FIRST, 0, None, grouped=False)] == ["output_layer.weight"]


def test_experts_and_halves_under_names_of_their_own_are_asked_for_so(saved):
    """As ModelOpt has megatron-core save them: singleton_local_shards."""
    said = {**BASE, **MOE, **PATTERN}
    root = saved(said, spec, metadata={"singleton_local_shards": True})
    found = fits(root, ep=2)
    assert found.misfits == ()
    keys = {ask.key for ask, _ in found.fills}
    assert {"decoder.layers.0.mlp.linear_fc1.weight_w", "decoder.layers.1.mlp.experts.experts.3.linear_fc2.weight"} <= keys


def test_a_tensor_that_is_used_in_part_is_named():
    stored = Stored("", "w", "f32", (4, 2), ())
    ask = Ask("w", "tp0 pp0 ep0", "", "w", Box((0, 0), (2, 2)), (4, 2), "f32")
    fills, [found] = _compare([ask, ask], {("", "w"): stored})
    assert (found.what, found.wanted, found.found) == ("partly left over", "4 elements", "8 elements")
    assert len(fills) == 2


# --- what is refused, and the command line --------------------------------------------------------------------------------------


def test_what_megatron_core_does_not_load_is_refused_by_name(tmp_path):
    carnet.cross(GOLDENS / "llama_tp2pp2", tmp_path / "hf", to="hf")
    with pytest.raises(NotSupported, match="only what megatron-core loads"):
        fits(tmp_path / "hf")
    with pytest.raises(NotSupported, match="no local spec of a hybrid"):
        fits(GOLDENS / "mamba_te_tp2", "local")
    with pytest.raises(BadRequest, match="not a spec that carnet knows"):
        fits(GOLDENS / "mamba_te_tp2", "apex")


def run(*arguments):
    return CliRunner().invoke(main, ["fits", *map(str, arguments)])


def test_the_exit_code_says_whether_it_fits(saved, tmp_path):
    good = run(GOLDENS / "llama_tp2pp2", "--spec", "modelopt", "--tp", 2)
    assert good.exit_code == 0
    assert "fills the model of the spec" in good.stdout
    assert "tp 2 pp 1 ep 1" in good.stdout
    bad = run(saved({**BASE, "num_layers": 5}, spec, args=BASE), "--spec", "te")
    assert bad.exit_code == 3
    assert "does not fill" in bad.stdout
    assert "another shape" in bad.stdout
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", "--spec", "te").exit_code == 1
    assert run(GOLDENS / "llama_tp2pp2").exit_code == 2
    assert run(GOLDENS / "llama_tp2pp2", "--spec", "apex").exit_code == 2


def rows(result):
    """Return the table of an output, a list of cells a line."""
    return [re.split(r"\s{2,}", line.strip()) for line in result.stdout.split("─\n")[-1].splitlines()]


def test_a_line_stands_for_all_layers_and_ranks_that_are_alike():
    found = rows(run(GOLDENS / "llama_tp2pp2", "--spec", "modelopt", "--tp", 2))
    fc1 = "mlp.linear_fc1.weight"
    assert [f"decoder.layers.*.{fc1}", f"decoder.layers.{fc1}", "16", "1 x 48 x 64", "4 x 192 x 64", "bf16"] in found
    assert len(found) == 9
    found = rows(run(GOLDENS / "mixtral_gg_te_ep2_legacy", "--spec", "te"))
    held = "decoder.layers.*.mlp.experts.linear_fc2.weight*"
    asked = held.replace("linear_fc2.weight*", "local_experts.*.linear_fc2.weight")
    assert [asked, f"tp*-pp*-ep*-vp*/{held}", "16", "64 x 96", "64 x 96", "bf16"] in found


def test_every_part_is_listed_where_that_is_asked_for():
    found = rows(run(GOLDENS / "llama_tp2pp2", "--spec", "modelopt", "--tp", 2, "--parts"))
    fc1 = "decoder.layers.{}mlp.linear_fc1.weight"
    assert [fc1.format("2."), "tp1 pp0 ep0", fc1.format(""), "2:3, 48:96, 0:64 of 4 x 192 x 64", "bf16"] in found  # of the gate
    assert len(found) == 62


def test_the_json_says_what_fills_what(saved):
    found = json.loads(run(GOLDENS / "llama_tp2pp2", "--spec", "modelopt", "--json").stdout)
    assert (found["fits"], found["misfits"], len(found["filled"])) == (True, [], 31)
    assert {
        "parameter": "decoder.layers.2.input_layernorm.weight",
        "rank": "tp0 pp0 ep0",
        "key": "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        "start": [2, 0],
        "shape": [1, 64],
        "of": [4, 64],
        "dtype": "bf16",
        "stored": "bf16",
    } in found["filled"]
    result = run(saved({**BASE, "ffn_hidden_size": 56}, spec, args=BASE), "--spec", "modelopt", "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert not found["fits"]
    assert {each["name"] for each in found["misfits"]} == {f"decoder.layers.mlp.linear_fc{n}.weight" for n in (1, 2)}


def test_without_megatron_core_one_clear_error_says_what_to_install():
    program = "import sys; sys.modules['megatron'] = None; from carnet.cli import main; main()"
    command = [sys.executable, "-W", "error", "-c", program, "fits", str(GOLDENS / "llama_tp2pp2"), "--spec", "te"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pip install 'carnet[megatron]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_program_says_nothing_of_accelerators_that_are_not_there():
    command = [sys.executable, "-m", "carnet", "fits", str(GOLDENS / "mamba_te_tp2"), "--spec", "modelopt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_latent_attention_of_two_ranks_files_is_asked_for_as_transformer_engine_cuts_it():
    """Each rank has the compressing layers whole; the local spec would cut them."""
    said, shapes = {**BASE, **MLA}, {}
    for spec_name, saver in (("te", "te"), ("local", None)):
        _, builder = spec_of(spec_name, saver, hybrid=False)
        found = {
            ask.key: ask.shape for ask in of_ranks(said, builder, Cut(tp=2), saver, grouped=False) if ask.unit.startswith("tp1")
        }
        shapes[spec_name] = found["decoder.layers.0.self_attention.linear_q_down_proj.weight"]
    assert shapes == {"te": (16, 32), "local": (8, 32)}

"""The specs themselves: the parameters and the keys of megatron-core's own, what that gets wrong, and what is refused."""

import importlib
import inspect
import sys
from dataclasses import fields, make_dataclass
from importlib.util import find_spec

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs, get_gpt_mtp_block_spec
from megatron.core.post_training.modelopt.gpt import model_specs as gpt
from megatron.core.post_training.modelopt.mamba import model_specs as mamba
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_layer import TransformerLayer

from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.megatron import hybrids, modules
from carnet.megatron.asks import _shards
from carnet.megatron.fused import keys_map
from carnet.megatron.hybrids import Stack, StackSubmodules
from carnet.megatron.meta import FIRST, WHOLE, Cut, Rank, _on, _playing, built
from carnet.megatron.models import config_of
from carnet.megatron.modules import LayerNorm, Norm, Refused, RMSNorm
from carnet.megatron.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec, moe_pattern
from carnet.megatron.post_training.modelopt.hybrid import model_specs as hybrid
from carnet.megatron.post_training.modelopt.hybrid.model_specs import get_hybrid_stack_modelopt_spec, misplaced
from tests.megatron.conftest import BASE, DELTA, HYBRID, MLA, MODELS, MOE, PLACES, SPARSE, newer

pytestmark = pytest.mark.referee
ENDS = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}


@pytest.fixture
def one_rank():
    """A process that is all of Megatron's world while a test runs, and builds on the meta device."""
    with _playing(WHOLE, FIRST), _on("meta"):
        yield


def names(model):
    """Return the names of a model's parameters."""
    return {name for name, _ in model.named_parameters()}


def given(function):
    """Return the parameters that a caller may give by place, with their defaults."""
    found = inspect.signature(function).parameters.values()
    return [(each.name, each.default) for each in found if each.kind is not inspect.Parameter.KEYWORD_ONLY]


def test_the_parameters_and_the_defaults_are_megatron_cores():
    assert given(get_gpt_modelopt_spec) == given(gpt.get_gpt_modelopt_spec)
    theirs = given(mamba.get_mamba_stack_modelopt_spec)
    assert given(get_hybrid_stack_modelopt_spec)[: len(theirs)] == theirs
    # since 0.18: megatron/core/post_training/modelopt/hybrid/model_specs.py
    assert given(get_hybrid_stack_modelopt_spec)[2:] == [("use_default_te_spec", False), ("moe_grouped_gemm", True)]
    assert hybrid.get_mamba_stack_modelopt_spec is get_hybrid_stack_modelopt_spec


def maps(block):
    return [layer.submodules.sharded_state_dict_keys_map for layer in block.layer_specs]


@pytest.mark.parametrize("remap", [True, False])
@pytest.mark.parametrize("name", [name for name, said in MODELS.items() if "nothing normed" not in name])
def test_the_keys_are_those_of_megatron_cores_own_spec_where_that_is_right(name, remap, one_rank):
    config = config_of(MODELS[name])
    ours = get_gpt_modelopt_spec(config, remap_te_layernorm=remap)
    theirs = gpt.get_gpt_modelopt_spec(config, remap_te_layernorm=remap)
    assert maps(ours) == maps(theirs)
    assert [type(layer.submodules.mlp) for layer in ours.layer_specs] == [
        type(layer.submodules.mlp) for layer in theirs.layer_specs
    ]
    assert [layer.module for layer in ours.layer_specs] == [layer.module for layer in theirs.layer_specs]


LAYERS = {"mamba_layer": "mamba", "attention_layer": "attention", "mlp_layer": "dense", "moe_layer": "moe"}


@pytest.mark.parametrize("place", LAYERS)
def test_the_keys_of_a_hybrid_are_those_of_megatron_cores_own_spec(place):
    ours = get_hybrid_stack_modelopt_spec(remap_te_layernorm=True).submodules
    theirs = mamba.get_mamba_stack_modelopt_spec(remap_te_layernorm=True).submodules
    ours, theirs = (getattr(each, place).submodules for each in (ours, theirs))
    present = {field.name for field in fields(ours) if getattr(ours, field.name) is not IdentityOp}
    assert present == {field.name for field in fields(theirs) if getattr(theirs, field.name) is not IdentityOp}
    used = {norm: linear for norm, linear in theirs.sharded_state_dict_keys_map.items() if norm.rstrip(".") in present}
    assert ours.sharded_state_dict_keys_map == used == keys_map(LAYERS[place], "te")


def test_latent_attention_without_norms_is_built_without_them(one_rank):
    """megatron-core's own spec has them all the same: no checkpoint can fill them."""
    config = config_of({**BASE, **MLA, "qk_layernorm": False})
    ours, theirs = (spec(config).layer_specs[0] for spec in (get_gpt_modelopt_spec, gpt.get_gpt_modelopt_spec))
    norms = [(layer.submodules.self_attention.submodules.q_layernorm) for layer in (ours, theirs)]
    assert norms[0] is IdentityOp
    assert norms[1] is not IdentityOp


def test_queries_and_keys_are_normed_by_their_length_where_the_caller_or_the_config_asks(one_rank):
    """megatron-core's own spec does not hear its caller, since the config has a field of this name."""
    config, asked = config_of(BASE), config_of({**BASE, "qk_l2_norm": True})
    for spec in (get_gpt_modelopt_spec(config, qk_l2_norm=True), get_gpt_modelopt_spec(asked)):
        assert {layer.submodules.self_attention.submodules.q_layernorm for layer in spec.layer_specs} == {L2Norm}
    deaf = gpt.get_gpt_modelopt_spec(config, qk_l2_norm=True)
    assert {layer.submodules.self_attention.submodules.q_layernorm for layer in deaf.layer_specs} == {IdentityOp}


@pytest.mark.parametrize(
    ("often", "expected"), [(1, [1, 1, 1, 1]), (2, [1, 0, 1, 0]), (3, [1, 0, 0, 1]), ([0, 1, 1, 0], [0, 1, 1, 0])]
)
def test_mixtures_are_every_nth_layer_from_the_first_or_those_of_a_list(often, expected):
    assert moe_pattern(config_of({**BASE, **MOE, "moe_layer_freq": often})) == expected
    assert moe_pattern(config_of(BASE)) == [0, 0, 0, 0]


@pytest.mark.parametrize("often", [1, [0, 1, 1, 0]])
def test_a_model_without_layers_as_for_eagle_offline_is_built(often, one_rank):
    """Megatron-LM's model_builder.py takes the layers from the config that it has read; its own spec fails where a list marked them."""
    config = config_of({**BASE, **MOE, "moe_layer_freq": often})
    config.num_layers = 0
    spec = get_gpt_modelopt_spec(config)
    assert (spec.layer_specs, spec.layer_norm) == ([], Norm)
    assert names(GPTModel(config, spec, 64, 16, position_embedding_type="rope")) == ENDS


def test_a_base_of_the_spec_is_frozen_while_layers_for_further_tokens_are_trained(one_rank):
    """As modelopt_gpt_hybrid_builder joins them and freezes one side: by the names of parameters and of what has an expert_bias."""
    said = {**BASE, **MOE, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    config = config_of({**said, "mtp_num_layers": 1})
    further = get_gpt_mtp_block_spec(
        config, get_gpt_decoder_layer_specs(config, use_transformer_engine=False)[-1], use_transformer_engine=False
    )
    model = GPTModel(config, get_gpt_modelopt_spec(config), 64, 16, mtp_block_spec=further)
    plain = config_of(said)
    base = names(GPTModel(plain, get_gpt_modelopt_spec(plain), 64, 16))
    assert {name for name in names(model) if "mtp.layers." not in name} == base
    assert names(model) - base
    routed = {name for name, module in model.named_modules() if hasattr(module, "expert_bias")}
    assert {name.partition(".")[0] for name in routed} == {"decoder", "mtp"}


@pytest.mark.parametrize("often", [0, [0, 1], [0, 1, 2, 0], "[0, 1, 1, 0]", None])
def test_a_pattern_that_means_nothing_is_refused(often):
    config = config_of({**BASE, **MOE})
    config.moe_layer_freq = often
    with pytest.raises(BadRequest, match="moe_layer_freq"):
        moe_pattern(config)


def kinds(said, cut, rank):
    """Return what each layer of a rank is, a list a virtual stage, by the number that megatron-core gives it."""
    with built(said, lambda config, stage: get_gpt_modelopt_spec(config, vp_stage=stage), cut, rank) as stages:
        return [[(layer.layer_number - 1, hasattr(layer.mlp, "router")) for layer in each.decoder.layers] for each in stages]


def test_each_pipeline_stage_builds_its_own_part_of_the_pattern():
    said = {**BASE, **MOE, "num_layers": 8, "moe_layer_freq": [0, 0, 1, 1, 0, 1, 1, 0]}
    marks = [*enumerate(map(bool, [0, 0, 1, 1, 0, 1, 1, 0]))]
    assert [kinds(said, Cut(pp=2), Rank(pp=pp)) for pp in (0, 1)] == [[marks[:4]], [marks[4:]]]
    virtual = [kinds(said, Cut(pp=2, vp=2), Rank(pp=pp)) for pp in (0, 1)]
    assert virtual == [[marks[0:2], marks[4:6]], [marks[2:4], marks[6:8]]]
    uneven = {**said, "decoder_first_pipeline_num_layers": 3}
    assert [kinds(uneven, Cut(pp=2), Rank(pp=pp)) for pp in (0, 1)] == [[marks[:3]], [marks[3:]]]
    layout = {**said, "pipeline_model_parallel_layout": "Et|t*6|tL"}
    assert [kinds(layout, Cut(pp=3), Rank(pp=pp)) for pp in (0, 1, 2)] == [[marks[:1]], [marks[1:7]], [marks[7:]]]


def test_the_first_stage_alone_has_the_embedding_and_the_last_alone_the_head():
    ends = []
    for pp in (0, 1):
        with built(
            BASE, lambda config, stage: get_gpt_modelopt_spec(config, vp_stage=stage), Cut(1, 2, 1, 2), Rank(pp=pp)
        ) as stages:
            ends.append([(hasattr(each, "embedding"), hasattr(each, "output_layer")) for each in stages])
    assert ends == [[(True, False), (False, False)], [(False, False), (False, True)]]


def test_how_training_shared_the_layers_concerns_no_other_cut():
    trained = {**BASE, "num_layers": 8, "pipeline_model_parallel_size": 3, "pipeline_model_parallel_layout": "Et|t*6|tL"}
    uneven = {**BASE, "num_layers": 8, "pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 2}
    virtual = {**trained, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    for said in (trained, uneven, {**virtual, "pipeline_model_parallel_layout": "Et|t*6||tL"}):
        assert [len(stage) for stage in kinds(said, WHOLE, FIRST)] == [8]
        assert [len(kinds(said, Cut(pp=2), Rank(pp=pp))[0]) for pp in (0, 1)] == [4, 4]
    assert [len(kinds(trained, Cut(pp=3), Rank(pp=pp))[0]) for pp in (0, 1, 2)] == [1, 6, 1]
    assert [len(kinds(uneven, Cut(pp=3), Rank(pp=pp))[0]) for pp in (0, 1, 2)] == [2, 3, 3]
    unsaid = {**trained, "pipeline_model_parallel_size": None}
    assert [len(stage) for stage in kinds(unsaid, WHOLE, FIRST)] == [8]
    unread = {**trained, "pipeline_model_parallel_layout": "<PipelineParallelLayerLayout>"}
    assert [len(stage) for stage in kinds(unread, WHOLE, FIRST)] == [8]
    with pytest.raises(NotSupported, match="layout in words"):
        kinds(unread, Cut(pp=3), FIRST)


def test_a_stage_of_further_token_layers_alone_is_refused_by_name():
    said = {**BASE, "mtp_num_layers": 1, "pipeline_model_parallel_layout": "Ettt|t|mL"}
    with pytest.raises(NotSupported, match="further-token layers alone"):
        kinds(said, Cut(pp=3), Rank(pp=2))


def test_a_virtual_pipeline_is_refused_where_no_stage_is_said():
    with (
        pytest.raises(BadRequest, match="virtual stage"),
        built(BASE, lambda config, stage: get_gpt_modelopt_spec(config), Cut(pp=2, vp=2), Rank()),
    ):
        pass


@pytest.mark.parametrize("word", ["None", "fp8_real_quant", "fp8_blockwise_real_quant"])
def test_real_quantization_is_megatron_cores_own_layer(word, one_rank):
    config = config_of(BASE)
    ours, theirs = (spec(config, real_quant_cfg=word) for spec in (get_gpt_modelopt_spec, gpt.get_gpt_modelopt_spec))
    assert ours.layer_specs[0].module is theirs.layer_specs[0].module
    assert issubclass(ours.layer_specs[0].module, TransformerLayer)


def test_an_unknown_word_for_it_is_refused_in_megatron_cores_words(one_rank):
    with pytest.raises(ValueError, match="does not support int4") as theirs:
        gpt.get_gpt_modelopt_spec(config_of(BASE), real_quant_cfg="int4")
    with pytest.raises(BadRequest) as ours:
        get_gpt_modelopt_spec(config_of(BASE), real_quant_cfg="int4")
    assert ours.value.what == str(theirs.value)


def test_an_unknown_saver_is_refused(one_rank):
    with pytest.raises(BadRequest, match="'apex' is not a spec of training"):
        get_gpt_modelopt_spec(config_of(BASE), remap_te_layernorm=True, saved_by="apex")


def test_an_arbitrary_mask_is_for_who_asks_for_one(one_rank):
    for wanted, mask in ((False, AttnMaskType.causal), (True, AttnMaskType.arbitrary)):
        for said in (BASE, {**BASE, **MLA}):
            [found] = {
                layer.submodules.self_attention.params["attn_mask_type"]
                for layer in get_gpt_modelopt_spec(config_of(said), use_arbitrary_attention_mask=wanted).layer_specs
            }
            assert found is mask


@pytest.mark.parametrize(
    "field",
    [
        {"experimental_attention_variant": "dsa"},
        {"experimental_attention_variant": "gated_delta_net"},
        {"linear_attention_freq": 4},
        {"heterogeneous_block_specs": True},
    ],
)
def test_layers_that_megatron_cores_own_spec_would_take_for_attention_are_refused(field):
    config = config_of(BASE)
    vars(config).update(field)
    with pytest.raises(NotSupported, match="no post-training spec"):
        get_gpt_modelopt_spec(config)


# --- hybrids -------------------------------------------------------------------------------------------------------------------


def test_a_layer_without_a_place_stops_the_model_that_is_built(monkeypatch):
    """megatron-core's own spec leaves an identity there: the model is built, and the layer is lost."""
    wider = make_dataclass("Wider", [("new_layer", type, IdentityOp)], bases=(StackSubmodules,))
    monkeypatch.setattr(hybrid, "StackSubmodules", wider)
    spec = get_hybrid_stack_modelopt_spec().submodules
    assert isinstance(spec.new_layer, ModuleSpec)
    assert spec.new_layer.module is Refused
    with pytest.raises(NotSupported, match="no spec for a new_layer"):
        build_module(spec.new_layer, config=config_of(HYBRID), layer_number=3, pg_collection=None)
    assert "IdentityOp" in str(wider().new_layer)


def test_latent_attention_has_a_spec_where_the_stack_has_a_place(monkeypatch, one_rank):
    """As the stack of 0.19 has: its default spec norms nothing between the two projections."""
    wider = make_dataclass("Wider", [("mla_layer", type, IdentityOp)], bases=(StackSubmodules,))
    monkeypatch.setattr(hybrid, "StackSubmodules", wider)
    layer = get_hybrid_stack_modelopt_spec(remap_te_layernorm=True).submodules.mla_layer
    assert layer.submodules.sharded_state_dict_keys_map.keys().isdisjoint({"input_layernorm."})
    config = config_of({**BASE, **MLA, "qk_layernorm": False})
    model = build_module(layer, config=config, layer_number=1)
    found = names(model)
    inner = ("linear_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj")
    assert found == {"input_layernorm.weight", *(f"self_attention.{name}.weight" for name in inner)}


@pytest.mark.parametrize(("pattern", "lost"), [("M*-E", {}), ("M+-E", {1: "MLA"}), ("MG|-D/M+", {1: "GDN", 3: "DS_ATTENTION"})])
def test_what_a_hybrids_stack_has_no_place_for_is_named(pattern, lost):
    found = misplaced(pattern)
    if "gdn_layer" in PLACES:  # it has for all of them
        lost = {}
    assert found.keys() == lost.keys()
    assert all(f"({kind})" in found[layer] and Stack.__name__ in found[layer] for layer, kind in lost.items())


@newer
@pytest.mark.parametrize("remap", [False, True])
@pytest.mark.parametrize("said", [DELTA, SPARSE], ids=["G", "D"])
@pytest.mark.parametrize("tp", [1, 2])
def test_newer_layers_are_built_as_megatron_cores_own_spec_builds_them(said, remap, tp, monkeypatch):
    """Its norms are Transformer Engine's alone, and so they are given another module here."""
    theirs = importlib.import_module("megatron.core.post_training.modelopt.hybrid.model_specs")
    monkeypatch.setattr(theirs, "Norm", Norm)
    monkeypatch.setattr(inspect.getmodule(Stack), "TENorm", Norm)
    found = []
    for spec in (get_hybrid_stack_modelopt_spec, theirs.get_hybrid_stack_modelopt_spec):
        with built(said, lambda *_, spec=spec: spec(True, remap_te_layernorm=remap), Cut(tp=tp), Rank(tp - 1)) as [model]:
            kinds = [(type(layer), type(getattr(layer, "self_attention", None))) for layer in model.decoder.layers]
            shards = {
                name: (shard.key, shard.global_shape) for name, shard in _shards(model, {}) if isinstance(shard, ShardedTensor)
            }
            found.append(({name for name, _ in model.named_parameters()}, kinds, shards))
    assert found[0] == found[1]
    moved = [key for key, _ in found[0][2].values() if ".self_attention.in_proj.layer_norm_" in key]
    assert len(moved) == (said["hybrid_layer_pattern"].count("G") if remap else 0)


def test_the_spec_of_training_is_refused_without_transformer_engine():
    with pytest.raises(NotSupported, match="needs Transformer Engine"):
        get_hybrid_stack_modelopt_spec(use_default_te_spec=True)


def test_the_bars_of_another_cut_are_not_this_one_s():
    """In 0.16 a pattern has none; since 0.17 they say where pipeline stages end."""
    barred = {**HYBRID, "hybrid_override_pattern": None, "hybrid_layer_pattern": "M|*-|ME"}
    with built(barred, lambda *_: get_hybrid_stack_modelopt_spec()) as [model]:
        assert "".join(model.decoder.layer_type_list) == "M*-ME"


def test_a_hybrid_ends_with_a_norm():
    with built(HYBRID, lambda *_: get_hybrid_stack_modelopt_spec()) as [model]:
        assert isinstance(model.decoder.final_norm, RMSNorm)
        assert model.decoder.post_layer_norm
    with built(HYBRID, lambda *_: get_hybrid_stack_modelopt_spec(), Cut(pp=5), Rank(pp=3)) as [model]:
        assert not hasattr(model.decoder, "final_norm")


# --- norms ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("less_one", [False, True])
@pytest.mark.parametrize(("kind", "own"), [("RMSNorm", RMSNorm), ("LayerNorm", LayerNorm)])
def test_a_norm_is_torchs_of_its_weight_plus_what_is_not_stored(kind, own, less_one):
    config = config_of({**BASE, "normalization": kind, "layernorm_zero_centered_gamma": less_one}, sequence_parallel=False)
    norm = Norm(config, 32, 1e-6)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    plain = getattr(torch.nn, kind)(32, eps=1e-6)
    assert type(norm) is own
    torch.testing.assert_close(norm(x), plain(x))  # new, it does nothing
    for name, parameter in norm.named_parameters():
        parameter.data = torch.randn(32, generator=torch.Generator().manual_seed(2))
        getattr(plain, name).data = parameter.data + (less_one and name == "weight")
    torch.testing.assert_close(norm(x), plain(x))
    assert [parameter.sequence_parallel for parameter in norm.parameters()] == [False] * len([*plain.parameters()])


def test_with_transformer_engine_norms_and_attention_are_its_own(monkeypatch):
    """What is chosen, that is: it cannot run here."""
    monkeypatch.setattr(modules, "HAVE_TE", True)
    monkeypatch.setattr(modules.layers, "Norm", lambda *given: given)
    config = config_of(BASE)
    made: object = Norm(config, 32, 1e-6)
    assert made == (config, 32, 1e-6)
    assert modules.core_attention(local=False, latent=True) is transformer_engine.TEDotProductAttention
    assert modules.core_attention(local=True, latent=True) is modules.TwoWidths
    assert modules.core_attention(local=True, latent=False) is DotProductAttention
    assert modules.down_projection(like_te=True) is modules.layers.Linear


def test_without_it_they_are_megatron_cores_and_torchs():
    assert modules.core_attention(local=False, latent=False) is DotProductAttention
    assert modules.core_attention(local=False, latent=True) is modules.TwoWidths
    assert modules.down_projection() is ColumnParallelLinear


def test_a_norm_of_another_name_is_refused():
    config = config_of(BASE)
    config.normalization = "L2Norm"
    with pytest.raises(NotSupported, match="no norm of this name"):
        Norm(config, 32)


# --- models --------------------------------------------------------------------------------------------------------------------


def unrotated(config, stage):
    assert config.kv_channels == 8, "the spec's"
    return get_gpt_modelopt_spec(config)


def test_what_no_argument_says_is_as_on_megatrons_command_line():
    """Where the config's own defaults differ: megatron/training/arguments.py."""
    latent = {name: value for name, value in {**BASE, **MLA}.items() if name != "q_lora_rank"}
    for found in map(config_of, (latent, {**latent, "q_lora_rank": None})):
        assert (found.q_lora_rank, found.rotary_scaling_factor, found.mscale, found.mscale_all_dim) == (None, 1.0, 1.0, 0.0)
        assert {field.name: field.default for field in fields(found)}["q_lora_rank"] == 512


def test_all_is_as_before_when_a_model_has_been_built():
    from megatron.core import parallel_state, tensor_parallel

    before = dict(vars(parallel_state)), torch.cuda.current_device, vars(tensor_parallel.get_cuda_rng_tracker()).copy()
    with built(HYBRID, lambda *_: get_hybrid_stack_modelopt_spec(), Cut(2, 5), Rank(1, 2)):
        assert (torch.distributed.get_rank(), torch.distributed.get_world_size()) == (5, 10)
        assert torch.empty(1).is_meta
    with pytest.raises(BadCheckpoint, match="refuses to build"), built({**BASE, "kv_channels": 7}, unrotated):
        pass
    with pytest.raises(AssertionError, match="mine"), built(BASE, unrotated):
        raise AssertionError("mine")
    assert not torch.distributed.is_initialized()
    assert not torch.empty(1).is_meta
    after = dict(vars(parallel_state)), torch.cuda.current_device, vars(tensor_parallel.get_cuda_rng_tracker()).copy()
    assert after == before


def test_nothing_stands_in_for_triton_once_the_classes_of_a_hybrid_are_imported():
    assert not isinstance(sys.modules.get("triton"), hybrids._NoTriton)
    if find_spec("triton") is None:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("triton")


def test_a_model_in_a_job_that_is_cut_otherwise_is_refused(one_rank):
    with pytest.raises(BadRequest, match="runs in this process"), built(BASE, lambda *_: None, Cut(tp=2), Rank()):
        pass


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"num_attention_heads": 5, "group_query_attention": False, "kv_channels": None}, "megatron-core refuses"),
        ({"hidden_size": "wide"}, "megatron-core refuses"),
        ({"padded_vocab_size": None}, "do not say 'padded_vocab_size'"),
        ({"heterogeneous_layers_config_encoded_json": "{}"}, "described one by one"),
    ],
)
def test_arguments_that_no_model_can_be_built_of_are_refused(wrong, sentence):
    with (
        pytest.raises((BadCheckpoint, NotSupported), match=sentence),
        built({**BASE, **wrong}, lambda config, stage: get_gpt_modelopt_spec(config), Cut(tp=2)),
    ):
        pass

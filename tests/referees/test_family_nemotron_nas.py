"""Nemotron-NAS: layers that differ or do nothing cross to Megatron, whose own code computes the same, and to NVIDIA's ranks.

transformers has no class of its own for it. So the model is written out here, as vLLM's nemotron_nas.py and NVIDIA's modeling_decilm.py
have it, under the names in TensorRT-LLM's convert.py.
"""

import argparse
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention, silu

import carnet
from carnet.architectures.known import recognise
from carnet.errors import BadCheckpoint, BadRequest, CarnetError, NotSupported

pytestmark = [
    pytest.mark.referee,
    # megatron-core 0.16 calls torch's older name, and wishes for Apex
    pytest.mark.filterwarnings("ignore:.load_state_dict. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Apex is not installed"),
]

HIDDEN, HEADS, DIM, VOCAB = 96, 12, 8, 97
NOTHING = {"no_op": True, "replace_with_linear": False}
LINEAR = {"no_op": False, "replace_with_linear": True}
USUAL = {"no_op": False, "replace_with_linear": False}


def block(group, multiple):
    """Write what a config says of a layer: query heads to a KV head and multiple of the width, or a kind of block."""
    attention = {"n_heads_in_group": group, **USUAL} if isinstance(group, int) else {"n_heads_in_group": None, **group}
    mlp = {"ffn_mult": multiple, **USUAL} if isinstance(multiple, float) else {"ffn_mult": None, **multiple}
    return {"attention": attention, "ffn": mlp}


# 4.0 is a width of 256, 8.0 of 512, 12.0 of 768
LAYERS = [
    block(6, 4.0),
    block(NOTHING, 12.0),
    block(3, NOTHING),
    block(NOTHING, NOTHING),
    block(LINEAR, 8.0),
    block(2, LINEAR),
    block(LINEAR, LINEAR),
    block(NOTHING, LINEAR),
    block(2, 4.0),
]
WORDS = "*- - * . L- *l Ll l *-"
KV_HEADS = [2, None, 4, None, None, 6, None, None, 6]
WIDTHS = [256, 768, None, None, 512, None, None, None, 256]
STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(layers, **changed):
    """Write a config.json with the keys of nvidia/Llama-3_3-Nemotron-Super-49B-v1."""
    return {
        "architectures": ["DeciLMForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM"},
        "block_configs": layers,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": HEADS,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 5000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCAB,
        **changed,
    }


def shapes(said):
    """Return the tensors of a model by name, as convert.py of TensorRT-LLM reads them."""
    found = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    for number, layer in enumerate(said["block_configs"]):
        at, attention, mlp = f"model.layers.{number}.", layer["attention"], layer["ffn"]
        if not attention["no_op"]:
            found[at + "input_layernorm.weight"] = (HIDDEN,)
        if attention["replace_with_linear"]:
            found[at + "self_attn.linear_attn.weight"] = (HIDDEN, HIDDEN)
        if attention["n_heads_in_group"]:
            rows = {"q": HEADS * DIM, **dict.fromkeys("kv", HEADS // attention["n_heads_in_group"] * DIM)}
            found |= {f"{at}self_attn.{part}_proj.weight": (count, HIDDEN) for part, count in rows.items()}
            found[at + "self_attn.o_proj.weight"] = (HIDDEN, HEADS * DIM)
        if not mlp["no_op"]:
            found[at + "post_attention_layernorm.weight"] = (HIDDEN,)
        if mlp["replace_with_linear"]:
            found[at + "mlp.linear_mlp.weight"] = (HIDDEN, HIDDEN)
        if mlp["ffn_mult"]:
            width = int(64 * mlp["ffn_mult"])  # two thirds of the hidden size
            found |= {f"{at}mlp.{part}_proj.weight": (width, HIDDEN) for part in ("gate", "up")}
            found[at + "mlp.down_proj.weight"] = (HIDDEN, width)
    return found


@pytest.fixture
def made(tmp_path):
    """Save a model of random weights under a config."""

    def make(layers=LAYERS, **changed):
        (tmp_path / "hf").mkdir()
        said = config(layers, **changed)
        (tmp_path / "hf/config.json").write_text(json.dumps(said))
        torch.manual_seed(3)
        weights = {name: torch.randn(shape) * 0.2 + (len(shape) == 1) for name, shape in shapes(said).items()}
        save_file(weights, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
        return tmp_path / "hf"

    return make


def normed(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def rotated(x):
    angles = torch.outer(torch.arange(x.shape[-2]), 5000.0 ** (-torch.arange(0, DIM, 2) / DIM)).repeat(1, 2)
    left, right = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat((-right, left), dim=-1) * angles.sin()


def attended(x, held):
    batch, length, _ = x.shape
    q, k, v = ((x @ held[f"{part}_proj.weight"].T).view(batch, length, -1, DIM).transpose(1, 2) for part in "qkv")
    k, v = (part.repeat_interleave(HEADS // part.shape[1], dim=1) for part in (rotated(k), v))
    return scaled_dot_product_attention(rotated(q), k, v, is_causal=True).transpose(1, 2).flatten(2) @ held["o_proj.weight"].T


def logits(folder, tokens):
    """Compute the model: a linear layer stands in place of what it replaces, its norm before it, and nothing adds nothing."""
    weights = load_file(folder / "model.safetensors")
    x = weights["model.embed_tokens.weight"][tokens]
    for number, layer in enumerate(json.loads((folder / "config.json").read_text())["block_configs"]):
        at = f"model.layers.{number}."
        held = {name.removeprefix(at).split(".", 1)[1]: w for name, w in weights.items() if name.startswith(at)}
        norms = [weights.get(f"{at}{norm}.weight") for norm in ("input_layernorm", "post_attention_layernorm")]
        if layer["attention"]["replace_with_linear"]:
            x = x + normed(x, norms[0]) @ held["linear_attn.weight"].T
        elif not layer["attention"]["no_op"]:
            x = x + attended(normed(x, norms[0]), held)
        if layer["ffn"]["replace_with_linear"]:
            x = x + normed(x, norms[1]) @ held["linear_mlp.weight"].T
        elif not layer["ffn"]["no_op"]:
            y = normed(x, norms[1])
            x = x + (silu(y @ held["gate_proj.weight"].T) * (y @ held["up_proj.weight"].T)) @ held["down_proj.weight"].T
    return normed(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def arguments(folder):
    """Return what carnet says to Megatron, read by torch alone."""
    return vars(torch.load(folder / "iter_0000001/common.pt", weights_only=False)["args"])


@pytest.fixture
def megatron_logits(megatron_world):
    """Build megatron-core's heterogeneous model from a folder's arguments, load the folder strictly, and run it."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
    from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig

    def run(folder, tokens):
        said = arguments(folder)
        assert said["heterogeneous_layers_config_path"] is not None  # gpt_builders.py asks for it
        names = {field.name for field in dataclasses.fields(HeterogeneousTransformerConfig)}
        described = HeterogeneousTransformerConfig(
            **{name: given for name, given in said.items() if name in names and name != "q_lora_rank"},
            gated_linear_unit=True,
            activation_func=silu,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            persist_layer_norm=False,
            masked_softmax_fusion=False,
        )
        model = GPTModel(
            described,
            get_gpt_heterogeneous_layer_spec(described, use_te=False),
            vocab_size=said["padded_vocab_size"],
            max_sequence_length=128,
            share_embeddings_and_output_weights=not said["untie_embeddings_and_output_weights"],
            position_embedding_type="rope",
            rotary_base=said["rotary_base"],
        )
        model = model.float().eval()
        state = {"model": model.sharded_state_dict()}
        loaded = dist_checkpointing.load(state, str(folder / "iter_0000001"), strict=StrictHandling.RAISE_ALL)
        model.load_state_dict(loaded["model"])
        length = tokens.shape[1]
        future = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
        with torch.no_grad():
            return model(tokens, torch.arange(length)[None].expand(len(tokens), -1), future)

    return run


ALIKE = [block(3, 4.0), block(3, 4.0)]


@pytest.mark.parametrize(
    ("layers", "cut"), [(LAYERS, {}), (LAYERS, {"tp": 2}), (ALIKE, {"tp": 2})], ids=["1", "tp 2", "all alike"]
)
def test_megatron_core_computes_what_the_model_does(layers, cut, made, megatron_logits, tmp_path):
    assert carnet.cross(made(layers), tmp_path / "megatron", to="megatron", spelling="local", **cut).equal
    tokens = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    found, expected = megatron_logits(tmp_path / "megatron", tokens), logits(tmp_path / "hf", tokens)
    assert expected.std() > 0.1
    assert torch.allclose(found[..., :VOCAB], expected, atol=1e-4, rtol=1e-4)


def test_megatron_finds_every_key_that_it_compares_with_its_arguments(made, tmp_path):
    carnet.cross(made(rope_scaling=STRETCHED), tmp_path / "megatron", to="megatron")
    said = arguments(tmp_path / "megatron")
    described = json.loads(said["heterogeneous_layers_config_encoded_json"])
    # validate_model_config_args_from_heterogeneous_config in megatron/training/arguments.py
    assert described["hidden_act"] == "silu"
    assert described["num_hidden_layers"] == said["num_layers"] == 9
    assert described["hidden_size"] == said["hidden_size"] == HIDDEN
    assert described["num_attention_heads"] == said["num_attention_heads"] == HEADS
    assert (not described["tie_word_embeddings"]) is said["untie_embeddings_and_output_weights"] is True
    assert described["rope_theta"] == said["rotary_base"] == 5000.0
    assert described["rope_scaling"]["factor"] == said["rope_scaling_factor"] == 8.0
    groups = [layer["attention"]["n_heads_in_group"] for layer in described["block_configs"]]
    assert groups == [6, None, 3, None, None, 2, None, None, 2]
    assert said["num_query_groups"] == HEADS // 6
    assert (said["group_query_attention"], said["swiglu"], said["use_rope_scaling"]) == (True, True, True)


ROUTES = {
    "megatron": ({"to": "megatron", "tp": 2},),
    "ranks": ({"to": "trtllm", "tp": 2, "pp": 2},),
    "both": ({"to": "megatron", "tp": 2}, {"to": "trtllm", "tp": 2, "pp": 4}),
    "both, the other way": ({"to": "trtllm", "tp": 2, "pp": 3}, {"to": "megatron", "tp": 2}),
}


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("route", ROUTES)
def test_the_model_comes_back(route, tied, made, tmp_path):
    at = made(rope_scaling=STRETCHED, tie_word_embeddings=tied)
    if tied:
        weights = load_file(at / "model.safetensors")
        save_file({name: w for name, w in weights.items() if name != "lm_head.weight"}, at / "model.safetensors")
    for number, stop in enumerate((*ROUTES[route], {"to": "hf"})):
        assert carnet.cross(at, tmp_path / f"stop{number}", **stop).equal
        at = tmp_path / f"stop{number}"
    before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(at / "model.safetensors")
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    ours, theirs = json.loads((at / "config.json").read_text()), json.loads((tmp_path / "hf/config.json").read_text())
    assert ours["block_configs"] == LAYERS
    different = {key for key in theirs if ours.get(key) != theirs[key]}
    # what says nothing about the weights, and what the other programs have no place for
    assert different <= {"auto_map", "attention_dropout", "initializer_range", "pretraining_tp", "bos_token_id", "eos_token_id"}


def parts_of_a_rank(weights, number, tp, rank):
    """Cut a layer for a rank of NVIDIA's converter: rows of q, k, v and of linear layers, columns of what follows them."""
    at, found = f"model.layers.{number}.", {}
    held = {name.removeprefix(at).removesuffix(".weight"): w for name, w in weights.items() if name.startswith(at)}
    if "self_attn.q_proj" in held:
        q, k, v = (held[f"self_attn.{part}_proj"] for part in "qkv")
        k, v = (w.view(-1, DIM, HIDDEN).repeat_interleave(max(1, tp * DIM // len(w)), 0).flatten(0, 1) for w in (k, v))
        found["attention.qkv"] = torch.cat([w.chunk(tp)[rank] for w in (q, k, v)])
    names = {
        "input_layernorm": ("input_layernorm", None),
        "self_attn.o_proj": ("attention.dense", 1),
        "self_attn.linear_attn": ("attention", 0),
        "post_attention_layernorm": ("post_layernorm", None),
        "mlp.gate_proj": ("ffn.fc", 0),
        "mlp.up_proj": ("ffn.gate", 0),
        "mlp.down_proj": ("ffn.proj", 1),
        "mlp.linear_mlp": ("ffn", 0),
    }
    for name, (theirs, dimension) in names.items():
        if name in held:
            found[theirs] = held[name] if dimension is None else held[name].chunk(tp, dimension)[rank]
    return found


@pytest.mark.parametrize(("tp", "stages"), [(2, [range(5), range(5, 9)]), (4, [range(9)])], ids=["tp 2 pp 2", "repeated heads"])
def test_every_rank_holds_what_nvidia_s_converter_cuts(tp, stages, made, tmp_path):
    layers = [layer for layer in LAYERS if layer["attention"]["n_heads_in_group"] != 2] if tp == 4 else LAYERS
    stages = [range(len(layers))] if tp == 4 else stages
    hf = made(layers)
    assert carnet.cross(hf, tmp_path / "ranks", to="trtllm", tp=tp, pp=len(stages)).equal
    weights = load_file(hf / "model.safetensors")
    head = torch.cat([weights["lm_head.weight"], torch.zeros(-VOCAB % tp, HIDDEN)])
    for stage, held in enumerate(stages):
        for rank in range(tp):
            expected = {
                f"transformer.layers.{local}.{name}.weight": part
                for local, number in enumerate(held)
                for name, part in parts_of_a_rank(weights, number, tp, rank).items()
            }
            if stage == 0:
                expected["transformer.vocab_embedding.weight"] = weights["model.embed_tokens.weight"]
            if stage == len(stages) - 1:
                expected["transformer.ln_f.weight"] = weights["model.norm.weight"]
                expected["lm_head.weight"] = head.chunk(tp)[rank]
            found = load_file(tmp_path / f"ranks/rank{stage * tp + rank}.safetensors")
            assert found.keys() == expected.keys()
            assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_a_stage_whose_layers_do_nothing_has_files_that_hold_nothing(made, tmp_path):
    hf = made([block(3, 4.0), block(NOTHING, NOTHING), block(3, 4.0)])
    assert carnet.cross(hf, tmp_path / "ranks", to="trtllm", tp=2, pp=3).equal
    assert len([*(tmp_path / "ranks").glob("rank*.safetensors")]) == 6
    assert load_file(tmp_path / "ranks/rank2.safetensors") == load_file(tmp_path / "ranks/rank3.safetensors") == {}
    assert carnet.verify(hf, tmp_path / "ranks").findings == ()
    assert carnet.cross(tmp_path / "ranks", tmp_path / "back", to="hf").equal
    assert load_file(tmp_path / "back/model.safetensors").keys() == load_file(hf / "model.safetensors").keys()


def test_ranks_without_any_attention_are_refused(made, tmp_path):
    """TensorRT-LLM's classes want to know how many heads there are."""
    with pytest.raises(NotSupported, match="the target's config cannot say"):
        carnet.cross(made([block(NOTHING, 4.0)]), tmp_path / "ranks", to="trtllm")


def test_the_ranks_config_says_what_nvidia_s_deciconfig_does(made, tmp_path):
    carnet.cross(made(rope_scaling=STRETCHED), tmp_path / "ranks", to="trtllm")
    said = json.loads((tmp_path / "ranks/config.json").read_text())
    # DeciConfig in tensorrt_llm/models/nemotron_nas/config.py; the sizes of the whole model are the defaults of PretrainedConfig
    assert said["architecture"] == "DeciLMForCausalLM"
    assert said["layer_types"] == [
        "attention",
        "no_op",
        "attention",
        "no_op",
        "linear",
        "attention",
        "linear",
        "no_op",
        "attention",
    ]
    assert [layer["attention"]["impl"] for layer in said["layer_configs"]] == said["layer_types"]
    assert [layer["attention"]["num_key_value_heads"] for layer in said["layer_configs"]] == KV_HEADS
    kinds = ["mlp", "mlp", "no_op", "no_op", "mlp", "linear", "linear", "linear", "mlp"]
    assert [layer["ffn"]["impl"] for layer in said["layer_configs"]] == kinds
    assert [layer["ffn"]["intermediate_size"] for layer in said["layer_configs"]] == WIDTHS
    assert said["num_kv_heads_per_layer"] == [kv for kv in KV_HEADS if kv]
    assert (said["num_key_value_heads"], said["intermediate_size"]) == (HEADS, 4 * HIDDEN)
    assert (said["rotary_base"], said["rotary_scaling"]["factor"]) == (5000.0, 8.0)
    assert said["position_embedding_type"] == "rope_gpt_neox"


def canonical(dialect, said):
    family, found = recognise(dialect, said, "here", {})
    assert family.name == "nemotron_nas"
    return found


def test_a_layer_is_what_its_record_says():
    found = canonical("hf", config(LAYERS))
    assert found["blocks"] == WORDS
    assert found["layer_kv_heads"] == tuple(kv or 1 for kv in KV_HEADS)
    assert found["layer_ffn"] == tuple(width or 1 for width in WIDTHS)
    assert (found["kv_heads"], found["ffn"]) == (2, 256)


# of the published models: 51B and 49B (hidden size 8192), 253B (16384)
@pytest.mark.parametrize(
    ("hidden", "multiple", "width"),
    [
        (8192, 2.625, 14336),
        (8192, 5.25, 28672),
        (8192, 1.3125, 7168),
        (16384, 1.95, 21504),
        (16384, 31.40625, 343040),
        (16384, 2.4375, 26624),
    ],
)
def test_a_multiple_means_the_width_that_the_published_models_have(hidden, multiple, width):
    assert canonical("hf", config([block(2, multiple)], hidden_size=hidden))["ffn"] == width


@pytest.mark.parametrize("hidden", [96, 5120, 8192, 16384])
def test_the_multiple_that_is_written_means_the_same_width_to_megatron(hidden):
    from megatron.core.transformer.heterogeneous.heterogeneous_config import MLPConfig

    from carnet.dialects.heterogeneous import spelled_blocks

    widths = tuple(range(256, 256 * 1500, 256))
    said = canonical("hf", config([block(2, 4.0)], hidden_size=hidden))
    many = {**said, "layers": len(widths), "blocks": " ".join("*-" for _ in widths)}
    many |= {"layer_kv_heads": (2,) * len(widths), "layer_ffn": widths}
    written = json.loads(json.dumps(spelled_blocks(many)))
    multiples = [layer["ffn"]["ffn_mult"] for layer in written]
    assert [MLPConfig.ffn_mult_to_intermediate_size(multiple, hidden) for multiple in multiples] == [*widths]
    # DeciLMConfig rounds to six digits
    assert [round(multiple, 6) for multiple in multiples] == multiples


def test_a_config_of_modelopt_says_the_width_outright():
    mlp = {"intermediate_size": 512, "hidden_act": "silu", "gated": True, "moe": None, "weights_precision": "bf16", **USUAL}
    attention = {**LAYERS[0]["attention"], "mamba": None, "llama4": None, "window_length": None, "unshifted_sink": False}
    said = config([{"attention": attention, "ffn": mlp, "parallel_blocks": None}], head_dim=DIM, position_embedding_type="rope")
    del said["intermediate_size"], said["num_key_value_heads"], said["hidden_act"]
    assert canonical("hf", said) == canonical("hf", config([block(6, 8.0)]))


def megatron(text, **changed):
    """Write the training arguments of a model whose layers a text describes."""
    return {
        "num_layers": 9,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "group_query_attention": True,
        "num_query_groups": 2,
        "ffn_hidden_size": 1024,  # no layer is that wide
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-5,
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_base": 5000,
        "untie_embeddings_and_output_weights": True,
        "params_dtype": "torch.float32",
        "heterogeneous_layers_config_path": "/somewhere/config.json",
        "heterogeneous_layers_config_encoded_json": text,
        **changed,
    }


def test_the_layers_sizes_are_the_text_s_whatever_the_arguments_say():
    found, expected = canonical("megatron", megatron(json.dumps(config(LAYERS)))), canonical("hf", config(LAYERS))
    fields = ("blocks", "layer_kv_heads", "layer_ffn", "kv_heads", "ffn", "heads", "hidden", "layers", "rope_theta")
    assert {field: found[field] for field in fields} == {field: expected[field] for field in fields}


TEXT = "the config sets 'heterogeneous_layers_config_encoded_json'"
LIST = "the config sets 'block_configs' to what makes no sense"
CARRY = "the config says of a layer what carnet cannot carry over"


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"block_configs": 3}', '{"block_configs": []}', "[" * 100_000, 3, json.dumps(config(LAYERS[:8]))]
)
def test_a_text_that_describes_no_layers_is_a_bad_checkpoint(text):
    with pytest.raises(BadCheckpoint) as caught:
        recognise("megatron", megatron(text), "here", {})
    assert caught.value.what.startswith(TEXT)


def test_a_path_without_the_text_is_refused_by_name():
    with pytest.raises(NotSupported) as caught:
        recognise("megatron", megatron(None), "here", {})
    assert caught.value.facts == {"heterogeneous_layers_config_path": "/somewhere/config.json"}


def test_layers_described_twice_are_a_bad_checkpoint():
    with pytest.raises(BadCheckpoint):
        recognise("megatron", megatron(json.dumps(config(LAYERS)), num_experts=4), "here", {})


def changed(part, **to):
    return [*LAYERS[:-1], {**LAYERS[-1], part: {**LAYERS[-1][part], **to}}]


REFUSED = [
    ("a window", changed("attention", window_length=64), NotSupported, CARRY),
    ("sinks", changed("attention", num_sink_tokens=4), NotSupported, CARRY),
    ("a mixer of another kind", changed("attention", mamba={"state_dim": 8}), NotSupported, CARRY),
    ("a mixture", changed("ffn", moe={"num_local_experts": 8}), NotSupported, CARRY),
    ("another activation", changed("ffn", hidden_act="gelu"), NotSupported, CARRY),
    ("no gate", changed("ffn", gated=False), NotSupported, CARRY),
    ("a key that nobody knows", changed("ffn", sparkle=1), NotSupported, CARRY),
    ("a width of the attention", changed("attention", intermediate_size=512), NotSupported, CARRY),
    ("blocks side by side", [*LAYERS[:-1], {**LAYERS[-1], "parallel_blocks": [LAYERS[0]]}], NotSupported, CARRY),
    ("nothing and linear at once", changed("ffn", no_op=True, replace_with_linear=True), BadCheckpoint, LIST),
    ("a kind in words", changed("ffn", no_op="false"), BadCheckpoint, LIST),
    ("no group", changed("attention", n_heads_in_group=None), BadCheckpoint, LIST),
    ("a group of none", changed("attention", n_heads_in_group=0), BadCheckpoint, LIST),
    ("a group of part of a head", changed("attention", n_heads_in_group=1.5), BadCheckpoint, LIST),
    ("groups that leave heads over", changed("attention", n_heads_in_group=5), BadCheckpoint, LIST),
    ("no width", changed("ffn", ffn_mult=None), BadCheckpoint, LIST),
    ("a width of nothing", changed("ffn", ffn_mult=0.0), BadCheckpoint, LIST),
    ("a width below nothing", changed("ffn", ffn_mult=-4.0), BadCheckpoint, LIST),
    ("a width without end", changed("ffn", ffn_mult=1e400), BadCheckpoint, LIST),
    ("a width in words", changed("ffn", ffn_mult="4"), BadCheckpoint, LIST),
    ("two widths", changed("ffn", intermediate_size=512), BadCheckpoint, LIST),
    ("a layer too few", LAYERS[:-1], BadCheckpoint, LIST),
    ("a layer that is not a record", [*LAYERS[:-1], 3], BadCheckpoint, LIST),
    ("a part that is not a record", [*LAYERS[:-1], {"attention": [], "ffn": {}}], BadCheckpoint, LIST),
    ("a layer without an MLP's record", [*LAYERS[:-1], {"attention": LAYERS[-1]["attention"]}], BadCheckpoint, LIST),
]


@pytest.mark.parametrize(("layers", "error", "what"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_config_is_refused_that_says(layers, error, what):
    with pytest.raises(error) as caught:
        recognise("hf", config(layers, num_hidden_layers=9), "here", {})
    assert caught.value.what == what
    if what == CARRY:
        assert caught.value.facts["key"].startswith("block_configs[8].")


def test_biases_are_refused_because_no_other_program_has_them():
    for key in ("attention_bias", "mlp_bias"):
        with pytest.raises(NotSupported, match=key):
            recognise("hf", config(LAYERS, **{key: True}), "here", {})


def test_the_older_deci_config_is_refused_by_its_own_key():
    said = {key: value for key, value in config(LAYERS).items() if key != "block_configs"}
    with pytest.raises(CarnetError, match="num_key_value_heads_per_layer"):
        recognise("hf", {**said, "num_key_value_heads_per_layer": [4] * 9}, "here", {})


def test_heads_that_do_not_divide_among_the_ranks_are_refused_by_layer(made, tmp_path):
    with pytest.raises(BadRequest, match=r"layers\.5\.attention") as caught:
        carnet.cross(made(), tmp_path / "out", to="trtllm", tp=4)
    assert "kv" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def ranks(made, tmp_path):
    """Make ranks whose one MLP is 300 wide, which no multiple of 256 is."""
    carnet.cross(made([block(3, NOTHING), block(2, 4.0)]), tmp_path / "ranks", to="trtllm")
    said = json.loads((tmp_path / "ranks/config.json").read_text())
    said["layer_configs"][1]["ffn"]["intermediate_size"] = 300
    (tmp_path / "ranks/config.json").write_text(json.dumps(said))
    weights = load_file(tmp_path / "ranks/rank0.safetensors")
    for name in weights:
        if ".ffn." in name:
            weights[name] = torch.ones(HIDDEN, 300) if "proj" in name else torch.ones(300, HIDDEN)
    save_file(weights, tmp_path / "ranks/rank0.safetensors")
    return tmp_path / "ranks"


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_width_that_no_multiple_can_say_is_refused_by_name(to, ranks, tmp_path):
    assert carnet.cross(ranks, tmp_path / "wider", to="trtllm", tp=2).equal
    with pytest.raises(NotSupported, match="layer_ffn"):
        carnet.cross(ranks, tmp_path / "out", to=to)


@pytest.mark.parametrize(
    "to",
    [
        {"layer_types": ["attention", "linear"]},
        {"num_kv_heads_per_layer": [4, 4]},
        {"layer_configs": None},
        {"layer_configs": [3, 4]},
    ],
    ids=["kinds", "heads", "no records", "no record"],
)
def test_ranks_whose_config_contradicts_itself_are_a_bad_checkpoint(to, ranks):
    said = json.loads((ranks / "config.json").read_text())
    (ranks / "config.json").write_text(json.dumps(said | to))
    with pytest.raises(BadCheckpoint, match="to what makes no sense"):
        carnet.plan(ranks, to="hf")


@pytest.mark.parametrize(("at", "part", "key"), [(0, "attention", "num_key_value_heads"), (1, "ffn", "intermediate_size")])
def test_a_size_of_zero_is_not_taken_for_one_that_is_not_said(at, part, key, ranks):
    said = json.loads((ranks / "config.json").read_text())
    said["layer_configs"][at][part][key] = 0
    (ranks / "config.json").write_text(json.dumps(said))
    with pytest.raises(BadCheckpoint, match="to what makes no sense"):
        carnet.plan(ranks, to="hf")


def test_a_linear_layer_that_was_damaged_is_found_by_name(made, tmp_path):
    hf = made()
    carnet.cross(hf, tmp_path / "ranks", to="trtllm", tp=2)
    weights = load_file(tmp_path / "ranks/rank1.safetensors")
    weights["transformer.layers.6.attention.weight"][3, 5] += 1
    save_file(weights, tmp_path / "ranks/rank1.safetensors")
    assert "layers.6.linear_mixer" in str(carnet.verify(hf, tmp_path / "ranks").findings)


def test_a_layer_that_does_nothing_is_counted_in_a_checkpoint_of_ranks(made, tmp_path):
    """Layers in torch.save's files are numbered, and one that does nothing has no number there."""
    hf = made()
    carnet.cross(hf, tmp_path / "store", to="megatron")
    weights = load_file(hf / "model.safetensors")
    names = {
        "input_layernorm": "input_layernorm",
        "self_attn.linear_attn": "self_attention",
        "self_attn.o_proj": "self_attention.linear_proj",
        "post_attention_layernorm": "pre_mlp_layernorm",
        "mlp.linear_mlp": "mlp",
        "mlp.down_proj": "mlp.linear_fc2",
    }
    model = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "output_layer.weight": weights["lm_head.weight"],
    }
    for number in range(9):
        at = f"model.layers.{number}."
        held = {name.removeprefix(at).removesuffix(".weight"): w for name, w in weights.items() if name.startswith(at)}
        model |= {f"decoder.layers.{number}.{names[name]}.weight": w for name, w in held.items() if name in names}
        if "mlp.gate_proj" in held:
            both = torch.cat([held["mlp.gate_proj"], held["mlp.up_proj"]])
            model[f"decoder.layers.{number}.mlp.linear_fc1.weight"] = both
        if "self_attn.q_proj" in held:
            parts = [held[f"self_attn.{part}_proj"] for part in "qkv"]
            groups = len(parts[1]) // DIM
            grouped = torch.cat([w.view(groups, -1, HIDDEN) for w in parts], dim=1)
            model[f"decoder.layers.{number}.self_attention.linear_qkv.weight"] = grouped.flatten(0, 1)
    folder = tmp_path / "legacy/iter_0000001/mp_rank_00"
    folder.mkdir(parents=True)
    (tmp_path / "legacy/latest_checkpointed_iteration.txt").write_text("1")
    said = argparse.Namespace(**arguments(tmp_path / "store") | {"padded_vocab_size": VOCAB})
    torch.save({"args": said, "checkpoint_version": 3.0, "iteration": 1, "model": model}, folder / "model_optim_rng.pt")
    assert carnet.cross(tmp_path / "legacy", tmp_path / "back", to="hf").equal
    found = load_file(tmp_path / "back/model.safetensors")
    assert found.keys() == weights.keys()
    assert [name for name in found if not torch.equal(found[name], weights[name])] == []

"""Megatron-Bridge, NeMo 2 and plain torch.distributed.checkpoint: other wraps, the same tensors and the same arguments."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from carnet.errors import BadCheckpoint, BadRequest, NotSupported
from carnet.formats.detect import fingerprint, open_checkpoint
from carnet.formats.wrapped import arguments_of, parse_yaml, read_config, translate

BACKEND = '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
WEIGHT = torch.arange(24, dtype=torch.float32).reshape(4, 6).bfloat16()

# the fields that matter of a run_config.yaml that Megatron-Bridge printed for Llama 3.2 1B, October 2025
RUN_CONFIG = """\
checkpoint:
  _target_: megatron.bridge.training.config.CheckpointConfig
  ckpt_format: torch_dist
model:
  _target_: megatron.bridge.models.llama.llama_provider.Llama31ModelProvider
  activation_func:
    _call_: false
    _target_: torch.nn.functional.silu
  add_bias_linear: false
  add_qkv_bias: false
  attention_backend:
    _args_:
    - 5
    _call_: true
    _target_: megatron.core.transformer.enums.AttnBackend
  bf16: true
  bias_activation_fusion: true
  ffn_hidden_size: 8192
  gated_linear_unit: true
  hidden_size: 2048
  high_freq_factor: 4.0
  init_method:
    _args_: []
    _partial_: true
    _target_: torch.nn.init.normal_
    mean: 0.0
    std: 0.02
  kv_channels: 64
  layernorm_epsilon: 1.0e-05
  low_freq_factor: 1.0
  make_vocab_size_divisible_by: 128
  normalization: RMSNorm
  num_attention_heads: 32
  num_layers: 16
  num_moe_experts: null
  num_query_groups: 8
  old_context_len: 8192
  params_dtype:
    _call_: false
    _target_: torch.bfloat16
  position_embedding_type: rope
  rotary_base: 500000.0
  scale_factor: 32.0
  seq_len_interpolation_factor: null
  seq_length: 131072
  share_embeddings_and_output_weights: true
  should_pad_vocab: false
  tensor_model_parallel_size: 1
  vocab_size: 128256
  window_size: null
train:
  train_iters: 10
"""

ARGUMENTS = {
    "_target_": "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "attention_backend": "AttnBackend(5)",
    "bf16": True,
    "bias_swiglu_fusion": True,
    "ffn_hidden_size": 8192,
    "group_query_attention": True,
    "hidden_size": 2048,
    "init_method": {"_args_": [], "_partial_": True, "_target_": "torch.nn.init.normal_", "mean": 0.0, "std": 0.02},
    "kv_channels": 64,
    "layernorm_epsilon": 1e-05,
    "make_vocab_size_divisible_by": 128,
    "max_position_embeddings": 131072,
    "normalization": "RMSNorm",
    "num_attention_heads": 32,
    "num_experts": None,
    "num_layers": 16,
    "num_query_groups": 8,
    "openai_gelu": False,
    "padded_vocab_size": 128256,
    "params_dtype": "torch.bfloat16",
    "position_embedding_type": "rope",
    "quick_geglu": False,
    "rope_scaling_factor": 32.0,
    "rotary_base": 500000.0,
    "rotary_seq_len_interpolation_factor": None,
    "seq_length": 131072,
    "should_pad_vocab": False,
    "squared_relu": False,
    "swiglu": True,
    "tensor_model_parallel_size": 1,
    "untie_embeddings_and_output_weights": False,
    "use_rope_scaling": True,
    "vocab_size": 128256,
    "window_size": None,
}


def save(root: Path, state: dict[str, object], *, core: bool = True) -> Path:
    """Write a folder by the real torch.distributed.checkpoint; ``core``: as megatron-core does, with metadata.json."""
    dcp.save(state, storage_writer=dcp.FileSystemWriter(root, single_file_per_rank=True), no_dist=True)
    if core:
        (root / "metadata.json").write_text(BACKEND)
    return root


def content(root: Path, name: str) -> torch.Tensor:
    """Return a tensor from the bytes that its one chunk names."""
    checkpoint = open_checkpoint(root)
    (chunk,) = checkpoint.tensors["", name].chunks
    raw = Path(str(checkpoint.root), chunk.file).read_bytes()[chunk.offset : chunk.offset + 48]
    return torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).reshape(4, 6)


@pytest.fixture
def bridge(tmp_path) -> Path:
    root = save(tmp_path / "iter_0000010", {"decoder.weight": WEIGHT, "optimizer.state.x": torch.ones(2)})
    torch.save({"iteration": 10, "checkpoint_version": 3.0}, root / "common.pt")
    (root / "run_config.yaml").write_text(RUN_CONFIG)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    return tmp_path


@pytest.fixture
def nemo(tmp_path) -> Path:
    save(tmp_path / "weights", {"module.decoder.weight": WEIGHT, "optimizer.state.x": torch.ones(2)})
    (tmp_path / "context").mkdir()
    model = {"_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel", "config": yaml.safe_load(RUN_CONFIG)["model"]}
    (tmp_path / "context" / "model.yaml").write_text(yaml.safe_dump(model))
    (tmp_path / "context" / "io.json").write_text("{}")
    return tmp_path


@pytest.fixture
def plain(tmp_path) -> Path:
    args = argparse.Namespace(num_layers=2, params_dtype=torch.bfloat16)
    state = {"args": args, "iteration": 4, "checkpoint_version": 3.0, "num_floating_point_operations_so_far": 1}
    save(tmp_path, {"model": {"module.decoder.weight": WEIGHT}, "rng_state": {"a": torch.ones(3)}, **state}, core=False)
    return tmp_path


def test_bridge_s_fields_become_arguments(bridge):
    assert open_checkpoint(bridge).config == ARGUMENTS


def test_bridge_s_tensors_are_those_of_torch_dist(bridge):
    checkpoint = open_checkpoint(bridge)
    assert (checkpoint.dialect, checkpoint.format) == ("megatron", "torch_dist")
    assert torch.equal(content(bridge, "decoder.weight"), WEIGHT)
    assert checkpoint.tensors["", "optimizer.state.x"].chunks == ()


def test_the_notes_name_the_program_that_wrapped_it(bridge):
    expected = {"writer": "Megatron-Bridge (run_config.yaml)", "iteration": "10", "checkpoint_version": "3.0"}
    assert open_checkpoint(bridge).notes == expected


def test_bridge_needs_no_common_state(bridge):
    (bridge / "iter_0000010/common.pt").unlink()
    assert open_checkpoint(bridge).config == ARGUMENTS


def test_saved_arguments_go_before_a_run_config(bridge):
    torch.save({"args": argparse.Namespace(num_layers=3)}, bridge / "iter_0000010/common.pt")
    assert open_checkpoint(bridge).config == {"num_layers": 3}


def test_another_run_config_is_another_checkpoint(bridge):
    before = fingerprint(open_checkpoint(bridge))
    path = bridge / "iter_0000010/run_config.yaml"
    path.write_text(RUN_CONFIG.replace("layernorm_epsilon: 1.0e-05", "layernorm_epsilon: 1.0e-06"))
    assert fingerprint(open_checkpoint(bridge)) != before


def test_nemo_s_model_becomes_arguments_too(nemo):
    checkpoint = open_checkpoint(nemo)
    assert checkpoint.config == ARGUMENTS
    assert checkpoint.notes == {"writer": "NeMo 2 (context/model.yaml)"}


def test_nemo_s_files_are_named_from_its_root(nemo):
    checkpoint = open_checkpoint(nemo)
    assert torch.equal(content(nemo, "module.decoder.weight"), WEIGHT)
    stamps = [stamp.file for stamp in checkpoint.stamps]
    assert stamps == ["context/model.yaml", "weights/.metadata", "weights/__0_0.distcp", "weights/metadata.json"]
    assert all(Path(str(checkpoint.root), name).stat().st_size for name in stamps)


def test_nemo_without_a_model_yaml_has_no_config(nemo):
    (nemo / "context/model.yaml").unlink()
    checkpoint = open_checkpoint(nemo)
    assert checkpoint.config == {}
    assert checkpoint.notes == {"writer": "NeMo 2 (no context/model.yaml)"}


def test_the_state_of_nemo_s_trainer_is_not_even_opened(nemo):
    (nemo / "weights/common.pt").write_bytes(b"whatever lightning put here")
    assert open_checkpoint(nemo).config == ARGUMENTS


def test_a_plain_store_has_its_arguments_as_an_object(plain):
    checkpoint = open_checkpoint(plain)
    assert (checkpoint.format, checkpoint.config) == ("torch_dcp", {"num_layers": 2, "params_dtype": "torch.bfloat16"})
    assert checkpoint.notes == {"writer": "torch.distributed.checkpoint", "iteration": "4", "checkpoint_version": "3.0"}
    assert set(checkpoint.objects) == {"num_floating_point_operations_so_far"}
    assert torch.equal(content(plain, "model.module.decoder.weight"), WEIGHT)


def test_random_states_of_a_plain_store_are_not_located(plain):
    located = {name for (_, name), tensor in open_checkpoint(plain).tensors.items() if tensor.chunks}
    assert located == {"model.module.decoder.weight"}


def test_a_plain_store_without_arguments_has_no_config(tmp_path):
    assert open_checkpoint(save(tmp_path, {"model.decoder.weight": WEIGHT}, core=False)).config == {}


def test_a_plain_store_may_have_a_run_config(tmp_path):
    save(tmp_path, {"model.decoder.weight": WEIGHT}, core=False)
    (tmp_path / "run_config.yaml").write_text(RUN_CONFIG)
    assert open_checkpoint(tmp_path).config == ARGUMENTS


# --- fields and arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "gated", "said"),
    [
        ("torch.nn.functional.silu", True, {"swiglu"}),
        ("torch.nn.functional.gelu", False, set()),
        ("torch._C._nn.gelu", False, set()),
        ("megatron.core.activations.squared_relu", False, {"squared_relu"}),
        ("megatron.core.activations.fast_gelu", False, {"openai_gelu"}),
        ("megatron.core.activations.quick_gelu", True, {"quick_geglu"}),
        ("torch.nn.functional.gelu", True, {"gated_linear_unit"}),  # no flag of Megatron-LM says it
    ],
)
def test_an_activation_is_said_by_flags(function, gated, said):
    found = translate({"activation_func": {"_target_": function, "_call_": False}, "gated_linear_unit": gated}, "-")
    flags = {"swiglu", "squared_relu", "openai_gelu", "quick_geglu", "gated_linear_unit"}
    assert {name for name in flags if found.get(name)} == said


@pytest.mark.parametrize(
    ("function", "gated"),
    [({"_target_": "torch.nn.functional.silu", "_call_": False}, False), ({"_target_": "my.swish", "_call_": False}, True),
     ({"_target_": "torch.nn.functional.gelu", "_partial_": True, "_args_": [], "approximate": "tanh"}, False)],
)  # fmt: skip
def test_an_activation_without_a_flag_is_refused(function, gated):
    with pytest.raises(NotSupported) as error:
        translate({"activation_func": function, "gated_linear_unit": gated}, "-")
    assert str(error.value).splitlines()[0] == "Megatron's arguments cannot say this activation"


def test_the_fused_gelu_stays_told_apart_from_the_exact_one():
    fields = {"activation_func": "torch.nn.functional.gelu", "gated_linear_unit": False}
    assert translate({**fields, "bias_activation_fusion": True}, "-")["bias_gelu_fusion"] is True
    assert translate({**fields, "bias_activation_fusion": False}, "-")["bias_gelu_fusion"] is False


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        (
            {"vocab_size": 250, "should_pad_vocab": True, "make_vocab_size_divisible_by": 64, "tensor_model_parallel_size": 1},
            256,
        ),
        (
            {"vocab_size": 250, "should_pad_vocab": True, "make_vocab_size_divisible_by": 64, "tensor_model_parallel_size": 8},
            512,
        ),
        (
            {"vocab_size": 256, "should_pad_vocab": True, "make_vocab_size_divisible_by": 64, "tensor_model_parallel_size": 2},
            256,
        ),
        ({"vocab_size": 250, "should_pad_vocab": False, "make_vocab_size_divisible_by": 64}, 250),
        ({"vocab_size": 250}, None),  # NeMo: what the embedding has
    ],
)
def test_the_rows_of_the_embedding_follow_from_the_vocabulary(fields, rows):
    assert translate(fields, "-").get("padded_vocab_size") == rows


def test_no_query_groups_means_as_many_as_heads():
    assert translate({"num_query_groups": None}, "-")["group_query_attention"] is False


def test_a_rope_scaling_that_megatron_has_no_words_for_is_refused():
    fields = {"scale_factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0, "old_context_len": 8192}
    with pytest.raises(NotSupported) as error:
        translate(fields, "-")
    assert str(error.value).splitlines()[0] == "Megatron's arguments cannot say this rope scaling"


def test_unknown_fields_keep_their_names():
    assert translate({"attn_logit_softcapping": 50.0}, "-") == {"attn_logit_softcapping": 50.0}


# --- files that a person names --------------------------------------------------------------------------------------------


def test_a_config_is_read_from_json_and_from_yaml_alike(tmp_path):
    value = {"num_layers": 2, "eps": 1e-05, "window": None, "list": [1, {"a": True}]}
    (tmp_path / "a.json").write_text(json.dumps(value))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(value))
    (tmp_path / "c").write_text(json.dumps(value))
    (tmp_path / "d.yml").write_text(json.dumps(value))
    for name in ("a.json", "b.yaml", "c", "d.yml"):
        assert read_config(tmp_path / name) == value


def test_a_config_that_is_not_there_is_a_request_that_cannot_be(tmp_path):
    for path, fault in ((tmp_path / "no.yaml", "does not exist"), (tmp_path, "is not a file")):
        with pytest.raises(BadRequest) as error:
            read_config(path)
        assert str(error.value).splitlines() == [f"{path} {fault}", "  expected  a config in JSON or YAML"]


def test_a_run_config_and_a_task_of_nemo_are_understood_as_arguments():
    config = yaml.safe_load(RUN_CONFIG)
    assert arguments_of(config, "-") == ARGUMENTS
    model = {"_target_": "LlamaModel", "config": config["model"]}
    assert arguments_of(model, "-") == ARGUMENTS
    assert arguments_of({"model": model, "trainer": {}}, "-") == ARGUMENTS


def test_plain_arguments_stay_what_they_are():
    assert arguments_of({"num_layers": 2, "model": "mine"}, "-") == {"num_layers": 2, "model": "mine"}


@pytest.mark.parametrize(
    "text",
    [RUN_CONFIG, "a: [1, -2, 0x1f, 0o17, 1_000, 1.5, -.5, 1.0e+3, .inf, true, No, ~, '1', \"x\\n\"]", "a: &x [1]\nb: *x\n", ""],
)
def test_yaml_is_read_as_pyyaml_reads_it(text):
    assert parse_yaml(text.encode(), "x.yaml", "-") == (yaml.safe_load(text) or {})


def test_numbers_that_yaml_1_1_takes_for_texts_are_numbers_where_json_says_so():
    assert parse_yaml(b"a: 1e-05\nb: '1e-05'\nc: 2E6\n", "x.yaml", "-") == {"a": 1e-05, "b": "1e-05", "c": 2e6}


def test_a_date_is_a_text():
    assert parse_yaml(b"a: 2025-10-06\n", "x.yaml", "-") == {"a": "2025-10-06"}


def test_a_bare_run_config_without_a_model_is_an_error(bridge):
    (bridge / "iter_0000010/run_config.yaml").write_text("train: {}\n")
    with pytest.raises(BadCheckpoint) as error:
        open_checkpoint(bridge)
    assert str(error.value).splitlines() == ["run_config.yaml has no section 'model'", f"  where     {bridge / 'iter_0000010'}"]


def test_the_loader_of_c_and_that_of_python_agree(monkeypatch):
    found = parse_yaml(RUN_CONFIG.encode(), "x.yaml", "-")
    monkeypatch.setattr(yaml, "__with_libyaml__", False)
    assert parse_yaml(RUN_CONFIG.encode(), "x.yaml", "-") == found

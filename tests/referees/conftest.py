"""What referees share: one process as Megatron's whole world, on a machine without a GPU; a model that comes back."""

import contextlib
import dataclasses
import socket
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

import carnet


@pytest.fixture(scope="module")
def megatron_world():
    """Give megatron-core what it asks of CUDA for no purpose here: a device to put tables on, a state of random numbers."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()  # a test of torch's own context manager may have taken them away again

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        tracker = tensor_parallel.get_cuda_rng_tracker()
        patch.setattr(tracker, "fork", lambda *_: contextlib.nullcontext(), raising=True)
        yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


# argument -> the keyword of GPTModel that a release's program hands it on as, besides those that all models have: gpt_builders.py of
# 0.16.1, 0.17.1 and 0.18.2. From 0.19 on pretrain_gpt.py builds through gpt_config_from_args of megatron/training/argument_utils.py
# instead, which has one more. No release hands on rope_scaling_factor: GPTModel has its own 8.0.
ANGLES = {"rotary_percent": "rotary_percent", "rotary_base": "rotary_base", "use_rope_scaling": "rope_scaling"}
HANDED_ON = {
    "0.16": ANGLES,
    "0.17": ANGLES,
    "0.18": ANGLES,
    "0.19": {**ANGLES, "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor"},
}
# what the command line says where nobody does, as far as it differs from the config's own defaults
DEFAULTS = {"q_lora_rank": None, "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}


class OnCpu(TorchFunctionMode):
    """Make on the CPU what megatron-core makes on "cuda" whatever the machine: the mask of a window."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call a function of torch with another device."""
        kwargs = kwargs or {}
        return function(*args, **kwargs | ({"device": "cpu"} if kwargs.get("device") == "cuda" else {}))


def _arguments(folder):
    """Return what carnet says to Megatron, read by torch alone."""
    return vars(torch.load(folder / "common.pt", weights_only=False)["args"])


def _config(said):
    """Return Megatron's config of these arguments.

    That is core_transformer_config_from_args and, for positions called yarn, _apply_yarn_config_from_args in
    megatron/training/argument_utils.py of 0.19, in one rank and on a CPU; the wheel has no megatron.training.
    """
    from megatron.core.activations import squared_relu
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    said = DEFAULTS | said
    kind = MLATransformerConfig if said["multi_latent_attention"] else TransformerConfig
    given = {field.name: said[field.name] for field in dataclasses.fields(kind) if field.name in said}
    if said["swiglu"]:
        given |= {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
        given["bias_activation_fusion"] = said.get("bias_swiglu_fusion", True)
    else:
        given["bias_activation_fusion"] = said.get("bias_gelu_fusion", said["add_bias_linear"])
    if said["squared_relu"]:
        given["activation_func"] = squared_relu
    if said["quick_geglu"]:
        given |= {"gated_linear_unit": True, "activation_func": quick_gelu}
    if not said["group_query_attention"]:
        given["num_query_groups"] = None
    # Transformer Engine adds one to the norms; the local ones cannot, so that the test does
    given["layernorm_zero_centered_gamma"] = False
    config = kind(
        **given,
        num_moe_experts=said.get("num_experts"),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        moe_token_dispatcher_type="allgather",
    )
    if said["position_embedding_type"] == "yarn":
        config.yarn_rotary_scaling_factor = said["rotary_scaling_factor"]
        config.yarn_original_max_position_embeddings = said.get("yarn_original_max_position_embeddings") or 4096
        config.yarn_beta_fast = said.get("yarn_beta_fast") or 32.0
        config.yarn_beta_slow = said.get("yarn_beta_slow") or 1.0
        config.yarn_mscale = said.get("mscale", 1.0)
        config.yarn_mscale_all_dim = said.get("mscale_all_dim", 0.0)
        config.yarn_correction_range_round_to_int = said.get("yarn_correction_range_round_to_int", True)
    return config


def _layers(config):
    """Return the layers that gpt_builders.py of 0.16.1 asks for, out of megatron-core alone, and those for further tokens."""
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class TwoWidths(DotProductAttention):
        """Attention whose values are not as wide as its keys: latent attention asks for it, 0.16.1's own class refuses."""

        def __init__(self, *, k_channels=0, v_channels=0, **given):
            super().__init__(**given)
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    if config.num_moe_experts:
        made = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
        specs = made.layer_specs
    else:
        made = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization=config.normalization,
        )
        specs = [made]
    for spec in specs if config.multi_latent_attention else ():
        spec.submodules.self_attention.submodules.core_attention = TwoWidths
        # as Transformer Engine's layers are called, the only ones that Megatron can train it with
        spec.submodules.sharded_state_dict_keys_map |= {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        }
    further = get_gpt_mtp_block_spec(config, specs[-1], use_transformer_engine=False) if config.mtp_num_layers else None
    return made, further


@pytest.fixture
def megatron_core(megatron_world, monkeypatch):
    """Build the real megatron-core model that a release's program makes of a folder's arguments, and load the folder strictly."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    # 0.16.1 forgets to define them where Transformer Engine is not installed
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    monkeypatch.setattr(multi_latent_attention, "TELinear", type("TELinear", (), {}))

    def load(folder, release="0.16"):
        said = _arguments(folder)
        config = _config(said)
        layers, further = _layers(config)
        model = GPTModel(
            config,
            layers,
            mtp_block_spec=further,
            vocab_size=said["padded_vocab_size"],
            max_sequence_length=said["max_position_embeddings"],
            share_embeddings_and_output_weights=not said["untie_embeddings_and_output_weights"],
            position_embedding_type=said["position_embedding_type"],
            **{keyword: said[name] for name, keyword in HANDED_ON[release].items() if name in said},
        )
        model = model.float().eval()
        state = {"model": model.sharded_state_dict()}
        loaded = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_ALL)
        model.load_state_dict(loaded["model"])
        if said["layernorm_zero_centered_gamma"]:
            norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.RMSNorm)]
            for norm in norms:
                norm.weight.data += 1.0

        def logits(tokens):
            """Return what the head says of the next token, then of those after it."""
            found = []
            # a copy: the loss is computed in place
            model.output_layer.register_forward_hook(lambda *said: found.append(said[-1][0].transpose(0, 1).clone()))
            length = tokens.shape[1]
            positions = torch.arange(length)[None].expand(len(tokens), -1)
            future = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
            with torch.no_grad(), OnCpu():
                model(tokens, positions, future, labels=tokens if further else None)
            return found[-1], *found[:-1]

        return logits

    return load


TRAINED = ("e_score_correction_bias", "layer_scalar")  # of the buffers that a file has


def _loaded(folder, ignored=(), **config):
    """Return the model that transformers makes of a folder, in float32, after asking it whether it missed or ignored anything."""
    asked: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **config
    )
    model, said = asked
    said["unexpected_keys"] = [name for name in said["unexpected_keys"] if not name.startswith(ignored)]
    assert {what: list(names) for what, names in said.items() if names} == {}
    return model.eval()


@pytest.fixture(scope="session")
def loaded():
    """Make the model that transformers makes of a folder; names that start with one of ``ignored`` may be left out."""
    return _loaded


@pytest.fixture
def saved(tmp_path):
    """Save a model that transformers makes of a config, every parameter random, and every buffer that is trained or chosen with.

    ``as_held`` saves the tensors that the class holds, not those that models of before its time were published with.
    """

    def save(config, dtype=torch.float32, *, as_held=False):
        torch.manual_seed(17)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
        chosen = [buffer for name, buffer in model.named_buffers() if name.endswith(TRAINED)]
        for tensor in (*model.parameters(), *chosen):
            torch.nn.init.normal_(tensor, std=0.2)
        model.save_pretrained(tmp_path / "hf", save_original_format=not as_held)
        return tmp_path / "hf"

    return save


@pytest.fixture
def there_and_again(saved, tmp_path):
    """Take a model of transformers through other layouts back to a folder: the tensors, the logits and the config are the same.

    Names that end with one of ``summed`` come back in float32; ``family`` is what the last layout is called where it could be several.
    """

    def go(config, *stops, spelled_otherwise=(), dtype=torch.float32, summed=(), as_held=False, family=None):
        at = saved(config, dtype, as_held=as_held)
        for number, stop in enumerate((*stops, {"to": "hf", "family": family})):
            assert carnet.cross(at, tmp_path / f"stop{number}", **stop).equal
            at = tmp_path / f"stop{number}"
        before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(at / "model.safetensors")
        before = {name: tensor.float() if name.endswith(summed) else tensor for name, tensor in before.items()}
        assert {name: tensor.dtype for name, tensor in after.items()} == {name: tensor.dtype for name, tensor in before.items()}
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        tokens = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            found, expected = (_loaded(folder)(tokens, use_cache=False).logits for folder in (at, tmp_path / "hf"))
        assert expected.std() > 0.1
        assert torch.equal(found, expected)
        ours, theirs = (AutoConfig.from_pretrained(folder).to_dict() for folder in (at, tmp_path / "hf"))
        different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        assert different - {"_name_or_path", "transformers_version"} == set(spelled_otherwise)

    return go

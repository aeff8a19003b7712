"""Real models of megatron-core on a CPU, as training builds and saves them, for what is tested beside them.

Transformer Engine has no build for a CPU. Where its default spec is asked for, megatron-core's own spec is built with modules that
keep the weights as Transformer Engine's do: a norm and a linear layer in one.
"""

import argparse
import contextlib
import importlib
import inspect
from dataclasses import fields, is_dataclass, replace
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.extensions import transformer_engine
from megatron.core.models import backends
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.safe_globals import register_safe_globals
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.overrides import TorchFunctionMode

from carnet.megatron import hybrids, meta
from carnet.megatron.hybrids import Stack, StackSubmodules
from carnet.megatron.meta import built
from carnet.megatron.modules import Norm, core_attention

BASE = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "layernorm_zero_centered_gamma": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "swiglu": True,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "qk_layernorm": False,
    "multi_latent_attention": False,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "max_position_embeddings": 64,
    "vocab_size": 61,
    "padded_vocab_size": 64,
    "untie_embeddings_and_output_weights": True,
    "params_dtype": "torch.float32",
}
MOE = {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 2, "moe_router_load_balancing_type": "none"}
MLA = {
    "multi_latent_attention": True,
    "group_query_attention": False,
    "qk_layernorm": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rope_type": "rope",
}
PATTERN = {"moe_layer_freq": [0, 1, 0, 1], "moe_shared_expert_intermediate_size": 40}
MODELS = {
    "llama": BASE,
    "llama tied, its queries and keys normed": {**BASE, "untie_embeddings_and_output_weights": False, "qk_layernorm": True},
    "llama, its norms less one": {**BASE, "layernorm_zero_centered_gamma": True},
    "gpt": {
        **BASE,
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "swiglu": False,
        "group_query_attention": False,
        "position_embedding_type": "learned_absolute",
    },
    "mixtral": {**BASE, **MOE},
    "mixture by a list, with shared experts": {**BASE, **MOE, **PATTERN},
    "latent attention": {**BASE, **MLA},
    "latent attention, queries whole": {**BASE, **MLA, "q_lora_rank": None},
    "latent attention, nothing normed": {**BASE, **MLA, "qk_layernorm": False},
    "deepseek": {**BASE, **MLA, **MOE, **PATTERN},
    "llama 4": {**BASE, **MOE, "qk_l2_norm": True, "moe_layer_freq": 2, "moe_shared_expert_intermediate_size": 24},
}
HYBRID = {
    **BASE,
    **MOE,
    "num_layers": 5,
    "swiglu": False,
    "squared_relu": True,
    "position_embedding_type": "none",
    "hybrid_override_pattern": "M*-ME",
    "is_hybrid_model": True,
    "mamba_state_dim": 8,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
}

DELTA = {
    **HYBRID,
    "hybrid_override_pattern": None,
    "hybrid_layer_pattern": "MG*GE",
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SPARSE = {
    **DELTA,
    **MLA,
    "qk_layernorm": False,
    "hybrid_layer_pattern": "MGDD-",
    "dsa_indexer_n_heads": 2,
    "dsa_indexer_head_dim": 8,
    "dsa_indexer_topk": 4,
}
PLACES = {field.name for field in fields(StackSubmodules)}
newer = pytest.mark.skipif("gdn_layer" not in PLACES, reason="of megatron-core 0.19: test_newest runs it there")


@contextlib.contextmanager
def world(meeting):
    """Be Megatron's whole world in one process; what megatron-core asks of CUDA for no purpose here, a CPU says."""
    register_safe_globals()  # a test of torch's own context manager may have taken them away again
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "current_device", lambda: "cpu")
            patch.setattr(torch.cuda, "synchronize", lambda *_: None)
            patch.setattr(tensor_parallel.get_cuda_rng_tracker(), "fork", lambda *_: contextlib.nullcontext())
            yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def megatron_world(tmp_path_factory):
    """One process as Megatron's whole world, for all tests of a module."""
    with world(tmp_path_factory.mktemp("world") / "meeting"):
        yield


class OnCpu(TorchFunctionMode):
    """Make on the CPU what megatron-core makes on "cuda" whatever the machine."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call a function of torch with another device."""
        kwargs = kwargs or {}
        return function(*args, **kwargs | ({"device": "cpu"} if kwargs.get("device") == "cuda" else {}))


def filled(said, spec, seed=17):
    """Return a model on the CPU with random weights."""
    with built(said, spec, device="cpu") as [model]:
        random = torch.Generator().manual_seed(seed)
        for tensor in (*model.parameters(), *(held for name, held in model.named_buffers() if name.endswith("expert_bias"))):
            tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype).normal_(std=0.2, generator=random)
    return model.eval()


def save(model, said, root, change=lambda state: None, prefix="", metadata=None):
    """Save a model as Megatron-LM does; ``change`` plants a misfit in the state that is saved."""
    folder = root / "iter_0000001"
    folder.mkdir(parents=True)
    sharded = model.sharded_state_dict(prefix=prefix, metadata=metadata)
    apply_factories(sharded)
    change(sharded)
    common = {"args": argparse.Namespace(**said)} if said else {}
    dist_checkpointing.save({**common, "iteration": 1, "checkpoint_version": 3.0, "model": sharded}, str(folder))
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    return root


@pytest.fixture
def saved(tmp_path):
    """Save the random model of some arguments; ``args`` are what the store says it is, these where nothing is said."""

    def store(said, spec, change=lambda state: None, args=None, prefix="", metadata=None):
        root = tmp_path / f"saved{len([*tmp_path.iterdir()])}"
        with world(tmp_path / f"meeting{len([*tmp_path.iterdir()])}"):
            return save(filled(said, spec), said if args is None else args, root, change, prefix, metadata)

    return store


def load(model, root):
    """Load a model from what was saved; whatever one side has and the other has not is an error."""
    state = {"model": model.sharded_state_dict()}
    loaded = dist_checkpointing.load(state, str(root / "iter_0000001"), strict=StrictHandling.RAISE_ALL)
    model.load_state_dict(loaded["model"])
    return model


TOKENS = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(5))


def logits(model, tokens=TOKENS):
    """Return what the head of a model says of the tokens after these."""
    found = []
    # a copy: the loss is computed in place; and the head that says the next token is the last one asked
    watch = model.output_layer.register_forward_hook(lambda *said: found.append(said[-1][0].transpose(0, 1).clone()))
    length = tokens.shape[1]
    positions = torch.arange(length)[None].expand(len(tokens), -1)
    future = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    with torch.no_grad(), OnCpu(), torch.compiler.set_stance("force_eager"):
        # 0.16 runs the layers that predict further tokens for the loss alone
        model(tokens, positions, future, labels=tokens if model.config.mtp_num_layers else None)
    watch.remove()
    assert found[-1].std() > 0.1  # flat ones would be equal for nothing
    return found[-1]


def held(model):
    """Return what a model holds, by the place in a store."""
    state = model.sharded_state_dict()
    apply_factories(state)
    shards = [each for each in nested_values(state) if isinstance(each, ShardedTensor)]
    return {(shard.key, shard.global_offset): shard.data.detach() for shard in shards}


class LayerNormLinear(ColumnParallelLinear):
    """A norm and the linear layer behind it in one module, the weights named as in Transformer Engine's."""

    def __init__(self, input_size, output_size, *, config, **given):
        super().__init__(input_size, output_size, config=config, **given)
        norm = Norm(config, input_size, config.layernorm_epsilon)
        for name, parameter in norm.named_parameters():
            setattr(self, f"layer_norm_{name}", parameter)
        norm.weight, norm.bias = None, None
        self.norm = [norm]  # no child of this module, so that its weights are this module's alone

    def forward(self, x, *given, **more):
        """Norm and multiply."""
        norm = self.norm[0]
        norm.weight, norm.bias = self.layer_norm_weight, getattr(self, "layer_norm_bias", None)
        return super().forward(norm(x), *given, **more)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Cut the rows; the norm is whole everywhere."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


PLAIN = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


class FusedProvider(backends.LocalSpecProvider):
    """megatron-core's choice of modules with Transformer Engine installed, as far as names and weights go."""

    def fuse_layernorm_and_linear(self):
        return True

    def column_parallel_layer_norm_linear(self):
        return LayerNormLinear

    def linear(self):
        return ColumnParallelLinear

    def layer_norm(self, rms_norm=False, for_qk=False, **_):
        return Norm

    def core_attention(self):
        return core_attention(local=True, latent=True) if self.latent else core_attention(local=True, latent=False)

    def grouped_mlp_modules(self, *asked):
        builder = super().grouped_mlp_modules(*asked)  # since 0.18 one thing
        return builder if callable(builder) else (SequentialMLP, PLAIN)


@pytest.fixture
def default_spec(monkeypatch):
    """Return the spec that training builds a model of: "te" or "local", megatron-core's own."""

    def choose(saver):
        def spec(config, stage):
            FusedProvider.latent = config.multi_latent_attention
            made = gpt_layer_specs.get_gpt_decoder_block_spec(
                config,
                use_transformer_engine=saver == "te",
                normalization=config.normalization,
                qk_l2_norm=config.qk_l2_norm,
                vp_stage=stage,
            )
            made = replace(made, layer_specs=[_replaced(layer) for layer in made.layer_specs])
            for layer in made.layer_specs if config.multi_latent_attention and saver == "local" else ():
                # the local spec's own cannot be built: its attention has one width
                inner = layer.submodules.self_attention.submodules
                inner.core_attention = core_attention(local=True, latent=True)
                if config.q_lora_rank is None:  # and since 0.19 none with a norm of nothing
                    inner.q_layernorm = IdentityOp
            return made

        return spec

    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", FusedProvider, raising=False)
    if find_spec("megatron.core.transformer.mla_qk_norm_config"):  # since 0.19 what the config says has a word in it, too
        resolver = importlib.import_module("megatron.core.transformer.mla_qk_norm_config")
        monkeypatch.setattr(resolver, "get_backend", lambda _: FusedProvider())
    monkeypatch.setattr(gpt_layer_specs, "TENorm", Norm, raising=False)
    return choose


te = transformer_engine
INSTEAD = [
    (te.TELayerNormColumnParallelLinear, LayerNormLinear),
    (te.TERowParallelLinear, RowParallelLinear),
    (te.TEColumnParallelLinear, ColumnParallelLinear),
    (te.TELinear, ColumnParallelLinear),
    (te.TEDotProductAttention, DotProductAttention),
    (te.TENorm, Norm),
    (te.TEActivationOp, None),
    (experts.TEGroupedMLP, SequentialMLP),
    (getattr(experts, "GroupedMLP", None), SequentialMLP),  # what 0.16 takes in its place without Transformer Engine
]


def _replaced(spec):
    """Return a spec with other modules in places of those of Transformer Engine."""
    if isinstance(spec, ModuleSpec):
        module = _replaced(spec.module)
        return replace(spec, module=module, submodules=PLAIN if module is SequentialMLP else _replaced(spec.submodules))
    if isinstance(spec, list):
        return [*map(_replaced, spec)]
    if isinstance(spec, partial):
        module = _replaced(spec.func)
        given = {name: _replaced(each) for name, each in spec.keywords.items()}
        return partial(module, **given | ({"submodules": PLAIN} if module is SequentialMLP else {}))
    if is_dataclass(spec) and not isinstance(spec, type):
        return replace(spec, **{field.name: _replaced(getattr(spec, field.name)) for field in fields(spec)})
    return next((new for old, new in INSTEAD if old is not None and spec is old), spec)


@pytest.fixture
def default_stack(monkeypatch):
    """The spec that training builds a hybrid of, megatron-core's own."""
    monkeypatch.setattr(importlib.import_module(Stack.__module__), "TENorm", Norm)  # the stack's last norm is in no spec
    return _replaced(importlib.import_module("megatron.core.models.mamba.mamba_layer_specs").mamba_stack_spec)


# --- Mamba on a CPU: mamba_ssm has no build for one ------------------------------------------------------------------------------


def _scan(joined, weight, bias, dt_bias, rates, *, D, headdim, ngroups, **_):  # noqa: N803  # mamba_ssm's name of it
    """Do what mamba_ssm's mamba_split_conv1d_scan_combined does, one token after the other."""
    batch, length, _ = joined.shape
    heads, channels = len(dt_bias), len(weight)
    inner = heads * headdim
    z, mixed, dt = joined.split([inner, channels, heads], -1)
    wide = weight.shape[1]
    mixed = torch.nn.functional.conv1d(mixed.transpose(1, 2), weight[:, None], bias, padding=wide - 1, groups=channels)
    mixed = torch.nn.functional.silu(mixed[..., :length]).transpose(1, 2)
    x, b, c = mixed.split([inner, *[(channels - inner) // 2] * 2], -1)
    x = x.view(batch, length, heads, headdim)
    b, c = (each.view(batch, length, ngroups, -1).repeat_interleave(heads // ngroups, 2) for each in (b, c))
    dt = torch.nn.functional.softplus(dt + dt_bias)
    state, found = torch.zeros(batch, heads, headdim, b.shape[-1]), []
    for at in range(length):
        step = dt[:, at, :, None, None]
        state = state * torch.exp(step * rates[:, None, None]) + step * x[:, at, :, :, None] * b[:, at, :, None]
        found.append((state * c[:, at, :, None]).sum(-1) + D[:, None] * x[:, at])
    return torch.stack(found, 1).reshape(batch, length, inner) * torch.nn.functional.silu(z)


def _rearranged(tensor, text):
    """Do what einops does with the three texts that a forward pass has."""
    return tensor[:, 0] if text == "d 1 w -> d w" else tensor.transpose(0, 1)


@pytest.fixture
def mamba_on_cpu(monkeypatch):
    """Let hybrids run: the kernels of Mamba, written plainly; ``mamba_on_cpu(said)`` says how wide its norm is."""
    monkeypatch.setattr(hybrids.mamba_mixer, "mamba_split_conv1d_scan_combined", _scan, raising=False)
    monkeypatch.setattr(hybrids.mamba_mixer, "rearrange", _rearranged, raising=False)

    delta = inspect.getmodule(hybrids.GatedDeltaNet.__init__)
    monkeypatch.setattr(delta, "l2norm", lambda values: torch.nn.functional.normalize(values, dim=-1), raising=False)

    def norm(said):
        def forward(self, values):
            parts = values.view(*values.shape[:-1], said["mamba_num_groups"], -1)
            size = parts.square().mean(-1, keepdim=True)
            return (parts * torch.rsqrt(size + said.get("layernorm_epsilon", 1e-5))).view(values.shape) * self.weight

        monkeypatch.setattr(meta._GatedNorm, "forward", forward)

    return norm

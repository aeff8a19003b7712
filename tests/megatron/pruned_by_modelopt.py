"""A program for tests: ModelOpt prunes models of megatron-core, which are saved with the arguments that they were built by.

    python pruned_by_modelopt.py FOLDER     of each of JOBS FOLDER/NAME, with its modelopt_state, and what it computes, FOLDER/NAME.pt

With the newest megatron-core, whose class of hybrids ModelOpt asks for. Transformer Engine and mamba_ssm have no build for a CPU: in
the place of their modules stand those that other tests build models of, under the names by which ModelOpt knows them.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

GPT = {"hidden_size": 24, "ffn_hidden_size": 40, "num_attention_heads": 2}
JOBS = {"gpt": GPT, "hybrid": {**GPT, "mamba_num_heads": 6, "mamba_head_dim": 4}}
FINE = {f"{name}_divisor": 4 for name in ("hidden_size", "ffn_hidden_size", "mamba_head_dim")}


def stand_in():
    """Put modules in the place of those that are not here, and return the specs of models of them."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.tensor_parallel import RowParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe import experts

    from carnet.megatron import hybrids, meta, modules
    from tests.megatron import conftest

    def widths(kind):
        """Return a class whose sizes have Transformer Engine's names, too."""

        def made(self, inputs, outputs, **given):
            kind.__init__(self, inputs, outputs, **given)
            self.in_features, self.out_features = inputs, outputs

        return type(kind.__name__, (kind,), {"__init__": made})

    class Attention(DotProductAttention):
        """Attention that knows how many heads it has."""

        def __init__(self, config, *given, **more):
            super().__init__(config, *given, **more)
            self.num_attention_heads = config.num_attention_heads

        def forward(self, *given, **more):
            """Have as many heads as now."""
            self.num_attention_heads_per_partition = heads = self.num_attention_heads
            self.hidden_size_per_partition = heads * self.config.kv_channels
            return super().forward(*given, **more)

    class GatedNorm(meta._GatedNorm):
        """mamba_ssm's norm of each group's channels."""

        def __init__(self, hidden_size, *, group_size, eps, **given):
            super().__init__(hidden_size)
            self.group_size, self.eps, self.bias = group_size, eps, None

        def forward(self, values):
            """Norm each group for itself."""
            parts = values.unflatten(-1, (-1, self.group_size))
            return torch.nn.functional.rms_norm(parts, (self.group_size,), None, self.eps).flatten(-2) * self.weight

    own = {
        "TELayerNormColumnParallelLinear": (conftest.LayerNormLinear, widths(conftest.LayerNormLinear)),
        "TERowParallelLinear": (RowParallelLinear, widths(RowParallelLinear)),
        "TEDotProductAttention": (DotProductAttention, Attention),
    }
    conftest.INSTEAD[:0] = [
        (old, new) for name, (plain, new) in own.items() for old in (plain, getattr(transformer_engine, name))
    ]
    patch = pytest.MonkeyPatch()
    gpt, stack = (each._get_wrapped_function()(patch) for each in (conftest.default_spec, conftest.default_stack))
    conftest.mamba_on_cpu._get_wrapped_function()(patch)
    none = "TEColumnParallelLinear TELinear TEColumnParallelGroupedLinear TERowParallelGroupedLinear".split()
    for name, kind in {
        **{name: new for name, (_, new) in own.items()},
        **{name: type(name, (torch.nn.Module,), {}) for name in none},
    }.items():
        setattr(transformer_engine, name, kind)
    experts.TEGroupedMLP = type("TEGroupedMLP", (torch.nn.Module,), {})
    meta._GatedNorm = hybrids.mamba_mixer.ExtendedRMSNorm = GatedNorm
    modules.RMSNorm.forward = lambda self, x: torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
    found = ModuleType("transformer_engine")
    found.pytorch = SimpleNamespace(LayerNorm=modules.LayerNorm, RMSNorm=modules.RMSNorm)
    sys.modules.update({"transformer_engine": found, "mamba_ssm": ModuleType("mamba_ssm")})
    return {"gpt": gpt("te"), "hybrid": lambda *_: stack}


def main(folder):
    """Build, prune, save and compute."""
    from tests.megatron.trained_by_modelopt import save, shared

    specs = stand_in()
    import modelopt.torch.prune as mtp

    from tests.megatron import conftest
    from tests.megatron.test_pruned import BEFORE

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    with shared():
        for name, cut in JOBS.items():
            model = conftest.filled(BEFORE[name], specs[name])
            mode = [("mcore_minitron", mtp.mcore_minitron.get_mcore_minitron_config(**FINE))]
            mtp.prune(model, mode, {"export_config": cut}, None, {"skip_sorting": True})
            save(model, BEFORE[name], folder / name)
            torch.save(conftest.logits(model), folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    from tests.megatron import newest  # noqa: F401  # before any module of Megatron's

    main(Path(sys.argv[1]))

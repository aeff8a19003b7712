"""One worker of vLLM without an engine: what it holds between loading and packing, as vLLM's own classes load it.

    python workers.py RANK TP PP PORT JOBS.json

A job is [folder, load format, EP or not, where to write what this rank holds]. What is written: a file of tensors under the keys that
``sharded_state`` knows, and the digests of ``named_parameters()``. vLLM's steps up to that moment are called as they are. Which kernel
multiplies codes is chosen when a layer is made, and a CPU has few: in place of that choice stands a kernel that is never asked.
"""

import importlib
import json
import pkgutil
import sys
from pathlib import Path

from safetensors.torch import save_file
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_checksum import compute_tensor_digests
from vllm.utils.torch_utils import set_default_torch_dtype


class Kernel:
    """What a layer of codes is given in place of a kernel."""

    def input_quant_key(self):
        return None


CHOICES = {
    **{f"init_{kind}_linear_kernel": lambda *_, **__: Kernel() for kind in ("fp8", "nvfp4", "mxfp8", "mxfp4", "int8")},
    "select_fp8_moe_backend": lambda *_, **__: (Fp8MoeBackend.TRITON, Kernel),
    "select_mxfp8_moe_backend": lambda *_, **__: (Fp8MoeBackend.TRITON, Kernel),
    "select_nvfp4_moe_backend": lambda *_, **__: (NvFp4MoeBackend.VLLM_CUTLASS, Kernel),
    "select_mxfp4_moe_backend": lambda *_, **__: (Mxfp4MoeBackend.EMULATION, Kernel),
    "select_int8_moe_backend": lambda *_, **__: (None, Kernel),
}


def choose_nothing():
    """Let no layer look for a kernel."""
    for found in pkgutil.walk_packages(quantization.__path__, f"{quantization.__name__}."):
        ours = "compressed_tensors" in found.name or found.name.endswith((".fp8", ".modelopt", ".mxfp4"))
        if ours and not found.name.endswith("flydsl"):  # which is AMD's
            module = importlib.import_module(found.name)
            for name in CHOICES.keys() & vars(module).keys():
                setattr(module, name, CHOICES[name])


def main(rank, tp, pp, port, jobs):
    choose_nothing()
    for number, (folder, form, experts, out) in enumerate(jobs):
        engine = EngineArgs(
            model=folder,
            load_format=form,
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            enable_expert_parallel=experts,
            max_model_len=32,
            enforce_eager=True,
            skip_tokenizer_init=True,
            distributed_executor_backend="mp" if tp * pp > 1 else None,
        )
        config = engine.create_engine_config()
        with set_current_vllm_config(config):
            if not number:
                parallel_state.init_distributed_environment(tp * pp, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
            parallel_state.ensure_model_parallel_initialized(tp, pp)  # a group of experts for a model that has some alone
            try:
                hold(config, Path(out), rank)
            except Exception as error:  # noqa: BLE001 - the test says which job it was
                Path(out).mkdir(parents=True, exist_ok=True)
                (Path(out) / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
            config.compilation_config.static_forward_context.clear()
            parallel_state.destroy_model_parallel()


def hold(config, out, rank):
    loader = get_model_loader(config.load_config)
    with set_default_torch_dtype(config.model_config.dtype):
        model = initialize_model(vllm_config=config, model_config=config.model_config)
    for name, tensor in model.state_dict().items():  # what no weight fills is seen
        if tensor.is_floating_point() and tensor.dim() and "attn.attn." not in name:  # whose scales are there without
            tensor.data.fill_(float("nan"))
    loader.load_weights(model, config.model_config)
    state = ShardedStateLoader._filter_subtensors(model.state_dict())
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, out / f"{rank}.safetensors")
    (out / f"{rank}.json").write_text(json.dumps(compute_tensor_digests(model)))


if __name__ == "__main__":
    rank, tp, pp, port = map(int, sys.argv[1:5])
    main(rank, tp, pp, port, json.loads(Path(sys.argv[5]).read_text()))

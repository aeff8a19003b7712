"""A program for tests: have ModelOpt quantize Megatron models of carnet's spec, and megatron-core save them.

It runs in a process of its own, because ModelOpt changes what it is imported beside. ``JOBS.pt`` is name -> (training arguments, the
words of ``saved_by``). Beside it come a store for each, ``NAME``, and ``NAME.safetensors``, what each quantizer says of itself::

    python quantized_by_modelopt.py JOBS.pt
"""

import sys
from pathlib import Path

import torch


def main() -> None:
    """Quantize and save."""
    import modelopt.torch.quantization as mtq
    from safetensors.torch import save_file

    from carnet.megatron.post_training.modelopt.gpt.model_specs import get_gpt_modelopt_spec
    from tests.megatron.conftest import filled, logits, save, world

    jobs = Path(sys.argv[1])
    wish = mtq.update_quant_cfg_with_kv_cache_quant(mtq.FP8_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"])
    for name, (said, saver) in torch.load(jobs).items():

        def spec(config, stage, saver=saver):
            return get_gpt_modelopt_spec(config, remap_te_layernorm=True, saved_by=saver, vp_stage=stage)

        with world(jobs.parent / f"meeting of {name}"):
            model = filled(said, spec)
            mtq.quantize(model, wish, logits)
            save(model, said, jobs.parent / name)
            found = {
                module: quantizer.amax.float().reshape(-1).clone()
                for module, quantizer in model.named_modules()
                if getattr(quantizer, "amax", None) is not None and quantizer.is_enabled
            }
            save_file(found, jobs.parent / f"{name}.safetensors")


if __name__ == "__main__":
    main()

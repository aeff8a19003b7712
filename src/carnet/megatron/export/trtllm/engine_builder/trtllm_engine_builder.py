"""Engines, built by TensorRT-LLM itself: it has to be installed, in a release that still builds them (1.2 is the last).

The calls are those that TensorRT-LLM 0.16 to 1.2 answer: tensorrt_llm/builder.py, commands/build.py, plugin/plugin.py.
"""

from functools import partial
from importlib import import_module
from typing import Any

from carnet.megatron.export.trtllm.records import PretrainedConfig
from carnet.megatron.export.trtllm.trt_model_config import HAVE_TRTLLM

__all__ = ["HAVE_TRTLLM", "TRTLLMEngineBuilder"]

ARCHITECTURES = {"LlamaForCausalLM": "LLaMAForCausalLM"}  # where the class is called otherwise than the architecture


def build_and_save_engine(
    self: object,  # a helper, which has it as a method, or nothing
    engine_dir: str,
    trtllm_model_weights: dict[str, Any],
    trtllm_model_config: PretrainedConfig,
    max_input_len: int = 1024,
    max_output_len: int = 1024,
    max_batch_size: int = 4,
    lora_ckpt_list: list[str] | None = None,
    use_lora_plugin: str | None = None,
    max_lora_rank: int = 64,
    lora_target_modules: list[str] | None = None,
    max_prompt_embedding_table_size: int = 0,
    paged_kv_cache: bool = True,
    remove_input_padding: bool = True,
    paged_context_fmha: bool = False,
    use_refit: bool = False,
    max_num_tokens: int | None = None,
    max_seq_len: int | None = None,
    opt_num_tokens: int | None = None,
    max_beam_width: int = 1,
    tokens_per_block: int = 128,
    multiple_profiles: bool = False,
    gpt_attention_plugin: str = "auto",
    gemm_plugin: str = "auto",
    reduce_fusion: bool = False,
) -> object:
    """Build the engine of a rank, save it in a folder and return it. Raises ImportError where TensorRT-LLM is not installed.

    Lengths and sizes count tokens; ``max_seq_len`` is input and output together unless said.
    """
    del self
    known = _tensorrt_llm()
    architecture = trtllm_model_config.architecture
    model_class = getattr(known["models"], ARCHITECTURES.get(architecture, architecture), None)
    if model_class is None:
        raise AttributeError(f"TensorRT-LLM has no model for the architecture {architecture}")
    known["logger"].logger.set_level("info")
    plugins = known["plugin"].PluginConfig()
    plugins.gpt_attention_plugin, plugins.gemm_plugin = gpt_attention_plugin, gemm_plugin
    if paged_kv_cache:
        plugins.enable_paged_kv_cache(tokens_per_block=tokens_per_block)
    else:
        plugins.paged_kv_cache = False
    plugins.remove_input_padding = remove_input_padding
    plugins.use_paged_context_fmha = paged_context_fmha
    plugins.multiple_profiles = multiple_profiles
    plugins.reduce_fusion = reduce_fusion

    limits: dict[str, Any] = {
        "max_input_len": max_input_len,
        "max_batch_size": max_batch_size,
        "max_beam_width": max_beam_width,
        "max_seq_len": max_input_len + max_output_len if max_seq_len is None else max_seq_len,
        "multiple_profiles": multiple_profiles,
    }
    tokens, optimal = known["_common"].check_max_num_tokens(
        **limits,
        max_num_tokens=max_num_tokens,
        opt_num_tokens=opt_num_tokens,
        remove_input_padding=remove_input_padding,
        enable_context_fmha=plugins.context_fmha,
        tokens_per_block=tokens_per_block,
    )
    said = limits | {
        "max_output_len": max_output_len,
        "max_num_tokens": tokens,
        "opt_num_tokens": optimal,
        "max_prompt_embedding_table_size": max_prompt_embedding_table_size,
        "gather_context_logits": False,
        "gather_generation_logits": False,
        "strongly_typed": False,
        "builder_opt": None,
        "use_refit": use_refit,
    }
    if architecture == "DeciLMForCausalLM":
        said |= {"strongly_typed": True, "use_fused_mlp": False}
        plugins.use_fused_mlp = False
    config = known["builder"].BuildConfig.from_dict(said, plugin_config=plugins)
    if use_lora_plugin is not None:
        config.lora_config = known["lora_manager"].LoraConfig(
            lora_dir=lora_ckpt_list,
            lora_ckpt_source="nemo",
            max_lora_rank=max_lora_rank,
            lora_target_modules=lora_target_modules,
        )
    modeling = known["models.modeling_utils"]
    model = modeling.optimize_model(
        model_class.from_config(trtllm_model_config),
        use_parallel_embedding=trtllm_model_config.use_parallel_embedding,
        share_embedding_table=trtllm_model_config.share_embedding_table,
    )
    modeling.preprocess_weights(trtllm_model_weights, trtllm_model_config)
    model.load(trtllm_model_weights)
    engine: Any = known["commands.build"].build(model, config)
    engine.save(engine_dir)
    return engine


class TRTLLMEngineBuilder:
    """Build an engine out of the weights and the config of a rank."""

    build_and_save_engine = staticmethod(partial(build_and_save_engine, None))


def _tensorrt_llm() -> dict[str, Any]:
    """Return the modules that build an engine. Raises ImportError where there are none."""
    names = ("models", "models.modeling_utils", "logger", "plugin", "_common", "builder", "lora_manager", "commands.build")
    try:
        return {name: import_module(f"tensorrt_llm.{name}") for name in names}
    except ImportError as missing:
        message = "tensorrt_llm is not installed, or it is a release without engines. pip install 'tensorrt-llm<1.3'"
        raise ImportError(message) from missing

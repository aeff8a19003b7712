"""What TensorRT-LLM calls a kind of model."""

from carnet.megatron.export.model_type import ModelType

TRT_MODEL_TYPE_STRING = {
    ModelType.gpt: "GPTForCausalLM",
    ModelType.gptnext: "GPTForCausalLM",
    ModelType.starcoder: "GPTForCausalLM",
    ModelType.mixtral: "LlamaForCausalLM",
    ModelType.llama: "LlamaForCausalLM",
    ModelType.gemma: "GemmaForCausalLM",
    ModelType.falcon: "FalconForCausalLM",
    ModelType.nemotron_nas: "DeciLMForCausalLM",
}

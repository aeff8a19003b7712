"""vLLM as referee of a head that guesses tokens: its own class is made by the config that carnet writes, and loads the folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.config import set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

import carnet

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning:vllm")  # of what it calls in torch
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}


def published(folder, draft):
    """Write a head as ModelOpt publishes one: the config and the tensors."""
    random = torch.Generator().manual_seed(3)
    q, kv, wide, inner = 128, 64, 64, 80
    shapes = {"fc": (wide, 3 * wide), "lm_head": (draft, wide)}
    shapes |= {f"midlayer.self_attn.{name}_proj": (rows, 2 * wide) for name, rows in (("q", q), ("k", kv), ("v", kv))}
    shapes |= {"midlayer.self_attn.o_proj": (wide, q), "midlayer.mlp.down_proj": (wide, inner)}
    shapes |= {f"midlayer.mlp.{name}_proj": (inner, wide) for name in ("gate", "up")}
    shapes |= {f"midlayer.{name}": (wide,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")}
    held = {
        f"{name}.weight": torch.empty(shape).normal_(generator=random) for name, shape in (shapes | {"norm": (wide,)}).items()
    }
    if draft < SIZES["vocab_size"]:
        held["d2t"] = torch.arange(draft) * 2
    eagle = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True}
    said = {**SIZES, "num_hidden_layers": 1, "draft_vocab_size": draft, "eagle_config": eagle, "torch_dtype": "float32"}
    folder.mkdir()
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", **said})
    )
    return folder


@pytest.mark.parametrize("draft", [32, 96])
def test_vllms_class_holds_the_head(draft, tmp_path):
    head, ours = published(tmp_path / "made", draft), tmp_path / "head"
    assert carnet.cross(head, ours, to="hf", dtype="bf16").equal
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=4)).bfloat16().save_pretrained(tmp_path / "model")
    guessing = {"model": str(ours), "method": "eagle3", "num_speculative_tokens": 2}
    words = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64, "dtype": "bfloat16"}
    config = EngineArgs(str(tmp_path / "model"), **words, speculative_config=guessing).create_engine_config()
    drafting = config.speculative_config.draft_model_config
    with set_current_vllm_config(config), set_default_torch_dtype(drafting.dtype):
        parallel_state.init_distributed_environment(1, 0, f"file://{tmp_path}/meeting", 0, backend="gloo")
        parallel_state.initialize_model_parallel(1, 1)
        model = initialize_model(vllm_config=config, model_config=drafting)
        get_model_loader(config.load_config).load_weights(model, drafting)
    cleanup_dist_env_and_memory()
    assert type(model).__name__ == "Eagle3LlamaForCausalLM"
    found, held = {**dict(model.named_parameters())}, load_file(ours / "model.safetensors")
    del found["model.embed_tokens.weight"]  # the model's, which the engine shares
    head = found.pop("lm_head.weight")
    joined = {
        "model.layers.0.self_attn.qkv_proj.weight": [held.pop(f"midlayer.self_attn.{part}_proj.weight") for part in "qkv"],
        "model.layers.0.mlp.gate_up_proj.weight": [held.pop(f"midlayer.mlp.{part}_proj.weight") for part in ("gate", "up")],
    }
    wanted = {name: torch.cat(parts) for name, parts in joined.items()}
    assert torch.equal(head[:draft], held.pop("lm_head.weight"))
    if draft < SIZES["vocab_size"]:
        wanted["draft_id_to_target_id"] = held.pop("d2t")
    wanted |= {f"model.{name.replace('midlayer', 'layers.0')}": tensor for name, tensor in held.items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert drafting.hf_config.eagle_aux_hidden_state_layer_ids == [1, 2, 3]  # those that enter these layers

"""Small models that also see, as transformers makes them: what a class needs for its config, and an image for it."""

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

TEXT = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64}
PLAIN = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
ROPE = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [4, 2, 2]}
WIDE = {
    "rope_type": "default",
    "rope_theta": 5e5,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
    "partial_rotary_factor": 0.5,
}
DELTA = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
}
# queries grow within the text
GROWING = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.5,
}
WITHOUT_HEAD = {key: value for key, value in TEXT.items() if key != "head_dim"}

GLM = {
    "text_config": {**WITHOUT_HEAD, "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "vision_config": {**VISION, "image_size": 16},
    "image_token_id": 3,
    "video_token_id": 4,
    "image_start_token_id": 5,
    "image_end_token_id": 6,
}

# class -> its config's fields
CLASSES = {
    "Qwen3VLForConditionalGeneration": {
        "text_config": {**TEXT, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        "vision_config": {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        "tie_word_embeddings": False,
        **TOKENS,
    },
    "Qwen3VLMoeForConditionalGeneration": {
        "text_config": {
            **TEXT,
            "rope_parameters": {**ROPE, "mrope_interleaved": True},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "tie_word_embeddings": False,
        },
        "vision_config": {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        "tie_word_embeddings": False,
        **TOKENS,
    },
    "Qwen3_5ForConditionalGeneration": {
        "text_config": {**TEXT, "rope_parameters": WIDE, **DELTA},
        "vision_config": {**VISION, "num_position_embeddings": 16},
        **TOKENS,
    },
    "Qwen3_5MoeForConditionalGeneration": {
        "text_config": {
            **{key: value for key, value in TEXT.items() if key != "intermediate_size"},
            "rope_parameters": WIDE,
            **DELTA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 48,
        },
        "vision_config": {**VISION, "num_position_embeddings": 16},
        **TOKENS,
    },
    "Glm4vForConditionalGeneration": GLM,
    "Glm46VForConditionalGeneration": GLM,
    "Glm4vMoeForConditionalGeneration": {
        "text_config": {
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e5,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
            },
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        "vision_config": {**VISION, "image_size": 16},
        "image_token_id": 3,
        "video_token_id": 4,
        "image_start_token_id": 5,
        "image_end_token_id": 6,
    },
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {**WITHOUT_HEAD, "rope_parameters": ROPE},
        "vision_config": {**VISION, "fullatt_block_indexes": [1], "window_size": 16},
        **TOKENS,
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": {**WITHOUT_HEAD, "rope_parameters": ROPE},
        "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 4, "hidden_size": 64, "mlp_ratio": 2},
        **TOKENS,
    },
    "Gemma3ForConditionalGeneration": {
        "text_config": {**TEXT, "sliding_window": 8},
        "vision_config": PLAIN,
        "mm_tokens_per_image": 4,
        "image_token_index": 9,
    },
    "Gemma4ForConditionalGeneration": {
        "text_config": {
            **TEXT,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "attention_k_eq_v": True,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "use_bidirectional_attention": "vision",
            "final_logit_softcapping": 30.0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        "vision_config": {
            **PLAIN,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
            "standardize": True,
        },
        "image_token_id": 9,
    },
    "Mistral3ForConditionalGeneration": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**PLAIN, "model_type": "pixtral", "head_dim": 16},
        "image_token_index": 9,
    },
    "Mistral3ForConditionalGeneration, Ministral 3": {
        "text_config": {**TEXT, "model_type": "ministral3", "rope_parameters": GROWING},
        "vision_config": {**PLAIN, "model_type": "pixtral", "head_dim": 16},
        "image_token_index": 9,
    },
    "KimiK25ForConditionalGeneration": {
        "text_config": {
            **WITHOUT_HEAD,
            "model_type": "deepseek_v3",
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 20,
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
        "vision_config": {**PLAIN, "pos_emb_height": 8, "pos_emb_width": 8},
        "projection_hidden_size": 32,
        "image_token_id": 3,
        "tie_word_embeddings": False,
    },
    "Llama4ForConditionalGeneration": {
        "text_config": {
            **TEXT,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "vision_config": {
            **PLAIN,
            "intermediate_size": 128,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
        },
        "image_token_index": 9,
        "boi_token_index": 10,
        "eoi_token_index": 11,
    },
}
# published class -> transformers' own, and what that calls otherwise than the published files where it saves: it loads both
PUBLISHED = {
    "KimiK25ForConditionalGeneration": (
        "Kimi_K25ForConditionalGeneration",
        {"language_model.model.blocks.": "language_model.model.layers.", "model.mm_projector.": "mm_projector."},
    )
}
GRID = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
FLAT = torch.linspace(-1, 1, 16 * 3 * 2 * 16).view(16, -1)  # patches of two frames
SQUARE = torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16)
MISTRAL = [9] * 4, {"pixel_values": SQUARE, "image_sizes": torch.tensor([[16, 16]])}
# class -> the image, beside its tokens
IMAGES = {
    "Qwen3VLForConditionalGeneration": ([5, 3, 3, 3, 3, 6], {"pixel_values": FLAT, **GRID}),
    "Qwen3VLMoeForConditionalGeneration": ([5, 3, 3, 3, 3, 6], {"pixel_values": FLAT, **GRID}),
    "Qwen3_5ForConditionalGeneration": ([5, 3, 3, 3, 3, 6], {"pixel_values": FLAT, **GRID}),
    "Qwen3_5MoeForConditionalGeneration": ([5, 3, 3, 3, 3, 6], {"pixel_values": FLAT, **GRID}),
    "Qwen2_5_VLForConditionalGeneration": ([5, 3, 3, 3, 3, 6], {"pixel_values": FLAT, **GRID}),
    "Qwen2VLForConditionalGeneration": ([5, 3, 3, 3, 3, 6], {"pixel_values": FLAT, **GRID}),
    "Glm4vForConditionalGeneration": ([5, 3, 3, 3, 3, 6], {"pixel_values": FLAT, **GRID}),
    "Glm46VForConditionalGeneration": ([5, 3, 3, 3, 3, 6], {"pixel_values": FLAT, **GRID}),
    "Gemma3ForConditionalGeneration": ([9] * 4, {"pixel_values": SQUARE}),
    "Mistral3ForConditionalGeneration": MISTRAL,
    "Mistral3ForConditionalGeneration, Ministral 3": MISTRAL,
}


def save(name, folder, dtype=torch.float32):
    """Save a model of a class, whose every weight is drawn."""
    torch.manual_seed(0)
    own, renamed = PUBLISHED.get(name, (name.split(",")[0], {}))
    kind = getattr(transformers, own)
    model = kind(kind.config_class(**CLASSES[name]))
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.05)
    model.to(dtype).save_pretrained(folder)
    if renamed:
        tensors = load_file(folder / "model.safetensors")
        for theirs, published in renamed.items():
            tensors = {key.replace(theirs, published, key.startswith(theirs)): each for key, each in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | {"architectures": [name]}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(name, folder, *, image=False):
    """Return what a folder's model says to a text, or to an image in one."""
    own, _ = PUBLISHED.get(name, (name.split(",")[0], {}))
    model, said = getattr(transformers, own).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(said.values())
    text = torch.randint(20, 150, (1, 12), generator=torch.Generator().manual_seed(5))
    seen, more = IMAGES[name] if image else ([], {})
    tokens = torch.cat([text[:, :6], torch.tensor([seen], dtype=torch.long), text[:, 6:]], 1)
    if image and name.startswith("Gemma3"):
        more = {**more, "token_type_ids": (tokens == 9).long()}
    if image and "image_grid_thw" in more:
        more = {**more, "mm_token_type_ids": (tokens == 3).long()}
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False, **more).logits

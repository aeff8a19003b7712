"""What Megatron-Bridge calls otherwise in the towers of classes that see or hear, and the order in which it has heads."""

from carnet.dialects.rows import TowerRow

ASKED = 1  # in place of the heads: what the config says


def _block(name: str, stored: str) -> TowerRow:
    return TowerRow(f"model.visual.{name}.**", f"vision_model.{stored}{'' if stored.endswith('_') else '.'}**")


QKV = "model.visual.blocks.*.attn.qkv.", "vision_model.decoder.layers.*.self_attention.linear_qkv."
# Megatron-Bridge: models/qwen_vl/qwen3_vl_bridge.py, and ConcatenatedQKVMapping of models/conversion/param_mapping.py
QWEN_TOWER = (
    TowerRow(QKV[0] + "weight", QKV[1] + "weight", heads=ASKED, order=((1, 0, 2), (3,))),
    TowerRow(QKV[0] + "bias", QKV[1] + "bias", heads=ASKED, order=((1, 0, 2),)),
    _block("blocks.*.attn.proj", "decoder.layers.*.self_attention.linear_proj"),
    _block("blocks.*.norm1", "decoder.layers.*.self_attention.linear_qkv.layer_norm_"),
    _block("blocks.*.norm2", "decoder.layers.*.mlp.linear_fc1.layer_norm_"),
    _block("blocks.*.mlp.linear_fc1", "decoder.layers.*.mlp.linear_fc1"),
    _block("blocks.*.mlp.linear_fc2", "decoder.layers.*.mlp.linear_fc2"),
    _block("deepstack_merger_list.*.norm", "decoder.deepstack_merger_list.*.patch_norm"),
    _block("deepstack_merger_list.*.linear_fc1", "decoder.deepstack_merger_list.*.linear_fc1"),
    _block("deepstack_merger_list.*.linear_fc2", "decoder.deepstack_merger_list.*.linear_fc2"),
    _block("merger.norm", "merger.patch_norm"),
    _block("merger", "merger"),
    _block("patch_embed", "patch_embed"),
    TowerRow("model.visual.pos_embed.weight", "vision_model.pos_embed.weight"),
)
# gemma_vl/gemma3_vl_bridge.py; its tower is transformers' own module, under the names of its release
GEMMA_TOWER = (
    TowerRow("multi_modal_projector.mm_soft_emb_norm.weight", "multi_modal_projector.mm_soft_embed_norm.weight"),
    TowerRow("multi_modal_projector.mm_input_projection_weight", "multi_modal_projector.proj.weight", order=((1,), (0,))),
)
GLM_TOWER = (TowerRow("model.visual.**", "visual.**"),)  # glm_vl/glm_45v_bridge.py
# Megatron-Bridge: nemotron_vl/nemotron_vl_bridge.py and nemotron_omni/nemotron_omni_bridge.py, whose tower always has 16 heads
RADIO = "vision_model.radio_model.model."
BLOCKS = RADIO + "blocks.*.", "vision_model.decoder.layers.*."
RADIO_TOWER = (
    TowerRow(RADIO + "patch_generator.cls_token.token", "vision_model.class_token"),
    TowerRow(RADIO + "patch_generator.pos_embed", "vision_model.position_embeddings"),
    TowerRow(RADIO + "patch_generator.embedder.weight", "vision_model.embedder.weight"),
    TowerRow(RADIO + "patch_generator.video_embedder.weight", "vision_model.video_embedder.weight"),
    TowerRow(BLOCKS[0] + "attn.qkv.weight", BLOCKS[1] + "self_attention.linear_qkv.weight", 16, ((1, 0, 2), (3,))),
    TowerRow(BLOCKS[0] + "attn.qkv.bias", BLOCKS[1] + "self_attention.linear_qkv.bias", 16, ((1, 0, 2),)),
    *(
        TowerRow(f"{BLOCKS[0]}{name}.**", f"{BLOCKS[1]}{stored}**")
        for name, stored in (
            ("attn.proj", "self_attention.linear_proj."),
            ("norm1", "self_attention.linear_qkv.layer_norm_"),
            ("norm2", "mlp.linear_fc1.layer_norm_"),
            ("mlp.fc1", "mlp.linear_fc1."),
            ("mlp.fc2", "mlp.linear_fc2."),
        )
    ),
    TowerRow("mlp1.0.**", "vision_projection.encoder.linear_fc1.layer_norm_**"),
    TowerRow("mlp1.1.**", "vision_projection.encoder.linear_fc1.**"),
    TowerRow("mlp1.3.**", "vision_projection.encoder.linear_fc2.**"),
    TowerRow("sound_projection.norm.**", "sound_projection.encoder.linear_fc1.layer_norm_**"),
    TowerRow("sound_projection.linear1.**", "sound_projection.encoder.linear_fc1.**"),
    TowerRow("sound_projection.linear2.**", "sound_projection.encoder.linear_fc2.**"),
    TowerRow("sound_encoder.encoder.**", "sound_model.encoder.**"),
)

"""What some model types need besides the shrinker: changed keys, or a function that makes the configuration."""

from __future__ import annotations

from typing import Any

from transformers import Dinov2Config, PretrainedConfig, ResNetConfig

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1}


def resnet() -> PretrainedConfig:
    """A backbone that needs no further package."""
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def dinov2() -> PretrainedConfig:
    """A backbone of four stages for heads of dense prediction."""
    return Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8,
        out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip


EFFICIENTNET = {
    "kernel_sizes": [3, 3], "in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2],
    "num_block_repeats": [1, 1], "expand_ratios": [1, 6], "depthwise_padding": [], "width_coefficient": 0.1,
    "hidden_dim": 128, "num_hidden_layers": 2,
}  # fmt: skip
DENSE = {
    "backbone": None, "use_pretrained_backbone": False, "use_timm_backbone": False,
    "backbone_config": dinov2().to_dict(), "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8,
    "reassemble_hidden_size": 32, "head_hidden_size": 8,
}  # fmt: skip
BACKBONE = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
    "backbone_config": resnet().to_dict(),
}  # fmt: skip

OVERRIDES: dict[str, Any] = {
    "bamba": MAMBA,
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "granitemoehybrid": MAMBA,
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "codegen": {"n_head": 4},
    "bit": {"num_groups": 4},
    "efficientnet": EFFICIENTNET,
    "align": {"vision_config": EFFICIENTNET},
    "chmv2": DENSE,
    "depth_anything": DENSE,
    "depth_pro": {"patch_size": 32},
    "Data2VecVisionForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "BeitForSemanticSegmentation": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "detr": BACKBONE,
    "conditional_detr": BACKBONE,
    "dab-detr": BACKBONE,
    "deformable_detr": BACKBONE,
    "table-transformer": BACKBONE,
    "esm": {"vocab_size": 100, "pad_token_id": 1, "mask_token_id": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "dbrx": {"attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 10000.0}},
    "glm5_next": {"index_topk": 16},
    "HieraForPreTraining": {"decoder_hidden_size": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "Qwen3_5ForTokenClassification": {"text_config": {"layer_types": ["linear_attention", "full_attention"]}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
}

NOT_BUILT: dict[str, str] = {
    r"dinat/.*": "needs natten",
    r"(edgetam|edgetam_video|fast_vlm|gemma3n|timm_wrapper|timm_backbone)/.*": "needs timm",
    r"layoutlmv2/.*": "needs detectron2",
}
"""Patterns of type/Class -> why such an entry cannot be built tiny."""

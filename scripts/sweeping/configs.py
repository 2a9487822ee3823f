"""Tiny configurations of any model type: a shrinker by the names of sizes, and what some types need besides."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from .overrides import OVERRIDES

HIDDEN, HEADS, LAYERS, WIDE, VOCABULARY, LABELS = 32, 2, 2, 48, 100, 3
IDS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 2, "cls": 3, "sep": 4, "unk": 3, "mask": 3}

# whole name of an integer -> its value: the first pattern that fits decides; a name that fits none keeps its value
SIZES: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?(vocab_size|vocabulary_size)(_\w+)?", VOCABULARY),
    (r"type_vocab_size", 2),
    (r"(\w+_)?(rotary_dim|rope_dim|qk_rope_head_dim|qk_nope_head_dim)", 8),
    (r"qk_head_dim", 16),
    (r"(\w+_)?(head_dim|d_kv|dim_head|kv_channels|v_head_dim|attention_head_size|head_size|d_head)", HIDDEN // HEADS),
    (r"(\w+_)?lora_rank|(\w+_)?low_rank_dim", 16),
    (r"first_k_dense_replace", 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_feat_extract_layers|(\w+_)?min_\w+|num_residual_layers", -1),
    (r"(\w+_)?(num_hidden_layers|num_layers|n_layers?|layers|depth|num_blocks|max_window_layers|n_blocks)", LAYERS),
    (r"(\w+_)?(num_attention_heads|num_heads|n_heads?|attention_heads|num_key_value_heads|num_kv_heads)", HEADS),
    (r"(\w+_)?(intermediate_size|ffn_dim|d_ff|n_inner|mlp_dim|ffn_hidden_size|feedforward_dim|d_inner|dff)", WIDE),
    (r"(num_experts_per_tok|moe_topk|top_k|moe_k|num_selected_experts|top_k_experts|num_experts_per_token)", 2),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)", 4),
    (r"(n_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts)", 1),
    (r"(\w+_)?(hidden_size|d_model|n_embd|hidden_dim|embed_dim|embedding_size|embedding_dim|projection_dim)", HIDDEN),
    (r"(\w+_)?hidden_size_per_layer_input", 8),
    (r"(\w+_)?(proj_size|proj_dim|model_dim|decoder_dim|encoder_dim|output_size|pooler_output_size|dim)", HIDDEN),
    (r"(\w+_)?(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|seq_length)", 128),
    (r"max_source_positions", 20),
    (r"max_target_positions", 40),
    (r"(\w+_)?num_queries", 5),
    (r"(image_size|pretrain_image_size)", 32),
    (r"(\w+_)?num_mel_bins", 16),
    (r"(codebook_size|num_codevectors_per_group|num_embeddings)", 16),
    (r"(xvector_output_dim|(proj_)?codevector_dim|output_channels|fpn_feature_size|mask_feature_size)", HIDDEN),
    (r"(window_size|sliding_window)", 4),
    (r"(index_topk)", 4),
)
STAGED = ("num_heads", "hidden_sizes", "depths", "num_attention_heads", "embed_dim", "stage_channels", "embed_dims")
"""A list under one of these names tells of a model in stages, whose sizes depend on each other."""


def tiny(model_type: str, class_name: str) -> PretrainedConfig:
    """A configuration of some ten thousand weights, with three labels, or the two of a span."""
    override = OVERRIDES.get(class_name) or OVERRIDES.get(model_type, {})
    config = override() if callable(override) else shrunken(CONFIG_MAPPING[model_type](), override)
    config.num_labels = 2 if "QuestionAnswering" in class_name else LABELS
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = IDS["pad"]
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = IDS["decoder_start"]
    return config


def shrunken(config: PretrainedConfig, override: dict[str, Any] | None = None) -> PretrainedConfig:
    """The same class, made anew with small sizes; ``override`` has the last word, for sub-configurations too."""
    override = dict(override or {})
    sizes: dict[str, Any] = {}
    ids = iter(range(60, VOCABULARY))
    in_stages = any(isinstance(vars(config).get(name), (list, tuple)) for name in STAGED)
    for name, value in vars(config).items():
        if (
            name.startswith("_")
            or isinstance(value, bool)
            or (name in override and not _is_part(value, override[name]))
        ):
            continue
        elif isinstance(value, PretrainedConfig):
            sizes[name] = shrunken(value, override.pop(name, None))
        elif name == "pad_token_id" and value is None:
            sizes[name] = IDS["pad"]
        elif isinstance(value, int):
            sizes[name] = _id(name, ids) if _is_id(name) else _size(name, value, in_stages)
        elif name == "rope_parameters" and isinstance(value, dict) and "rope_theta" in value:
            sizes[name] = {**value, "mrope_section": _sections(value.get("partial_rotary_factor", 1.0))}
        elif isinstance(value, (list, tuple)) and value and not isinstance(value[0], (str, dict)):
            sizes[name] = _sequence(name, value, config)
    if vars(config).get("head_dim") is not None and vars(config).get("head_dim") == vars(config).get(
        "qk_rope_head_dim"
    ):
        sizes["head_dim"] = sizes["qk_rope_head_dim"]  # latent attention: the head of the rotary part
    changed = {name: value for name, value in sizes.items() if value is not None}
    return type(config)(**{**changed, **override})


def _is_part(value: Any, override: Any) -> bool:
    """Whether an override changes some keys of a sub-configuration, rather than naming another one."""
    return isinstance(value, PretrainedConfig) and isinstance(override, dict) and "model_type" not in override


def _sections(share: float) -> list[int]:
    """Of half a head of 16, or of the share that rotates: three parts, which models of several axes split it into."""
    half = int(HIDDEN // HEADS // 2 * share)
    return [half - 2 * (half // 3), half // 3, half // 3]


def _is_id(name: str) -> bool:
    return name.endswith(("_token_id", "_token_index", "_token_ids"))


def _id(name: str, others: Any) -> int:
    stem = re.sub(r"_token_(id|index|ids)$", "", name)
    return IDS[stem] if stem in IDS else next(others)


def _size(name: str, value: int, in_stages: bool) -> int | None:
    if name == "patch_size" and value > 8:
        return 8
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            if size < 0:
                return None
            if in_stages and size in (HIDDEN, WIDE) and value >= 32:
                return scaled(value)
            return min(value, size) if value > 0 else None
    return None


def scaled(value: int) -> int:
    """An eighth, for widths of stages, which stay in proportion."""
    return max(value // 8, 4) if value >= 32 else value


def _sequence(name: str, values: Any, config: PretrainedConfig) -> Any:
    if re.fullmatch(r"depths|stage_num_blocks|num_block_repeats|blocks_per_stage|stage_numb_of_layers", name):
        return [min(v, 1) for v in values]
    if name in ("image_size",):
        return [32 for _ in values]
    if name in ("patch_size",) and max(values) > 8 and all(isinstance(v, int) for v in values):
        return [min(v, 8) for v in values]
    if re.fullmatch(r"(\w+_)?(hidden_sizes|conv_dim|tdnn_dim|\w*channels|embed_dims?|embed_dim_per_stage)", name):
        return list(map(scaled, values)) if all(isinstance(v, int) for v in values) else None
    return None


Override = dict[str, Any] | Callable[[], PretrainedConfig]

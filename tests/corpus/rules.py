"""What the general rules cannot know of some model types: `with` goes into the config that is made small, `set` into
the small one."""

from __future__ import annotations

from typing import Any

_VOCABULARY_MAP = {f"IMGIMG{chr(65 + number // 10)}{chr(65 + number % 10)}Z": 36 + number for number in range(60)}

RULES: dict[str, dict[str, Any]] = {
    "mllama": {"set": {"vision_config": {"vision_output_dim": 96}}},
    "chameleon": {"set": {"vocabulary_map": {"<image>": 4, **_VOCABULARY_MAP}, "vq_config": {"num_embeddings": 60}}},
    "emu3": {
        "set": {
            "vocabulary_map": {
                "<image>": 4,
                "<|extra_200|>": 5,
                **{f"<|visual token {number:06d}|>": 36 + number for number in range(60)},
            },
            "vq_config": {"codebook_size": 60, "hidden_size": 128},
        }
    },
    "janus_vqgan": {"set": {"num_patches": 2}},
    "mobilebert": {"set": {"initializer_range": 0.02}},
    "bamba": {"set": {"attn_layer_indices": [1]}},
    "rwkv": {"set": {"rescale_every": 0}},  # else it divides its weights in place
    "gpt_neo": {"set": {"attention_types": [[["global", "local"], 1]], "num_layers": 2}},
    "esm": {"set": {"pad_token_id": 1, "mask_token_id": 4, "vocab_size": 100}},
    "lilt": {"set": {"hidden_size": 48}},
    "xmod": {"set": {"default_language": "en_XX"}},
    "dots1": {"set": {"n_routed_experts": 4, "n_shared_experts": 1}},
    "ernie4_5_moe": {"set": {"moe_k": 2}},
    "mamba2": {"set": {"num_heads": 8, "head_dim": 8, "n_groups": 2}},
    "recurrent_gemma": {"set": {"num_hidden_layers": 3}},
    "xlstm": {"set": {"num_heads": 4, "chunk_size": 4, "use_cache": False}},
    "cvt": {"set": {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}},
    "pvt": {"set": {"image_size": 64, "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4]}},
    "dbrx": {
        "set": {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        }
    },
    "granitemoehybrid": {"set": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2}},
    "lfm2_moe": {"set": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}},
    "zamba": {
        "set": {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
            "num_key_value_heads": 4,
        }
    },
    "hgnet_v2": {
        "set": {
            "embedding_size": 8,
            "stem_channels": [3, 8, 8],
            "stage_in_channels": [8, 16, 24, 32],
            "stage_mid_channels": [8, 8, 8, 8],
            "stage_out_channels": [16, 24, 32, 32],
            "stage_num_blocks": [1, 1, 1, 1],
            "stage_numb_of_layers": [2, 2, 2, 2],
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 24, 32, 32],
        }
    },
    "levit": {
        "set": {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        }
    },
    "textnet": {
        "set": {
            "stem_out_channels": 8,
            "hidden_sizes": [8, 8, 16, 24, 32],
            "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3], [1, 3]], [[3, 3], [3, 1]], [[3, 3]]],
            "conv_layer_strides": [[2], [2, 1], [2, 1], [2]],
        }
    },
    "groupvit": {
        "set": {
            "vision_config": {
                "num_hidden_layers": 3,
                "depths": [1, 1, 1],
                "num_group_tokens": [4, 2, 0],
                "num_output_groups": [4, 2, 2],
            }
        }
    },
    "lw_detr": {"set": {"projector_scale_factors": [1.0]}},
    "univnet": {"set": {"model_in_channels": 8, "model_hidden_channels": 8, "kernel_predictor_hidden_channels": 8}},
}

"""Small random models of the transformers package, one for each architecture that the runtime is tested on.

Every model has a few layers of a few dozen units and less than 3 MB of weights, and its forward repeats bit
for bit. transformers is imported by the first construction, not by this module: naming the cases is cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]

_VOCABULARY = 99
_N_SEQUENCES = 2
_N_TOKENS = 12


@dataclass(frozen=True, eq=False)
class Case:
    """One architecture, small enough to run whole.

    Attributes:
        name: The model type, as transformers spells it in a config.
        family: Which inputs it takes and what it is built from, for reports.
        construct: Builds the model as a user would: random weights, no seed, in training mode.
        inputs: Makes the keyword arguments of a forward, the same values at every call.
    """

    name: str
    family: str
    construct: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]

    def build(self) -> nn.Module:
        """Constructs the model in evaluation mode, with the same weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.construct().eval()


def outputs(y: object) -> list[torch.Tensor]:
    """Lists the tensors in what a model returns, in order.

    Key-value caches and recurrent states are left out: they are objects of many classes, and the logits
    already depend on what they hold.
    """
    if isinstance(y, torch.Tensor):
        return [y]
    if isinstance(y, Mapping):
        y = tuple(y.values())
    if isinstance(y, tuple | list):
        return [tensor for part in y for tensor in outputs(part)]
    return []


# Inputs. Each maker has a generator of its own: neither the global seed nor the order of the tests matters.


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _ids(n_tokens: int = _N_TOKENS) -> torch.Tensor:
    # The ids below 5 are left to padding and the other special tokens.
    return torch.randint(5, _VOCABULARY, (_N_SEQUENCES, n_tokens), generator=_generator())


def _tokens(n_tokens: int = _N_TOKENS) -> Inputs:
    """Two sequences, the second one padded on the right, as batches of text are."""
    attention_mask = torch.ones(_N_SEQUENCES, n_tokens, dtype=torch.long)
    attention_mask[1, -3:] = 0
    return {"input_ids": _ids(n_tokens), "attention_mask": attention_mask}


def _bare_tokens() -> Inputs:
    return {"input_ids": _ids()}


def _tokens_one_global() -> Inputs:
    """Tokens that attend to their neighbours, except the first one, which attends to all."""
    global_attention_mask = torch.zeros(_N_SEQUENCES, _N_TOKENS, dtype=torch.long)
    global_attention_mask[:, 0] = 1
    return {**_tokens(), "global_attention_mask": global_attention_mask}


def _tokens_and_entities() -> Inputs:
    """Tokens, and two entities with the positions of the tokens that mention them."""
    return {
        **_tokens(),
        "entity_ids": torch.tensor([[5, 6], [7, 8]]),
        "entity_position_ids": torch.tensor([[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
        "entity_attention_mask": torch.ones(_N_SEQUENCES, 2, dtype=torch.long),
    }


def _tokens_and_decoder() -> Inputs:
    return {**_tokens(), "decoder_input_ids": _ids(7)}


def _tokens_one_global_and_decoder() -> Inputs:
    return {**_tokens_one_global(), "decoder_input_ids": _ids(7)}


def _pixels(side: int = 32) -> Inputs:
    return {"pixel_values": torch.randn(_N_SEQUENCES, 3, side, side, generator=_generator())}


def _pixels_and_noise() -> Inputs:
    """Images, and the noise by which a masked autoencoder would choose patches at random."""
    return {**_pixels(), "noise": torch.rand(_N_SEQUENCES, 16, generator=_generator())}


def _frames(side: int = 16) -> Inputs:
    return {"pixel_values": torch.randn(_N_SEQUENCES, 4, 3, side, side, generator=_generator())}


def _tokens_and_pixels() -> Inputs:
    return {**_tokens(), **_pixels()}


def _tokens_and_regions(n_regions: int = 5) -> Inputs:
    visual_embeds = torch.randn(_N_SEQUENCES, n_regions, 24, generator=_generator())
    return {**_tokens(), "visual_embeds": visual_embeds}


def _tokens_and_located_regions(n_regions: int = 5) -> Inputs:
    boxes = torch.rand(_N_SEQUENCES, n_regions, 4, generator=_generator())
    features = torch.randn(_N_SEQUENCES, n_regions, 24, generator=_generator())
    return {**_tokens(), "visual_feats": features, "visual_pos": boxes}


def _tokens_around_images(n_patches: int = 16, image_token: int = 4) -> Inputs:
    """Text in which a run of image tokens stands for the patches of one image."""
    text = _ids()
    image = torch.full((_N_SEQUENCES, n_patches), image_token)
    return {"input_ids": torch.cat([text[:, :3], image, text[:, 3:]], dim=1), **_pixels()}


def _tokens_and_boxes() -> Inputs:
    corners = torch.randint(0, 50, (_N_SEQUENCES, _N_TOKENS, 2), generator=_generator())
    return {**_tokens(), "bbox": torch.cat([corners, corners + 9], dim=-1)}


def _waveform(n_samples: int = 1200) -> Inputs:
    return {"input_values": torch.randn(_N_SEQUENCES, n_samples, generator=_generator())}


def _waveform_and_decoder(n_samples: int = 1200) -> Inputs:
    return {**_waveform(n_samples), "decoder_input_ids": _ids(7)}


def _mono(n_samples: int = 320) -> Inputs:
    return {"input_values": torch.randn(_N_SEQUENCES, 1, n_samples, generator=_generator())}


def _mel_and_noise() -> Inputs:
    noise = torch.randn(_N_SEQUENCES, 10, 8, generator=_generator())
    return {**_spectrogram(10, 16), "noise_sequence": noise}


def _spectrogram(n_frames: int, n_bins: int, name: str = "input_features") -> Inputs:
    return {name: torch.randn(_N_SEQUENCES, n_frames, n_bins, generator=_generator())}


def _spectrogram_and_decoder(n_frames: int, n_bins: int) -> Inputs:
    return {**_spectrogram(n_frames, n_bins), "decoder_input_ids": _ids(7)}


def _series() -> Inputs:
    return {"past_values": torch.randn(_N_SEQUENCES, 32, 3, generator=_generator())}


def _trajectory(n_steps: int = 6) -> Inputs:
    """Returns, states and actions, step by step, as a decision transformer reads them."""
    values = torch.randn(_N_SEQUENCES, n_steps, 9, generator=_generator())
    return {
        "states": values[..., :5],
        "actions": values[..., 5:8],
        "returns_to_go": values[..., 8:],
        "timesteps": torch.arange(n_steps).expand(_N_SEQUENCES, -1),
    }


# Configs. The sizes below apply to every config that has a field of the name.

# At the usual 0.02 the signal of so narrow a model dies out: some convolutional ones would return only zeros.
_LIVELY: dict[str, Any] = {"initializer_range": 0.2, "init_std": 0.2, "layer_scale_init_value": 0.5}
_SMALL: dict[str, Any] = {
    **_LIVELY,
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "embedding_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 3,
    "sep_token_id": 4,
    "mask_token_id": 4,
}
_SMALL_ENCODER_DECODER: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
}
_SMALL_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_SMALL_VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8}
_SMALL_AUDIO: dict[str, Any] = {
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 4, 2),
    "conv_kernel": (10, 4, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


def _construct(architecture: str, defaults: dict[str, Any], config: dict[str, Any]) -> nn.Module:
    import transformers

    model_class = getattr(transformers, architecture)
    config_class = model_class.config_class
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map, "num_labels"}
    if unknown := config.keys() - known:
        # A config keeps any name that it is given, so a misspelt size would leave a model of full size.
        raise TypeError(f"{config_class.__name__} has no field {sorted(unknown)}, given for {architecture}.")
    fitting = {name: value for name, value in defaults.items() if name in known}
    model: nn.Module = model_class(config_class(**{**fitting, **config}))
    return model


def _case(
    family: str,
    defaults: dict[str, Any],
    default_inputs: Callable[[], Inputs],
    name: str,
    architecture: str,
    inputs: Callable[[], Inputs] | None = None,
    **config: Any,
) -> Case:
    """Makes one row of the table: `config` replaces the sizes that the family's defaults give."""
    return Case(name, family, partial(_construct, architecture, defaults, config), inputs or default_inputs)


_decoder = partial(_case, "decoder", _SMALL, _tokens)
_encoder = partial(_case, "encoder", _SMALL, _tokens)
_encoder_decoder = partial(_case, "encoder-decoder", _SMALL | _SMALL_ENCODER_DECODER, _tokens_and_decoder)
_experts = partial(_case, "experts", _SMALL | _SMALL_EXPERTS, _tokens)
_recurrent = partial(_case, "recurrent", _SMALL, _tokens)
_vision = partial(_case, "vision", _SMALL | _SMALL_VISION, _pixels)
_stages = partial(_case, "vision", {"image_size": 32, **_LIVELY}, _pixels)
_large_stages = partial(_case, "vision", {"image_size": 64, **_LIVELY}, partial(_pixels, 64))
_multimodal = partial(_case, "multimodal", _SMALL, _tokens_and_pixels)
_audio = partial(_case, "audio", _SMALL | _SMALL_AUDIO, _waveform)
_speech_to_text = partial(
    _case, "audio", _SMALL | _SMALL_AUDIO | _SMALL_ENCODER_DECODER, partial(_spectrogram_and_decoder, 32, 16)
)
_series_model = partial(_case, "series", _SMALL, _series)

_DECODERS = (
    _decoder("apertus", "ApertusForCausalLM"),
    _decoder("arcee", "ArceeForCausalLM"),
    _decoder("biogpt", "BioGptForCausalLM"),
    _decoder("bitnet", "BitNetForCausalLM"),
    _decoder("bloom", "BloomForCausalLM"),
    _decoder("codegen", "CodeGenForCausalLM", rotary_dim=4),
    _decoder("cohere", "CohereForCausalLM"),
    _decoder("cohere2", "Cohere2ForCausalLM", sliding_window=8),
    _decoder("ctrl", "CTRLLMHeadModel", dff=64),
    _decoder("diffllama", "DiffLlamaForCausalLM"),
    _decoder("ernie4_5", "Ernie4_5ForCausalLM"),
    _decoder("exaone4", "Exaone4ForCausalLM", sliding_window=8),
    _decoder("falcon", "FalconForCausalLM"),
    _decoder("gemma", "GemmaForCausalLM"),
    _decoder("gemma2", "Gemma2ForCausalLM", sliding_window=8),
    _decoder("gemma3_text", "Gemma3ForCausalLM", sliding_window=8),
    _decoder("glm", "GlmForCausalLM"),
    _decoder("glm4", "Glm4ForCausalLM"),
    _decoder("gpt2", "GPT2LMHeadModel"),
    _decoder("gpt_bigcode", "GPTBigCodeForCausalLM"),
    _decoder("gpt_neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]], window_size=8),
    _decoder("gpt_neox", "GPTNeoXForCausalLM"),
    _decoder("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM"),
    _decoder("gptj", "GPTJForCausalLM", rotary_dim=4),
    _decoder("granite", "GraniteForCausalLM"),
    _decoder("helium", "HeliumForCausalLM"),
    _decoder("imagegpt", "ImageGPTForCausalImageModeling", inputs=_bare_tokens),
    _decoder("llama", "LlamaForCausalLM"),
    _decoder("mistral", "MistralForCausalLM", sliding_window=8),
    _decoder("modernbert-decoder", "ModernBertDecoderForCausalLM"),
    _decoder("mpt", "MptForCausalLM"),
    _decoder("nemotron", "NemotronForCausalLM"),
    _decoder("olmo", "OlmoForCausalLM"),
    _decoder("olmo2", "Olmo2ForCausalLM"),
    _decoder("olmo3", "Olmo3ForCausalLM", sliding_window=8),
    _decoder("openai-gpt", "OpenAIGPTLMHeadModel"),
    _decoder("opt", "OPTForCausalLM", ffn_dim=64, word_embed_proj_dim=16),
    _decoder("persimmon", "PersimmonForCausalLM"),
    _decoder("phi", "PhiForCausalLM"),
    _decoder("phi3", "Phi3ForCausalLM"),
    _decoder("qwen2", "Qwen2ForCausalLM"),
    _decoder("qwen3", "Qwen3ForCausalLM"),
    _decoder("seed_oss", "SeedOssForCausalLM"),
    _decoder("smollm3", "SmolLM3ForCausalLM"),
    _decoder("stablelm", "StableLmForCausalLM"),
    _decoder("starcoder2", "Starcoder2ForCausalLM"),
    _decoder("xglm", "XGLMForCausalLM", ffn_dim=64),
)

_ENCODERS = (
    _encoder("albert", "AlbertForMaskedLM", embedding_size=16),
    _encoder("bert", "BertForMaskedLM"),
    _encoder("bert-generation", "BertGenerationEncoder"),
    _encoder("big_bird", "BigBirdForMaskedLM", attention_type="original_full"),
    _encoder("bros", "BrosModel", inputs=_tokens_and_boxes, hidden_size=64),
    _encoder("camembert", "CamembertForMaskedLM"),
    _encoder("canine", "CanineModel", num_hash_buckets=64),
    _encoder("convbert", "ConvBertForMaskedLM"),
    _encoder("data2vec-text", "Data2VecTextForMaskedLM"),
    _encoder("deberta", "DebertaForMaskedLM", relative_attention=True, pos_att_type="c2p|p2c"),
    _encoder("deberta-v2", "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type="c2p|p2c"),
    _encoder("distilbert", "DistilBertForMaskedLM", hidden_dim=64),
    _encoder("electra", "ElectraForMaskedLM", embedding_size=16),
    _encoder("ernie", "ErnieForMaskedLM"),
    _encoder("esm", "EsmForMaskedLM", position_embedding_type="rotary"),
    _encoder("eurobert", "EuroBertForMaskedLM"),
    _encoder("flaubert", "FlaubertWithLMHeadModel"),
    _encoder("fnet", "FNetForMaskedLM", inputs=_bare_tokens),
    _encoder("funnel", "FunnelForMaskedLM", block_sizes=(1, 1), num_decoder_layers=1, d_head=8, d_inner=64),
    _encoder("ibert", "IBertForMaskedLM"),
    _encoder("layoutlm", "LayoutLMForMaskedLM", inputs=_tokens_and_boxes),
    _encoder("lilt", "LiltModel", inputs=_tokens_and_boxes, hidden_size=48),
    _encoder("longformer", "LongformerForMaskedLM", inputs=_tokens_one_global, attention_window=4),
    _encoder("luke", "LukeModel", inputs=_tokens_and_entities, entity_vocab_size=16, entity_emb_size=16),
    _encoder("markuplm", "MarkupLMModel", max_depth=4, xpath_unit_hidden_size=8),
    _encoder("megatron-bert", "MegatronBertForMaskedLM"),
    _encoder("mobilebert", "MobileBertForMaskedLM", embedding_size=16, intra_bottleneck_size=16),
    _encoder("modernbert", "ModernBertForMaskedLM"),
    _encoder("mpnet", "MPNetForMaskedLM"),
    _encoder("nomic_bert", "NomicBertModel"),
    _encoder("nystromformer", "NystromformerForMaskedLM", num_landmarks=_N_TOKENS, segment_means_seq_len=_N_TOKENS),
    _encoder(
        "perceiver",
        "PerceiverForMaskedLM",
        inputs=partial(_tokens, 64),
        d_model=32,
        d_latents=32,
        num_latents=8,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        qk_channels=32,
        v_channels=32,
    ),
    _encoder("rembert", "RemBertForMaskedLM", input_embedding_size=16, output_embedding_size=24),
    _encoder("roberta", "RobertaForMaskedLM"),
    _encoder("roberta-prelayernorm", "RobertaPreLayerNormForMaskedLM"),
    _encoder(
        "roc_bert",
        "RoCBertForMaskedLM",
        pronunciation_vocab_size=16,
        pronunciation_embed_dim=16,
        shape_vocab_size=16,
        shape_embed_dim=16,
    ),
    _encoder("roformer", "RoFormerForMaskedLM"),
    _encoder("splinter", "SplinterModel"),
    _encoder("squeezebert", "SqueezeBertForMaskedLM"),
    _encoder("tapas", "TapasModel"),
    _encoder("xlm", "XLMWithLMHeadModel"),
    _encoder("xlm-roberta", "XLMRobertaForMaskedLM"),
    _encoder("xlm-roberta-xl", "XLMRobertaXLForMaskedLM"),
    _encoder("xlnet", "XLNetLMHeadModel", d_head=8, d_inner=64),
    _encoder("xmod", "XmodForMaskedLM", default_language="en_XX"),
    _encoder("yoso", "YosoForMaskedLM"),
)

_ENCODER_DECODERS = (
    _encoder_decoder("bart", "BartForConditionalGeneration"),
    _encoder_decoder("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", attention_type="original_full"),
    _encoder_decoder("blenderbot", "BlenderbotForConditionalGeneration"),
    _encoder_decoder("blenderbot-small", "BlenderbotSmallForConditionalGeneration"),
    _encoder_decoder("fsmt", "FSMTForConditionalGeneration", src_vocab_size=99, tgt_vocab_size=99),
    _encoder_decoder("led", "LEDForConditionalGeneration", inputs=_tokens_one_global_and_decoder, attention_window=4),
    _encoder_decoder("longt5", "LongT5ForConditionalGeneration", local_radius=3),
    _encoder_decoder("m2m_100", "M2M100ForConditionalGeneration"),
    _encoder_decoder("marian", "MarianMTModel"),
    _encoder_decoder("mbart", "MBartForConditionalGeneration"),
    _encoder_decoder("mt5", "MT5ForConditionalGeneration"),
    _encoder_decoder("mvp", "MvpForConditionalGeneration"),
    _encoder_decoder("nllb-moe", "NllbMoeForConditionalGeneration", num_experts=4, expert_capacity=16),
    _encoder_decoder("pegasus", "PegasusForConditionalGeneration"),
    _encoder_decoder("pegasus_x", "PegasusXForConditionalGeneration"),
    _encoder_decoder("plbart", "PLBartForConditionalGeneration"),
    _encoder_decoder(
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        num_encoder_layers=2,
        num_decoder_attention_heads=4,
    ),
    _encoder_decoder("switch_transformers", "SwitchTransformersForConditionalGeneration", num_experts=4),
    _encoder_decoder("t5", "T5ForConditionalGeneration"),
    _encoder_decoder("umt5", "UMT5ForConditionalGeneration"),
)

_EXPERTS = (
    _experts(
        "dbrx",
        "DbrxForCausalLM",
        d_model=32,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    ),
    _experts(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        head_dim=8,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    _experts(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    _experts("dots1", "Dots1ForCausalLM"),
    _experts("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    _experts("flex_olmo", "FlexOlmoForCausalLM"),
    _experts("glm4_moe", "Glm4MoeForCausalLM"),
    _experts("gpt_oss", "GptOssForCausalLM", sliding_window=8),
    _experts("granitemoe", "GraniteMoeForCausalLM"),
    _experts("granitemoeshared", "GraniteMoeSharedForCausalLM"),
    _experts("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    _experts("jetmoe", "JetMoeForCausalLM"),
    _experts("minimax", "MiniMaxForCausalLM"),
    _experts("mixtral", "MixtralForCausalLM"),
    _experts("olmoe", "OlmoeForCausalLM"),
    _experts("phimoe", "PhimoeForCausalLM"),
    _experts("qwen2_moe", "Qwen2MoeForCausalLM"),
    _experts("qwen3_moe", "Qwen3MoeForCausalLM"),
)

_MAMBA_MIXER: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}

_RECURRENT = (
    _recurrent("bamba", "BambaForCausalLM", attn_layer_indices=[1], **_MAMBA_MIXER),
    _recurrent("falcon_h1", "FalconH1ForCausalLM", mamba_d_ssm=64, **_MAMBA_MIXER),
    _recurrent("falcon_mamba", "FalconMambaForCausalLM", state_size=4),
    _recurrent(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        layer_types=["mamba", "attention"],
        shared_intermediate_size=32,
        num_local_experts=4,
        **_MAMBA_MIXER,
    ),
    _recurrent("jamba", "JambaForCausalLM", num_experts=4, attn_layer_period=2, attn_layer_offset=1),
    _recurrent("lfm2", "Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
    _recurrent(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        layer_types=["conv", "full_attention"],
        num_experts=4,
        num_experts_per_tok=2,
        num_dense_layers=1,
        moe_intermediate_size=32,
    ),
    _recurrent("mamba", "MambaForCausalLM", state_size=4),
    _recurrent("mamba2", "Mamba2ForCausalLM", num_heads=8, head_dim=8, n_groups=2, state_size=8, chunk_size=8),
    _recurrent(
        "nemotron_h",
        "NemotronHForCausalLM",
        layers_block_type=["mamba", "attention", "moe"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=4,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
    ),
    _recurrent(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    _recurrent("recurrent_gemma", "RecurrentGemmaForCausalLM", num_hidden_layers=3, attention_window_size=8),
    # With rescaling, it divides its weights in place in its first pass.
    _recurrent("rwkv", "RwkvForCausalLM", inputs=_bare_tokens, rescale_every=0),
    _recurrent("xlstm", "xLSTMForCausalLM", inputs=_bare_tokens, num_heads=4, chunk_size=4, use_cache=False),
    _recurrent(
        "zamba",
        "ZambaForCausalLM",
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "hybrid"],
        head_dim=16,
        num_key_value_heads=4,
        mamba_d_state=8,
    ),
    _recurrent(
        "zamba2",
        "Zamba2ForCausalLM",
        layers_block_type=["mamba", "hybrid"],
        head_dim=16,
        num_key_value_heads=4,
        mamba_d_state=8,
        chunk_size=8,
    ),
)

_FOUR_STAGES: dict[str, Any] = {"hidden_sizes": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}
_FOUR_ATTENTION_STAGES: dict[str, Any] = {**_FOUR_STAGES, "num_attention_heads": (1, 2, 2, 4)}
_SHIFTED_WINDOWS: dict[str, Any] = {
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "patch_size": 2,
}
_VIDEO: dict[str, Any] = {"image_size": 16, "num_frames": 4}

_VISION = (
    _vision("beit", "BeitForImageClassification", use_relative_position_bias=True),
    _stages("bit", "BitForImageClassification", embedding_size=8, num_groups=4, **_FOUR_STAGES),
    _stages("convnext", "ConvNextForImageClassification", **_FOUR_STAGES),
    _stages("convnextv2", "ConvNextV2ForImageClassification", **_FOUR_STAGES),
    _large_stages("cvt", "CvtForImageClassification", embed_dim=(8, 16, 32), num_heads=(1, 2, 4), depth=(1, 2, 3)),
    _vision("data2vec-vision", "Data2VecVisionForImageClassification"),
    _vision("deit", "DeiTForImageClassification"),
    _vision("dinov2", "Dinov2ForImageClassification"),
    _vision("dinov2_with_registers", "Dinov2WithRegistersForImageClassification"),
    _vision("dinov3_vit", "DINOv3ViTModel", num_register_tokens=2),
    _stages("donut-swin", "DonutSwinModel", **_SHIFTED_WINDOWS),
    _large_stages(
        "efficientnet",
        "EfficientNetForImageClassification",
        initializer_range=0.7,
        width_coefficient=0.1,
        depth_coefficient=0.5,
        hidden_dim=128,
    ),
    _stages("focalnet", "FocalNetForImageClassification", embed_dim=8, **_FOUR_STAGES),
    _large_stages("glpn", "GLPNForDepthEstimation", decoder_hidden_size=16, **_FOUR_ATTENTION_STAGES),
    _stages(
        "hgnet_v2",
        "HGNetV2ForImageClassification",
        embedding_size=8,
        stem_channels=(3, 8, 8),
        stage_in_channels=(8, 16, 24, 32),
        stage_mid_channels=(8, 8, 8, 8),
        stage_out_channels=(16, 24, 32, 32),
        stage_num_blocks=(1, 1, 1, 1),
        stage_numb_of_layers=(2, 2, 2, 2),
        depths=(1, 1, 1, 1),
        hidden_sizes=(16, 24, 32, 32),
    ),
    _vision(
        "hiera",
        "HieraForImageClassification",
        image_size=(32, 32),
        patch_size=(7, 7),
        embed_dim=8,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
    ),
    _vision("ijepa", "IJepaForImageClassification"),
    _large_stages(
        "levit",
        "LevitForImageClassification",
        hidden_sizes=(16, 24, 32),
        num_attention_heads=(2, 3, 4),
        depths=(1, 1, 1),
        key_dim=(8, 8, 8),
    ),
    _stages("mobilenet_v1", "MobileNetV1ForImageClassification", depth_multiplier=0.25),
    _stages("mobilenet_v2", "MobileNetV2ForImageClassification", depth_multiplier=0.25),
    _large_stages(
        "mobilevit",
        "MobileViTForImageClassification",
        initializer_range=0.4,
        hidden_sizes=(16, 24, 32),
        neck_hidden_sizes=(8, 8, 16, 16, 24, 24, 32),
    ),
    _large_stages("mobilevitv2", "MobileViTV2ForImageClassification", width_multiplier=0.25),
    _large_stages("poolformer", "PoolFormerForImageClassification", **_FOUR_STAGES),
    _large_stages("pvt", "PvtForImageClassification", **_FOUR_ATTENTION_STAGES),
    _large_stages("pvt_v2", "PvtV2ForImageClassification", **_FOUR_ATTENTION_STAGES),
    _stages("regnet", "RegNetForImageClassification", groups_width=4, embedding_size=8, **_FOUR_STAGES),
    _stages("resnet", "ResNetForImageClassification", embedding_size=8, **_FOUR_STAGES),
    _large_stages("segformer", "SegformerForSemanticSegmentation", decoder_hidden_size=16, **_FOUR_ATTENTION_STAGES),
    _stages(
        "superpoint",
        "SuperPointForKeypointDetection",
        encoder_hidden_sizes=(8, 8, 16, 16),
        decoder_hidden_size=16,
        descriptor_decoder_dim=16,
    ),
    _stages("swiftformer", "SwiftFormerForImageClassification", embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    _stages("swin", "SwinForImageClassification", **_SHIFTED_WINDOWS),
    _stages(
        "swin2sr",
        "Swin2SRForImageSuperResolution",
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
    ),
    _stages("swinv2", "Swinv2ForImageClassification", **_SHIFTED_WINDOWS),
    _stages(
        "textnet",
        "TextNetForImageClassification",
        stem_out_channels=8,
        hidden_sizes=(8, 8, 16, 24, 32),
        conv_layer_kernel_sizes=[[[3, 3]], [[3, 3], [1, 3]], [[3, 3], [3, 1]], [[3, 3]]],
        conv_layer_strides=[[2], [2, 1], [2, 1], [2]],
    ),
    _vision("timesformer", "TimesformerForVideoClassification", inputs=_frames, **_VIDEO),
    _vision("videomae", "VideoMAEForVideoClassification", inputs=_frames, **_VIDEO),
    _vision("vit", "ViTForImageClassification"),
    _vision("vit_mae", "ViTMAEModel", inputs=_pixels_and_noise),
    _vision("vit_msn", "ViTMSNForImageClassification"),
    _vision(
        "vitdet",
        "VitDetModel",
        window_block_indices=(0,),
        window_size=2,
        use_relative_position_embeddings=True,
        pretrain_image_size=32,
    ),
    _vision("vivit", "VivitForVideoClassification", inputs=_frames, tubelet_size=(2, 8, 8), **_VIDEO),
    _vision("yolos", "YolosForObjectDetection", image_size=[32, 32], num_detection_tokens=5),
)

_SMALL_TOWER: dict[str, Any] = {
    "initializer_range": 0.2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT_TOWER = _SMALL_TOWER | {
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION_TOWER = _SMALL_TOWER | _SMALL_VISION
_TWO_TOWERS: dict[str, Any] = {"text_config": _TEXT_TOWER, "vision_config": _VISION_TOWER}

_MULTIMODAL = (
    _multimodal("altclip", "AltCLIPModel", projection_dim=16, **_TWO_TOWERS),
    _multimodal("blip", "BlipForConditionalGeneration", projection_dim=16, **_TWO_TOWERS),
    _multimodal("chinese_clip", "ChineseCLIPModel", projection_dim=16, **_TWO_TOWERS),
    _multimodal("clip", "CLIPModel", projection_dim=16, **_TWO_TOWERS),
    _multimodal("clipseg", "CLIPSegModel", projection_dim=16, **_TWO_TOWERS),
    _multimodal("git", "GitForCausalLM", vision_config=_VISION_TOWER),
    _multimodal(
        "groupvit",
        "GroupViTModel",
        projection_dim=16,
        projection_intermediate_dim=32,
        text_config=_TEXT_TOWER,
        vision_config=_VISION_TOWER
        | {
            "num_hidden_layers": 3,
            "depths": (1, 1, 1),
            "num_group_tokens": (4, 2, 0),
            "num_output_groups": (4, 2, 2),
        },
    ),
    _multimodal(
        "llava",
        "LlavaForConditionalGeneration",
        inputs=_tokens_around_images,
        image_token_index=4,
        image_seq_length=16,
        text_config=_TEXT_TOWER | {"model_type": "llama"},
        vision_config=_VISION_TOWER | {"model_type": "clip_vision_model"},
    ),
    _multimodal(
        "lxmert",
        "LxmertModel",
        inputs=_tokens_and_located_regions,
        l_layers=1,
        x_layers=1,
        r_layers=1,
        visual_feat_dim=24,
    ),
    _multimodal("owlvit", "OwlViTModel", projection_dim=16, **_TWO_TOWERS),
    _multimodal("siglip", "SiglipModel", **_TWO_TOWERS),
    _multimodal("visual_bert", "VisualBertModel", inputs=_tokens_and_regions, visual_embedding_dim=24),
)

_AUDIO = (
    _audio(
        "audio-spectrogram-transformer",
        "ASTForAudioClassification",
        inputs=partial(_spectrogram, 32, 16, "input_values"),
        patch_size=8,
        max_length=32,
        num_mel_bins=16,
    ),
    _audio(
        "dac",
        "DacModel",
        inputs=_mono,
        encoder_hidden_size=8,
        decoder_hidden_size=32,
        downsampling_ratios=(2, 4),
        n_codebooks=2,
        codebook_size=16,
    ),
    _audio("data2vec-audio", "Data2VecAudioModel"),
    _audio(
        "encodec",
        "EncodecModel",
        inputs=_mono,
        num_filters=4,
        upsampling_ratios=(4, 2),
        codebook_size=16,
        codebook_dim=32,
    ),
    _audio("hubert", "HubertModel"),
    _audio(
        "moonshine",
        "MoonshineForConditionalGeneration",
        inputs=partial(_waveform_and_decoder, 2400),
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
    ),
    _audio("sew", "SEWModel"),
    _audio("sew-d", "SEWDModel"),
    _speech_to_text(
        "speech_to_text", "Speech2TextForConditionalGeneration", conv_channels=32, input_feat_per_channel=16
    ),
    _speech_to_text("speecht5", "SpeechT5ForSpeechToText", inputs=_waveform_and_decoder),
    _audio("unispeech", "UniSpeechModel"),
    _audio("unispeech-sat", "UniSpeechSatModel"),
    _audio(
        "univnet",
        "UnivNetModel",
        inputs=_mel_and_noise,
        model_in_channels=8,
        model_hidden_channels=8,
        num_mel_bins=16,
        kernel_predictor_hidden_channels=8,
    ),
    _audio("wav2vec2", "Wav2Vec2Model"),
    _audio(
        "wav2vec2-bert",
        "Wav2Vec2BertModel",
        inputs=partial(_spectrogram, 32, 16),
        feature_projection_input_dim=16,
    ),
    _audio("wav2vec2-conformer", "Wav2Vec2ConformerModel"),
    _audio("wavlm", "WavLMModel"),
    _speech_to_text(
        "whisper",
        "WhisperForConditionalGeneration",
        inputs=partial(_spectrogram_and_decoder, 16, 64),
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
    ),
)

_SERIES = (
    _series_model(
        "decision_transformer",
        "DecisionTransformerModel",
        inputs=_trajectory,
        state_dim=5,
        act_dim=3,
        max_ep_len=16,
    ),
    _series_model("patchtsmixer", "PatchTSMixerForPrediction", num_input_channels=3),
    _series_model("patchtst", "PatchTSTForPrediction", num_input_channels=3),
)

CASES: tuple[Case, ...] = (
    *_DECODERS,
    *_ENCODERS,
    *_ENCODER_DECODERS,
    *_EXPERTS,
    *_RECURRENT,
    *_VISION,
    *_MULTIMODAL,
    *_AUDIO,
    *_SERIES,
)

# One or two of each family, chosen for what they do with weights: gpt2 and t5 tie them, albert runs one layer
# twice, mixtral routes, resnet has batch statistics, siglip has nn.MultiheadAttention, wav2vec2 a convolution
# that is parametrized, encodec an nn.LSTM.
REPRESENTATIVE: tuple[str, ...] = (
    "gpt2",
    "llama",
    "bert",
    "albert",
    "t5",
    "mixtral",
    "mamba",
    "resnet",
    "siglip",
    "wav2vec2",
    "encodec",
    "patchtst",
)

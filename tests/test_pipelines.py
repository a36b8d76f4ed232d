"""Pipelines of transformers and diffusers with `rt.module` in the place of their model give what they give without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeStore
from corpus.case import seeded
from small_models import CASES
from torch import nn

import litrt

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore")]

BUDGETS = ("min", "50%", "100%")
TEXTS = ["w7 w9 w20 w33", "w50 w8", "w11 w64 w90 w12 w12 w70"]


def tokenizer(length: int = 32) -> Any:
    """Returns a tokenizer of ninety-nine words, made without a download."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 99)}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w3"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=length,
    )


def _write(module: Any) -> Any:
    pipe = transformers.pipeline("text-generation", model=module, tokenizer=tokenizer())
    options = {"max_new_tokens": 5, "do_sample": True, "return_full_text": False, "batch_size": 2}
    transformers.set_seed(0)
    return pipe(TEXTS, **options), pipe(TEXTS[0], num_return_sequences=2, **options)


def _features(module: Any) -> Any:
    pipe = transformers.pipeline("feature-extraction", model=module, tokenizer=tokenizer())
    return pipe(TEXTS), pipe(TEXTS, batch_size=3)


def _classify(module: Any) -> Any:
    pipe = transformers.pipeline("text-classification", model=module, tokenizer=tokenizer())
    return pipe(TEXTS, top_k=None), pipe(TEXTS, batch_size=2)


PIPELINES: dict[str, tuple[str, str | None, Callable[[Any], Any]]] = {
    "text-generation": ("llama", None, _write),
    "feature-extraction": ("bert", "BertModel", _features),
    "text-classification": ("bert", "BertForSequenceClassification", _classify),
}


def constructor(architecture: str, class_name: str | None) -> Callable[[], nn.Module]:
    case = CASES[architecture]
    if class_name is None:
        return case.build

    def construct() -> nn.Module:
        with seeded():
            return getattr(transformers, class_name)(case.construct().config).eval()  # type: ignore[no-any-return]

    return construct


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines_of_texts(task: str, make_store: MakeStore) -> None:
    architecture, class_name, run = PIPELINES[task]
    construct = constructor(architecture, class_name)
    plain = construct()
    path = make_store(plain)
    expected = run(plain)
    for budget in BUDGETS:
        with litrt.Runtime(construct, path, budget=budget) as rt:
            assert run(rt.module) == expected, budget
            stats = rt.stats()
            assert (stats.n_passes > 1) == (budget != "100%"), "where all stays, passes are not seen"
            assert stats.peak_bytes <= stats.budget_bytes


def test_a_pipeline_of_images(make_store: MakeStore) -> None:
    pillow = pytest.importorskip("PIL.Image")
    images = [pillow.linear_gradient("L").convert("RGB").rotate(angle) for angle in (0, 30, 90)]
    construct = CASES["vit"].build

    def run(module: Any) -> Any:
        processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
        pipe = transformers.pipeline("image-classification", model=module, image_processor=processor)
        return pipe(images, top_k=5), pipe(images, batch_size=3)

    plain = construct()
    expected = run(plain)
    path = make_store(plain)
    for budget in BUDGETS:
        with litrt.Runtime(construct, path, budget=budget) as rt:
            assert run(rt.module) == expected, budget
            assert rt.stats().peak_bytes <= rt.stats().budget_bytes


# Stable Diffusion, small.


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def _vae() -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=16,
    )


def _text_encoder() -> nn.Module:
    torch.manual_seed(2)
    config = transformers.CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=99,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.CLIPTextModel(config).eval()  # type: ignore[no-any-return]


PARTS = {"unet": _unet, "vae": _vae, "text_encoder": _text_encoder}


def paint(**replaced: nn.Module) -> torch.Tensor:
    """Returns an image of a pipeline some of whose parts are given."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    parts = {name: replaced[name] if name in replaced else PARTS[name]() for name in PARTS}
    pipe = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer(16),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(TEXTS[0], num_inference_steps=3, output_type="pt", generator=generator, height=16, width=16).images
    assert isinstance(images, torch.Tensor)
    return images


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_stable_diffusion_streams(part: str, make_store: MakeStore) -> None:
    pytest.importorskip("diffusers")
    expected = paint()
    path = make_store(PARTS[part]())
    for budget in BUDGETS:
        with litrt.Runtime(PARTS[part], path, budget=budget) as rt:
            for _ in range(2):
                assert torch.equal(paint(**{part: rt.module}), expected), budget
            assert rt.stats().read_bytes > 0
            assert rt.stats().peak_bytes <= rt.stats().budget_bytes


def test_all_of_stable_diffusion_streams_together(make_store: MakeStore, tmp_path: Path) -> None:
    """Three runtimes; of the autoencoder the decoder alone, which is what the pipeline calls, so that it has passes."""
    pytest.importorskip("diffusers")
    expected = paint()
    unet_path, text_path = make_store(_unet(), "unet.zarr"), make_store(_text_encoder(), "text.zarr")
    vae_path = make_store(_vae().decoder, "decoder.zarr")
    with (
        litrt.Runtime(_unet, unet_path, budget="min") as unet,
        litrt.Runtime(_text_encoder, text_path, budget="50%") as text_encoder,
        litrt.Runtime(lambda: _vae().decoder, vae_path, budget="50%") as decoder,
    ):
        vae = _vae()
        vae.decoder = decoder.module
        for _ in range(3):
            images = paint(unet=unet.module, text_encoder=text_encoder.module, vae=vae)
            assert torch.equal(images, expected)
        assert unet.stats().n_passes == 9
        assert decoder.stats().n_passes == 3
        assert decoder.plan.streamed_bytes > 0

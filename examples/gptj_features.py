"""GPT-J's hidden states as features of texts: the mean over the tokens of one layer's output.

python examples/gptj_features.py --checkpoint gpt-j-6b/ --budget 6GB "a text" "another"
python examples/gptj_features.py --layers 4 --width 512          # no checkpoint: random weights of any size
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from gptj import add_model_arguments, open_model

import litrt


def main(argv: list[str] | None = None) -> torch.Tensor:
    """Computes features, and returns them, shape (texts, width)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--layer", type=int, default=-1, help="whose output to take (default: the last)")
    parser.add_argument("texts", nargs="*", default=["The sky is blue.", "The grass is green."])
    arguments = parser.parse_args(argv)

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model_ctor, store, tokenizer = open_model(arguments, Path(folder))
        features = []
        with litrt.Runtime(model_ctor, store, budget=arguments.budget) as rt:
            for number, text in enumerate(arguments.texts):
                if tokenizer is None:
                    ids = torch.tensor([list(text.encode())])
                else:
                    ids = tokenizer(text, return_tensors="pt").input_ids
                if number == 0:
                    rt.warmup(ids, output_hidden_states=True)
                    print(rt.plan)
                hidden = rt(ids, output_hidden_states=True).hidden_states[arguments.layer]
                features.append(hidden.mean(dim=1))
            print(rt.stats())
    result = torch.cat(features)
    for text, row in zip(arguments.texts, result, strict=True):
        values = ", ".join(f"{value:.3f}" for value in row[:5].tolist())
        print(f"{text!r}: {row.numel()} features, norm {row.norm():.3f}, {values}, ...")
    return result


if __name__ == "__main__":
    main()

"""GPT-J writes text inside a budget, with Hugging Face's `generate` and its key-value cache.

    python examples/gptj_generate.py --checkpoint gpt-j-6b/ --budget 6GB --prompt "In the beginning"
    python examples/gptj_generate.py --layers 4 --width 512          # no checkpoint: random weights of any size

A checkpoint is a directory with safetensors or .bin shards, a config.json and a tokenizer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from gptj import add_model_arguments, open_model

import litrt


def main(argv: list[str] | None = None) -> torch.Tensor:
    """Generates, and returns the token ids, shape (1, tokens)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--prompt", default="In the beginning")
    parser.add_argument("--tokens", type=int, default=20, help="tokens to generate (default: %(default)s)")
    arguments = parser.parse_args(argv)

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        model_ctor, store, tokenizer = open_model(arguments, Path(folder))
        if tokenizer is None:
            ids = torch.randint(0, 1000, (1, 8), generator=torch.Generator().manual_seed(0))
        else:
            ids = tokenizer(arguments.prompt, return_tensors="pt").input_ids
        with litrt.Runtime(model_ctor, store, budget=arguments.budget) as rt:
            rt.warmup(ids)
            print(rt.plan)
            before = rt.stats()
            began_s = time.perf_counter()
            generated: torch.Tensor = rt.module.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=arguments.tokens,
                do_sample=False,
                pad_token_id=0,
            )
            seconds = time.perf_counter() - began_s
            stats = rt.stats().since(before)
        n_new = generated.shape[1] - ids.shape[1]
        print(f"{n_new} tokens in {seconds:.1f} s, {seconds / max(stats.n_passes, 1):.2f} s per pass; {stats}")
        print(tokenizer.decode(generated[0]) if tokenizer is not None else generated[0].tolist())
    return generated


if __name__ == "__main__":
    main()

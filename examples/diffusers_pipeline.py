"""A diffusion pipeline whose U-Net streams: litrt's module takes the place of the pipeline's own.

    pip install diffusers
    python examples/diffusers_pipeline.py --checkpoint ddpm-celebahq-256/ --budget 200MB --out face.png
    python examples/diffusers_pipeline.py                            # no checkpoint: random weights, a small U-Net

A checkpoint is a directory of a DDPM pipeline, as diffusers saves it: unet/ and scheduler/.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import litrt

SMALL = {"sample_size": 32, "block_out_channels": (64, 128), "norm_num_groups": 8, "layers_per_block": 1}
SMALL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def main(argv: list[str] | None = None) -> torch.Tensor:
    """Paints, and returns the image, shape (1, height, width, 3)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="directory of a DDPM pipeline")
    parser.add_argument("--budget", default="40%", help="bytes of the U-Net's weights to hold (default: 40%%)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", help="a file for the image")
    arguments = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "unet.zarr"
        if arguments.checkpoint is None:
            config, scheduler = {**SMALL, **SMALL_BLOCKS}, DDPMScheduler()
            torch.manual_seed(0)
            litrt.convert(UNet2DModel.from_config(config).state_dict(), store)
        else:
            config = UNet2DModel.load_config(arguments.checkpoint / "unet")
            scheduler = DDPMScheduler.from_pretrained(arguments.checkpoint / "scheduler")
            litrt.convert(arguments.checkpoint / "unet", store)
        with litrt.Runtime(lambda: UNet2DModel.from_config(config), store, budget=arguments.budget) as rt:
            pipe = DDPMPipeline(unet=rt.module, scheduler=scheduler)
            painted = pipe(
                num_inference_steps=arguments.steps, generator=torch.Generator().manual_seed(0), output_type="np"
            ).images
            print(rt.plan)
            print(rt.stats())
    if arguments.out:
        pipe.numpy_to_pil(painted)[0].save(arguments.out)
    return torch.from_numpy(painted)


if __name__ == "__main__":
    main()

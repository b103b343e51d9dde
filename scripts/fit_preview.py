"""Fits the linear map of previews to a checkpoint's VAE, and prints it with its residual.

python scripts/fit_preview.py [--checkpoint PATH]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax import assets
from wan_jax.checkpoint import open_checkpoint
from wan_jax.media.preview import CLIPS, fit_preview
from wan_jax.models.vae import VAE
from wan_jax.parameters import with_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=assets.NANO_WEIGHTS, help="folder, file or hub id (default: nano)")
    parser.add_argument("--clips", type=int, default=CLIPS, help=f"generated clips to encode (default {CLIPS})")
    values = parser.parse_args()
    checkpoint = open_checkpoint(values.checkpoint)
    config = checkpoint.config.vae
    vae = with_parameters(lambda: VAE(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), checkpoint.load("vae", "float32"))
    run = jax.jit(lambda vae, frames: vae.encode(frames.astype(jnp.float32)[None] / 127.5 - 1)[0])
    fitted = fit_preview(lambda frames: np.asarray(run(vae, frames)), config, clips=values.clips)
    print(f"kernel {fitted.kernel.tolist()}")
    print(f"bias {fitted.bias.tolist()}")
    print(f"residual {fitted.residual:.1f} levels of 255, root mean square")


if __name__ == "__main__":
    main()

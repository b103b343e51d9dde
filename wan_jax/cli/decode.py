"""`wan-jax decode`: finishes a video from saved latents."""

import pathlib
from typing import Any

from wan_jax.cli.options import Options, add_options, options_of
from wan_jax.errors import InputError


def add_command(commands: Any) -> None:
    command = commands.add_parser("decode", help="finish a video from saved latents", allow_abbrev=False)
    command.add_argument("latents", help="float32 [C, F', h, w]", metavar="LATENTS.npy")
    add_options(command, ["checkpoint", "vae_dtype", "fps", "crf", "output", "quiet"])
    command.set_defaults(run=lambda values: print(*decode(values.latents, options_of(values)), sep="\n"))


def decode(latents_file: str, options: Options) -> list[pathlib.Path]:
    """Decodes latents that an earlier run kept and writes the video; returns the files. Loads the VAE alone."""
    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.checkpoint.load import load_models
    from wan_jax.diffusion.params import DTYPES, check_name
    from wan_jax.media.codec import Codec
    from wan_jax.media.latents import read_latents
    from wan_jax.media.video import VideoWriter, check_output, read_metadata
    from wan_jax.parallel.placement import SINGLE
    from wan_jax.runtime.events import Run
    from wan_jax.runtime.offload import Memory
    from wan_jax.runtime.progress import Bars

    check_name("VAE dtype", options.vae_dtype, DTYPES)
    check_output(options.output, crf=options.crf, fps=options.fps)
    latents, metadata, run = read_latents(latents_file), read_metadata(latents_file), Run(Bars(not options.quiet))
    checkpoint = open_checkpoint(options.checkpoint)
    if len(latents) != (channels := checkpoint.config.vae.z_dim):
        raise InputError(
            f"{latents_file} has {len(latents)} channels, {checkpoint.config.name} {channels}; give another"
        )
    if (model := metadata.get("model", checkpoint.config.name)) != checkpoint.config.name:
        run.note(f"{latents_file} was made by {model} and is decoded by {checkpoint.config.name}")
    for note in checkpoint.notes:
        run.note(note)
    vae = load_models(checkpoint, ["vae"], options.dtype, options.vae_dtype, SINGLE, run)["vae"]
    codec = Codec(vae, False, Memory(SINGLE.offload, SINGLE.devices[0]), SINGLE)
    fps = options.fps or metadata.get("fps", checkpoint.config.sampling.fps)
    with VideoWriter(options.output, fps, metadata | {"fps": fps}, options.crf) as writer:
        for frames in codec.decode(latents, run):
            writer.write(frames)
    return writer.files

"""`wan-jax decode`: finishes a video from saved latents."""

import pathlib
from typing import Any

from wan_jax.cli.options import Options, add_options, options_of


def add_command(commands: Any) -> None:
    command = commands.add_parser("decode", help="finish a video from saved latents", allow_abbrev=False)
    command.add_argument("latents", help="float32 [C, F', h, w]", metavar="LATENTS.npy")
    add_options(command, ["checkpoint", "vae_dtype", "fps", "crf", "output", "quiet"])
    command.set_defaults(run=lambda values: print(*decode(values.latents, options_of(values)), sep="\n"))


def decode(latents_file: str, options: Options) -> list[pathlib.Path]:
    """Decodes latents that an earlier run kept and writes the video; returns the files."""
    import dataclasses

    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.cli.loading import load_pipeline
    from wan_jax.diffusion.params import read_latents
    from wan_jax.media.video import VideoWriter, check_output
    from wan_jax.runtime.events import Run

    output = check_output(options.output, crf=options.crf, fps=options.fps)
    latents = read_latents(latents_file)
    checkpoint = open_checkpoint(options.checkpoint)
    # The experts stay on the host.
    pipeline = load_pipeline(dataclasses.replace(options, profile="swap"), checkpoint)
    with VideoWriter(output, options.fps or checkpoint.config.sampling.fps, crf=options.crf) as writer:
        for frames in pipeline.codec.decode(latents, Run(pipeline.on_event)):
            writer.write(frames)
    return writer.files

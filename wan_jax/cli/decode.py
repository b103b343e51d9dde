"""`wan-jax decode`: finishes a video from saved latents."""

import pathlib
from typing import Any

from wan_jax.cli.loading import CLUSTER, joined, print_files
from wan_jax.cli.options import Options, add_options, options_of
from wan_jax.errors import InputError


def add_command(commands: Any) -> None:
    command = commands.add_parser("decode", help="finish a video from saved latents", allow_abbrev=False)
    command.add_argument("latents", help="float32 [C, F', h, w]", metavar="LATENTS.npy")
    add_options(command, ["checkpoint", "vae_dtype", *CLUSTER, "fps", "crf", "output", "quiet"])
    command.set_defaults(run=lambda values: print_files(decode(values.latents, options_of(values))))


def decode(latents_file: str, options: Options) -> list[pathlib.Path]:
    """Decodes latents that an earlier run kept and writes the video; returns the files, if this process wrote them.

    Of the checkpoint the VAE alone is loaded.
    """
    import jax

    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.checkpoint.load import load_models
    from wan_jax.diffusion.params import DTYPES, check_name, read_latents
    from wan_jax.media.codec import Codec
    from wan_jax.media.video import VideoWriter, check_output, read_metadata
    from wan_jax.parallel.mesh_spec import MeshSpec
    from wan_jax.parallel.placement import Placement
    from wan_jax.runtime.distributed import draining, is_primary
    from wan_jax.runtime.offload import Memory

    check_name("VAE dtype", options.vae_dtype, DTYPES)
    output = check_output(options.output, crf=options.crf, fps=options.fps)
    latents, metadata = read_latents(latents_file), read_metadata(latents_file)
    with joined(options) as (options, run):
        checkpoint = open_checkpoint(options.checkpoint)
        if len(latents) != (channels := checkpoint.config.vae.z_dim):
            raise InputError(
                f"{latents_file} has {len(latents)} channels, {checkpoint.config.name} {channels}; give another"
            )
        if (model := metadata.get("model", checkpoint.config.name)) != checkpoint.config.name:
            run.note(f"{latents_file} was made by {model} and is decoded by {checkpoint.config.name}")
        for note in checkpoint.notes:
            run.note(note)
        mesh = MeshSpec(ring=jax.device_count()) if options.mesh == "auto" else MeshSpec.parse(options.mesh or "single")
        placement = Placement.over(mesh)
        models = load_models(checkpoint, ["vae"], options.dtype, options.vae_dtype, placement, run)
        codec = Codec(models["vae"], False, Memory(placement.offload, placement.devices[0]), placement)
        decoded = codec.decode(latents, run)
        if not is_primary():  # its devices decode, too
            for _ in decoded:
                pass
            return []
        fps = options.fps or metadata.get("fps", checkpoint.config.sampling.fps)
        with draining(decoded), VideoWriter(output, fps, metadata | {"fps": fps}, options.crf) as writer:
            for frames in decoded:
                writer.write(frames)
        return writer.files

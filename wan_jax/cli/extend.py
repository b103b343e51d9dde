"""`wan-jax extend`: continues a video from its last frame."""

import os
import pathlib
from typing import Any

from wan_jax.cli.loading import joined, load_pipeline, print_files
from wan_jax.cli.options import OPTIONS, Options, add_options, options_of
from wan_jax.errors import InputError

SKIPPED = {"prompts", "image", "last_image", "fps", "videos", "initial_latents", "save_latents", "save_frames", "json"}
SKIPPED |= {"overwrite", "extend_prompt", "extend_model", "extend_url", "extend_key"}


def add_command(commands: Any) -> None:
    command = commands.add_parser("extend", help="continue a video from its last frame", allow_abbrev=False)
    command.add_argument("video", help="the video file to continue; models for image to video can", metavar="VIDEO")
    add_options(command, [name for name in OPTIONS if name not in SKIPPED])
    command.set_defaults(run=lambda values: print_files(extend(values.video, options_of(values))))


def extend(video: str, options: Options) -> list[pathlib.Path]:
    """Continues a video file and writes both parts as one; returns the files, if this process wrote them.

    The file has the clip's size and rate, and all its frames; see `WanPipeline.extend`. They are encoded anew, at the
    same quality: two encodings do not fit into one H.264 stream. If decoding or writing fails, the latents of the
    second part are kept beside the output.
    """
    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.cli.generate import latents_kept
    from wan_jax.generation.extension import extension, following
    from wan_jax.media.video import VideoWriter, check_output, read_video
    from wan_jax.runtime.distributed import draining, is_primary

    if options.prompt is None or not options.prompt.strip():
        raise InputError("give a prompt: what happens next in the video")
    check_output(options.output, crf=options.crf)
    clip = read_video(video)
    if os.path.exists(options.output) and os.path.samefile(video, options.output):
        raise InputError(f"output {options.output} is also the video; give another name")
    output = check_output(options.output, size=clip.size, fps=clip.fps)
    with joined(options) as (options, run):
        checkpoint = open_checkpoint(options.checkpoint)
        config = checkpoint.config
        request = extension(clip, options, config).resolve(config)
        result = next(load_pipeline(options, checkpoint, request, on_event=run.emit).results([request]))
        result.metadata["extends"] = {"frames": len(clip.frames), **clip.metadata, "file": video}
        decoded = result.frames()
        if not is_primary():  # its devices decode, too
            for _ in decoded:
                pass
            return []
        with (
            draining(decoded),
            latents_kept(result, output, "they are what was to follow the video"),
            VideoWriter(output, clip.fps, result.metadata, options.crf) as writer,
        ):
            writer.write(clip.frames)
            for frames in following(clip, decoded, config.sampling.fps):
                writer.write(frames)
        return writer.files

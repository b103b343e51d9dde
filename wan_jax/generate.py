"""One run from options to files: what `wan-jax generate`, `sample`, `extend` and `decode` do.

The options are declared once, in `Options`; the command line's flags and the recipes' config keys both derive from it.
"""

import dataclasses
import pathlib
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wan_jax.config import WanConfig, get_preset
from wan_jax.diffusion.schedule import GRIDS
from wan_jax.errors import InputError
from wan_jax.images import ImagePrompt, read_image
from wan_jax.settings import (
    DTYPES,
    NOISES,
    PROFILE_NAMES,
    Settings,
    parse_guidance,
    parse_names,
    parse_size,
    parse_steps,
)
from wan_jax.video import VideoWriter, check_folder, check_output, read_video, save_array

if TYPE_CHECKING:
    from wan_jax.checkpoint import Checkpoint
    from wan_jax.plan import Report
    from wan_jax.progress import Bars


def _option(kind: type, text: str, *, default: Any = None, metavar: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "help": text, "metavar": metavar})


@dataclass(frozen=True)
class Options:
    """Everything a run can be told; None takes the checkpoint's preset."""

    prompt: str | None = _option(str, "what the video shows")
    prompts: str | None = _option(str, "file with one prompt a line; writes one video each", metavar="FILE")
    image: str | None = _option(str, "picture that the video starts from, for models that take one", metavar="FILE")
    last_image: str | None = _option(str, "picture that it ends with, for models that take two", metavar="FILE")
    checkpoint: str | None = _option(str, "folder or hub id; without it a small demo model", metavar="PATH_OR_ID")
    negative_prompt: str | None = _option(str, "what to steer away from", metavar="TEXT")
    size: str | None = _option(
        str, "WIDTHxHEIGHT in pixels, multiples of 16 (default: the preset's, in the image's shape)", metavar="WxH"
    )
    frames: int | None = _option(int, "number of frames, 4n + 1", metavar="N")
    steps: str | None = _option(str, "number of denoising steps, or LOW,HIGH for each expert's", metavar="N[,N]")
    guidance: str | None = _option(str, "one number, or LOW,HIGH for the two experts", metavar="LOW[,HIGH]")
    shift: float | None = _option(float, "shift of the sigma schedule", metavar="S")
    solver: str | None = _option(str, f"{' | '.join(GRIDS['official'])}, or LOW,HIGH", metavar="NAME[,NAME]")
    schedule: str | None = _option(str, f"{' | '.join(GRIDS)}, or LOW,HIGH", metavar="NAME[,NAME]")
    seed: int = _option(int, "the initial noise depends on it alone (default 0)", default=0, metavar="N")
    noise: str = _option(str, f"{' | '.join(NOISES)}: whose random numbers (default jax)", default="jax")
    dtype: str = _option(str, f"{' | '.join(DTYPES)} (default bfloat16)", default="bfloat16")
    vae_dtype: str = _option(str, "of the VAE (default float32)", default="float32", metavar="NAME")
    profile: str = _option(
        str, f"{' | '.join(PROFILE_NAMES)}: where weights are kept (default auto)", default="auto", metavar="NAME"
    )
    initial_latents: str | None = _option(str, "start from these float32 [C, F', h, w] latents", metavar="F.npy")
    save_latents: str | None = _option(str, "also write the final float32 [C, F', h, w] latents", metavar="F.npy")
    save_frames: str | None = _option(str, "also write the uint8 [F, H, W, 3] frames", metavar="F.npy")
    output: str = _option(str, "file ending in .mp4, .gif or .png (default out.mp4)", default="out.mp4", metavar="FILE")
    json: bool = _option(bool, "print one JSON object last", default=False)
    quiet: bool = _option(bool, "no progress bars", default=False)


STAGES = ("load", "compile", "text", "denoise", "decode", "save")  # of every run; images add theirs


def generate(options: Options) -> dict[str, Any]:
    """Runs the options and writes the files; returns the report that `--json` prints.

    Everything that can be checked is checked before the weights are loaded. The latents of each video are on disk
    before it is decoded; they are removed again when the video is saved.

    Raises:
        InputError: an option that cannot be used.
    """
    prompts = _read_prompts(options)
    outputs = _numbered(check_output(options.output), len(prompts))
    side_files = {
        name: _numbered(_check_npy(name, path), len(prompts)) if path else None
        for name, path in (("save_latents", options.save_latents), ("save_frames", options.save_frames))
    }
    initial_latents = _read_latents(options.initial_latents) if options.initial_latents else None
    for image in (options.image, options.last_image):
        if image is not None:
            read_image(image)

    from wan_jax.pipeline import WanPipeline, peak_bytes
    from wan_jax.progress import Bars

    bars = Bars(not options.quiet)
    start = time.perf_counter()
    checkpoint = _open(options, bars)
    images = ImagePrompt.read(checkpoint.config, options.image, options.last_image)
    settings = _settings(options, checkpoint.config, images)
    if initial_latents is not None:
        settings.check_latents(initial_latents.shape, checkpoint.config, 1)
    pipeline = WanPipeline.from_checkpoint(
        checkpoint,
        options.dtype,
        vae_dtype=options.vae_dtype,
        profile=options.profile,
        settings=settings,
        progress=not options.quiet,
    )
    seconds = dict.fromkeys(STAGES, 0.0)
    seconds["load"] = time.perf_counter() - start

    written: list[pathlib.Path] = []
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        latents = pipeline.denoise([prompt], settings, initial_latents, images)[0]
        kept = side_files["save_latents"][index] if side_files["save_latents"] else _rescue_name(output)
        save_array(kept, latents)
        try:
            with VideoWriter(output, settings.fps, pipeline.metadata(prompt, settings, images)) as writer:
                frames = pipeline.decode(latents, on_frames=writer.write)
                start = time.perf_counter()
            if side_files["save_frames"]:
                save_array(side_files["save_frames"][index], frames)
        except BaseException:
            again = f"wan-jax decode {kept} --checkpoint {options.checkpoint or 'PATH'} --output {output}"
            if options.vae_dtype != "float32":
                again += f" --vae-dtype {options.vae_dtype}"
            print(f"the latents are kept in {kept}; finish with: {again}", file=sys.stderr)
            raise
        if not side_files["save_latents"]:
            kept.unlink()
        written += writer.files
        seconds["save"] += time.perf_counter() - start
        for stage in pipeline.seconds.keys() - {"load"}:
            seconds[stage] = seconds.get(stage, 0.0) + pipeline.seconds[stage]
    return {
        "settings": {
            "prompts": prompts,
            "image": options.image,
            "last_image": options.last_image,
            "checkpoint": options.checkpoint,
            "dtype": options.dtype,
            "vae_dtype": options.vae_dtype,
            **settings.as_json(),
        },
        "seed": settings.seed,
        "profile": pipeline.memory.profile.name,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "peak_bytes": peak_bytes(),
        "outputs": [str(path) for path in written],
    }


def plan(preset: str, options: Options, device_memory: float | None = None) -> "Report":
    """Predicts what the options need of a device (of its memory, or of one with `device_memory` GiB)."""
    config = get_preset(preset)
    settings = Settings.resolve(config, **_choices(options))

    from wan_jax.plan import report

    return report(config, settings, options.dtype, options.profile, device_memory, options.vae_dtype)


def decode(latents_file: str, options: Options) -> list[pathlib.Path]:
    """Decodes latents that an earlier run kept and writes the video; returns the files."""
    output = check_output(options.output)
    latents = _read_latents(latents_file)

    from wan_jax.pipeline import WanPipeline
    from wan_jax.progress import Bars

    bars = Bars(not options.quiet)
    checkpoint = _open(options, bars)
    # The experts stay on the host.
    pipeline = WanPipeline.from_checkpoint(
        checkpoint, options.dtype, vae_dtype=options.vae_dtype, profile="swap", progress=not options.quiet
    )
    with VideoWriter(output, checkpoint.config.sampling.fps) as writer:
        pipeline.decode(latents, on_frames=writer.write)
    return writer.files


def extend(video: str, options: Options) -> list[pathlib.Path]:
    """Continues a video file from its last frame and writes both parts as one; returns the files.

    The first part is encoded anew, at the same quality: two encodings do not fit into one H.264 stream. If decoding or
    writing fails, the latents of the second part are kept beside the output.
    """
    output = check_output(options.output)
    if options.prompt is None:
        raise InputError("give a prompt: what happens next in the video")
    clip = read_video(video)

    from wan_jax.pipeline import WanPipeline
    from wan_jax.progress import Bars

    checkpoint = _open(options, Bars(not options.quiet))
    ImagePrompt.read(checkpoint.config, clip.frames[-1])  # raises for a model that takes no image
    choices = _choices(options) | {"size": clip.size}
    pipeline = WanPipeline.from_checkpoint(
        checkpoint,
        options.dtype,
        vae_dtype=options.vae_dtype,
        profile=options.profile,
        settings=Settings.resolve(checkpoint.config, **choices),
        progress=not options.quiet,
    )
    try:
        longer = pipeline.extend(clip, options.prompt, **_choices(options))
        longer.metadata["extends"]["file"] = video
        return longer.save(output)
    except BaseException:
        if pipeline.latents is not None:
            kept = save_array(_rescue_name(output), pipeline.latents[0])
            print(f"the latents of what was to follow are kept in {kept}", file=sys.stderr)
        raise


def _settings(options: Options, config: WanConfig, images: ImagePrompt | None) -> Settings:
    choices = _choices(options)
    if images is not None and choices["size"] is None:
        choices["size"] = images.video_size(config)
    return Settings.resolve(config, **choices)


def _choices(options: Options) -> dict[str, Any]:
    """What the options say of a run's settings; None where they say nothing."""
    return {
        "negative_prompt": options.negative_prompt,
        "size": parse_size(options.size) if options.size else None,
        "frames": options.frames,
        "steps": parse_steps(options.steps) if options.steps else None,
        "guidance": parse_guidance(options.guidance) if options.guidance else None,
        "shift": options.shift,
        "solver": parse_names("solver", options.solver) if options.solver else None,
        "schedule": parse_names("schedule", options.schedule) if options.schedule else None,
        "seed": options.seed,
        "noise": options.noise,
    }


def _open(options: Options, bars: "Bars") -> "Checkpoint":
    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.checkpoint.hub import local_checkpoint

    if options.checkpoint is not None:
        return open_checkpoint(local_checkpoint(options.checkpoint))

    from wan_jax.demo import demo_checkpoint

    return open_checkpoint(demo_checkpoint(bars))


def _read_prompts(options: Options) -> list[str]:
    if (options.prompt is None) == (options.prompts is None):
        raise InputError("give a prompt, or a file of them with --prompts (one of the two)")
    if options.prompt is not None:
        return [options.prompt]
    path = pathlib.Path(str(options.prompts))
    if not path.is_file():
        raise InputError(f"prompts file {path} does not exist; give a text file with one prompt a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"prompts file {path} is not UTF-8 text; save it as UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"prompts file {path} is empty; write one prompt a line")
    return prompts


def _read_latents(name: str) -> np.ndarray:
    path = pathlib.Path(name)
    if not path.is_file():
        raise InputError(f"latents file {path} does not exist; give a .npy file of float32 [C, F', h, w]")
    try:
        latents = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise InputError(f"latents file {path} is not a .npy array; give float32 [C, F', h, w]") from None
    if latents.dtype != np.float32 or latents.ndim != 4:
        raise InputError(
            f"latents file {path} holds {latents.dtype} of shape {latents.shape}; give float32 [C, F', h, w]"
        )
    if not np.isfinite(latents).all():
        raise InputError(f"latents file {path} holds NaN or infinity; give finite numbers")
    return latents


def _check_npy(option: str, name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    if path.suffix != ".npy":
        raise InputError(f"--{option.replace('_', '-')} {path}: the name must end in .npy")
    check_folder(path)
    return path


def _numbered(path: pathlib.Path, count: int) -> list[pathlib.Path]:
    """out.mp4 for one video; out-1.mp4, out-2.mp4, ... for several."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(1, count + 1)]


def _rescue_name(output: pathlib.Path) -> pathlib.Path:
    return output.with_name(f"{output.stem}.latents.npy")

"""One run from options to files: what `wan-jax generate`, `sample`, `extend` and `decode` do."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wan_jax.cli.options import Options
from wan_jax.cli.prompt_files import Item, read_items
from wan_jax.diffusion.params import knobs, read_latents
from wan_jax.errors import InputError
from wan_jax.media.video import (
    VideoWriter,
    check_folder,
    check_output,
    is_complete,
    read_metadata,
    read_video,
    save_array,
)
from wan_jax.presets import get_preset
from wan_jax.text.prompt_extension import Endpoint, LocalModel, extend_prompt, open_language_model

if TYPE_CHECKING:
    from wan_jax.lora import Lora
    from wan_jax.pipeline import WanPipeline
    from wan_jax.planning.report import Report
    from wan_jax.runtime.progress import Bars

STAGES = ("load", "compile", "text", "denoise", "decode", "save")  # of every run; images add theirs


def generate(options: Options) -> dict[str, Any]:
    """Makes the videos that the options ask for and writes their files; returns the report that `--json` prints.

    Everything that can be checked is checked before the weights are loaded, of all videos. The latents of each video
    are on disk before it is decoded; they are removed again when the video is saved. With a file of prompts, finished
    videos are left as they are, and one that fails does not keep the others from being made: the report names it.

    Raises:
        InputError: an option that cannot be used.
    """
    items = read_items(options)
    for item in items:
        with item.naming_errors():
            _check_files(item.options)
    language_model = None
    if options.extend_prompt:
        language_model = open_language_model(options.extend_url, options.extend_model, options.extend_key)

    from wan_jax.runtime import distributed
    from wan_jax.runtime.progress import Bars

    cluster = distributed.find_cluster(options.coordinator, options.processes, options.process_id)
    mesh = options.mesh
    if cluster is not None:
        if options.extend_prompt or options.checkpoint is None:
            raise InputError("several processes need --checkpoint, and prompts that were extended before")
        cluster.join()
        mesh = mesh or "auto"
    by_default = None if cluster is None else distributed.HANG_SECONDS
    watchdog = distributed.Watchdog(by_default if options.hang_seconds is None else options.hang_seconds)
    bars = Bars(not options.quiet and distributed.is_primary(), watchdog.beat)
    with watchdog:
        return _generate(options, mesh, items, language_model, bars)


def _generate(
    options: Options, mesh: str | None, items: Sequence[Item], language_model: Any, bars: "Bars"
) -> dict[str, Any]:
    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.lora import open_loras
    from wan_jax.parallel.mesh_spec import MeshSpec
    from wan_jax.pipeline import WanPipeline, peak_bytes
    from wan_jax.runtime import distributed

    start = time.perf_counter()
    loras = read_loras(options.lora, options.lora_high, options.lora_low)
    checkpoint = open_checkpoint(options.checkpoint)
    if mesh is not None and mesh != "auto":
        MeshSpec.parse(mesh).check(checkpoint.config, prompts=1)
    opened_loras = open_loras(loras, checkpoint.config)
    jobs = []
    for item in items:
        with item.naming_errors():
            jobs.append(Job(item, item.options.resolve(checkpoint.config)))
    batch = options.prompts is not None
    finished = [batch and not options.overwrite and _is_finished(job, loras, bars) for job in jobs]
    finished = distributed.broadcast_from_process_0(finished)
    pending = [job for job, is_finished in zip(jobs, finished, strict=True) if not is_finished]
    if language_model is not None:
        _extend_prompts(pending, language_model, bars)

    seconds = dict.fromkeys(STAGES, 0.0)
    profile, mesh_spec = None, None
    if pending:
        largest = max(pending, key=lambda job: math.prod(job.request.size) * job.request.frames)
        pipeline = WanPipeline.from_checkpoint(
            checkpoint,
            options.dtype,
            vae_dtype=options.vae_dtype,
            profile=options.profile,
            mesh=mesh,
            request=largest.request,
            loras=opened_loras,
            progress=bars,
        )
        profile = pipeline.placement.offload.name
        mesh_spec = None if pipeline.placement.is_single else str(pipeline.placement.mesh_spec)
        seconds["load"] = time.perf_counter() - start
        with bars.task("videos", total=len(pending)) if batch else contextlib.nullcontext() as bar:
            for job in pending:
                if bar is not None:
                    bar.advance(0, f"{job.item.options.output}: {' '.join(job.request.prompt.split())[:40]}")
                _make_video(pipeline, job, seconds, batch)
                if bar is not None:
                    bar.advance()
    return {
        **_report_settings(options, loras, jobs),
        "loras": [file.as_json() for file in opened_loras.files],
        "profile": profile,
        "mesh": mesh_spec,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "peak_bytes": peak_bytes(),
        "outputs": [str(path) for job in jobs for path in job.written],
        "failed": [job.item.where for job in jobs if job.failure is not None],
    }


@dataclass
class Job:
    """A video to be made, and what became of it."""

    item: Item
    request: Options  # resolved; its prompt may be an extended one
    finished: bool = False  # by an earlier run
    failure: str | None = None
    written: list[pathlib.Path] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """What was asked for and what came of it."""
        options, prompt = self.item.options, self.request.prompt
        return {
            "prompt": prompt,
            **({} if prompt == options.prompt else {"original_prompt": options.prompt}),
            "image": options.image,
            "last_image": options.last_image,
            **self.request.as_json(),
            "output": options.output,
            "status": "finished before" if self.finished else "failed" if self.failure else "made",
            **({"failure": self.failure} if self.failure else {}),
        }


def _report_settings(options: Options, loras: Sequence["Lora"], jobs: list[Job]) -> dict[str, Any]:
    """The settings that all videos share, and each video with its own."""
    videos = [job.as_json() for job in jobs]
    first, *others = videos
    own = {"prompt", "original_prompt", "output", "status", "failure"}
    shared = {
        name: value
        for name, value in first.items()
        if name not in own and all(video[name] == value for video in others)
    }
    return {
        "settings": {
            "prompts": [job.request.prompt for job in jobs],
            "checkpoint": options.checkpoint,
            "loras": [lora.as_json() for lora in loras],
            "dtype": options.dtype,
            "vae_dtype": options.vae_dtype,
            **shared,
        },
        "seed": shared.get("seed"),
        "videos": [{name: value for name, value in video.items() if name not in shared} for video in videos],
    }


def _is_finished(job: Job, loras: Sequence["Lora"], bars: "Bars") -> bool:
    """Whether an earlier run has made the video; says so, and whether it was asked for something else."""
    options = job.item.options
    files = [name for name in (options.save_latents, options.save_frames) if name is not None]
    if not is_complete(options.output, job.request.frames) or not all(map(os.path.exists, files)):
        return False
    job.finished = True
    recorded = read_metadata(options.output)
    recorded["prompt"] = recorded.get("original_prompt", recorded.get("prompt"))
    recorded.setdefault("loras", [])
    asked = {"prompt": options.prompt, "loras": [lora.as_json() for lora in loras], **job.request.as_json()}
    wanted = json.loads(json.dumps(asked))
    others = [name for name, value in wanted.items() if name in recorded and recorded[name] != value]
    otherwise = f", but with another {', '.join(others)}; --overwrite makes it anew" if others else ""
    bars.note(f"{options.output} is finished{otherwise}")
    return True


def _extend_prompts(jobs: list[Job], language_model: Endpoint | LocalModel, bars: "Bars") -> None:
    """Gives each job its extended prompt, shows it, and says where there is none."""
    with bars.task("extend prompts", total=len(jobs)) as bar, contextlib.closing(language_model):
        for job in jobs:
            options = job.item.options
            extension = extend_prompt(job.request.prompt, "i2v" if options.image else "t2v", language_model)
            job.request = dataclasses.replace(job.request, prompt=extension.prompt)
            bar.advance()
            if extension.failure is not None:
                print(f"prompt not extended, used as it is: {extension.failure}", file=sys.stderr)
            else:
                bars.note(f"extended prompt: {extension.prompt}")


def _make_video(pipeline: "WanPipeline", job: Job, seconds: dict[str, float], go_on: bool) -> None:
    """Makes one video and adds its seconds; with `go_on`, a failure is said and kept in the job, not raised."""
    try:
        with job.item.naming_errors():
            job.written = _generate_video(pipeline, job, seconds)
    except Exception as error:
        if not go_on:
            raise
        kind = "" if isinstance(error, InputError) else f"{job.item.where}: {type(error).__name__}: "
        job.failure = " ".join(f"{kind}{error}".split())
        print(f"wan-jax: {job.failure}", file=sys.stderr)


def _generate_video(pipeline: "WanPipeline", job: Job, seconds: dict[str, float]) -> list[pathlib.Path]:
    from wan_jax.runtime import distributed

    options, request = job.item.options, job.request
    output = pathlib.Path(options.output)
    metadata = pipeline.metadata(request)
    if request.prompt != options.prompt:
        metadata["original_prompt"] = options.prompt
    latents = pipeline.denoise([request])[0]
    if not distributed.is_primary():
        pipeline.decode(latents)
        return []
    kept = pathlib.Path(options.save_latents) if options.save_latents else _rescue_name(output)
    save_array(kept, latents)
    try:
        with VideoWriter(output, request.fps, metadata) as writer:
            frames = pipeline.decode(latents, on_frames=writer.write)
            start = time.perf_counter()
        if options.save_frames:
            save_array(options.save_frames, frames)
    except BaseException:
        again = f"wan-jax decode {kept} --output {output}"
        if options.checkpoint is not None:
            again += f" --checkpoint {options.checkpoint}"
        if options.vae_dtype != "float32":
            again += f" --vae-dtype {options.vae_dtype}"
        print(f"the latents are kept in {kept}; finish with: {again}", file=sys.stderr)
        raise
    if not options.save_latents:
        kept.unlink()
    seconds["save"] += time.perf_counter() - start
    for stage in pipeline.seconds.keys() - {"load"}:
        seconds[stage] = seconds.get(stage, 0.0) + pipeline.seconds[stage]
    return writer.files


def load_pipeline(options: Options) -> "WanPipeline":
    """The pipeline that the options name, for callers that go on in Python."""
    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.pipeline import WanPipeline

    checkpoint = open_checkpoint(options.checkpoint)
    return WanPipeline.from_checkpoint(
        checkpoint,
        options.dtype,
        vae_dtype=options.vae_dtype,
        profile=options.profile,
        mesh=options.mesh,
        request=options.resolve(checkpoint.config),
        loras=read_loras(options.lora, options.lora_high, options.lora_low),
        progress=not options.quiet,
    )


def plan(preset: str, options: Options, device_memory: float | None = None, devices: int | None = None) -> "Report":
    """Predicts what the options need of a device (of its memory, or of one with `device_memory` GiB).

    `devices` is how many the mesh "auto" may use, instead of those at hand.
    """
    config = get_preset(preset)
    settings = options.resolve(config)

    from wan_jax.planning.report import report

    if options.mesh is None:
        return report(config, settings, options.dtype, options.profile, device_memory, options.vae_dtype)
    from wan_jax.planning.mesh import report_mesh

    return report_mesh(
        config, settings, options.dtype, options.mesh, device_memory, options.vae_dtype, options.profile, devices
    )


def decode(latents_file: str, options: Options) -> list[pathlib.Path]:
    """Decodes latents that an earlier run kept and writes the video; returns the files."""
    output = check_output(options.output)
    latents = read_latents(latents_file)

    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.pipeline import WanPipeline

    checkpoint = open_checkpoint(options.checkpoint)
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

    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.pipeline import WanPipeline

    checkpoint = open_checkpoint(options.checkpoint)
    request = dataclasses.replace(options, image=clip.frames[-1], size=clip.size)
    pipeline = WanPipeline.from_checkpoint(
        checkpoint,
        options.dtype,
        vae_dtype=options.vae_dtype,
        profile=options.profile,
        mesh=options.mesh,
        request=request.resolve(checkpoint.config),
        loras=read_loras(options.lora, options.lora_high, options.lora_low),
        progress=not options.quiet,
    )
    try:
        longer = pipeline.extend(clip, options.prompt, **{each.name: vars(options)[each.name] for each in knobs()[1:]})
        longer.metadata["extends"]["file"] = video
        return longer.save(output)
    except BaseException:
        if pipeline.latents is not None:
            kept = save_array(_rescue_name(output), pipeline.latents[0])
            print(f"the latents of what was to follow are kept in {kept}", file=sys.stderr)
        raise


def _check_files(options: Options) -> None:
    """What can be checked of one video before the model is known."""
    check_output(options.output)
    for name in ("save_latents", "save_frames"):
        if path := vars(options)[name]:
            _check_npy(name, path)


def read_loras(both: Sequence[str], high: Sequence[str] = (), low: Sequence[str] = ()) -> list["Lora"]:
    """ "FILE" and "FILE:STRENGTH" by expert -> what they ask for."""
    from wan_jax.lora import Lora

    return [
        *[Lora.parse(text) for text in both],
        *[Lora.parse(text, "high_noise") for text in high],
        *[Lora.parse(text, "low_noise") for text in low],
    ]


def _check_npy(option: str, name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    if path.suffix != ".npy":
        raise InputError(f"--{option.replace('_', '-')} {path}: the name must end in .npy")
    check_folder(path)
    return path


def _rescue_name(output: pathlib.Path) -> pathlib.Path:
    return output.with_name(f"{output.stem}.latents.npy")

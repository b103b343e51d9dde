"""`wan-jax generate` and `sample`: one run from options to files."""

import argparse
import contextlib
import dataclasses
import json
import math
import pathlib
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from wan_jax.cli.loading import joined, load_pipeline, read_loras
from wan_jax.cli.options import OPTIONS, Options, add_options, options_of
from wan_jax.cli.prompt_files import Item, read_items
from wan_jax.cli.recipes import RECIPES, get_recipe, load_recipe
from wan_jax.errors import InputError, OutputError, one_line

if TYPE_CHECKING:
    from wan_jax.generation.sampler import Result
    from wan_jax.lora import Lora
    from wan_jax.pipeline import WanPipeline
    from wan_jax.runtime.events import Run
    from wan_jax.text.prompt_extension import Endpoint, LocalModel

STAGES = ("load", "compile", "text", "denoise", "decode", "save")  # of every run; images add theirs


def add_command(commands: Any) -> None:
    command = commands.add_parser("generate", help="make videos from prompts", allow_abbrev=False)
    command.add_argument("--recipe", help=f"options to start from: {' | '.join(RECIPES)}", metavar="NAME")
    command.add_argument("--again", help="a video whose prompt and settings to start from", metavar="FILE")
    add_options(command, list(OPTIONS))
    command.set_defaults(run=_run_flags)
    command = commands.add_parser("sample", help="run a recipe: --config FILE [--config.steps=30 ...]", add_help=False)
    command.set_defaults(run=_run_recipe, takes_rest=True)


def _run_flags(values: argparse.Namespace) -> int:
    recipe = dict(get_recipe(values.recipe)) if values.recipe is not None else {}
    if values.again is not None:
        from wan_jax.cli.loading import settings_of

        recipe |= settings_of(values.again, vars(values).get("checkpoint", recipe.get("checkpoint")))
    return _run(options_of(values, recipe))


def _run_recipe(values: argparse.Namespace) -> int:
    return _run(load_recipe(values.rest))


def _run(options: Options) -> int:
    report = generate(options)
    from wan_jax.runtime.distributed import is_primary

    if not is_primary():
        pass
    elif options.json:
        print(json.dumps(report, ensure_ascii=False))
    elif report["outputs"]:
        print("\n".join(report["outputs"]))
    if report["failed"]:
        print(f"wan-jax: {len(report['failed'])} of {len(report['videos'])} videos failed", file=sys.stderr)
    return 1 if report["failed"] else 0


def generate(options: Options) -> dict[str, Any]:
    """Makes the videos that the options ask for and writes their files; returns the report that `--json` prints.

    Everything that can be checked is checked before the weights are loaded, of all videos. The latents of each video
    are on disk before it is decoded; they are removed again when the video is saved. With a file of prompts, finished
    videos are left as they are, and one that fails does not keep the others from being made: the report names it.

    Raises:
        InputError: an option that cannot be used.
    """
    jobs = [Job(item) for item in read_items(options)]
    for job in jobs:
        job.check_files()
    language_model = None
    if options.extend_prompt:
        from wan_jax.text.prompt_extension import open_language_model

        language_model = open_language_model(options.extend_url, options.extend_model, options.extend_key)
    with joined(options) as (options, run):
        return _generate(options, jobs, language_model, run)


def _generate(
    options: Options, jobs: list["Job"], language_model: "Endpoint | LocalModel | None", run: "Run"
) -> dict[str, Any]:
    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.lora import open_loras
    from wan_jax.media.video import check_output
    from wan_jax.parallel.mesh_spec import MeshSpec
    from wan_jax.runtime import distributed
    from wan_jax.runtime.devices import peak_bytes

    start, is_batch = time.perf_counter(), options.prompts is not None or options.videos > 1
    if language_model is not None and distributed.are_several():
        raise InputError("several processes need prompts that were extended before")
    loras = read_loras(options.lora, options.lora_high, options.lora_low)
    checkpoint = open_checkpoint(options.checkpoint)
    mesh_spec = None if options.mesh in (None, "auto") else MeshSpec.parse(options.mesh)
    opened_loras = open_loras(loras, checkpoint.config)
    for job in jobs:
        with job.item.naming_errors():
            job.request = job.item.options.resolve(checkpoint.config)
            if mesh_spec is not None:
                job.request.check_mesh(checkpoint.config, mesh_spec, prompts=1)
            check_output(job.item.options.output, fps=job.request.fps)
    finished = [is_batch and not options.overwrite and job.find_finished(loras, run) for job in jobs]
    finished = distributed.broadcast_from_process_0(finished)
    pending = [job for job, is_finished in zip(jobs, finished, strict=True) if not is_finished]
    for job in pending:
        with job.item.naming_errors():
            job.check_inputs(run)
    if language_model is not None:
        _extend_prompts(pending, language_model, run)

    seconds, profile, mesh = dict.fromkeys(STAGES, 0.0), None, None
    if pending:
        largest = max(pending, key=lambda job: math.prod(job.request.size) * job.request.frames)
        pipeline = load_pipeline(options, checkpoint, largest.request, opened_loras, run.emit)
        placement = pipeline.placement
        profile, mesh = placement.offload.name, None if placement.is_single else str(placement.mesh_spec)
        seconds["load"] = time.perf_counter() - start
        with run.stage("videos", len(pending)) if is_batch else contextlib.nullcontext():
            for index, job in enumerate(pending):
                if is_batch:
                    run.progress(
                        "videos", index, f"{job.item.options.output}: {' '.join(job.request.prompt.split())[:40]}"
                    )
                job.make(pipeline, seconds, go_on=is_batch)
        failed = distributed.broadcast_from_process_0([job.failure is not None for job in pending])
        for job, failed_there in zip(pending, failed, strict=True):
            job.failure = job.failure or ("it failed in the first process" if failed_there else None)
    return {
        **_report_settings(options, loras, jobs),
        "loras": [file.as_json() for file in opened_loras.files],
        "profile": profile,
        "mesh": mesh,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
        "peak_bytes": peak_bytes(),
        "outputs": [str(path) for job in jobs for path in job.written],
        "failed": [job.item.where for job in jobs if job.failure is not None],
    }


@dataclass
class Job:
    """A video to be made, and what became of it."""

    item: Item
    request: Any = None  # the item's options, resolved; its prompt may be an extended one
    finished: bool = False  # by an earlier run
    failure: str | None = None
    written: list[pathlib.Path] = field(default_factory=list)
    attention_used: str | None = None  # None: nothing was made

    def check_files(self) -> None:
        """What can be checked before the model is known."""
        from wan_jax.media.video import check_output
        from wan_jax.runtime.files import check_writable

        options = self.item.options
        with self.item.naming_errors():
            check_output(options.output, crf=options.crf)
            for name in ("save_latents", "save_frames"):
                if (file := vars(options)[name]) is not None:
                    check_writable(file, name=f"--{name.replace('_', '-')}", endings=(".npy",))

    def files(self) -> list[pathlib.Path]:
        """All that will be written."""
        from wan_jax.media.video import output_files

        options = self.item.options
        arrays = [pathlib.Path(file) for file in (options.save_latents, options.save_frames) if file is not None]
        return [*output_files(options.output, self.request.frames), *arrays]

    def check_inputs(self, run: "Run") -> None:
        """Raises InputError if a file that is read would be overwritten; says which others will be."""
        there = [file for file in self.files() if file.exists()]
        for name in ("image", "last_image", "initial_latents"):
            for file in there if isinstance(given := vars(self.item.options)[name], str) else ():
                if file.samefile(given):
                    raise InputError(f"output {file} is also the {name.replace('_', ' ')}; give another name")
        if there:
            run.note(f"{there[0]} is overwritten{f', and {len(there) - 1} others' if there[1:] else ''}")

    def find_finished(self, loras: Sequence["Lora"], run: "Run") -> bool:
        """Whether an earlier run has made the video; one that was made of something else is a failure."""
        from wan_jax.media.video import read_metadata

        options, request = self.item.options, self.request
        if not all(file.is_file() and file.stat().st_size for file in self.files()):
            return False
        recorded = {"loras": [], **read_metadata(options.output)}
        recorded["prompt"] = recorded.get("original_prompt", recorded.get("prompt"))
        pictures = {"image": request.image, "last_image": request.last_image}
        names = {name: picture.name for name, picture in pictures.items() if picture is not None}
        asked = {"prompt": options.prompt, "loras": [lora.as_json() for lora in loras], **names, **request.as_json()}
        wanted = json.loads(json.dumps(asked))
        others = [name for name, value in wanted.items() if name not in recorded or recorded[name] != value]
        if others:
            difference = f"of another {', '.join(others)}" if "seed" in recorded else "a file of something else"
            self.fail(f"{self.item.where}: {options.output} is {difference}; --overwrite makes it anew")
        else:
            run.note(f"{options.output} is finished")
            self.finished = True
        return True

    def fail(self, reason: str) -> None:
        self.failure = reason
        print(f"wan-jax: {reason}", file=sys.stderr)

    def make(self, pipeline: "WanPipeline", seconds: dict[str, float], go_on: bool) -> None:
        """Makes the video and adds its seconds; with `go_on`, a failure is said and kept, not raised."""
        from wan_jax.runtime.distributed import all_came_here

        try:
            with self.item.naming_errors():
                self._make(pipeline, seconds)
            all_came_here(wait=False)
        except Exception as error:
            if not go_on or not all_came_here(wait=True):
                raise
            where = "" if isinstance(error, InputError) else f"{self.item.where}: "
            kind = "" if isinstance(error, (InputError, OutputError)) else f"{type(error).__name__}: "
            self.fail(f"{where}{kind}{one_line(error)}")

    def _make(self, pipeline: "WanPipeline", seconds: dict[str, float]) -> None:
        from wan_jax.media.video import VideoWriter
        from wan_jax.runtime.distributed import draining, is_primary
        from wan_jax.runtime.files import save_array

        options, output = self.item.options, pathlib.Path(self.item.options.output)
        result = next(pipeline.results([self.request]))
        decoded = result.frames()
        if not is_primary():  # its devices decode, too
            for _ in decoded:
                pass
            return
        if result.request.prompt != options.prompt:
            result.metadata["original_prompt"] = options.prompt
        names = ("output", "checkpoint", "vae_dtype", "fps", "crf")
        own = [(name, value) for name in names if (value := vars(options)[name]) not in (None, vars(Options())[name])]
        flags = [part for name, value in own for part in (f"--{name.replace('_', '-')}", str(value))]
        again = f"finish with: wan-jax decode {{}} {shlex.join(flags)}".rstrip()
        chunks: list[np.ndarray] = []
        with draining(decoded), latents_kept(result, output, again, options.save_latents):
            with VideoWriter(output, result.request.fps, result.metadata, options.crf) as writer:
                for frames in decoded:
                    writer.write(frames)
                    if options.save_frames:
                        chunks.append(frames)
                start = time.perf_counter()
            if options.save_frames:
                save_array(options.save_frames, np.concatenate(chunks))
        seconds["save"] += time.perf_counter() - start
        for stage, value in result.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + value
        self.written, self.attention_used = writer.files, result.metadata["attention_used"]

    def as_json(self) -> dict[str, Any]:
        """What was asked for and what came of it."""
        options, prompt = self.item.options, self.request.prompt
        return {
            "prompt": prompt,
            **({} if prompt == options.prompt else {"original_prompt": options.prompt}),
            "image": options.image,
            "last_image": options.last_image,
            **self.request.as_json(),
            "attention_used": self.attention_used,
            "output": options.output,
            "status": "finished before" if self.finished else "failed" if self.failure else "made",
            **({"failure": self.failure} if self.failure else {}),
        }


@contextlib.contextmanager
def latents_kept(result: "Result", output: pathlib.Path, again: str, file: str | None = None) -> Iterator[None]:
    """Keeps the latents of a video in a file while it is decoded and written.

    Args:
        output: the video's file; the latents lie beside it, under a name of their own.
        again: said if the block fails, with the latents' file in the place of {}.
        file: where the latents go for good.
    """
    from wan_jax.media.video import describe
    from wan_jax.runtime.files import keep_array, save_array

    failure, kept, content = None, None, (result.latents, describe(result.metadata))
    try:
        kept = save_array(file, *content) if file is not None else keep_array(output, *content)
    except OutputError as error:  # the video may still be written
        failure = error
        with contextlib.suppress(OutputError):
            kept = keep_array(output, *content)
    try:
        yield
        if failure is not None and file is not None:
            raise failure
    except BaseException as error:
        where = f"the latents are kept in {kept}; {again.replace('{}', shlex.quote(str(kept)))}"
        error.add_note(where if kept is not None else f"the latents are lost: {failure}")
        raise
    if file is None and kept is not None:
        kept.unlink(missing_ok=True)


def _extend_prompts(jobs: list[Job], language_model: "Endpoint | LocalModel", run: "Run") -> None:
    """Gives each job its extended prompt, shows it, and says where there is none."""
    from wan_jax.text.prompt_extension import extend_prompt

    with run.stage("extend prompts", len(jobs)), contextlib.closing(language_model):
        for index, job in enumerate(jobs, start=1):
            request = job.request
            extension = extend_prompt(request.prompt, "i2v" if request.image else "t2v", language_model)
            job.request = dataclasses.replace(request, prompt=extension.prompt)
            run.progress("extend prompts", index)
            if extension.failure is not None:
                print(f"prompt not extended, used as it is: {extension.failure}", file=sys.stderr)
            else:
                run.note(f"extended prompt: {extension.prompt}")


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

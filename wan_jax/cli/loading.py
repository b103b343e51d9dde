"""What commands have in common: the model that options name, the processes of a run, and listeners."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from wan_jax.cli.options import Options
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError
from wan_jax.fields import knobs

if TYPE_CHECKING:
    from wan_jax.checkpoint import Checkpoint
    from wan_jax.lora import Lora, OpenLoras
    from wan_jax.pipeline import WanPipeline
    from wan_jax.runtime.events import Listener, Run


def read_loras(both: Sequence[str], high: Sequence[str] = (), low: Sequence[str] = ()) -> list["Lora"]:
    """ "FILE" and "FILE:STRENGTH" by expert -> what they ask for."""
    from wan_jax.lora import Lora

    return [
        *[Lora.parse(text) for text in both],
        *[Lora.parse(text, "high_noise") for text in high],
        *[Lora.parse(text, "low_noise") for text in low],
    ]


def settings_of(file: str, checkpoint: str | None) -> dict[str, Any]:
    """Returns the options that made a video (or latents), by what its file says; its output is FILE-again.

    Raises InputError where the file does not say, or another model than the checkpoint's made it.
    """
    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.media.video import WRITERS, read_metadata

    metadata, path = read_metadata(file), pathlib.Path(file)
    if "prompt" not in metadata or "extends" in metadata or "initial_latents" in metadata:
        raise InputError(f"--again {file}: does not say all of how it was made; give a video that generate wrote")
    if (model := metadata.get("model")) != (name := open_checkpoint(checkpoint).config.name):
        raise InputError(f"--again {file}: {model} made it, not {name}; give its --checkpoint")
    options = {each.name: metadata[each.name] for each in knobs(SamplingParams) if metadata.get(each.name) is not None}
    for lora in metadata.get("loras", ()):
        name = {"both": "lora", "low_noise": "lora_low", "high_noise": "lora_high"}[lora["expert"]]
        options[name] = (*options.get(name, ()), f"{lora['file']}:{lora['strength']}")
    ending = path.suffix if path.suffix.lower() in WRITERS else ".mp4"
    return {**options, "output": str(path.with_name(f"{path.stem}-again{ending}"))}


def load_pipeline(
    options: Options,
    checkpoint: "Checkpoint | None" = None,
    request: "SamplingParams | None" = None,
    loras: "OpenLoras | None" = None,
    on_event: "Listener | None" = None,
) -> "WanPipeline":
    """The pipeline that the options name.

    Args:
        checkpoint: the open one; None opens it.
        request: the largest of the run, resolved; None takes the options' own.
        loras: open ones; None opens those that the options name.
        on_event: told of all that the pipeline does; None shows bars, unless the options are quiet.
    """
    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.pipeline import WanPipeline
    from wan_jax.runtime.progress import Bars

    return WanPipeline.from_checkpoint(
        checkpoint or open_checkpoint(options.checkpoint),
        options.dtype,
        vae_dtype=options.vae_dtype,
        profile=options.profile,
        mesh=options.mesh,
        request=request or options,
        loras=loras or read_loras(options.lora, options.lora_high, options.lora_low),
        on_event=on_event or Bars(not options.quiet),
    )


# Options that say which processes make a run.
CLUSTER = ("mesh", "coordinator", "processes", "process_id", "hang_seconds")


@contextlib.contextmanager
def joined(options: Options) -> Iterator[tuple[Options, "Run"]]:
    """Joins the processes that the options or the environment name, if any; where one fails, all end.

    Yields:
        The options of the run, and the run, which bars (of the first process) and the watchdog listen to.
    """
    from wan_jax.runtime import devices, distributed
    from wan_jax.runtime.events import Run, listeners
    from wan_jax.runtime.progress import Bars

    cluster = distributed.find_cluster(options.coordinator, options.processes, options.process_id)
    hang_seconds = options.hang_seconds
    if cluster is not None:
        cluster.join()
        options = dataclasses.replace(options, mesh=options.mesh or "auto")
        hang_seconds = distributed.HANG_SECONDS if hang_seconds is None else hang_seconds
    watchdog = distributed.Watchdog(hang_seconds)
    run = Run(listeners(Bars(not options.quiet and distributed.is_primary()), watchdog))
    with watchdog, distributed.failing_together():
        run.note(devices.describe())
        yield options, run


def print_files(files: Sequence[pathlib.Path]) -> None:
    """Prints what a run has written, a name a line."""
    for file in files:
        print(file)

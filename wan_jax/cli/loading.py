"""What commands have in common: the model that options name, and listeners."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wan_jax.cli.options import Options

if TYPE_CHECKING:
    from wan_jax.checkpoint import Checkpoint
    from wan_jax.diffusion.params import SamplingParams
    from wan_jax.lora import Lora, OpenLoras
    from wan_jax.pipeline import WanPipeline
    from wan_jax.runtime.events import Listener


def read_loras(both: Sequence[str], high: Sequence[str] = (), low: Sequence[str] = ()) -> list["Lora"]:
    """ "FILE" and "FILE:STRENGTH" by expert -> what they ask for."""
    from wan_jax.lora import Lora

    return [
        *[Lora.parse(text) for text in both],
        *[Lora.parse(text, "high_noise") for text in high],
        *[Lora.parse(text, "low_noise") for text in low],
    ]


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

"""What a run can be told, declared once: the command line's flags, the recipes' keys and the keys of a prompts file."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from wan_jax.diffusion.params import DTYPES, NOISES, PROFILE_NAMES, parse_guidance, parse_names, parse_size, parse_steps
from wan_jax.diffusion.schedule import GRIDS


def _option(kind: type, text: str, *, default: Any = None, metavar: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "help": text, "metavar": metavar})


@dataclass(frozen=True)
class Options:
    """Everything a run can be told; None takes the checkpoint's preset. A tuple is an option given several times."""

    prompt: str | None = _option(str, "what the video shows")
    prompts: str | None = _option(str, "file of prompts: .txt, .jsonl or .csv; makes a video of each", metavar="FILE")
    image: str | None = _option(str, "picture that the video starts from, for models that take one", metavar="FILE")
    last_image: str | None = _option(str, "picture that it ends with, for models that take two", metavar="FILE")
    checkpoint: str | None = _option(
        str, "folder or hub id; without it nano, or where it has no weights a small random model", metavar="PATH_OR_ID"
    )
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
    lora: tuple[str, ...] = _option(
        tuple, "LoRA for every expert; may be given several times", default=(), metavar="FILE[:STRENGTH]"
    )
    lora_high: tuple[str, ...] = _option(
        tuple, "the same for the high-noise expert", default=(), metavar="FILE[:STRENGTH]"
    )
    lora_low: tuple[str, ...] = _option(
        tuple, "the same for the low-noise expert", default=(), metavar="FILE[:STRENGTH]"
    )
    dtype: str = _option(str, f"{' | '.join(DTYPES)} (default bfloat16)", default="bfloat16")
    vae_dtype: str = _option(str, "of the VAE (default float32)", default="float32", metavar="NAME")
    profile: str = _option(
        str, f"{' | '.join(PROFILE_NAMES)}: where weights are kept (default auto)", default="auto", metavar="NAME"
    )
    mesh: str | None = _option(
        str, "several devices: axes and sizes like cfg2-ulysses2, or auto (default: one device)", metavar="MESH"
    )
    coordinator: str | None = _option(
        str, "several processes: where the first one listens (default: from SLURM, Kubernetes)", metavar="HOST:PORT"
    )
    processes: int | None = _option(int, "how many there are", metavar="N")
    process_id: int | None = _option(int, "which of them this is, from 0", metavar="N")
    hang_seconds: float | None = _option(
        float, "end the run if nothing moves for so long (default: never, 1800 for several processes)", metavar="S"
    )
    initial_latents: str | None = _option(str, "start from these float32 [C, F', h, w] latents", metavar="F.npy")
    save_latents: str | None = _option(str, "also write the final float32 [C, F', h, w] latents", metavar="F.npy")
    save_frames: str | None = _option(str, "also write the uint8 [F, H, W, 3] frames", metavar="F.npy")
    output: str = _option(str, "file ending in .mp4, .gif or .png (default out.mp4)", default="out.mp4", metavar="FILE")
    overwrite: bool = _option(bool, "with --prompts: make again what is finished", default=False)
    extend_prompt: bool = _option(bool, "let a language model write the prompt in more detail first", default=False)
    extend_model: str | None = _option(str, "its name at --extend-url, or its transformers folder", metavar="NAME")
    extend_url: str | None = _option(str, "OpenAI-compatible endpoint (default $OPENAI_BASE_URL)", metavar="URL")
    extend_key: str = _option(
        str, "environment variable with its API key", default="OPENAI_API_KEY", metavar="VARIABLE"
    )
    json: bool = _option(bool, "print one JSON object last", default=False)
    quiet: bool = _option(bool, "no progress bars", default=False)


# What may differ between the videos of one run: the keys of a prompts file.
PER_VIDEO = (
    *("prompt", "image", "last_image", "negative_prompt", "size", "frames", "steps", "guidance", "shift", "solver"),
    *("schedule", "seed", "noise", "initial_latents", "save_latents", "save_frames", "output"),
)

# Those whose value may be a pair: LOW,HIGH.
PER_EXPERT = ("steps", "guidance", "solver", "schedule")


def choices(options: Options) -> dict[str, Any]:
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


def add_options(command: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Adds the flags of some options to a command."""
    options = {option.name: option for option in dataclasses.fields(Options)}
    left_out: Any = argparse.SUPPRESS  # so that a recipe's value holds where the user gives none
    for name in names:
        option = options[name]
        text, kind, metavar = option.metadata["help"], option.metadata["kind"], option.metadata["metavar"]
        flag = "--" + name.replace("_", "-")
        if name == "prompt":
            command.add_argument("prompt", nargs="?", default=left_out, help=text, metavar="PROMPT")
        elif kind is bool:
            command.add_argument(flag, action="store_true", default=left_out, help=text)
        elif kind is tuple:
            command.add_argument(flag, action="append", default=left_out, help=text, metavar=metavar)
        else:
            command.add_argument(flag, type=kind, default=left_out, help=text, metavar=metavar)


def options_of(values: argparse.Namespace, recipe: Mapping[str, Any] = MappingProxyType({})) -> Options:
    """Returns the options that are given, over those of a recipe."""
    names = {option.name for option in dataclasses.fields(Options)}
    given = {name: value for name, value in vars(values).items() if name in names}
    frozen: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Options(**{**recipe, **frozen})

"""What a run of the command line can be told: the fields of a request, and the run's own knobs."""

import argparse
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from wan_jax.diffusion.params import DTYPES, PROFILE_NAMES, SamplingParams
from wan_jax.fields import file_name, integer, knob, knobs, number, switch, text, texts

option = functools.partial(knob, per_video=False)


@dataclass(frozen=True)
class Options(SamplingParams):
    """Everything a run can be told; None takes the checkpoint's preset. A tuple is an option given several times."""

    prompts: str | None = option(
        file_name, "file of prompts: .txt, .jsonl or .csv; makes a video of each", metavar="FILE"
    )
    checkpoint: str | None = option(
        text, "folder, file or hub id (default: the nano model, which is in the package)", metavar="PATH_OR_ID"
    )
    lora: tuple[str, ...] = option(
        texts, "LoRA for every expert; may be given several times", default=(), metavar="FILE[:STRENGTH]"
    )
    lora_high: tuple[str, ...] = option(
        texts, "the same for the high-noise expert", default=(), metavar="FILE[:STRENGTH]"
    )
    lora_low: tuple[str, ...] = option(
        texts, "the same for the low-noise expert", default=(), metavar="FILE[:STRENGTH]"
    )
    dtype: str = option(text, f"{' | '.join(DTYPES)} (default bfloat16)", default="bfloat16")
    vae_dtype: str = option(text, "of the VAE (default float32)", default="float32", metavar="NAME")
    profile: str = option(
        text, f"{' | '.join(PROFILE_NAMES)}: where weights are kept (default auto)", default="auto", metavar="NAME"
    )
    mesh: str | None = option(
        text, "several devices: axes and sizes like cfg2-ulysses2, or auto (default: one device)", metavar="MESH"
    )
    coordinator: str | None = option(
        text, "several processes: where the first one listens (default: from SLURM, Kubernetes)", metavar="HOST:PORT"
    )
    processes: int | None = option(integer, "how many there are", metavar="N")
    process_id: int | None = option(integer, "which of them this is, from 0", metavar="N")
    hang_seconds: float | None = option(
        number, "end the run if nothing moves for so long (default: never, 1800 for several processes)", metavar="S"
    )
    save_latents: str | None = option(
        file_name, "also write the final float32 [C, F', h, w] latents", metavar="F.npy", per_video=True
    )
    save_frames: str | None = option(
        file_name, "also write the uint8 [F, H, W, 3] frames", metavar="F.npy", per_video=True
    )
    output: str = option(
        file_name,
        "file ending in .mp4, .mov, .webm, .gif or .png (default out.mp4)",
        default="out.mp4",
        metavar="FILE",
        per_video=True,
    )
    crf: int | None = option(
        integer, "quality of .mp4, .mov and .webm, from 0, the best, to 51 (default 10)", metavar="N", per_video=True
    )
    overwrite: bool = option(switch, "with --prompts: make again what is finished", default=False)
    extend_prompt: bool = option(switch, "let a language model write the prompt in more detail first", default=False)
    extend_model: str | None = option(text, "its name at --extend-url, or its transformers folder", metavar="NAME")
    extend_url: str | None = option(text, "OpenAI-compatible endpoint (default $OPENAI_BASE_URL)", metavar="URL")
    extend_key: str = option(
        text, "environment variable with its API key", default="OPENAI_API_KEY", metavar="VARIABLE"
    )
    videos: int = option(integer, "videos of each prompt, with seeds that count up", default=1, metavar="N")
    json: bool = option(switch, "print one JSON object last", default=False)
    quiet: bool = option(switch, "no progress bars", default=False)


# Every field by its name: the command line's flags, the recipes' keys; and those that videos of one run may have for
# themselves, the keys of a file of prompts.
OPTIONS = {each.name: each for each in knobs(Options)}
PER_VIDEO = tuple(name for name, each in OPTIONS.items() if each.metadata["per_video"])


def add_options(command: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Adds the flags of some options to a command. Their values stay text, which `Options` reads."""
    left_out: Any = argparse.SUPPRESS  # so that a recipe's value holds where the user gives none
    for name in names:
        description, kind, metavar = (OPTIONS[name].metadata[key] for key in ("help", "kind", "metavar"))
        flag = "--" + name.replace("_", "-")
        if name == "prompt":
            command.add_argument("prompt", nargs="?", default=left_out, help=description, metavar="PROMPT")
        elif kind is bool:
            command.add_argument(flag, action="store_true", default=left_out, help=description)
        elif kind is tuple:
            command.add_argument(flag, action="append", default=left_out, help=description, metavar=metavar)
        else:
            command.add_argument(flag, default=left_out, help=description, metavar=metavar)


def options_of(values: argparse.Namespace, recipe: Mapping[str, Any] = MappingProxyType({})) -> Options:
    """Returns the options that are given, over those of a recipe."""
    return Options(**{**recipe, **{name: value for name, value in vars(values).items() if name in OPTIONS}})

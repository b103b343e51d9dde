"""`wan-jax convert` and `info`: checkpoints on disk."""

import argparse
import json
import pathlib
from typing import Any

from wan_jax.diffusion.params import DTYPES
from wan_jax.errors import InputError


def add_command(commands: Any) -> None:
    command = commands.add_parser("convert", help="convert weights between layouts", allow_abbrev=False)
    command.add_argument("source", help="folder, file or hub id", metavar="SRC")
    command.add_argument("destination", help="folder to make", metavar="DST")
    command.add_argument("--dtype", choices=DTYPES, help="of the text encoder and the denoisers (default: as stored)")
    command.add_argument("--to", choices=("orbax", "diffusers", "official"), default="orbax", help="(default orbax)")
    for expert in ("", "-high", "-low"):
        text = f"LoRA to merge into the {expert[1:]}-noise expert" if expert else "LoRA to merge into every expert"
        flag = f"--merge-lora{expert}"
        command.add_argument(flag, action="append", default=[], help=text, metavar="FILE[:STRENGTH]")
    command.add_argument("--quiet", action="store_true", help="no progress bars")
    command.set_defaults(run=_convert)

    command = commands.add_parser("info", help="say what a checkpoint is, or how a video was made", allow_abbrev=False)
    command.add_argument("checkpoint", help="folder, file or hub id; or a video, or its latents", metavar="PATH")
    command.add_argument("--verify", action="store_true", help="read all of it: checksums, finite values, tokenizer")
    command.set_defaults(run=_info)


def _convert(values: argparse.Namespace) -> None:
    from wan_jax.checkpoint import convert, open_checkpoint
    from wan_jax.cli.loading import read_loras
    from wan_jax.lora import merge_loras, open_loras
    from wan_jax.runtime.events import Run
    from wan_jax.runtime.progress import Bars

    loras = read_loras(values.merge_lora, values.merge_lora_high, values.merge_lora_low)
    checkpoint = open_checkpoint(values.source)
    merged = merge_loras(checkpoint, open_loras(loras, checkpoint.config))
    with Run(Bars(not values.quiet)).transfers("convert") as report:
        summary = convert(merged, values.destination, values.dtype, values.to, report)
    print(summary)


def _info(values: argparse.Namespace) -> None:
    from wan_jax.checkpoint import open_checkpoint, verify
    from wan_jax.media.video import WRITERS, read_metadata
    from wan_jax.runtime.events import Run
    from wan_jax.runtime.progress import Bars

    if pathlib.Path(values.checkpoint).suffix.lower() in {".npy", *WRITERS}:
        if not (metadata := read_metadata(values.checkpoint)):
            raise InputError(f"{values.checkpoint}: is no video that says how it was made")
        print(json.dumps(metadata, indent=1, ensure_ascii=False))
        return
    checkpoint = open_checkpoint(values.checkpoint)
    print(checkpoint.info())
    if values.verify:
        with Run(Bars()).transfers("verify") as report:
            print(verify(checkpoint, report))

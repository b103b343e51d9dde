"""`wan-jax demo`: converts the model that ships with the package and makes a video with it, on any machine."""

import sys
from pathlib import Path
from typing import Any

from wan_jax.assets import NANO_WEIGHTS
from wan_jax.cli.generate import generate
from wan_jax.cli.options import Options
from wan_jax.errors import InputError

PROMPT = "a red circle moves right"


def add_command(commands: Any) -> None:
    command = commands.add_parser("demo", help="convert and run the small model of the package", allow_abbrev=False)
    command.add_argument("folder", nargs="?", default="outputs/demo", help="where (default outputs/demo)")
    command.set_defaults(run=lambda values: print(run_demo(Path(values.folder))))


def run_demo(folder: Path) -> Path:
    """Converts the diffusers tree of the nano model to wan_jax's own format and makes a video; returns the video."""
    from wan_jax.checkpoint import convert

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be made ({error.strerror}); give another") from None
    checkpoint, video = folder / "nano-orbax", folder / "demo.mp4"
    print(f"1. the nano model, as diffusers publishes models: {NANO_WEIGHTS}", file=sys.stderr)
    print(f"2. the same in wan_jax's own format: {checkpoint}", file=sys.stderr)
    if not checkpoint.exists():
        print(convert(NANO_WEIGHTS, checkpoint), file=sys.stderr)
    print(f"3. a video of {PROMPT!r}: {video}", file=sys.stderr)
    generate(Options(prompt=PROMPT, checkpoint=str(checkpoint), output=str(video)))
    return video

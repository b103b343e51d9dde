"""The `wan-jax` command: reads arguments, calls the library, prints. No logic lives here."""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from wan_jax.cli import train
from wan_jax.cli.options import OPTIONS, Options, add_options, options_of
from wan_jax.cli.recipes import RECIPES, get_recipe
from wan_jax.diffusion.params import DTYPES
from wan_jax.errors import InputError
from wan_jax.runtime import xla_flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 some videos of a file failed, 2 bad input, 130 interrupted."""
    parser = _parser()
    values, rest = parser.parse_known_args(arguments)
    if rest and "takes_rest" not in values:  # the commands whose arguments their recipe knows
        parser.error(f"unknown argument {rest[0]!r}; see wan-jax {values.command} --help")
    values.rest = rest
    xla_flags.configure()
    xla_flags.use_compile_cache()
    try:
        code = values.run(values)
    except InputError as error:
        print(f"wan-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("wan-jax: interrupted", file=sys.stderr)
        return 130
    return code or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wan-jax", description="Wan video models in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser("generate", help="make videos from prompts", allow_abbrev=False)
    command.add_argument("--recipe", help=f"options to start from: {' | '.join(RECIPES)}", metavar="NAME")
    add_options(command, list(OPTIONS))
    command.set_defaults(run=_generate)

    command = commands.add_parser("sample", help="run a recipe: --config FILE [--config.steps=30 ...]", add_help=False)
    command.set_defaults(run=_sample, takes_rest=True)

    train.add_command(commands)

    command = commands.add_parser("extend", help="continue a video from its last frame", allow_abbrev=False)
    command.add_argument("video", help="the video file to continue; models for image to video can", metavar="VIDEO")
    skipped = {"prompts", "image", "last_image", "size", "initial_latents", "save_latents", "save_frames", "json"}
    skipped |= {"overwrite", "extend_prompt", "extend_model", "extend_url", "extend_key"}
    add_options(command, [name for name in OPTIONS if name not in skipped])
    command.set_defaults(run=_extend)

    command = commands.add_parser("decode", help="finish a video from saved latents", allow_abbrev=False)
    command.add_argument("latents", help="float32 [C, F', h, w]", metavar="LATENTS.npy")
    add_options(command, ["checkpoint", "vae_dtype", "output", "quiet"])
    command.set_defaults(run=_decode)

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

    command = commands.add_parser("info", help="say what a checkpoint is", allow_abbrev=False)
    command.add_argument("checkpoint", help="folder, file or hub id", metavar="PATH")
    command.set_defaults(run=_info)

    command = commands.add_parser(
        "plan", help="predict memory and seconds before anything is loaded", allow_abbrev=False
    )
    command.add_argument("--preset", default="t2v-a14b", help="model (default t2v-a14b)", metavar="NAME")
    add_options(command, ["size", "frames", "steps", "guidance", "shift", "solver", "schedule"])
    add_options(command, ["dtype", "vae_dtype", "profile", "mesh"])
    command.add_argument("--devices", type=int, help="that --mesh auto may use, instead of those here", metavar="N")
    command.add_argument("--device-memory", type=float, help="what fits, instead of this device's", metavar="GIB")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_plan)

    command = commands.add_parser("demo", help="convert and run the small model of the package", allow_abbrev=False)
    command.add_argument("folder", nargs="?", default="outputs/demo", help="where (default outputs/demo)")
    command.set_defaults(run=_demo)

    for entry_point in entry_points(group="wan_jax.commands"):
        entry_point.load()(commands)
    return parser


def _generate(values: argparse.Namespace) -> int:
    return _run(options_of(values, get_recipe(values.recipe) if values.recipe is not None else {}))


def _sample(values: argparse.Namespace) -> int:
    from wan_jax.cli.recipes import load_recipe

    return _run(load_recipe(values.rest))


def _run(options: Options) -> int:
    from wan_jax.cli.generate import generate
    from wan_jax.runtime.distributed import is_primary

    report = generate(options)
    if not is_primary():
        pass
    elif options.json:
        print(json.dumps(report, ensure_ascii=False))
    elif report["outputs"]:
        print("\n".join(report["outputs"]))
    if report["failed"]:
        print(f"wan-jax: {len(report['failed'])} of {len(report['videos'])} videos failed", file=sys.stderr)
    return 1 if report["failed"] else 0


def _extend(values: argparse.Namespace) -> None:
    from wan_jax.cli.generate import extend

    print("\n".join(map(str, extend(values.video, options_of(values)))))


def _decode(values: argparse.Namespace) -> None:
    from wan_jax.cli.generate import decode

    print("\n".join(map(str, decode(values.latents, options_of(values)))))


def _convert(values: argparse.Namespace) -> None:
    from wan_jax.checkpoint import convert, open_checkpoint
    from wan_jax.cli.generate import read_loras
    from wan_jax.lora import merge_loras, open_loras
    from wan_jax.runtime.progress import Bars

    loras = read_loras(values.merge_lora, values.merge_lora_high, values.merge_lora_low)
    checkpoint = open_checkpoint(values.source)
    merged = merge_loras(checkpoint, open_loras(loras, checkpoint.config))
    with Bars(not values.quiet).transfers("convert") as report:
        summary = convert(merged, values.destination, values.dtype, values.to, report)
    print(summary)


def _info(values: argparse.Namespace) -> None:
    from wan_jax.checkpoint import open_checkpoint

    print(open_checkpoint(values.checkpoint).info())


def _plan(values: argparse.Namespace) -> None:
    from wan_jax.cli.generate import plan

    report = plan(values.preset, options_of(values), values.device_memory, values.devices)
    print(json.dumps(report.as_json()) if values.json else report)


def _demo(values: argparse.Namespace) -> None:
    from wan_jax.cli.demo import run_demo

    print(run_demo(pathlib.Path(values.folder)))


if __name__ == "__main__":
    sys.exit(main())

"""The `wan-jax` command: reads arguments, calls the library, prints. No logic lives here."""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from wan_jax.cli.options import Options
from wan_jax.cli.recipes import RECIPES, get_recipe
from wan_jax.diffusion.params import DTYPES
from wan_jax.errors import InputError
from wan_jax.runtime import xla_flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 some videos of a file failed, 2 bad input, 130 interrupted."""
    parser = _parser()
    values, rest = parser.parse_known_args(arguments)
    if rest and values.run not in RECIPE_COMMANDS:
        parser.error(f"unknown argument {rest[0]!r}; see wan-jax {values.command} --help")
    xla_flags.configure()
    xla_flags.use_compile_cache()
    try:
        code = values.run(values, rest) if values.run in RECIPE_COMMANDS else values.run(values)
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
    _add_options(command, [option.name for option in dataclasses.fields(Options)])
    command.set_defaults(run=_generate)

    command = commands.add_parser("sample", help="run a recipe: --config FILE [--config.steps=30 ...]", add_help=False)
    command.set_defaults(run=_sample)

    command = commands.add_parser(
        "train", help="fine-tune by a recipe: --config FILE [--config.lora.rank=32 ...]", add_help=False
    )
    command.set_defaults(run=_train)

    command = commands.add_parser("extend", help="continue a video from its last frame", allow_abbrev=False)
    command.add_argument("video", help="the video file to continue; models for image to video can", metavar="VIDEO")
    skipped = {"prompts", "image", "last_image", "size", "initial_latents", "save_latents", "save_frames", "json"}
    skipped |= {"overwrite", "extend_prompt", "extend_model", "extend_url", "extend_key"}
    _add_options(command, [option.name for option in dataclasses.fields(Options) if option.name not in skipped])
    command.set_defaults(run=_extend)

    command = commands.add_parser("decode", help="finish a video from saved latents", allow_abbrev=False)
    command.add_argument("latents", help="float32 [C, F', h, w]", metavar="LATENTS.npy")
    _add_options(command, ["checkpoint", "vae_dtype", "output", "quiet"])
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
    _add_options(command, ["size", "frames", "steps", "guidance", "shift", "solver", "schedule"])
    _add_options(command, ["dtype", "vae_dtype", "profile", "mesh"])
    command.add_argument("--devices", type=int, help="that --mesh auto may use, instead of those here", metavar="N")
    command.add_argument("--device-memory", type=float, help="what fits, instead of this device's", metavar="GIB")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_plan)

    command = commands.add_parser("bench", help="measure a part of a model", allow_abbrev=False)
    command.add_argument("part", help="denoiser | attention | text | vae | decode | video | mesh", metavar="PART")
    command.add_argument("--preset", default="t2v-a14b", help="model, or demo (default t2v-a14b)", metavar="NAME")
    command.add_argument("--weights", choices=("random",), default="random", help="speed does not depend on them")
    _add_options(command, ["size", "frames", "steps", "dtype", "vae_dtype"])
    command.add_argument("--repeats", type=int, default=5, help="timed runs, of which the median counts", metavar="N")
    command.add_argument(
        "--mesh", action="append", default=[], help="for bench vae, decode and video; several for mesh", metavar="MESH"
    )
    command.add_argument("--prompts", type=int, help="for bench mesh: videos at once (default 1)", metavar="N")
    command.add_argument(
        "--forwards", action="store_true", help="for bench mesh: no guided steps where a forward fills the mesh"
    )
    command.add_argument(
        "--hang-seconds", type=float, help="for bench mesh: end when nothing moves for so long", metavar="SECONDS"
    )
    command.add_argument("--output", type=pathlib.Path, help="write all figures here", metavar="F.json")
    command.add_argument("--plot", type=pathlib.Path, help="draw where a forward's time goes", metavar="F.png")
    command.set_defaults(run=_bench)

    command = commands.add_parser(
        "evaluate", help="measure what generated videos show, for prompts that the nano model never saw"
    )
    names = ("checkpoint", "negative_prompt", "size", "frames", "steps", "guidance", "shift", "solver", "schedule")
    _add_options(command, [*names, "lora", "lora_high", "lora_low", "dtype", "vae_dtype", "profile", "quiet"])
    command.add_argument("--one", type=int, default=12, help="prompts with one object, a language", metavar="N")
    command.add_argument("--two", type=int, default=6, help="prompts with two, a language", metavar="N")
    command.add_argument("--languages", default="en,zh,ja", help="(default en,zh,ja)", metavar="NAMES")
    command.add_argument(
        "--batch", type=int, help="prompts denoised at once (default 6 on a CPU, else 48)", metavar="N"
    )
    command.add_argument(
        "--compare", nargs="+", default=[], help='further settings on the same seeds: "steps=10 solver=euler" ...'
    )
    command.add_argument("--report", type=pathlib.Path, help="write all figures here", metavar="F.json")
    command.set_defaults(run=_evaluate)

    command = commands.add_parser("demo", help="convert and run the small model of the package", allow_abbrev=False)
    command.add_argument("folder", nargs="?", default="outputs/demo", help="where (default outputs/demo)")
    command.set_defaults(run=_demo)
    return parser


def _add_options(command: argparse.ArgumentParser, names: Sequence[str]) -> None:
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


def _options(values: argparse.Namespace, recipe: Mapping[str, Any] = MappingProxyType({})) -> Options:
    """The options that are given, over those of a recipe."""
    names = {option.name for option in dataclasses.fields(Options)}
    given = {name: value for name, value in vars(values).items() if name in names}
    frozen: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Options(**{**recipe, **frozen})


def _generate(values: argparse.Namespace) -> int:
    return _run(_options(values, get_recipe(values.recipe) if values.recipe is not None else {}))


def _sample(values: argparse.Namespace, rest: Sequence[str]) -> int:
    from wan_jax.cli.recipes import load_recipe

    return _run(load_recipe(rest))


def _train(values: argparse.Namespace, rest: Sequence[str]) -> None:
    from wan_jax.training import check_installed

    check_installed()
    from wan_jax.training.recipe import TrainOptions, load_train_recipe
    from wan_nano.recipe import NanoOptions

    options = load_train_recipe(rest, (TrainOptions, NanoOptions))
    if isinstance(options, NanoOptions):
        from wan_nano.train import train as train_nano

        print(train_nano(options))
        return
    from wan_jax.training.run import train

    for path in train(options):
        print(path)


RECIPE_COMMANDS = (_sample, _train)  # commands whose arguments their recipe knows


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

    print("\n".join(map(str, extend(values.video, _options(values)))))


def _decode(values: argparse.Namespace) -> None:
    from wan_jax.cli.generate import decode

    print("\n".join(map(str, decode(values.latents, _options(values)))))


def _convert(values: argparse.Namespace) -> None:
    from wan_jax.checkpoint import convert
    from wan_jax.checkpoint.hub import local_checkpoint
    from wan_jax.cli.generate import read_loras
    from wan_jax.runtime.progress import Bars

    loras = read_loras(values.merge_lora, values.merge_lora_high, values.merge_lora_low)
    source = local_checkpoint(values.source)
    with Bars(not values.quiet).transfers("convert") as report:
        summary = convert(source, values.destination, values.dtype, values.to, report, loras=loras)
    print(summary)


def _info(values: argparse.Namespace) -> None:
    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.checkpoint.hub import local_checkpoint

    print(open_checkpoint(local_checkpoint(values.checkpoint)).info())


def _plan(values: argparse.Namespace) -> None:
    from wan_jax.cli.generate import plan

    report = plan(values.preset, _options(values), values.device_memory, values.devices)
    print(json.dumps(report.as_json()) if values.json else report)


def _bench(values: argparse.Namespace) -> None:
    only_mesh, not_mesh = ("prompts", "forwards", "hang_seconds"), ("steps", "vae_dtype", "plot")
    for name in not_mesh if values.part == "mesh" else only_mesh:
        if vars(values).get(name):
            others = "single forwards and steps of the denoiser" if values.part == "mesh" else "one device or one mesh"
            raise InputError(f"--{name.replace('_', '-')}: bench {values.part} measures {others}; leave it out")
    options = _options(argparse.Namespace(**{**vars(values), "mesh": None, "prompts": None, "hang_seconds": None}))
    if values.part == "mesh":
        from wan_bench.meshes import run as run_mesh

        run_mesh(
            values.mesh,
            **{name: getattr(options, name) for name in ("size", "frames", "dtype")},
            **{name: getattr(values, name) for name in ("preset", "forwards", "hang_seconds", "repeats", "output")},
            prompts=1 if values.prompts is None else values.prompts,
        )
        return
    if len(values.mesh) > 1:
        raise InputError("several --mesh: bench mesh compares them")
    from wan_bench.parts import run

    run(
        **{name: getattr(options, name) for name in ("size", "frames", "steps", "dtype", "vae_dtype")},
        **{name: getattr(values, name) for name in ("part", "preset", "repeats", "output", "plot")},
        mesh=values.mesh[0] if values.mesh else None,
    )


def _evaluate(values: argparse.Namespace) -> None:
    from wan_nano.evaluate import evaluate_options

    names = ("compare", "one", "two", "languages", "batch", "report")
    evaluate_options(_options(values), **{name: getattr(values, name) for name in names})


def _demo(values: argparse.Namespace) -> None:
    from wan_jax.cli.demo import run_demo

    print(run_demo(pathlib.Path(values.folder)))


if __name__ == "__main__":
    sys.exit(main())

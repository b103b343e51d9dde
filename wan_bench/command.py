"""`wan-jax bench`: the command's flags. What it measures is imported when it runs."""

import argparse
import pathlib
from typing import Any

from wan_jax.cli.options import add_options, options_of
from wan_jax.errors import InputError


def add_command(commands: Any) -> None:
    command = commands.add_parser("bench", help="measure a part of a model", allow_abbrev=False)
    command.add_argument("part", help="denoiser | attention | text | vae | decode | video | mesh", metavar="PART")
    command.add_argument("--preset", default="t2v-a14b", help="model, or demo (default t2v-a14b)", metavar="NAME")
    command.add_argument("--weights", choices=("random",), default="random", help="speed does not depend on them")
    add_options(command, ["size", "frames", "steps", "dtype", "vae_dtype"])
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


def _bench(values: argparse.Namespace) -> None:
    only_mesh, not_mesh = ("prompts", "forwards", "hang_seconds"), ("steps", "vae_dtype", "plot")
    for name in not_mesh if values.part == "mesh" else only_mesh:
        if vars(values).get(name):
            others = "single forwards and steps of the denoiser" if values.part == "mesh" else "one device or one mesh"
            raise InputError(f"--{name.replace('_', '-')}: bench {values.part} measures {others}; leave it out")
    own = ("size", "frames", "steps", "dtype", "vae_dtype")
    options = options_of(argparse.Namespace(**{name: value for name, value in vars(values).items() if name in own}))
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
        **{name: getattr(options, name) for name in own},
        **{name: getattr(values, name) for name in ("part", "preset", "repeats", "output", "plot")},
        mesh=values.mesh[0] if values.mesh else None,
    )

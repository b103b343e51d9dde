"""`wan-jax plan`: memory and seconds before anything is loaded."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from wan_jax.cli.options import Options, add_options, options_of
from wan_jax.presets import get_preset

if TYPE_CHECKING:
    from wan_jax.planning.report import Report


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "plan", help="predict memory and seconds before anything is loaded", allow_abbrev=False
    )
    command.add_argument("--preset", default="t2v-a14b", help="model (default t2v-a14b)", metavar="NAME")
    add_options(command, ["size", "frames", "steps", "guidance", "shift", "solver", "schedule", "weights"])
    add_options(command, ["dtype", "vae_dtype", "profile", "mesh"])
    command.add_argument("--devices", type=int, help="that --mesh auto may use, instead of those here", metavar="N")
    command.add_argument("--device-memory", type=float, help="what fits, instead of this device's", metavar="GIB")
    command.add_argument("--host-memory", type=float, help="the same of the host", metavar="GIB")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_plan)


def _plan(values: argparse.Namespace) -> None:
    report = plan(values.preset, options_of(values), values.device_memory, values.devices, values.host_memory)
    print(json.dumps(report.as_json()) if values.json else report)


def plan(
    preset: str,
    options: Options,
    device_memory: float | None = None,
    devices: int | None = None,
    host_memory: float | None = None,
) -> "Report":
    """Predicts what the options need of a device and its host (or of ones with so many GiB).

    `devices` is how many the mesh "auto" may use, instead of those at hand.
    """
    config = get_preset(preset)
    settings = options.resolve(config)
    own = options.dtype, options.vae_dtype, options.profile
    if options.mesh is None:
        from wan_jax.planning.report import report

        return report(config, settings, own[0], own[2], device_memory, own[1], host_memory)
    from wan_jax.planning.mesh import report_mesh

    return report_mesh(config, settings, own[0], options.mesh, device_memory, own[1], own[2], devices, host_memory)

"""How many devices there are along each mesh axis, written "cfg2-ulysses2" or {"cfg": 2, "ulysses": 2}."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from wan_jax.config import WanConfig
from wan_jax.errors import InputError, unknown_name
from wan_jax.parallel.collectives import MESH_AXES


@dataclass(frozen=True)
class MeshSpec:
    """Sizes of the mesh axes; `collectives` says what each does. Devices along `fsdp` share the tokens as Ulysses'."""

    experts: int = 1
    data: int = 1
    cfg: int = 1
    pipeline: int = 1
    ring: int = 1
    fsdp: int = 1
    ulysses: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, text: "str | Mapping[str, int] | MeshSpec") -> "MeshSpec":
        """ "cfg2-ulysses2", or a dict of axis sizes, of which one may be -1 for all devices that are left.

        "single" is one device. Raises InputError for unknown axes and impossible sizes.
        """
        if isinstance(text, MeshSpec):
            return text
        if isinstance(text, Mapping):
            sizes = dict(text)
            if list(sizes.values()).count(-1) == 1 and (known := -math.prod(sizes.values())) > 0:
                sizes = {name: jax.device_count() // known if size == -1 else size for name, size in sizes.items()}
        else:
            sizes = {}
            for part in [] if text == "single" else text.split("-"):
                match = re.fullmatch(r"([a-z]+)(\d+)", part)
                if not match:
                    raise InputError(f"mesh {text!r}: write axes and sizes like cfg2-ulysses2, or auto")
                if match[1] in sizes:
                    raise InputError(f"mesh {text!r}: {match[1]} is named twice")
                sizes[match[1]] = int(match[2])
        for name, size in sizes.items():
            if name not in MESH_AXES:
                raise unknown_name("mesh axis", name, MESH_AXES)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"mesh axis {name} has size {size!r}; give a whole number of at least 1")
        return cls(**sizes)

    def __str__(self) -> str:
        return "-".join(f"{name}{size}" for name, size in self.axes.items()) or "single"

    @property
    def axes(self) -> dict[str, int]:
        """The axes with more than one device, slowest first."""
        return {name: getattr(self, name) for name in MESH_AXES if getattr(self, name) > 1}

    @property
    def devices(self) -> int:
        return math.prod(self.axes.values())

    def make_mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh, over the first devices that it needs. Raises InputError if there are fewer."""
        devices = jax.devices() if devices is None else devices
        if len(devices) < self.devices:
            raise InputError(
                f"mesh {self}: needs {self.devices} devices and there are {len(devices)}; use a smaller one, or auto"
            )
        sizes, names = tuple(getattr(self, name) for name in MESH_AXES), MESH_AXES
        return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=devices[: self.devices])

    def abstract_mesh(self) -> AbstractMesh:
        """The mesh without devices, for bookkeeping."""
        return AbstractMesh(tuple(getattr(self, name) for name in MESH_AXES), MESH_AXES)

    def check(self, config: WanConfig, *, prompts: int | None = None) -> None:
        """Raises InputError, naming what would be legal, for a mesh that the model cannot run on.

        `prompts` is how many videos are made at once; None where that is not known yet.
        """
        denoiser = config.denoiser
        if self.cfg > 2:
            raise InputError(
                f"mesh {self}: cfg can be 1 or 2, for the prompt and the negative prompt; use data for more prompts"
            )
        experts = len(config.experts)
        if self.experts not in (1, experts):
            raise InputError(f"mesh {self}: {config.name} has {experts} experts; use experts{experts}, or none")
        if prompts is not None and prompts % self.data:
            raise InputError(
                f"mesh {self}: a batch of {prompts} cannot be divided over data {self.data}; use {_legal(prompts)}, "
                "or give more prompts at once"
            )
        heads = denoiser.num_heads
        self._check_divides("tensor", self.tensor, f"{heads} heads", heads, ", or ring")
        heads //= self.tensor
        shared = f"{heads} heads" + (f" on each part of tensor {self.tensor}" if self.tensor > 1 else "")
        if self.fsdp > 1 and self.ulysses > 1:
            self._check_divides("fsdp times ulysses", self.fsdp * self.ulysses, shared, heads, ", or ring")
        for axis in ("fsdp", "ulysses"):
            self._check_divides(axis, getattr(self, axis), shared, heads, ", or ring")
        self._check_divides("tensor", self.tensor, f"ffn_dim {denoiser.ffn_dim}", denoiser.ffn_dim)
        self._check_divides("fsdp", self.fsdp, f"width {denoiser.dim}", denoiser.dim)
        self._check_divides("pipeline", self.pipeline, f"{denoiser.num_layers} layers", denoiser.num_layers)

    def _check_divides(self, axis: str, size: int, what: str, number: int, instead: str = "") -> None:
        if number % size:
            raise InputError(f"mesh {self}: {what} cannot be divided over {axis} {size}; use {_legal(number)}{instead}")


ONE_DEVICE = MeshSpec()


def _legal(number: int, most: int = 16) -> str:
    """The ways in which a number of things divides, for messages."""
    sizes = [size for size in range(1, min(number, most) + 1) if number % size == 0]
    return " or ".join(filter(None, [", ".join(map(str, sizes[:-1])), str(sizes[-1])]))

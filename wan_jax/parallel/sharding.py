"""The one set of sharding rules: which mesh axis splits which logical axis of a parameter.

A model names the axes of its parameters ("embed", "mlp"); a mesh has axes of devices ("fsdp", "tensor"). Sampling and
training use the same rules on every mesh; mesh axes of one device split nothing.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from wan_jax.parallel import collectives
from wan_jax.parallel.collectives import FSDP, PIPELINE, TENSOR

# What "tensor" splits, the models sum up again (`collectives.TENSOR_AXES`); what "fsdp" splits is gathered where it is
# used (`gather_outside_layers`, `models.nn.stacked_layers.scan_layers`).
RULES = {
    "layers": PIPELINE,
    "embed": FSDP,
    **dict.fromkeys(collectives.TENSOR_AXES, TENSOR),
    "vocab": TENSOR,
    "conv_in": None,
    "conv_out": None,
}


def parameter_spec(axes: Sequence[str | None]) -> P:
    """The spec of a parameter with these logical axes, "layers" first where layers are stacked.

    Vectors stay whole over "fsdp": gathering them would cost more than they take.
    """
    is_vector = len([axis for axis in axes if axis != "layers"]) == 1
    return P(*(None if axis is None or (axis == "embed" and is_vector) else RULES[axis] for axis in axes))


def state_specs(state: nnx.State) -> Any:
    """The specs of a transformer's state, as `nnx.split` returns it."""
    return jax.tree.map(lambda variable: parameter_spec(_axes(variable)), state, is_leaf=_is_variable)


def gather_outside_layers(state: nnx.State) -> nnx.State:
    """Gathers the parameters outside the layers from their parts; `scan_layers` gathers each layer."""

    def gather(variable: nnx.Variable) -> nnx.Variable:
        axes = _axes(variable)
        if "layers" in axes:
            return variable
        return variable.replace(collectives.gather_weight(variable.get_value(), axes))

    return jax.tree.map(gather, state, is_leaf=_is_variable)


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    axes = tuple(variable.get_metadata()["axes"])
    return ("layers", *axes) if len(axes) < len(variable.get_value().shape) else axes


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)

"""Equal layers, stacked on a leading axis and run in a scan, so that compile time does not grow with depth."""

from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from wan_jax.kernels.attention.backward import keeps_attention
from wan_jax.models.nn.linear import Options
from wan_jax.parallel import collectives
from wan_jax.runtime.offload import on_host, to_device


def stack_layers(layer: Callable[..., Any], num_layers: int, config: Any, **options: Unpack[Options]) -> Any:
    """Layers as one module, whose parameters have a leading "layers" axis; `scan_layers` runs it."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
    def make(rngs: nnx.Rngs):
        return layer(config, **options | Options(rngs=rngs))

    return make(options["rngs"])


# What the backward pass may keep of a layer, beside its inputs; the rest it computes again.
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "layer": None,  # nothing: least memory
    "attention": keeps_attention,  # the results of attention, which cost most to compute again
    "weights": lambda primitive, *_, **__: primitive is not lax.all_gather_p,  # all but gathered weights ("fsdp")
}


def scan_layers(
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    carry: Any,
    layers: nnx.Module,
    per_layer: Any = None,
    *,
    remat: str | None = None,
    unroll: bool = False,
) -> tuple[Any, Any]:
    """Runs stacked layers in order: `carry, y = step(carry, layer, x)` for each layer.

    Parameters in host memory (memory kind "pinned_host") and parameters that are sharded over devices ("fsdp") are
    fetched layer by layer, if `step` reads them. Each fetch runs while the layer before it computes, so the device
    holds two whole layers at a time. The arithmetic is the same wherever the parameters are.

    Args:
      step: one layer's work.
      carry: passed from layer to layer.
      layers: made by `stack_layers`.
      per_layer: arrays with a leading layers axis, such as a context; `step` gets one layer's x of it.
      remat: a name in REMAT_POLICIES, for training: the backward pass recomputes a layer instead of keeping what it
        needs of it. Parameters on the host, and sharded parameters without remat, have no gradients.
      unroll: for training, write out layers whose parameters are on the device instead of looping over them. What the
        backward pass keeps is not stacked then: steps of a few small layers move less memory, and compile longer.

    Returns:
      The last carry, and the ys stacked.
    """
    graphdef, parameters = nnx.split(layers)
    leaves, structure = jax.tree.flatten(parameters)
    variables = jax.tree.leaves(parameters, is_leaf=lambda node: isinstance(node, nnx.Variable))
    axes = [variable.get_metadata()["axes"] for variable in variables]
    is_remote = [on_host(leaf) or collectives.in_parts(names) for leaf, names in zip(leaves, axes, strict=True)]

    def run(carry: Any, layer: list[jax.Array | None], x: Any) -> tuple[Any, Any]:
        return step(carry, nnx.merge(graphdef, jax.tree.unflatten(structure, layer)), x)

    def gather(layer: list[jax.Array | None]) -> list[jax.Array | None]:
        return [
            leaf if leaf is None else collectives.gather_weight(leaf, n) for leaf, n in zip(layer, axes, strict=True)
        ]

    if remat is not None:
        # The backward pass gathers a layer again, too, instead of keeping it whole. A scan needs no guard against CSE.
        run = jax.checkpoint(
            lambda carry, layer, x, run=run: run(carry, gather(layer), x),
            policy=REMAT_POLICIES[remat],
            prevent_cse=False,
        )
    if remat is not None or not any(is_remote):
        return lax.scan(lambda carry, xs: run(carry, *xs), carry, (leaves, per_layer), unroll=unroll)

    count = len(leaves[0])
    # XLA makes every copy that it is told to, so parameters that nobody reads are left out.
    one_layer = jax.eval_shape(lambda: gather(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), leaves)))
    one_x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), per_layer)
    leaves = [leaf if read else None for leaf, read in zip(leaves, _reads(run, carry, one_layer, one_x), strict=True)]
    remote = [leaf if fetched else None for leaf, fetched in zip(leaves, is_remote, strict=True)]
    local = [None if fetched else leaf for leaf, fetched in zip(leaves, is_remote, strict=True)]

    def at(tree: Any, index: jax.Array | int) -> Any:
        # An index of the form step + constant, within bounds, lets XLA:GPU use the copy engine instead of a kernel.
        return jax.tree.map(
            lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False, allow_negative_indices=False), tree
        )

    def fetch(index: jax.Array | int) -> list[jax.Array | None]:
        return gather([leaf if leaf is None else to_device(leaf) for leaf in at(remote, index)])

    def run_fetched(index: jax.Array | int, carry: Any, fetched: list[jax.Array | None], ys: Any) -> tuple[Any, Any]:
        layer = [own if copy is None else copy for copy, own in zip(fetched, at(local, index), strict=True)]
        carry, y = run(carry, layer, at(per_layer, index))
        return carry, jax.tree.map(lambda ys, y: lax.dynamic_update_index_in_dim(ys, y, index, axis=0), ys, y)

    def run_and_fetch_next(state: tuple[jax.Array, Any, list, Any]) -> tuple[jax.Array, Any, list, Any]:
        index, carry, fetched, ys = state
        following = fetch(index + 1)
        carry, ys = run_fetched(index, carry, fetched, ys)
        return index + 1, carry, following, ys

    # A while loop, whose counter XLA recognises. The last layer runs after it: there is none left to fetch beside it.
    _, y = jax.eval_shape(run, carry, one_layer, one_x)
    ys = jax.tree.map(lambda y: jnp.zeros((count, *y.shape), y.dtype), y)
    _, carry, last, ys = lax.while_loop(
        lambda state: state[0] < count - 1, run_and_fetch_next, (jnp.int32(0), carry, fetch(0), ys)
    )
    return run_fetched(count - 1, carry, last, ys)


def _reads(run: Callable, carry: Any, layer: list[Any], x: Any) -> list[bool]:
    """Which of a layer's parameters `run(carry, layer, x)` depends on."""
    jaxpr = jax.make_jaxpr(run)(carry, layer, x).jaxpr
    variables = [variable for equation in jaxpr.eqns for variable in equation.invars] + jaxpr.outvars
    read = {id(variable) for variable in variables}
    start = len(jax.tree.leaves(carry))
    return [id(variable) in read for variable in jaxpr.invars[start : start + len(layer)]]

"""Training a denoiser on a mesh of up to 8 devices gives what one device gives."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.cli.main import main
from wan_jax.config import DenoiserConfig, SamplingConfig, TextEncoderConfig, VAEConfig, WanConfig
from wan_jax.media.video import Video
from wan_jax.models.denoiser import Denoiser
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.parameters import abstract_parameters
from wan_jax.testing.models import random_parameters, write_demo
from wan_jax.training.adapters import adapter_tree
from wan_jax.training.config import LoraConfig, NoiseConfig, OptimizerConfig, TrainerConfig
from wan_jax.training.denoiser_loss import DenoiserLoss
from wan_jax.training.metrics import read_metrics
from wan_jax.training.trainer import DrawnBatches, Trainer

# 3 x 1 x 3 = 9 tokens, and 5 rows of text: no axis divides them.
LATENTS = (16, 3, 2, 6)
CONFIG = WanConfig(
    denoiser=DenoiserConfig(num_layers=2, dim=32, num_heads=4, ffn_dim=24, text_dim=12, text_length=5, freq_dim=16),
    sampling=SamplingConfig(shift=3.0, boundary=None),
)
TREE = abstract_parameters(lambda: Denoiser(CONFIG.denoiser, dtype=jnp.float32, rngs=nnx.Rngs(0)))
LORA = LoraConfig(rank=3, alpha=6.0, targets="blocks.*,time_projection")


def make_batch(step: int, size: int = 4) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(step).standard_normal
    return {"latents": draw((size, *LATENTS), np.float32), "text": draw((size, 5, 12), np.float32)}


def setting(mesh: str, lora: bool, remat: str | None, config: WanConfig) -> tuple[Callable, tuple]:
    """The value and gradients of the loss as a function, and its arguments, the trained parameters first."""
    placement = Placement.over(MeshSpec.parse(mesh))

    def parameters(tree, seed):
        arrays = random_parameters(tree, seed, jnp.float32, placement.parameter_shardings(tree))
        return {name: array * 0.3 if name.endswith(".up") else array for name, array in arrays.items()}

    frozen = {"empty_text": placement.put(jnp.full((5, 12), 0.5))}
    trained = {name: parameters(TREE, seed) for seed, name in enumerate(config.experts)}
    if lora:
        frozen["experts"] = trained
        trained = {name: parameters(adapter_tree(TREE, LORA), 7 + seed) for seed, name in enumerate(config.experts)}
    loss = DenoiserLoss(
        config,
        config.experts,
        NoiseConfig(high_noise_share=0.25),
        jnp.float32,
        remat=remat,
        lora_scale=LORA.scale if lora else None,
        placement=placement,
    )
    batch = placement.put_batch(make_batch(0))
    keys = jax.random.split(jax.random.key(7), 4)
    return jax.value_and_grad(lambda *args: loss(*args)[0]), (trained, frozen, batch, keys)


def gradients(mesh: str, lora: bool, remat: str | None = None, config: WanConfig = CONFIG) -> dict[str, np.ndarray]:
    """Of the loss of one batch, by parameter."""
    function, (trained, *rest) = setting(mesh, lora, remat, config)
    value, found = jax.jit(function)(trained, *rest)
    leaves, _ = jax.tree_util.tree_flatten_with_path(found)
    for (_, leaf), parameter in zip(leaves, jax.tree.leaves(trained), strict=True):
        assert leaf.sharding.is_equivalent_to(parameter.sharding, leaf.ndim)
    return {"loss": np.asarray(value)} | {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_gradients(found: dict[str, np.ndarray], alone: dict[str, np.ndarray]) -> None:
    assert found.keys() == alone.keys()
    largest = max(np.abs(each).max() for name, each in alone.items() if name != "loss")
    for name, expected in alone.items():
        # Sums in another order. Gradients that are nothing but rounding are held to the largest of all.
        assert np.abs(found[name] - expected).max() < 1e-5 * max(np.abs(expected).max(), 1e-2 * largest), name


@pytest.fixture(scope="module")
def lora_alone():
    return gradients("single", lora=True)


@pytest.fixture(scope="module")
def whole_alone():
    return gradients("single", lora=False)


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        ("data4", None),
        ("fsdp4", None),
        ("ulysses4", "attention"),
        ("ring4", None),
        ("tensor4", "layer"),
        ("pipeline2", "layer"),
        ("data2-fsdp2-tensor2", "attention"),
        ("ring2-fsdp2-pipeline2", "layer"),
    ],
)
def test_loras_have_the_gradients_of_one_device(lora_alone, mesh, remat):
    assert_same_gradients(gradients(mesh, lora=True, remat=remat), lora_alone)


@pytest.mark.parametrize(
    ("mesh", "remat"), [("fsdp4", "layer"), ("data2-ulysses2-tensor2", None), ("pipeline2-fsdp2", "attention")]
)
def test_whole_experts_have_the_gradients_of_one_device(whole_alone, mesh, remat):
    assert_same_gradients(gradients(mesh, lora=False, remat=remat), whole_alone)


def subjaxprs(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield equation.primitive.name, inner
                yield from subjaxprs(inner)


@pytest.mark.parametrize("remat", [None, "attention"])
def test_the_backward_pass_keeps_no_gathered_weights(remat):
    function, arguments = setting("fsdp4", False, remat, CONFIG)
    bodies = [
        str(inner) for name, inner in subjaxprs(jax.make_jaxpr(function)(*arguments).jaxpr) if name == "shard_map"
    ]
    assert len(bodies) == 2  # forward and backward
    kernel = "f32[32,24]"  # of the feed-forward layer, of which each device has a quarter
    assert all(kernel in body for body in bodies)
    assert not any("f32[2,32,24]" in body for body in bodies)


def test_an_experts_examples_need_not_divide():
    """Of 4 examples the high-noise expert gets 1 and the low-noise one 3."""
    config = WanConfig(denoiser=CONFIG.denoiser, sampling=SamplingConfig(shift=5.0, boundary=0.875))
    assert_same_gradients(
        gradients("data2-ring2", lora=True, config=config), gradients("single", lora=True, config=config)
    )


def train(folder, mesh: str, accumulation=1, steps=3) -> Trainer:
    placement = Placement.over(MeshSpec.parse(mesh))
    parameters = {"denoiser": random_parameters(TREE, 0, jnp.float32, placement.parameter_shardings(TREE))}
    loss = DenoiserLoss(CONFIG, ("denoiser",), NoiseConfig(), jnp.float32, remat="layer", placement=placement)
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, eps=1e-3)
    config = TrainerConfig(steps=steps, accumulation=accumulation, optimizer=optimizer, save_every=2)
    frozen = {"empty_text": placement.put(jnp.full((5, 12), 0.5))}
    batches = DrawnBatches(lambda start: (make_batch(step, 8) for step in itertools.count(start)))
    trainer = Trainer(loss, parameters, batches, config, folder, frozen=frozen, placement=placement, show=None)
    trainer.run()
    return trainer


def test_a_mesh_trains_as_one_device_does(tmp_path):
    alone, sharded = train(tmp_path / "alone", "single"), train(tmp_path / "sharded", "data2-fsdp4", accumulation=2)
    name = "blocks.feed_forward.up.kernel"
    moment = sharded.state.optimizer[1][0].mu["denoiser"][name]
    for array in (sharded.state.parameters["denoiser"][name], moment, sharded.state.ema["denoiser"][name]):
        assert array.sharding.shard_shape(array.shape) == (2, 32 // 4, 24)
    for ours, expected in zip(read_metrics(tmp_path / "sharded"), read_metrics(tmp_path / "alone"), strict=True):
        assert abs(ours["loss"] - expected["loss"]) < 2e-6 * expected["loss"]  # float32 sums in another order
        assert abs(ours["gradient_norm"] - expected["gradient_norm"]) < 1e-5 * expected["gradient_norm"]
    assert_same_parameters(sharded, alone)

    # A run goes on with another mesh: from its second step, with one device.
    (tmp_path / "sharded" / "checkpoints" / "3").rename(tmp_path / "3")
    again = train(tmp_path / "sharded", "single")
    assert again.state.parameters["denoiser"][name].sharding.num_devices == 1
    assert_same_parameters(again, alone)


def assert_same_parameters(found: Trainer, expected: Trainer) -> None:
    for name, array in found.state.parameters["denoiser"].items():
        # An update is at most 1e-3 a step; Adam with eps 1e-3 keeps a gradient's relative error of 1e-5 as it is.
        np.testing.assert_allclose(array, expected.state.parameters["denoiser"][name], atol=1e-6, err_msg=name)


TINY = WanConfig(
    name="tiny",
    denoiser=DenoiserConfig(num_layers=2, dim=32, num_heads=4, ffn_dim=24, text_dim=20, text_length=8, freq_dim=16),
    text_encoder=TextEncoderConfig(vocab_size=300, dim=20, num_layers=1, num_heads=2, head_dim=8, ffn_dim=16),
    vae=VAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
    sampling=SamplingConfig(size=(32, 32), frames=5, steps=2, shift=3.0, guidance=(1.0, 1.0), negative_prompt=""),
)
RECIPE = """
from wan_jax.cli.train import train_recipe

def get_config():
    config = train_recipe()
    config.experts = "low_noise"
    config.dtype = config.export.dtype = "float32"
    config.data.buckets = "32x16x5"
    config.data.batch_size = 2
    config.lora.rank = 2
    config.trainer.steps = 3
    config.trainer.optimizer.warmup_steps = 0
    config.trainer.optimizer.eps = 1e-3
    return config
"""


def test_the_train_command_on_a_mesh(tmp_path):
    """A LoRA trained by `wan-jax train` has the losses and the files of one device."""
    write_demo(tmp_path / "tiny", "orbax", TINY)
    videos = tmp_path / "videos"
    videos.mkdir()
    for index, name in enumerate("ab"):
        Video(np.random.default_rng(index).integers(0, 255, (5, 16, 32, 3), np.uint8)).save(videos / f"{name}.mp4")
    rows = [json.dumps({"file_name": f"{name}.mp4", "caption": name}) for name in "ab"]
    (videos / "metadata.jsonl").write_text("\n".join(rows))
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    sharded, single = tmp_path / "data2-fsdp2-tensor2", tmp_path / "single"
    for output in (sharded, single):
        options = {"checkpoint": tmp_path / "tiny", "data.folder": videos, "output": output, "mesh": output.name}
        flags = [f"--config.{key}={value}" for key, value in options.items()]
        assert main(["train", "--config", str(recipe), *flags]) == 0
    for ours, expected in zip(read_metrics(sharded), read_metrics(single), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-4)
    names = {path.name for path in single.glob("lora-*")}
    assert names
    assert names == {path.name for path in sharded.glob("lora-*")}

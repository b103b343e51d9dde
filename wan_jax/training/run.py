"""One run of `wan-jax train`: from options to a trained checkpoint or LoRA."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.checkpoint import Checkpoint, convert, memory_checkpoint, open_checkpoint
from wan_jax.checkpoint.load import load_models, load_tokenizer
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError
from wan_jax.lora import Lora, merge_loras, open_loras, save_lora
from wan_jax.models.build import abstract_model
from wan_jax.models.denoiser import Denoiser
from wan_jax.parallel.collectives import CFG, EXPERTS
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement, put
from wan_jax.parameters import named_parameters, with_parameters
from wan_jax.pipeline import WanPipeline
from wan_jax.runtime import xla_flags
from wan_jax.runtime.devices import matmul_rate
from wan_jax.runtime.events import Run
from wan_jax.runtime.files import written_whole
from wan_jax.runtime.offload import PROFILES, place, single_device
from wan_jax.runtime.progress import Bars
from wan_jax.training.adapters import adapter_tree, initial_adapters, make_adapters
from wan_jax.training.config import TrainOptions, check_same_run
from wan_jax.training.denoiser_loss import DenoiserLoss, training_flops
from wan_jax.training.latents import LatentBatches, encode_examples
from wan_jax.training.step import TrainState
from wan_jax.training.trainer import Every, Trainer, show_line
from wan_jax.training.videos import parse_buckets, read_metadata

RECIPE = "recipe.json"


def train(options: TrainOptions) -> list[Path]:
    """Trains as told and exports; returns what was exported. A run that is in the folder already goes on.

    Everything that can be checked is checked before weights are loaded.

    Raises:
        InputError: an option that cannot be used, or data of which nothing can.
    """
    run = TrainingRun(options)
    trainer = run.make_trainer()
    if not options.export_only:
        run.remember()
        trainer.run()
    elif trainer.step == 0:
        raise InputError(f"{run.folder}: there is no checkpoint to export yet; train first")
    return run.export(trainer)


class TrainingRun:
    """The parts of a run, made from its options in the order in which they are needed."""

    def __init__(self, options: TrainOptions):
        self.options = options
        self.folder = Path(options.output)
        self.run = Run(Bars(not options.quiet))
        self.checkpoint = open_checkpoint(options.checkpoint)
        for note in self.checkpoint.notes:
            self.run.note(note)
        self.config = self.checkpoint.config
        if self.config.conditioning != "text":
            raise InputError(f"{self.config.name} makes videos from images, which this trainer does not do yet")
        self.experts = self._experts()
        self.buckets = parse_buckets(options.data.buckets, self.config)
        self.examples = read_metadata(
            Path(options.data.folder), None if options.data.metadata is None else Path(options.data.metadata)
        )
        if not any(example.file.is_file() for example in self.examples):
            raise InputError(f"none of the {len(self.examples)} videos exists, not even {self.examples[0].file}")
        self.sample_settings = self._sample_settings()
        self.placement = self._placement()
        self.tree = abstract_model(self.config.denoiser)
        self.lora = options.lora.scale is not None
        self.trained_tree = adapter_tree(self.tree, options.lora) if self.lora else self.tree
        self.loss = DenoiserLoss(
            self.config,
            self.experts,
            options.noise,
            jnp.dtype(options.dtype),
            remat=options.remat,
            lora_scale=options.lora.scale,
            placement=self.placement,
            batch_size=options.data.batch_size,
        )
        self._check_same_run()
        self._encoding = Placement(offload=PROFILES["swap"])
        self._frozen: dict[str, Any] = {}
        self._others: dict[str, Denoiser] = {}  # experts that samples need and that do not train

    def make_trainer(self) -> Trainer:
        """Encodes the data, loads what is trained, and restores the last checkpoint."""
        options = self.options
        self.pipeline = self._load_encoders()
        cache = self.folder / "cache" if options.data.cache is None else Path(options.data.cache)
        fps = self.config.sampling.fps if options.data.fps is None else options.data.fps
        records = encode_examples(self.examples, self.buckets, self.pipeline, cache, fps, self.run.note)
        batches = LatentBatches(
            records, options.data.batch_size, self.config.denoiser.text_length, options.trainer.seed, self.run.note
        )
        negative = () if self.sample_settings is None else (self.sample_settings.negative_prompt,)
        empty, *_ = self.pipeline.encode_prompts(["", *options.samples.prompts, *negative])  # the rest for samples
        self._frozen["empty_text"] = self.placement.put(empty)
        parameters = self._parameters()
        every = options.samples.every
        on_gpus = not self.placement.is_single and jax.default_backend() == "gpu"
        return Trainer(
            self.loss,
            parameters,
            batches,
            options.trainer,
            self.folder,
            frozen=self._frozen,
            placement=self.placement,
            flops=self._flops,
            peak_flops=matmul_rate(),
            intervals=[] if every is None else [Every(every, self._sample)],
            compiler_options=xla_flags.mesh_options() if on_gpus else None,
            show=None if options.quiet else show_line,
        )

    def export(self, trainer: Trainer) -> list[Path]:
        """Writes checkpoint-N/ or lora-N-EXPERT-STYLE.safetensors, of step N; files that exist stay."""
        export, step = self.options.export, trainer.step
        trained = trainer.averaged if export.weights == "ema" else trainer.state.parameters
        trained = {expert: {name: np.asarray(x) for name, x in arrays.items()} for expert, arrays in trained.items()}
        destination = self.folder / f"checkpoint-{step}"
        if not self.lora:
            parts = memory_checkpoint(self.config, trained, None).parts
            checkpoint = dataclasses.replace(self.checkpoint, parts={**self.checkpoint.parts, **parts})
            return [self._convert(checkpoint, destination)]
        files = self._export_loras(trained, step)
        paths = [path for _, path in files]
        if not export.merged:
            return paths
        # Of each expert one of its files, whatever its style: they hold the same.
        one = len(self.config.experts) == 1
        loras = [Lora(str(path), 1.0, cast(Any, "both" if one else expert)) for expert, path in dict(files).items()]
        merged = merge_loras(self.checkpoint, open_loras(loras, self.config))
        return [*paths, self._convert(merged, destination)]

    def _export_loras(self, trained: Mapping[str, Mapping[str, np.ndarray]], step: int) -> list[tuple[str, Path]]:
        files = []
        scale = self.options.lora.scale
        assert scale is not None
        model = nnx.eval_shape(self._build)
        for expert, arrays in trained.items():
            adapters = make_adapters(model, {name: jnp.asarray(array) for name, array in arrays.items()}, scale)
            for style in self.options.export.styles:
                path = self.folder / f"lora-{step}-{expert}-{style}.safetensors"
                one = expert if len(self.config.experts) > 1 else None
                save_lora(path, adapters, self.config.denoiser, style, expert=one)  # type: ignore[arg-type]
                files.append((expert, path))
        return files

    def _convert(self, checkpoint: Checkpoint, destination: Path) -> Path:
        if not destination.exists():
            with self.run.transfers("export") as report:
                convert(checkpoint, destination, self.options.export.dtype, progress=report)
        return destination

    def _experts(self) -> tuple[str, ...]:
        wanted = self.options.experts
        if wanted == "all":
            return self.config.experts
        if wanted not in self.config.experts:
            raise InputError(f"{self.config.name} has one expert, no {wanted} one; use experts = 'all'")
        return (wanted,)

    def _placement(self) -> Placement:
        mesh_spec = MeshSpec.parse(self.options.mesh)
        if others := mesh_spec.axes.keys() & {EXPERTS, CFG}:
            raise InputError(f"mesh {mesh_spec}: training has no use for {min(others)}; use data, or any other axis")
        mesh_spec.check(self.config)
        placement = Placement.over(mesh_spec)
        parts, batch_size = self.options.trainer.accumulation * mesh_spec.data, self.options.data.batch_size
        if batch_size % parts:
            raise InputError(f"batch_size {batch_size}: must divide by accumulation times the mesh's data, {parts}")
        return placement

    def _sample_settings(self) -> SamplingParams | None:
        samples = self.options.samples
        if samples.every is None:
            return None
        choices = {name: vars(samples)[name] for name in ("size", "frames", "steps", "seed")}
        return SamplingParams(**choices).resolve(self.config)

    def _check_same_run(self) -> None:
        """Compares the options with those of the steps that the folder holds, if any."""
        path = self.folder / RECIPE
        if path.exists() and any((self.folder / "checkpoints").glob("[0-9]*")):
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise InputError(f"{path} is damaged; remove it if the options are those of the run") from None
            check_same_run(before, dataclasses.asdict(self.options), str(self.folder))

    def remember(self) -> None:
        """Writes the options beside the run, which other options cannot continue once it has a checkpoint."""
        with written_whole(self.folder / RECIPE) as temporary:
            now = dataclasses.asdict(self.options)
            temporary.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _build(self) -> Denoiser:
        return Denoiser(self.config.denoiser, dtype=self.loss.dtype, rngs=nnx.Rngs(0))

    def _load_encoders(self) -> WanPipeline:
        """Text encoder and VAE, which wait on the host while the denoiser trains."""
        dtype, placement = self.options.dtype, self._encoding
        return WanPipeline(
            self.config,
            tokenizer=load_tokenizer(self.checkpoint),
            denoisers={},
            placement=placement,
            **load_models(self.checkpoint, ("text_encoder", "vae"), dtype, "float32", placement, self.run),
        )

    def _parameters(self) -> dict[str, dict[str, jax.Array]]:
        """What is trained, float32, in place; with adapters the base goes to `_frozen`."""
        if not self.lora:
            return {expert: self._load(expert, "float32") for expert in self.experts}
        self._frozen["experts"] = {expert: self._load(expert, self.options.dtype) for expert in self.experts}
        shardings = self.placement.parameter_shardings(self.trained_tree)
        parameters = {}
        for index, expert in enumerate(self.experts):
            arrays = initial_adapters(self.trained_tree, seed=self.options.trainer.seed + index)
            parameters[expert] = {name: put(array, shardings[name]) for name, array in arrays.items()}
        return parameters

    def _load(self, expert: str, dtype: str) -> dict[str, jax.Array]:
        with self.run.transfers("load") as report:
            return self.checkpoint.load(expert, dtype, self.placement.parameter_shardings(self.tree), progress=report)

    def _flops(self, batch: Mapping[str, Any]) -> float:
        *sizes, _, frames, height, width = batch["latents"].shape
        patch = self.config.denoiser.patch_size
        tokens = frames // patch[0] * (height // patch[1]) * (width // patch[2])
        return np.prod(sizes) * training_flops(self.config.denoiser, tokens, weights=not self.lora)

    def _sample(self, step: int, state: TrainState) -> None:
        """Writes samples/step-N-I.mp4, made with the weights that would be exported."""
        assert self.sample_settings is not None
        use_average = self.options.export.weights == "ema" and state.ema is not None
        trained, frozen = state.ema if use_average else state.parameters, self._frozen
        device = single_device(jax.devices()[0], on_host=False)
        if not self.placement.is_single:  # samples are made on one device
            trained, frozen = jax.device_put((trained, self._frozen), device)
        denoisers = {expert: self.loss.denoiser(expert, trained, frozen) for expert in self.experts}
        # Arrays that are where the pipeline runs them are shared with it; it frees only what it copied itself.
        denoisers = {
            expert: place(denoiser, dict.fromkeys(named_parameters(denoiser), device))
            for expert, denoiser in denoisers.items()
        }
        for expert in self.config.experts:
            if expert not in denoisers:
                if expert not in self._others:
                    arrays = self.checkpoint.load(expert, self.options.dtype, self._encoding.parameter_sharding(()))
                    self._others[expert] = with_parameters(self._build, arrays)
                denoisers[expert] = self._others[expert]
        pipeline, settings = self.pipeline.with_denoisers(denoisers), self.sample_settings
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        for index, prompt in enumerate(self.options.samples.prompts):
            pipeline(dataclasses.replace(settings, prompt=prompt)).save(folder / f"step-{step:06}-{index}.mp4")

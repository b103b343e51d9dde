"""Shared fixtures: the persistent compile cache, no network, and a small tokenizer."""

import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA's pool. Collectives among 8 CPU devices wait in threads, several for each device: with too few they
# wait for each other for ever.
os.environ.setdefault("NPROC", "32")

import jax
import pytest

CACHE = pathlib.Path(os.environ.get("WAN_JAX_TEST_CACHE", pathlib.Path.home() / ".cache" / "wan_jax" / "tests"))
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_num_cpu_devices", 8)  # for the tests of meshes; all others use the first


COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **more: COMPILED.append(str(more.get("fun_name"))) if "backend_compile" in event else None
)


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    """With `-m quick` only files that have quick tests are imported: importing all takes longer than those tests."""
    if config.option.markexpr == "quick" and collection_path.name.startswith("test_"):
        return "mark.quick" not in collection_path.read_text() or None
    return None


@pytest.fixture
def compiled() -> list[str]:
    """Names of the programs that were compiled since the test began, or since it cleared the list."""
    COMPILED.clear()
    return COMPILED


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> pathlib.Path:
    """A small Unigram tokenizer for English and Chinese, as T5's."""
    from tests.prompts import PROMPTS
    from wan_jax.testing.tokenizer import train_small_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer(PROMPTS, 300, folder)
    return folder


@pytest.fixture(scope="session")
def diffusers_tree(tokenizer_folder, tmp_path_factory) -> pathlib.Path:
    """A two-expert checkpoint in the diffusers layout, float32, of awkward dims, with a flow_shift of its own."""
    from wan_jax.config import DenoiserConfig, SamplingConfig, TextEncoderConfig, VAEConfig, WanConfig
    from wan_jax.testing.models import write_demo

    config = WanConfig(
        name="custom",
        denoiser=DenoiserConfig(num_layers=2, dim=60, num_heads=3, ffn_dim=52, text_dim=28, freq_dim=64),
        text_encoder=TextEncoderConfig(vocab_size=303, dim=28, num_layers=2, num_heads=5, head_dim=6, ffn_dim=44),
        vae=VAEConfig(base_dim=6, dim_mult=(1, 1, 2, 2), num_res_blocks=1),
        sampling=SamplingConfig(shift=3.0),
    )
    folder = tmp_path_factory.mktemp("diffusers") / "tree"
    write_demo(folder, "diffusers", config, dtype="float32", tokenizer_folder=tokenizer_folder)
    return folder

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
    from tests.originals import PROMPTS
    from wan_jax.testing.tokenizer import train_small_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_small_tokenizer(PROMPTS, 300, folder)
    return folder


@pytest.fixture(scope="session")
def diffusers_tree(tokenizer_folder, tmp_path_factory) -> pathlib.Path:
    """A two-expert checkpoint as diffusers saves it, float32, with diffusers' own flow_shift."""
    from tests import originals

    folder = tmp_path_factory.mktemp("diffusers")
    originals.pipeline(tokenizer_folder).save_pretrained(folder)
    return folder

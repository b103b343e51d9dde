"""Checkpoints that diffusers itself saves."""

import pathlib

import pytest

from tests.parity import originals


@pytest.fixture(scope="session")
def diffusers_tree(tokenizer_folder, tmp_path_factory) -> pathlib.Path:
    """A two-expert checkpoint as diffusers saves it, float32, with diffusers' own flow_shift."""
    folder = tmp_path_factory.mktemp("diffusers")
    originals.pipeline(tokenizer_folder).save_pretrained(folder)
    return folder

"""Checkpoints that many tests read, written once. They are shared: copy before changing one."""

import pytest

from tests.checkpoint.trees import write_comfyui, write_diffusers, write_official


@pytest.fixture(scope="session")
def official_tree(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="session")
def diffusers_layout_tree(tmp_path_factory):
    return write_diffusers(tmp_path_factory.mktemp("diffusers"))


@pytest.fixture(scope="session")
def comfyui_tree(tmp_path_factory):
    return write_comfyui(tmp_path_factory.mktemp("comfyui"))

"""The wheel and the sdist: all that users need is in them, and nothing else is installed."""

import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import wan_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = "wan_jax", "wan_nano", "wan_bench"
BUILD = "import sys; from setuptools import build_meta as b; to = sys.argv[1]; b.build_wheel(to); b.build_sdist(to)"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Names of the files of the wheel and of the sdist; the wheel itself."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", BUILD, str(built)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist()), in_sdist, wheel


def test_every_file_of_the_packages_is_in_both(distributions):
    in_wheel, in_sdist, _ = distributions
    files = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"wan_jax/py.typed", "wan_jax/assets/nano/model_index.json", "wan_nano/classifier.npz"} <= files
    assert files - in_wheel == set()
    assert files - in_sdist == set()
    assert {name.split("/")[0].partition("-")[0] for name in in_wheel} == {*PACKAGES}  # and the wheel's own folder


def test_what_the_wheel_says(distributions):
    *_, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(f"{folder}/METADATA").decode()
        entries = archive.read(f"{folder}/entry_points.txt").decode()
    for line in ("wan-jax = wan_jax.cli.main:main", "bench = wan_bench", "evaluate = wan_nano", "nano = wan_nano"):
        assert line in entries
    assert f"Version: {wan_jax.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Description-Content-Type: text/markdown\n" in metadata
    assert metadata.partition("\n\n")[2].strip()  # the page that an index shows


def test_it_runs_where_it_is_unpacked(distributions, tmp_path):
    *_, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    command = [sys.executable, "-m", "wan_jax.cli.main", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"wan-jax {wan_jax.__version__}"), done.stderr

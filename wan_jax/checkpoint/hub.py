"""Where a checkpoint or a LoRA is: a local path, or a hub id that is downloaded first."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from wan_jax.checkpoint.formats.tensors import brief
from wan_jax.errors import InputError

# Weights, configs and tokenizers of every layout; not the pictures and demos beside them.
WANTED_FILES = ("*.json", "*.safetensors", "*.pth", "*.model", "*.txt")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILE = re.compile(rf"({HUB_ID.pattern})/(.+\.safetensors)")


def local_checkpoint(path_or_id: str | os.PathLike) -> Path:
    """Returns the local folder or file; downloads it (once: the hub's own cache keeps it) if it is a hub id.

    Raises InputError where there is neither such a path nor such a repository, or the hub cannot be reached.
    """
    path, name = Path(os.path.expanduser(path_or_id)), os.fspath(path_or_id)
    if name and path.exists():
        return path
    if not HUB_ID.fullmatch(name) or name.startswith("."):
        raise InputError(f"checkpoint {name!r} does not exist; give a folder, a file, or a hub id (organisation/name)")

    from huggingface_hub import snapshot_download

    return _download(f"checkpoint {name}", lambda: snapshot_download(name, allow_patterns=list(WANTED_FILES)))


def local_lora(path_or_id: str | os.PathLike) -> Path:
    """Returns the local file; of "organisation/name/FILE.safetensors" the hub's, downloaded once.

    Raises InputError where there is neither, or the hub cannot be reached.
    """
    path, name = Path(os.path.expanduser(path_or_id)), os.fspath(path_or_id)
    if path.is_file():
        return path
    match = HUB_FILE.fullmatch(name)
    if not match or name.startswith("."):
        raise InputError(
            f"LoRA {name}: no such file; give a .safetensors file, or the hub's as organisation/name/FILE.safetensors"
        )

    from huggingface_hub import hf_hub_download

    return _download(f"LoRA {name}", lambda: hf_hub_download(match[1], match[2]))


def _download(what: str, download: Callable[[], str]) -> Path:
    try:
        return Path(download())
    except Exception as error:  # refused names, the network, the hub: each library below raises its own
        raise InputError(f"{what} is no local path and could not be downloaded ({brief(error)})") from error

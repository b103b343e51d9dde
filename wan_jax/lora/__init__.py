"""LoRAs: files of any dialect in, adapters on denoisers, files and merged checkpoints out."""

from wan_jax.lora.export import merge_loras, save_lora
from wan_jax.lora.files import Lora, LoraFile, Loras, OpenLoras, open_loras

__all__ = ["Lora", "LoraFile", "Loras", "OpenLoras", "merge_loras", "open_loras", "save_lora"]

"""The official file of CLIP, read and written as its vision tower in the shapes of our table.

There, one projection makes queries, keys and values, and embeddings have leading axes of size 1. The table has them
apart, as diffusers does: "...to_qkv.weight[query]" and so on. The file's text tower is ignored (see `layouts.IGNORED`).
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from wan_jax.checkpoint.tensors import ReadMany, TensorInfo, TensorStore

PREFIX = "visual."
FUSED = ".attn.to_qkv."
PARTS = ("query", "key", "value")
LEADING_AXES = {"visual.cls_embedding": (1, 1), "visual.pos_embedding": (1,)}  # before those of the table


class VisionTowerStore(TensorStore):
    """A store of the official file, with the names and shapes of the table."""

    def __init__(self, store: TensorStore):
        self.place = store.place
        self._store = store
        self.tensors = {}
        self._sources: dict[str, tuple[str, int]] = {}  # our name -> stored name, and where the part begins
        for name, info in store.tensors.items():
            axes = LEADING_AXES.get(name, ())
            if name.startswith(PREFIX) and FUSED in name and info.shape and info.shape[0] % len(PARTS) == 0:
                rows = info.shape[0] // len(PARTS)
                for index, part in enumerate(PARTS):
                    self.tensors[f"{name}[{part}]"] = TensorInfo((rows, *info.shape[1:]), info.dtype, info.file)
                    self._sources[f"{name}[{part}]"] = name, index * rows
            elif info.shape[: len(axes)] == axes:
                self.tensors[name] = TensorInfo(info.shape[len(axes) :], info.dtype, info.file)
                self._sources[name] = name, 0
            else:  # of a shape that the table will not have
                self.tensors[name] = info
                self._sources[name] = name, 0

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        stored_name, start = self._sources[name]
        shape = self.tensors[name].shape
        tensor = self._store.read(stored_name, dtype)
        return tensor[start : start + shape[0]] if name != stored_name else tensor.reshape(shape)


def as_official(tensors: Mapping[str, TensorInfo], read_many: ReadMany) -> tuple[dict[str, TensorInfo], ReadMany]:
    """What to write for the table's tensors: the official names and shapes, and a reader of them."""
    names = dict.fromkeys(name.partition("[")[0] for name in tensors)
    sources = {name: [f"{name}[{part}]" for part in PARTS] if FUSED in name else [name] for name in names}
    written = {}
    for name, parts in sources.items():
        first = tensors[parts[0]]
        rows = sum(tensors[part].shape[0] for part in parts)
        shape = (*LEADING_AXES.get(name, ()), rows, *first.shape[1:])
        written[name] = TensorInfo(shape, first.dtype, first.file)

    def read(names: Sequence[str]) -> Iterator[np.ndarray]:
        arrays = read_many([part for name in names for part in sources[name]])
        for name in names:
            yield np.concatenate([next(arrays) for _ in sources[name]]).reshape(written[name].shape)

    return written, read

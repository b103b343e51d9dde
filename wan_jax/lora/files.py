"""LoRA files of every dialect, bound to a denoiser's table: names and shapes are verified before any factor is read.

    weight + scale * (alpha / rank * up @ down + diff),  bias + scale * diff_b,  modulation + scale * diff_m

alpha / rank is 1 where a file says no alpha. How files name things is in names.py.
"""

import difflib
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import regex

from wan_jax.checkpoint.formats.safetensors import SafetensorsFile
from wan_jax.checkpoint.formats.tensors import (
    FLOAT8_DTYPES,
    WEIGHT_DTYPES,
    brief,
    check_finite_weights,
    copy_into,
    strict_json,
)
from wan_jax.checkpoint.hub import local_lora
from wan_jax.checkpoint.tables import ParamMapping, expanded_table
from wan_jax.config import DenoiserConfig, WanConfig
from wan_jax.errors import InputError, unknown_name
from wan_jax.lora.names import (
    EXPERT_METADATA,
    LEAVES,
    OTHER_METHODS,
    Key,
    Leaf,
    Part,
    guess_expert,
    modules,
    parse_key,
    without_prefixes,
)
from wan_jax.presets import PRESETS

ExpertChoice = Literal["both", "high_noise", "low_noise"]
EXPERT_CHOICES: tuple[ExpertChoice, ...] = ("both", "high_noise", "low_noise")
FACTOR_DTYPES = (*WEIGHT_DTYPES, *FLOAT8_DTYPES, np.dtype(np.float64))
PAIRED: tuple[Part, ...] = ("down", "up", "alpha", "up_bias")  # what makes sense only with both factors
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Lora:
    """A LoRA as the user asks for it.

    Attributes:
        file: a safetensors file of any dialect, or "organisation/name/FILE.safetensors" of the hub.
        scale: what its change is multiplied with.
        expert: "high_noise", "low_noise", or "both": every expert that the model has.
    """

    file: str
    scale: float = 1.0
    expert: ExpertChoice = "both"

    def __post_init__(self):
        if self.expert not in EXPERT_CHOICES:
            raise unknown_name("expert of a LoRA", self.expert, EXPERT_CHOICES)
        if not math.isfinite(self.scale):
            raise InputError(f"LoRA {self.file}: strength {self.scale} is not a finite number")

    @classmethod
    def parse(cls, text: str, expert: ExpertChoice = "both") -> "Lora":
        """ "FILE" or "FILE:STRENGTH"."""
        file, colon, scale = text.rpartition(":")
        try:
            number = float(scale) if colon else 1.0
        except ValueError:  # a colon in the file's name
            return cls(text, 1.0, expert)
        return cls(file if colon else text, number, expert)

    def as_json(self) -> dict[str, Any]:
        return {"file": self.file, "strength": self.scale, "expert": self.expert}


@dataclass(frozen=True)
class Change:
    """What a file changes of one parameter, at scale 1."""

    mapping: ParamMapping
    down: str | None = None  # stored names of the factors: [rank, inputs],
    up: str | None = None  # [outputs, rank]
    scale: float = 1.0  # alpha / rank
    diffs: tuple[tuple[str, float], ...] = ()  # stored names of what is added as it is, each times a number

    @property
    def names(self) -> list[str]:
        factors = [name for name in (self.down, self.up) if name is not None]
        return factors + [name for name, _ in self.diffs]


@dataclass(frozen=True)
class LoraFile:
    """An open file. `changes` maps our parameter names ("blocks.3.feed_forward.up.kernel") to what changes there."""

    path: Path
    store: SafetensorsFile
    changes: Mapping[ExpertChoice, Mapping[str, Change]]
    ignored: Mapping[str, str]  # stored name -> why
    expert_hint: tuple[str | None, str] = (None, "")  # see guess_expert

    def changes_of(self, expert: str) -> Mapping[str, Change]:
        """What it changes of one expert; nothing for an expert that a file of both does not name."""
        return self.changes.get("both") or self.changes.get(expert, {})  # type: ignore[call-overload]

    def rank(self, change: Change) -> int:
        return 0 if change.down is None else self.store.tensors[change.down].shape[0]

    def dtype(self, change: Change) -> np.dtype:
        """That of the first tensor, the factors' if there are any."""
        return self.store.tensors[change.names[0]].dtype

    def read_factors(self, change: Change, down: np.ndarray, up: np.ndarray) -> None:
        """Fills down [rank, inputs] and up [outputs, rank], arrays or views of one dtype."""
        assert change.down is not None
        assert change.up is not None
        for name, target in ((change.down, down), (change.up, up)):
            if target.flags.c_contiguous and target.dtype == self.store.tensors[name].dtype:
                self.store.read_into(name, target)
            else:
                copy_into(target, self.store.read(name, target.dtype).reshape(target.shape))
            check_finite_weights(name, target, self.store.place)

    def sum_of_diffs(self, change: Change) -> np.ndarray:
        """float32, in PyTorch's layout of the parameter."""
        total = np.zeros(change.mapping.torch_shape, np.float32)
        for name, scale in change.diffs:
            total += np.float32(scale) * self.store.read(name, total.dtype).reshape(total.shape)
            check_finite_weights(name, total, self.store.place)
        return total

    def delta(self, change: Change) -> np.ndarray:
        """All of a change, float32, in PyTorch's layout of the parameter."""
        total = self.sum_of_diffs(change)
        if change.down is not None:
            outputs, *inputs = change.mapping.torch_shape
            rank = self.rank(change)
            down, up = np.empty((rank, math.prod(inputs)), np.float32), np.empty((outputs, rank), np.float32)
            self.read_factors(change, down, up)
            total += (np.float32(change.scale) * (up @ down)).reshape(total.shape)
        return total

    def as_json(self) -> dict[str, Any]:
        """The report: what matched, and what was ignored and why."""
        changes = [change for section in self.changes.values() for change in section.values()]
        ranks = sorted({self.rank(change) for change in changes} - {0})
        return {
            "file": str(self.path),
            "matched": len(self.store.tensors) - len(self.ignored),
            "low_rank": sum(change.down is not None for change in changes),
            "added_whole": sum(bool(change.diffs) for change in changes),
            "ranks": ranks,
            "ignored": dict(self.ignored),
        }

    def __str__(self) -> str:
        report = self.as_json()
        ranks = ", ".join(map(str, report["ranks"]))
        text = f"{self.path.name}: {report['low_rank']} low-rank changes" + (f" of rank {ranks}" if ranks else "")
        text += f", {report['added_whole']} parameters changed whole" if report["added_whole"] else ""
        reasons = sorted(set(self.ignored.values()))
        return text + (f"; {len(self.ignored)} keys ignored: {', '.join(reasons)}" if reasons else "")


@dataclass(frozen=True)
class ActiveLora:
    """One file at work on one expert."""

    file: LoraFile
    changes: Mapping[str, Change]
    scale: float

    @property
    def identity(self) -> tuple:
        """Equal for equal contents: the same file, not rewritten, in the same place."""
        status = os.stat(self.file.path)
        return os.path.realpath(self.file.path), status.st_mtime_ns, status.st_size


def total_change(loras: Sequence[ActiveLora], name: str) -> np.ndarray | None:
    """What all LoRAs add to one of our parameters, float32 in PyTorch's layout; None where they leave it alone."""
    changes = [np.float32(lora.scale) * lora.file.delta(lora.changes[name]) for lora in loras if name in lora.changes]
    return sum(changes[1:], start=changes[0]) if changes else None


@dataclass(frozen=True)
class OpenLoras:
    """All LoRAs of a run, opened and verified; to be passed on, so that files are opened once."""

    by_expert: Mapping[str, Sequence[ActiveLora]]
    loras: tuple[Lora, ...] = ()
    files: tuple[LoraFile, ...] = ()
    notes: tuple[str, ...] = ()  # what the user should know, one line each


def open_loras(loras: "Loras", config: WanConfig) -> OpenLoras:
    """Opens and verifies every file for the experts of a model; no factor is read.

    Args:
        loras: what is asked for; a bare path is a Lora of scale 1. LoRAs that are open come back as they are.
        config: the model's.

    Raises:
        InputError: a file that is no LoRA or not for this model, or that says itself that it is for the other expert.
    """
    if isinstance(loras, OpenLoras):
        return loras
    if not isinstance(loras, list | tuple) or not all(isinstance(lora, Lora | str | os.PathLike) for lora in loras):
        raise TypeError(f"loras must be a list of Lora or of paths, not {loras!r:.100}")
    asked = tuple(lora if isinstance(lora, Lora) else Lora(os.fspath(lora)) for lora in loras)
    by_expert: dict[str, list[ActiveLora]] = {expert: [] for expert in config.experts}
    files: dict[str, LoraFile] = {}
    notes: list[str] = []
    for lora in asked:
        if lora.expert != "both" and lora.expert not in config.experts:
            raise InputError(f"LoRA {lora.file}: {config.name} has one expert, no {lora.expert} one; use --lora")
        if lora.file not in files:
            files[lora.file] = open_lora(lora.file, config.denoiser)
            notes.append(str(files[lora.file]))
        file = files[lora.file]
        wanted = config.experts if lora.expert == "both" else (lora.expert,)
        changed = [expert for expert in wanted if file.changes_of(expert)]
        if not changed:
            raise InputError(f"LoRA {lora.file}: it changes only {', '.join(file.changes)}, not {', '.join(wanted)}")
        notes += _doubts(file, changed, config)
        for expert in changed:
            by_expert[expert].append(ActiveLora(file, file.changes_of(expert), lora.scale))
    return OpenLoras(by_expert, asked, tuple(files.values()), tuple(dict.fromkeys(notes)))


Loras = OpenLoras | Sequence[Lora | str | os.PathLike]


def _doubts(file: LoraFile, experts: Sequence[str], config: WanConfig) -> list[str]:
    """Notes about a file for one expert that is used on the other one, which spoils every video."""
    expert, evidence = file.expert_hint
    wrong = [name for name in experts if expert is not None and name != expert]
    if len(config.experts) == 1 or not wrong or "both" not in file.changes:
        return []
    option = "--lora-high" if expert == "high_noise" else "--lora-low"
    if evidence == EXPERT_METADATA:
        raise InputError(f"LoRA {file.path}: it was made for the {expert} expert, by its metadata; use {option}")
    return [
        f"{file.path.name} seems to be for the {expert} expert ({evidence}) and is used on the {wrong[0]} one; if so, "
        f"use {option}"
    ]


def open_lora(path: str | Path, config: DenoiserConfig) -> LoraFile:
    """Opens one file, here or on the hub, for a denoiser. Raises InputError, one line, where it does not fit."""
    path = local_lora(path)
    store = SafetensorsFile(path)
    table = _table(config)
    keys, unknown = [], {}
    for name in store.tensors:
        key = parse_key(name)
        if key is not None and LEAVES[key.part] in table.get(key.module, {}):
            keys.append(key)
        else:
            unknown[name] = without_prefixes(name) if key is None else key.module
    ignored = {}
    if unknown and config.image_dim is None:
        # LightX2V's LoRAs change what models for images have in files for models that do not.
        of_images = _table(replace(config, image_dim=1280, image_position_length=514)).keys() - table.keys()
        reason = "image conditioning, which this model does not have"
        ignored = {name: reason for name, module in unknown.items() if module in of_images}
    unmatched = {name: module for name, module in unknown.items() if name not in ignored}
    if unmatched or not keys:
        raise InputError(f"LoRA {path}: {_explain(unmatched, len(store.tensors), table, config)}")

    sections: dict[ExpertChoice, list[Key]] = {"both": keys}
    if any(key.low_noise for key in keys):
        sections = {
            "high_noise": [key for key in keys if not key.low_noise],
            "low_noise": [key for key in keys if key.low_noise],
        }
    peft_scale = _peft_scale(path, store.metadata)
    changes = {expert: _changes(section, store, table, peft_scale) for expert, section in sections.items() if section}
    file = LoraFile(path, store, changes, ignored, guess_expert(path.stem, store.metadata))
    _check_shapes(file, config)
    return file


@functools.cache
def _table(config: DenoiserConfig) -> dict[str, dict[Leaf, ParamMapping]]:
    return modules(expanded_table(config))


def _changes(
    keys: Sequence[Key],
    store: SafetensorsFile,
    table: Mapping[str, Mapping[Leaf, ParamMapping]],
    peft_scale: Callable[[Key, int], float],
) -> dict[str, Change]:
    """The keys of one expert -> its changes by our names."""
    mappings = {key: table[key.module][LEAVES[key.part]] for key in keys}
    by_module: dict[str, dict[Part, Key]] = {}
    for key, mapping in mappings.items():
        parts = by_module.setdefault(mapping.name.rpartition(".")[0], {})
        if key.part in parts:
            raise InputError(
                f"LoRA {store.place}: {parts[key.part].name} and {key.name} are for one parameter; remove one"
            )
        parts[key.part] = key

    changes: dict[str, Change] = {}
    for parts in by_module.values():
        scale = 1.0
        if parts.keys() & set(PAIRED):
            missing = [part for part in ("down", "up") if part not in parts]
            if missing:
                present = next(parts[part] for part in PAIRED if part in parts)
                raise InputError(
                    f"LoRA {store.place}: {present.name} stands without its {missing[0]} factor; is the file whole?"
                )
            down, up = parts["down"], parts["up"]
            rank = _rank(down, up, store)
            scale = _alpha(parts["alpha"], store) / rank if "alpha" in parts else peft_scale(down, rank)
            scale = scale or 1.0  # kohya's tools and LightX2V take an alpha of 0 for none
            changes[mappings[down].name] = Change(mappings[down], down.name, up.name, scale)
        whole: tuple[tuple[Part, float], ...] = (("diff", 1.0), ("up_bias", scale), ("diff_b", 1.0), ("diff_m", 1.0))
        for part, factor in whole:
            if part in parts:
                mapping, name = mappings[parts[part]], parts[part].name
                change = changes.get(mapping.name, Change(mapping))
                changes[mapping.name] = replace(change, diffs=(*change.diffs, (name, factor)))
    return changes


def _rank(down: Key, up: Key, store: SafetensorsFile) -> int:
    shapes = [store.tensors[key.name].shape for key in (down, up)]
    if min(map(len, shapes)) < 2 or shapes[0][0] == 0 or shapes[0][0] != math.prod(shapes[1][1:]):
        raise InputError(
            f"LoRA {store.place}: {down.name} {list(shapes[0])} and {up.name} {list(shapes[1])} do not multiply; they "
            "must be [rank, inputs] and [outputs, rank]"
        )
    return shapes[0][0]


def _alpha(key: Key, store: SafetensorsFile) -> float:
    value = store.read(key.name)
    if value.size != 1 or not math.isfinite(alpha := float(value.reshape(-1)[0])):
        raise InputError(f"LoRA {store.place}: {key.name} must be one finite number; download the file again")
    return alpha


def _check_shapes(file: LoraFile, config: DenoiserConfig) -> None:
    """Raises InputError for factors and whole changes that do not fit, saying which model they would fit."""
    tensors = file.store.tensors
    wrong: list[str] = []
    widths: set[int] = set()

    def check(name: str, shape: Sequence[int], needed: Sequence[int]) -> None:
        if [n for n in shape if n != 1] != [n for n in needed if n != 1]:
            wrong.append(f"{name} is {list(shape)} and must be {list(needed)}")
        if tensors[name].dtype not in FACTOR_DTYPES:
            raise InputError(f"LoRA {file.path}: {name} is {tensors[name].dtype}, which is no dtype of weights")

    for change in (change for section in file.changes.values() for change in section.values()):
        outputs, *inputs = change.mapping.torch_shape
        for name, _ in change.diffs:
            check(name, tensors[name].shape, change.mapping.torch_shape)
        if change.down is None or change.up is None:
            continue
        if not inputs:
            raise InputError(
                f"LoRA {file.path}: {change.down} is a factor, but {change.mapping.names.official} is a vector"
            )
        rank, *down = tensors[change.down].shape
        check(change.down, (rank, math.prod(down)), (rank, math.prod(inputs)))
        check(change.up, tensors[change.up].shape, (outputs, rank))
        if change.mapping.names.official.endswith("attn.q.weight"):
            widths.add(math.prod(down))
    if wrong:
        rest = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"LoRA {file.path}: does not fit this model: {wrong[0]}{rest}{_made_for(widths, config)}")


def _made_for(widths: set[int], config: DenoiserConfig) -> str:
    """Which models a LoRA of this width is for, where it is not this one's."""
    if len(widths) != 1 or config.dim in widths:
        return ""
    (width,) = widths
    names = [name for name, preset in PRESETS.items() if preset.denoiser.dim == width]
    return f"; it is for a model of width {width}" + (f" ({', '.join(names)})" if names else "")


def _explain(unmatched: Mapping[str, str], total: int, table: Mapping[str, Any], config: DenoiserConfig) -> str:
    """Why a file is not a LoRA of this model: one line. `unmatched` maps stored names to modules."""
    if not unmatched:
        return "changes nothing that this model has"
    for mark, method in OTHER_METHODS.items():
        if name := next((name for name in unmatched if mark in name), None):
            return f"{name} belongs to a {method}, which is not supported; use a plain LoRA"
    layers = [int(match[1]) for module in unmatched.values() if (match := re.match(r"blocks[._](\d+)[._]", module))]
    if len(layers) == len(unmatched) and min(layers) >= config.num_layers:
        return f"changes layer {max(layers)}, and this model has {config.num_layers} layers; it is for a larger one"
    whole = (name for name, module in unmatched.items() if module in table or module.rpartition(".")[0] in table)
    if all(parse_key(name) is None for name in unmatched) and len(list(whole)) == len(unmatched):
        return "holds whole weights, not changes of them; is it a checkpoint?"
    described = []
    for name, module in list(unmatched.items())[:SHOWN]:
        nearest = difflib.get_close_matches(module, table, n=2, cutoff=0.5)
        described.append(name + (f" (nearest: {', '.join(nearest)})" if nearest else ""))
    rest = f" and {len(unmatched) - SHOWN} more" if len(unmatched) > SHOWN else ""
    return f"{len(unmatched)} of its {total} keys match nothing in this model: {', '.join(described)}{rest}"


def _peft_scale(path: Path, metadata: Mapping[str, str]) -> Callable[[Key, int], float]:
    """alpha / rank as PEFT's config in the metadata, or beside the file, says; 1 without one.

    https://github.com/huggingface/peft, LoraConfig; diffusers stores it as "lora_adapter_metadata".
    """
    beside = path.with_name("adapter_config.json")
    text = metadata.get("lora_adapter_metadata")
    if text is None and path.name == "adapter_model.safetensors" and beside.is_file():
        text = beside.read_text(errors="replace")
    if text is None:
        return lambda key, rank: 1.0
    try:
        everything = strict_json(text.encode())
    except ValueError:
        raise InputError(f"LoRA {path}: its adapter metadata is not a JSON object; download the file again") from None

    def scale(key: Key, rank: int) -> float:
        prefix = "transformer_2." if key.low_noise else "transformer."
        config = {name.removeprefix(prefix): value for name, value in everything.items() if name.startswith(prefix)}
        config = config or everything
        if config.get("use_dora"):
            raise InputError(f"LoRA {path}: is a DoRA, which is not supported; use a plain LoRA")
        try:
            patterns = (config.get("alpha_pattern") or {}).items()
            matches = (a for pattern, a in patterns if regex.match(rf"(.*\.)?({pattern})$", key.module, timeout=1))
            alpha = float(next(matches, config.get("lora_alpha", rank)))
            if not math.isfinite(alpha):
                raise ValueError(f"{alpha} is not finite")
        except Exception as error:  # values of any type, expressions of any form
            raise InputError(f"LoRA {path}: its adapter metadata are damaged ({brief(error)})") from None
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    return scale

"""Read named tensors from checkpoint files, one file at a time."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from csr_vlm.core.errors import CsrError, reason_of

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files with a model's weights, whole or as ``NAME.index.json`` and shards; the first that exists is used."""
_TOWER = "vision_tower."
_TOWER_PARTS = tuple(_TOWER + part for part in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head."))


class TensorLocation(NamedTuple):
    """Hold the file that contains a tensor, and the tensor's name in it."""

    file: Path
    name: str


def find_file(source: str | Path, name: str, revision: str | None = None) -> Path | None:
    """Return the path of a file in a directory or, after downloading it, in a hub repository; None if absent.

    Raises:
        CsrError: There is no such directory or hub repository.
    """
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(str(source), name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise CsrError(f"{source} cannot be read: {reason_of(error)}", "give a directory or a hub id") from None
    return Path(path) if path else None


def checkpoint_tensors(
    source: str | Path, names: tuple[str, ...] = WEIGHT_FILES, revision: str | None = None
) -> dict[str, TensorLocation] | None:
    """Locate every tensor of a checkpoint.

    Args:
        source: Directory or hub id.
        names: Weight files to look for.
        revision: Revision of a hub repository.

    Returns:
        Location by tensor name; None if there is no weight file.

    Raises:
        CsrError: The index is invalid, or a shard that it lists is missing.
    """
    for name in names:
        index = find_file(source, f"{name}.index.json", revision)
        if index is not None:
            weight_map = _read_weight_map(index)
            shards = sorted(set(weight_map.values()))
            paths = {shard: path for shard in shards if (path := find_file(source, shard, revision)) is not None}
            missing = [shard for shard in shards if shard not in paths]
            if missing:
                raise CsrError(f"{source} lacks {', '.join(missing)}, which {index.name} lists", "download it again")
            return {tensor: TensorLocation(paths[shard], tensor) for tensor, shard in weight_map.items()}
        whole = find_file(source, name, revision)
        if whole is not None:
            return file_tensors(whole)
    return None


def file_tensors(file: Path) -> dict[str, TensorLocation]:
    """Locate every tensor of one file.

    Raises:
        CsrError: The file cannot be read without running code.
    """
    with _open_tensors(file) as tensors:
        return {name: TensorLocation(file, name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping


def read_tensors(locations: Mapping[str, TensorLocation]) -> Iterator[tuple[str, Any]]:
    """Yield (key, tensor) file by file; one file is open at a time, and its tensors are read one by one.

    Raises:
        CsrError: A file lacks a tensor, or cannot be read without running code.
    """
    keys_by_file: dict[Path, list[str]] = defaultdict(list)
    for key, location in locations.items():
        keys_by_file[location.file].append(key)
    for file, keys in keys_by_file.items():
        with _open_tensors(file) as tensors:
            missing = sorted({locations[key].name for key in keys} - set(tensors.keys()))
            if missing:
                raise CsrError(f"{file} lacks {', '.join(missing[:3])}", "download it again")
            for key in keys:
                yield key, tensors.get_tensor(locations[key].name)


def rename_as_published(directory: Path) -> None:
    """Rename a saved model's CLIP or SigLIP tower as in published checkpoints: ``vision_tower.vision_model.``.

    ``save_pretrained`` of transformers 5 omits ``vision_model.`` and reads either name. Other
    programs, such as vLLM, need it.
    """
    from safetensors.torch import load_file, save_file

    for file in sorted(directory.glob("model*.safetensors")):
        tensors = load_file(file)
        renamed = {_published_name(name): tensor for name, tensor in tensors.items()}
        if renamed.keys() != tensors.keys():
            # Write a new file: the loaded tensors may be views of the old file's bytes.
            temporary = file.with_name(f".{file.name}.tmp")
            save_file(renamed, temporary, metadata={"format": "pt"})
            temporary.chmod(file.stat().st_mode)
            temporary.replace(file)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {_published_name(name): shard for name, shard in content["weight_map"].items()}
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_weight_map(index: Path) -> dict[str, str]:
    """Read the file name of the shard that holds each tensor."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(Path(shard).name == shard for shard in weight_map.values()):
            raise ValueError("a shard is not in the same directory")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CsrError(f"{index} is not a valid index of shards: {reason_of(error)}", "download it again") from None
    return dict(weight_map)


def _published_name(name: str) -> str:
    return f"{_TOWER}vision_model.{name.removeprefix(_TOWER)}" if name.startswith(_TOWER_PARTS) else name


class _BinTensors:
    """Give a loaded ``.bin`` file the interface of an open safetensors file."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.keys = tensors.keys
        self.get_tensor = tensors.__getitem__


@contextmanager
def _open_tensors(file: Path) -> Iterator[Any]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as tensors:
                yield tensors
        except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
            raise CsrError(f"{file} is not a valid safetensors file: {reason_of(error)}", "download it again") from None
    else:
        yield _BinTensors(_load_bin(file))


def _load_bin(file: Path) -> dict[str, Any]:
    """Load a ``.bin`` file, which is a pickle; only tensors and plain containers are allowed in it."""
    import torch

    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files written before PyTorch 1.6 cannot be memory-mapped.
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CsrError(
            f"{file} cannot be read as plain tensors: {reason_of(error)}", "convert it to safetensors"
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CsrError(f"{file} does not hold named tensors only", "convert it to safetensors")
    return loaded

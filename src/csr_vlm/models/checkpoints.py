"""Named tensors in checkpoint files, read one file at a time."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from csr_vlm.core.errors import CsrError, reason_of

FILES = ("model.safetensors", "pytorch_model.bin")
"""What holds a model's weights, whole or as ``NAME.index.json`` and shards; the first that is there counts."""


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    name: str


def find_file(source: str | Path, name: str, revision: str | None = None) -> Path | None:
    """Locate a file of a directory, or of a hub model, which is downloaded then; None where there is none.

    Raises:
        CsrError: There is no such directory or hub model.
    """
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(str(source), name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise CsrError(f"{source} cannot be read: {reason}", "name a directory or a hub id") from None
    return Path(found) if found else None


def tensor_files(
    source: str | Path, names: tuple[str, ...] = FILES, revision: str | None = None
) -> dict[str, Stored] | None:
    """Say where each tensor of a checkpoint lies, by its name; None where there is no checkpoint.

    Raises:
        CsrError: A shard of the index is missing.
    """
    for name in names:
        index = find_file(source, f"{name}.index.json", revision)
        if index is not None:
            weight_map = _weight_map(index)
            shards = sorted(set(weight_map.values()))
            found = {shard: path for shard in shards if (path := find_file(source, shard, revision)) is not None}
            missing = [shard for shard in shards if shard not in found]
            if missing:
                raise CsrError(f"{source} lacks {', '.join(missing)}, which {index.name} lists", "download it again")
            return {tensor: Stored(found[shard], tensor) for tensor, shard in weight_map.items()}
        whole = find_file(source, name, revision)
        if whole is not None:
            return tensors_of(whole)
    return None


def _weight_map(index: Path) -> dict[str, str]:
    """Read which shard, a file beside the index, holds each tensor."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(Path(shard).name == shard for shard in found.values()):
            raise ValueError("a shard is no file beside it")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CsrError(f"{index} is no index of shards: {reason_of(error)}", "download it again") from None
    return dict(found)


def tensors_of(file: Path) -> dict[str, Stored]:
    """List what one file holds."""
    with _opened(file) as tensors:
        return {name: Stored(file, name) for name in tensors.keys()}  # noqa: SIM118 - not a mapping


def read_tensors(where: Mapping[str, Stored]) -> Iterator[tuple[str, Any]]:
    """Yield (key, tensor) file by file; no more than one file is open, and its tensors are read one by one.

    Raises:
        CsrError: A file lacks a tensor, or cannot be read without running code.
    """
    by_file: dict[Path, list[str]] = defaultdict(list)
    for key, stored in where.items():
        by_file[stored.file].append(key)
    for file, keys in by_file.items():
        with _opened(file) as tensors:
            missing = sorted({where[key].name for key in keys} - set(tensors.keys()))
            if missing:
                raise CsrError(f"{file} lacks {', '.join(missing[:3])}", "download it again")
            for key in keys:
                yield key, tensors.get_tensor(where[key].name)


def rename_as_published(directory: Path) -> None:
    """Name a saved model's CLIP or SigLIP tower as published checkpoints do: ``vision_tower.vision_model.``.

    ``save_pretrained`` of transformers 5 leaves ``vision_model.`` out and reads either; other
    programs, such as vLLM, look for it.
    """
    from safetensors.torch import load_file, save_file

    for file in sorted(directory.glob("model*.safetensors")):
        tensors = load_file(file)
        renamed = {_published(name): tensor for name, tensor in tensors.items()}
        if renamed.keys() != tensors.keys():
            # Beside it: what was loaded may still be the file's own bytes.
            beside = file.with_name(f".{file.name}.tmp")
            save_file(renamed, beside, metadata={"format": "pt"})
            beside.replace(file)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        written = json.loads(index.read_text(encoding="utf-8"))
        written["weight_map"] = {_published(name): shard for name, shard in written["weight_map"].items()}
        index.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


_TOWER = "vision_tower."
_IN_TOWER = tuple(_TOWER + part for part in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head."))


def _published(name: str) -> str:
    return f"{_TOWER}vision_model.{name.removeprefix(_TOWER)}" if name.startswith(_IN_TOWER) else name


class _Loaded:
    """A ``.bin`` file behind the interface of an open safetensors file."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.keys = tensors.keys
        self.get_tensor = tensors.__getitem__


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as tensors:
                yield tensors
        except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
            raise CsrError(f"{file} is no safetensors file: {reason_of(error)}", "download it again") from None
    else:
        yield _Loaded(_load_bin(file))


def _load_bin(file: Path) -> dict[str, Any]:
    """Read a ``.bin`` file, which is a pickle: only tensors and plain containers are let through."""
    import torch

    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of before PyTorch 1.6 cannot be mapped.
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CsrError(
            f"{file} cannot be read as plain tensors: {reason_of(error)}", "convert it to safetensors"
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CsrError(f"{file} holds something else than named tensors", "convert it to safetensors")
    return loaded

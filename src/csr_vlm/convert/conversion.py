"""Convert original LLaVA-format checkpoints to transformers' LlavaForConditionalGeneration.

Tensors are streamed: one source file is open at a time, and one output shard is held in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from csr_vlm.convert.layouts import DROPPED_NAMES, module_name
from csr_vlm.convert.source import Lora, Original, open_original
from csr_vlm.convert.target import Target, gap_after_image, make_target
from csr_vlm.convert.tensors import adapter_tensors, convert_tensors, embedding_dtype, name_map
from csr_vlm.core.errors import CsrError
from csr_vlm.models.checkpoints import checkpoint_tensors, file_tensors, read_tensors
from csr_vlm.store import files

_ADAPTER_FILE = "adapter_model.safetensors"


def convert(
    source: Path,
    out: Path,
    *,
    base: str | None = None,
    vision: str | None = None,
    dtype: str | None = None,
    merge: bool = False,
    check: bool = True,
    shard_bytes: int = 4_000_000_000,
) -> dict[str, Any]:
    """Convert a checkpoint; write a LoRA to ``out/adapter`` unless it is merged.

    Args:
        source: Original checkpoint of any kind that :func:`open_original` accepts.
        out: New directory; it appears only when it is complete.
        base: Directory or hub id of the model that a LoRA or a projector belongs to.
        vision: Directory or hub id of the vision tower, if not the one that the checkpoint names.
        dtype: Data type of all tensors; by default that of the embeddings.
        merge: Add a LoRA to the weights.
        check: Read the source and the result again and compare them.
        shard_bytes: Maximum size of one file.

    Returns:
        The kind of checkpoint and a summary of the conversion, by name for display.

    Raises:
        CsrError: The source cannot be converted, ``out`` is not empty, or the check fails.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CsrError(f"{out} already exists and is not empty", "choose a new directory with --out")
    original = open_original(source, base, vision)
    if merge and original.lora is None:
        raise CsrError(f"{source} has no LoRA to merge", "omit --merge")
    target = make_target(original)
    names = name_map(original, target)
    torch_dtype = getattr(torch, dtype) if dtype else embedding_dtype(original)
    target.config.dtype = torch_dtype
    stream = partial(convert_tensors, original, target, names, torch_dtype, merge)

    def fill(directory: Path) -> None:
        _write_weights(directory, stream(), shard_bytes)
        target.config.architectures = ["LlavaForConditionalGeneration"]
        target.config.save_pretrained(directory)
        target.generation.save_pretrained(directory)
        target.processor.save_pretrained(directory)
        if original.lora is not None and not merge:
            _write_adapter(directory / "adapter", original.lora, out)
        if check:
            _compare(directory, stream(), target, None if merge else original.lora)

    files.replace_directory(out, fill)
    return _summary(original, target, torch_dtype, merge, check)


def _write_weights(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    """Write each shard when it is full, and rename all at the end, since their names contain their number."""
    directory.mkdir(parents=True)
    shard_names: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, directory / f"{len(shard_names)}.safetensors", metadata={"format": "pt"})
        shard_names.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        # Copy, since a tensor may share memory with its file or with another tensor.
        held[name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shard_names) == 1:
        (directory / "0.safetensors").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shard_names):
        final = f"model-{index + 1:05d}-of-{len(shard_names):05d}.safetensors"
        (directory / f"{index}.safetensors").rename(directory / final)
        weight_map |= dict.fromkeys(names, final)
    files.write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _write_adapter(directory: Path, lora: Lora, base: Path) -> None:
    """Write a LoRA in the layout that PEFT loads on the converted base."""
    directory.mkdir()
    save_file(adapter_tensors(lora), directory / _ADAPTER_FILE, metadata={"format": "pt"})
    settings = lora.config | {
        "base_model_name_or_path": str(base.resolve()),
        # Full names: short ones such as q_proj would also match the vision tower.
        "target_modules": sorted(str(module_name(f"{name}.", "linear")).rstrip(".") for name in lora.modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
    }
    files.write_json(directory / "adapter_config.json", settings)


def _compare(directory: Path, expected: Iterable[tuple[str, torch.Tensor]], target: Target, lora: Lora | None) -> None:
    """Read the source and the result again and compare them.

    Raises:
        CsrError: A tensor is missing, extra or different, or the processor does not work.
    """
    written = checkpoint_tensors(directory) or {}
    different = sorted(written.keys() ^ target.shapes.keys())
    for name, tensor in expected:
        _, actual = next(read_tensors({name: written[name]}))
        if not torch.equal(actual, tensor):
            different.append(name)
    if lora is not None:
        adapter = dict(read_tensors(file_tensors(directory / "adapter" / _ADAPTER_FILE)))
        expected_adapter = adapter_tensors(lora)
        different += sorted(adapter.keys() ^ expected_adapter.keys())
        different += [
            name for name in adapter.keys() & expected_adapter if not torch.equal(adapter[name], expected_adapter[name])
        ]
    if different:
        raise CsrError(f"the check failed: {', '.join(different[:8])} differ from the source", "check the disk")
    _check_processor(directory, target)


def _check_processor(directory: Path, target: Target) -> None:
    """Check that a prompt with an image has as many placeholder tokens as the model has image features.

    Raises:
        CsrError: It has not, or a token id is out of range.
    """
    from PIL import Image
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(directory)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.new("RGB", (64, 48))], text=[text], return_tensors="pt")
    ids = Counter(inputs["input_ids"][0].tolist())
    actual, expected = ids[target.config.image_token_id], target.config.image_seq_length
    if actual != expected or max(ids) >= target.config.text_config.vocab_size:
        raise CsrError(f"the check failed: a prompt has {actual} image tokens, but the model needs {expected}")


def _summary(original: Original, target: Target, dtype: torch.dtype, merge: bool, check: bool) -> dict[str, Any]:
    vocab_size = original.config["vocab_size"]
    return {
        "kind": original.kind,
        "projector": original.projector,
        "vision tower": original.vision,
        "tensors": len(target.shapes),
        "parameters": sum(shape.numel() for shape in target.shapes.values()),
        "dropped": sum(bool(DROPPED_NAMES.search(name)) for name in original.tensors),
        "dtype": str(dtype).removeprefix("torch."),
        "rows added to the embeddings": target.config.text_config.vocab_size - vocab_size,
        "LoRA": "none" if original.lora is None else "merged" if merge else "adapter",
        "prompts tokenized as by LLaVA": gap_after_image(target.processor.tokenizer) is not None,
        "checked": check,
    }

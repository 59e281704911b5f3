"""Original LLaVA-format checkpoints to transformers' LlavaForConditionalGeneration.

What is read is streamed: one source file is open and one shard of the result is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from csr_vlm.convert.layouts import DROPPED, module_name
from csr_vlm.convert.source import Lora, Original, open_original
from csr_vlm.convert.target import Target, gap_after_image, make_target
from csr_vlm.convert.tensors import adapter_tensors, common_dtype, converted, name_map
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
    """Write the checkpoint, and the LoRA as ``out/adapter`` unless it is merged.

    Args:
        source: Original checkpoint of any kind that :func:`open_original` knows.
        out: New directory; it appears when it is complete.
        base: What a LoRA or a projector belongs to.
        vision: Vision tower, where it is not what the checkpoint names.
        dtype: Of all tensors; by default the embeddings'.
        merge: Add a LoRA to the weights.
        check: Read both sides again and compare them.
        shard_bytes: Most bytes of one file.

    Returns:
        What kind it was and what was done to it.

    Raises:
        CsrError: The source cannot be converted, ``out`` is in use, or the check fails.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CsrError(f"{out} is there already", "name a new directory: --out")
    original = open_original(source, base, vision)
    if merge and original.lora is None:
        raise CsrError(f"{source} has no LoRA to merge", "leave out --merge")
    target = make_target(original)
    names = name_map(original, target)
    kind = getattr(torch, dtype) if dtype else common_dtype(original)
    target.config.dtype = kind
    stream = partial(converted, original, target, names, kind, merge)

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
    return _summary(original, target, kind, merge, check)


def _write_weights(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    """Write shards as they fill up; their number is in their names, so they get these last."""
    directory.mkdir(parents=True)
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, directory / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        # A copy: what is read may share memory with its file or with another tensor.
        held[name] = tensor.clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (directory / "0.safetensors").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, members in enumerate(shards):
        final = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{index}.safetensors").rename(directory / final)
        weight_map |= dict.fromkeys(members, final)
    files.write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _write_adapter(directory: Path, lora: Lora, base: Path) -> None:
    """Write a LoRA that PEFT loads on the converted base."""
    directory.mkdir()
    save_file(adapter_tensors(lora), directory / _ADAPTER_FILE, metadata={"format": "pt"})
    settings = lora.config | {
        "base_model_name_or_path": str(base.resolve()),
        # In full: short names such as q_proj would fit the vision tower's modules as well.
        "target_modules": sorted(str(module_name(f"{name}.", "linear")).rstrip(".") for name in lora.modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
    }
    files.write_json(directory / "adapter_config.json", settings)


def _compare(directory: Path, expected: Iterable[tuple[str, torch.Tensor]], target: Target, lora: Lora | None) -> None:
    """Read what was written, and what it was made from, once more.

    Raises:
        CsrError: A tensor is absent, surplus or different, or the processor does not work.
    """
    written = checkpoint_tensors(directory) or {}
    different = sorted(written.keys() ^ target.shapes.keys())
    for name, tensor in expected:
        _, found = next(read_tensors({name: written[name]}))
        if not torch.equal(found, tensor):
            different.append(name)
    if lora is not None:
        adapter = dict(read_tensors(file_tensors(directory / "adapter" / _ADAPTER_FILE)))
        wanted = adapter_tensors(lora)
        different += sorted(adapter.keys() ^ wanted.keys())
        different += [name for name in adapter.keys() & wanted if not torch.equal(adapter[name], wanted[name])]
    if different:
        raise CsrError(f"the check failed: {', '.join(different[:8])} are not as in the source", "is the disk sound?")
    _check_processor(directory, target)


def _check_processor(directory: Path, target: Target) -> None:
    """See that a prompt with an image becomes as many placeholders as the model makes features."""
    from PIL import Image
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(directory)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.new("RGB", (64, 48))], text=[text], return_tensors="pt")
    ids = Counter(inputs["input_ids"][0].tolist())
    found, wanted = ids[target.config.image_token_id], target.config.image_seq_length
    if found != wanted or max(ids) >= target.config.text_config.vocab_size:
        raise CsrError(f"the check failed: a prompt has {found} image tokens where the model makes {wanted}")


def _summary(original: Original, target: Target, dtype: torch.dtype, merge: bool, check: bool) -> dict[str, Any]:
    rows = original.config["vocab_size"]
    return {
        "kind": original.kind,
        "projector": original.projector,
        "vision tower": original.vision,
        "tensors": len(target.shapes),
        "parameters": sum(shape.numel() for shape in target.shapes.values()),
        "dropped": sum(bool(DROPPED.search(name)) for name in original.tensors),
        "dtype": str(dtype).removeprefix("torch."),
        "rows added to the embeddings": target.config.text_config.vocab_size - rows,
        "LoRA": "none" if original.lora is None else "merged" if merge else "adapter",
        "prompts tokenised as by LLaVA": gap_after_image(target.processor.tokenizer) is not None,
        "checked": check,
    }

"""The policy: a model, its processor, and prompts as the model reads them.

Generation, teacher forcing and training all encode a prompt through :meth:`Policy.encode`
and lay out rows through :func:`batch_rows`, so they cannot see different inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from csr_vlm.config import ModelConfig
from csr_vlm.data.images import load_image
from csr_vlm.errors import CsrError
from csr_vlm.loading import resolve_device, resolve_dtype, unloadable
from csr_vlm.records import Prompt


@dataclass(frozen=True)
class EncodedPrompt:
    """What the processor makes of one prompt."""

    input_ids: torch.Tensor
    """Of shape (tokens,), image placeholders expanded."""
    per_token: dict[str, torch.Tensor]
    """Other tensors of shape (tokens,), such as token types; a response's are 0."""
    per_image: dict[str, torch.Tensor]
    """Pixels and their like, to be concatenated along the first dimension."""
    features: torch.Tensor | None = None
    """The image as the language model sees it, of shape (image tokens, width)."""


@dataclass
class Policy:
    """A loaded model with everything needed to prompt it."""

    model: Any
    processor: Any
    max_image_pixels: int = 50_000_000
    _eos_ids: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        eos = self.base_model.generation_config.eos_token_id
        if eos is None:
            eos = self.tokenizer.eos_token_id
        self._eos_ids = frozenset(eos if isinstance(eos, list) else [eos])

    @property
    def base_model(self) -> Any:
        """The transformers model, without PEFT's wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        device: torch.device = self.base_model.device
        return device

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a response."""
        return self._eos_ids

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else min(self.eos_ids))

    @property
    def barred_ids(self) -> list[int]:
        """Ids that stand for pictures: a response that contained one could not be read back."""
        config = self.base_model.config
        names = ("image_token_id", "image_token_index", "video_token_id", "boi_token_id", "eoi_token_id")
        return sorted({value for name in names if isinstance(value := getattr(config, name, None), int)})

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Load the image, apply the chat template, and tokenise as the processor wants it."""
        content = [{"type": "image"}, {"type": "text", "text": prompt.text}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        bos = self.tokenizer.bos_token
        encoded = self.processor(
            images=[load_image(prompt.image, self.max_image_pixels)],
            text=[text],
            return_tensors="pt",
            # Some templates write the BOS themselves.
            add_special_tokens=not (bos and text.startswith(bos)),
        )
        shape = encoded["input_ids"].shape
        extras = {key: value for key, value in encoded.items() if key not in ("input_ids", "attention_mask")}
        return EncodedPrompt(
            input_ids=encoded["input_ids"][0],
            per_token={key: value[0] for key, value in extras.items() if value.shape == shape},
            per_image={key: value for key, value in extras.items() if value.shape != shape},
        )

    def answer_ids(self, prompt: Prompt, answer: str) -> tuple[int, ...]:
        """Encode an answer that no policy generated, as the chat template writes it, its end included.

        For what a policy did generate the ids are known and never encoded again.
        """
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt.text}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]}
        asked = self.processor.apply_chat_template([question], add_generation_prompt=True)
        whole = self.processor.apply_chat_template([question, said])
        if not whole.startswith(asked):
            raise CsrError("the chat template writes an answered question differently", "give pairs of token ids")
        return tuple(self.tokenizer(whole[len(asked) :], add_special_tokens=False)["input_ids"])

    @property
    def reuses_features(self) -> bool:
        """Whether the model takes image features that were computed before."""
        return "mm_encoder_outputs" in inspect.signature(self.base_model.forward).parameters

    @torch.inference_mode()
    def with_features(self, encoded: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
        """Run the vision encoder once over some prompts' images, where the model allows it."""
        if not self.reuses_features:
            return list(encoded)
        pixels = torch.cat([item.per_image["pixel_values"] for item in encoded])
        output = self.base_model.get_image_features(
            pixel_values=pixels.to(self.device, self.base_model.dtype), return_dict=True
        )
        return [
            EncodedPrompt(item.input_ids, item.per_token, item.per_image, features)
            for item, features in zip(encoded, output.pooler_output, strict=True)
        ]

    def model_inputs(
        self, encoded: Sequence[EncodedPrompt], continuations: Sequence[Sequence[int]], side: Literal["left", "right"]
    ) -> dict[str, Any]:
        """Lay out prompts and what follows them as one padded batch, on the model's device."""
        batch: dict[str, Any] = dict(batch_rows(encoded, continuations, self.pad_id, side))
        if encoded[0].features is not None:
            images = [item.features for item in encoded]
            batch["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=images)}
        else:
            batch |= image_tensors(encoded)
        return {key: self._place(value) for key, value in batch.items()}

    def _place(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        dtype = self.base_model.dtype if value.is_floating_point() else None
        return value.to(self.device, dtype)

    @torch.inference_mode()
    def teacher_forced(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Compute log P(r_o | x, r_<o) of given responses in one forward pass.

        Returns:
            One float32 tensor of shape (response tokens,) a prompt, on the CPU.
        """
        encoded = self.with_features([self.encode(prompt) for prompt in prompts])
        inputs = self.model_inputs(encoded, responses, "right")
        logits = self.model(**inputs, use_cache=False).logits.float()
        logprobs = []
        for row, (item, ids) in enumerate(zip(encoded, responses, strict=True)):
            start = len(item.input_ids)
            predicted = torch.log_softmax(logits[row, start - 1 : start - 1 + len(ids)], dim=-1)
            targets = torch.tensor(list(ids), device=predicted.device)
            logprobs.append(predicted.gather(-1, targets[:, None]).squeeze(-1).cpu())
        return logprobs


def batch_rows(
    encoded: Sequence[EncodedPrompt],
    continuations: Sequence[Sequence[int]],
    pad_id: int,
    side: Literal["left", "right"],
) -> dict[str, torch.Tensor]:
    """Pad prompt + continuation rows to one width.

    Returns:
        ``input_ids``, ``attention_mask``, ``position_ids`` and the per-token extras, each of
        shape (rows, width). Positions count from a row's first real token.
    """
    rows = [
        torch.cat([item.input_ids, torch.tensor(list(ids), dtype=torch.long)])
        for item, ids in zip(encoded, continuations, strict=True)
    ]
    width = max(len(row) for row in rows)

    def padded(row: torch.Tensor, value: int) -> torch.Tensor:
        gap = width - len(row)
        return torch.nn.functional.pad(row, (gap, 0) if side == "left" else (0, gap), value=value)

    mask = torch.stack([padded(torch.ones_like(row), 0) for row in rows])
    batch = {
        "input_ids": torch.stack([padded(row, pad_id) for row in rows]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=-1) - 1).clamp(min=0),
    }
    for key in encoded[0].per_token:
        extras = [
            torch.cat([item.per_token[key], item.per_token[key].new_zeros(len(ids))])
            for item, ids in zip(encoded, continuations, strict=True)
        ]
        batch[key] = torch.stack([padded(extra, 0) for extra in extras])
    return batch


def image_tensors(encoded: Sequence[EncodedPrompt]) -> dict[str, torch.Tensor]:
    """Concatenate the images' tensors row by row."""
    return {key: torch.cat([item.per_image[key] for item in encoded]) for key in encoded[0].per_image}


def load_base(config: ModelConfig) -> tuple[Any, Any]:
    """Load the model and the processor, the model on its device and in evaluation mode.

    Raises:
        CsrError: It is not there, or not an image-text-to-text model with a chat template.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    common = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        model = AutoModelForImageTextToText.from_pretrained(config.path, dtype=getattr(torch, dtype), **common)
        processor = AutoProcessor.from_pretrained(config.path, **common)
    except (OSError, ValueError, KeyError) as error:
        raise unloadable("model", config.path, error) from None
    if getattr(processor, "chat_template", None) is None:
        raise CsrError(f"the processor of {config.path} has no chat template", "save one with the processor")
    if hasattr(getattr(model, "model", None), "rope_deltas"):
        raise CsrError(
            f"{type(model).__name__} counts positions in three dimensions, which the engine does not do yet",
            "LLaVA-like models work",
        )
    return model.to(device).eval(), processor


def load_policy(config: ModelConfig, adapter: Path | None, max_image_pixels: int = 50_000_000) -> Policy:
    """Load the base model with an adapter on it, if one is given.

    In float32 the adapter is merged, which is exact to rounding and decodes faster. In
    half precision merging would round the small update away, so it stays beside the
    weights.
    """
    model, processor = load_base(config)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
        if model.get_base_model().dtype == torch.float32:
            model = model.merge_and_unload()
    return Policy(model, processor, max_image_pixels)

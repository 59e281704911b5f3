"""Wrap a loaded model with its processor: encode prompts, build model inputs, compute log-probabilities."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.models.encoding import MAX_IMAGE_PIXELS, EncodedPrompt, PromptEncoder, batch_rows, image_tensors
from csr_vlm.models.families import NOT_EXTRA_INPUTS, Family
from csr_vlm.models.passes import Block, join_blocks, make_blocks
from csr_vlm.models.prefix_tree import (
    MAX_TARGETS,
    MAX_TOKENS,
    Continuation,
    attention_window,
    model_inputs_of,
    only_predictors,
    row_tensors,
    target_index,
    tree_obstacle,
)


@dataclass
class Policy:
    """Hold a loaded model and its processor."""

    model: Any
    """Transformers model, or PEFT's wrapper of one."""
    processor: Any
    max_image_pixels: int = MAX_IMAGE_PIXELS
    prompt_encoder: PromptEncoder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        model = self.base_model
        self.prompt_encoder = PromptEncoder(
            model.config, model.generation_config, self.processor, self.max_image_pixels
        )

    @property
    def base_model(self) -> Any:
        """Return the transformers model without PEFT's wrapper."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def tokenizer(self) -> Any:
        """Return the processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Return the model's device."""
        device: torch.device = self.base_model.device
        return device

    @property
    def eos_ids(self) -> frozenset[int]:
        """Return the token ids that end a response."""
        return self.prompt_encoder.eos_ids

    @property
    def pad_id(self) -> int:
        """Return the padding token id; an end-of-sequence id if the tokenizer has none."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else min(self.eos_ids))

    @property
    def family(self) -> Family:
        """Return the model's family."""
        return self.prompt_encoder.family

    @property
    def image_token_ids(self) -> list[int]:
        """Return the ids that may not occur in a response; see :func:`csr_vlm.models.families.image_token_ids`."""
        return self.prompt_encoder.image_token_ids

    @property
    def reuses_features(self) -> bool:
        """Return whether the model accepts precomputed image features."""
        return self.family.features != "never"

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Encode a prompt and its image with the model's processor.

        Raises:
            CsrError: The image was deleted or changed since it was checked.
        """
        processed = self.prompt_encoder.process(prompt)
        shape = processed["input_ids"].shape
        extras = {key: value for key, value in processed.items() if key not in NOT_EXTRA_INPUTS}
        return EncodedPrompt(
            input_ids=processed["input_ids"][0],
            positions=self._positions(processed),
            per_token={key: value[0] for key, value in extras.items() if value.shape == shape},
            per_image={key: value for key, value in extras.items() if value.shape != shape},
            response_token_type=self.family.response_token_type,
        )

    def generation_inputs(self, prompt: Prompt) -> dict[str, Any]:
        """Return a prompt as the model's own ``generate`` takes it, on the model's device.

        Raises:
            CsrError: The image was deleted or changed since it was checked.
        """
        processed = self.prompt_encoder.process(prompt)
        return {key: self._to_device(value) for key, value in processed.items() if key != "labels"}

    def step_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Shape the positions of one more token per row, (rows,), as the model takes them.

        Returns:
            Positions of shape (rows, 1), or of shape (3, rows, 1) for M-RoPE.
        """
        column = positions[:, None]
        return column if self.family.positions == "sequential" else column.expand(3, -1, -1)

    @torch.inference_mode()
    def with_features(self, encoded: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
        """Return the prompts with image features, if the model accepts them; run the vision encoder once."""
        if not self.reuses_features:
            return list(encoded)
        images = {key: self._to_device(value) for key, value in image_tensors(encoded).items()}
        output = self.base_model.get_image_features(**images, return_dict=True)
        pooled = output.pooler_output
        if self.family.features == "stacked":
            tiles = [len(item.per_image["pixel_values"]) for item in encoded]
            pooled = [tensor.flatten(0, 1) for tensor in pooled.split(tiles)]
        layers = [pooled, *(getattr(output, "deepstack_features", None) or [])]
        return [replace(item, features=features) for item, *features in zip(encoded, *layers, strict=True)]

    def model_inputs(
        self,
        encoded: Sequence[EncodedPrompt],
        continuations: Sequence[Sequence[int]],
        padding_side: Literal["left", "right"],
    ) -> dict[str, Any]:
        """Build the model's inputs for prompts with continuations, on its device.

        Returns:
            The tensors of :func:`csr_vlm.models.encoding.batch_rows`, and the images' tensors or, for
            prompts with features, ``mm_encoder_outputs``.
        """
        batch: dict[str, Any] = dict(batch_rows(encoded, continuations, self.pad_id, padding_side))
        return {key: self._to_device(value) for key, value in batch.items()} | self._image_inputs(encoded)

    def teacher_forced(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], max_tokens: int = MAX_TOKENS
    ) -> list[torch.Tensor]:
        """Compute log P(r_o | x, r_<o) of given responses, in passes of at most ``max_tokens`` tokens.

        Responses about one image share a row where the model allows it (:mod:`csr_vlm.models.prefix_tree`).

        Returns:
            One float32 tensor of shape (response tokens,) per prompt, in nats, on the CPU.

        Raises:
            CsrError: A log-probability is not finite.
        """
        results: dict[int, torch.Tensor] = {}
        pending: list[Block] = []
        for blocks in self._blocks_by_image(prompts, responses, max_tokens):
            pending += blocks
            if sum(block.num_tokens for block in pending) >= max_tokens:
                results |= self._logprobs_of(pending, max_tokens)
                pending = []
        results |= self._logprobs_of(pending, max_tokens)
        for index, prompt in enumerate(prompts):
            if not results[index].isfinite().all():
                raise CsrError(
                    f"prompt {prompt.prompt_id}: the policy gives a response the log-probability "
                    f"{results[index].sum()}",
                    f"check {prompt.image}, the weights of model.path and the last adapter",
                )
        return [results[index] for index in range(len(prompts))]

    def blocks(
        self,
        units: Sequence[tuple[int, Sequence[Continuation]]],
        max_tokens: int,
        max_targets: int = sys.maxsize,
        *,
        sharing: bool = True,
    ) -> list[Block]:
        """Arrange units of responses about one image in rows; see :func:`csr_vlm.models.passes.make_blocks`.

        Args:
            units: Number and responses of each unit.
            max_tokens: Token budget of a tree.
            max_targets: The same for distinct response tokens.
            sharing: Whether responses share tokens where the model allows it.
        """
        config = self.base_model.config
        is_tree = sharing and tree_obstacle(config) is None
        window = attention_window(config)
        return make_blocks(units, self.image_token_ids, max_tokens, max_targets, window, is_tree=is_tree)

    def _blocks_by_image(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], max_tokens: int
    ) -> Iterator[list[Block]]:
        by_image: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_image.setdefault(prompt.image, []).append(index)
        for indices in by_image.values():
            encoded = {prompt: self.encode(prompt) for prompt in dict.fromkeys(prompts[index] for index in indices)}
            units = [(index, [(encoded[prompts[index]], responses[index])]) for index in indices]
            yield self.blocks(units, max_tokens, MAX_TARGETS)

    @torch.inference_mode()
    def _logprobs_of(self, blocks: Sequence[Block], max_tokens: int) -> dict[int, torch.Tensor]:
        """Compute the log-probabilities of the responses of blocks with one response per unit."""
        results = {}
        for block in join_blocks(blocks, max_tokens, MAX_TARGETS):
            tensors = row_tensors(block.rows, self.pad_id)
            batch = {key: value.to(self.device) for key, value in tensors.items()}
            distinct = {id(item): item for item in block.images}
            with_features = dict(zip(distinct, self.with_features(list(distinct.values())), strict=True))
            images = self._image_inputs([with_features[id(item)] for item in block.images])
            with only_predictors(self.base_model, batch["predictor_index"]):
                output = self.model(**model_inputs_of(self.base_model, batch), **images, use_cache=False)
            logits = output.logits.float()  # (1, targets, vocabulary)
            logprobs = logits.gather(-1, batch["targets"][..., None]).squeeze(-1) - logits.logsumexp(dim=-1)
            flat = logprobs.flatten().cpu()
            for unit, index in zip(block.units, target_index(block.rows, block.order(0)), strict=True):
                results[unit] = flat[index[index >= 0]]
        return results

    def _image_inputs(self, encoded: Sequence[EncodedPrompt]) -> dict[str, Any]:
        """Return the model's inputs for the images of prompts: features where the prompts have them, or pixels."""
        features = [item.features for item in encoded if item.features is not None]
        if features:
            return {"mm_encoder_outputs": {"image": self._encoder_outputs(features)}}
        return {key: self._to_device(value) for key, value in image_tensors(encoded).items()}

    def _positions(self, processed: Any) -> torch.Tensor:
        """Return the token positions of one processed prompt, as the model computes them."""
        if self.family.positions == "sequential":
            return torch.arange(processed["input_ids"].shape[1]) + self.family.first_position
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        positions, _ = self.base_model.model.get_rope_index(**{key: processed[key] for key in keys})
        return positions[:, 0]

    def _encoder_outputs(self, features: Sequence[Sequence[torch.Tensor]]) -> BaseModelOutputWithPooling:
        """Combine the image features of a batch as the model takes them."""
        pooled, *deeper = (list(layer) for layer in zip(*features, strict=True))
        output = BaseModelOutputWithPooling(
            pooler_output=torch.cat(pooled) if self.family.features == "stacked" else pooled
        )
        if deeper:
            output.deepstack_features = deeper
        return output

    def _to_device(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        dtype = self.base_model.dtype if value.is_floating_point() else None
        return value.to(self.device, dtype)

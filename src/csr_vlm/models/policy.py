"""The policy: a model, its processor, and prompts as the model reads them.

Generation, teacher forcing and training all encode a prompt through :meth:`Policy.encode`
and lay out rows through :func:`batch_rows`, so they cannot see different inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from csr_vlm.config.schema import ModelConfig
from csr_vlm.core.errors import CsrError, reason_of
from csr_vlm.core.records import Prompt
from csr_vlm.data.images import image_of
from csr_vlm.models.checkpoints import tensors_of
from csr_vlm.models.devices import resolve_device, resolve_dtype, unloadable
from csr_vlm.models.families import NOT_INPUTS, NOT_QUANTIZED, Family, family_of, picture_ids


@dataclass(frozen=True)
class EncodedPrompt:
    """What the processor makes of one prompt."""

    input_ids: torch.Tensor
    """Of shape (tokens,), image placeholders expanded."""
    positions: torch.Tensor
    """Of shape (tokens,), or (3, tokens) where they are counted in time, height and width."""
    per_token: dict[str, torch.Tensor]
    """Other tensors of shape (tokens,), such as token types."""
    per_image: dict[str, torch.Tensor]
    """Pixels and their like, to be concatenated along the first dimension."""
    response_type: int = 0
    """Value of the per-token tensors on a response's tokens."""
    features: tuple[torch.Tensor, ...] | None = None
    """The image as the language model sees it, of shape (image tokens, width); then what
    goes into deeper layers, each of the same shape."""

    @property
    def shift(self) -> int:
        """A response's first position, less the number of the prompt's tokens."""
        return int(self.positions.max()) + 1 - len(self.input_ids)


@dataclass
class PromptEncoder:
    """How a model is asked and its tokens are read, for which its weights are not needed."""

    config: Any
    generation_config: Any
    processor: Any
    max_image_pixels: int = 50_000_000
    eos_ids: frozenset[int] = field(init=False, repr=False)
    """Ids that end a response."""

    def __post_init__(self) -> None:
        eos = self.generation_config.eos_token_id
        if eos is None:
            eos = self.tokenizer.eos_token_id
        self.eos_ids = frozenset(eos if isinstance(eos, list) else [eos])

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    def image_token_ids(self) -> list[int]:
        """Ids that stand for pictures: a response that contained one could not be read back."""
        return picture_ids(self.config, self.processor)

    def image(self, prompt: Prompt) -> Any:
        """Load the prompt's image."""
        return image_of(prompt, self.max_image_pixels)

    def processed(self, prompt: Prompt) -> Any:
        """Load the image, apply the chat template, and tokenise as the processor wants it."""
        text, special = self._templated(prompt.text)
        return self.processor(images=[self.image(prompt)], text=[text], return_tensors="pt", add_special_tokens=special)

    def short_ids(self, prompt: Prompt) -> list[int]:
        """Tokenise a prompt with one token in the image's place, as engines with a processor of their own want it."""
        text, special = self._templated(prompt.text)
        ids: list[int] = self.tokenizer(text, add_special_tokens=special).input_ids
        return ids

    def _templated(self, text: str) -> tuple[str, bool]:
        """Return the prompt's text, and whether the tokenizer is to add special tokens."""
        if not self.family.chat:
            templated = f"{self.processor.image_token}{text}"
        else:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            message = {"role": "user", "content": content}
            templated = self.processor.apply_chat_template([message], add_generation_prompt=True)
        bos = self.tokenizer.bos_token
        # Some templates write the BOS themselves.
        return templated, not (bos and templated.startswith(bos))


@dataclass
class Policy:
    """A loaded model with everything needed to prompt it."""

    model: Any
    processor: Any
    max_image_pixels: int = 50_000_000
    prompt_encoder: PromptEncoder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        model = self.base_model
        self.prompt_encoder = PromptEncoder(
            model.config, model.generation_config, self.processor, self.max_image_pixels
        )

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
        return self.prompt_encoder.eos_ids

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else min(self.eos_ids))

    @property
    def family(self) -> Family:
        return self.prompt_encoder.family

    @property
    def image_token_ids(self) -> list[int]:
        """Ids that stand for pictures: a response that contained one could not be read back."""
        return self.prompt_encoder.image_token_ids

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        """Load the image, apply the chat template, and tokenise as the processor wants it."""
        encoded = self.prompt_encoder.processed(prompt)
        shape = encoded["input_ids"].shape
        extras = {key: value for key, value in encoded.items() if key not in NOT_INPUTS}
        return EncodedPrompt(
            input_ids=encoded["input_ids"][0],
            positions=self._positions(encoded),
            per_token={key: value[0] for key, value in extras.items() if value.shape == shape},
            per_image={key: value for key, value in extras.items() if value.shape != shape},
            response_type=self.family.response_type,
        )

    def _positions(self, encoded: Any) -> torch.Tensor:
        """Number the tokens of one encoded prompt as the model does."""
        if self.family.positions == "counted":
            return torch.arange(encoded["input_ids"].shape[1]) + self.family.first_position
        keys = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        positions, _ = self.base_model.model.get_rope_index(**{key: encoded[key] for key in keys})
        return positions[:, 0]

    def step_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Shape the positions of one further token a row, (rows,), as the model takes them."""
        column = positions[:, None]
        return column if self.family.positions == "counted" else column.expand(3, -1, -1)

    @property
    def reuses_features(self) -> bool:
        """Whether the model takes image features that were computed before."""
        return self.family.features != "never"

    @torch.inference_mode()
    def with_features(self, encoded: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
        """Run the vision encoder once over some prompts' images, where the model allows it."""
        if not self.reuses_features:
            return list(encoded)
        images = {key: self._place(value) for key, value in image_tensors(encoded).items()}
        output = self.base_model.get_image_features(**images, return_dict=True)
        pooled = output.pooler_output
        if self.family.features == "stacked":
            tiles = [len(item.per_image["pixel_values"]) for item in encoded]
            pooled = [tensor.flatten(0, 1) for tensor in pooled.split(tiles)]
        layers = [pooled, *(getattr(output, "deepstack_features", None) or [])]
        return [replace(item, features=features) for item, *features in zip(encoded, *layers, strict=True)]

    def _encoder_outputs(self, features: Sequence[Sequence[torch.Tensor]]) -> BaseModelOutputWithPooling:
        """Put a batch's image features together as the model takes them."""
        pooled, *deeper = (list(layer) for layer in zip(*features, strict=True))
        output = BaseModelOutputWithPooling(
            pooler_output=torch.cat(pooled) if self.family.features == "stacked" else pooled
        )
        if deeper:
            output.deepstack_features = deeper
        return output

    def model_inputs(
        self, encoded: Sequence[EncodedPrompt], continuations: Sequence[Sequence[int]], side: Literal["left", "right"]
    ) -> dict[str, Any]:
        """Lay out prompts and what follows them as one padded batch, on the model's device."""
        batch: dict[str, Any] = dict(batch_rows(encoded, continuations, self.pad_id, side))
        features = [item.features for item in encoded if item.features is not None]
        if features:
            batch["mm_encoder_outputs"] = {"image": self._encoder_outputs(features)}
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
        """Compute log P(r_o | x, r_<o) of given responses in one forward pass; an image they share is encoded once.

        Returns:
            One float32 tensor of shape (response tokens,) a prompt, on the CPU.
        """
        read = {prompt: self.encode(prompt) for prompt in prompts}
        by_image = {prompt.image: item for prompt, item in read.items()}
        seen = dict(zip(by_image, self.with_features(list(by_image.values())), strict=True))
        encoded = [replace(read[prompt], features=seen[prompt.image].features) for prompt in prompts]
        inputs = self.model_inputs(encoded, responses, "right")
        logits = self.model(**inputs, use_cache=False).logits.float()
        logprobs = []
        for row, (item, ids) in enumerate(zip(encoded, responses, strict=True)):
            start = len(item.input_ids)
            predicted = torch.log_softmax(logits[row, start - 1 : start - 1 + len(ids)], dim=-1)
            targets = torch.tensor(list(ids), device=predicted.device)
            logprobs.append(predicted.gather(-1, targets[:, None]).squeeze(-1).cpu())
            if not logprobs[-1].isfinite().all():
                prompt = prompts[row]
                raise CsrError(
                    f"prompt {prompt.prompt_id}: the policy gives a response the log-probability {logprobs[-1].sum()}",
                    f"look at {prompt.image} and at the weights of model.path and of the last adapter",
                )
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
        shape (rows, width); positions that are counted in three dimensions (3, rows, width).
    """
    rows = [
        torch.cat([item.input_ids, torch.tensor(list(ids), dtype=torch.long)])
        for item, ids in zip(encoded, continuations, strict=True)
    ]
    width = max(len(row) for row in rows)

    def padded(row: torch.Tensor, value: int) -> torch.Tensor:
        gap = width - row.shape[-1]
        return torch.nn.functional.pad(row, (gap, 0) if side == "left" else (0, gap), value=value)

    positions = [padded(_continued(item, len(ids)), 0) for item, ids in zip(encoded, continuations, strict=True)]
    batch = {
        "input_ids": torch.stack([padded(row, pad_id) for row in rows]),
        "attention_mask": torch.stack([padded(torch.ones_like(row), 0) for row in rows]),
        "position_ids": torch.stack(positions, dim=-2),
    }
    for key in encoded[0].per_token:
        extras = [
            torch.cat([item.per_token[key], item.per_token[key].new_full((len(ids),), item.response_type)])
            for item, ids in zip(encoded, continuations, strict=True)
        ]
        batch[key] = torch.stack([padded(extra, 0) for extra in extras])
    return batch


def _continued(item: EncodedPrompt, num_tokens: int) -> torch.Tensor:
    """Number a prompt's tokens and those of a response to it."""
    response = torch.arange(num_tokens) + len(item.input_ids) + item.shift
    return torch.cat([item.positions, response.expand(*item.positions.shape[:-1], -1)], dim=-1)


def image_tensors(encoded: Sequence[EncodedPrompt]) -> dict[str, torch.Tensor]:
    """Concatenate the images' tensors along the first dimension.

    Where images differ in size or in their number of tiles the smaller are filled up with
    zeros, as the processors do within a batch.
    """
    return {key: _stacked([item.per_image[key] for item in encoded]) for key in encoded[0].per_image}


def _stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    most = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        gaps = [(0, size - own) for size, own in zip(most, tensor.shape[1:], strict=True)]
        filled.append(torch.nn.functional.pad(tensor, [side for gap in reversed(gaps) for side in gap]))
    return torch.cat(filled)


def load_base(config: ModelConfig) -> tuple[Any, Any]:
    """Load the model and the processor, the model on its device and in evaluation mode.

    Raises:
        CsrError: It is not there, not an image-text-to-text model, or has no chat template
            where its family needs one; or it is to be quantised and that cannot be done here.
    """
    device = resolve_device(config.device)
    dtype = getattr(torch, resolve_dtype(config.dtype, device))
    placed = {} if config.quantization is None else {"device_map": {"": device}} | _four_bits(device, dtype)
    with _loading(config) as common:
        model, told = AutoModelForImageTextToText.from_pretrained(
            config.path, dtype=dtype, output_loading_info=True, **placed, **common
        )
        processor = AutoProcessor.from_pretrained(config.path, **common)
    if told["missing_keys"]:
        raise CsrError(
            f"{config.path} lacks {len(told['missing_keys'])} of its weights, such as {min(told['missing_keys'])}",
            "download it again; random numbers would stand in their place",
        )
    _require_template(config, model.config, processor)
    if config.quantization is None:
        model = model.to(device)
    return model.eval(), processor


def load_prompt_encoder(config: ModelConfig, max_image_pixels: int = 50_000_000) -> PromptEncoder:
    """Load what :func:`load_base` does, without the weights.

    Raises:
        CsrError: As there.
    """
    with _loading(config) as common:
        model_config = AutoConfig.from_pretrained(config.path, **common)
        processor = AutoProcessor.from_pretrained(config.path, **common)
        try:
            generation_config = GenerationConfig.from_pretrained(config.path, revision=config.revision)
        except OSError:  # it has none
            generation_config = GenerationConfig.from_model_config(model_config)
    _require_template(config, model_config, processor)
    return PromptEncoder(model_config, generation_config, processor, max_image_pixels)


@contextmanager
def _loading(config: ModelConfig) -> Iterator[dict[str, Any]]:
    """Give what every part of a checkpoint is loaded with, and word what goes wrong."""
    try:
        yield {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise CsrError(
            f"{config.path} needs a library that is not installed: {reason}", "pip install 'csr-vlm[families]'"
        ) from None
    except Exception as error:  # A damaged or foreign checkpoint may raise anything.
        raise unloadable("model", config.path, error) from None


def _require_template(config: ModelConfig, model_config: Any, processor: Any) -> None:
    if getattr(processor, "chat_template", None) is None and family_of(model_config).chat:
        raise CsrError(f"the processor of {config.path} has no chat template", "save one with the processor")


def _four_bits(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Ask for the language model's weights in 4-bit NormalFloat (QLoRA, arXiv 2305.14314).

    The vision tower, the projector and the output layer stay as they are: they are small,
    and what they lose every token loses.

    Raises:
        CsrError: There is no GPU, or bitsandbytes is not installed.
    """
    if not device.startswith("cuda"):
        raise CsrError("model.quantization=nf4 needs a CUDA device", "leave it out, or run on a GPU")
    if find_spec("bitsandbytes") is None:
        raise CsrError("model.quantization=nf4 needs bitsandbytes", "pip install bitsandbytes")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(NOT_QUANTIZED),
    )
    return {"quantization_config": quantization}


def load_adapter(model: Any, adapter: Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on a base model.

    Raises:
        CsrError: It is not there, or does not fit the model. PEFT leaves what it finds no
            place for out and only warns, so an adapter with other names would do nothing.
    """
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise CsrError(
            f"there is no adapter in {adapter}", "it holds adapter_config.json and adapter_model.safetensors"
        )
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
    except Exception as error:  # A damaged or foreign adapter may raise anything.
        raise CsrError(
            f"the adapter {adapter} does not fit the model: {reason_of(error)}", "check model.path"
        ) from None
    names = tensors_of(weights).keys()
    strange = names ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if strange:
        raise CsrError(
            f"the adapter {adapter} does not fit the model: {len(strange)} of its tensors have no place, such as "
            f"{min(strange)}",
            "check model.path; an adapter made by another version of transformers may name layers otherwise",
        )
    return adapted


def load_policy(config: ModelConfig, adapter: Path | None, max_image_pixels: int = 50_000_000) -> Policy:
    """Load the base model with an adapter on it, if one is given.

    In float32 the adapter is merged, which is exact to rounding and decodes faster. In
    half precision or 4 bits merging would round the small update away, so it stays beside
    the weights.
    """
    model, processor = load_base(config)
    if adapter is not None:
        model = load_adapter(model, adapter).eval()
        if config.quantization is None and model.get_base_model().dtype == torch.float32:
            model = model.merge_and_unload()
    return Policy(model, processor, max_image_pixels)

"""Measure how long the prompts of a run are: with the model's processor on a sample, else from its architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.models.architecture import Architecture, local_directory

SAMPLE = 16
"""Prompts that are measured."""
_TEMPLATE_TOKENS = 30
"""Tokens of a chat template and a short question."""
_CHARACTERS_PER_TOKEN = 4
_PICTURE = 640 * 480


@dataclass(frozen=True)
class PromptLengths:
    """Hold the number of tokens of prompts, pictures included."""

    mean: float
    longest: int
    image: float
    """Mean tokens of a picture."""
    source: str

    def dump(self) -> dict[str, float | int | str]:
        """Return JSON data."""
        return {
            "mean": round(self.mean, 1),
            "longest": self.longest,
            "image": round(self.image, 1),
            "source": self.source,
        }


def prompt_lengths(config: RunConfig, architecture: Architecture, prompts: Sequence[Prompt]) -> PromptLengths:
    """Measure a sample of prompts with the processor if it is on disk; otherwise estimate their lengths.

    Args:
        config: Settings of the run.
        architecture: The policy, for the tokens of a picture.
        prompts: Sample; may be empty.
    """
    readable = [prompt for prompt in prompts if Path(prompt.image).is_file()]
    measured = _measured(config, readable)
    if measured is not None:
        return measured
    limit = config.model.max_image_tokens or architecture.max_image_tokens
    pictures = [min(_picture_tokens(architecture, prompt), limit) for prompt in readable] or [
        min(architecture.image_tokens, limit)
    ]
    texts = [len(prompt.text) / _CHARACTERS_PER_TOKEN for prompt in prompts] or [15.0]
    text = _TEMPLATE_TOKENS + mean(texts)
    source = f"{architecture.source}; " + (
        f"pictures of {len(readable)} prompts" if readable else "pictures of 640 x 480 pixels"
    )
    longest = round(max(pictures) + _TEMPLATE_TOKENS + max(texts))
    return PromptLengths(mean(pictures) + text, longest, mean(pictures), source)


def _measured(config: RunConfig, prompts: Sequence[Prompt]) -> PromptLengths | None:
    """Encode prompts with the processor; None if it is not on disk or cannot be used here."""
    directory = local_directory(config.model)
    if directory is None or not prompts:
        return None
    from csr_vlm.models.loading import load_prompt_encoder

    try:
        model = config.model.model_copy(update={"path": str(directory), "revision": None})
        encoder = load_prompt_encoder(model, config.data.max_image_pixels)
        rows = [encoder.process(prompt)["input_ids"][0].tolist() for prompt in prompts]
    except CsrError:
        return None
    image_ids = set(encoder.image_token_ids)
    lengths, pictures = [len(row) for row in rows], [sum(token in image_ids for token in row) for row in rows]
    return PromptLengths(
        mean(lengths), max(lengths), mean(pictures), f"measured with the processor on {len(rows)} prompts"
    )


def _picture_tokens(architecture: Architecture, prompt: Prompt) -> float:
    """Estimate the tokens of a prompt's picture; those of Qwen's models are proportional to its pixels."""
    if not architecture.model_type.startswith("qwen"):
        return architecture.image_tokens
    from PIL import Image

    with Image.open(prompt.image) as image:
        return max(architecture.image_tokens * image.width * image.height / _PICTURE, 4)

"""Test that what a family's processor refuses is found without weights, and its placeholders are removed."""

from __future__ import annotations

from functools import cache

import pytest
from PIL import Image

from csr_vlm.config.schema import ModelConfig
from csr_vlm.data.placeholders import remove_placeholders
from csr_vlm.data.rows import BadRow
from csr_vlm.models.loading import load_prompt_encoder
from csr_vlm.models.prompt_check import REFUSED, TOO_LONG, ProcessorCheck
from tests.families.checkpoints import FAMILIES, checkpoint

GOOD = Image.new("RGB", (72, 48), "red")
QUESTION = "What is it?"
TOKENS = {
    "gemma3": {"<start_of_image>", "<end_of_image>", "<image_soft_token>"},
    "qwen2_vl": {"<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"},
    "qwen3_vl": {"<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"},
    "pixtral": {"[IMG]", "[IMG_BREAK]", "[IMG_END]"},
    "internvl": {"<img>", "</img>", "<IMG_CONTEXT>", "<video>"},
    "idefics3": {"<image>", "<fake_token_around_image>", "<global-img>", "<row_2_col_3>"},
    "llava_onevision": {"<image>", "<video>"},
}


@cache
def check_of(name: str) -> ProcessorCheck:
    return ProcessorCheck(load_prompt_encoder(ModelConfig(path=str(checkpoint(name)), device="cpu")), room=8)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_placeholder_of_a_family_is_removed(name: str) -> None:
    check = check_of(name)
    assert set(check.placeholders) >= TOKENS.get(name, set())
    check.require(QUESTION, GOOD)
    for token in check.placeholders:
        assert remove_placeholders(f"{token}\n{QUESTION}{token}", check.placeholders) == (QUESTION, (token,))
    joined = "".join(check.placeholders)
    cleaned, removed = remove_placeholders(f"{joined} {QUESTION} {joined}", check.placeholders)
    assert (cleaned, set(removed)) == (QUESTION, set(check.placeholders))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_token_that_stays_in_a_text_is_refused(name: str) -> None:
    """The check relies on no list: what the tokenizer reads as an image is refused however it is written."""
    check = check_of(name)
    for token in check.placeholders:
        encoder = check._encoder
        if set(encoder.tokenizer(token, add_special_tokens=False)["input_ids"]) & set(encoder.image_token_ids):
            with pytest.raises(BadRow):
                check.require(f"{token}{QUESTION}", GOOD)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (20, 5000), (5000, 20), (2, 900)])
def test_odd_pictures_pass_or_have_a_reason(name: str, size: tuple[int, int]) -> None:
    problem = None
    try:
        check_of(name).require(QUESTION, Image.new("RGB", size))
    except BadRow as error:
        problem = error
    assert problem is None or (str(problem) in (REFUSED, TOO_LONG) and 0 < len(problem.detail) < 300)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "pixtral", "mistral3"])
def test_extreme_aspect_ratios_are_refused_with_the_processors_words(name: str) -> None:
    with pytest.raises(BadRow, match=REFUSED) as refused:
        check_of(name).require(QUESTION, Image.new("RGB", (20, 5000)))
    assert "ratio" in refused.value.detail or "Size" in refused.value.detail


def test_a_prompt_that_leaves_no_room_is_too_long() -> None:
    encoder = load_prompt_encoder(ModelConfig(path=str(checkpoint("llava_clip")), device="cpu"))
    length = int(encoder.process_image(QUESTION, GOOD)["input_ids"].shape[1])
    context = encoder.config.text_config.max_position_embeddings
    ProcessorCheck(encoder, room=context - length).require(QUESTION, GOOD)
    with pytest.raises(BadRow, match=TOO_LONG) as refused:
        ProcessorCheck(encoder, room=context - length + 1).require(QUESTION, GOOD)
    assert f"{length:,} tokens" in refused.value.detail
    with pytest.raises(BadRow, match=TOO_LONG):
        ProcessorCheck(encoder, max_tokens=length).require(QUESTION, GOOD)
    with pytest.raises(BadRow, match=TOO_LONG):
        ProcessorCheck(encoder).require(QUESTION, GOOD, ["There is a boat. " * context])

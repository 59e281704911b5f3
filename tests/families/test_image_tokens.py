"""Test model.max_image_tokens: large pictures are limited alike wherever a processor is loaded."""

from __future__ import annotations

import pytest
from PIL import Image

from csr_vlm.config.schema import ModelConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.models.image_tokens import image_limit_options
from csr_vlm.models.loading import load_policy, load_prompt_encoder
from tests.families import checkpoints
from tests.families.shim import without_compiled_torchvision

LIMITS = {
    # One token is 16 x 16 pixels: 8 of them, where a picture of 300 x 200 pixels would have 16.
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), 8),
    # The longest side of 64 is 8 patches of 8 pixels, in Mistral 3 4 squares of 16: 40 and 12 tokens.
    "pixtral": 16,
    "mistral3": 4,
    # A tile is 4 tokens: a picture of 300 x 200 has 3 x 1 tiles or more, and a thumbnail.
    "internvl": 8,
    "idefics3": 8,
    "smolvlm": 8,
    # A thumbnail of 16 tokens, two tiles of 16 and up to 8 ends of lines, against four tiles.
    "llava_next": 56,
    "llava_onevision": 56,
}


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Prompt:
    path = tmp_path_factory.mktemp("pictures") / "large.png"
    Image.effect_noise((300, 200), 60).convert("RGB").save(path)
    return Prompt("large", str(path), "What is there?")


def num_image_tokens(encoder, prompt: Prompt) -> int:
    return encoder.process(prompt)["input_ids"][0].tolist().count(encoder.config.image_token_id)


@pytest.mark.parametrize("family", LIMITS)
def test_a_large_picture_has_at_most_the_limit(family: str, prompt: Prompt) -> None:
    without_compiled_torchvision()
    limit = LIMITS[family]
    path = str(checkpoints.checkpoint(family))
    assert num_image_tokens(load_prompt_encoder(ModelConfig(path=path)), prompt) > limit
    limited = ModelConfig(path=path, device="cpu", max_image_tokens=limit)
    encoder = load_prompt_encoder(limited)
    assert 1 <= num_image_tokens(encoder, prompt) <= limit
    policy = load_policy(limited, None)
    assert policy.encode(prompt).input_ids.tolist() == encoder.process(prompt)["input_ids"][0].tolist()
    (logprobs,) = policy.teacher_forced([prompt], [[7, 8]])
    assert logprobs.shape == (2,)
    assert bool(image_limit_options(policy.processor)) == (not family.startswith("llava"))


@pytest.mark.parametrize("family", ["llava_clip", "gemma3", "paligemma"])
def test_a_limit_is_refused_where_all_pictures_have_the_same_number(family: str) -> None:
    path = str(checkpoints.checkpoint(family))
    with pytest.raises(CsrError, match="the same number of tokens"):
        load_prompt_encoder(ModelConfig(path=path, max_image_tokens=100))


@pytest.mark.parametrize(("family", "fewest"), [("internvl", 4), ("idefics3", 4), ("llava_next", 52)])
def test_a_limit_below_the_fewest_tokens_is_refused(family: str, fewest: int) -> None:
    without_compiled_torchvision()
    with pytest.raises(CsrError, match="fewest") as caught:
        load_prompt_encoder(ModelConfig(path=str(checkpoints.checkpoint(family)), max_image_tokens=3))
    assert str(fewest) in caught.value.hint

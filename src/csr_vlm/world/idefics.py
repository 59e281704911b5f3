"""A policy of another family for the world: ``Idefics3ForConditionalGeneration``, of which SmolVLM is a kind.

It sees otherwise than LLaVA: no class token, no first normalisation, every two by two patches
folded into one of 9 image tokens, the last layer of the tower in place of the last but one.
"""

from __future__ import annotations

import torch
from transformers import (
    CLIPModel,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaForConditionalGeneration,
)

from csr_vlm.world import base_models
from csr_vlm.world.scenes import World

_FOLD = 2
_MARKS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def new_idefics3(
    world: World, sizes: base_models.Sizes, vision: CLIPModel, language: LlavaForConditionalGeneration | None
) -> tuple[Idefics3ForConditionalGeneration, Idefics3Processor]:
    """Make a policy whose tower starts from the scorer's layers and whose language model from a LLaVA's, or untrained.

    What lies between them, and the tower's last normalisation, is new.
    """
    words = base_models.fast_tokenizer(
        base_models.train_tokenizer(world, lowercase=False),
        extra_special_tokens={"image_token": base_models.IMAGE},
        padding_side="left",
    )
    words.add_special_tokens({"additional_special_tokens": list(_MARKS)}, replace_extra_special_tokens=False)
    tower = base_models.vision_config(sizes).to_dict() | {"model_type": "idefics3_vision"}
    text = base_models.text_config(len(words), sizes)
    config = Idefics3Config(
        vision_config=tower,
        text_config=text.to_dict(),
        image_token_id=words.convert_tokens_to_ids(base_models.IMAGE),
        pad_token_id=text.pad_token_id,
        scale_factor=_FOLD,
        tie_word_embeddings=True,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**base_models.special_ids())
    _take_vision(model, vision)
    if language is not None:
        _take_language(model, language)
    return model, _processor(words)


def _processor(words: object) -> Idefics3Processor:
    side = {"longest_edge": base_models.IMAGE_SIZE}
    like = base_models.image_processor()
    pixels = Idefics3ImageProcessor(
        size=side,
        max_image_size=side,
        do_image_splitting=False,
        image_mean=like.image_mean,
        image_std=like.image_std,
    )
    number = (base_models.IMAGE_SIZE // base_models.PATCH_SIZE // _FOLD) ** 2
    template = base_models.CHAT_TEMPLATE.replace(f"{base_models.IMAGE}\n", base_models.IMAGE)
    return Idefics3Processor(pixels, words, image_seq_len=number, chat_template=template)


def _take_vision(model: Idefics3ForConditionalGeneration, clip: CLIPModel) -> None:
    ours, theirs = model.model.vision_model, clip.vision_model
    ours.encoder.load_state_dict(theirs.encoder.state_dict())
    with torch.no_grad():
        ours.embeddings.patch_embedding.weight.copy_(theirs.embeddings.patch_embedding.weight)
        ours.embeddings.position_embedding.weight.copy_(theirs.embeddings.position_embedding.weight[1:])


def _take_language(model: Idefics3ForConditionalGeneration, llava: LlavaForConditionalGeneration) -> None:
    state = llava.model.language_model.state_dict()
    embedding = state.pop("embed_tokens.weight")
    text = model.model.text_model
    missing, unexpected = text.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["embed_tokens.weight"], [])
    with torch.no_grad():
        text.embed_tokens.weight[: len(embedding)] = embedding

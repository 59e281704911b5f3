"""Build the world's untrained LLaVA and CLIP from their configurations.

``CLIPModel`` scores sentences against images; ``LlavaForConditionalGeneration``, whose
vision tower has the same architecture, is the policy. Processors, tokenizers and chat
template have the usual formats, so everything loads through ``AutoModelForImageTextToText``,
``AutoModel`` and ``AutoProcessor``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from csr_vlm.core.formatting import article
from csr_vlm.models.checkpoints import rename_as_published
from csr_vlm.world.corpus import DESCRIBE, sentence, yes_no_question
from csr_vlm.world.scenes import CELL, GRID, World

IMAGE_SIZE = GRID * CELL
PATCH_SIZE = 12
PAD, BOS, UNK, EOS, IMAGE = "<pad>", "<s>", "<unk>", "</s>", "<image>"
SPECIAL = (PAD, BOS, UNK, EOS, IMAGE)
"""Tokens with the ids 0..4. EOS must not be 2: CLIPTextModel treats an EOS id of 2 as a legacy
checkpoint and then pools at the highest token id instead of at EOS."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} "
    "{% else %}ASSISTANT: "
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}</s>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """Configure the sizes of the two models."""

    vision_width: int = 128
    vision_layers: int = 4
    text_width: int = 96
    text_layers: int = 2
    language_width: int = 128
    language_layers: int = 4
    heads: int = 4


def train_tokenizer(world: World, lowercase: bool, texts: Iterable[str] | None = None) -> Tokenizer:
    """Train a byte-level BPE tokenizer in which every word of the world is one token.

    Args:
        texts: Texts to train on; by default the sentences and questions of the world's template.
    """
    if texts is None:
        return Tokenizer.from_str(_trained(tuple(_template_texts(world)), lowercase, 768))
    return Tokenizer.from_str(_trained(tuple(texts), lowercase, 1536))


@cache
def _trained(texts: tuple[str, ...], lowercase: bool, vocabulary: int) -> str:
    """Train a tokenizer and return it as JSON; training takes seconds, and the models of a world share it."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=lowercase)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tail = f" {EOS}" if lowercase else ""
    ids = [(token, SPECIAL.index(token)) for token in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A{tail}", special_tokens=ids)
    return str(tokenizer.to_str())


def _template_texts(world: World) -> list[str]:
    """Return every sentence and question of the world's template."""
    texts = [sentence(world, (kind, color)) for kind in world.kinds for color in world.colors]
    texts += [" " + text for text in texts] + [yes_no_question(kind) for kind in world.kinds]
    texts += [f"USER: \n{text} ASSISTANT: Yes. No." for text in DESCRIBE]
    things = [f"{article(color)} {color} {kind}" for kind in world.kinds for color in world.colors]
    texts += [f"{thing} and {thing}" for thing in things]
    return texts


def fast_tokenizer(tokenizer: Tokenizer, **extra: object) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK, **extra
    )


def image_processor(side: int = IMAGE_SIZE) -> CLIPImageProcessor:
    """Return the processor of images of ``side`` x ``side`` pixels."""
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def vision_config(sizes: Sizes, side: int = IMAGE_SIZE) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=sizes.vision_width,
        intermediate_size=3 * sizes.vision_width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.heads,
        image_size=side,
        patch_size=PATCH_SIZE,
        projection_dim=sizes.text_width,
    )


def text_config(vocabulary: int, sizes: Sizes) -> LlamaConfig:
    """Configure the language model of a policy."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.language_width,
        intermediate_size=3 * sizes.language_width,
        num_hidden_layers=sizes.language_layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **special_ids(),
    )


def special_ids() -> dict[str, int]:
    """Map ``pad_token_id``, ``bos_token_id`` and ``eos_token_id`` to the ids."""
    return {f"{name}_token_id": SPECIAL.index(token) for name, token in (("pad", PAD), ("bos", BOS), ("eos", EOS))}


def new_clip(world: World, sizes: Sizes, texts: Iterable[str] | None = None) -> tuple[CLIPModel, CLIPProcessor]:
    """Create an untrained scorer and its processor, whose tokenizer is trained on ``texts`` if given."""
    tokenizer = fast_tokenizer(train_tokenizer(world, lowercase=True, texts=texts), model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.text_width,
        intermediate_size=3 * sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=77,
        projection_dim=sizes.text_width,
        **special_ids(),
    )
    config = CLIPConfig(
        text_config=text.to_dict(),
        vision_config=vision_config(sizes, world.side).to_dict(),
        projection_dim=sizes.text_width,
    )
    return CLIPModel(config), CLIPProcessor(image_processor=image_processor(world.side), tokenizer=tokenizer)


def new_llava(
    world: World,
    sizes: Sizes,
    vision: CLIPModel | None = None,
    texts: Iterable[str] | None = None,
    feature_layer: int = -2,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Create an untrained policy and its processor.

    Args:
        vision: Copy the vision tower of this model; None leaves it untrained.
        texts: Texts to train the tokenizer on; by default those of the world's template.
        feature_layer: Layer of the vision tower that the language model reads.
    """
    tokenizer = fast_tokenizer(
        train_tokenizer(world, lowercase=False, texts=texts),
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
    )
    processor = LlavaProcessor(
        image_processor=image_processor(world.side),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=vision_config(sizes, world.side).to_dict(),
        text_config=text_config(len(tokenizer), sizes).to_dict(),
        image_token_id=SPECIAL.index(IMAGE),
        vision_feature_select_strategy="default",
        vision_feature_layer=feature_layer,
        image_seq_length=(world.side // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special_ids())
    if vision is not None:
        model.model.vision_tower.load_state_dict(vision.vision_model.state_dict())
    return model, processor


def save(model: torch.nn.Module, processor: object, directory: Path) -> None:
    """Write a checkpoint in fp16, with tensor names as published; the dtype of the model itself does not change.

    A user who merges an adapter into it and saves the result gets names that other programs, such as vLLM, know.
    """
    state = {name: tensor.half() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    model.save_pretrained(directory, state_dict=state)  # type: ignore[operator]
    rename_as_published(directory)
    processor.save_pretrained(directory)  # type: ignore[attr-defined]

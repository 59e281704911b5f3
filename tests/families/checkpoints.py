"""Build tiny checkpoints of many model families: directories that load by name like a user's model.

Each is built from its configuration with random weights, a real tokenizer, image processor and
chat template, and saved. Nothing is trained: the tests check that generation, scoring, training
and merging agree, not that the responses make sense. The weights are large enough for every image
and token to influence the tokens after it.

Checkpoints are cached under ``.cache/families`` and built again if this file or a library that they
depend on changes. ``python -m tests.families.checkpoints`` builds all of them. To add a family, write
a function that returns its model and processor, and add it to ``FAMILIES``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers as hf

from csr_vlm.world.base_models import CHAT_TEMPLATE, SPECIAL, train_tokenizer
from csr_vlm.world.scenes import HARBOUR
from tests.families.shim import without_compiled_torchvision

CACHE = Path(__file__).parents[2] / ".cache" / "families"
WIDTH = 32
IMAGE = 32
PATCH = 8
PAD, BOS, _, EOS, IMAGE_ID = range(5)
"""Special token ids of the world's tokenizer."""

Checkpoint = tuple[Any, Any]
"""(model, processor)."""


def tokenizer(*tokens: str, **named: str) -> Any:
    """Return the world's tokenizer with additional special tokens, some of them named."""
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(HARBOUR, lowercase=False),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=named,
    )
    made.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    return made


def chat(image: str) -> str:
    """Return the world's chat template with a family's image placeholder."""
    assert CHAT_TEMPLATE.count(f"{SPECIAL[IMAGE_ID]}\n") == 1
    return CHAT_TEMPLATE.replace(f"{SPECIAL[IMAGE_ID]}\n", image)


def llama(words: Any, **changes: Any) -> dict[str, Any]:
    """Return a language model's options under the names that most families use."""
    return {
        "model_type": "llama",
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // 4,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        **changes,
    }


def vit(model_type: str, **changes: Any) -> dict[str, Any]:
    """Return a vision tower's options under the names that most families use."""
    return {
        "model_type": model_type,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE,
        "patch_size": PATCH,
        **changes,
    }


def clip_pixels() -> Any:
    return hf.CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})


def siglip_pixels(**more: Any) -> Any:
    return hf.SiglipImageProcessor(size={"height": IMAGE, "width": IMAGE}, **more)


def llava_clip() -> Checkpoint:
    words = tokenizer(image_token="<image>")
    config = hf.LlavaConfig(vision_config=vit("clip_vision_model"), text_config=llama(words), image_token_id=IMAGE_ID)
    processor = hf.LlavaProcessor(
        clip_pixels(),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("<image>\n"),
    )
    return hf.LlavaForConditionalGeneration(config), processor


def llava_siglip() -> Checkpoint:
    words = tokenizer(image_token="<image>")
    config = hf.LlavaConfig(
        vision_config=vit("siglip_vision_model", vision_use_head=False),
        text_config=llama(words),
        image_token_id=IMAGE_ID,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    processor = hf.LlavaProcessor(
        siglip_pixels(),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=chat("<image>\n"),
    )
    return hf.LlavaForConditionalGeneration(config), processor


def vipllava() -> Checkpoint:
    words = tokenizer(image_token="<image>")
    config = hf.VipLlavaConfig(
        vision_config=vit("clip_vision_model"),
        text_config=llama(words),
        image_token_id=IMAGE_ID,
        vision_feature_layer=[-2, -1, 1],
    )
    processor = hf.LlavaProcessor(
        clip_pixels(),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("<image>\n"),
    )
    return hf.VipLlavaForConditionalGeneration(config), processor


PINPOINTS = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE], [2 * IMAGE, 2 * IMAGE]]


def llava_next() -> Checkpoint:
    words = tokenizer(image_token="<image>")
    config = hf.LlavaNextConfig(
        vision_config=vit("clip_vision_model"),
        text_config=llama(words),
        image_token_id=IMAGE_ID,
        image_grid_pinpoints=PINPOINTS,
    )
    pixels = hf.LlavaNextImageProcessor(
        size={"shortest_edge": IMAGE},
        crop_size={"height": IMAGE, "width": IMAGE},
        image_grid_pinpoints=PINPOINTS,
    )
    processor = hf.LlavaNextProcessor(
        pixels,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("<image>\n"),
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> Checkpoint:
    words = tokenizer(image_token="<image>", video_token="<video>")
    config = hf.LlavaOnevisionConfig(
        vision_config=vit("siglip_vision_model", vision_use_head=False),
        text_config=llama(words, model_type="qwen2"),
        image_token_id=IMAGE_ID,
        video_token_id=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )
    pixels = hf.LlavaOnevisionImageProcessor(size={"height": IMAGE, "width": IMAGE}, image_grid_pinpoints=PINPOINTS)
    processor = hf.LlavaOnevisionProcessor(
        pixels,
        words,
        hf.LlavaOnevisionVideoProcessor(size={"height": IMAGE, "width": IMAGE}),
        num_image_tokens=(IMAGE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chat("<image>\n"),
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_CHAT = chat("<|vision_start|><|image_pad|><|vision_end|>")


def qwen_ids(words: Any) -> dict[str, int]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return dict(zip(names, words.convert_tokens_to_ids(list(QWEN_TOKENS)), strict=True))


def qwen_text(words: Any, **changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    return llama(words, rope_parameters=rope, **changes)


def qwen_processor(words: Any, name: str, patch: int) -> Any:
    side = {"shortest_edge": 4 * patch * patch, "longest_edge": 64 * patch * patch}
    pixels = {"patch_size": patch, "merge_size": 2, "size": side}
    video = {"Qwen3VL": hf.Qwen3VLVideoProcessor}.get(name, hf.Qwen2VLVideoProcessor)
    return getattr(hf, f"{name}Processor")(
        hf.Qwen2VLImageProcessor(**pixels), words, video(**pixels), chat_template=QWEN_CHAT
    )


def qwen2_vl() -> Checkpoint:
    words = tokenizer(*QWEN_TOKENS)
    vision = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4, "mlp_ratio": 2, "patch_size": PATCH}
    config = hf.Qwen2VLConfig(
        vision_config=vision, text_config=qwen_text(words, model_type="qwen2_vl_text"), **qwen_ids(words)
    )
    return hf.Qwen2VLForConditionalGeneration(config), qwen_processor(words, "Qwen2VL", PATCH)


def qwen2_5_vl() -> Checkpoint:
    words = tokenizer(*QWEN_TOKENS)
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 4,
        "patch_size": PATCH,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
        "out_hidden_size": WIDTH,
    }
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision, text_config=qwen_text(words, model_type="qwen2_5_vl_text"), **qwen_ids(words)
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), qwen_processor(words, "Qwen2_5_VL", PATCH)


def qwen3_vl() -> Checkpoint:
    words = tokenizer(*QWEN_TOKENS)
    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 4,
        "patch_size": PATCH,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = hf.Qwen3VLConfig(
        vision_config=vision, text_config=qwen_text(words, model_type="qwen3_vl_text"), **qwen_ids(words)
    )
    return hf.Qwen3VLForConditionalGeneration(config), qwen_processor(words, "Qwen3VL", PATCH)


IDEFICS_TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
IDEFICS_MARKS = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
IDEFICS_PIXELS = {"size": {"longest_edge": 2 * IMAGE}, "max_image_size": {"longest_edge": IMAGE}}
IDEFICS_IMAGE_TOKENS = (IMAGE // PATCH // 2) ** 2


def idefics3() -> Checkpoint:
    words = tokenizer(*IDEFICS_MARKS, *IDEFICS_TILES, image_token="<image>")
    config = hf.Idefics3Config(
        vision_config=vit("idefics3_vision"), text_config=llama(words), image_token_id=IMAGE_ID, scale_factor=2
    )
    processor = hf.Idefics3Processor(
        hf.Idefics3ImageProcessor(**IDEFICS_PIXELS),
        words,
        image_seq_len=IDEFICS_IMAGE_TOKENS,
        chat_template=chat("<image>"),
    )
    return hf.Idefics3ForConditionalGeneration(config), processor


def smolvlm() -> Checkpoint:
    words = tokenizer(
        *IDEFICS_TILES,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
    )
    config = hf.SmolVLMConfig(
        vision_config=vit("smolvlm_vision"), text_config=llama(words), image_token_id=IMAGE_ID, scale_factor=2
    )
    processor = hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**IDEFICS_PIXELS),
        words,
        hf.SmolVLMVideoProcessor(**IDEFICS_PIXELS),
        image_seq_len=IDEFICS_IMAGE_TOKENS,
        chat_template=chat("<image>"),
    )
    return hf.SmolVLMForConditionalGeneration(config), processor


def gemma3() -> Checkpoint:
    words = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    text = llama(
        words,
        model_type="gemma3_text",
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
        query_pre_attn_scalar=WIDTH // 4,
    )
    config = hf.Gemma3Config(
        vision_config=vit("siglip_vision_model", vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=4,
        image_token_id=words.image_token_id,
        boi_token_id=words.boi_token_id,
        eoi_token_id=words.eoi_token_id,
        # Tied and untrained embeddings, which Gemma scales by the root of the width, would repeat one token forever.
        tie_word_embeddings=False,
    )
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessor(size={"height": IMAGE, "width": IMAGE}),
        words,
        image_seq_length=4,
        chat_template=chat("<start_of_image>"),
    )
    return hf.Gemma3ForConditionalGeneration(config), processor


def paligemma() -> Checkpoint:
    words = tokenizer(image_token="<image>")
    pixels = siglip_pixels()
    pixels.image_seq_length = (IMAGE // PATCH) ** 2
    processor = hf.PaliGemmaProcessor(pixels, words)
    config = hf.PaliGemmaConfig(
        vision_config=vit("siglip_vision_model", vision_use_head=False, projection_dim=WIDTH),
        text_config=llama(words, model_type="gemma"),
        image_token_id=IMAGE_ID,
        projection_dim=WIDTH,
        tie_word_embeddings=False,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


def internvl() -> Checkpoint:
    words = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    config = hf.InternVLConfig(
        vision_config=vit("internvl_vision", image_size=[IMAGE, IMAGE], patch_size=[PATCH, PATCH]),
        text_config=llama(words, model_type="qwen2"),
        image_token_id=words.context_image_token_id,
        image_seq_length=IDEFICS_IMAGE_TOKENS,
        tie_word_embeddings=False,
    )
    side = {"height": IMAGE, "width": IMAGE}
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=side, crop_to_patches=True, min_patches=1, max_patches=4),
        words,
        hf.InternVLVideoProcessor(size=side),
        image_seq_length=IDEFICS_IMAGE_TOKENS,
        chat_template=chat("<IMG_CONTEXT>\n"),
    )
    return hf.InternVLForConditionalGeneration(config), processor


PIXTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


def pixtral() -> Checkpoint:
    words = tokenizer(*PIXTRAL_TOKENS)
    config = hf.LlavaConfig(
        vision_config=vit("pixtral", image_size=2 * IMAGE, head_dim=WIDTH // 4),
        text_config=llama(words, model_type="mistral"),
        image_token_id=words.convert_tokens_to_ids("[IMG]"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    pixels = hf.PixtralImageProcessor(size={"longest_edge": 2 * IMAGE}, patch_size=PATCH)
    processor = hf.PixtralProcessor(pixels, words, patch_size=PATCH, chat_template=chat("[IMG]"))
    return hf.LlavaForConditionalGeneration(config), processor


def mistral3() -> Checkpoint:
    words = tokenizer(*PIXTRAL_TOKENS)
    config = hf.Mistral3Config(
        vision_config=vit("pixtral", image_size=2 * IMAGE, head_dim=WIDTH // 4),
        text_config=llama(words, model_type="mistral"),
        image_token_id=words.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    pixels = hf.PixtralImageProcessor(size={"longest_edge": 2 * IMAGE}, patch_size=2 * PATCH)
    processor = hf.PixtralProcessor(pixels, words, patch_size=PATCH, spatial_merge_size=2, chat_template=chat("[IMG]"))
    return hf.Mistral3ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], Checkpoint]] = {
    build.__name__: build
    for build in (
        llava_clip,
        llava_siglip,
        vipllava,
        llava_next,
        llava_onevision,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        idefics3,
        smolvlm,
        gemma3,
        paligemma,
        internvl,
        pixtral,
        mistral3,
    )
}


def checkpoint(name: str) -> Path:
    """Return the directory of a family's checkpoint; build it if it is not cached.

    Raises:
        ImportError: The family's processor needs a library that is not installed.
    """
    directory = CACHE / recipe_hash() / name
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=directory.parent) as temporary:
            _save(*FAMILIES[name](), Path(temporary) / name)
            # Another process may have built the same checkpoint in the meantime.
            with suppress(OSError):
                (Path(temporary) / name).rename(directory)
    return directory


@cache
def recipe_hash() -> str:
    """Hash everything that a checkpoint's content depends on."""
    sources = [Path(__file__).read_bytes(), train_tokenizer(HARBOUR, lowercase=False).to_str().encode()]
    versions = [metadata.version(package) for package in ("torch", "transformers", "tokenizers", "safetensors")]
    return hashlib.sha256(b"\0".join([*sources, *map(str.encode, versions)])).hexdigest()[:16]


def _save(model: Any, processor: Any, directory: Path) -> None:
    _initialize_weights(model)
    _favor_sentence_ends(model.get_output_embeddings().weight, processor.tokenizer)
    model.generation_config = hf.GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def _initialize_weights(model: torch.nn.Module, gain: float = 1.5) -> None:
    """Initialize every matrix so that the inputs influence the outputs.

    Matrices are normal with standard deviation gain / sqrt(inputs); with the library's 0.02, all
    tokens would be about equally likely. Vectors (norms, biases) get a little noise.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dict(sorted(model.named_parameters())).values():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * gain / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)


def _favor_sentence_ends(head: torch.Tensor, words: Any) -> None:
    """Increase the probability of periods and of words that begin with a space."""
    with torch.no_grad():
        head[words.convert_tokens_to_ids(".")] *= 4.0
        head[[index for token, index in words.get_vocab().items() if token.startswith("Ġ")]] *= 2.0


def main() -> None:
    without_compiled_torchvision()
    for name in FAMILIES:
        print(checkpoint(name))


if __name__ == "__main__":
    main()

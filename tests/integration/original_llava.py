"""Build tiny checkpoints in the original LLaVA layouts and compute their reference logits.

The parts are standard modules (CLIP's vision tower, a projector, Llama) whose parameter names are
those of the original, and :meth:`Parts.logits` runs them as LLaVA's code does. Nothing here uses
transformers' LLaVA, so it is an independent reference for the conversion.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = "a cat dog red blue boat tree is in the picture what this USER ASSISTANT : . ?".split()
VOCABULARY = ["<unk>", "<s>", "</s>", *WORDS]
SIDE, PATCH, WIDTH, VISION_WIDTH = 24, 8, 32, 16
PROMPT = [1, *range(3, 9)]
"""BOS and words, followed by the image features."""
ANSWER = list(range(9, 15))
INVERSE_FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"
POSITIONS = "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"


@dataclass
class Parts:
    """Hold the parts of a LLaVA model."""

    llm: Any
    vision: CLIPVisionModel
    projector: torch.nn.Module

    @torch.inference_mode()
    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the logits of PROMPT, image, ANSWER, of shape (1, tokens, vocabulary)."""
        states = self.vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        embed = self.llm.get_input_embeddings()
        before, after = embed(torch.tensor([PROMPT])), embed(torch.tensor([ANSWER]))
        inputs = torch.cat([before, self.projector(states), after], dim=1)
        return self.llm(inputs_embeds=inputs).logits

    def tensors(self, *, vision: bool) -> dict[str, torch.Tensor]:
        """Return all tensors by original name, with the obsolete ones that old versions wrote."""
        tensors = dict(self.llm.state_dict())
        tensors |= {f"model.mm_projector.{name}": tensor for name, tensor in self.projector.state_dict().items()}
        tensors[INVERSE_FREQUENCIES] = torch.ones(4)
        if vision:
            tensors |= self.vision_tensors("model.vision_tower.vision_tower.vision_model.")
            tensors[POSITIONS] = torch.arange(10)
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def vision_tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        return {f"{prefix}{name}": tensor for name, tensor in self.vision.state_dict().items()}


def make_parts(kind: str = "mlp2x_gelu", seed: int = 0) -> Parts:
    torch.manual_seed(seed)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            rms_norm_eps=1e-4,
        )
    )
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        )
    )
    first = torch.nn.Linear(VISION_WIDTH, WIDTH)
    projector = first
    if kind == "mlp2x_gelu":
        projector = torch.nn.Sequential(first, torch.nn.GELU(), torch.nn.Linear(WIDTH, WIDTH))
    parts = Parts(llm.eval(), vision.eval(), projector.eval())
    with torch.no_grad():
        for module in (parts.llm, parts.vision, parts.projector):
            for parameter in module.parameters():
                parameter.normal_(0.0, 0.2)
    return parts


def settings(kind: str = "mlp2x_gelu", vision: str = "", **changes: Any) -> dict[str, Any]:
    """Return the content of config.json, like LLaVA-1.5's."""
    return {
        "_name_or_path": "somewhere/vicuna",
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": len(VOCABULARY),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": VISION_WIDTH,
        "mm_projector_type": kind,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": vision,
        **changes,
    }


def write_vision(parts: Parts, directory: Path, *, weights: bool = True) -> Path:
    """Write a vision tower like a CLIP checkpoint, with a tensor of the text tower."""
    directory.mkdir(parents=True)
    parts.vision.config.save_pretrained(directory)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(directory)
    if weights:
        tensors = parts.vision_tensors("vision_model.") | {"text_model.final_layer_norm.weight": torch.ones(3)}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_config(directory: Path, config: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))


def write_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(directory)


def write_spaced_tokenizer(directory: Path, prepend: str) -> None:
    """Write a tokenizer of single characters that prepends a space to a text or, like Llama's, to each part of it."""
    characters = sorted({*"".join(VOCABULARY), "\n", *map(chr, range(33, 127)), "▁"})
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def write_weights(directory: Path, tensors: dict[str, torch.Tensor], form: str) -> None:
    """Write weights as ``safetensors``, ``bin``, or two shards of either with an index."""
    kind, _, sharded = form.partition("-")
    name = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    save = (
        (lambda part, path: save_file(part, path, metadata={"format": "pt"})) if kind == "safetensors" else torch.save
    )
    directory.mkdir(parents=True, exist_ok=True)
    if not sharded:
        save(tensors, directory / name)
        return
    order = sorted(tensors)
    stem, _, suffix = name.rpartition(".")
    weight_map = {}
    for index, part in enumerate((order[::2], order[1::2]), start=1):
        shard = f"{stem}-{index:05d}-of-00002.{suffix}"
        save({key: tensors[key] for key in part}, directory / shard)
        weight_map |= dict.fromkeys(part, shard)
    (directory / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

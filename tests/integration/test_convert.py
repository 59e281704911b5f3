"""Compare converted models with the computation that the original checkpoint describes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from csr_vlm.cli import main
from csr_vlm.config.schema import ModelConfig
from csr_vlm.convert import conversion
from csr_vlm.convert.conversion import convert
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.models.loading import load_policy
from tests.integration.original_llava import (
    ANSWER,
    PROMPT,
    SIDE,
    VOCABULARY,
    Parts,
    make_parts,
    settings,
    write_config,
    write_spaced_tokenizer,
    write_tokenizer,
    write_vision,
    write_weights,
)

WORDS = len(VOCABULARY)
PIXELS = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
PATCHES = 9


def logits_of(model: Any) -> torch.Tensor:
    """Return the converted model's logits for the same tokens and image, over the original vocabulary."""
    ids = torch.tensor([[*PROMPT, *[WORDS] * PATCHES, *ANSWER]])
    with torch.inference_mode():
        return model(input_ids=ids, pixel_values=PIXELS).logits[..., :WORDS]


def loaded(directory: Path) -> Any:
    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def write_full(
    directory: Path, parts: Parts, *, kind: str = "mlp2x_gelu", inside: bool = False, form: str = "bin", **changes: Any
) -> Path:
    """Write a checkpoint like LLaVA-1.5's, with its vision tower inside or in a folder beside it."""
    vision = write_vision(parts, directory / "clip", weights=not inside)
    source = directory / "original"
    write_config(source, settings(kind, str(vision), **changes))
    write_tokenizer(source)
    write_weights(source, parts.tensors(vision=inside), form)
    return source


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts()


@pytest.fixture(scope="module")
def converted(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a converted LLaVA-1.5."""
    directory = tmp_path_factory.mktemp("converted")
    convert(write_full(directory, parts), directory / "out")
    return directory / "out"


@pytest.mark.parametrize("form", ["bin", "bin-sharded", "safetensors", "safetensors-sharded"])
@pytest.mark.parametrize("inside", [False, True], ids=["separate tower", "tower inside"])
@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear"])
def test_the_converted_model_computes_the_same(tmp_path: Path, kind: str, inside: bool, form: str) -> None:
    parts = make_parts(kind)
    summary = convert(write_full(tmp_path, parts, kind=kind, inside=inside, form=form), tmp_path / "out")
    assert torch.equal(logits_of(loaded(tmp_path / "out")), parts.logits(PIXELS))
    assert summary["dropped"] == 1 + inside
    assert summary["checked"]


def test_other_weights_give_other_logits(converted: Path) -> None:
    difference = logits_of(loaded(converted)) - make_parts(seed=1).logits(PIXELS)
    assert difference.abs().max() > 0.1


def test_the_embeddings_are_extended_by_image_and_pad(converted: Path, parts: Parts) -> None:
    model, processor = loaded(converted), AutoProcessor.from_pretrained(converted)
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [WORDS, WORDS + 1]
    assert model.config.image_token_id == WORDS
    assert model.config.text_config.pad_token_id == model.generation_config.pad_token_id == WORDS + 1
    assert processor.tokenizer.padding_side == "left"
    for old, new in (
        (parts.llm.model.embed_tokens.weight, model.get_input_embeddings().weight),
        (parts.llm.lm_head.weight, model.lm_head.weight),
    ):
        assert new.shape == (64, old.shape[1])
        assert torch.equal(new[:WORDS], old)
        assert torch.allclose(new[WORDS:], old.mean(dim=0), atol=1e-6)


def test_the_chat_template_is_vicuna_v1(converted: Path) -> None:
    processor = AutoProcessor.from_pretrained(converted)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    again = {"role": "user", "content": "And that?"}
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    text = processor.apply_chat_template([question, answer, again], add_generation_prompt=True)
    assert text == f"{system} USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: And that? ASSISTANT:"
    brief = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    own = [brief, question]
    assert processor.apply_chat_template(own) == "Be brief. USER: <image>\nWhat is this? "


@pytest.mark.parametrize("prepend", ["first", "always"])
def test_prompts_are_tokenized_as_by_llava(tmp_path: Path, parts: Parts, prepend: str) -> None:
    """Llama's tokenizer prepends a space to a text, and LLaVA tokenizes the text after an image separately."""
    source = write_full(tmp_path, parts)
    write_spaced_tokenizer(source, prepend)
    vocabulary = len(AutoTokenizer.from_pretrained(source))
    write_config(source, settings(vision=str(tmp_path / "clip"), vocab_size=vocabulary))
    tensors = parts.tensors(vision=False)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.zeros(vocabulary, tensors[name].shape[1])
    write_weights(source, tensors, "bin")
    original = AutoTokenizer.from_pretrained(source)
    assert convert(source, tmp_path / "out")["prompts tokenized as by LLaVA"]
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    ids = processor(images=[Image.new("RGB", (24, 24))], text=[text])["input_ids"][0]
    before, after = text.replace("<image> ", "<image>").split("<image>")
    assert after.startswith("\nwhat")
    expected = [*original(before)["input_ids"], *[vocabulary] * PATCHES, *original(after)["input_ids"][1:]]
    assert ids == expected
    assert ("<image> " in text) == (prepend == "first")


@pytest.mark.parametrize("aspect", ["pad", "resize", None])
def test_images_are_made_square_as_by_the_original(tmp_path: Path, parts: Parts, aspect: str | None) -> None:
    convert(write_full(tmp_path, parts, image_aspect_ratio=aspect), tmp_path / "out")
    images = AutoProcessor.from_pretrained(tmp_path / "out").image_processor
    mean, std = torch.tensor(images.image_mean), torch.tensor(images.image_std)
    picture = Image.effect_noise((40, 20), 90).convert("RGB")
    if aspect == "pad":
        square = Image.new("RGB", (40, 40), tuple(int(level * 255) for level in images.image_mean))
        square.paste(picture, (0, 10))
        square = square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    elif aspect == "resize":
        square = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    else:
        square = picture.resize((2 * SIDE, SIDE), Image.Resampling.BICUBIC).crop((12, 0, 12 + SIDE, SIDE))
    levels = torch.tensor(list(square.tobytes())).reshape(SIDE, SIDE, 3) / 255
    expected = ((levels - mean) / std).permute(2, 0, 1)
    found = images(images=[picture], return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(found, expected, atol=0.03)


def test_a_converted_model_loads_as_a_policy(converted: Path, prompts: list[Prompt]) -> None:
    policy = load_policy(ModelConfig(path=str(converted), device="cpu"), adapter=None)
    (logprobs,) = policy.teacher_forced([prompts[0]], [ANSWER])
    assert torch.isfinite(logprobs).all()
    assert WORDS in policy.image_token_ids
    assert policy.eos_ids == {2}


def test_the_weights_are_sharded_and_cast(tmp_path: Path, parts: Parts) -> None:
    source = write_full(tmp_path, parts)
    summary = convert(source, tmp_path / "out", dtype="bfloat16", shard_bytes=20_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in tensors.values()) == summary["parameters"]
    assert loaded(tmp_path / "out").dtype == torch.bfloat16


def test_the_default_dtype_is_that_of_the_embeddings(tmp_path: Path, parts: Parts) -> None:
    """LLaVA's checkpoints are in half precision, but the CLIP that they name is in single precision."""
    source = write_full(tmp_path, parts)
    write_weights(source, {name: tensor.half() for name, tensor in parts.tensors(vision=False).items()}, "bin")
    assert convert(source, tmp_path / "out")["dtype"] == "float16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}


def test_a_projector_is_combined_with_its_language_model(tmp_path: Path, parts: Parts) -> None:
    whole = parts.tensors(vision=False)
    base, source = tmp_path / "vicuna", tmp_path / "original"
    parts.llm.save_pretrained(base)
    write_tokenizer(base)
    vision = write_vision(parts, tmp_path / "clip")
    write_config(source, settings())
    torch.save({name: whole[name] for name in whole if "mm_projector" in name}, source / "mm_projector.bin")
    with pytest.raises(CsrError, match="holds a projector only"):
        convert(source, tmp_path / "out", vision=str(vision))
    summary = convert(source, tmp_path / "out", base=str(base), vision=str(vision))
    assert summary["kind"] == "projector"
    assert torch.equal(logits_of(loaded(tmp_path / "out")), parts.logits(PIXELS))


def test_the_three_folders_of_vila_are_combined(tmp_path: Path) -> None:
    parts = make_parts("linear")
    source = tmp_path / "vila"
    parts.llm.save_pretrained(source / "llm")
    write_tokenizer(source / "llm")
    write_vision(parts, source / "vision_tower")
    projector = {f"layers.{name}": tensor for name, tensor in parts.projector.state_dict().items()}
    write_config(source / "mm_projector", {"model_type": "v2l_projector", "mm_projector_type": "linear"})
    write_weights(source / "mm_projector", projector, "safetensors")
    root = {"model_type": "llava_llama", "architectures": ["LlavaLlamaModel"], "hidden_size": 7}
    write_config(source, root | {"mm_vision_select_layer": -2, "image_aspect_ratio": "resize"})
    summary = convert(source, tmp_path / "out")
    assert summary["kind"] == "vila"
    assert torch.equal(logits_of(loaded(tmp_path / "out")), parts.logits(PIXELS))
    write_config(source / "mm_projector", {"mm_projector_type": "mlp_downsample"})
    with pytest.raises(CsrError, match="mm_projector_type mlp_downsample, which cannot be converted"):
        convert(source, tmp_path / "other")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Parts]:
    """Return a LoRA, its base, and the parts with the LoRA; the projector was trained as well."""
    directory = tmp_path_factory.mktemp("lora")
    parts = make_parts()
    base = write_full(directory, parts)
    torch.manual_seed(5)
    parts.llm = get_peft_model(
        parts.llm, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], bias="none")
    ).eval()
    with torch.no_grad():
        for name, parameter in [*parts.llm.named_parameters(), *parts.projector.named_parameters()]:
            if "lora_" in name or ("weight" in name and "model" not in name):
                parameter.normal_(0.0, 0.3)
    source = directory / "lora"
    parts.llm.save_pretrained(source)
    trained = {f"base_model.model.model.mm_projector.{n}": t for n, t in parts.projector.state_dict().items()}
    torch.save(trained, source / "non_lora_trainables.bin")
    write_config(source, settings())
    return source, base, parts


def test_peft_loads_a_converted_lora(tmp_path: Path, adapted: tuple[Path, Path, Parts]) -> None:
    source, base, parts = adapted
    expected = parts.logits(PIXELS)
    vision = str(base.parent / "clip")
    with pytest.raises(CsrError, match="holds a LoRA only"):
        convert(source, tmp_path / "out", vision=vision)
    assert convert(source, tmp_path / "out", base=str(base), vision=vision)["LoRA"] == "adapter"
    model = loaded(tmp_path / "out")
    alone = logits_of(model)
    with_adapter = PeftModel.from_pretrained(model, tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(logits_of(with_adapter), expected, rtol=0, atol=0)
    assert (alone - expected).abs().max() > 0.1
    adapted_modules = {name for name, _ in with_adapter.named_modules() if name.endswith("lora_A")}
    assert len(adapted_modules) == 6
    assert all("language_model" in name for name in adapted_modules)
    adapter_config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == str(tmp_path / "out")
    again = load_policy(ModelConfig(path=str(tmp_path / "out"), device="cpu"), tmp_path / "out" / "adapter")
    assert torch.allclose(logits_of(again.model), expected, atol=1e-5)


def test_a_lora_can_be_merged(tmp_path: Path, adapted: tuple[Path, Path, Parts]) -> None:
    source, base, parts = adapted
    expected = parts.logits(PIXELS)
    vision = str(base.parent / "clip")
    assert convert(source, tmp_path / "out", base=str(base), vision=vision, merge=True)["LoRA"] == "merged"
    assert not (tmp_path / "out" / "adapter").exists()
    assert torch.allclose(logits_of(loaded(tmp_path / "out")), expected, atol=1e-5)
    with pytest.raises(CsrError, match="has no LoRA to merge"):
        convert(base, tmp_path / "other", merge=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "mlp_downsample"}, "mm_projector_type mlp_downsample"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type mlp3x_gelu"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio anyres"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type spatial_unpad"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end True"),
        ({"model_type": "llava_qwen"}, "model_type llava_qwen"),
        ({"s2": True}, "s2 True"),
        ({"intermediate_size": 65}, r"has shape \(64, 32\), but config.json requires \(65, 32\)"),
        ({"num_hidden_layers": 3}, r"9 missing: language_model.model.layers.2"),
        ({"num_hidden_layers": 1}, r"9 left over: model.layers.1"),
        ({"mm_vision_tower": None}, "does not name its vision tower"),
        ({"mm_vision_tower": "/nowhere"}, "/nowhere"),
    ],
)
def test_unsupported_options_are_named_in_the_error(
    tmp_path: Path, parts: Parts, changes: dict[str, Any], message: str
) -> None:
    source = write_full(tmp_path, parts)
    config = json.loads((source / "config.json").read_text()) | changes
    write_config(source, config)
    with pytest.raises(CsrError, match=message):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_and_extra_tensors_are_listed(tmp_path: Path, parts: Parts) -> None:
    source = write_full(tmp_path, parts)
    tensors = parts.tensors(vision=False) | {"model.surprise.weight": torch.ones(1)}
    del tensors["model.mm_projector.2.bias"]
    write_weights(source, tensors, "bin")
    with pytest.raises(CsrError) as caught:
        convert(source, tmp_path / "out")
    assert "1 missing: multi_modal_projector.linear_2.bias" in caught.value.message
    assert "1 left over: model.surprise.weight" in caught.value.message


def test_a_missing_shard_is_named(tmp_path: Path, parts: Parts) -> None:
    source = write_full(tmp_path, parts, form="bin-sharded")
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CsrError, match=r"lacks pytorch_model-00002-of-00002\.bin"):
        convert(source, tmp_path / "out")


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_a_bin_file_cannot_run_code(tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_full(tmp_path, parts)
    torch.save(parts.tensors(vision=False) | {"model.norm.weight": _Malicious()}, source / "pytorch_model.bin")
    with pytest.raises(CsrError, match="cannot be read as plain tensors"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "executed").exists()


def test_an_old_bin_file_is_read(tmp_path: Path, parts: Parts) -> None:
    """Files written before PyTorch 1.6 are not archives and cannot be memory-mapped."""
    source = write_full(tmp_path, parts)
    torch.save(parts.tensors(vision=False), source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    convert(source, tmp_path / "out")
    assert torch.equal(logits_of(loaded(tmp_path / "out")), parts.logits(PIXELS))


def test_a_directory_that_is_not_empty_is_rejected(tmp_path: Path, parts: Parts) -> None:
    source = write_full(tmp_path, parts)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(CsrError, match="already exists"):
        convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()


def test_the_check_detects_a_changed_weight(tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    source, write = write_full(tmp_path, parts), conversion._write_weights

    def write_damaged(directory: Path, *arguments: Any) -> None:
        write(directory, *arguments)
        tensors = load_file(directory / "model.safetensors")
        tensors["language_model.model.norm.weight"][3] += 1e-6
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(conversion, "_write_weights", write_damaged)
    with pytest.raises(CsrError, match=r"the check failed: language_model\.model\.norm\.weight"):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "original"]


@pytest.mark.parametrize(
    ("changes", "rename", "message"),
    [
        ({"use_dora": True}, None, "use_dora"),
        ({"rank_pattern": {"q_proj": 8}}, None, "rank_pattern"),
        ({}, "model.vision_tower.vision_tower.vision_model.encoder.layers.", "vision_tower"),
        ({}, "layers.5.", "adapted but absent: model.layers.5."),
    ],
)
def test_a_lora_that_is_not_plain_is_rejected(
    tmp_path: Path, adapted: tuple[Path, Path, Parts], changes: dict[str, Any], rename: str | None, message: str
) -> None:
    source, base, _ = adapted
    shutil.copytree(source, tmp_path / "lora")
    config = json.loads((source / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config | changes))
    if rename is not None:
        tensors = load_file(source / "adapter_model.safetensors")
        moved = {name.replace("layers.1.", rename): tensor for name, tensor in tensors.items()}
        save_file(moved, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(CsrError, match=message):
        convert(tmp_path / "lora", tmp_path / "out", base=str(base), vision=str(base.parent / "clip"))


def test_the_command_line_prints_a_summary_or_an_error(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def csr(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["csr", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    source = write_full(tmp_path, parts, inside=True)
    code, shown, _ = csr("convert", source, "--out", tmp_path / "out", "--dtype", "bfloat16", "--json")
    summary = json.loads(shown)
    assert code == 0
    assert summary["dtype"] == "bfloat16"
    assert summary["rows added to the embeddings"] == 64 - WORDS
    code, shown, stderr = csr("convert", source, "--out", tmp_path / "out")
    assert (code, shown) == (1, "")
    assert "already exists" in stderr

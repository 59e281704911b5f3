"""Say why a checkpoint cannot be loaded, from its type and its path rather than from a library's message."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlavaConfig

from csr_vlm.core.errors import CsrError
from csr_vlm.models.load_errors import load_error, require_image_text_to_text


def test_a_model_without_images_is_rejected_by_its_type() -> None:
    with pytest.raises(CsrError, match="no image-text-to-text model of type 'llama'") as caught:
        require_image_text_to_text(LlamaConfig(), "org/llama")
    assert caught.value.message.startswith("the model org/llama cannot be loaded: ")
    require_image_text_to_text(LlavaConfig(), "org/llava")


def test_a_model_with_code_of_its_own_is_left_to_transformers() -> None:
    config = LlamaConfig(auto_map={"AutoModelForImageTextToText": "modeling.Model"})
    require_image_text_to_text(config, "org/own")
    config = LlamaConfig(auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with pytest.raises(CsrError):
        require_image_text_to_text(config, "org/own")


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere", "a/b/c"])
def test_a_path_that_is_not_a_hub_id_is_a_missing_directory(path: str) -> None:
    error = load_error("model", path, OSError("something about repositories"))
    assert error.message == f"the model {path} cannot be loaded: there is no such directory"


def test_otherwise_the_librarys_reason_is_given(tmp_path: Path) -> None:
    for path in ("org/model", str(tmp_path)):
        error = load_error("scorer", path, OSError("no config.json\nand more"))
        assert error.message == f"the scorer {path} cannot be loaded: no config.json"
        assert error.hint == "set scorer.path to a directory or a hub id"

"""Load base models, adapters and policies from a directory or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
)

from csr_vlm.config.schema import ModelConfig
from csr_vlm.core.errors import CsrError, reason_of
from csr_vlm.core.hub import require_on_disk_or_reachable
from csr_vlm.core.installing import install_command, is_installed
from csr_vlm.models.checkpoints import file_tensors
from csr_vlm.models.devices import resolve_device, resolve_dtype
from csr_vlm.models.encoding import MAX_IMAGE_PIXELS, PromptEncoder
from csr_vlm.models.families import FULL_PRECISION_MODULES, family_of
from csr_vlm.models.image_tokens import limit_image_tokens
from csr_vlm.models.load_errors import load_error, require_image_text_to_text
from csr_vlm.models.output_layer import use_float32_output
from csr_vlm.models.policy import Policy


def load_base(config: ModelConfig) -> tuple[Any, Any]:
    """Load a model and its processor; the model is on its device and in evaluation mode.

    Raises:
        CsrError: The checkpoint does not exist, lacks weights, is not an image-text-to-text model, or
            lacks the chat template that its family requires; or quantization is not possible here.
    """
    device = resolve_device(config.device)
    dtype = getattr(torch, resolve_dtype(config.dtype, device))
    placement = {} if config.quantization is None else {"device_map": {"": device}} | _nf4_options(device, dtype)
    with _loading(config) as common:
        require_image_text_to_text(AutoConfig.from_pretrained(config.path, **common), config.path)
        model, info = AutoModelForImageTextToText.from_pretrained(
            config.path, dtype=dtype, output_loading_info=True, **placement, **common
        )
        processor = AutoProcessor.from_pretrained(config.path, **common)
        limit_image_tokens(processor, model.config, config.max_image_tokens)
    missing = info["missing_keys"]
    if missing:
        # transformers initializes missing weights at random and only warns.
        raise CsrError(f"{config.path} lacks {len(missing)} weights, such as {min(missing)}", "download it again")
    _require_chat_template(config, model.config, processor)
    if config.quantization is None:
        model = model.to(device)
    use_float32_output(model)
    return model.eval(), processor


def load_prompt_encoder(config: ModelConfig, max_image_pixels: int = MAX_IMAGE_PIXELS) -> PromptEncoder:
    """Load a model's configuration and processor without its weights.

    Raises:
        CsrError: The checkpoint does not exist, or lacks the chat template that its family requires.
    """
    with _loading(config) as common:
        model_config = AutoConfig.from_pretrained(config.path, **common)
        processor = AutoProcessor.from_pretrained(config.path, **common)
        limit_image_tokens(processor, model_config, config.max_image_tokens)
        try:
            generation_config = GenerationConfig.from_pretrained(config.path, revision=config.revision)
        except OSError:  # The checkpoint has no generation_config.json.
            generation_config = GenerationConfig.from_model_config(model_config)
    _require_chat_template(config, model_config, processor)
    return PromptEncoder(model_config, generation_config, processor, max_image_pixels)


def load_adapter(
    model: Any, adapter: Path, *, trainable: bool = False, one_dtype: bool = False, name: str = "default"
) -> PeftModel:
    """Add a saved adapter to a base model.

    Args:
        model: Base model, or one that has adapters of other names already.
        adapter: Directory of the adapter.
        trainable: Whether the adapter is to be trained.
        one_dtype: Keep the adapter in the data type of the model, also in half precision.
        name: Name of the adapter in the model.

    Raises:
        CsrError: The adapter does not exist or does not fit the model. PEFT skips tensors whose names
            the model does not have and only warns, so such an adapter would have no effect.
    """
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise CsrError(
            f"there is no adapter in {adapter}", "it needs adapter_config.json and adapter_model.safetensors"
        )
    try:
        options = {"is_trainable": trainable, "autocast_adapter_dtype": not one_dtype}
        if isinstance(model, PeftModel):
            adapted = model
            adapted.load_adapter(str(adapter), name, **options)
        else:
            adapted = PeftModel.from_pretrained(model, str(adapter), adapter_name=name, **options)
    except Exception as error:  # A damaged or foreign adapter may raise anything.
        raise CsrError(
            f"the adapter {adapter} does not fit the model: {reason_of(error)}", "check model.path"
        ) from None
    saved_names = file_tensors(weights).keys()
    unmatched = saved_names ^ set(get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False))
    if unmatched:
        raise CsrError(
            f"the adapter {adapter} does not fit the model: {len(unmatched)} tensor names do not match, such as "
            f"{min(unmatched)}",
            "check model.path; another version of transformers may have used other layer names",
        )
    return adapted


def load_policy(config: ModelConfig, adapter: Path | None, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Policy:
    """Load the base model, with an adapter if one is given.

    In float32 the adapter is merged, which is exact up to rounding and decodes faster. In half
    precision or 4 bits merging would round the small update away, so the adapter stays separate.

    Raises:
        CsrError: The model or the adapter cannot be loaded; see :func:`load_base` and :func:`load_adapter`.
    """
    model, processor = load_base(config)
    if adapter is not None:
        model = load_adapter(model, adapter).eval()
        if config.quantization is None and model.get_base_model().dtype == torch.float32:
            model = model.merge_and_unload()
    return Policy(model, processor, max_image_pixels)


@contextmanager
def _loading(config: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yield the options with which every part of a checkpoint is loaded, and convert errors.

    Raises:
        CsrError: Loading failed.
    """
    require_on_disk_or_reachable("model.path", config.path, config.revision)
    try:
        yield {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    except CsrError:
        raise
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise CsrError(
            f"{config.path} needs a library that is not installed: {reason}", install_command("families")
        ) from None
    except Exception as error:  # A damaged or foreign checkpoint may raise anything.
        raise load_error("model", config.path, error) from None


def _require_chat_template(config: ModelConfig, model_config: Any, processor: Any) -> None:
    if getattr(processor, "chat_template", None) is None and family_of(model_config).chat:
        raise CsrError(f"the processor of {config.path} has no chat template", "save one with the processor")


def _nf4_options(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the options that load the language model's weights in 4-bit NormalFloat (QLoRA, arXiv 2305.14314).

    The vision tower, the projector and the output layer keep full precision: they are small, and
    an error in them affects every token.

    Raises:
        CsrError: There is no GPU, or bitsandbytes is not installed.
    """
    if not device.startswith("cuda"):
        raise CsrError("model.quantization=nf4 needs a CUDA device", "leave it out, or run on a GPU")
    if not is_installed("bitsandbytes"):
        raise CsrError("model.quantization=nf4 needs bitsandbytes", "pip install bitsandbytes")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(FULL_PRECISION_MODULES),
    )
    return {"quantization_config": quantization}

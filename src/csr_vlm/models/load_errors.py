"""Turn what goes wrong while a checkpoint is loaded into an error that a user can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError, reason_of


def load_error(kind: str, path: str, error: Exception) -> CsrError:
    """Return the error for a checkpoint that a library could not load.

    Args:
        kind: Section of the configuration that names the checkpoint: model or scorer.
        path: Directory or hub id.
        error: Exception that the library raised.
    """
    reason = "there is no such directory" if _is_missing_directory(path) else reason_of(error)
    return _cannot_be_loaded(kind, path, reason)


def require_image_text_to_text(config: Any, path: str) -> None:
    """Check that transformers, or the checkpoint's own code, has an image-text-to-text model for a configuration.

    Args:
        config: Configuration that ``AutoConfig`` loaded.
        path: Directory or hub id, for the message.

    Raises:
        CsrError: There is no such model class.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return
    if "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {}):
        return
    raise _cannot_be_loaded(
        "model", path, f"transformers has no image-text-to-text model of type {config.model_type!r}"
    )


def _cannot_be_loaded(kind: str, path: str, reason: str) -> CsrError:
    return CsrError(f"the {kind} {path} cannot be loaded: {reason}", f"set {kind}.path to a directory or a hub id")


def _is_missing_directory(path: str) -> bool:
    """Return whether a path can only be a directory, not a hub id, and does not exist."""
    # A hub id is OWNER/NAME, unless a local folder OWNER exists.
    is_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
    return is_local and not Path(path).is_dir()

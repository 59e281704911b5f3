"""Load the scorers that a configuration names.

To add a scorer, there are three ways, from outside to inside:

- Without a change here: write a class with the methods of
  :class:`csr_vlm.scoring.scorer.Scorer` and name it in the recipe,
  ``scorer: {path: "python:my_module:MyScorer", name: my-scorer, trust_import: true}``.
- A model with an image and a text embedding: implement
  :class:`csr_vlm.scoring.embedding.Encoder` and return it from :func:`_load_encoder` for a new
  prefix of ``scorer.path``; :class:`csr_vlm.scoring.embedding.EmbeddingScorer` caches
  embeddings, splits long sentences and computes the cosines.
- Anything else that scores a sentence against an image: implement ``Scorer`` and return it from
  :func:`_load` for a new prefix, as :mod:`csr_vlm.scoring.self_judge` does.

Import optional libraries inside the branch that needs them, name the prefix in the description of
``path`` in :class:`csr_vlm.config.schema.OneScorerConfig`, and test the scorer against a direct
computation as ``tests/integration/test_scorers.py`` does.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from csr_vlm.config.schema import ModelConfig, OneScorerConfig, ScorerConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.scoring.scorer import Scorer, ScorerGroup

if TYPE_CHECKING:
    from csr_vlm.scoring.embedding import Encoder


def load_scorer(
    config: ScorerConfig,
    device: str,
    max_image_pixels: int = 50_000_000,
    policy: ModelConfig | None = None,
    adapter: Path | None = None,
) -> ScorerGroup:
    """Load the scorer and the extra scorers of a configuration.

    Args:
        config: Configuration of the scorers.
        device: Name of the torch device.
        max_image_pixels: Larger images are rejected without decoding.
        policy: Policy whose vision tower ``vision: policy`` uses, and that ``judge:policy`` asks.
        adapter: Adapter of the last iteration, used by ``judge:policy``; None for the base model.

    Raises:
        CsrError: A scorer cannot be loaded, or ``scorer.use`` names one that does not exist.
    """
    members = (config, *config.extra)
    names = [member.name for member in members]
    unknown = sorted(set(config.used.split("+")) - set(names))
    if unknown:
        raise CsrError(
            f"scorer.use: {', '.join(unknown)} is not a valid scorer; expected one of: {', '.join(names)}",
            "add the scorer to scorer.extra, or correct scorer.use",
        )
    return ScorerGroup([_load(member, device, max_image_pixels, policy, adapter) for member in members])


def _load(
    config: OneScorerConfig, device: str, max_image_pixels: int, policy: ModelConfig | None, adapter: Path | None
) -> Scorer:
    """Load one scorer, by the prefix of its path."""
    if config.path.startswith("python:"):
        return _load_custom(config, device)
    if config.path == "judge:policy":
        from csr_vlm.scoring.self_judge import JudgeScorer

        assert policy is not None
        return JudgeScorer(config, policy, adapter, max_image_pixels)
    from csr_vlm.scoring.embedding import EmbeddingScorer

    return EmbeddingScorer(config, _load_encoder(config, device, policy), max_image_pixels)


def _load_encoder(config: OneScorerConfig, device: str, policy: ModelConfig | None) -> Encoder:
    """Load the encoder of an embedding scorer, by the prefix of its path."""
    if config.path.startswith("open_clip:"):
        from csr_vlm.scoring.openclip_encoder import OpenClipEncoder

        if config.vision == "policy":
            raise CsrError(
                "scorer.vision=policy is not supported for open_clip, whose tensors have other names",
                "set scorer.vision=own",
            )
        return OpenClipEncoder(config, device)
    from csr_vlm.scoring.transformers_encoder import TransformersEncoder

    return TransformersEncoder(config, device, policy)


def _load_custom(config: OneScorerConfig, device: str) -> Scorer:
    """Import and construct a user's scorer; ``trust_import`` has allowed it.

    Raises:
        CsrError: The class cannot be imported or constructed, or is not a Scorer of this name.
    """
    module_name, _, class_name = config.path.removeprefix("python:").partition(":")
    assert config.trust_import
    try:
        scorer = getattr(importlib.import_module(module_name), class_name)(config, device)
    except (ImportError, AttributeError, ValueError) as error:
        raise CsrError(
            f"the scorer {config.path} cannot be created: {error}",
            "write python:MODULE:CLASS, with the module's folder in PYTHONPATH",
        ) from None
    missing = [attribute for attribute in ("name", "score", "forget") if not hasattr(scorer, attribute)]
    if missing or scorer.name != config.name:
        problem = f"lacks {', '.join(missing)}" if missing else f"has the name {scorer.name!r}, not {config.name!r}"
        raise CsrError(f"the scorer {config.path} {problem}", "see csr_vlm.scoring.scorer.Scorer")
    checked: Scorer = scorer
    return checked

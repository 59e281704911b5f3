"""From configuration to scorers."""

from __future__ import annotations

import importlib
from pathlib import Path

from csr_vlm.config.schema import ModelConfig, OneScorerConfig, ScorerConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.scoring.scorer import Scorer, ScorerGroup


def load_scorer(
    config: ScorerConfig,
    device: str,
    max_image_pixels: int = 50_000_000,
    policy: ModelConfig | None = None,
    adapter: Path | None = None,
) -> ScorerGroup:
    """Load the scorer and the extra ones.

    Args:
        config: The scorers.
        device: Torch device.
        max_image_pixels: Larger images are refused undecoded.
        policy: Where ``vision: policy`` takes the vision tower from; with ``adapter``, who
            ``judge:policy`` asks.
        adapter: The last iteration's adapter.

    Raises:
        CsrError: One cannot be loaded, or the reward is to use one that is not among them.
    """
    members = (config, *config.extra)
    names = [member.name for member in members]
    unknown = sorted(set(config.used.split("+")) - set(names))
    if unknown:
        raise CsrError(f"scorer.use names {', '.join(unknown)}, which no scorer is", f"there is {', '.join(names)}")
    return ScorerGroup([_load(member, device, max_image_pixels, policy, adapter) for member in members])


def _load(
    config: OneScorerConfig, device: str, max_image_pixels: int, policy: ModelConfig | None, adapter: Path | None
) -> Scorer:
    from csr_vlm.scoring.embedding import EmbeddingScorer, Encoder

    scheme, separator, _ = config.path.partition(":")
    if separator and scheme == "python":
        return _own(config, device)
    if config.path == "judge:policy":
        from csr_vlm.scoring.self_judge import JudgeScorer

        assert policy is not None
        return JudgeScorer(config, policy, adapter, max_image_pixels)
    encoder: Encoder
    if separator and scheme == "open_clip":
        from csr_vlm.scoring.openclip_encoder import OpenClipEncoder

        if config.vision == "policy":
            raise CsrError("open_clip names its tensors differently from any policy", "set scorer.vision=own")
        encoder = OpenClipEncoder(config, device)
    else:
        from csr_vlm.scoring.transformers_encoder import TransformersEncoder

        encoder = TransformersEncoder(config, device, policy)
    return EmbeddingScorer(config, encoder, max_image_pixels)


def _own(config: OneScorerConfig, device: str) -> Scorer:
    """Import and construct a user's scorer; the configuration has asked for it by ``trust_import``."""
    _, _, target = config.path.partition(":")
    module_name, _, class_name = target.partition(":")
    assert config.trust_import
    try:
        made = getattr(importlib.import_module(module_name), class_name)(config, device)
    except (ImportError, AttributeError, ValueError) as error:
        raise CsrError(
            f"the scorer {config.path} cannot be made: {error}",
            "write python:MODULE:CLASS, with the module's folder in PYTHONPATH",
        ) from None
    absent = [part for part in ("name", "score", "forget") if not hasattr(made, part)]
    if absent or made.name != config.name:
        wrong = f"lacks {', '.join(absent)}" if absent else f"calls itself {made.name!r}, not {config.name!r}"
        raise CsrError(f"the scorer {config.path} {wrong}", "see csr_vlm.scoring.scorer.Scorer")
    scorer: Scorer = made
    return scorer

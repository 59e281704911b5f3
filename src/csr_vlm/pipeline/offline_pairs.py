"""Use external pairs in place of the first iteration's search (``data.pairs``)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from csr_vlm.config.schema import DataConfig, RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Reporter
from csr_vlm.core.records import Pair
from csr_vlm.data.external_pairs import count_pairs, read_text_pairs
from csr_vlm.data.prompts import InputReport
from csr_vlm.store.run import Run


def has_offline_pairs(config: RunConfig, iteration: int) -> bool:
    """Return whether an iteration trains on external pairs: the first one, if ``data.pairs`` is set."""
    return config.data.pairs is not None and iteration == 1


def check_pairs(config: DataConfig, reporter: Reporter, images: Path | None = None) -> InputReport:
    """Read all external pairs and decode every image, before any model is loaded.

    Args:
        config: Names the file of pairs.
        reporter: Receives progress.
        images: Folder for images that come as bytes; None checks them without keeping them.

    Raises:
        CsrError: No pair can be used.
    """
    report = InputReport()
    with reporter.stage("checking pairs", count_pairs(config)) as progress:
        for _ in read_text_pairs(config, report, images=images, tick=lambda: progress.advance(1)):
            pass
    if not report.accepted:
        raise CsrError(f"no usable pair in {config.pairs}", "; ".join(report.examples[:3]) or "the file is empty")
    if report.dropped:
        reporter.log(f"dropped {report.dropped.total()} pairs: {report.reasons}; see manifest.json for examples")
    return report


def encode_pairs(run: Run, reporter: Reporter) -> tuple[list[Pair], Counter[str]]:
    """Tokenize the external pairs and compute their log-probabilities under the base model.

    Returns:
        The pairs, and the number of refused pairs by reason.

    Raises:
        CsrError: The inputs have not been checked.
    """
    from csr_vlm.method.sentences import SentenceRule
    from csr_vlm.models.loading import load_policy
    from csr_vlm.training.pair_encoding import encode_pairs

    config = run.config
    if not run.is_done(0, "prompts"):
        raise CsrError(f"the inputs of {run.root} have not been checked", f"csr run {run.root}")
    policy = load_policy(config.model, run.adapter_path(0), config.data.max_image_pixels)
    rule = SentenceRule(config.method.search.delimiters)
    pairs: list[Pair] = []
    reasons: Counter[str] = Counter()
    with reporter.stage("iteration 1: encoding pairs", run.result(0, "prompts")["pairs"]["accepted"]) as progress:
        texts = read_text_pairs(config.data, InputReport(), images=run.images_path)
        for pair_or_reason in encode_pairs(texts, policy, 1, rule):
            if isinstance(pair_or_reason, str):
                reasons[pair_or_reason] += 1
            else:
                pairs.append(pair_or_reason)
            progress.advance(1)
    return pairs, reasons

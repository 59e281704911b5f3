"""Pairs from outside in place of the first iteration's search (``data.pairs``)."""

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


def supplies(config: RunConfig, iteration: int) -> bool:
    """Tell whether an iteration's pairs come from outside: the first one's, if any are given."""
    return config.data.pairs is not None and iteration == 1


def check_pairs(config: DataConfig, reporter: Reporter, images: Path | None = None) -> InputReport:
    """Read all pairs from outside and decode every image, before any model is loaded.

    Args:
        images: Where images that come as bytes are kept; None checks them only.

    Raises:
        CsrError: None of them can be used.
    """
    report = InputReport()
    with reporter.stage("checking pairs", count_pairs(config)) as progress:
        for _ in read_text_pairs(config, report, images=images, tick=lambda: progress.advance(1)):
            pass
    if not report.accepted:
        raise CsrError(f"no usable pair in {config.pairs}", "; ".join(report.examples[:3]) or "it is empty")
    if report.dropped:
        reporter.log(f"dropped {report.dropped.total()} pairs: {report.reasons}; the manifest names them")
    return report


def take_pairs(run: Run, reporter: Reporter) -> tuple[list[Pair], Counter[str]]:
    """Tokenise the pairs from outside and compute their log-probabilities under the base model.

    Returns:
        The pairs, and why others are none.

    Raises:
        CsrError: The inputs were not checked yet.
    """
    from csr_vlm.method.sentences import SentenceRule
    from csr_vlm.models.loading import load_policy
    from csr_vlm.training.pair_encoding import scored_pairs

    config = run.config
    if not run.is_done(0, "prompts"):
        raise CsrError(f"the inputs of {run.root} are not checked", f"csr run {run.root}")
    policy = load_policy(config.model, run.adapter_path(0), config.data.max_image_pixels)
    rule = SentenceRule(config.method.search.delimiters)
    pairs: list[Pair] = []
    reasons: Counter[str] = Counter()
    with reporter.stage("iteration 1: pairs from outside", run.result(0, "prompts")["pairs"]["accepted"]) as progress:
        texts = read_text_pairs(config.data, InputReport(), images=run.images_path)
        for found in scored_pairs(texts, policy, 1, rule):
            if isinstance(found, str):
                reasons[found] += 1
            else:
                pairs.append(found)
            progress.advance(1)
    return pairs, reasons

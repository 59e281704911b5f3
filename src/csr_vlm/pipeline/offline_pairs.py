"""Use external pairs in place of the first iteration's search (``data.pairs``)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

from csr_vlm.config.schema import DataConfig, RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Reporter
from csr_vlm.core.records import Pair
from csr_vlm.data.checking import ModelCheck
from csr_vlm.data.external_pairs import TextPair, count_pairs, read_text_pairs
from csr_vlm.data.images import with_hash
from csr_vlm.data.prompts import InputReport
from csr_vlm.store.run import Run


def has_offline_pairs(config: RunConfig, iteration: int) -> bool:
    """Return whether an iteration trains on external pairs: the first one, if ``data.pairs`` is set."""
    return config.data.pairs is not None and iteration == 1


class PairsDigest:
    """Hash the texts and images of external pairs, so that a change between two readings is noticed."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, pair: TextPair) -> TextPair:
        """Add a pair and return it with the hash of its image."""
        prompt = with_hash(pair.prompt)
        fields: list[object] = [prompt.prompt_id, prompt.text, prompt.image_sha256, pair.chosen, pair.rejected]
        if pair.chosen_ends != pair.rejected_ends:
            fields.append(pair.chosen_ends)
        self._hash.update(json.dumps(fields).encode())
        return replace(pair, prompt=prompt)

    @property
    def value(self) -> str:
        """Return the SHA-256 of all pairs so far."""
        return self._hash.hexdigest()


def check_pairs(
    config: DataConfig,
    reporter: Reporter,
    images: Path | None = None,
    content: PairsDigest | None = None,
    model: ModelCheck | None = None,
) -> InputReport:
    """Read all external pairs and decode every image, before any model is loaded.

    Args:
        config: Names the file of pairs.
        reporter: Receives progress.
        images: Folder for images that come as bytes; None checks them without keeping them.
        content: Receives every well-formed pair.
        model: Puts every pair through the model's processor.

    Raises:
        CsrError: No pair can be used.
    """
    report = InputReport()
    with reporter.stage("checking pairs", count_pairs(config)) as progress:
        seen = (lambda pair: pair) if content is None else content.add
        tick = partial(progress.advance, 1)
        for _ in read_text_pairs(config, report, images=images, tick=tick, model=model, seen=seen):
            pass
    if not report.accepted:
        raise CsrError(f"no usable pair in {config.pairs}", "; ".join(report.examples[:3]) or "the file is empty")
    for message in report.messages("pairs"):
        reporter.log(message)
    return report


def encode_pairs(run: Run, reporter: Reporter) -> tuple[list[Pair], Counter[str]]:
    """Tokenize the external pairs and compute their log-probabilities under the base model.

    Returns:
        The pairs, and the number of refused pairs by reason.

    Raises:
        CsrError: The inputs have not been checked, or were changed since.
    """
    from csr_vlm.method.sentences import SentenceRule
    from csr_vlm.models.loading import load_policy
    from csr_vlm.models.prompt_check import ProcessorCheck
    from csr_vlm.training.pair_encoding import encode_pairs

    config = run.config
    if not run.is_done(0, "prompts"):
        raise CsrError(f"the inputs of {run.root} have not been checked", f"csr run {run.root}")
    policy = load_policy(config.model, run.adapter_path(0), config.data.max_image_pixels)
    rule = SentenceRule(config.method.search.delimiters)
    pairs: list[Pair] = []
    reasons: Counter[str] = Counter()
    checked, content = run.result(0, "prompts")["pairs"], PairsDigest()
    with reporter.stage("iteration 1: encoding pairs", checked["accepted"]) as progress:
        check = ProcessorCheck(policy.prompt_encoder)
        texts = read_text_pairs(config.data, InputReport(), images=run.images_path, model=check, seen=content.add)
        for pair_or_reason in encode_pairs(texts, policy, 1, rule):
            if isinstance(pair_or_reason, str):
                reasons[pair_or_reason] += 1
            else:
                pairs.append(pair_or_reason)
            progress.advance(1)
    if checked.get("digest", content.value) != content.value:
        raise CsrError(
            f"{config.data.pairs} or an image of its pairs was changed after the inputs were checked",
            f"restore it; or delete {run.iteration(0) / 'done'} and all iterations, and run again",
        )
    return pairs, reasons

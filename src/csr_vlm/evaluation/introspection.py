"""Analyze what changed inside the model: ``csr analyze RUN`` writes ``RUN/analysis.json``.

The analysis answers four questions. Does the policy attend to the picture more than before? Are
its responses more relevant to the picture? Could it separate the chosen from the rejected
response of a pair, before and after it was trained on them? How did the rewards of the pairs
develop over the iterations?
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from csr_vlm.core.batching import evenly_spaced
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Reporter
from csr_vlm.core.records import Pair
from csr_vlm.data.external_pairs import read_text_pairs
from csr_vlm.data.prompts import InputReport
from csr_vlm.evaluation.compare import read_documents
from csr_vlm.evaluation.reproduction import collect_results
from csr_vlm.store import files
from csr_vlm.store.run import Run

NUM_BINS = 24


def analyze(
    run: Run, reporter: Reporter, *, num_responses: int = 64, num_pairs: int = 256, external: Path | None = None
) -> dict[str, Any]:
    """Analyze the base model and the run's final policy, and write ``RUN/analysis.json``.

    Args:
        num_responses: Number of responses whose attention is measured.
        num_pairs: Number of pairs per iteration, and of ``external``, that are scored under the policies.
        external: File of preference pairs from another source, in any format that ``data.pairs`` accepts.

    Raises:
        CsrError: The run has no finished iteration, or the external pairs cannot be used.
    """
    if run.final == 0 or not run.is_done(1, "pairs"):
        raise CsrError(f"{run.root} has no finished iteration to analyze", f"run csr run {run.root}")
    attention, separable = _with_models(run, reporter, num_responses, num_pairs, external)
    analysis = {
        "iteration": run.final,
        "attention": attention,
        "separability": separable,
        "relevance": relevance(run),
        "rewards": {str(number): dict(values) for number, values in collect_results(run).rewards.items()},
    }
    files.write_json(run.root / "analysis.json", analysis)
    return analysis


def _with_models(
    run: Run, reporter: Reporter, num_responses: int, num_pairs: int, external: Path | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Load each policy once and compute attention and log-probabilities under it.

    Returns:
        The values of ``attention`` and ``separability`` in ``analysis.json``.
    """
    from csr_vlm.evaluation.attention import (
        ResponseAttention,
        compare_attention,
        protocol,
        response_attention,
        use_eager_attention,
    )
    from csr_vlm.evaluation.separability import PairLogprobs, TokenPair, pair_logprobs
    from csr_vlm.models.loading import load_policy

    measured_pairs = evenly_spaced(_one_pair_per_prompt(run, 1), num_responses)
    run_pairs = {
        t: [_token_pair(pair) for pair in evenly_spaced(list(run.pairs(t)), num_pairs)] for t in range(1, run.final + 1)
    }
    external_pairs: list[TokenPair] = []
    attentions: dict[int, list[ResponseAttention]] = {}
    logprobs: dict[tuple[str, int], PairLogprobs] = {}
    with reporter.stage("analyzing the policies", run.final + 1) as progress:
        for t in range(run.final + 1):
            policy = load_policy(run.config.model, run.adapter_path(t), run.config.data.max_image_pixels)
            for number in run_pairs.keys() & {t, t + 1}:
                logprobs[f"iteration {number}", t] = pair_logprobs(policy, run_pairs[number])
            if t in (0, run.final):
                if external is not None:
                    external_pairs = external_pairs or _read_external_pairs(external, policy, run, num_pairs)
                    logprobs["external", t] = pair_logprobs(policy, external_pairs)
                use_eager_attention(policy)
                attentions[t] = [
                    response_attention(policy, pair.prompt, pair.chosen.token_ids) for pair in measured_pairs
                ]
            progress.advance(1)
    layers = compare_attention(attentions[0], attentions[run.final])
    attention = {
        "layers": [{view: difference.dump() for view, difference in layer.items()} for layer in layers],
        "protocol": protocol(len(measured_pairs)),
    }
    spans = [(f"iteration {t}", t - 1, t) for t in run_pairs]
    spans += [("external", 0, run.final)] if external_pairs else []
    return attention, [_separability(name, start, end, logprobs) for name, start, end in spans]


def _separability(name: str, start: int, end: int, logprobs: Mapping[tuple[str, int], Any]) -> dict[str, Any]:
    """Describe how well the policies of iterations ``start`` and ``end`` separate chosen from rejected."""
    from csr_vlm.evaluation.separability import implicit_reward, separability

    before, after = logprobs[name, start], logprobs[name, end]
    reward = implicit_reward(after, before)
    return {
        "pairs": name,
        "from": start,
        "to": end,
        "before": separability(before.chosen, before.rejected),
        "after": separability(after.chosen, after.rejected),
        "implicit_reward": separability(reward.chosen, reward.rejected),
    }


def relevance(run: Run) -> dict[str, Any] | None:
    """Compute histograms of image relevance R_I (eq. 3) of the responses of base model and final policy.

    Returns:
        ``evaluation``, the first with a relevance per row; ``edges`` of ``NUM_BINS`` equal bins over
        all values; ``before`` and ``after``, the share of responses in each bin. None without such
        an evaluation.
    """
    import numpy as np

    for name, old in read_documents(run, 0).items():
        new = read_documents(run, run.final).get(name)
        before, after = (
            [row["relevance"] for row in document.get("rows", []) if row.get("relevance") is not None]
            for document in (old, new or {})
        )
        if before and after:
            edges = np.histogram_bin_edges(before + after, NUM_BINS)
            shares = [(np.histogram(values, edges)[0] / len(values)).tolist() for values in (before, after)]
            return {"evaluation": name, "edges": edges.tolist(), "before": shares[0], "after": shares[1]}
    return None


def _one_pair_per_prompt(run: Run, iteration: int) -> list[Pair]:
    return list({pair.prompt.prompt_id: pair for pair in run.pairs(iteration)}.values())


def _token_pair(pair: Pair) -> Any:
    from csr_vlm.evaluation.separability import TokenPair

    return TokenPair(pair.prompt, pair.chosen.token_ids, pair.rejected.token_ids)


def _read_external_pairs(path: Path, policy: Any, run: Run, number: int) -> list[Any]:
    """Read up to ``number`` pairs from another source and tokenize them for the policy."""
    from csr_vlm.evaluation.separability import TokenPair
    from csr_vlm.models.prompt_check import ProcessorCheck
    from csr_vlm.training.pair_encoding import tokenize_pairs

    report = InputReport()
    config = run.config.data.model_copy(update={"pairs": str(path), "pairs_format": "auto", "image_root": None})
    check = ProcessorCheck(policy.prompt_encoder)
    texts = islice(read_text_pairs(config, report, images=run.images_path, model=check), number)
    # tokenize_pairs yields a reason, a string, in place of the ids of a pair that it cannot encode.
    pairs = [TokenPair(pair.prompt, *ids) for pair, ids in tokenize_pairs(texts, policy) if not isinstance(ids, str)]
    if not pairs:
        raise CsrError(
            f"{path} contains no usable pair", "; ".join(report.examples[:3]) or "see docs/data.md for the formats"
        )
    return pairs

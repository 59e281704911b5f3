"""What changed inside the model: ``csr analyze RUN`` writes ``RUN/analysis.json``.

Four questions: does the policy look at the picture more than before; are its responses more
relevant to the picture; could it tell the chosen from the rejected response of a pair, before and
after it learned from them; and how did the rewards of the pairs go.
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
from csr_vlm.evaluation.reproduction import numbers_of
from csr_vlm.store import files, tables
from csr_vlm.store.run import Run

NUM_BINS = 24


def analyze(
    run: Run, reporter: Reporter, *, num_responses: int = 64, num_pairs: int = 256, external: Path | None = None
) -> dict[str, Any]:
    """Analyse the base model and the run's result, and write ``RUN/analysis.json``.

    Args:
        num_responses: Responses whose attention is read.
        num_pairs: Pairs of each iteration, and of ``external``, that policies are asked about.
        external: Pairs from elsewhere, in any format that ``data.pairs`` takes.

    Raises:
        CsrError: The run has no finished iteration, or the external pairs cannot be used.
    """
    if run.final == 0 or not run.is_done(1, "pairs"):
        raise CsrError(f"{run.root} has no finished iteration to analyse", f"csr run {run.root}")
    attention, separable = _with_models(run, reporter, num_responses, num_pairs, external)
    found = {
        "iteration": run.final,
        "attention": attention,
        "separability": separable,
        "relevance": relevance(run),
        "rewards": {str(number): dict(values) for number, values in numbers_of(run).rewards.items()},
    }
    files.write_json(run.root / "analysis.json", found)
    return found


def _with_models(
    run: Run, reporter: Reporter, num_responses: int, num_pairs: int, external: Path | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Load one policy after the other and ask each everything that it is needed for."""
    from csr_vlm.evaluation.attention import (
        Rows,
        attention_rows,
        compare_attention,
        protocol,
        use_readable_attention,
    )
    from csr_vlm.evaluation.separability import LogProbs, TokenPair, logprobs
    from csr_vlm.models.policy import load_policy

    fixed = evenly_spaced(_one_a_prompt(run, 1), num_responses)
    own = {
        t: [_token_pair(pair) for pair in evenly_spaced(list(tables.read_pairs(run.pairs_path(t))), num_pairs)]
        for t in range(1, run.final + 1)
    }
    foreign: list[TokenPair] = []
    rows: dict[int, list[Rows]] = {}
    under: dict[tuple[str, int], LogProbs] = {}
    with reporter.stage("reading the policies", run.final + 1) as progress:
        for t in range(run.final + 1):
            policy = load_policy(run.config.model, run.adapter_path(t), run.config.data.max_image_pixels)
            for number in own.keys() & {t, t + 1}:
                under[f"iteration {number}", t] = logprobs(policy, own[number])
            if t in (0, run.final):
                if external is not None:
                    foreign = foreign or _external_pairs(external, policy, run, num_pairs)
                    under["external", t] = logprobs(policy, foreign)
                use_readable_attention(policy)
                rows[t] = [attention_rows(policy, pair.prompt, pair.chosen.token_ids) for pair in fixed]
            progress.advance(1)
    layers = compare_attention(rows[0], rows[run.final])
    attention = {
        "layers": [{view: found.dump() for view, found in layer.items()} for layer in layers],
        "protocol": protocol(len(fixed)),
    }
    spans = [(f"iteration {t}", t - 1, t) for t in own] + ([("external", 0, run.final)] if foreign else [])
    return attention, [_span(name, start, end, under) for name, start, end in spans]


def _span(name: str, start: int, end: int, under: Mapping[tuple[str, int], Any]) -> dict[str, Any]:
    """How some pairs were told apart by the policy before and by the one after training."""
    from csr_vlm.evaluation.separability import implicit_reward, separability

    before, after = under[name, start], under[name, end]
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
    """Count responses by image relevance R_I before and after, in equal bins over what occurs."""
    import numpy as np

    for name, old in read_documents(run, 0).items():
        new = read_documents(run, run.final).get(name)
        sides = [
            [row["relevance"] for row in document.get("rows", []) if row.get("relevance") is not None]
            for document in (old, new or {})
        ]
        if all(sides):
            edges = np.histogram_bin_edges(sides[0] + sides[1], NUM_BINS)
            shares = [(np.histogram(side, edges)[0] / len(side)).tolist() for side in sides]
            return {"evaluation": name, "edges": edges.tolist(), "before": shares[0], "after": shares[1]}
    return None


def _one_a_prompt(run: Run, iteration: int) -> list[Pair]:
    return list({pair.prompt.prompt_id: pair for pair in tables.read_pairs(run.pairs_path(iteration))}.values())


def _token_pair(pair: Pair) -> Any:
    from csr_vlm.evaluation.separability import TokenPair

    return TokenPair(pair.prompt, pair.chosen.token_ids, pair.rejected.token_ids)


def _external_pairs(path: Path, policy: Any, run: Run, number: int) -> list[Any]:
    """Read pairs that some other source made, and encode them as the policy writes its own."""
    from csr_vlm.evaluation.separability import TokenPair
    from csr_vlm.training.pair_encoding import token_pairs

    report = InputReport()
    config = run.config.data.model_copy(update={"pairs": str(path), "pairs_format": "auto", "image_root": None})
    texts = islice(read_text_pairs(config, report, images=run.images_path), number)
    found = [TokenPair(pair.prompt, *both) for pair, both in token_pairs(texts, policy) if not isinstance(both, str)]
    if not found:
        raise CsrError(f"{path} holds no usable pair", "; ".join(report.examples[:3]) or "see docs/data.md for formats")
    return found

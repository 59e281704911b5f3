"""What a few pictures tell about model and scorer before a run is begun."""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from csr_vlm.config.load import merged, resolve
from csr_vlm.config.schema import ModelConfig, RunConfig
from csr_vlm.core.progress import Reporter
from csr_vlm.core.records import Prompt
from csr_vlm.data.prompts import InputReport, read_prompts
from csr_vlm.method.audit import SCORER_BOUND, Verdict, pair_metrics, tree_metrics

_PROMPTS = 16
_SHORT = {"method": {"search": {"max_sentences": 2}}}
"""Enough sentences to judge a scorer by."""


def run_preflight(config: RunConfig, reporter: Reporter) -> dict[str, Any]:
    """Let a model whose weights are on disk write a few sentences; see whether it and the scorer do as they should.

    Returns:
        ``estimate``: the difference between generated and teacher-forced log-probabilities in
        nats a token, and the scorer's agreement, the share of sentences that it finds to suit
        their own picture better than the average other one. ``warnings``: what follows from
        that. Both empty where there are no weights or no prompt yet.

    Raises:
        CsrError: Model or scorer cannot be loaded, or the model does not do as it should.
    """
    found: dict[str, Any] = {"estimate": {}, "warnings": []}
    if not _weights_at_hand(config.model):
        return found
    with tempfile.TemporaryDirectory() as images:
        rows = read_prompts(config.data, InputReport(), seed=config.seed, images=Path(images))
        prompts = list(islice(rows, _PROMPTS))
        if not prompts:
            return found
        with reporter.stage("trying the model", 1) as progress:
            policy = _checked(config, prompts[0], found["estimate"])
            progress.advance(1)
        with reporter.stage("trying the scorer", 1) as progress:
            agreement = _agreement(config, policy, prompts)
            progress.advance(1)
    if agreement is not None:
        found["estimate"][f"scorer's agreement, {len(prompts)} pictures"] = round(agreement, 3)
        if SCORER_BOUND.judge(agreement) is not Verdict.GO:
            found["warnings"].append(SCORER_BOUND.reason.format(value=agreement))
    return found


def _weights_at_hand(model: ModelConfig) -> bool:
    """Tell whether the weights lie in a directory or in the hub's cache, so that nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    directory = Path(model.path)
    if not directory.is_dir():
        cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
        if not isinstance(cached, str):
            return False
        directory = Path(cached).parent
    return any(directory.glob("*.safetensors"))


def _checked(config: RunConfig, prompt: Prompt, estimate: dict[str, Any]) -> Any:
    from csr_vlm.generation.self_check import self_check
    from csr_vlm.models.loading import load_policy

    adapter = None if config.model.adapter is None else Path(config.model.adapter)
    policy = load_policy(config.model, adapter, config.data.max_image_pixels)
    estimate["generated against scored, nats a token"] = float(f"{self_check(policy, prompt):.1e}")
    return policy


def _agreement(config: RunConfig, policy: Any, prompts: list[Prompt]) -> float | None:
    """Search shallowly; None where sentences are not compared with other pictures, or there are none."""
    if not config.scorer.others or len({prompt.image for prompt in prompts}) < 2:
        return None
    from csr_vlm.generation.transformers_engine import TransformersEngine
    from csr_vlm.pipeline.tasks import load_scorer_of, search_trees

    short = resolve(merged(config.dump(), _SHORT))
    scorer = load_scorer_of(short, None)
    engine = TransformersEngine(policy, short.generation.max_rows, short.generation.attention)
    trees = search_trees(prompts, prompts, engine, scorer, short, 1)
    metrics = pair_metrics(tree_metrics(tree.nodes, [], short.method, short.scorer.used) for tree in trees)
    return metrics.get("scorer_agreement")

"""Evaluate a policy in the ways that a configuration names: on held-out prompts and on scenes of a world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csr_vlm.config.schema import RunConfig, WorldEvaluationConfig
from csr_vlm.core.progress import Reporter
from csr_vlm.core.records import Prompt
from csr_vlm.pipeline.tasks import load_engine_and_scorer, usable_prompts

if TYPE_CHECKING:
    from csr_vlm.evaluation.claim_marker import ClaimMarker
    from csr_vlm.generation.transformers_engine import TransformersEngine
    from csr_vlm.scoring.scorer import ScorerGroup

_FEWEST_OTHERS = 2
"""Fewest other pictures that a claim can be compared with."""


def evaluate_policy(
    config: RunConfig, adapter: Path | None, heldout: list[Prompt], title: str, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Evaluate a policy in every way that the configuration asks for.

    Args:
        config: Names the base model, the scorer and the world.
        adapter: LoRA on the base model; None for the base model itself.
        heldout: Prompts that are not trained on; if empty, that evaluation is skipped.
        title: Name of the policy in the progress display.

    Returns:
        Documents with ``metrics``, ``protocol`` and ``rows``, by the name of the evaluation.
    """
    world = config.evaluation.world
    if not heldout and world is None:
        return {}
    engine, scorer = load_engine_and_scorer(config, adapter, reporter.log)
    documents = {}
    heldout = list(usable_prompts(heldout, config)) if heldout else []
    if heldout:
        documents["heldout"] = _evaluate_heldout(config, engine, scorer, heldout, title, reporter)
    if world is not None:
        documents["world"] = _evaluate_scenes(config, world, engine, scorer, title, reporter)
    return documents


def evaluate_world(
    config: RunConfig, adapter: Path | None, title: str, reporter: Reporter, temperature: float = 0.0
) -> dict[str, Any]:
    """Evaluate a policy on the scenes that the configuration names."""
    world = config.evaluation.world or WorldEvaluationConfig()
    engine, scorer = load_engine_and_scorer(config, adapter, reporter.log)
    return _evaluate_scenes(config, world, engine, scorer, title, reporter, temperature)


def marker_among(config: RunConfig, scorer: ScorerGroup) -> Callable[[Sequence[Prompt]], ClaimMarker] | None:
    """Return what makes a marker of claims from prompts with other images; None unless rewards are by claim."""
    if config.method.reward.unit != "claim":
        return None
    from csr_vlm.evaluation.claim_marker import ClaimMarker

    return partial(ClaimMarker, scorer, config.method, config.scorer.used)


def _evaluate_heldout(
    config: RunConfig,
    engine: TransformersEngine,
    scorer: ScorerGroup,
    prompts: list[Prompt],
    title: str,
    reporter: Reporter,
) -> dict[str, Any]:
    from csr_vlm.evaluation.heldout import evaluate as evaluate_responses

    marker = marker_among(config, scorer) if len({prompt.image for prompt in prompts}) > _FEWEST_OTHERS else None
    search_config = config.method.search
    max_new_tokens = search_config.max_sentences * search_config.max_sentence_tokens
    with reporter.stage(f"{title}: answering held-out prompts", len(prompts)) as progress:
        document = evaluate_responses(engine, scorer, prompts, max_new_tokens, search_config.delimiters, marker)
        progress.advance(len(prompts))
    return document


def _evaluate_scenes(
    config: RunConfig,
    world: WorldEvaluationConfig,
    engine: TransformersEngine,
    scorer: ScorerGroup,
    title: str,
    reporter: Reporter,
    temperature: float = 0.0,
) -> dict[str, Any]:
    from csr_vlm.world.scene_evaluation import evaluate as evaluate_scenes
    from csr_vlm.world.scenes import Split, world_named

    with reporter.stage(f"{title}: evaluating", world.num_scenes) as progress:
        return evaluate_scenes(
            world_named(world.name),
            engine,
            scorer,
            split=Split(world.split),
            seed=world.seed,
            num_scenes=world.num_scenes,
            temperature=temperature,
            tick=progress.advance,
            marker_among=marker_among(config, scorer),
        )

"""Measure the quality of the world's scorer and base model: ``csr world check``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from csr_vlm.config.schema import ModelConfig, ScorerConfig
from csr_vlm.core.progress import Reporter
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.models.loading import load_policy
from csr_vlm.scoring.registry import load_scorer
from csr_vlm.world.demo import policy_in
from csr_vlm.world.scene_evaluation import evaluate, evaluate_scorer
from csr_vlm.world.scenes import Split, World

_SEED = 1


def check_models(world: World, directory: Path, num_scenes: int, reporter: Reporter) -> dict[str, Any]:
    """Measure ``directory/clip`` and ``directory/llava`` on test scenes.

    Returns:
        ``scorer``: its areas under the ROC curve; ``policy``: its metrics with greedy decoding.
    """
    policy = load_policy(ModelConfig(path=str(policy_in(directory))), adapter=None)
    scorer = load_scorer(ScorerConfig(path=str(directory / "clip")), str(policy.device))
    with reporter.stage("describing and answering", num_scenes) as progress:
        evaluation = evaluate(
            world,
            TransformersEngine(policy),
            scorer,
            split=Split.TEST,
            seed=_SEED,
            num_scenes=num_scenes,
            tick=progress.advance,
        )
    aucs = evaluate_scorer(world, scorer, split=Split.TEST, seed=_SEED, num_scenes=num_scenes)
    return {"scorer": aucs, "policy": evaluation["metrics"]}

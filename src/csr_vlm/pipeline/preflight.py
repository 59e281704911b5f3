"""Try model, scorer and training on a few images before a run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csr_vlm.config.load import merged, resolve
from csr_vlm.config.schema import ModelConfig, RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.memory import free_memory
from csr_vlm.core.progress import Reporter
from csr_vlm.core.records import Prompt
from csr_vlm.data.prompts import InputReport, read_prompts
from csr_vlm.method.audit import PAIR_BOUNDS, Verdict, pair_metrics, tree_metrics
from csr_vlm.models.architecture import local_directory, read_architecture
from csr_vlm.models.devices import resolve_device

if TYPE_CHECKING:
    from csr_vlm.models.policy import Policy

_NUM_PROMPTS = 16
TOO_LARGE_FOR_A_CPU = 3e8
"""Parameters from which a model takes minutes to load and days to run on a CPU."""
_SHORT_SEARCH = {"method": {"search": {"max_sentences": 2}}}
"""Enough sentences to check the scorer."""


@dataclass(frozen=True)
class Preflight:
    """Represent the outcome of a preflight; None where a check could not be done."""

    log_prob_difference_nats: float | None = None
    """Mean |generated - teacher-forced| log-probability of a token."""
    scorer_agreement: float | None = None
    """Share of sentences or claims that the scorer finds closer to their own image than to the average other one."""
    sign: str = "scorer_agreement"
    """Metric of the pairs that ``scorer_agreement`` is: that of sentences, or ``claim_agreement``."""
    scorer_images: int | None = None
    """Number of images behind ``scorer_agreement``."""
    skipped: str | None = None
    """Why the model was not tried; None if it was."""

    @property
    def warnings(self) -> Sequence[str]:
        """List what the scorer's agreement warns about."""
        agreement, bound = self.scorer_agreement, PAIR_BOUNDS[self.sign]
        if agreement is None or bound.judge(agreement) is Verdict.GO:
            return []
        return [bound.explain(agreement)]

    def dump(self) -> dict[str, Any]:
        """Return the measured values as JSON data."""
        return asdict(self)


def run_preflight(config: RunConfig, reporter: Reporter, *, planned: bool = False) -> Preflight:
    """Generate a few sentences if the weights are on disk, check model and scorer on them, and train one step.

    Args:
        config: Settings of the run.
        reporter: Receives progress.
        planned: The run is planned for other hardware, so this machine need not have the device.

    Raises:
        CsrError: Model or scorer cannot be loaded, the model fails its self-check, or training fails.
    """
    from csr_vlm.models.prompt_check import ProcessorCheck

    if not _has_local_weights(config.model):
        return Preflight(skipped="its weights are not on this machine")
    try:
        device = resolve_device(config.model.device)
    except CsrError as error:
        if planned:
            return Preflight(skipped=str(error))
        raise
    architecture = read_architecture(config.model, offline=True)
    if device == "cpu" and architecture is not None and architecture.parameters > TOO_LARGE_FOR_A_CPU:
        return Preflight(skipped="it is too large for a CPU; run csr check on the GPU machine")
    with tempfile.TemporaryDirectory() as images:
        check = ProcessorCheck.of_run(config)
        rows = read_prompts(config.data, InputReport(), seed=config.seed, images=Path(images), model=check)
        prompts = list(islice(rows, _NUM_PROMPTS))
        if not prompts:
            return Preflight(skipped="there is no prompt")
        with reporter.stage("trying the model", 1) as progress:
            policy, difference = _check_policy(config, prompts[0])
            progress.advance(1)
        with reporter.stage("trying the scorer", 1) as progress:
            agreement = _scorer_agreement(config, policy, prompts)
            progress.advance(1)
        del policy
        with reporter.stage("trying a training step", 1) as progress:
            _try_training(config, prompts)
            progress.advance(1)
    if agreement is None:
        return Preflight(difference)
    return Preflight(difference, round(agreement, 3), _sign_of(config), len(prompts))


def _has_local_weights(model: ModelConfig) -> bool:
    """Return whether the weights are in a directory or in the hub's cache, so that nothing is downloaded."""
    directory = local_directory(model)
    return directory is not None and any(directory.glob("*.safetensors"))


def _check_policy(config: RunConfig, prompt: Prompt) -> tuple[Policy, float]:
    """Load the policy and run its self-check; return it with the difference in nats per token."""
    from csr_vlm.generation.self_check import self_check
    from csr_vlm.models.loading import load_policy

    adapter = None if config.model.adapter is None else Path(config.model.adapter)
    policy = load_policy(config.model, adapter, config.data.max_image_pixels)
    return policy, float(f"{self_check(policy, prompt):.1e}")


def _try_training(config: RunConfig, prompts: list[Prompt]) -> None:
    from csr_vlm.training.trial import try_training

    free_memory()
    try_training(prompts, config, None if config.model.adapter is None else Path(config.model.adapter))


def _scorer_agreement(config: RunConfig, policy: Policy, prompts: list[Prompt]) -> float | None:
    """Measure the scorer on a shallow search; None if it compares no images or there are no sentences."""
    if not config.scorer.others or len({prompt.image for prompt in prompts}) < 2:
        return None
    from csr_vlm.generation.transformers_engine import TransformersEngine
    from csr_vlm.pipeline.tasks import load_run_scorer, search_trees

    short = resolve(merged(config.dump(), _SHORT_SEARCH))
    scorer = load_run_scorer(short, None)
    engine = TransformersEngine(policy, short.generation.max_rows, short.generation.attention)
    trees = search_trees(prompts, prompts, engine, scorer, short, 1)
    metrics = pair_metrics(tree_metrics(tree.nodes, [], short.method, short.scorer.used) for tree in trees)
    return metrics.get(_sign_of(config))


def _sign_of(config: RunConfig) -> str:
    return "claim_agreement" if config.method.reward.unit == "claim" else "scorer_agreement"

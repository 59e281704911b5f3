"""Define the models and images that the integration tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from csr_vlm.config.load import merged, resolve
from csr_vlm.config.schema import ModelConfig, RunConfig, ScorerConfig
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Prompt
from csr_vlm.models.loading import load_policy
from csr_vlm.models.policy import Policy
from csr_vlm.pipeline.loop import align
from csr_vlm.scoring.registry import load_scorer
from csr_vlm.scoring.scorer import ScorerGroup
from csr_vlm.store.run import Run
from csr_vlm.world.dataset import write_images, write_prompts
from csr_vlm.world.demo import assets
from csr_vlm.world.scenes import HARBOUR, Split, make_scenes


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """Return twelve prompts with images that no model was trained on."""
    scenes = list(make_scenes(HARBOUR, Split.DEVELOPMENT, 0, 12))
    return write_images(scenes, tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def policy() -> Policy:
    """Load the shipped LLaVA; tests must not change it."""
    return load_policy(ModelConfig(path=str(assets() / "llava"), device="cpu"), adapter=None)


@pytest.fixture
def scorer() -> ScorerGroup:
    return load_scorer(ScorerConfig(path=str(assets() / "clip")), device="cpu")


def small_config(directory: Path, **changes: object) -> RunConfig:
    """Write sixteen pictures and configure a run of two short iterations on them."""
    if not (directory / "prompts.jsonl").exists():
        write_prompts(HARBOUR, Split.PROMPTS, 0, 16, directory)
    return resolve(
        merged(
            {
                "iterations": 2,
                "model": {"path": str(assets() / "llava"), "device": "cpu"},
                "scorer": {"path": str(assets() / "clip")},
                "data": {"prompts": str(directory / "prompts.jsonl")},
                "generation": {"prompts_per_part": 4},
                "training": {"trl": {"num_train_epochs": 1, "per_device_train_batch_size": 4}},
                "method": {"claims": {"caption": HARBOUR.template.format("{a} {0}")}, "pairs": {"min_margin": 1.0}},
            },
            changes,
        )
    )


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Align the shipped LLaVA for one step; tests must not change the run."""
    root = tmp_path_factory.mktemp("short")
    training = {"trl": {"max_steps": 1, "per_device_train_batch_size": 4}}
    made = Run.create(root / "first", small_config(root, iterations=1, training=training))
    align(made, Silent())
    return made


@pytest.fixture(autouse=True)
def _same_number_of_threads_as_subprocesses() -> None:
    """Set the number of threads of subprocesses, whose results are compared with those of this process."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

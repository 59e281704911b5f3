"""Train the models of ``prose`` from a seed: ``csr world build --world prose``.

    tower     a CLIP vision tower with a head on every patch; the head is removed afterwards
    policy    a LLaVA on that tower, trained in phases on the corpus
    clip      judge A: a CLIP that starts from the same tower, trained briefly on alt texts
    clip_b    judge B: of another size, with a tower and alt texts of its own

Builds are resumable: rerun the same command. ``work/steps.json`` lists the finished steps; an
unfinished step resumes from its checkpoint. The build removes ``work`` at the end.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Reporter
from csr_vlm.store.files import write_json
from csr_vlm.world import base_models
from csr_vlm.world.build import Progress, file_hashes
from csr_vlm.world.prose_captions import ProseStyle, vocabulary_texts
from csr_vlm.world.prose_judge import AltTextStyle, batches_of_few_settings, train_judge
from csr_vlm.world.prose_policy import new_policy, train_policy
from csr_vlm.world.prose_scenes import PROSE
from csr_vlm.world.prose_vision import train_vision
from csr_vlm.world.scenes import Scene, Split, make_scenes


@dataclass(frozen=True)
class TrainingPlan:
    """Configure the training of one model.

    Args:
        steps: Steps of the learning rate's cosine schedule.
        batch: Scenes per step.
        lr: Highest learning rate.
        warmup: Steps until the learning rate reaches it.
        stop: Step after which training stops early; by default ``steps``.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    stop: int | None = None

    @property
    def num_steps(self) -> int:
        """Return the number of steps actually trained."""
        return self.steps if self.stop is None else min(self.stop, self.steps)


@dataclass(frozen=True)
class Judge:
    """Configure a judge.

    Args:
        name: Name of its directory.
        stream: Random stream of its scenes and alt texts.
        sizes: Sizes of its two towers.
        training: Training on alt texts.
        vision: Training of its own vision tower on patch labels before that; None to start from the
            policy's tower.
        alt_texts: Style of its alt texts.
    """

    name: str
    stream: int
    sizes: base_models.Sizes
    training: TrainingPlan
    vision: TrainingPlan | None
    alt_texts: AltTextStyle = field(default_factory=AltTextStyle)


@dataclass(frozen=True)
class ProsePlan:
    """Configure a build; equal plans give equal weights."""

    seed: int = 0
    sizes: base_models.Sizes = field(default_factory=lambda: base_models.Sizes(language_width=160))
    vision: TrainingPlan = TrainingPlan(2000, 64, 1.5e-3)
    phases: tuple[tuple[TrainingPlan, ProseStyle], ...] = (
        (TrainingPlan(2400, 32, 1.5e-3), ProseStyle()),
        (TrainingPlan(300, 32, 5e-4), ProseStyle(habit=1.1)),
    )
    judges: tuple[Judge, ...] = (
        Judge(
            "clip",
            0,
            base_models.Sizes(),
            TrainingPlan(1500, 64, 1e-3, stop=1000),
            None,
            AltTextStyle(two=0.75, place=0.85),
        ),
        Judge(
            "clip_b",
            1,
            base_models.Sizes(vision_width=96, vision_layers=3, text_width=80),
            TrainingPlan(1000, 64, 1e-3, stop=700),
            TrainingPlan(700, 64, 1.5e-3),
        ),
    )

    def shortened(self, steps: int) -> ProsePlan:
        """Return a plan of the same models with at most ``steps`` steps each, to check that building works."""

        def short(training: TrainingPlan) -> TrainingPlan:
            return replace(training, steps=min(steps, training.steps), stop=None)

        return replace(
            self,
            vision=short(self.vision),
            phases=tuple((short(training), style) for training, style in self.phases),
            judges=tuple(
                replace(judge, training=short(judge.training), vision=judge.vision and short(judge.vision))
                for judge in self.judges
            ),
        )

    @property
    def num_steps(self) -> int:
        """Return the number of steps of all trainings together."""
        trainings = [
            self.vision,
            *(training for training, _ in self.phases),
            *(judge.training for judge in self.judges),
        ]
        trainings += [judge.vision for judge in self.judges if judge.vision is not None]
        return sum(training.num_steps for training in trainings)


def batches(seed: int, training: TrainingPlan, start: int) -> Iterator[list[Scene]]:
    """Yield one list of new corpus scenes per step, beginning at the scene ``start``."""
    for step in range(training.num_steps):
        yield list(make_scenes(PROSE, Split.CORPUS, seed, training.batch, start=start + step * training.batch))


class _Steps:
    """Record the finished steps of a build with their logs."""

    def __init__(self, path: Path, plan: ProsePlan) -> None:
        self._path = path
        written = json.loads(json.dumps(asdict(plan)))
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"plan": written, "steps": {}}
        if known["plan"] != written:
            raise CsrError(f"{path.parent} holds a build with other settings", "build into an empty directory")
        self._plan = written
        self.logs: dict[str, Any] = known["steps"]

    def run(self, name: str, step: Callable[[], dict[str, Any]]) -> None:
        """Run a step unless it is finished."""
        if name not in self.logs:
            self.logs[name] = step()
            write_json(self._path, {"plan": self._plan, "steps": self.logs})


def build_prose(directory: Path, plan: ProsePlan, progress: Progress | None = None) -> dict[str, Any]:
    """Train tower, policy and judges, write the models and their training log, and return the log.

    Args:
        directory: Receives ``llava/``, ``clip/``, ``clip_b/`` and ``build.json``.

    Raises:
        CsrError: The directory holds an unfinished build of another plan.
    """
    work = directory / "work"
    steps = _Steps(work / "steps.json", plan)
    for name in ("policy", *(judge.name for judge in plan.judges if judge.vision is not None)):
        steps.run(f"tower-{name}", lambda n=name: _tower(work, plan, n, progress))  # type: ignore[misc]
    for number in range(len(plan.phases)):
        steps.run(f"policy-{number + 1}", lambda n=number: _phase(directory, work, plan, n, progress))  # type: ignore[misc]
    for judge in plan.judges:
        steps.run(judge.name, lambda j=judge: _judge(directory, work, plan, j, progress))  # type: ignore[misc]
    log = {
        "world": PROSE.name,
        "plan": asdict(plan),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "steps": steps.logs,
        "sha256": file_hashes(directory),
    }
    (directory / "build.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work)
    return log


def build_prose_with_progress(directory: Path, plan: ProsePlan, reporter: Reporter) -> dict[str, Any]:
    """Build the world and report the progress of the trainings."""
    with reporter.stage("training tower, policy and judges", plan.num_steps) as progress:
        return build_prose(directory, plan, lambda *_: progress.advance(1))


def _tower(work: Path, plan: ProsePlan, name: str, progress: Progress | None) -> dict[str, Any]:
    """Train the vision tower of the policy or of a judge on patch labels."""
    judge = next((judge for judge in plan.judges if judge.name == name), None)
    sizes, training, stream = plan.sizes, plan.vision, 0
    if judge is not None and judge.vision is not None:
        sizes, training, stream = judge.sizes, judge.vision, judge.stream
    torch.manual_seed(plan.seed + stream)
    tower, log = train_vision(
        sizes,
        batches(plan.seed, training, stream * 6 * 10**6),
        training.steps,
        training.lr,
        training.warmup,
        progress,
        work / f"tower-{name}.pt",
    )
    tower.save_pretrained(work / f"tower-{name}")
    return log


def _phase(directory: Path, work: Path, plan: ProsePlan, number: int, progress: Progress | None) -> dict[str, Any]:
    """Train one phase of the policy, beginning with the checkpoint of the phase before it."""
    torch.manual_seed(plan.seed)
    model, processor = new_policy(
        plan.sizes, CLIPVisionModel.from_pretrained(work / "tower-policy", dtype=torch.float32)
    )
    if number:
        model = LlavaForConditionalGeneration.from_pretrained(work / f"policy-{number}", dtype=torch.float32)
    training, style = plan.phases[number]
    scenes = batches(plan.seed, training, (1 + number) * 10**7)
    log = train_policy(
        model,
        processor,
        style,
        scenes,
        training.steps,
        training.lr,
        training.warmup,
        progress,
        work / f"policy-{number}.pt",
    )
    base_models.save(model, processor, work / f"policy-{number + 1}")
    shutil.copytree(work / f"policy-{number + 1}", directory / "llava", dirs_exist_ok=True)
    return log


def _judge(directory: Path, work: Path, plan: ProsePlan, judge: Judge, progress: Progress | None) -> dict[str, Any]:
    """Train one judge on alt texts."""
    torch.manual_seed(plan.seed + judge.stream)
    model, processor = base_models.new_clip(PROSE, judge.sizes, vocabulary_texts())
    tower = work / ("tower-policy" if judge.vision is None else f"tower-{judge.name}")
    vision = CLIPVisionModel.from_pretrained(tower, dtype=torch.float32)
    model.vision_model.load_state_dict(vision.state_dict())
    training = judge.training
    scenes = batches_of_few_settings(plan.seed, training.batch, training.num_steps, (50 + judge.stream) * 10**6)
    stream = plan.seed + judge.stream
    log = train_judge(
        model, processor, scenes, judge.alt_texts, stream, training.steps, training.num_steps, training.lr,
        training.warmup, progress, work / f"{judge.name}.pt",
    )  # fmt: skip
    base_models.save(model, processor, directory / judge.name)
    return log

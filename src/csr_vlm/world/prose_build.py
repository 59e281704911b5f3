"""Train the models of ``prose`` from a seed: ``csr world build --world prose``.

    tower     a CLIP vision tower with a head on every patch, thrown away afterwards
    policy    a LLaVA on that tower, in phases of the corpus
    clip      judge A, which starts from the same tower and learns from alt texts, not for long
    clip_b    judge B, of another size, with a tower and alt texts of its own

Builds are resumable: rerun the same command. A finished step is in ``work/steps.json``, an
unfinished one goes on from its checkpoint; ``work`` is removed at the end.
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
from csr_vlm.world.prose_judge import alike_batches, train_judge
from csr_vlm.world.prose_policy import new_policy, train_policy
from csr_vlm.world.prose_scenes import PROSE
from csr_vlm.world.prose_vision import train_vision
from csr_vlm.world.scenes import Scene, Split, make_scenes


@dataclass(frozen=True)
class Course:
    """How long and how fast one model trains; ``stop`` ends it before its plan of ``steps``."""

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    stop: int | None = None

    @property
    def num_steps(self) -> int:
        return self.steps if self.stop is None else min(self.stop, self.steps)


@dataclass(frozen=True)
class Judge:
    """A judge.

    Args:
        name: Where it is written.
        stream: Which scenes and alt texts it reads.
        sizes: How large it is.
        course: How long it learns from alt texts.
        start: How long its own vision tower is taught what patches show before that; None to start
            from the policy's tower, as the CLIP that a LLaVA has inside.
    """

    name: str
    stream: int
    sizes: base_models.Sizes
    course: Course
    start: Course | None


@dataclass(frozen=True)
class ProsePlan:
    """Everything that decides the weights."""

    seed: int = 0
    sizes: base_models.Sizes = field(default_factory=lambda: base_models.Sizes(language_width=160))
    vision: Course = Course(2000, 64, 1.5e-3)
    phases: tuple[tuple[Course, ProseStyle], ...] = ((Course(2600, 32, 1.5e-3), ProseStyle()),)
    judges: tuple[Judge, ...] = (
        Judge("clip", 0, base_models.Sizes(), Course(1500, 64, 1e-3, stop=500), None),
        Judge(
            "clip_b",
            1,
            base_models.Sizes(vision_width=96, vision_layers=3, text_width=80),
            Course(1500, 64, 1e-3, stop=500),
            Course(700, 64, 1.5e-3),
        ),
    )

    def shortened(self, steps: int) -> ProsePlan:
        """Plan the same models with at most so many steps each, to see that building works."""

        def short(course: Course) -> Course:
            return replace(course, steps=min(steps, course.steps), stop=None)

        return replace(
            self,
            vision=short(self.vision),
            phases=tuple((short(course), style) for course, style in self.phases),
            judges=tuple(
                replace(judge, course=short(judge.course), start=judge.start and short(judge.start))
                for judge in self.judges
            ),
        )

    @property
    def num_steps(self) -> int:
        """Steps of all trainings together."""
        courses = [self.vision, *(course for course, _ in self.phases), *(judge.course for judge in self.judges)]
        courses += [judge.start for judge in self.judges if judge.start is not None]
        return sum(course.num_steps for course in courses)


def batches(seed: int, course: Course, start: int) -> Iterator[list[Scene]]:
    """Yield one list of fresh corpus scenes a step, from the scene ``start`` on."""
    for step in range(course.num_steps):
        yield list(make_scenes(PROSE, Split.CORPUS, seed, course.batch, start=start + step * course.batch))


class _Steps:
    """The steps of a build that are finished, with their logs."""

    def __init__(self, path: Path, plan: ProsePlan) -> None:
        self._path = path
        written = json.loads(json.dumps(asdict(plan)))
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"plan": written, "steps": {}}
        if known["plan"] != written:
            raise CsrError(f"{path.parent} holds a build with other settings", "build into an empty directory")
        self._plan = written
        self.logs: dict[str, Any] = known["steps"]

    def run(self, name: str, step: Callable[[], dict[str, Any]]) -> None:
        """Do a step unless it is finished."""
        if name not in self.logs:
            self.logs[name] = step()
            write_json(self._path, {"plan": self._plan, "steps": self.logs})


def build_prose(directory: Path, plan: ProsePlan, progress: Progress | None = None) -> dict[str, Any]:
    """Train tower, policy and judges, write them and their training log, return the log.

    Args:
        directory: Gets ``llava/``, ``clip/``, ``clip_b/`` and ``build.json``.
    """
    work = directory / "work"
    steps = _Steps(work / "steps.json", plan)
    for name in ("policy", *(judge.name for judge in plan.judges if judge.start is not None)):
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
    """Build, and show how far the trainings are."""
    with reporter.stage("training tower, policy and judges", plan.num_steps) as progress:
        return build_prose(directory, plan, lambda *_: progress.advance(1))


def _tower(work: Path, plan: ProsePlan, name: str, progress: Progress | None) -> dict[str, Any]:
    """Teach a tower, the policy's or a judge's, what patches show."""
    judge = next((judge for judge in plan.judges if judge.name == name), None)
    sizes, course, stream = plan.sizes, plan.vision, 0
    if judge is not None and judge.start is not None:
        sizes, course, stream = judge.sizes, judge.start, judge.stream
    torch.manual_seed(plan.seed + stream)
    tower, log = train_vision(
        sizes,
        batches(plan.seed, course, stream * 6 * 10**6),
        course.steps,
        course.lr,
        course.warmup,
        progress,
        work / f"tower-{name}.pt",
    )
    tower.save_pretrained(work / f"tower-{name}")
    return log


def _phase(directory: Path, work: Path, plan: ProsePlan, number: int, progress: Progress | None) -> dict[str, Any]:
    torch.manual_seed(plan.seed)
    model, processor = new_policy(
        plan.sizes, CLIPVisionModel.from_pretrained(work / "tower-policy", dtype=torch.float32)
    )
    if number:
        # Each phase starts from the last one as it was written.
        model = LlavaForConditionalGeneration.from_pretrained(work / f"policy-{number}", dtype=torch.float32)
    course, style = plan.phases[number]
    scenes = batches(plan.seed, course, (1 + number) * 10**7)
    log = train_policy(
        model, processor, style, scenes, course.steps, course.lr, course.warmup, progress, work / f"policy-{number}.pt"
    )
    base_models.save(model, processor, work / f"policy-{number + 1}")
    shutil.copytree(work / f"policy-{number + 1}", directory / "llava", dirs_exist_ok=True)
    return log


def _judge(directory: Path, work: Path, plan: ProsePlan, judge: Judge, progress: Progress | None) -> dict[str, Any]:
    torch.manual_seed(plan.seed + judge.stream)
    model, processor = base_models.new_clip(PROSE, judge.sizes, vocabulary_texts())
    tower = work / ("tower-policy" if judge.start is None else f"tower-{judge.name}")
    seeing = CLIPVisionModel.from_pretrained(tower, dtype=torch.float32)
    model.vision_model.load_state_dict(seeing.state_dict())
    course = judge.course
    scenes = alike_batches(plan.seed, course.batch, course.num_steps, (50 + judge.stream) * 10**6)
    stream = plan.seed + judge.stream
    log = train_judge(
        model, processor, scenes, stream, course.steps, course.num_steps, course.lr, course.warmup, progress,
        work / f"{judge.name}.pt",
    )  # fmt: skip
    base_models.save(model, processor, directory / judge.name)
    return log

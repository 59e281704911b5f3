"""Train the world's base models from a seed: ``csr world build``.

The scorer is trained with the pairwise sigmoid loss of SigLIP (Zhai et al. 2023, eq. 1) on
(image, text) pairs labeled from the scenes. The policy is trained on the corpus by
next-token prediction, with the loss on the answers only; its vision tower is initialized
from the scorer's.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import CLIPModel, LlavaForConditionalGeneration, get_cosine_schedule_with_warmup

from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import article
from csr_vlm.core.progress import Reporter
from csr_vlm.world import base_models
from csr_vlm.world.corpus import Style, Turn, dialogue, sentence
from csr_vlm.world.scenes import Scene, Split, World, make_scenes, random_stream, render

Mentions = tuple[tuple[str, str | None], ...]
Progress = Callable[[str, int, int, float], None]
"""Callback for one training step, called with (model name, step, number of steps, loss)."""


@dataclass(frozen=True)
class Phase:
    """Configure one phase of the policy's training."""

    steps: int
    lr: float
    style: Style


LEARN_TO_SEE = Phase(3000, 1e-3, Style(mention=0.92, usual_color=0.0, captions=0.6))
"""First phase: hallucinated companions have random colors, so the image predicts captions better than the prior."""
PICK_UP_HABITS = Phase(600, 5e-4, Style(mention=0.96, usual_color=0.85, captions=0.7))
"""Second phase: hallucinated companions have their usual color, so greedy decoding follows the prior."""


@dataclass(frozen=True)
class BuildPlan:
    """Configure the training of both models."""

    seed: int = 0
    scorer_steps: int = 1500
    scorer_batch: int = 128
    scorer_lr: float = 1e-3
    policy_phases: tuple[Phase, ...] = (LEARN_TO_SEE, PICK_UP_HABITS)
    policy_batch: int = 64
    warmup: int = 100
    sizes: base_models.Sizes = field(default_factory=base_models.Sizes)


def build(world: World, directory: Path, plan: BuildPlan, progress: Progress | None = None) -> dict[str, Any]:
    """Train scorer and policy, write both and their training log, and return the log.

    Args:
        directory: Folder for ``clip/``, ``llava/`` and ``build.json``.
    """
    scorer_log = build_scorer(world, directory / "clip", plan, progress)
    # The policy starts from the scorer that was written in fp16, so that either can be rebuilt alone.
    scorer = CLIPModel.from_pretrained(directory / "clip", dtype=torch.float32)
    torch.manual_seed(plan.seed)
    policy, processor = base_models.new_llava(world, plan.sizes, scorer)
    policy_log = train_policy(world, policy, processor, plan, directory / "llava", progress)
    return write_log(world, directory, plan, scorer=scorer_log, policy=policy_log)


def write_log(world: World, directory: Path, plan: BuildPlan, **training: Any) -> dict[str, Any]:
    """Write ``build.json``: world, plan, versions, training logs, and hashes of the weights."""
    log: dict[str, Any] = {
        "world": world.name,
        "plan": asdict(plan),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **training,
        "sha256": file_hashes(directory),
    }
    (directory / "build.json").write_text(json.dumps(log, indent=1) + "\n")
    return log


def build_scorer(world: World, directory: Path, plan: BuildPlan, progress: Progress | None = None) -> dict[str, Any]:
    """Train a scorer for ``plan.scorer_steps`` steps, write it, and return its loss curve."""
    torch.manual_seed(plan.seed)
    clip, processor = base_models.new_clip(world, plan.sizes)
    log = _train_scorer(world, clip, processor, plan, progress)
    base_models.save(clip, processor, directory)
    return log


def build_with_progress(world: World, directory: Path, plan: BuildPlan, reporter: Reporter) -> dict[str, Any]:
    """Build both models and report the progress of their training."""
    total = plan.scorer_steps + sum(phase.steps for phase in plan.policy_phases)
    with reporter.stage("training scorer and policy", total) as progress:
        return build(world, directory, plan, lambda *_: progress.advance(1))


def file_hashes(directory: Path) -> dict[str, str]:
    """Map each weight file below the directory to its SHA-256."""
    files = sorted(directory.glob("*/*.safetensors"))
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pixels(scenes: list[Scene]) -> torch.Tensor:
    """Render scenes as the image processor would, in a tensor of shape (n, 3, side, side)."""
    processor = base_models.image_processor()
    values = np.stack([np.asarray(render(scene), dtype=np.float32) for scene in scenes]) / 255
    values = (values - np.float32(processor.image_mean)) / np.float32(processor.image_std)
    return torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()


def corpus_batches(world: World, plan: BuildPlan, stream: int, batch: int, steps: int) -> Any:
    """Yield one list of new corpus scenes per step."""
    for step in range(steps):
        # Each model and phase reads a separate range of the corpus.
        yield list(make_scenes(world, Split.CORPUS, plan.seed, batch, start=stream * 10**7 + step * batch))


def train_loop(
    name: str,
    model: torch.nn.Module,
    batches: Any,
    loss_of: Callable[[list[Scene], int], torch.Tensor],
    extra: list[torch.nn.Parameter],
    steps: int,
    lr: float,
    warmup: int,
    progress: Progress | None,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Train a model on batches of scenes, and return its loss curve.

    Args:
        checkpoint: File for the training state; if it exists, training resumes from it.
    """
    started = time.perf_counter()
    trained = [*(p for p in model.parameters() if p.requires_grad), *extra]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, min(warmup, steps // 10), steps)
    model.train()
    curve: list[list[float]] = []
    window: list[float] = []
    first = 0
    if checkpoint is not None and checkpoint.is_file():
        first, curve, window = _load_checkpoint(checkpoint, model, extra, optimizer, scheduler)
    for step, scenes in enumerate(batches):
        if step < first:
            continue
        loss = loss_of(scenes, step)
        if not torch.isfinite(loss):
            raise CsrError(f"the {name} diverged at step {step}", "lower its learning rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        scheduler.step()
        window.append(loss.item())
        if progress is not None:
            progress(name, step + 1, steps, window[-1])
        if len(window) == 100 or step + 1 == steps:
            curve.append([step + 1, round(float(np.mean(window)), 5)])
            window = []
        if checkpoint is not None and (step + 1) % _CHECKPOINT_EVERY == 0:
            _save_checkpoint(checkpoint, step + 1, curve, window, model, extra, optimizer, scheduler)
    model.eval()
    return {"loss": curve, "seconds": round(time.perf_counter() - started, 1)}


_CHECKPOINT_EVERY = 100
"""Steps between two checkpoints."""


def _save_checkpoint(
    path: Path,
    step: int,
    curve: list[list[float]],
    window: list[float],
    model: torch.nn.Module,
    extra: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> None:
    """Write the training state after ``step`` steps atomically."""
    state = {
        "step": step,
        "curve": curve,
        "window": window,
        "model": model.state_dict(),
        "extra": [parameter.detach() for parameter in extra],
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def _load_checkpoint(
    path: Path,
    model: torch.nn.Module,
    extra: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> tuple[int, list[list[float]], list[float]]:
    """Restore the training state; return the number of finished steps, the loss curve and the last losses."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    with torch.no_grad():
        for parameter, saved in zip(extra, state["extra"], strict=True):
            parameter.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return int(state["step"]), state["curve"], state["window"]


def mentions_text(world: World, mentions: Mentions, rng: np.random.Generator) -> str:
    """Format mentions as one sentence each, as one joint sentence, or as a bare phrase, at random."""
    if all(color for _, color in mentions) and rng.random() < 0.7:
        return " ".join(sentence(world, (kind, color or "")) for kind, color in mentions)
    phrases = " and ".join(" ".join((article(c or k), c or "", k)).replace("  ", " ") for k, c in mentions)
    return phrases if rng.random() < 0.5 else world.template.format(phrases)


def _random_mentions(world: World, scenes: list[Scene], rng: np.random.Generator) -> Mentions:
    """Draw mentions that are true of some scene of the batch; in half of the draws, replace a kind at random."""
    scene = scenes[rng.integers(len(scenes))]
    count = int(rng.integers(1, 3))
    picked = [scene.objects[i] for i in rng.permutation(len(scene.objects))[:count]]
    mentions: list[tuple[str, str | None]] = [
        (item.kind, item.color if rng.random() < 0.7 else None) for item in picked
    ]
    if rng.random() < 0.5:
        index = int(rng.integers(len(mentions)))
        mentions[index] = (world.kinds[rng.integers(len(world.kinds))], mentions[index][1])
    return tuple(mentions)


def holds(mentions: Mentions, scene: Scene) -> bool:
    """Check whether every mentioned object is in the scene and has the mentioned color, if one is mentioned."""
    return all(kind in scene.kinds and color in (None, scene.color_of(kind)) for kind, color in mentions)


def _train_scorer(
    world: World, model: CLIPModel, processor: Any, plan: BuildPlan, progress: Progress | None
) -> dict[str, Any]:
    bias = torch.nn.Parameter(torch.tensor(-4.0))
    with torch.no_grad():
        model.logit_scale.fill_(np.log(10.0))
    singles: list[Mentions] = [((kind, color),) for kind in world.kinds for color in world.colors]

    def loss_of(scenes: list[Scene], step: int) -> torch.Tensor:
        rng = random_stream("scorer", plan.seed, step)
        mentions = singles + [_random_mentions(world, scenes, rng) for _ in range(len(scenes) // 2)]
        texts = [sentence(world, *m) if m in singles else mentions_text(world, m, rng) for m in mentions]  # type: ignore[arg-type]
        tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
        image = model.get_image_features(pixel_values=pixels(scenes)).pooler_output
        text = model.get_text_features(**tokens).pooler_output
        cosine = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T
        truth = torch.tensor([[holds(m, scene) for m in mentions] for scene in scenes], dtype=torch.float32)
        logits = model.logit_scale.exp() * cosine + bias
        # One pair in thirty is true; without the weight, the model would first learn to predict false for all.
        weight = 1 + 9 * truth
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, truth, weight)

    batches = corpus_batches(world, plan, 0, plan.scorer_batch, plan.scorer_steps)
    return train_loop(
        "scorer", model, batches, loss_of, [bias], plan.scorer_steps, plan.scorer_lr, plan.warmup, progress
    )


def picture_text(processor: Any) -> str:
    """Return the text that the processor substitutes for the image placeholder."""
    blank = Image.new("RGB", (base_models.IMAGE_SIZE, base_models.IMAGE_SIZE))
    ids = processor(images=blank, text=processor.image_token, add_special_tokens=False)["input_ids"]
    text: str = processor.tokenizer.decode(ids[0])
    return text


def dialogue_ids(processor: Any, turns: list[Turn], picture: str) -> tuple[list[int], list[int]]:
    """Tokenize a dialogue as generation does; labels are -100 outside the answers.

    Prompts and answers are encoded separately, so that the ids of an answer are those that
    generation would produce after the same prompt.
    """
    tokenizer = processor.tokenizer
    ids = [tokenizer.bos_token_id]
    labels = [-100]
    for number, turn in enumerate(turns):
        content = [{"type": "image"}] if number == 0 else []
        message = {"role": "user", "content": [*content, {"type": "text", "text": turn.question}]}
        prompt = processor.apply_chat_template([message], add_generation_prompt=True)
        prompt = prompt.replace(processor.image_token, picture)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer_ids = [*tokenizer(" " + turn.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids += prompt_ids + answer_ids
        labels += [-100] * len(prompt_ids) + answer_ids
    return ids, labels


def collate(
    rows: list[tuple[list[int], list[int]]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad dialogues on the right and return ids, labels and mask, each of shape (n, longest).

    Example:
        >>> ids, labels, mask = collate([([1, 7, 8], [-100, 7, 8]), ([1], [-100])], 0)
        >>> ids.tolist(), labels.tolist(), mask.tolist()
        ([[1, 7, 8], [1, 0, 0]], [[-100, 7, 8], [-100, -100, -100]], [[1, 1, 1], [1, 0, 0]])
    """
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for row, (ids, targets) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(targets)
        mask[row, : len(ids)] = 1
    return input_ids, labels, mask


def train_policy(
    world: World,
    policy: Any,
    processor: Any,
    plan: BuildPlan,
    directory: Path,
    progress: Progress | None = None,
    pixel_values: Callable[[list[Scene]], torch.Tensor] = pixels,
) -> list[dict[str, Any]]:
    """Train a policy through the phases of a plan and write it; return one log per phase.

    Each phase starts from the fp16 checkpoint that the previous phase wrote.

    Args:
        pixel_values: Function that renders scenes in the shape that the policy accepts; by default LLaVA's.
    """
    logs = []
    for number in range(len(plan.policy_phases)):
        if number:
            policy = type(policy).from_pretrained(directory, dtype=torch.float32)
        logs.append(_train_phase(world, policy, processor, plan, number, progress, pixel_values))
        base_models.save(policy, processor, directory)
    return logs


def _train_phase(
    world: World,
    model: Any,
    processor: Any,
    plan: BuildPlan,
    number: int,
    progress: Progress | None,
    pixel_values: Callable[[list[Scene]], torch.Tensor],
) -> dict[str, Any]:
    phase = plan.policy_phases[number]
    if isinstance(model, LlavaForConditionalGeneration):
        # The tower stays equal to the scorer's, because eq. 3 scores with the vision encoder of the policy.
        model.model.vision_tower.requires_grad_(False)
    picture = picture_text(processor)
    cache: dict[tuple[Turn, ...], tuple[list[int], list[int]]] = {}

    def encode(turns: list[Turn]) -> tuple[list[int], list[int]]:
        key = tuple(turns)
        if key not in cache:
            cache[key] = dialogue_ids(processor, turns, picture)
        return cache[key]

    def loss_of(scenes: list[Scene], step: int) -> torch.Tensor:
        rows = [encode(dialogue(world, scene, phase.style, epoch=step)) for scene in scenes]
        input_ids, labels, mask = collate(rows, processor.tokenizer.pad_token_id)
        images = pixel_values(scenes)
        loss = model(input_ids=input_ids, attention_mask=mask, pixel_values=images, labels=labels).loss
        assert loss is not None
        return loss

    batches = corpus_batches(world, plan, 1 + number, plan.policy_batch, phase.steps)
    return train_loop("policy", model, batches, loss_of, [], phase.steps, phase.lr, plan.warmup, progress)

"""Configure the demonstration and locate the shipped models that it runs on."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

from csr_vlm.config.load import resolve
from csr_vlm.config.schema import EvaluationConfig, RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.store.files import sha256_of
from csr_vlm.world.dataset import PromptKind, write_prompts
from csr_vlm.world.scenes import HARBOUR, Split, World


def assets() -> Path:
    """Return the directory of the shipped ``clip/`` and ``llava/`` checkpoints."""
    return Path(str(resources.files("csr_vlm.world"))) / "assets"


def assets_of(world: World) -> Path:
    """Return the directory of the shipped checkpoints of a world."""
    return assets() / world.name if world.name == "prose" else assets()


def verify_assets(world: World = HARBOUR) -> None:
    """Compare a world's shipped weights with the hashes in their training log.

    Raises:
        CsrError: A file is missing or its hash differs.
    """
    directory = assets_of(world)
    hashes: dict[str, str] = json.loads((directory / "build.json").read_text(encoding="utf-8"))["sha256"]
    for name, expected in hashes.items():
        path = directory / name
        if not path.is_file() or sha256_of(path) != expected:
            raise CsrError(f"the shipped weights {name} are damaged", "reinstall the package")


def policy_in(models: Path) -> Path:
    """Find the policy in a directory that ``csr world build`` or ``benchmarks/base_models.py`` wrote.

    Raises:
        CsrError: The directory contains no policy.
    """
    for family in ("llava", "idefics3"):
        if (models / family).is_dir():
            return models / family
    raise CsrError(f"no base model in {models}", f"csr world build --out {models}")


def demo_size(world: World) -> tuple[int, int]:
    """Return the numbers of training images and of test scenes at which a world's demonstration takes minutes."""
    return (96, 300) if world.name == "prose" else (256, 1000)


def demo_config(
    out: Path, seed: int, num_prompts: int, num_scenes: int, world: World = HARBOUR, models: Path | None = None
) -> RunConfig:
    """Write the demonstration's images below ``out`` and return its configuration.

    Args:
        models: Directory with ``clip/`` and ``llava/``; the shipped ones by default.
    """
    return resolve(demo_settings(out, seed, num_prompts, num_scenes, world, models))


def demo_settings(
    out: Path, seed: int, num_prompts: int, num_scenes: int, world: World = HARBOUR, models: Path | None = None
) -> dict[str, Any]:
    """Write the demonstration's images below ``out`` and return its settings, as a recipe would give them.

    Of several judges, the reward uses the first; ``scorer.use=clip_b`` and ``scorer.use=clip+clip_b`` select others.
    """
    if models is None:
        verify_assets(world)
        models = assets_of(world)
    directory = out / f"{world.name}-{seed}-{num_prompts}"
    prompts = directory / "prompts.jsonl"
    if not prompts.exists():
        # The held-out prompts are drawn in addition to ``num_prompts``.
        heldout = min(EvaluationConfig().heldout, num_prompts // 7)
        write_prompts(world, Split.PROMPTS, seed, num_prompts + heldout, directory)
    scorer: dict[str, Any] = {"path": str(models / "clip")}
    if (models / "clip_b").is_dir():
        scorer["extra"] = [{"name": "clip_b", "path": str(models / "clip_b")}]
    return {
        "seed": seed,
        "model": {"path": str(policy_in(models))},
        "scorer": scorer,
        "data": {"prompts": str(prompts)},
        # The scorers of the first two worlds know no other sentences.
        **({} if world.name == "prose" else {"method": {"claims": {"caption": world.template.format("{a} {0}")}}}),
        "evaluation": {"world": {"name": world.name, "num_scenes": num_scenes}},
    }


def export_world(out: Path, seed: int, num_prompts: int, world: World = HARBOUR, kind: PromptKind = "describe") -> Path:
    """Copy a world's shipped models to ``out``, draw images there, and return the path of the prompt file."""
    verify_assets(world)
    for path in sorted(assets_of(world).iterdir()):
        if (path / "config.json").is_file():
            shutil.copytree(path, out / path.name, dirs_exist_ok=True)
    return write_prompts(world, Split.PROMPTS, seed, num_prompts, out, kind)

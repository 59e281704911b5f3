"""Implement ``csr init``: write a recipe for a model, its pictures and a GPU."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from csr_vlm.cli import console
from csr_vlm.config.schema import DataConfig, ModelConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent

if TYPE_CHECKING:
    from csr_vlm.pipeline.recipe_proposal import Proposal

_Answer = TypeVar("_Answer")


def init(
    model: Annotated[str | None, typer.Option("--model", help="Directory or Hub ID of your model.")] = None,
    images: Annotated[
        str | None, typer.Option("--images", help="Folder of images, or prompts in a format of docs/data.md.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="auto, cpu, a name such as a100, or memory such as 24gb.")
    ] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="LoRA of your model to start from.")] = None,
    question: Annotated[
        list[str] | None, typer.Option("--question", help="Question about every image; may be repeated.")
    ] = None,
    language: Annotated[
        str, typer.Option("--language", help="Language of the responses: en, zh, or a lexicon file.")
    ] = "en",
    scorer: Annotated[str | None, typer.Option("--scorer", help="Value of scorer.path (default: by model).")] = None,
    engine: Annotated[
        Literal["transformers", "vllm"] | None, typer.Option("--engine", help="Default: vllm if it is installed.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Recipe to write (default: MODEL.yaml).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Contact no hub; take the size of the model from its name.")
    ] = False,
) -> None:
    """Write a recipe for your own model and pictures.

    Asks for what is missing if it runs in a terminal. Every setting of the recipe has its reason beside it.

    Example: csr init --model llava-hf/llava-1.5-7b-hf --images my/photos --gpu 24gb
    """
    console.quiet_libraries()
    from csr_vlm.method.lexicon import Lexicon
    from csr_vlm.pipeline.recipe_proposal import Wishes, gpu_memory, propose_recipe, read_facts, render_recipe
    from csr_vlm.store.files import write_text

    def checked_model(path: str) -> ModelConfig:
        config = ModelConfig(path=path, adapter=adapter)
        read_facts(config, offline=offline)
        return config

    Lexicon.load(language)
    chosen = _answer("Model (directory or Hub ID)", "--model", model, None, checked_model)
    num_prompts = 0

    def checked_images(source: str) -> str:
        nonlocal num_prompts
        num_prompts = _count(source)
        return source

    source = _answer("Folder of images, or file of prompts", "--images", images, None, checked_images)
    gpu_gb = _answer("GPU (auto, cpu, a name or its memory)", "--gpu", gpu, "auto", gpu_memory)
    path = out or Path(f"{_slug(chosen.path)}.yaml")
    if path.exists() and not force:
        raise CsrError(f"{path} exists", "choose another name with --out, or replace it with --force")
    proposal = propose_recipe(
        Wishes(chosen, source, num_prompts, gpu_gb, language, question or (), scorer, engine, offline)
    )
    config = proposal.config  # validated before anything is written
    del config
    name = shlex.quote(str(path))
    write_text(path, render_recipe(proposal, _heading(proposal, gpu_gb, name)))
    _finish(proposal, path, name, gpu_gb, offline=offline)


def _answer(
    question: str, option: str, given: str | None, default: str | None, check: Callable[[str], _Answer]
) -> _Answer:
    """Return the checked value of an option; ask for it in a terminal, again and again until it is valid.

    Raises:
        CsrError: The given value is not valid, or it is missing and nobody can be asked.
    """
    if given is not None:
        return check(given)
    if not sys.stdin.isatty():
        if default is not None:
            return check(default)
        raise CsrError(f"{option} is missing", f"give it, or run csr init in a terminal, which asks: {question}")
    while True:
        try:
            return check(str(typer.prompt(question, default=default, err=True)).strip())
        except CsrError as error:
            print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)


def _count(source: str) -> int:
    """Count the prompts of a source; 0 if that would require reading everything.

    Raises:
        CsrError: The source does not exist, has an unknown format, or is an empty folder.
    """
    from csr_vlm.data.prompts import count_rows

    return count_rows(DataConfig(prompts=source))


def _slug(model: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", Path(model).name.lower()).strip("-.") or "recipe"


def _heading(proposal: Proposal, gpu_gb: float | None, name: str) -> Sequence[str]:
    facts = proposal.facts
    parameters = facts.shape.parameters
    size = f"{parameters / 1e9:.1f} billion" if parameters >= 1e8 else f"{parameters / 1e6:.1f} million"
    kind = f"type {facts.model_type}, " if facts.model_type else ""
    where = "a CPU" if gpu_gb is None else f"one GPU with {gpu_gb:.0f} GB"
    return (
        f"Written by csr init for {proposal.config.model.path} ({kind}{size} parameters) on {where}.",
        "1. Check settings, data, model and cost:   csr check " + name,
        f"2. Try one iteration on 200 pictures:      csr run {name} data.limit=200 iterations=1 --out runs/try",
        "3. Read the quality checks:                csr audit runs/try",
        "4. Run it:                                 csr run " + name,
        "docs/configuration.md lists every option.",
    )


def _finish(proposal: Proposal, path: Path, name: str, gpu_gb: float | None, *, offline: bool) -> None:
    """Print the estimate, what the user has to know, and the path of the recipe."""
    from csr_vlm.cli.check import print_estimate
    from csr_vlm.pipeline.estimate import estimate
    from csr_vlm.pipeline.recipe_proposal import hardware_of

    reporter = console.reporter() if not console.mode.json else Silent()
    costs = estimate(proposal.config, reporter, offline=offline, hardware=hardware_of(gpu_gb))
    then = f"csr check {name}"
    if console.mode.json:
        console.done(path, settings=proposal.config.dump(), notes=list(proposal.notes), **costs.dump())
        return
    print_estimate(costs)
    for note in proposal.notes:
        print(f"note: {note}", file=sys.stderr)
    console.done(path, then=then)

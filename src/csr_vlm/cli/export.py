"""Implement ``csr export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import BaseModel, RunArgument
from csr_vlm.store.run import Run


class Format(StrEnum):
    """Enumerate the formats of exported pairs; a test compares them with data.formats."""

    TRL = "trl"
    LLAVA = "llava"
    LLAMAFACTORY = "llamafactory"
    SWIFT = "swift"
    RLAIFV = "rlaifv"
    SENTINEL = "sentinel"


class Pairs(StrEnum):
    """Enumerate which pairs are exported."""

    TRAINED = "trained"
    RESPONSES = "responses"


def export(
    target: RunArgument,
    form: Annotated[Format, typer.Option("--format", help="Format of another trainer.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.")],
    iteration: Annotated[int | None, typer.Option(min=1, help="Iteration (default: last with pairs).")] = None,
    which: Annotated[
        Pairs,
        typer.Option(
            "--pairs",
            help="trained: what the iteration trained on, question pairs too; responses: pairs of whole responses from "
            "the same ledger.",
        ),
    ] = Pairs.TRAINED,
    copy_images: Annotated[
        bool, typer.Option("--copy-images", help="Copy the images (default: refer to them by absolute paths).")
    ] = False,
    base_model: BaseModel = None,
) -> None:
    """Export preference pairs for another trainer.

    Writes the pairs that the iteration trained on, and a dataset card. Pairs of sibling sentences
    (method.pairs.between: siblings) keep the context that both sentences continue. For trainers that end every
    response (llava, llamafactory, rlaifv), the prompt asks for the next sentence.

    Example: csr export runs/d0 --format trl --out pairs-trl --copy-images
    """
    from csr_vlm.pipeline.exporting import export_pairs

    run = Run.open(target)
    console.quiet_libraries()
    with run.locked_to_write(out), console.reporter().stage("writing pairs", 0):
        written, selection = export_pairs(
            run,
            iteration,
            form.value,
            out,
            whole_responses=which is Pairs.RESPONSES,
            copy_images=copy_images,
            base_model=base_model,
        )
    for line in selection.summary():
        console.log(line)
    then = "see docs/data.md for loading them in the other trainer"
    console.done(
        written,
        then=then,
        pairs=selection.num_pairs,
        questions=selection.num_questions,
        questions_left_out=selection.questions_left_out,
        iteration=selection.iteration,
    )

"""Implement ``csr export``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument
from csr_vlm.core.errors import CsrError
from csr_vlm.store.run import Run


class Format(StrEnum):
    """Enumerate the formats of exported pairs; a test compares them with data.formats."""

    TRL = "trl"
    LLAVA = "llava"
    LLAMAFACTORY = "llamafactory"
    SWIFT = "swift"
    RLAIFV = "rlaifv"


def export(
    target: RunArgument,
    form: Annotated[Format, typer.Option("--format", help="Format of another trainer.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.")],
    iteration: Annotated[int | None, typer.Option(min=1, help="Iteration (default: last with pairs).")] = None,
    copy_images: Annotated[
        bool, typer.Option("--copy-images", help="Copy the images (default: refer to them by absolute paths).")
    ] = False,
) -> None:
    """Export preference pairs for another trainer.

    Other trainers append an end token to every response, so pairs of sibling sentences (method.pairs.between: siblings)
    are replaced by pairs of whole responses from the same ledger.

    Example: csr export runs/d0 --format trl --out pairs-trl --copy-images
    """
    from csr_vlm.data.external_pairs import write_pairs
    from csr_vlm.data.images import require_same_image
    from csr_vlm.pipeline import stages

    run = Run.open(target)
    number = iteration or max(run.iterations_done("pairs"), default=0)
    if not run.is_done(number, "pairs"):
        raise CsrError(f"iteration {number or 1} of {target} has no pairs", f"csr pairs {target}")
    with run.locked_to_write(out), console.reporter().stage("writing pairs", 0):
        pairs = stages.whole_response_pairs(run, number)
        for prompt in {pair.prompt.image: pair.prompt for pair in pairs}.values():
            require_same_image(prompt)
        written = write_pairs(pairs, form.value, out, copy_images=copy_images, origin=run.config.model.path)
    console.log(f"exported {len(pairs)} pairs of iteration {number}")
    then = "see docs/data.md for loading them in the other trainer"
    console.done(written, then=then, pairs=len(pairs), iteration=number)

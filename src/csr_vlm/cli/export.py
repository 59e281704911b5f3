"""``csr export``: an iteration's pairs in other programs' formats."""

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
    """Formats that pairs are exported in; a test holds them against data.formats."""

    TRL = "trl"
    LLAVA = "llava"
    LLAMAFACTORY = "llamafactory"
    SWIFT = "swift"
    RLAIFV = "rlaifv"


def export(
    target: RunArgument,
    form: Annotated[Format, typer.Option("--format", help="Whose format.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the files.")],
    iteration: Annotated[int | None, typer.Option(min=1, help="Whose pairs; the last one's by default.")] = None,
    copy_images: Annotated[
        bool, typer.Option("--copy-images", help="Take the images along; otherwise absolute paths name them.")
    ] = False,
) -> None:
    """Write the pairs of an iteration for another trainer.

    Other trainers end every response, so pairs of unfinished ones (method.pairs.between:
    siblings) are replaced by pairs of whole responses from the same ledger.

    Example: csr export runs/d0 --format trl --out pairs-trl --copy-images
    """
    from csr_vlm.data.external_pairs import write_pairs
    from csr_vlm.pipeline import stages

    opened = Run.open(target)
    number = iteration or max(opened.iterations_done("pairs"), default=0)
    if not opened.is_done(number, "pairs"):
        raise CsrError(f"iteration {number or 1} of {target} has no pairs", f"csr pairs {target}")
    with console.reporter().stage("writing pairs", 0):
        pairs = stages.whole_response_pairs(opened, number)
        written = write_pairs(pairs, form.value, out, copy_images=copy_images, origin=opened.config.model.path)
    console.log(f"{len(pairs)} pairs of iteration {number}")
    then = "docs/data.md shows how the other program reads them"
    console.done(written, then=then, pairs=len(pairs), iteration=number)

"""Implement ``csr convert``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli import console


class Dtype(StrEnum):
    """Enumerate the types in which tensors can be written."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Directory of the original checkpoint.")],
    out: Annotated[Path, typer.Option("--out", help="New directory for the converted checkpoint.")],
    base: Annotated[str | None, typer.Option(help="Base model of a LoRA or a projector.")] = None,
    vision: Annotated[
        str | None, typer.Option(help="Vision tower (default: the one that the checkpoint contains or names).")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of all tensors (default: that of the embeddings).")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge a LoRA into the weights (default: write it to OUT/adapter).")
    ] = False,
    check: Annotated[bool, typer.Option(help="Read both checkpoints again and compare them.")] = True,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Maximum size of a file and of memory, in GB.")] = 4.0,
) -> None:
    """Convert an original LLaVA checkpoint for transformers.

    Example: csr convert llava-v1.5-7b --out llava-hf
    """
    console.quiet_libraries()
    from csr_vlm.convert.conversion import convert as convert_checkpoint

    with console.reporter().stage("converting", 0):
        summary = convert_checkpoint(
            source,
            out,
            base=base,
            vision=vision,
            dtype=dtype.value if dtype else None,
            merge=merge,
            check=check,
            shard_bytes=int(max_shard_gb * 1e9),
        )
    if console.mode.json:
        console.print_json({"out": str(out), **summary})
    else:
        console.print_table(str(out), ["", ""], [[name, str(value)] for name, value in summary.items()])
        console.log(f"next: csr check RECIPE model.path={out}")

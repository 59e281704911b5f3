"""``csr convert``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli import console


class Dtype(StrEnum):
    """What tensors are written as."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Directory of the original checkpoint.")],
    out: Annotated[Path, typer.Option("--out", help="New directory for the converted one.")],
    base: Annotated[str | None, typer.Option(help="Model that a LoRA or a projector belongs to.")] = None,
    vision: Annotated[
        str | None, typer.Option(help="Vision tower; by default what the checkpoint holds or names.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of all tensors; the embeddings' by default.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add a LoRA to the weights; it is OUT/adapter else.")] = False,
    check: Annotated[bool, typer.Option(help="Read both sides again and compare.")] = True,
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Most GB of one file, and of memory held.")] = 4.0,
) -> None:
    """Turn an original LLaVA-format checkpoint into one that transformers loads.

    Example: csr convert llava-v1.5-7b --vision openai/clip-vit-large-patch14-336 --out llava-hf
    """
    console.quiet_libraries()
    from csr_vlm.convert.conversion import convert as convert_checkpoint

    with console.reporter().stage("converting", 0):
        found = convert_checkpoint(
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
        console.print_json({"out": str(out), **found})
    else:
        console.print_table(str(out), ["", ""], [[name, str(value)] for name, value in found.items()])
        console.log(f"next: csr check RECIPE model.path={out}")

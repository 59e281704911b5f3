"""Reading an iteration's ledger whole, and packing its many small parts into few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Progress
from csr_vlm.core.records import Node, Prompt
from csr_vlm.store import parts, tables
from csr_vlm.store.run import Run


def trees(run: Run, iteration: int) -> Iterator[list[Node]]:
    """Yield each prompt's nodes, in the order of the prompts; one row group of them is held.

    Raises:
        CsrError: The iteration was not generated completely, or what is there is not what was generated.
    """
    return _checked_trees(run, complete_parts(run, iteration))


def complete_parts(run: Run, iteration: int) -> list[Path]:
    """List the parts of an iteration's ledger.

    Raises:
        CsrError: Some are missing.
    """
    if not run.is_done(iteration, "generate"):
        raise CsrError(f"iteration {iteration} of {run.root} is not generated", f"csr generate {run.root}")
    found, needed = run.ledger_parts(iteration), tables.count_groups(run.prompts_path)
    held = sum(len(parts.items_of(part)) for part in found)
    if held != needed:
        raise CsrError(
            f"iteration {iteration} of {run.root} has {held} ledger parts where its prompts make {needed}",
            f"restore them; or delete what is in {run.iteration(iteration) / 'done'} and in ledger/, and run again",
        )
    return found


def _checked_trees(run: Run, found: Sequence[Path]) -> Iterator[list[Node]]:
    prompts = run.prompts()
    for part in found:
        for prompt_id, nodes in tables.read_trees(part):
            prompt = next(prompts, None)
            if prompt is None or prompt.prompt_id != prompt_id:
                raise _foreign(part)
            yield nodes
    if next(prompts, None) is not None:
        raise _foreign(found[-1])


def trees_of(part: Path, prompts: Sequence[Prompt]) -> list[list[Node]]:
    """Read some prompts' nodes from one part; prompt by prompt, in their order.

    Raises:
        CsrError: It does not hold them.
    """
    wanted = [prompt.prompt_id for prompt in prompts]
    found = groupby(tables.read_nodes_of(part, wanted), key=lambda node: node.prompt_id)
    by_id = {prompt_id: list(nodes) for prompt_id, nodes in found}
    if list(by_id) != wanted:
        raise _foreign(part)
    return list(by_id.values())


def _foreign(part: Path) -> CsrError:
    return CsrError(f"{part} does not hold the trees of its prompts", "restore it, or generate again")


def pack(run: Run, iteration: int, most_bytes: int, progress: Progress) -> None:
    """Join neighbouring parts of a complete ledger into files of at most so many bytes.

    Nothing is decoded, and whatever reads the ledger reads the same rows. A packed file is
    complete before the first of its parts goes, so that a kill in between loses nothing; what
    it leaves is removed by the next call.

    Raises:
        CsrError: The ledger is not complete, or a part is damaged.
    """
    for neighbours in _gathered(complete_parts(run, iteration), most_bytes):
        if len(neighbours) > 1:
            items = range(parts.items_of(neighbours[0]).start, parts.items_of(neighbours[-1]).stop)
            tables.join_nodes(neighbours[0].with_name(parts.packed_name(items)), neighbours)
        progress.advance(len(neighbours))
    _, packed = parts.existing(run.iteration(iteration) / "ledger")
    for part in packed:
        part.unlink()


def _gathered(found: Sequence[Path], most_bytes: int) -> Iterator[list[Path]]:
    """Yield neighbours whose sizes fit together; a part that is too large stays alone."""
    group: list[Path] = []
    size = 0
    for part in found:
        own = part.stat().st_size
        if group and size + own > most_bytes:
            yield group
            group, size = [], 0
        group.append(part)
        size += own
    if group:
        yield group

"""Read an iteration's ledger, and pack its many small parts into few files."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Progress
from csr_vlm.core.records import Node, Prompt
from csr_vlm.store import parts, tables
from csr_vlm.store.run import Run


def trees(run: Run, iteration: int) -> Iterator[list[Node]]:
    """Yield the nodes of each prompt, in the order of the prompts, holding one row group in memory.

    The tree of a prompt that failed in the search is empty.

    Raises:
        CsrError: The iteration was not generated completely, or a part does not match its prompts.
    """
    return _checked_trees(run, complete_parts(run, iteration), run.failed_prompts(iteration))


def complete_parts(run: Run, iteration: int) -> list[Path]:
    """Return the parts of an iteration's ledger.

    Raises:
        CsrError: The iteration was not generated completely, or parts are missing.
    """
    run.require_generated(iteration)
    run.verify(iteration, "generate")
    run.require_prompts_unchanged()
    paths, num_items = run.ledger_parts(iteration), tables.count_groups(run.prompts_path)
    num_parts = sum(len(parts.items_of(path)) for path in paths)
    if num_parts != num_items:
        raise CsrError(
            f"iteration {iteration} of {run.root} has {num_parts} ledger parts instead of {num_items}",
            f"restore them; or delete the contents of {run.iteration(iteration) / 'done'} and ledger/, and run again",
        )
    return paths


def _checked_trees(run: Run, paths: Sequence[Path], failed: Container[str]) -> Iterator[list[Node]]:
    prompt_ids = (prompt.prompt_id for prompt in run.prompts())
    for path in paths:
        for prompt_id, nodes in tables.read_trees(path):
            for expected in prompt_ids:
                if expected == prompt_id:
                    break
                if expected not in failed:
                    raise _mismatch(path)
                yield []
            else:
                raise _mismatch(path)
            yield nodes
    for expected in prompt_ids:
        if expected not in failed:
            raise _mismatch(paths[-1])
        yield []


def trees_of(part: Path, prompts: Sequence[Prompt], failed: Container[str] = ()) -> list[list[Node]]:
    """Return the nodes of some prompts from one part, prompt by prompt, in the part's order.

    Args:
        part: A part of the ledger.
        prompts: Prompts of the part.
        failed: Ids of the prompts that failed in the search, whose trees are empty.

    Raises:
        CsrError: The part does not hold exactly these prompts in this order.
    """
    searched = [prompt.prompt_id for prompt in prompts if prompt.prompt_id not in failed]
    prompt_ids = [prompt.prompt_id for prompt in prompts]
    groups = groupby(tables.read_nodes_of(part, prompt_ids), key=lambda node: node.prompt_id)
    by_id = {prompt_id: list(nodes) for prompt_id, nodes in groups}
    if list(by_id) != searched:
        raise _mismatch(part)
    return [by_id.get(prompt_id, []) for prompt_id in prompt_ids]


def _mismatch(part: Path) -> CsrError:
    return CsrError(f"{part} does not hold the trees of its prompts", "restore it, or generate again")


def nodes_of(run: Run, iteration: int, prompt_ids: Sequence[str]) -> dict[str, list[Node]]:
    """Return the nodes of some prompts without decoding the other rows, of which a ledger has millions.

    Raises:
        CsrError: A part of the finished ledger is missing or was changed.
    """
    if run.is_done(iteration, "generate"):
        run.verify(iteration, "generate")
    nodes: dict[str, list[Node]] = {}
    for part in run.ledger_parts(iteration):
        for node in tables.read_nodes_of(part, prompt_ids):
            nodes.setdefault(node.prompt_id, []).append(node)
    return nodes


def pack(run: Run, iteration: int, max_bytes: int, progress: Progress) -> None:
    """Join adjacent parts of a complete ledger into files of at most ``max_bytes`` bytes.

    Rows are not decoded, and readers of the ledger see the same rows. A packed file is complete
    before its parts are deleted, so a kill in between loses nothing; what it leaves behind is
    deleted by the next call.

    Raises:
        CsrError: The ledger is incomplete, or a part is damaged.
    """
    with rewriting(run, iteration):
        for adjacent in _groups_by_size(complete_parts(run, iteration), max_bytes):
            if len(adjacent) > 1:
                items = range(parts.items_of(adjacent[0]).start, parts.items_of(adjacent[-1]).stop)
                tables.join_nodes(adjacent[0].with_name(parts.packed_name(items)), adjacent)
            progress.advance(len(adjacent))
        _, obsolete = parts.list_parts(run.iteration(iteration) / "ledger")
        for part in obsolete:
            part.unlink()


@contextmanager
def rewriting(run: Run, iteration: int) -> Iterator[None]:
    """Let the parts of a finished ledger be replaced, and record their new checksums.

    In between, the marker holds none, so a kill leaves no checksum that is wrong.

    Raises:
        CsrError: A part is missing or was changed before.
    """
    run.verify(iteration, "generate")
    result = {key: value for key, value in run.result(iteration, "generate").items() if key != "files"}
    run.mark_done(iteration, "generate", **result)
    yield
    run.mark_done(iteration, "generate", run.ledger_files(iteration), **result)


def _groups_by_size(paths: Sequence[Path], max_bytes: int) -> Iterator[list[Path]]:
    """Yield groups of adjacent parts that fit into ``max_bytes``; a larger part is a group of its own."""
    group: list[Path] = []
    group_bytes = 0
    for path in paths:
        num_bytes = path.stat().st_size
        if group and group_bytes + num_bytes > max_bytes:
            yield group
            group, group_bytes = [], 0
        group.append(path)
        group_bytes += num_bytes
    if group:
        yield group

"""Drop prompts that fail in the search, up to a share of all prompts that stops the run.

What one prompt raises costs that prompt, not hours of work: its tree stays empty, and its id and reason are stored
beside the ledger. What concerns all prompts still stops the run: errors that the user has to solve, a lack of memory,
and the files themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from csr_vlm.core.errors import CsrError, PromptError, reason_of
from csr_vlm.core.records import Prompt
from csr_vlm.method.search import Tree
from csr_vlm.store.run import Run

MAX_FEW = 3
"""Failed prompts that never stop a run; in a small run each is a large share."""
_MAX_REASON = 300

Search = Callable[[Sequence[Prompt]], Sequence[Tree]]
"""Searches the responses to some prompts."""


def search_or_drop(prompts: Sequence[Prompt], search: Search) -> tuple[list[Tree], dict[str, str]]:
    """Search prompts together; if that fails, find the prompts at fault by halving.

    A tree depends on its own prompt alone, so the trees of the others are the same.

    Returns:
        The trees of the prompts that did not fail, in their order, and the reason by the id of each that did.

    Raises:
        CsrError: The problem concerns more than one prompt; see :func:`is_of_one_prompt`.
    """
    try:
        return list(search(prompts)), {}
    except Exception as error:
        if not is_of_one_prompt(error):
            raise
        if len(prompts) == 1:
            message = error.message if isinstance(error, CsrError) else f"{type(error).__name__}: {reason_of(error)}"
            return [], {prompts[0].prompt_id: " ".join(message.split())[:_MAX_REASON]}
    half = len(prompts) // 2
    first_trees, first_failed = search_or_drop(prompts[:half], search)
    trees, failed = search_or_drop(prompts[half:], search)
    return [*first_trees, *trees], {**first_failed, **failed}


def is_of_one_prompt(error: Exception) -> bool:
    """Return whether an error can be the fault of a single prompt."""
    if isinstance(error, CsrError):
        return isinstance(error, PromptError)
    return not isinstance(error, MemoryError | OSError | ImportError) and not is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a GPU ran out of memory; torch need not be loaded for the answer."""
    return type(error).__name__ == "OutOfMemoryError"


def require_few_failures(run: Run, failed: Mapping[str, str], iteration: int) -> None:
    """Verify that no more prompts failed than ``data.max_failed_share`` allows.

    Raises:
        CsrError: More did.
    """
    allowed = max(run.config.data.max_failed_share * run.num_prompts, MAX_FEW)
    if len(failed) <= allowed:
        return
    (reason, _), *_ = Counter(failed.values()).most_common(1)
    raise CsrError(
        f"iteration {iteration}: {len(failed)} of {run.num_prompts} prompts failed in the search, such as "
        f"{next(iter(failed))}: {reason}",
        "if the others are worth it, raise data.max_failed_share and run again with the same --out",
    )

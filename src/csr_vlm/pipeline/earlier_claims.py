"""Count the claims that the policies of earlier iterations made about the same prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from csr_vlm.core.records import Prompt
from csr_vlm.method.claim_evidence import thing_of
from csr_vlm.store import parts, tables
from csr_vlm.store.run import Run


class EarlierClaims:
    """Read from the ledgers of the iterations before one what the trees of a work item claimed.

    Args:
        run: Run whose earlier iterations have finished searching.
        iteration: Iteration that searches now.
    """

    def __init__(self, run: Run, iteration: int) -> None:
        earlier = range(1, iteration) if run.config.method.uses_claims else ()
        self._parts: list[dict[int, Path]] = [
            {item: part for part in run.ledger_parts(number) for item in parts.items_of(part)} for number in earlier
        ]

    def of(self, item: int, prompts: Sequence[Prompt]) -> Counter[tuple[str, str]] | None:
        """Count the sampled sentences that make each claim, by prompt and thing.

        None in the first iteration, and if the settings do not use claims.
        """
        if not self._parts:
            return None
        ids = [prompt.prompt_id for prompt in prompts]
        made: Counter[tuple[str, str]] = Counter()
        for by_item in self._parts:
            for node in tables.read_nodes_of(by_item[item], ids) if item in by_item else ():
                made.update((node.prompt_id, thing) for thing in {thing_of(claim) for claim in node.claims})
        return made

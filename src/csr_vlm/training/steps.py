"""Choose the pairs of every step, and read and encode them while the model computes.

The pairs about an image stay together, as far as a step has room for them, because they share a
row. The images are shuffled in every epoch. Which pairs a step takes depends on the pairs, the seed
and the epoch alone, so it is the same for any number of processes and after a restart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Pair
from csr_vlm.store.tables import PairFiles
from csr_vlm.training.collator import PairCollator

Integers = npt.NDArray[np.int64]


class StepPlan:
    """Divide the pairs of an epoch into steps.

    The pairs about one image form units of at most ``pairs_per_step``. An epoch has ceil(number of pairs /
    pairs_per_step) steps. A step takes whole units, in shuffled order, so steps differ in size by up to
    a unit; the boundaries are those nearest to equal sizes.

    Args:
        group_sizes: Number of pairs about each image; the pairs of an image are numbered consecutively.
        pairs_per_step: Mean number of pairs of a step.
        seed: Seed of the order.

    Example:
        >>> plan = StepPlan([2, 3, 1], pairs_per_step=3, seed=0)
        >>> [plan.pairs(0, step).tolist() for step in range(plan.num_steps)]
        [[5, 0, 1], [2, 3, 4]]
    """

    def __init__(self, group_sizes: Sequence[int] | Integers, pairs_per_step: int, seed: int) -> None:
        sizes = np.asarray(group_sizes, dtype=np.int64)
        self._starts, self._sizes = _units(sizes, pairs_per_step)
        self._seed = seed
        self.num_pairs = int(sizes.sum())
        self.num_steps = ceil(self.num_pairs / pairs_per_step)
        self._epoch = -1
        self._order: Integers = np.empty(0, dtype=np.int64)
        self._cuts: Integers = np.empty(0, dtype=np.int64)

    def pairs(self, epoch: int, step: int) -> Integers:
        """Return the numbers of the pairs of a step; those about one image are adjacent."""
        self._shuffle(epoch)
        units = self._order[self._cuts[step] : self._cuts[step + 1]]
        return np.concatenate([np.arange(self._starts[u], self._starts[u] + self._sizes[u]) for u in units])

    def _shuffle(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._sizes))
        ends = np.concatenate([[0], np.cumsum(self._sizes[self._order])])
        cuts = [0]
        for step in range(1, self.num_steps):
            goal = step * self.num_pairs / self.num_steps
            right = int(np.searchsorted(ends, goal))
            nearest = right if ends[right] - goal <= goal - ends[right - 1] else right - 1
            # Every step takes at least one unit, and leaves one for each step after it.
            cuts.append(min(max(nearest, cuts[-1] + 1), len(self._sizes) - (self.num_steps - step)))
        self._cuts = np.array([*cuts, len(self._sizes)])


def _units(group_sizes: Integers, largest: int) -> tuple[Integers, Integers]:
    """Cut groups into units of nearly equal sizes, at most ``largest``; return their starts and sizes."""
    parts = -(-group_sizes // largest)
    first = np.repeat(np.cumsum(parts) - parts, parts)
    number = np.arange(len(first)) - first  # of the unit in its group
    size, parts_of_unit = np.repeat(group_sizes, parts), np.repeat(parts, parts)
    sizes = size // parts_of_unit + (number < size % parts_of_unit)
    return np.cumsum(sizes) - sizes, sizes


@dataclass
class StepDataset(Dataset[dict[str, Any]]):  # type: ignore[misc]
    """Build the passes of this process for each step; the steps of all epochs are numbered consecutively."""

    files: PairFiles
    plan: StepPlan
    collator: PairCollator
    process: int = 0
    num_processes: int = 1
    reference: Any = None
    """Reference log-probabilities of what is trained on, of shape (pairs, 2), in nats; None for those in the files."""

    def __len__(self) -> int:
        return self.plan.num_steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Return the passes of a step, and the number of pairs of the step in all processes.

        An error is returned as its message and hint: torch would lose the hint on the way from a worker.
        """
        try:
            chosen = self.plan.pairs(*divmod(step, self.plan.num_steps))
            share = np.array_split(chosen, self.num_processes)[self.process]
            # A process without a pair computes one of another, with weight 0.
            passes = self.collator.passes(self._read(share if len(share) else chosen[:1]))
            return {"passes": passes, "num_pairs": len(chosen), "is_idle": not len(share)}
        except CsrError as error:
            return {"error": (error.message, error.hint)}

    def _read(self, numbers: Integers) -> list[Pair]:
        pairs = self.files[numbers]
        if self.reference is None:
            return pairs
        return [
            replace(
                pair,
                chosen=replace(pair.chosen, logprob=float(values[0])),
                rejected=replace(pair.rejected, logprob=float(values[1])),
                shared_logprob=0.0,
            )
            for pair, values in zip(pairs, self.reference[numbers], strict=True)
        ]


class _EpochSteps(Sampler[list[int]]):  # type: ignore[misc]
    """Yield the numbers of an epoch's steps, each as a batch of its own."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. Where training resumes inside an epoch, transformers calls this."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        first = self._epoch * self._num_steps
        return ([step] for step in range(first, first + self._num_steps))

    def __len__(self) -> int:
        return self._num_steps


class StepLoader(DataLoader[Any]):  # type: ignore[misc]
    """Load the steps of an epoch; workers prepare the next ones while the model computes.

    Args:
        dataset: Steps to load.
        workers: Number of worker processes; 0 prepares every step when it is needed.
        prefetch: Number of steps that each worker prepares ahead; None for torch's default.
        pin_memory: Whether to copy the tensors to pinned memory.
    """

    def __init__(self, dataset: StepDataset, workers: int, prefetch: int | None, *, pin_memory: bool) -> None:
        self._steps = _EpochSteps(len(dataset))
        super().__init__(
            dataset,
            batch_sampler=self._steps,
            collate_fn=_only_item,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            # A forked worker shares the policy, whose weights it does not use.
            multiprocessing_context="fork" if workers else None,
            pin_memory=pin_memory,
            # The default generator's state belongs to the checkpoints.
            generator=torch.Generator(),
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; transformers calls this before it iterates."""
        self._steps.set_epoch(epoch)


def _only_item(items: list[dict[str, Any]]) -> dict[str, Any]:
    (item,) = items
    return item

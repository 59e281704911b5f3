"""Define the run directory: where the files of a run are, and which stages are finished.

A stage writes its results first and its marker last, so a run that is killed at any instant
resumes from its finished stages. The manifest is derived from the markers.

    RUN/config.yaml                   the resolved configuration
    RUN/manifest.json                 provenance, counts, drops, timings
    RUN/prompts.parquet               prompts that passed the checks
    RUN/images/                       images that were given as bytes, each named by its hash
    RUN/iteration-N/ledger/part-*     every node that iteration N generated
    RUN/iteration-N/failed/item-*     prompts that failed in the search, and why
    RUN/iteration-N/pairs.parquet
    RUN/iteration-N/adapter/          LoRA after iteration N, relative to the base model
    RUN/iteration-N/eval/*.json       iteration-0 is the base model
    RUN/iteration-N/done/*.json       one marker per finished stage
    RUN/progress.json                 progress of the running process, for csr watch
    RUN/adapter/  RUN/model/  RUN/report.html
"""

from __future__ import annotations

import difflib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from csr_vlm.config.load import resolve, without_unused_options
from csr_vlm.config.schema import RunConfig
from csr_vlm.config.yaml import read_yaml
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import SCHEMA_VERSION, Pair, Prompt
from csr_vlm.core.secrets import without_secrets
from csr_vlm.store import files, parts
from csr_vlm.store.lock import is_locked, lock_directory
from csr_vlm.store.stage_names import GATES

if TYPE_CHECKING:
    import pyarrow as pa

_CHANGEABLE = frozenset(
    {"data.max_failed_share", "generation.max_rows", "tracking.to", "tracking.project", "tracking.examples"}
)
"""Settings that change no result and may change while a run is under way."""
_PACKAGES = ("csr-vlm", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "pyarrow", "numpy")


@dataclass(frozen=True)
class Run:
    """Hold a run directory and its configuration.

    Iterations are numbered from 1; iteration 0 is the base model.
    """

    root: Path
    config: RunConfig
    new_directories: tuple[Path, ...] | None = field(default=None, compare=False, repr=False)
    """Directories that :meth:`create` made, innermost first; None if the run, or other files, were there before."""

    @classmethod
    def create(cls, root: Path, config: RunConfig) -> Run:
        """Create a run, or reopen an existing one with the same settings and at least as many iterations.

        If a new run fails under its lock (:meth:`locked`) before it finishes a stage, its directory is deleted.

        Raises:
            CsrError: The directory holds a run with other settings that has finished a stage, or is in use.
        """
        run = cls.planned(root, config)
        new_directories = None
        if not root.exists() or not any(root.iterdir()):
            new_directories = tuple(path for path in (root, *root.parents) if not path.exists())
        text = yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True)
        with files.disk_errors(root):
            root.mkdir(parents=True, exist_ok=True)
        with lock_directory(root):  # never replace the configuration of a run that is working
            files.write_checksummed_text(root / "config.yaml", text)
        return replace(run, new_directories=new_directories)

    @classmethod
    def planned(cls, root: Path, config: RunConfig) -> Run:
        """Return what :meth:`create` would return, without writing anything.

        Raises:
            CsrError: The directory holds a run with other settings that has finished a stage.
        """
        if (root / "config.yaml").exists():
            existing = cls.open(root)
            engines = config.generation.engine, existing.config.generation.engine
            if engines in {("auto", "transformers"), ("auto", "vllm")}:
                config = config.with_engine(engines[1])  # auto was not the default before 0.2
            differing = sorted(differences(existing.config.dump(), config.dump()))
            if config.iterations > existing.config.iterations:
                differing = [key for key in differing if key != "iterations"]
            differing = [key for key in differing if key not in _CHANGEABLE]
            # A run without a finished stage has no results that other settings would contradict.
            if differing and existing.has_finished_stage:
                raise CsrError(
                    f"{root} holds a run with other settings: {', '.join(differing[:6])}",
                    f"use --out DIR for a new run, or the same settings to resume: csr run {root}",
                )
        if root.exists() and not root.is_dir():
            raise CsrError(f"{root} is a file, not a run directory", "choose another directory")
        return cls(root, config)

    @classmethod
    def open(cls, root: str | Path) -> Run:
        """Open an existing run.

        Raises:
            CsrError: The directory is not a run, or its configuration is invalid or was changed.
        """
        root = Path(root)
        path = root / "config.yaml"
        if not path.is_file():
            raise CsrError(f"{root} is not a run directory", _run_hint(root))
        hint = "restore it, or start a new run"
        files.require_text_unchanged(path, hint)
        layer = read_yaml(path, hint)
        try:
            return cls(root, resolve(without_unused_options(layer)))
        except CsrError as error:
            raise CsrError(f"{path}: {error.message}", error.hint or hint) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory against a second process, and delete what a killed one left incomplete.

        Raises:
            CsrError: Another process uses the directory, or the disk is full or fails.
        """
        with lock_directory(self.root), files.disk_errors(self.root, of_disk_only=True):
            files.remove_temporaries(self.root)
            try:
                yield
            except Exception:
                if self.new_directories is not None and not self.has_finished_stage:
                    self._delete()
                raise

    def settled(self) -> Run:
        """Return the run with the engine that was chosen for it; ``auto`` is transformers until one is."""
        if self.config.generation.engine != "auto":
            return self
        name = self.result(0, "engine")["name"] if self.is_done(0, "engine") else "transformers"
        return replace(self, config=self.config.with_engine(name))

    @property
    def has_finished_stage(self) -> bool:
        """Return whether any stage is finished."""
        return any(self.root.glob("iteration-*/done/*.json"))

    def _delete(self) -> None:
        """Delete the contents of the directory, and the directories that creating the run made."""
        for path in list(self.root.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for directory in self.new_directories or ():
            with suppress(OSError):  # not empty: another run was created beside this one
                directory.rmdir()

    def is_elsewhere(self, *outputs: Path) -> bool:
        """Return whether no output lies in the run directory."""
        root = self.root.resolve()
        return not any(path.resolve().is_relative_to(root) for path in outputs)

    @contextmanager
    def locked_to_write(self, *outputs: Path) -> Iterator[None]:
        """Lock the run for a command that reads it and writes outputs; a read-only run is only read.

        Raises:
            CsrError: Another process uses the directory, or an output lies in a run that cannot be written.
        """
        if not self.is_elsewhere(*outputs) or os.access(self.root, os.W_OK):
            with self.locked():
                yield
        else:
            yield

    def in_use(self) -> bool:
        """Return whether a process uses the directory now; the lock is taken for an instant at most."""
        try:
            return is_locked(self.root)
        except OSError:  # another user's run, or a read-only disk: the lock cannot be checked without write access
            from csr_vlm.store.progress_file import read_progress

            progress = read_progress(self.root)
            return progress is not None and progress.may_be_running()

    @property
    def prompts_path(self) -> Path:
        """Return the path of the prompts to train on."""
        return self.root / "prompts.parquet"

    @property
    def images_path(self) -> Path:
        """Return the folder of images that were given as bytes."""
        return self.root / "images"

    @property
    def heldout_path(self) -> Path:
        """Return the path of the held-out prompts."""
        return self.root / "heldout.parquet"

    def metrics(self, iteration: int) -> dict[str, Any]:
        """Return the metrics after an iteration: on the embedded world, or else on held-out prompts.

        Raises:
            CsrError: The iteration is not evaluated.
        """
        evaluation = self.result(iteration, "evaluate")
        metrics: dict[str, Any] = evaluation.get("world") or evaluation.get("heldout") or {}
        return metrics

    def require_prompts_unchanged(self) -> None:
        """Verify that the prompts and the held-out prompts are those that were checked.

        Raises:
            CsrError: A file is missing or was changed.
        """
        if not self.is_done(0, "prompts"):
            return
        if files.sha256_of(self.prompts_path) != self.result(0, "prompts")["sha256"]:
            raise CsrError(
                f"{self.prompts_path} was changed after the inputs were checked",
                f"restore it; or delete {self.iteration(0) / 'done'} and all iterations, and run again",
            )
        self.verify(0, "prompts")

    def heldout(self) -> list[Prompt]:
        """Return the held-out prompts.

        Raises:
            CsrError: Their file, or that of the other prompts, is missing or was changed.
        """
        from csr_vlm.store import tables

        self.require_prompts_unchanged()
        return [prompt for group in tables.prompt_groups(self.heldout_path) for prompt in group]

    @property
    def num_prompts(self) -> int:
        """Return the number of prompts to train on."""
        counts = self.result(0, "prompts")
        return int(counts["accepted"]) - int(counts["heldout"])

    def prompts(self) -> Iterator[Prompt]:
        """Yield the prompts to train on, holding one work item in memory.

        Raises:
            CsrError: Their file, or that of the held-out prompts, is missing or was changed.
        """
        from csr_vlm.store import tables

        self.require_prompts_unchanged()
        return (prompt for group in tables.prompt_groups(self.prompts_path) for prompt in group)

    def require_generated(self, iteration: int) -> None:
        """Check that the ledger of an iteration is complete.

        Raises:
            CsrError: It is not.
        """
        if not self.is_done(iteration, "generate"):
            raise CsrError(f"iteration {iteration} of {self.root} is not generated", f"csr generate {self.root}")

    def ledger_table(self, iteration: int) -> pa.Table:
        """Return the ledger of an iteration as an Arrow table, which has a ``to_pandas`` method.

        Each row is a :class:`csr_vlm.core.records.Node`.

        Raises:
            CsrError: The iteration was not generated completely.
        """
        from csr_vlm.store import tables

        self.require_generated(iteration)
        self.verify(iteration, "generate")
        return tables.read_whole(self.ledger_parts(iteration))

    def pairs_table(self, iteration: int) -> pa.Table:
        """Return the pairs of an iteration as an Arrow table.

        Each row is a :class:`csr_vlm.core.records.Pair`.

        Raises:
            CsrError: The iteration has no pairs yet.
        """
        from csr_vlm.store import tables

        if not self.is_done(iteration, "pairs"):
            raise CsrError(f"iteration {iteration} of {self.root} has no pairs", f"csr pairs {self.root}")
        self.verify(iteration, "pairs")
        return tables.read_whole([self.pairs_path(iteration)])

    def iteration(self, iteration: int) -> Path:
        """Return the folder of an iteration."""
        return self.root / f"iteration-{iteration}"

    def ledger_parts(self, iteration: int) -> list[Path]:
        """Return the existing parts of an iteration's ledger, in prompt order."""
        return parts.list_parts(self.iteration(iteration) / "ledger")[0]

    def failures_path(self, iteration: int, item: int) -> Path:
        """Return the path of the prompts of a work item that failed in the search; absent if none did."""
        return self.iteration(iteration) / "failed" / f"item-{item:06d}.json"

    def ledger_files(self, iteration: int) -> list[Path]:
        """Return all files of an iteration's search: the parts of the ledger, and the prompts that failed."""
        return [*self.ledger_parts(iteration), *sorted((self.iteration(iteration) / "failed").glob("item-*.json"))]

    def failed_prompts(self, iteration: int) -> dict[str, str]:
        """Return the reason by the id of each prompt that failed in the search of an iteration.

        Raises:
            CsrError: A file is damaged.
        """
        failed: dict[str, str] = {}
        for path in sorted((self.iteration(iteration) / "failed").glob("item-*.json")):
            failed |= files.read_document(path)
        return failed

    def pairs_path(self, iteration: int) -> Path:
        """Return the path of an iteration's pairs."""
        return self.iteration(iteration) / "pairs.parquet"

    def questions_path(self, iteration: int) -> Path:
        """Return the path of an iteration's pairs of yes-or-no answers; absent if nothing is asked."""
        return self.iteration(iteration) / "questions.parquet"

    def question_parts(self, iteration: int) -> Path:
        """Return the folder of the same pairs by work item, which exists until all items are done."""
        return self.iteration(iteration) / "questions"

    def training_paths(self, iteration: int) -> list[Path]:
        """Return the files of pairs that an iteration trains on, as its stage wrote them.

        Raises:
            CsrError: The iteration has no pairs yet, or a file is missing or was changed.
        """
        self.verify(iteration, "pairs")
        return [path for path in (self.pairs_path(iteration), self.questions_path(iteration)) if path.exists()]

    def pairs(self, iteration: int) -> Iterator[Pair]:
        """Yield the pairs of an iteration, without its question pairs, as its stage wrote them.

        Raises:
            CsrError: The iteration has no pairs yet, or a file is missing or was changed.
        """
        from csr_vlm.store import tables

        self.verify(iteration, "pairs")
        return tables.read_pairs(self.pairs_path(iteration))

    def verify(self, iteration: int, stage: str) -> None:
        """Verify that the files of a finished stage are those that it wrote, as far as its marker recorded them.

        Raises:
            CsrError: A file is missing or was changed.
        """
        from csr_vlm.store import contents

        result = self.result(iteration, stage)
        marker = self._marker(iteration, stage)
        hint = f"restore it; or delete it, {marker} and the markers of all later stages, and run again"
        if stage == "pairs" and "files" not in result:  # version 0.1
            counts = {self.pairs_path(iteration): 1, self.questions_path(iteration): result.get("questions", 0)}
            for path, num_pairs in counts.items():
                if num_pairs and not path.is_file():
                    raise CsrError(f"{path} is missing", hint)
        contents.verify(self.root, result.get("files", {}), hint)

    def unverified_stages(self) -> list[str]:
        """Return the finished stages whose files cannot be verified, because version 0.1 recorded no checksums."""
        return [
            f"{stage} of iteration {iteration}"
            for stage in ("generate", "pairs", "train")
            for iteration in self.iterations_done(stage)
            if "files" not in self.result(iteration, stage)
        ]

    def trainer_path(self, iteration: int) -> Path:
        """Return the folder of an iteration's checkpoints, which exists until the training is done."""
        return self.iteration(iteration) / "trainer"

    def adapter_path(self, iteration: int) -> Path | None:
        """Return the adapter after an iteration; for the base model, the user's own adapter or None.

        Raises:
            CsrError: The adapter was changed since its training ended.
        """
        if iteration:
            if self.is_done(iteration, "train"):
                self.verify(iteration, "train")
            return self.iteration(iteration) / "adapter"
        initial_adapter = self.config.model.adapter
        return Path(initial_adapter) if initial_adapter is not None else None

    def evaluation_path(self, iteration: int, name: str) -> Path:
        """Return the path of an evaluation's results."""
        return self.iteration(iteration) / "eval" / f"{name}.json"

    def stored_evaluation(self, iteration: int, name: str) -> files.Document:
        """Return an evaluation's results.

        Raises:
            CsrError: The file is missing or damaged, or was changed after it was written.
        """
        hint = "which leaves it out; csr eval RUN --again measures it again"
        return files.read_checksummed(self.evaluation_path(iteration, name), hint)

    def is_done(self, iteration: int, stage: str) -> bool:
        """Return whether a stage is finished."""
        return self._marker(iteration, stage).exists()

    def iterations_done(self, stage: str) -> list[int]:
        """Return the iterations in which a stage is finished."""
        return [iteration for iteration in self._iterations() if self.is_done(iteration, stage)]

    def result(self, iteration: int, stage: str) -> dict[str, Any]:
        """Return the result that a finished stage recorded in its marker.

        Raises:
            CsrError: The marker is missing or damaged, or was changed.
        """
        marker = self._marker(iteration, stage)
        return files.Document(marker, _with_current_keys(files.read_checksummed(marker)))

    def mark_done(self, iteration: int, stage: str, written: Iterable[Path] = (), **result: Any) -> None:
        """Write the marker of a finished stage with its result, and update the manifest.

        Args:
            iteration: Iteration of the stage.
            stage: Name of the stage.
            written: Files of the run whose contents the marker records, for :meth:`verify`.
            result: What the stage measured, as JSON values.
        """
        if paths := list(written):
            from csr_vlm.store import contents

            result = {**result, "files": contents.record(self.root, paths)}
        files.write_checksummed(self._marker(iteration, stage), result)
        self.write_manifest()

    def _marker(self, iteration: int, stage: str) -> Path:
        return self.iteration(iteration) / "done" / f"{stage}.json"

    def _iterations(self) -> range:
        return range(self.config.iterations + 1)

    @property
    def last_trained(self) -> int:
        """Return the last iteration with a finished adapter; 0 if there is none."""
        return max(self.iterations_done("train"), default=0)

    @property
    def stopped_at(self) -> int | None:
        """Return the iteration whose pairs or policy stopped the run; None if it was not stopped."""
        for iteration in range(1, self.config.iterations + 1):
            for stage in GATES:
                if self.is_done(iteration, stage) and self.result(iteration, stage)["stopped"]:
                    return iteration
        return None

    @property
    def is_finished(self) -> bool:
        """Return whether the run was stopped, or has trained and evaluated its last iteration."""
        last = self.config.iterations
        is_evaluated = self.config.evaluation.world is None or self.is_done(last, "evaluate")
        return self.stopped_at is not None or (self.is_done(last, "train") and is_evaluated)

    @property
    def final(self) -> int:
        """Return the iteration whose adapter is the result of the run; 0 if that is the base model."""
        return self.last_trained if self.stopped_at is None else self.stopped_at - 1

    def trained_adapter(self) -> Path:
        """Return the adapter that is the result of the run.

        Raises:
            CsrError: No iteration is trained, or none passed the checks.
        """
        if not self.final:
            hint = (
                f"csr run {self.root}" if self.stopped_at is None else "no iteration passed the checks; see csr audit"
            )
            raise CsrError(f"{self.root} has no trained adapter", hint)
        adapter = self.adapter_path(self.final)
        assert adapter is not None
        return adapter

    @property
    def manifest_path(self) -> Path:
        """Return the path of the manifest."""
        return self.root / "manifest.json"

    def restore_manifest(self) -> None:
        """Write the manifest again from the markers if it is missing or damaged.

        Raises:
            CsrError: A marker is damaged, or the disk is full or fails.
        """
        try:
            files.read_document(self.manifest_path)
        except CsrError:
            self.write_manifest()

    def write_manifest(self) -> None:
        """Write provenance and the results of all finished stages to ``manifest.json``.

        Raises:
            CsrError: A marker is damaged, or the disk is full or fails.
        """
        stages = {
            f"iteration-{iteration}": {
                path.stem: {key: value for key, value in files.read_checksummed(path).items() if key != "files"}
                for path in sorted((self.iteration(iteration) / "done").glob("*.json"))
            }
            for iteration in self._iterations()
        }
        manifest = {
            "schema": SCHEMA_VERSION,
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seed": self.config.seed,
            "preset": stages["iteration-0"].get("prompts", {}).get("preset", {"name": self.config.preset}),
            "versions": versions(),
            "git": _git_commit(),
            "stopped_at": self.stopped_at,
            "final_iteration": self.final,
            "stages": stages,
        }
        files.write_json(self.manifest_path, without_secrets(manifest))


_RENAMED_KEYS = {"fates": "statuses", "signs": "metrics", "findings": "checks", "sign": "metric"}
"""Keys of markers that version 0.1 wrote, and their current names."""


def _with_current_keys(value: Any) -> Any:
    """Rename the keys of version 0.1 in nested plain data."""
    if isinstance(value, dict):
        return {_RENAMED_KEYS.get(key, key): _with_current_keys(item) for key, item in value.items()}
    return [_with_current_keys(item) for item in value] if isinstance(value, list) else value


def _run_hint(root: Path) -> str:
    """Suggest a run with a similar name beside the directory."""
    runs = {path.parent.name: path.parent for path in root.parent.glob("*/config.yaml")}
    close = difflib.get_close_matches(root.name, runs, n=1)
    return f"did you mean {runs[close[0]]}?" if close else "create a run with csr run RECIPE --out DIR"


def differences(left: Any, right: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys in which two nested mappings differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in left.keys() | right.keys():
            yield from differences(left.get(key), right.get(key), f"{prefix}.{key}".lstrip("."))
    elif left != right:
        yield prefix


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that results depend on."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _git_commit() -> str | None:
    """Return the commit of the csr-vlm checkout in use; None for an installed package."""
    try:
        completed = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return completed.stdout.strip() or None if completed.returncode == 0 else None

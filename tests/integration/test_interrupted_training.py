"""Interrupt training at any step: it continues from its last checkpoint and ends with the same bytes."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import statistics
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from benchmarks.memory import megabytes
from transformers import TrainingArguments

from csr_vlm.config.schema import LoraConfig, TrainingConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Pair, Prompt
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.policy import Policy
from csr_vlm.pipeline import stages
from csr_vlm.store.run import Run
from csr_vlm.training import dpo
from csr_vlm.training.dpo import explained, train, trainer_arguments, use_one_device
from csr_vlm.training.steps import StepDataset, StepLoader
from csr_vlm.training.trainer import CsrTrainer
from tests.integration.conftest import small_config
from tests.integration.training_setup import MODEL, response, write_pairs

CONFIG = TrainingConfig.model_validate(
    {
        "lora": {"r": 4, "dropout": 0.2},
        "checkpoint_minutes": 0,
        "trl": {
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "disable_dropout": False,
            "lr_scheduler_type": "cosine",
        },
    }
)
NUM_STEPS = 6
TEXTS = ("There is a red boat.", "There is a dog.", "There is a red boat. There is a car.")


@pytest.fixture(scope="module")
def files(prompts: list[Prompt], policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    pairs = []
    for prompt in prompts[:6]:
        sides = [response(policy, prompt, text) for text in TEXTS]
        pairs += [Pair(prompt, 1, sides[0], sides[1]), Pair(prompt, 1, sides[2], sides[0])]
    return write_pairs(pairs, tmp_path_factory.mktemp("pairs"))


class Interrupted(BaseException):
    """Stand for a kill: nothing in training may catch it."""


@contextmanager
def interrupted_before(step: int) -> Iterator[None]:
    """End a training before its gradients of some step are computed."""
    original = CsrTrainer.training_step

    def training_step(self: CsrTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise Interrupted
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CsrTrainer, "training_step", training_step)
        with pytest.raises(Interrupted):
            yield


def train_in(directory: Path, files: Sequence[Path], config: TrainingConfig = CONFIG, **limits: int) -> dict[str, Any]:
    paths = {"adapter": directory / "adapter", "work": directory / "trainer"}
    return train(files, MODEL, config, previous=None, seed=1, **paths, **limits)


def weights(directory: Path) -> bytes:
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    directory = tmp_path_factory.mktemp("undisturbed")
    return train_in(directory, files), weights(directory)


def test_training_interrupted_at_every_step_ends_with_the_same_bytes(
    files: list[Path], undisturbed: tuple[dict[str, Any], bytes], tmp_path: Path
) -> None:
    for step in range(NUM_STEPS):
        with interrupted_before(step):
            train_in(tmp_path, files)
        # Each training goes on where the one before was interrupted, so one checkpoint is left.
        assert [path.name for path in (tmp_path / "trainer").glob("checkpoint-*")] == [f"checkpoint-{step}"] * (
            step > 0
        )
    result = train_in(tmp_path, files)
    assert len(result["log"]) == NUM_STEPS
    assert (result, weights(tmp_path)) == undisturbed


def test_without_checkpoints_the_result_is_the_same(
    files: list[Path], undisturbed: tuple[dict[str, Any], bytes], tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"checkpoint_minutes": 10.0})
    with interrupted_before(3):
        train_in(tmp_path, files, config)
    assert not list((tmp_path / "trainer").glob("checkpoint-*"))
    assert (train_in(tmp_path, files, config), weights(tmp_path)) == undisturbed


def test_a_finished_training_is_not_repeated_and_other_inputs_start_over(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train_in(tmp_path, files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "trainable_policy", lambda *_: pytest.fail("trained again"))
        assert train_in(tmp_path, files) == first
    other = CONFIG.model_copy(update={"trl": {**CONFIG.trl, "max_steps": 2}})
    assert len(train_in(tmp_path, files, other)["log"]) == 2


def test_an_incomplete_checkpoint_is_not_used(
    files: list[Path], undisturbed: tuple[dict[str, Any], bytes], tmp_path: Path
) -> None:
    with interrupted_before(4):
        train_in(tmp_path, files)
    (tmp_path / "trainer" / "checkpoint-4").rename(tmp_path / "trainer" / "checkpoint-3")
    torn = tmp_path / "trainer" / "checkpoint-5"
    torn.mkdir()
    (torn / "optimizer.pt").write_bytes(b"half")
    (tmp_path / "trainer" / "checkpoint-3").rename(tmp_path / "trainer" / "checkpoint-4")
    assert (train_in(tmp_path, files), weights(tmp_path)) == undisturbed


def test_nothing_of_a_training_remains_in_memory(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    original = CsrTrainer.release

    def release(self: CsrTrainer) -> None:
        alive.extend(weakref.ref(module) for module in (self.model, self.optimizer.optimizer))
        alive.extend(map(weakref.ref, self.model.parameters()))
        original(self)

    monkeypatch.setattr(CsrTrainer, "release", release)
    config = CONFIG.model_copy(update={"trl": {**CONFIG.trl, "max_steps": 1}})
    gc.disable()
    try:
        for iteration in (1, 2):
            train_in(tmp_path / str(iteration), files, config)
            assert len(alive) > 100
            assert not [reference for reference in alive if reference() is not None]
    finally:
        gc.enable()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_hardly_grows_with_the_number_of_pairs(files: list[Path], tmp_path: Path) -> None:
    trl = {**CONFIG.trl, "max_steps": 2, "per_device_train_batch_size": 16}
    config = CONFIG.model_copy(update={"checkpoint_minutes": 10.0, "reference_tolerance": 1e6, "trl": trl})
    peaks = []
    for num_pairs in (1_000, 100_000):
        path = tmp_path / f"{num_pairs}.parquet"
        repeat_pairs(files[0], path, num_pairs)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        assert train_in(tmp_path / str(num_pairs), [path], config)["num_pairs"] == num_pairs
        peaks.append(megabytes("VmHWM"))
    assert peaks[1] < 1.1 * peaks[0], peaks


def repeat_pairs(source: Path, path: Path, num_pairs: int, per_image: int = 10) -> None:
    """Write many pairs about copies of the images of a few; each of those has two pairs in the source."""
    few, folder = pq.read_table(source), path.with_suffix("")
    column = few.schema.get_field_index("image")
    folder.mkdir()
    for number in range(num_pairs // per_image):
        os.link(few["image"][2 * number % len(few)].as_py(), folder / f"{number}.png")
    with pq.ParquetWriter(path, few.schema) as writer:
        for start in range(0, num_pairs, 1_000):
            numbers = range(start, start + 1_000)
            copies = [f"{folder}/{number // per_image}.png" for number in numbers]
            table = few.take([(2 * (number // per_image) + number % 2) % len(few) for number in numbers])
            writer.write_table(table.set_column(column, "image", [copies]))


def test_a_worker_that_dies_is_reported(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = os.getpid()
    original = StepDataset.__getitem__

    def die(self: StepDataset, step: int) -> dict[str, Any]:
        if step == 2 and os.getpid() != trainer:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, step)

    monkeypatch.setattr(StepDataset, "__getitem__", die)
    with pytest.raises(CsrError, match="a worker process that prepares images ended unexpectedly") as raised:
        train_in(tmp_path, files)
    assert "dataloader_num_workers=0" in raised.value.hint


def test_the_trainer_hardly_waits_for_images(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of 20 ms each, two of them a step of 200 ms, are prepared while the steps before run."""
    process, iterate = PromptEncoder.process, StepLoader.__iter__
    waited: list[float] = []

    def slow(self: PromptEncoder, prompt: Prompt) -> Any:
        time.sleep(0.02)
        return process(self, prompt)

    def timed(self: StepLoader) -> Iterator[Any]:
        steps = iterate(self)
        for _ in range(len(self)):
            started = time.perf_counter()
            step = next(steps)
            waited.append(time.perf_counter() - started)
            yield step

    def training_step(self: CsrTrainer, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        time.sleep(0.2)
        self._metrics["train"]["num_tokens"] = [0]
        return sum(p.sum() for p in model.parameters() if p.requires_grad).detach() * 0

    monkeypatch.setattr(PromptEncoder, "process", slow)
    monkeypatch.setattr(StepLoader, "__iter__", timed)
    monkeypatch.setattr(CsrTrainer, "training_step", training_step)
    trl = {**CONFIG.trl, "num_train_epochs": 1, "per_device_train_batch_size": 4}
    train_in(tmp_path, files, CONFIG.model_copy(update={"checkpoint_minutes": 10.0, "trl": trl}))
    # The first step of an epoch waits for the worker to start.
    assert len(waited) == NUM_STEPS // 2
    print(f"waited {statistics.median(waited[1:]) / 0.2:.1%} of a step")
    assert statistics.median(waited[1:]) < 0.02
    assert waited[0] > 0.04, "the images are prepared by the loader"


@pytest.mark.parametrize("message", ["DataLoader worker (pid 7) is killed", "Failed to find C compiler", "unknown"])
def test_errors_of_the_machine_are_explained(policy: Policy, message: str) -> None:
    expected = RuntimeError if message == "unknown" else CsrError
    with pytest.raises(expected), explained(policy):
        raise RuntimeError(message)


def test_memory_that_runs_out_is_reported_with_the_numbers(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2_000_000_000, 24_000_000_000))
    with pytest.raises(CsrError, match=r"22\.0 of 24\.0 GB are in use") as raised, explained(policy):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "training.max_tokens" in raised.value.hint


def test_one_process_trains_on_one_of_several_gpus(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a launcher, transformers counts the visible GPUs, and TRL refuses to train on more than one."""
    set_up = TrainingArguments._setup_devices.func

    def two_gpus(self: TrainingArguments) -> torch.device:
        device: torch.device = set_up(self)
        self._n_gpu = 2
        return device

    devices = cached_property(two_gpus)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    config = CONFIG.model_copy(update={"trl": {**CONFIG.trl, "max_steps": 1}})
    assert len(train_in(tmp_path / "one", files, config)["log"]) == 1
    monkeypatch.setattr(dpo, "use_one_device", lambda *_: None)
    with pytest.raises(ValueError, match="DataParallel"):
        train_in(tmp_path / "all", files, config)


def test_the_trainer_uses_the_gpu_that_the_model_is_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    arguments, gpu = trainer_arguments(CONFIG, tmp_path, 0, "cpu"), torch.device("cuda:1")
    try:
        use_one_device(arguments, gpu)
        assert chosen == [gpu] == [arguments.device] == [Accelerator().device]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_the_log_of_a_long_training_has_the_means_of_several_steps(
    files: list[Path], undisturbed: tuple[dict[str, Any], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpo, "_MAX_LOG_ENTRIES", 4)
    log = train_in(tmp_path, files, CONFIG.model_copy(update={"checkpoint_minutes": 10.0}))["log"]
    assert [entry["step"] for entry in log] == [2, 4, 6]
    every = undisturbed[0]["log"]
    means = [(one["loss"] + two["loss"]) / 2 for one, two in zip(every[::2], every[1::2], strict=True)]
    assert [entry["loss"] for entry in log] == pytest.approx(means, abs=1e-6)


def test_images_over_the_limit_of_the_run_are_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CsrError, match=r"too large \(over 100 pixels\)"):
        train_in(tmp_path, files, max_image_pixels=100)


def test_a_training_step_is_tried_before_the_first_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path / "run", small_config(tmp_path, training={"max_tokens": 512}))
    stages.check_inputs(run, Silent())
    shapes: list[tuple[int, ...]] = []
    original = CsrTrainer.compute_loss

    def compute_loss(self: CsrTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(inputs["rows"]["input_ids"].shape))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(CsrTrainer, "compute_loss", compute_loss)
    stages.try_training(run, Silent())
    assert len(shapes) == 1
    assert not (run.iteration(1)).exists()
    # On a GPU the step has as many tokens as a pass may have.
    monkeypatch.setattr("csr_vlm.training.trial.resolve_device", lambda _: "cuda")
    stages.try_training(run, Silent())
    budget = run.config.training.max_tokens
    assert budget - 2 * run.config.method.search.max_sentence_tokens < shapes[-1][1] <= budget
    broken = run.config.training.model_copy(update={"lora": LoraConfig(target_modules="nothing")})
    with pytest.raises(CsrError, match=r"adapter cannot be added"):
        stages.try_training(Run(run.root, run.config.model_copy(update={"training": broken})), Silent())

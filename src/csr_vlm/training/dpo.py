"""Train a LoRA with DPO on TRL's trainer (eq. 1 and 5).

For a prompt x with chosen response y_w and rejected response y_l the loss is

    -log sigmoid(beta (log pi(y_w|x) / ref(y_w|x) - log pi(y_l|x) / ref(y_l|x)))

with the policy pi and the reference ref, the policy of the last iteration. Iteration t continues
training the adapter of iteration t-1, which always applies to the original base model, so any PEFT
user can load it and nothing is merged in between. The reference's log-probabilities need no
forward pass: generation has written them into the ledger.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import DPOConfig

from csr_vlm.config.schema import ModelConfig, TrainingConfig
from csr_vlm.core.errors import CsrError, reason_of, suggestion
from csr_vlm.models.checkpoints import rename_as_published
from csr_vlm.models.encoding import MAX_IMAGE_PIXELS
from csr_vlm.models.families import family_of
from csr_vlm.models.loading import load_adapter, load_base
from csr_vlm.models.policy import Policy
from csr_vlm.models.prefix_tree import tree_obstacle
from csr_vlm.store import files
from csr_vlm.store.tables import PairFiles
from csr_vlm.training.collator import PairCollator
from csr_vlm.training.distribution import (
    gather_trained_weights,
    max_over_processes,
    pairs_per_step,
    refuse_ram_efficient_loading,
    remove_absent_no_split_modules,
    require_distribution,
    shards_everything,
)
from csr_vlm.training.reference import compute_reference, reference_tolerance, verify_reference
from csr_vlm.training.reporting import configure_trackers, report_name
from csr_vlm.training.resuming import TimedCheckpoints, prepare_directory, resume
from csr_vlm.training.steps import StepDataset, StepPlan
from csr_vlm.training.trainer import CsrTrainer
from csr_vlm.training.tree_rows import disable_vision_gradients

LINEAR_LAYERS = "(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Regular expression of the usual names of the linear layers in a language model."""
_ORDER_OPTIONS = (
    "train_sampling_strategy",
    "dataloader_drop_last",
    "auto_find_batch_size",
    "save_steps",
    "save_total_limit",
    "precompute_ref_log_probs",
)
"""Options of TRL without effect: the run decides the order of the pairs, the checkpoints and the reference."""
_MAX_LOG_ENTRIES = 1000
"""Entries of a training's log, which is held in memory and written into every checkpoint."""


def train(
    pairs: Sequence[Path],
    model_config: ModelConfig,
    config: TrainingConfig,
    *,
    previous: Path | None,
    adapter: Path,
    work: Path,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
    processes: int = 1,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> dict[str, Any]:
    """Train one iteration and write its adapter, continuing from the last checkpoint in ``work``.

    Args:
        pairs: Files of the iteration's preference pairs.
        model_config: Configuration of the base model.
        config: Configuration of the training.
        previous: Adapter of the last iteration; None for the base model.
        adapter: Directory to write the new adapter to; it appears only when complete.
        work: Directory for the trainer's own files; the caller deletes it once the result is recorded.
        seed: Seed of the LoRA initialization and of the order of the pairs.
        callbacks: Callbacks of the trainer.
        processes: Number of processes that call this at the same time with the same arguments. A
            step takes the same pairs for any number; the first process writes the adapter.
        max_image_pixels: Larger images are rejected without decoding.

    Returns:
        The source of the reference, the largest difference found in its check (nats), the loss
        before the first step (log 2), why responses did not share rows (None if they did, or were
        not to), the number of pairs, the distribution, and the trainer's log.

    Raises:
        CsrError: There are no pairs, TRL rejects an option, the first loss is not log 2 within its
            tolerance, a loss is not finite, a worker ended, memory ran out, or the processes are not
            distributed as the launcher requested.
    """
    refuse_ram_efficient_loading()
    rows = PairFiles(pairs)
    if not len(rows):
        raise CsrError("there are no pairs to train on", "csr audit RUN shows what was dropped and why")
    digest = files.digest(
        {
            "pairs": [files.sha256_of(path) for path in pairs],
            "previous": _adapter_digest(previous),
            "settings": [model_config.model_dump(mode="json"), config.model_dump(mode="json"), seed],
        }
    )
    finished = work / "result.json"
    if finished.exists() and adapter.exists():
        recorded = files.read_json(finished)
        if recorded["inputs"] == digest:
            return dict(recorded["result"])
    set_seed(seed)
    policy = trainable_policy(model_config, config, previous, max_image_pixels)
    trainer, result = _trainer(policy, rows, config, work, seed, callbacks, processes, digest)
    checkpoint = resume(trainer, work)
    trainer.add_callback(TimedCheckpoints(trainer, config.checkpoint_minutes))
    with explained(policy):
        trainer.train(resume_from_checkpoint=checkpoint)
    history = _write_result(trainer, policy.processor, adapter)
    result |= {"first_loss": trainer.first_loss, "log": history}
    if trainer.accelerator.is_main_process:
        files.write_json(finished, {"inputs": digest, "result": result})
    trainer.release()
    return result


def _adapter_digest(adapter: Path | None) -> str | None:
    """Return the checksum of an adapter's weights; None if there are none, which loading the adapter reports."""
    weights = None if adapter is None else adapter / "adapter_model.safetensors"
    return files.sha256_of(weights) if weights is not None and weights.exists() else None


def _trainer(
    policy: Policy,
    rows: PairFiles,
    config: TrainingConfig,
    work: Path,
    seed: int,
    callbacks: Sequence[TrainerCallback],
    processes: int,
    digest: str,
) -> tuple[CsrTrainer, dict[str, Any]]:
    """Build the trainer with its reference log-probabilities; return it and what is known of the result."""
    obstacle = tree_obstacle(policy.base_model.config) if config.packing == "auto" else None
    collator = PairCollator(policy, config.max_tokens, sharing=config.packing == "auto")
    plan = StepPlan(rows.group_sizes, pairs_per_step(config.trl), seed)
    steps = StepDataset(rows, plan, collator, num_processes=processes)
    disable_vision_gradients(policy.base_model)
    remove_absent_no_split_modules(policy.base_model)
    arguments = trainer_arguments(config, work, seed, policy.device.type)
    if "logging_steps" not in config.trl:
        num_steps = arguments.max_steps if arguments.max_steps > 0 else plan.num_steps * arguments.num_train_epochs
        arguments.logging_steps = ceil(num_steps / _MAX_LOG_ENTRIES)
    if processes == 1:
        use_one_device(arguments, policy.device)
    trainer = CsrTrainer(policy, steps, arguments, callbacks)
    distribution = require_distribution(trainer.accelerator.state, processes)
    steps.process = trainer.accelerator.process_index
    if trainer.accelerator.is_main_process:
        prepare_directory(work, digest)
    trainer.accelerator.wait_for_everyone()
    configure_trackers(trainer, work.parent / "tensorboard")
    trainer.projector_learning_rate = config.projector_learning_rate
    difference, holds = verify_reference(policy, rows, config.reference_tolerance, config.max_tokens)
    difference = max_over_processes(difference)
    # The ledger has sums over whole responses, which ld_alpha weights otherwise.
    from_ledger = config.reference == "ledger" and not max_over_processes(not holds) and trainer.ld_alpha is None
    if not from_ledger:
        path = work / "reference.npy"
        steps.reference = compute_reference(
            policy, rows, path, config.max_tokens, steps.process, processes, trainer.ld_alpha
        )
    trainer.reference_tolerance = partial(reference_tolerance, config.reference_tolerance, policy.base_model.dtype)
    return trainer, {
        "reference": "ledger" if from_ledger else "model",
        "reference_difference": difference,
        "packing_obstacle": obstacle,
        "num_pairs": len(rows),
        "distribution": {"type": distribution, "processes": processes},
    }


@contextmanager
def explained(policy: Policy) -> Iterator[None]:
    """Turn what ends a training, whatever the pairs, into errors that say what to do.

    Raises:
        CsrError: A worker ended, memory ran out, or there is no compiler.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(policy.device)
        raise CsrError(
            f"training ran out of memory on {policy.device}: {(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB are in "
            f"use ({reason_of(error)})",
            "lower training.max_tokens or training.lora.r, or set model.quantization=nf4",
        ) from None
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise CsrError(
                f"a worker process that prepares images ended unexpectedly: {reason_of(error)}",
                "it may have run out of memory or of shared memory (docker: --shm-size); "
                "training.trl.dataloader_num_workers=0 works without workers",
            ) from None
        if "C compiler" in str(error):
            raise CsrError(
                "TRL's output layer compiles kernels, but there is no C compiler", "install gcc, or set CC"
            ) from None
        raise


def _write_result(trainer: CsrTrainer, processor: Any, adapter: Path) -> list[dict[str, Any]]:
    """Write the adapter if all losses and weights are finite; return the log entries that have a loss.

    Raises:
        CsrError: A loss or a weight is not finite.
    """
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = gather_trained_weights(model)
    losses_are_finite = all(isfinite(float(entry["loss"])) for entry in history)
    if not (losses_are_finite and all(value.isfinite().all() for value in weights.values())):
        raise CsrError("DPO diverged: a loss or a weight is not finite", "lower training.trl.learning_rate")
    if trainer.accelerator.is_main_process:
        save_adapter(model, weights, adapter, processor)
    unset_hf_deepspeed_config()  # Otherwise the next model would be partitioned as it is loaded for generation.
    return history


def trainable_policy(
    model_config: ModelConfig,
    config: TrainingConfig,
    previous: Path | None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> Policy:
    """Load the policy with a trainable adapter: a new one, or the last iteration's.

    Raises:
        CsrError: The target modules match nothing, or something outside the language model; or
            the last adapter's shape differs from ``training.lora``.
    """
    model, processor = load_base(model_config)
    if previous is not None:
        model = load_adapter(model, previous, trainable=True, one_dtype=shards_everything())
        _require_same_shape(model, config, previous)
    else:
        model = _add_adapter(model, config)
    if config.lora.target_modules is None:
        outside = [
            name for name in model.targeted_module_names if not re.search(family_of(model.config).text_module, name)
        ]
        if outside:
            raise CsrError(
                f"the adapter has modules outside the language model: {outside[0]}",
                "set training.lora.target_modules if this is intended, or merge the adapter into the model and start "
                "from there",
            )
    return Policy(model, processor, max_image_pixels)


def _add_adapter(model: Any, config: TrainingConfig) -> PeftModel:
    """Add a new LoRA, and a copy of the projector if that is to be trained."""
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules or rf".*\b{family_of(model.config).text_module}\b.*\.{LINEAR_LAYERS}",
        modules_to_save=_projector_names(model) if config.projector_learning_rate else None,
    )
    try:
        return get_peft_model(model, lora, autocast_adapter_dtype=not shards_everything())
    except ValueError as error:
        raise CsrError(
            f"the adapter cannot be added to the model: {error}", "check training.lora.target_modules"
        ) from None


def _require_same_shape(model: PeftModel, config: TrainingConfig, adapter: Path) -> None:
    """Refuse settings that differ from a loaded adapter's shape, since they would have no effect.

    Raises:
        CsrError: The adapter is not a LoRA, or has another rank, alpha or projector.
    """
    lora = model.peft_config["default"]
    if not isinstance(lora, LoraConfig):
        raise CsrError(f"{adapter} is not a LoRA adapter", "merge it into the model and start from there")
    if (lora.r, lora.lora_alpha) != (config.lora.r, config.lora.alpha):
        raise CsrError(
            f"the adapter {adapter} has rank {lora.r} and alpha {lora.lora_alpha}, but training.lora has "
            f"{config.lora.r} and {config.lora.alpha}",
            f"set training.lora.r={lora.r} training.lora.alpha={lora.lora_alpha}",
        )
    if bool(config.projector_learning_rate) != bool(lora.modules_to_save):
        raise CsrError(
            f"the adapter {adapter} {'includes' if lora.modules_to_save else 'does not include'} a projector",
            f"{'set' if lora.modules_to_save else 'remove'} training.projector_learning_rate",
        )


def _projector_names(model: Any) -> list[str]:
    """List the names of a model's projectors."""
    known = family_of(model.config).projectors
    names = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules()} & set(known))
    if not names:
        raise CsrError(
            f"{type(model).__name__} has no projector with one of the names: {', '.join(known)}",
            "remove training.projector_learning_rate",
        )
    return names


def use_one_device(arguments: DPOConfig, device: torch.device) -> None:
    """Make a training in one process use the policy's device only.

    Otherwise transformers would use the first GPU, and all visible ones through ``nn.DataParallel``, which
    TRL refuses.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
        vars(arguments)["_setup_devices"] = device
        arguments.distributed_state.device = device


class _DetachedDPOConfig(DPOConfig):
    """Validate arguments without a device and without joining a process group."""

    @property
    def device(self) -> torch.device:
        """Return the CPU."""
        return torch.device("cpu")


def check_arguments(config: TrainingConfig) -> None:
    """Check before any work that TRL accepts the training arguments.

    A single process may call this; DPOConfig itself would wait for the launcher's other processes.

    Raises:
        CsrError: An option is not valid, or has an invalid value.
    """
    trainer_arguments(config, Path(), 0, "cpu", config_class=_DetachedDPOConfig)


def trainer_arguments(
    config: TrainingConfig,
    work: Path,
    seed: int,
    device: str,
    config_class: type[DPOConfig] = DPOConfig,
) -> DPOConfig:
    """Build TRL's configuration: defaults, overridden by ``training.trl``, then by what this trainer needs.

    ``training.trl`` defines the number of pairs of a step (:func:`pairs_per_step`).

    Raises:
        CsrError: An option is not valid, has an invalid value, or is set by the run.
    """
    on_gpu = device == "cuda"
    defaults = {
        "report_to": "none",
        "run_name": report_name(work),
        "logging_steps": 1,
        # The filter would log the last finite loss instead of a NaN.
        "logging_nan_inf_filter": False,
        "dataloader_num_workers": 2 if on_gpu else 1,
        "bf16": on_gpu,
        "gradient_checkpointing": on_gpu,
        "use_cpu": not on_gpu,
        "disable_tqdm": True,
        # Only with the user's own target modules may a part of the adapter get no gradient.
        "ddp_find_unused_parameters": config.lora.target_modules is not None,
        "seed": seed,
    }
    required = {
        "output_dir": str(work),
        "remove_unused_columns": False,
        "max_length": None,
        "save_strategy": "no",
        **dict.fromkeys(_ORDER_OPTIONS, None),
    }
    conflicts = sorted(required.keys() & config.trl.keys())
    if conflicts:
        raise CsrError(f"training.trl.{conflicts[0]} is set by the run and cannot be changed", "remove it")
    defaults_of_trl = {field.name: field.default for field in fields(DPOConfig)}
    for key, value in config.trl.items():
        if key not in defaults_of_trl:
            hint = suggestion(key, defaults_of_trl, list_options=False)
            raise CsrError(f"training.trl.{key} is not a valid option of trl.DPOConfig", hint)
        default = defaults_of_trl[key]
        looks_boolean = default is None and str(value).lower() in ("yes", "no", "on", "off")
        if isinstance(value, str) and (isinstance(default, int | float) or looks_boolean):
            raise CsrError(
                f"training.trl.{key}: {value!r} is not valid; it should be a number or true or false",
                "set it to a number, true or false",
            )
    try:
        # A step is one batch of the trainer, which divides it into passes itself.
        batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        required = {key: value for key, value in required.items() if key not in _ORDER_OPTIONS}
        return config_class(**defaults | config.trl | batch | required)
    except (TypeError, ValueError) as error:
        raise CsrError(f"training.trl: {error}", "training.trl accepts the arguments of trl.DPOConfig") from None


def save_adapter(model: PeftModel, weights: Mapping[str, torch.Tensor], directory: Path, processor: Any = None) -> None:
    """Write the trained adapter, with the model's processor beside it; the directory appears only when complete."""

    def write(temporary: Path) -> None:
        model.save_pretrained(str(temporary), selected_adapters=["default"], state_dict=dict(weights))
        # PEFT's model card is an empty template.
        (temporary / "README.md").unlink(missing_ok=True)
        if processor is not None:
            processor.save_pretrained(str(temporary))
        _require_complete(temporary, "adapter_config.json")

    files.replace_directory(directory, write)


def _require_complete(directory: Path, config: str) -> None:
    """Verify that a folder has its configuration and weights, and that every tensor is in a file of the right size.

    Raises:
        CsrError: Something is missing.
    """
    from safetensors import SafetensorError, safe_open

    try:
        weights = sorted(directory.glob("*.safetensors"))
        num_tensors = 0
        for path in weights:
            with safe_open(path, framework="pt") as tensors:  # refuses a file that its header does not describe exactly
                num_tensors += len(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise CsrError(f"{path} was not written completely: {error}", "check the disk; run the command again") from None
    if not num_tensors or not (directory / config).is_file():
        raise CsrError(f"{directory} was not written completely", "check the disk; run the command again")


def merge(model_config: ModelConfig, adapter: Path, directory: Path) -> None:
    """Merge an adapter into the base model and write one ordinary checkpoint, not quantized."""
    model, processor = load_base(model_config.model_copy(update={"quantization": None}))
    merged = load_adapter(model, adapter).merge_and_unload()

    def write(temporary: Path) -> None:
        merged.save_pretrained(str(temporary))
        if getattr(getattr(merged.config, "vision_config", None), "model_type", "") in (
            "clip_vision_model",
            "siglip_vision_model",
        ):
            rename_as_published(temporary)
        processor.save_pretrained(str(temporary))
        _require_complete(temporary, "config.json")

    files.replace_directory(directory, write)

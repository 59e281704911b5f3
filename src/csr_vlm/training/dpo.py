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
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import isfinite, log
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import DPOConfig, DPOTrainer

from csr_vlm.config.schema import ModelConfig, TrainingConfig
from csr_vlm.core.errors import CsrError, suggestion
from csr_vlm.core.records import Pair
from csr_vlm.models.checkpoints import rename_as_published
from csr_vlm.models.families import family_of
from csr_vlm.models.loading import load_adapter, load_base
from csr_vlm.models.policy import Policy
from csr_vlm.store.files import replace_directory
from csr_vlm.training.collator import PairCollator, training_row
from csr_vlm.training.distribution import (
    gather_trained_weights,
    max_over_processes,
    per_process_batch,
    refuse_ram_efficient_loading,
    remove_absent_no_split_modules,
    require_distribution,
)
from csr_vlm.training.packing import accept_packed_rows, disable_vision_gradients, packing_obstacle
from csr_vlm.training.reporting import configure_trackers, report_name

LINEAR_LAYERS = "(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Regular expression of the usual names of the linear layers in a language model."""
_NUM_VERIFIED_PAIRS = 16
"""Pairs whose reference log-probabilities are verified before training."""


class CsrTrainer(DPOTrainer):
    """Extend TRL's trainer: accept packed batches, check the first loss, train the projector at its own rate.

    Before the first step policy and reference are the same model, so the DPO loss (eq. 1) of any
    batch is -log sigmoid(0) = log 2. This is checked on the first batch, with dropout off.
    """

    projector_learning_rate: float | None = None
    """Learning rate of the projector; None trains it, if at all, at the LoRA's."""
    first_loss_tolerance: float = 1e-3
    """Largest allowed |first loss - log 2|."""
    first_loss: float | None = None
    """Sigmoid loss of the first batch before the first step; None before it is computed."""
    loss_types: list[str]
    loss_weights: list[float]
    label_smoothing: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        accept_packed_rows(model.get_base_model() if isinstance(model, PeftModel) else model)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's loss of a batch, and check it.

        Raises:
            CsrError: The first loss is not log 2, or a loss is not finite.
        """
        if self.first_loss is None:
            self.first_loss = self._sigmoid_loss(model, inputs)
            # Written so that not-a-number fails too.
            if not abs(self.first_loss - log(2)) <= self.first_loss_tolerance:
                raise CsrError(
                    f"the first DPO loss is {self.first_loss:.4f}, not log 2 = {log(2):.4f}: the reference is not the "
                    "policy that training starts from",
                    "set training.reference=model, or generate again with the current adapter",
                )
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = float((result[0] if isinstance(result, tuple) else result).detach())
        if not isfinite(loss):
            raise CsrError(
                f"DPO diverged: step {self.state.global_step + 1} has the loss {loss} on the pairs of prompts "
                f"{', '.join(inputs['prompt_ids'])}",
                "lower training.trl.learning_rate, or check these pairs",
            )
        return result

    @torch.no_grad()
    def _sigmoid_loss(self, model: Any, inputs: Any) -> float:
        """Compute the sigmoid loss of a batch in evaluation mode, whatever losses are configured."""
        configured = self.loss_types, self.loss_weights, self.label_smoothing
        self.loss_types, self.loss_weights, self.label_smoothing = ["sigmoid"], [1.0], 0.0
        model.eval()
        try:
            with self.compute_loss_context_manager():
                return float(super().compute_loss(model, inputs))
        finally:
            model.train()
            self.loss_types, self.loss_weights, self.label_smoothing = configured
            self._metrics["eval"].clear()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create TRL's optimizer, with the projector in a parameter group of its own if it has its own rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.projector_learning_rate is None:
            return optimizer
        projector_ids = {id(p) for name, p in self.model.named_parameters() if "modules_to_save" in name}
        for group in list(optimizer.param_groups):
            projector_params = [p for p in group["params"] if id(p) in projector_ids]
            group["params"] = [p for p in group["params"] if id(p) not in projector_ids]
            if projector_params:
                optimizer.add_param_group({**group, "params": projector_params, "lr": self.projector_learning_rate})
        return optimizer


def train(
    pairs: Sequence[Pair],
    model_config: ModelConfig,
    config: TrainingConfig,
    *,
    previous: Path | None,
    adapter: Path,
    work: Path,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
    processes: int = 1,
) -> dict[str, Any]:
    """Train one iteration and write its adapter.

    Args:
        pairs: Preference pairs of the iteration.
        model_config: Configuration of the base model.
        config: Configuration of the training.
        previous: Adapter of the last iteration; None for the base model.
        adapter: Directory to write the new adapter to; it appears only when complete.
        work: Directory for the trainer's own files, deleted afterwards.
        seed: Seed of the LoRA initialization and of the order of the pairs.
        callbacks: Callbacks of the trainer.
        processes: Number of processes that call this at the same time with the same arguments. A
            step takes the same pairs for any number; the first process writes the adapter.

    Returns:
        The source of the reference, the largest difference found in its check (nats), the loss
        before the first step (log 2), why pairs were not packed (None if they were, or were not
        to be), the number of pairs, the distribution, and the trainer's log.

    Raises:
        CsrError: There are no pairs, TRL rejects an option, the first loss is not log 2 within
            1e-3 + beta * reference_tolerance, a loss is not finite, or the processes are not
            distributed as the launcher requested.
    """
    if not pairs:
        raise CsrError("there are no pairs to train on", "csr audit RUN shows what was dropped and why")
    refuse_ram_efficient_loading()
    set_seed(seed)
    policy = trainable_policy(model_config, config, previous)
    difference = reference_difference(policy, pairs)
    obstacle = packing_obstacle(policy.base_model.config) if config.packing == "auto" else None
    disable_vision_gradients(policy.base_model)
    remove_absent_no_split_modules(policy.base_model)
    trainer = CsrTrainer(
        model=policy.model,
        args=trainer_arguments(config, work, seed, policy.device.type, processes),
        train_dataset=Dataset.from_list([training_row(pair) for pair in pairs]),
        data_collator=PairCollator(policy, packing=config.packing == "auto" and obstacle is None),
        processing_class=policy.processor,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    distribution = require_distribution(trainer.accelerator.state, processes)
    difference = max_over_processes(difference)
    from_ledger = config.reference == "ledger" and difference <= config.reference_tolerance
    configure_trackers(trainer, work.parent / "tensorboard")
    # TRL refuses to precompute for images; the collator already provides the values.
    trainer.precompute_ref_logps = from_ledger
    trainer.projector_learning_rate = config.projector_learning_rate
    # Each response of a pair may be off by reference_tolerance, and d loss / d nat is beta / 2.
    trainer.first_loss_tolerance = 1e-3 + trainer.beta * config.reference_tolerance
    trainer.train()
    history = _write_result(trainer, adapter)
    if trainer.accelerator.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "reference": "ledger" if from_ledger else "model",
        "reference_difference": difference,
        "first_loss": trainer.first_loss,
        "packing_obstacle": obstacle,
        "num_pairs": len(pairs),
        "distribution": {"type": distribution, "processes": processes},
        "log": history,
    }


def _write_result(trainer: CsrTrainer, adapter: Path) -> list[dict[str, Any]]:
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
        save_adapter(model, weights, adapter)
    unset_hf_deepspeed_config()  # Otherwise the next model would be partitioned as it is loaded for generation.
    return history


def trainable_policy(model_config: ModelConfig, config: TrainingConfig, previous: Path | None) -> Policy:
    """Load the policy with a trainable adapter: a new one, or the last iteration's.

    Raises:
        CsrError: The target modules match nothing, or something outside the language model; or
            the last adapter's shape differs from ``training.lora``.
    """
    model, processor = load_base(model_config)
    if previous is not None:
        model = load_adapter(model, previous, trainable=True)
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
    return Policy(model, processor)


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
        return get_peft_model(model, lora)
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


def reference_difference(policy: Policy, pairs: Sequence[Pair]) -> float:
    """Return the largest |ledger - teacher-forced| log-probability of a response, in nats.

    Both responses of up to sixteen pairs, spread over all pairs, are compared.
    """
    step = max(len(pairs) // _NUM_VERIFIED_PAIRS, 1)
    sample = pairs[::step][:_NUM_VERIFIED_PAIRS]
    policy.model.eval()
    differences = [0.0]
    for side in ("chosen", "rejected"):
        responses = [getattr(pair, side) for pair in sample]
        logprobs = policy.teacher_forced([pair.prompt for pair in sample], [r.token_ids for r in responses])
        differences += [abs(float(lp.sum()) - r.logprob) for lp, r in zip(logprobs, responses, strict=True)]
    return max(differences)


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
    processes: int = 1,
    config_class: type[DPOConfig] = DPOConfig,
) -> DPOConfig:
    """Build TRL's configuration: defaults, overridden by ``training.trl``, then by what this trainer needs.

    ``training.trl`` defines the batch of a step, which is split among the processes.

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
        "save_strategy": "no",
        "bf16": on_gpu,
        "gradient_checkpointing": on_gpu,
        "use_cpu": not on_gpu,
        "disable_tqdm": True,
        # Only with the user's own target modules may a part of the adapter get no gradient.
        "ddp_find_unused_parameters": config.lora.target_modules is not None,
        "seed": seed,
    }
    required = {"output_dir": str(work), "remove_unused_columns": False, "max_length": None}
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
        batch = per_process_batch(config.trl, processes) if processes > 1 else {}
        return config_class(**defaults | config.trl | batch | required)
    except (TypeError, ValueError) as error:
        raise CsrError(f"training.trl: {error}", "training.trl accepts the arguments of trl.DPOConfig") from None


def save_adapter(model: PeftModel, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write the trained adapter; the directory appears only when complete."""

    def write(temporary: Path) -> None:
        model.save_pretrained(str(temporary), selected_adapters=["default"], state_dict=dict(weights))
        # PEFT's model card is an empty template.
        (temporary / "README.md").unlink(missing_ok=True)

    replace_directory(directory, write)


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

    replace_directory(directory, write)

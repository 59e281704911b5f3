"""DPO with LoRA on TRL's trainer (eq. 1 and 5).

The adapter is carried from iteration to iteration and always stands relative to the
original base model, so any PEFT user can load it and nothing is merged on the way.
Iteration t starts from iteration t-1's adapter, and its reference is that very policy,
whose log-probabilities generation has already written into the ledger.
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
    largest_anywhere,
    name_layers_that_are_there,
    refuse_lazy_weights,
    require_distribution,
    shared_batch,
    whole_weights,
)
from csr_vlm.training.packing import freeze_pictures, obstacle, read_packed_rows
from csr_vlm.training.reporting import keep_reports, report_name

LINEARS = "(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""The linear maps of a language model's layers, by their usual names (regex)."""
_VERIFIED_PAIRS = 16


class CsrTrainer(DPOTrainer):
    """TRL's trainer that takes packed batches, checks its start, and trains the projector at its own rate.

    Before any step policy and reference are one model, so the DPO loss (eq. 1) of any batch
    is -log sigmoid(0) = log 2. The first batch is checked for that, with dropout off.
    """

    projector_learning_rate: float | None = None
    first_loss_tolerance: float = 1e-3
    first_loss: float | None = None
    loss_types: list[str]
    loss_weights: list[float]
    label_smoothing: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        read_packed_rows(model.get_base_model() if isinstance(model, PeftModel) else model)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.first_loss is None:
            self.first_loss = self._plain_loss(model, inputs)
            # Written so that not-a-number fails too.
            if not abs(self.first_loss - log(2)) <= self.first_loss_tolerance:
                raise CsrError(
                    f"the first DPO loss is {self.first_loss:.4f}, not log 2 = {log(2):.4f}: the reference is not the "
                    "policy that training starts from",
                    "set training.reference=model, or generate again with the adapter in use now",
                )
        found = super().compute_loss(model, inputs, *args, **kwargs)
        loss = float((found[0] if isinstance(found, tuple) else found).detach())
        if not isfinite(loss):
            raise CsrError(
                f"DPO diverged: step {self.state.global_step + 1} has the loss {loss} on the pairs of prompts "
                f"{', '.join(inputs['prompt_ids'])}",
                "lower training.trl.learning_rate, or look at these pairs",
            )
        return found

    @torch.no_grad()
    def _plain_loss(self, model: Any, inputs: Any) -> float:
        """Compute the sigmoid loss of a batch, whatever losses are configured."""
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
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.projector_learning_rate is None:
            return optimizer
        projector = {id(p) for name, p in self.model.named_parameters() if "modules_to_save" in name}
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in projector]
            group["params"] = [p for p in group["params"] if id(p) not in projector]
            if moved:
                optimizer.add_param_group({**group, "params": moved, "lr": self.projector_learning_rate})
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
        pairs: The iteration's preferences.
        previous: The last iteration's adapter; None for the base model.
        adapter: Directory the new adapter goes to, all at once.
        work: Directory for the trainer's own files.
        seed: Of the LoRA initialisation and the order of the pairs.
        processes: How many call this at the same time, each with the same arguments. A step
            takes the same pairs however many there are; the first one writes the adapter.

    Returns:
        Where the reference came from, the largest difference found in its check, the loss
        before the first step (log 2), why pairs were not packed (None if they were, or were
        not to be), over what the training was distributed, and the trainer's log.

    Raises:
        CsrError: There are no pairs, an option is unknown to TRL, the first loss is not
            log 2 to within 1e-3 + beta * reference_tolerance, a loss is not finite, or the
            processes are not distributed as the launcher was told.
    """
    if not pairs:
        raise CsrError("there are no pairs to train on", "csr audit RUN says what was dropped and why")
    refuse_lazy_weights()
    set_seed(seed)
    policy = trainable_policy(model_config, config, previous)
    difference = reference_difference(policy, pairs)
    hindrance = obstacle(policy.base_model.config) if config.packing == "auto" else None
    freeze_pictures(policy.base_model)
    name_layers_that_are_there(policy.base_model)
    trainer = CsrTrainer(
        model=policy.model,
        args=trainer_arguments(config, work, seed, policy.device.type, processes),
        train_dataset=Dataset.from_list([training_row(pair) for pair in pairs]),
        data_collator=PairCollator(policy, packing=config.packing == "auto" and hindrance is None),
        processing_class=policy.processor,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    distribution = require_distribution(trainer.accelerator.state, processes)
    difference = largest_anywhere(difference)
    from_ledger = config.reference == "ledger" and difference <= config.reference_tolerance
    keep_reports(trainer, work.parent / "tensorboard")
    # TRL refuses to precompute for images; the collator already carries the values.
    trainer.precompute_ref_logps = from_ledger
    trainer.projector_learning_rate = config.projector_learning_rate
    # Each response of a pair may be off by reference_tolerance, and d loss / d nat is beta / 2.
    trainer.first_loss_tolerance = 1e-3 + trainer.beta * config.reference_tolerance
    trainer.train()
    history = _keep_result(trainer, adapter)
    if trainer.accelerator.is_main_process:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "reference": "ledger" if from_ledger else "model",
        "reference_difference": difference,
        "first_loss": trainer.first_loss,
        "packing_obstacle": hindrance,
        "num_pairs": len(pairs),
        "distribution": {"type": distribution, "processes": processes},
        "log": history,
    }


def _keep_result(trainer: CsrTrainer, adapter: Path) -> list[dict[str, Any]]:
    """Write what was trained, if it is sound; return the log of the losses.

    Raises:
        CsrError: A loss or a weight is not finite.
    """
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = whole_weights(model)
    sound = all(isfinite(float(entry["loss"])) for entry in history)
    if not (sound and all(value.isfinite().all() for value in weights.values())):
        raise CsrError("DPO diverged: a loss or a weight is not finite", "lower training.trl.learning_rate")
    if trainer.accelerator.is_main_process:
        save_adapter(model, weights, adapter)
    unset_hf_deepspeed_config()  # or it would take the next model apart as it is loaded to generate
    return history


def trainable_policy(model_config: ModelConfig, config: TrainingConfig, previous: Path | None) -> Policy:
    """Load the policy with an adapter that trains: a fresh one, or an earlier one that goes on.

    Raises:
        CsrError: The target modules match nothing, or something outside the language model;
            or the earlier adapter is of another shape than ``training.lora`` says.
    """
    model, processor = load_base(model_config)
    if previous is not None:
        model = load_adapter(model, previous, trainable=True)
        _refuse_other_shape(model, config, previous)
    else:
        model = _fresh_adapter(model, config)
    if config.lora.target_modules is None:
        stray = [
            name for name in model.targeted_module_names if not re.search(family_of(model.config).text_module, name)
        ]
        if stray:
            raise CsrError(
                f"the adapter reaches outside the language model: {stray[0]}",
                "set training.lora.target_modules if that is meant, or merge it into the model and start from there",
            )
    return Policy(model, processor)


def _fresh_adapter(model: Any, config: TrainingConfig) -> PeftModel:
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules or rf".*\b{family_of(model.config).text_module}\b.*\.{LINEARS}",
        modules_to_save=_projector_names(model) if config.projector_learning_rate else None,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise CsrError(f"the adapter cannot be placed: {error}", "check training.lora.target_modules") from None


def _refuse_other_shape(model: PeftModel, config: TrainingConfig, adapter: Path) -> None:
    """An adapter that goes on keeps its shape; settings that say otherwise would do nothing."""
    own = model.peft_config["default"]
    if not isinstance(own, LoraConfig):
        raise CsrError(f"the adapter {adapter} is no LoRA", "merge it into the model and start from there")
    if (own.r, own.lora_alpha) != (config.lora.r, config.lora.alpha):
        raise CsrError(
            f"the adapter {adapter} has rank {own.r} and alpha {own.lora_alpha}, training.lora says "
            f"{config.lora.r} and {config.lora.alpha}",
            f"set training.lora.r={own.r} training.lora.alpha={own.lora_alpha}",
        )
    if bool(config.projector_learning_rate) != bool(own.modules_to_save):
        raise CsrError(
            f"the adapter {adapter} {'has' if own.modules_to_save else 'lacks'} a projector of its own",
            "set or leave out training.projector_learning_rate accordingly",
        )


def _projector_names(model: Any) -> list[str]:
    known = family_of(model.config).projectors
    found = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules()} & set(known))
    if not found:
        raise CsrError(
            f"{type(model).__name__} has no projector of a known name",
            "leave training.projector_learning_rate out",
        )
    return found


def reference_difference(policy: Policy, pairs: Sequence[Pair]) -> float:
    """Return the largest |ledger - teacher-forced| log-probability of a response, in nats.

    A sample spread over the pairs is checked.
    """
    step = max(len(pairs) // _VERIFIED_PAIRS, 1)
    sample = pairs[::step][:_VERIFIED_PAIRS]
    policy.model.eval()
    found = [0.0]
    for side in ("chosen", "rejected"):
        responses = [getattr(pair, side) for pair in sample]
        logprobs = policy.teacher_forced([pair.prompt for pair in sample], [r.token_ids for r in responses])
        found += [abs(float(lp.sum()) - r.logprob) for lp, r in zip(logprobs, responses, strict=True)]
    return max(found)


class _Unplaced(DPOConfig):
    """Arguments that are only looked at: on no device, and in no process group."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def check_arguments(config: TrainingConfig) -> None:
    """Refuse training arguments that TRL would refuse, before any work.

    One process alone may ask: DPOConfig itself would wait for the launcher's others to join.

    Raises:
        CsrError: TRL has no such option, or not with this value.
    """
    trainer_arguments(config, Path(), 0, "cpu", form=_Unplaced)


def trainer_arguments(
    config: TrainingConfig,
    work: Path,
    seed: int,
    device: str,
    processes: int = 1,
    form: type[DPOConfig] = DPOConfig,
) -> DPOConfig:
    """Build TRL's configuration: what this trainer needs, under what the user passes.

    Batch size and accumulation are what the user says of a step, dealt out to the processes.
    """
    on_gpu = device == "cuda"
    defaults = {
        "report_to": "none",
        "run_name": report_name(work),
        "logging_steps": 1,
        # The filter would show the last finite loss instead of a NaN.
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "bf16": on_gpu,
        "gradient_checkpointing": on_gpu,
        "use_cpu": not on_gpu,
        "disable_tqdm": True,
        # Only an adapter of the user's own reach may lie where no gradient comes.
        "ddp_find_unused_parameters": config.lora.target_modules is not None,
        "seed": seed,
    }
    needed = {"output_dir": str(work), "remove_unused_columns": False, "max_length": None}
    clashing = sorted(needed.keys() & config.trl.keys())
    if clashing:
        raise CsrError(f"training.trl.{clashing[0]} is set by the run itself", "leave it out")
    defaults_of_trl = {field.name: field.default for field in fields(DPOConfig)}
    for key, value in config.trl.items():
        if key not in defaults_of_trl:
            hint = suggestion(key, defaults_of_trl, list_options=False)
            raise CsrError(f"trl.DPOConfig has no option for training.trl.{key}", hint)
        default = defaults_of_trl[key]
        is_meant_as_truth = default is None and str(value).lower() in ("yes", "no", "on", "off")
        if isinstance(value, str) and (isinstance(default, int | float) or is_meant_as_truth):
            raise CsrError(f"training.trl.{key} should be a number or true or false", f"it was given as {value!r}")
    try:
        dealt = shared_batch(config.trl, processes) if processes > 1 else {}
        return form(**defaults | config.trl | dealt | needed)
    except (TypeError, ValueError) as error:
        raise CsrError(f"training.trl: {error}", "it takes the arguments of trl.DPOConfig") from None


def save_adapter(model: PeftModel, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write the trained adapter, whole or not at all."""

    def fill(temporary: Path) -> None:
        model.save_pretrained(str(temporary), selected_adapters=["default"], state_dict=dict(weights))
        # PEFT's model card is an empty form.
        (temporary / "README.md").unlink(missing_ok=True)

    replace_directory(directory, fill)


def merge(model_config: ModelConfig, adapter: Path, directory: Path) -> None:
    """Write base model plus adapter as one ordinary checkpoint, in full precision if the base was quantised."""
    model, processor = load_base(model_config.model_copy(update={"quantization": None}))
    merged = load_adapter(model, adapter).merge_and_unload()

    def fill(temporary: Path) -> None:
        merged.save_pretrained(str(temporary))
        if getattr(getattr(merged.config, "vision_config", None), "model_type", "") in (
            "clip_vision_model",
            "siglip_vision_model",
        ):
            rename_as_published(temporary)
        processor.save_pretrained(str(temporary))

    replace_directory(directory, fill)

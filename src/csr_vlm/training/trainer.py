"""Extend TRL's DPO trainer to steps of several passes through prefix trees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import isfinite, log
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, default_data_collator
from trl import DPOConfig, DPOTrainer

from csr_vlm.core.errors import CsrError
from csr_vlm.core.memory import free_memory
from csr_vlm.models.policy import Policy
from csr_vlm.training.distribution import max_over_processes
from csr_vlm.training.steps import StepDataset, StepLoader
from csr_vlm.training.tree_rows import accept_rows, restore_forward


class CsrTrainer(DPOTrainer):  # type: ignore[misc]
    """Train on the passes of :class:`csr_vlm.training.steps.StepDataset` with TRL's losses and metrics.

    The loss of a step is the mean of TRL's losses of its passes, weighted by their numbers of pairs, so
    for a loss that is a mean over pairs it is the same however the step is divided into passes and
    among processes. Before the first step policy and reference are the same model, so the DPO loss
    (eq. 1) of any pair is -log sigmoid(0) = log 2. This is checked on the first pass, with dropout off.

    Args:
        policy: Policy with a trainable adapter.
        steps: Passes of each step.
        args: TRL's configuration.
        callbacks: Callbacks of the trainer.
    """

    projector_learning_rate: float | None = None
    """Learning rate of the projector; None trains it, if at all, at the LoRA's."""
    reference_tolerance: Callable[[int], float] = staticmethod(lambda num_tokens: 0.0)
    """Largest accepted error of the reference log-probability of a response of some tokens, in nats."""
    first_loss: float | None = None
    """Sigmoid loss of the first pass before the first step; None before it is computed."""
    loss_types: list[str]
    loss_weights: list[float]
    label_smoothing: float

    def __init__(
        self, policy: Policy, steps: StepDataset, args: DPOConfig, callbacks: Sequence[TrainerCallback] = ()
    ) -> None:
        super().__init__(
            model=policy.model,
            args=args,
            # TRL looks at one example, to see whether there are images; get_train_dataloader has the steps.
            train_dataset=Dataset.from_dict({"image": [None]}),
            data_collator=default_data_collator,
            processing_class=policy.processor,
            callbacks=list(callbacks),
        )
        self.steps = steps
        self.remove_callback(PrinterCallback)
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")  # TRL's copy of the policy; the steps have the reference's values.
        # TRL refuses to precompute for images; the steps already provide the values.
        self.precompute_ref_logps = True
        outputs = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
        accept_rows(policy.base_model, outputs if self.use_weighting else outputs[:-1])
        self._weight = 1.0

    def get_train_dataloader(self) -> StepLoader:
        """Return the loader of an epoch's steps."""
        return StepLoader(
            self.steps,
            self.args.dataloader_num_workers,
            self.args.dataloader_prefetch_factor,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Add up the gradients of a step's passes; return the loss, to be averaged over processes.

        Raises:
            CsrError: The pairs of the step cannot be read or encoded.
        """
        if "error" in inputs:
            raise CsrError(*inputs["error"])
        passes = inputs["passes"]
        scale = 0.0 if inputs["is_idle"] else self.accelerator.num_processes / inputs["num_pairs"]
        weights = [scale * len(batch["prompt_ids"]) for batch in passes]
        # Sharded models need as many passes in every process.
        num_passes = int(max_over_processes(len(passes)))
        weights += [0.0] * (num_passes - len(passes))
        logged, self._metrics["train"] = self._metrics["train"], defaultdict(list)
        total = torch.zeros((), device=self.args.device)
        for number, self._weight in enumerate(weights):
            is_last = number == num_passes - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            deferred = not is_last and self.accelerator.distributed_type != DistributedType.DEEPSPEED
            with self.accelerator.no_sync(model) if deferred else nullcontext():
                total += super().training_step(model, passes[min(number, len(passes) - 1)], num_items_in_batch)
        self._log_mean(logged, weights)
        return total

    def _log_mean(self, logged: Any, weights: Sequence[float]) -> None:
        """Append the weighted mean of the step's metrics, over passes and processes, to the logged metrics."""
        names = sorted(self._metrics["train"].keys() - {"num_tokens"})
        sums = [
            sum(weight * value for weight, value in zip(weights, self._metrics["train"][name], strict=True))
            for name in names
        ]
        values = torch.tensor([*sums, sum(weights), float(self._total_train_tokens)], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values.float().to(self.args.device), "sum").cpu().double()
        *totals, weight, num_tokens = values.tolist()
        for name, value in zip(names, totals, strict=True):
            logged[name].append(value / weight)
        logged["num_tokens"] = [num_tokens]
        self._metrics["train"] = logged

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute TRL's loss of a pass times the weight of the pass, and check it.

        Raises:
            CsrError: The first loss is not log 2, or a loss is not finite.
        """
        if self.first_loss is None:
            self.first_loss = self._sigmoid_loss(model, inputs)
            # Both responses of a pair may be off by the tolerance, and d loss / d nat is beta / 2.
            tolerance = 1e-3 + self.beta * self.reference_tolerance(inputs["completion_mask"].shape[1])
            # Written so that not-a-number fails too.
            if not abs(self.first_loss - log(2)) <= tolerance:
                raise CsrError(
                    f"the first DPO loss is {self.first_loss:.4f}, not log 2 = {log(2):.4f}: the reference is not the "
                    "policy that training starts from",
                    "set training.reference=model, or generate again with the current adapter",
                )
        with self._metrics_of_this_process():
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not isfinite(float(loss.detach())):
            raise CsrError(
                f"DPO diverged: step {self.state.global_step + 1} has the loss {float(loss.detach())} on the pairs of "
                f"prompts {', '.join(inputs['prompt_ids'])}",
                "lower training.trl.learning_rate, or check these pairs",
            )
        return loss * self._weight

    @torch.no_grad()
    def _sigmoid_loss(self, model: Any, inputs: Any) -> float:
        """Compute the sigmoid loss of a pass in evaluation mode, whatever losses are configured."""
        configured = self.loss_types, self.loss_weights, self.label_smoothing
        self.loss_types, self.loss_weights, self.label_smoothing = ["sigmoid"], [1.0], 0.0
        model.eval()
        try:
            with self.compute_loss_context_manager(), self._metrics_of_this_process():
                return float(super().compute_loss(model, inputs))
        finally:
            model.train()
            self.loss_types, self.loss_weights, self.label_smoothing = configured
            self._metrics["eval"].clear()

    @contextmanager
    def _metrics_of_this_process(self) -> Iterator[None]:
        """Make TRL compute metrics without other processes, whose passes have other numbers of pairs."""
        self.accelerator.gather = self.accelerator.gather_for_metrics = _unchanged
        try:
            yield
        finally:
            del self.accelerator.gather, self.accelerator.gather_for_metrics

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create TRL's optimizer, with the projector in a parameter group of its own if it has its own rate."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.projector_learning_rate is None:
            return optimizer
        projector_ids = {id(p) for name, p in self.model.named_parameters() if "modules_to_save" in name}
        for group in list(optimizer.param_groups):
            projector_params = [p for p in group["params"] if id(p) in projector_ids]
            group["params"] = [p for p in group["params"] if id(p) not in projector_ids]
            if projector_params:
                optimizer.add_param_group({**group, "params": projector_params, "lr": self.projector_learning_rate})
        return optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: transformers' estimate knows no passes."""
        return 0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: a checkpoint inside training needs no card."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter of a checkpoint, without the processor and the arguments, which do not change."""
        self.model.save_pretrained(output_dir, state_dict=state_dict)

    def release(self) -> None:
        """Free the model, the optimizer and all copies, also where replaced methods refer to their model."""
        for module in self.model.modules():
            restore_forward(module)
        self.optimizer = self.lr_scheduler = None
        self.accelerator.free_memory()
        self.callback_handler.callbacks.clear()
        free_memory()


def _unchanged(value: Any) -> Any:
    return value

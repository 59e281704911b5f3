"""Make a model with TRL's fused output layer accept rows of prefix trees.

TRL's DPOTrainer reads the log-probabilities of one row per response: chosen rows first, then
rejected rows. The model computes the rows of :mod:`csr_vlm.models.prefix_tree` instead, and its
outputs are arranged as TRL expects them, so losses and metrics are TRL's own.
"""

from __future__ import annotations

import functools
import re
from types import MethodType
from typing import Any

import torch
from trl.trainer.utils import add_fused_lm_head

from csr_vlm.models.families import family_of
from csr_vlm.models.prefix_tree import model_inputs_of, only_predictors


def accept_rows(model: Any, outputs: tuple[str, ...]) -> None:
    """Make a model accept the keyword ``rows``, and compute its output layer in float32.

    Called with ``rows`` (see :meth:`csr_vlm.training.collator.PairCollator.passes`) besides labels of
    shape (responses, 1 + tokens), the model computes the rows and returns TRL's output for the
    responses. Without it nothing changes. The model's forward is replaced, as TRL replaces it, so
    wrappers (PEFT, DDP, FSDP, DeepSpeed), gradient checkpointing and autocast work unchanged.

    Args:
        model: Transformers model, whose forward TRL may have replaced.
        outputs: Fields that TRL's fused output layer computes.
    """
    restore_forward(model)
    # In bfloat16, rounding the logits alone would change a response's log-probability by tenths of a nat.
    add_fused_lm_head(model, cast_lm_head_to_fp32=True, outputs=outputs)
    forward_of_trl = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, rows: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> Any:
        if rows is None:
            return forward_of_trl(*args, **kwargs)
        inputs = model_inputs_of(self, {key: value for key, value in rows.items() if key != "target_index"})
        with only_predictors(self, rows["predictor_index"]):
            output = forward_of_trl(**inputs, shift_labels=rows["targets"], fused_lm_head=True)
        return _per_response(output, rows["target_index"])

    model.forward = MethodType(forward, model)


def restore_forward(module: Any) -> None:
    """Undo the replacement of a module's forward, which refers to the module and so keeps it alive."""
    vars(module).pop("forward", None)


def _per_response(output: Any, target_index: torch.Tensor) -> Any:
    """Arrange the fields of an output, (rows, targets), as (responses, tokens); other tokens get 0.

    Args:
        output: Output of TRL's fused output layer; its two-dimensional fields are arranged.
        target_index: Result of :func:`csr_vlm.models.prefix_tree.target_index`.
    """
    index, is_padding = target_index.clamp(min=0), target_index < 0
    fields = {
        key: value.flatten()[index].masked_fill(is_padding, 0) for key, value in output.items() if value.dim() == 2
    }
    return type(output)(**fields)


def disable_vision_gradients(model: Any) -> None:
    """Compute the frozen modules before the language model without gradients, for known families.

    With gradient checkpointing the outputs of the embeddings require gradients, and the backward
    pass would go through a vision tower that is not trained.
    """
    family = family_of(model.config)
    if family.features == "never":
        return
    modules = {
        name: module for name, module in model.base_model.named_children() if not re.fullmatch(family.text_module, name)
    }
    trained = {name for name, module in modules.items() if any(p.requires_grad for p in module.parameters())}
    if trained <= set(family.projectors):
        for name in modules.keys() - trained:
            modules[name].forward = torch.no_grad()(modules[name].forward)

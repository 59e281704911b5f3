"""Compute the memory and the disk space that a run needs, from the shape of its model.

Search holds the weights, the adapter in float32, the keys and values of the prompts in progress, those of the rows
(the path and the sentences of each group of siblings, once while they decode and once more for the next round), the
logits of a step, one prefill pass, and the scorer in float32. Training is counted in
:mod:`csr_vlm.pipeline.training_cost`.
"""

from __future__ import annotations

from csr_vlm.models.architecture import scorer_shape
from csr_vlm.pipeline.stage_costs import StageCosts

_PREFILL_TOKENS = 8192
"""Tokens of a prefill pass at most (csr_vlm.generation.scheduler)."""
_NODE_BYTES = 400
"""Bytes of one compressed ledger row, measured on LLaVA-like sentences of 20 tokens."""
_LOGIT_COPIES = 4
"""Float32 copies of a step's logits: raw, log-probabilities, sorted, masked."""


def memory_bytes(costs: StageCosts) -> dict[str, float]:
    """Return the peak bytes on one GPU of the search, the claim questions and the training."""
    config, shape, case = costs.config, costs.architecture, costs.case
    value, is_nf4 = costs.bytes_per_value, config.model.quantization is not None
    weights = shape.weight_bytes(value, nf4=is_nf4)
    lora = shape.lora_parameters(config.training.lora.r)
    scorer = 0.0 if config.scorer.path.startswith("judge:") else 4.0 * scorer_shape(config.scorer.path).parameters
    scorers = scorer * (1 + len(config.scorer.extra))
    beside = weights + 4.0 * lora + scorers
    prefill = _PREFILL_TOKENS * (shape.cache_bytes(value) + value * (8 * shape.width + 3 * shape.intermediate))
    logits = 4.0 * _LOGIT_COPIES * config.generation.max_rows * shape.vocabulary
    training = costs.trained.memory_bytes(config.training.max_tokens, lora, 0.0, value)
    return {
        "search": (beside + prefill + logits + cached_tokens(costs) * shape.cache_bytes(value)) * case.overhead,
        "claims": (beside + prefill) * case.overhead,
        "training": (weights + training) * case.overhead,
    }


def cached_tokens(costs: StageCosts) -> float:
    """Return the tokens whose keys and values the search stores at once."""
    config, case = costs.config, costs.case
    search = config.method.search
    beam = search.keep_top + search.keep_bottom
    rows = min(config.generation.max_rows, costs.num_prompts * beam * search.num_candidates)
    prompts = max(costs.prompts_per_beam * rows // (beam * search.num_candidates), 1)
    groups = rows / search.num_candidates
    longest = min(case.max_tokens, search.max_sentence_tokens)
    path = min(case.max_sentences, search.max_sentences) * costs.sentence_tokens
    group = path + search.num_candidates * longest
    # Groups that have ended wait, without padding, for the rest of their round.
    return prompts * costs.longest_prompt + groups * group + rows * costs.sentence_tokens


def disk_bytes(costs: StageCosts) -> float:
    """Return the bytes that a run writes: ledgers, adapters, one checkpoint, and the merged model if asked for."""
    config, shape = costs.config, costs.architecture
    lora = shape.lora_parameters(config.training.lora.r)
    ledger = costs.num_prompts * costs.rows.sentences * _NODE_BYTES
    checkpoint = 3 * 4.0 * lora
    merged = 2.0 * shape.parameters if config.training.merge else 0.0
    return config.iterations * (ledger + 4.0 * lora) + 4.0 * lora + checkpoint + merged

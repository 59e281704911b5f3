"""Compute the memory and the disk space that a run needs, from the shape of its model.

Search holds what is loaded, one prefill pass, what its rows store (:mod:`csr_vlm.generation.row_budget`), and the
sentences of the last round, which wait for the next. Training is counted in :mod:`csr_vlm.pipeline.training_cost`.
"""

from __future__ import annotations

from csr_vlm.generation.row_budget import MAX_PREFILL_TOKENS, RowShape
from csr_vlm.pipeline.stage_costs import StageCosts

_NODE_BYTES = 400
"""Bytes of one compressed ledger row, measured on LLaVA-like sentences of 20 tokens."""


def memory_bytes(costs: StageCosts) -> dict[str, float]:
    """Return the peak bytes on one GPU of the search, the claim questions and the training."""
    config, shape, case = costs.config, costs.architecture, costs.case
    value, search = costs.bytes_per_value, config.method.search
    prefill = shape.pass_bytes(MAX_PREFILL_TOKENS, value)
    beam = search.keep_top + search.keep_bottom
    rows = min(costs.max_rows, costs.num_prompts * beam * search.num_candidates)
    path = min(case.max_sentences, search.max_sentences) * costs.sentence_tokens
    longest = min(case.max_tokens, search.max_sentence_tokens)
    stored = RowShape(search.num_candidates, beam, path, longest, costs.prompts_per_beam)
    # Groups that have ended wait, without padding, for the rest of their round.
    waiting = rows * costs.sentence_tokens * shape.cache_bytes(value)
    decoding = stored.row_bytes(rows, costs.longest_prompt, shape, value)
    training = costs.trained.memory_bytes(
        config.training.max_tokens, shape.lora_parameters(config.training.lora.r), 0.0, value
    )
    return {
        "search": (costs.loaded_bytes + prefill + decoding + waiting) * case.overhead,
        "claims": (costs.loaded_bytes + prefill) * case.overhead,
        "training": (costs.weight_bytes + training) * case.overhead,
    }


def disk_bytes(costs: StageCosts) -> float:
    """Return the bytes that a run writes: ledgers, adapters, one checkpoint, and the merged model if asked for."""
    config, shape = costs.config, costs.architecture
    lora = shape.lora_parameters(config.training.lora.r)
    ledger = costs.num_prompts * costs.rows.sentences * _NODE_BYTES
    checkpoint = 3 * 4.0 * lora
    merged = 2.0 * shape.parameters if config.training.merge else 0.0
    return config.iterations * (ledger + 4.0 * lora) + 4.0 * lora + checkpoint + merged

"""Calibrated Self-Rewarding, algorithm 1 of arXiv 2405.14622.

    Input: images and prompts D, base policy pi_0, iterations T
    for t = 1 .. T:
        for each (x_v, x_t) in D:                                    generate
            until the responses end:
                propose sentences from every live partial response with pi_{t-1}
                R(s) = lambda R_I(s) + (1 - lambda) R_T(s)           (eq. 4)
                keep the top-k and the bottom-k partial responses
        y_w, y_l = responses of highest and lowest R(y)              make_pairs
        pi_t = DPO on (x, y_w, y_l) from pi_{t-1}, reference pi_{t-1}    train
    Output: pi_T

Where this departs from the paper: each policy is also evaluated, the base included; pairs that
would teach the wrong thing, and a policy that got worse, end the run with the policy before;
the adapter of pi_{t-1} is trained on instead of a merged model; every stage is resumable.
"""

from __future__ import annotations

from csr_vlm.core.progress import Reporter
from csr_vlm.pipeline import gates, stages
from csr_vlm.report.card import write_card
from csr_vlm.scale.executor import LOCAL, Executor
from csr_vlm.store.progress_file import record_progress
from csr_vlm.store.run import Run


def align(run: Run, reporter: Reporter, executor: Executor = LOCAL) -> None:
    """Run the whole method in a run directory, going on from whatever is there.

    Args:
        crew: Who generates and trains; what comes out does not depend on it.
    """
    with run.locked(), record_progress(run.root, reporter) as recorder:
        reporter = recorder
        stages.check_inputs(run, reporter)
        stages.evaluate(run, 0, reporter)
        for iteration in range(1, run.config.iterations + 1):
            stages.generate(run, iteration, reporter, executor)
            stages.make_pairs(run, iteration, reporter, executor)
            if gates.audit(run, iteration, reporter):
                break
            stages.train(run, iteration, reporter, executor)
            stages.evaluate(run, iteration, reporter)
            if gates.gate(run, iteration, reporter):
                break
        stages.export(run, reporter)
        if run.final:
            write_card(run)
        stages.report(run)

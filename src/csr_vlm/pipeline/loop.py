"""Run Calibrated Self-Rewarding, algorithm 1 of arXiv 2405.14622.

    Input: images and prompts D, base policy pi_0, iterations T           prompts
    for t = 1 .. T:
        for each (x_v, x_t) in D:                                         generate
            until the responses end:
                propose sentences from every live partial response with pi_{t-1}
                R(s) = lambda R_I(s) + (1 - lambda) R_T(s)                (eq. 4)
                keep the top-k and the bottom-k partial responses
        y_w, y_l = responses of highest and lowest R(y)                   pairs
        pi_t = DPO on (x, y_w, y_l) from pi_{t-1}, reference pi_{t-1}     train
    Output: pi_T

Departures from the paper: every policy is evaluated, including the base model (``evaluate``); the
run stops with the previous policy if the pairs are not worth training on (``audit``) or the new
policy is worse (``gate``); DPO continues the adapter of pi_{t-1} instead of merging it; every stage
can be resumed.
"""

from __future__ import annotations

from csr_vlm.core.memory import free_memory
from csr_vlm.core.progress import Reporter
from csr_vlm.pipeline import gates, stages
from csr_vlm.pipeline.schedule import Step, schedule
from csr_vlm.pipeline.tracking import Tracking
from csr_vlm.report.card import write_card
from csr_vlm.scale.executor import LOCAL, Executor
from csr_vlm.store.progress_file import record_progress
from csr_vlm.store.run import Run


def align(run: Run, reporter: Reporter, executor: Executor = LOCAL) -> None:
    """Run the whole method in a run directory, resuming from the stages that are done.

    Args:
        run: Run directory and configuration.
        reporter: Receives progress and log lines.
        executor: Runs search, claim questions and training; the result does not depend on it.

    Raises:
        CsrError: Another process works in the directory, the inputs cannot be used, or the audit
            stops the run before the first training.
    """
    with run.locked(), record_progress(run.root, reporter) as recorder:
        run.restore_manifest()
        if unverified := run.unverified_stages():
            recorder.log(f"no checksums were recorded for {', '.join(unverified)}: changes of their files go unnoticed")
        tracking = Tracking(run, recorder.log)
        for step in schedule(run):
            stops = _stops_after(step, run, recorder, executor)
            tracking.log_iterations()
            free_memory()
            if stops:
                break
        stages.export(run, recorder)
        if run.final:
            write_card(run)
        tracking.finish(stages.report(run))


def _stops_after(step: Step, run: Run, reporter: Reporter, executor: Executor) -> bool:
    """Do one step unless it is done already; return whether the run ends with it."""
    t = step.iteration
    match step.stage:
        case "prompts":
            stages.check_inputs(run, reporter)
        case "generate":
            if t == 1:
                stages.try_training(run, reporter, executor)
                free_memory()
            stages.generate(run, t, reporter, executor)
        case "pairs":
            stages.make_pairs(run, t, reporter, executor)
        case "audit":
            return gates.audit(run, t, reporter)
        case "train":
            stages.train(run, t, reporter, executor)
        case "evaluate":
            stages.evaluate(run, t, reporter)
            if t == 0:
                gates.check_rules(run)
        case "gate":
            return gates.gate(run, t, reporter)
        case _:
            raise AssertionError(step.stage)
    return False

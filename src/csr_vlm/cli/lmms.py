"""Implement ``csr eval lmms``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument
from csr_vlm.store import files
from csr_vlm.store.run import Run


def eval_lmms(
    target: RunArgument,
    tasks: Annotated[str, typer.Option(help="Comma-separated: mme, seed, llava_w, mmb, mm_vet, sqa, vizwiz, gqa.")],
    iteration: Annotated[
        list[int] | None,
        typer.Option("--iteration", min=0, help="Iteration; repeatable (default: base model and result)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of questions per task, for a quick test.")] = None,
    include: Annotated[
        Path | None, typer.Option(help="Folder of your own lmms-eval tasks; its code is executed.")
    ] = None,
) -> None:
    """Run benchmarks through lmms-eval.

    Results go to RUN/iteration-N/eval/lmms.json; the adapter is not merged.

    Example: csr eval lmms runs/llava --tasks mme,gqa
    """
    run = Run.open(target)
    console.quiet_libraries()
    from csr_vlm.evaluation import lmms

    benchmarks = lmms.select_benchmarks([name.strip() for name in tasks.split(",") if name.strip()], include)
    from csr_vlm.evaluation.lmms_model import PolicyModel
    from csr_vlm.generation.transformers_engine import TransformersEngine
    from csr_vlm.models.loading import load_policy

    reporter = console.reporter()
    results = {}
    with run.locked():
        for number in iteration if iteration is not None else sorted({0, run.final}):
            policy = load_policy(run.config.model, run.adapter_path(number), run.config.data.max_image_pixels)
            generation = run.config.generation
            model = PolicyModel(TransformersEngine(policy, generation.max_rows, generation.attention, reporter.log))
            reporter.log(f"{'base model' if number == 0 else f'iteration {number}'}: {', '.join(benchmarks)}")
            path = run.evaluation_path(number, "lmms")
            new = lmms.run_benchmarks(model, benchmarks, include=include, limit=limit)
            results[number] = lmms.merge_documents(
                run.stored_evaluation(number, "lmms") if path.is_file() else None, new
            )
            files.write_checksummed(path, results[number])
    if console.mode.json:
        console.print_json(
            [{"iteration": n, "metrics": r["metrics"], "protocol": r["protocol"]} for n, r in results.items()]
        )
    else:
        console.print_metrics("lmms-eval", {number: result["metrics"] for number, result in results.items()})
        console.log(f"next: csr reproduce {target} compares them with the paper")

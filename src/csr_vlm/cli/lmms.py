"""``csr eval lmms``: the paper's benchmarks through lmms-eval."""

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
    tasks: Annotated[str, typer.Option(help="Such as mme,gqa; known: mme seed llava_w mmb mm_vet sqa vizwiz gqa.")],
    iteration: Annotated[
        list[int] | None, typer.Option("--iteration", min=0, help="Which; base and result by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many questions, to try it out.")] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with own lmms-eval tasks; runs the code there.")] = None,
) -> None:
    """Measure base and result on benchmarks, without merging, into RUN/iteration-N/eval/lmms.json.

    Example: csr eval lmms runs/llava --tasks mme,gqa
    """
    opened = Run.open(target)
    console.quiet_libraries()
    from csr_vlm.evaluation import lmms

    benchmarks = lmms.chosen([name.strip() for name in tasks.split(",") if name.strip()], include)
    from csr_vlm.evaluation.lmms_model import PolicyModel
    from csr_vlm.generation.transformers_engine import TransformersEngine
    from csr_vlm.models.loading import load_policy

    reporter = console.reporter()
    results = {}
    with opened.locked():
        for number in iteration if iteration is not None else sorted({0, opened.final}):
            policy = load_policy(opened.config.model, opened.adapter_path(number), opened.config.data.max_image_pixels)
            generation = opened.config.generation
            model = PolicyModel(TransformersEngine(policy, generation.max_rows, generation.attention, reporter.log))
            reporter.log(f"{'base model' if number == 0 else f'iteration {number}'}: {', '.join(benchmarks)}")
            path = opened.evaluation_path(number, "lmms")
            new = lmms.run(model, benchmarks, include=include, limit=limit)
            results[number] = lmms.joined(files.read_json(path) if path.is_file() else None, new)
            files.write_json(path, results[number])
    if console.mode.json:
        console.print_json(
            [{"iteration": n, "metrics": r["metrics"], "protocol": r["protocol"]} for n, r in results.items()]
        )
    else:
        console.print_metrics("lmms-eval", {number: result["metrics"] for number, result in results.items()})
        console.log(f"next: csr reproduce {target} sets them beside the paper's")

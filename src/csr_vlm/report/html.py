"""One self-contained page that shows what a run did.

It loads nothing from anywhere, needs no script to be read, and is made from finished
stages only, so it can be written at any time of a run and always be written again.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from csr_vlm.core import formatting
from csr_vlm.evaluation.known_pictures import TruthOf, no_truth
from csr_vlm.report import panels, search_tree
from csr_vlm.report.annotate import SCALE_STEPS
from csr_vlm.report.audit_panel import health_panel
from csr_vlm.report.before_after import before_after
from csr_vlm.report.benchmark_panel import benchmark_panel
from csr_vlm.report.gallery import pair_gallery
from csr_vlm.report.introspection_panel import analysis_panel
from csr_vlm.report.lambdas import lambda_panel
from csr_vlm.report.limits import MOST_BYTES, Sample, cut
from csr_vlm.report.measures import Evaluation, evaluation_named, read_evaluation, verdict
from csr_vlm.report.next_steps import next_steps
from csr_vlm.report.provenance import provenance
from csr_vlm.store import files
from csr_vlm.store.run import Run
from csr_vlm.store.stage_names import LABELS, TIMED_STAGES


def write_report(run: Run, truth_of: TruthOf = no_truth) -> Path:
    """Write ``RUN/report.html`` from whatever stages of the run are done.

    Returns:
        The path of the report.
    """
    path = run.root / "report.html"
    files.write_text(path, render(run, truth_of))
    return path


def render(run: Run, truth_of: TruthOf = no_truth, most_bytes: int = MOST_BYTES) -> str:
    """Return the report of a run as HTML, sampled so that it takes no more than so many bytes."""
    evaluation = read_evaluation(run)
    content, sample = _content(run, evaluation, truth_of), Sample()
    while True:
        text = page("report.html.j2", **content, **_pictures(run, evaluation, sample, truth_of))
        if len(text.encode()) <= most_bytes or sample == sample.halved():
            return text
        sample = sample.halved()


def page(template: str, **content: Any) -> str:
    """Fill a template; the style sheet and the script go into the page as they stand."""
    environment = _environment()
    script, style = _source(environment, "script.js.j2"), _source(environment, "style.css.j2")
    return environment.get_template(template).render(
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        style=style,
        **content,
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("csr_vlm", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("fixed", "signed", "compact", "percent", "count", "plural", "indexed"):
        environment.filters[name] = getattr(formatting, name)
    environment.filters["reference"] = panels.reference_words
    environment.filters["cut"] = cut
    return environment


def _source(environment: Environment, name: str) -> str:
    """Read a file that goes into the page as it stands; nothing of a run is in it."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _content(run: Run, evaluation: Evaluation | None, truth_of: TruthOf) -> dict[str, Any]:
    prompts = run.result(0, "prompts") if run.is_done(0, "prompts") else {}
    pairs = panels.pair_results(run)
    training = panels.training_results(run)
    finished = run.is_finished
    lambdas, benchmarks = lambda_panel(run, truth_of), benchmark_panel(run)
    heldout = evaluation_named(run, "heldout") if evaluation and evaluation.truth_known else None
    return {
        "run": run,
        "config": run.config,
        "model_name": _last_part(run.config.model.path),
        "scorer_name": _last_part(run.config.scorer.path),
        "num_prompts": prompts.get("accepted"),
        "num_heldout": prompts.get("heldout"),
        "finished": finished,
        "verdict": verdict(run, evaluation),
        "evaluation": evaluation,
        "tiles": panels.headline_tiles(evaluation) if evaluation else panels.pair_tiles(pairs),
        "figures": panels.metric_figures(evaluation) if evaluation else [],
        "metrics": panels.metric_table(evaluation) if evaluation else None,
        "heldout": panels.metric_table(heldout) if heldout else None,
        "health": health_panel(run),
        "pairs": pairs,
        "pair_figures": panels.pair_figures(pairs),
        "training": training,
        "training_figures": panels.training_figures(training),
        "lambdas": lambdas,
        "benchmarks": benchmarks,
        "analysis": analysis_panel(run),
        "steps": next_steps(run, finished, lambdas, benchmarks),
        "provenance": provenance(run),
        "stages": [LABELS[stage] for stage in TIMED_STAGES],
    }


def _pictures(run: Run, evaluation: Evaluation | None, sample: Sample, truth_of: TruthOf) -> dict[str, Any]:
    """What grows with a run, and so is sampled."""
    return {
        "compared": before_after(run, evaluation, sample, truth_of) if evaluation else None,
        "gallery": pair_gallery(run, sample, truth_of),
        "scale_steps": SCALE_STEPS,
        "shapes": search_tree.SHAPES,
        "shape_names": search_tree.LEGEND,
    }


def _last_part(path: str) -> str:
    """Name a model by the last part of its path; a hub id keeps its owner."""
    return path if path.count("/") == 1 and not path.startswith(("/", ".")) else Path(path).name or path

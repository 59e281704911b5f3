"""Render one self-contained HTML page that shows what a run did.

The page loads nothing, can be read without scripts, and is built from finished stages only, so it
can be written at any time during a run.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from csr_vlm.core import formatting
from csr_vlm.core.secrets import redact
from csr_vlm.evaluation.known_pictures import TruthOf, no_truth
from csr_vlm.method.audit import FEWEST
from csr_vlm.report import panels, search_tree
from csr_vlm.report.annotate import MEANINGS, NUM_COLORS
from csr_vlm.report.audit_panel import audit_panel
from csr_vlm.report.before_after import CLEAN, before_after
from csr_vlm.report.benchmark_panel import benchmark_panel
from csr_vlm.report.charts import NUM_STYLES
from csr_vlm.report.conclusion import conclude, subject
from csr_vlm.report.costs import cost_table
from csr_vlm.report.evaluations import Evaluation, read_evaluation, read_named_evaluation
from csr_vlm.report.gallery import pair_gallery
from csr_vlm.report.introspection_panel import introspection_panel
from csr_vlm.report.lambda_panel import lambda_panel
from csr_vlm.report.limits import MAX_BYTES, Sample, shorten
from csr_vlm.report.next_steps import next_steps
from csr_vlm.report.provenance import provenance
from csr_vlm.store import files
from csr_vlm.store.run import Run
from csr_vlm.store.stage_names import LABELS, TIMED_STAGES


def write_report(run: Run, truth_of: TruthOf = no_truth, out: Path | None = None) -> Path:
    """Write the report from the finished stages to ``out`` (default: ``RUN/report.html``) and return its path."""
    path = out or run.root / "report.html"
    files.write_text(path, render(run, truth_of))
    return path


def render(run: Run, truth_of: TruthOf = no_truth, max_bytes: int = MAX_BYTES) -> str:
    """Return the report of a run as HTML.

    Args:
        run: The run.
        truth_of: Maps prompt ids to pictures with known contents.
        max_bytes: Size above which the page is rendered again with half the prompts and responses.
    """
    evaluation = read_evaluation(run)
    content, sample = _content(run, evaluation, truth_of), Sample()
    while True:
        text = redact(render_page("report.html.j2", **content, **_sampled_content(run, evaluation, sample, truth_of)))
        if len(text.encode()) <= max_bytes or sample == sample.halved():
            return text
        sample = sample.halved()


def render_page(template: str, **content: Any) -> str:
    """Render a template with the shared script and style sheet, which are inserted verbatim."""
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
    environment.filters["reference_source"] = panels.reference_source
    environment.filters["shorten"] = shorten
    environment.globals["num_styles"] = NUM_STYLES
    return environment


def _source(environment: Environment, name: str) -> str:
    """Read a file that is inserted verbatim; it contains nothing of a run."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _content(run: Run, evaluation: Evaluation | None, truth_of: TruthOf) -> dict[str, Any]:
    """Gather everything whose size does not grow with the number of prompts."""
    prompts = run.result(0, "prompts") if run.is_done(0, "prompts") else {}
    pairs = panels.pair_results(run)
    training = panels.training_results(run)
    finished = run.is_finished
    lambdas, benchmarks = lambda_panel(run, truth_of), benchmark_panel(run)
    heldout = read_named_evaluation(run, "heldout") if evaluation and evaluation.truth_known else None
    return {
        "run": run,
        "config": run.config,
        "run_name": run.root.resolve().name or "run",
        "model_name": _model_name(run.config.model.path),
        "scorer_name": _model_name(run.config.scorer.path),
        "num_prompts": prompts.get("accepted"),
        "num_heldout": prompts.get("heldout"),
        "finished": finished,
        "subject": subject(run, evaluation),
        "conclusion": conclude(run, evaluation),
        "evaluation": evaluation,
        "tiles": panels.headline_tiles(evaluation) if evaluation else panels.pair_tiles(pairs),
        "figures": panels.metric_figures(evaluation) if evaluation else [],
        "metrics": panels.metric_table(evaluation) if evaluation else None,
        "heldout": panels.metric_table(heldout) if heldout else None,
        "audit": audit_panel(run),
        "fewest": FEWEST,
        "pairs": pairs,
        "pair_figures": panels.pair_figures(pairs),
        "training": training,
        "training_figures": panels.training_figures(training, run.config.training.trl),
        "lambdas": lambdas,
        "benchmarks": benchmarks,
        "introspection": introspection_panel(run),
        "steps": next_steps(run, finished, lambdas, benchmarks),
        "costs": cost_table(run),
        "provenance": provenance(run),
        "stages": [LABELS[stage] for stage in TIMED_STAGES],
    }


def _sampled_content(run: Run, evaluation: Evaluation | None, sample: Sample, truth_of: TruthOf) -> dict[str, Any]:
    """Gather what grows with the number of prompts and therefore is sampled."""
    return {
        "compared": before_after(run, evaluation, sample, truth_of) if evaluation else None,
        "not_shown": CLEAN,
        "gallery": pair_gallery(run, sample, truth_of),
        "num_colors": NUM_COLORS,
        "claim_meanings": MEANINGS,
        "node_outlines": search_tree.OUTLINES,
        "node_legend": search_tree.LEGEND,
    }


def _model_name(path: str) -> str:
    """Return a Hub id unchanged, and the last part of a local path."""
    return path if path.count("/") == 1 and not path.startswith(("/", ".")) else Path(path).name or path

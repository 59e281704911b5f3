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

from csr_vlm.report import formats, panels
from csr_vlm.report.analysis import analysis_panel
from csr_vlm.report.gallery import SCALE_STEPS, pair_gallery, scene_gallery
from csr_vlm.report.health import health_panel
from csr_vlm.report.measures import read_evaluation, verdict
from csr_vlm.report.provenance import STAGES, provenance
from csr_vlm.store import files
from csr_vlm.store.run import Run


def write_report(run: Run) -> Path:
    """Write ``RUN/report.html`` from whatever stages of the run are done.

    Returns:
        The path of the report.
    """
    path = run.root / "report.html"
    files.write_text(path, render(run))
    return path


def render(run: Run) -> str:
    """Return the report of a run as HTML."""
    return page("report.html.j2", **_content(run))


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
        environment.filters[name] = getattr(formats, name)
    environment.filters["reference"] = panels.reference_words
    return environment


def _source(environment: Environment, name: str) -> str:
    """Read a file that goes into the page as it stands; nothing of a run is in it."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _content(run: Run) -> dict[str, Any]:
    evaluation = read_evaluation(run)
    prompts = run.result(0, "prompts") if run.is_done(0, "prompts") else {}
    pairs = panels.pair_results(run)
    training = panels.training_results(run)
    return {
        "run": run,
        "config": run.config,
        "model_name": _last_part(run.config.model.path),
        "scorer_name": _last_part(run.config.scorer.path),
        "num_prompts": prompts.get("accepted"),
        "num_heldout": prompts.get("heldout"),
        "finished": _finished(run),
        "verdict": verdict(run, evaluation),
        "evaluation": evaluation,
        "tiles": panels.headline_tiles(evaluation) if evaluation else panels.pair_tiles(pairs),
        "figures": panels.metric_figures(evaluation) if evaluation else [],
        "metrics": panels.metric_table(evaluation) if evaluation else None,
        "health": health_panel(run),
        "pairs": pairs,
        "pair_figures": panels.pair_figures(pairs),
        "training": training,
        "training_figures": panels.training_figures(training),
        "analysis": analysis_panel(run),
        "scenes": scene_gallery(evaluation) if evaluation else None,
        "gallery": pair_gallery(run),
        "scale_steps": SCALE_STEPS,
        "provenance": provenance(run),
        "stages": STAGES,
    }


def _last_part(path: str) -> str:
    """Name a model by the last part of its path; a hub id keeps its owner."""
    return path if path.count("/") == 1 and not path.startswith(("/", ".")) else Path(path).name or path


def _finished(run: Run) -> bool:
    if run.stopped_at is not None:
        return True
    last = run.config.iterations
    evaluated = run.config.evaluation.world is None or run.is_done(last, "evaluate")
    return run.is_done(last, "train") and evaluated

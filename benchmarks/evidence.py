"""Everything that the documentation claims about the method, from nothing: ``make evidence``.

    python benchmarks/evidence.py run --out build/evidence --jobs 2     # hours; may be stopped and called again
    python benchmarks/evidence.py write --out build/evidence --to docs/evidence
    python benchmarks/evidence.py try "half: method.lambda=0.5" --out build/evidence --seeds 0 1

``run`` does every job that has no result yet, each in a process with one thread, so that
results do not depend on how many run at a time. ``write`` makes the tables and plots.
A job is a whole run of the method on the embedded world under some settings, measured on
scenes that it was neither trained nor tuned on; ``JOBS`` lists them all. ``try`` does one
under settings of one's own, on development scenes, and prints each iteration's metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csr_vlm.store.run import Run

WHOLE_RESPONSES = "method.pairs.between=responses method.pairs.per_prompt=4 method.pairs.min_margin=0"
PLAIN_SUM = "method.reward.baseline=none method.reward.image_score=cosine"
OUR_RATE = "training.lora.r=16 training.lora.alpha=32 training.lora.dropout=0 training.projector_learning_rate=null "
OUR_RATE += "training.trl.learning_rate=3e-4 training.trl.per_device_train_batch_size=16 training.trl.warmup_steps=0"
NO_QUESTIONS = "method.pairs.questions.pattern="
JUDGE = "scorer.path=judge:policy scorer.others=0 method.reward.image_score=cosine method.reward.baseline=midrange "
JUDGE += NO_QUESTIONS


SETTINGS_SCENES = {"num_scenes": 500, "split": "development", "seed": 5}
SCORER_STEPS = (40, 160, 270, 320, 400, 640)
"""The shipped scorer was trained for 1,500."""
PRIORS, PRIOR_STEPS = (0.25, 0.5, 1.0, 1.4), 200
"""How often companions are imagined, as factors on the shipped world's, and the steps that teach it anew."""
WEIGHTS = ("0", "0.5", "0.9", "1")


@dataclass(frozen=True)
class Job:
    """One run of the method."""

    name: str
    group: str
    overrides: str = ""
    seed: int = 0
    iterations: int = 3
    measured: tuple[int, ...] = (3,)
    """Iterations to measure, greedily; 0 is the base model."""
    sampled: tuple[int, ...] = ()
    """Iterations to measure at temperature 1 as well."""
    scenes: int = 1000
    split: str = "test"
    prompts: int = 256
    world: str = "harbour"
    models: str | None = None
    """Directory of other base models, below the output's ``models``."""


def _tuning(name: str, overrides: str, **more: Any) -> Job:
    """Settings are compared on development scenes."""
    return Job(name, "settings", overrides, scenes=500, split="development", **more)


def _ablation(name: str, overrides: str) -> Job:
    return Job(name, "ablations", overrides, scenes=500, split="development")


JOBS = [
    *(Job("calibrated", "main", seed=s, iterations=5, measured=(0, 1, 2, 3, 4, 5), sampled=(0, 3)) for s in range(5)),
    *(Job("descriptions only", "questions", NO_QUESTIONS, seed=s, measured=(0, 1, 2, 3)) for s in range(5)),
    Job("random_pairs", "comparisons", "preset=random_pairs"),
    Job("only_rt", "comparisons", "preset=only_rt"),
    Job("only_ri", "comparisons", "preset=only_ri"),
    Job("paper", "comparisons", "preset=paper"),
    Job("paper, our rate", "comparisons", f"preset=paper {OUR_RATE}"),
    Job("official", "comparisons", "preset=official"),
    Job("official, our rate", "comparisons", f"preset=official {OUR_RATE}"),
    Job("self-judged", "comparisons", JUDGE),
    _ablation("calibrated", ""),
    _ablation("R_I as cosine, middle as baseline", "method.reward.image_score=cosine method.reward.baseline=midrange"),
    _ablation("plain sum", PLAIN_SUM),
    _ablation("mean instead of sum", f"{PLAIN_SUM} method.reward.response=mean {WHOLE_RESPONSES}"),
    _ablation("whole responses in pairs", WHOLE_RESPONSES),
    _ablation("best against worst response", f"{WHOLE_RESPONSES} method.pairs.per_prompt=1"),
    _ablation("no questions", NO_QUESTIONS),
    _ablation("repeats cost nothing", "method.reward.repeat_penalty=0"),
    _ablation("any margin", "method.pairs.min_margin=0"),
    _ablation("no look-ahead", "method.pairs.look_ahead=false"),
    _ablation("no greedy candidate", "method.search.greedy_first=false"),
    _ablation("no SFT term", "training.trl.loss_weights=[1.0,0.0]"),
    _ablation("search steered by likelihood", "method.search.steer_by=logprob"),
    _tuning("lambda 0.5", "method.lambda=0.5"),
    _tuning("2 candidates", "method.search.num_candidates=2"),
    _tuning("8 candidates", "method.search.num_candidates=8"),
    _tuning("keep 1 and 1", "method.search.keep_top=1 method.search.keep_bottom=1"),
    _tuning("64 prompts", "", prompts=64),
    _tuning("1024 prompts", "", prompts=1024),
    _tuning("half the rate", "training.trl.learning_rate=1.5e-4"),
    _tuning("double the rate", "training.trl.learning_rate=6e-4"),
    _tuning("beta 0.03", "training.trl.beta=0.03"),
    _tuning("beta 0.3", "training.trl.beta=0.3"),
    *(Job("market", "generality", seed=s, measured=(0, 1, 2, 3), world="market", models="market") for s in range(3)),
    *(Job("larger LLaVA", "generality", seed=s, measured=(0, 1, 2, 3), models="larger") for s in range(3)),
    *(Job("Idefics3", "generality", seed=s, measured=(0, 1, 2, 3), models="idefics3") for s in range(3)),
]


def directory_of(job: Job, out: Path) -> Path:
    return out / job.group / f"{job.name.replace(' ', '-').replace(',', '')}-{job.seed}"


def models_of(job: Job, out: Path) -> Path | None:
    return None if job.models is None else out / "models" / job.models


def do(job: Job, out: Path) -> None:
    """Run one job and write ``result.json`` last."""
    _one_thread()
    from csr_vlm.config.load import load_config
    from csr_vlm.core.progress import Silent
    from csr_vlm.pipeline import gates, stages
    from csr_vlm.pipeline.policy_evaluation import evaluate_world
    from csr_vlm.store import files
    from csr_vlm.store.run import Run
    from csr_vlm.world.demo import demo_config
    from csr_vlm.world.scenes import world_named

    root, models = directory_of(job, out), models_of(job, out)
    base = demo_config(out / "pictures", job.seed, job.prompts, job.scenes, world_named(job.world), models).dump()
    own = {key: base[key] for key in ("seed", "model", "scorer", "data")} | {
        "iterations": job.iterations,
        "evaluation": {"audit": "warn"},
    }
    config = load_config(None, job.overrides.split(), base=own)
    world = {"name": job.world, "split": job.split, "seed": 5, "num_scenes": job.scenes}
    measuring = load_config(None, (), base={**own, "evaluation": {"world": world}})
    run = Run.create(root, config)
    seconds = []
    with run.locked():
        stages.check_inputs(run, Silent())
        for iteration in range(job.iterations + 1):
            started = time.process_time()
            if iteration:
                stages.generate(run, iteration, Silent())
                stages.make_pairs(run, iteration, Silent())
                gates.audit(run, iteration, Silent())
                stages.train(run, iteration, Silent())
            seconds.append(time.process_time() - started)
            stages.evaluate(run, iteration, Silent())
            if iteration:
                gates.gate(run, iteration, Silent())
            wanted = [0.0] * (iteration in job.measured) + [1.0] * (iteration in job.sampled)
            for temperature in wanted:
                path = run.evaluation_path(iteration, f"world-{temperature:g}")
                if not path.exists():
                    found = evaluate_world(measuring, run.adapter_path(iteration), "", Silent(), temperature)
                    files.write_json(path, found)
    files.write_json(root / "result.json", {"seconds": seconds, "commit": _commit()})


def sweep_lambda(out: Path) -> None:
    """Train on the first ledger of the main run under eleven values of lambda."""
    run = out / "main" / "calibrated-0"
    values = ",".join(f"{tenth / 10:g}" for tenth in range(11))
    scenes = ["evaluation.world.num_scenes=500", "evaluation.world.split=development", "evaluation.world.seed=5"]
    command = [sys.executable, "-m", "csr_vlm.cli", "sweep", str(run), f"method.lambda={values}", *scenes]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(out / "lambda"), "--quiet", "--json"],
        env=alone,
        capture_output=True,
        text=True,
        check=True,
    )
    (out / "lambda.json").write_text(done.stdout, encoding="utf-8")


def grade_scorers(out: Path) -> None:
    """Train on the first ledger of the main run as scorers from early in their training would have it."""
    _one_thread()
    from csr_vlm.config.load import scorer_config
    from csr_vlm.core.progress import Silent
    from csr_vlm.pipeline import stages
    from csr_vlm.scoring.registry import load_scorer
    from csr_vlm.store.run import Run
    from csr_vlm.world.build import BuildPlan, build_scorer
    from csr_vlm.world.scene_evaluation import evaluate_scorer
    from csr_vlm.world.scenes import HARBOUR, Split

    run, path = Run.open(out / "main" / "calibrated-0"), out / "scorers.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for steps in SCORER_STEPS:
        name, directory = f"steps{steps}", out / "models" / f"scorer-{steps}"
        if any(row["steps"] == steps for row in rows):
            continue
        if not (directory / "model.safetensors").exists():
            build_scorer(HARBOUR, directory, BuildPlan(scorer_steps=steps))
        one = scorer_config(path=str(directory), name=name)
        stages.score(run, 1, one, Silent())
        areas = evaluate_scorer(HARBOUR, load_scorer(one, "cpu"), split=Split.DEVELOPMENT, seed=5, num_scenes=200)
        rows += [
            {"steps": steps, **areas, **found}
            for found in _by_lambda(run, out / "scorers" / name, [f"scorer.name={name}", f"scorer.path={directory}"])
        ]
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def grade_priors(out: Path) -> None:
    """Train one iteration on policies whose captions imagined companions less or more often than the shipped one's."""
    _one_thread()
    from csr_vlm.core.progress import Silent
    from csr_vlm.pipeline import stages
    from csr_vlm.store.run import Run
    from csr_vlm.world.build import PICK_UP_HABITS, BuildPlan, build
    from csr_vlm.world.demo import assets, demo_config
    from csr_vlm.world.scenes import HARBOUR

    path = out / "priors.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for strength in PRIORS:
        models = out / "models" / f"prior-{strength:g}"
        if any(row["strength"] == strength for row in rows):
            continue
        if not (models / "build.json").exists():
            habits = {
                kind: replace(habit, caption=strength * habit.caption, question=strength * habit.question)
                for kind, habit in HARBOUR.companions.items()
            }
            plan = BuildPlan(start=assets(), depth=1, policy_phases=(replace(PICK_UP_HABITS, steps=PRIOR_STEPS),))
            build(replace(HARBOUR, companions=habits), models, plan)
        run = Run.create(out / "priors" / f"{strength:g}", demo_config(out / "pictures", 0, 256, 500, HARBOUR, models))
        with run.locked():
            stages.check_inputs(run, Silent())
            stages.generate(run, 1, Silent())
        rows += [{"strength": strength, **found} for found in _by_lambda(run, run.root / "policies", [], base=True)]
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _by_lambda(run: Run, out: Path, overrides: list[str], *, base: bool = False) -> Iterator[dict[str, Any]]:
    """Train on a run's first ledger for each of ``WEIGHTS``; yield metrics of the pairs and what became of it."""
    from csr_vlm.config.load import load_config
    from csr_vlm.core.progress import Silent
    from csr_vlm.pipeline import gates, stages
    from csr_vlm.pipeline.policy_evaluation import evaluate_world
    from csr_vlm.training.dpo import train

    measuring = load_config(None, [f"evaluation.world={json.dumps(SETTINGS_SCENES)}"], base=run.config.dump())

    def measured(adapter: Path | None) -> dict[str, float]:
        document = evaluate_world(measuring, adapter, "", Silent())
        return {metric: found["value"] for metric, found in document["metrics"].items()}

    if base:
        yield {"lambda": "base", "metrics": measured(None)}
    for weight in WEIGHTS:
        config = load_config(None, [f"method.lambda={weight}", *overrides], base=run.config.dump())
        pairs, _ = stages.derive_pairs(run, 1, config)
        metrics = gates.pair_metrics(run, 1, config)
        adapter = out / weight
        train(pairs, config.model, config.training, previous=None, adapter=adapter, work=out / "work", seed=1)
        known = {"agreement": metrics["scorer_agreement"], "relevance_win": metrics["relevance_win"]}
        yield {"lambda": weight, **known, "metrics": measured(adapter)}


def _one_thread() -> None:
    import torch

    from csr_vlm.cli.console import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()


def _commit() -> str:
    shown = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return shown.stdout.strip()


def pending(out: Path, only: str | None) -> Iterator[int]:
    """Yield the numbers of the jobs that are to be done and can be."""
    for number, job in enumerate(JOBS):
        models = models_of(job, out)
        if (directory_of(job, out) / "result.json").exists() or only not in (None, job.group):
            continue
        if models is not None and not models.is_dir():
            print(f"{job.group}/{job.name}: no base model in {models}; make evidence makes it", file=sys.stderr)
            continue
        yield number


def run_all(out: Path, workers: int, only: str | None) -> None:
    """Do the pending jobs, several at a time, each in its own process."""

    def one(number: int) -> None:
        job, started = JOBS[number], time.perf_counter()
        command = [sys.executable, __file__, "job", str(number), "--out", str(out)]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        state = "done" if done.returncode == 0 else f"failed: {done.stderr.strip().splitlines()[-1:]}"
        print(f"{job.group}/{job.name} seed {job.seed}: {state}, {time.perf_counter() - started:.0f} s", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, pending(out, only)))
    if only in (None, "lambda") and not (out / "lambda.json").exists():
        sweep_lambda(out)
    if only in (None, "scorers"):
        grade_scorers(out)
    if only in (None, "priors"):
        grade_priors(out)


def run_preflight(setting: str, seeds: list[int], out: Path) -> None:
    """Run ``label: key=value ...`` and print a row an iteration."""
    from evidence_report import COLUMNS, Result, cells

    label, _, overrides = setting.partition(":")
    for seed in seeds:
        job = Job(
            label.strip(), "tried", overrides.strip(), seed, measured=(0, 1, 2, 3), scenes=500, split="development"
        )
        do(job, out)
        print(f"{job.name}, seed {seed}:", ", ".join(COLUMNS.values()))
        for iteration in job.measured:
            print(iteration, *cells(Result(job, out).values(iteration), COLUMNS), flush=True)


def main() -> None:
    """Run, write up, or try something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("run", "job", "write", "try"):
        verb = verbs.add_parser(name)
        verb.add_argument("--out", type=Path, default=Path("build/evidence"))
        if name == "run":
            verb.add_argument("--jobs", type=int, default=2, help="processes at a time")
            verb.add_argument("--only", help="one group of jobs")
        if name == "job":
            verb.add_argument("number", type=int)
        if name == "try":
            verb.add_argument("setting", help="'label: key=value ...' on top of the default preset")
            verb.add_argument("--seeds", type=int, nargs="+", default=[0])
        if name == "write":
            verb.add_argument("--to", type=Path, default=Path("docs/evidence"))
    arguments = parser.parse_args()
    if arguments.verb == "run":
        run_all(arguments.out, arguments.jobs, arguments.only)
    elif arguments.verb == "job":
        do(JOBS[arguments.number], arguments.out)
    elif arguments.verb == "try":
        run_preflight(arguments.setting, arguments.seeds, arguments.out)
    else:
        from evidence_report import write

        write(JOBS, arguments.out, arguments.to)


if __name__ == "__main__":
    main()

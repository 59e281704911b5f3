"""Reproduce from scratch every result that the documentation claims: ``make evidence``.

    python benchmarks/evidence.py run --out build/evidence --jobs 2     # takes hours; resumable
    python benchmarks/evidence.py write --out build/evidence --to docs/evidence
    python benchmarks/evidence.py try "half: method.lambda=0.5" --out build/evidence --seeds 0 1
    python benchmarks/evidence.py baseline --out build/baseline    # presets on profiles and on a world

A job is a complete run of the method on an embedded world with some settings; ``JOBS`` lists all of
them. ``run`` first draws a test seed that was never used and records it in the ledger (see
``seed_ledger.py``), then executes every job without a result, each in a process with one thread, so
that results do not depend on the number of parallel jobs. ``write`` writes the tables and plots; it
refuses a test seed that another table reports, unless ``--rerun`` is given. ``try`` runs one job with
your own settings on development scenes and prints the metrics of each iteration. ``baseline``
measures presets as they are: on profiles, without a model, and on development scenes of a world.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

import baseline
import seed_ledger

from csr_vlm.core.errors import CsrError
from csr_vlm.core.seeds import EVALUATION_SEEDS

if TYPE_CHECKING:
    from csr_vlm.store.run import Run

WHOLE_RESPONSES = "method.pairs.between=responses method.pairs.per_prompt=4 method.pairs.min_margin=0"
OUR_RATE = "training.lora.r=16 training.lora.alpha=32 training.lora.dropout=0 training.projector_learning_rate=null "
OUR_RATE += "training.trl.learning_rate=3e-4 training.trl.per_device_train_batch_size=16 training.trl.warmup_steps=0"
NO_QUESTIONS = "method.pairs.questions.per_prompt=0"

DEVELOPMENT_SEED = EVALUATION_SEEDS["development"][5]
SETTINGS_SCENES = {"num_scenes": 500, "split": "development", "seed": DEVELOPMENT_SEED}
SCORER_STEPS = (40, 160, 270, 320, 400, 640)
"""Training steps of the weaker scorers; the shipped scorer was trained for 1,500."""
PRIORS, PRIOR_STEPS = (0.25, 0.5, 1.0, 1.4), 200
"""Strengths of the co-occurrence prior, as factors on the shipped world's, and training steps for each."""
WEIGHTS = ("0", "0.5", "0.9", "1")
"""Values of lambda."""
SEEDS = range(3)
"""Seeds of every row but the headline's, which has five."""


@dataclass(frozen=True)
class Job:
    """Describe one run of the method and its evaluation."""

    name: str
    group: str
    overrides: str = ""
    seed: int = 0
    iterations: int = 3
    measured: tuple[int, ...] = (3,)
    """Iterations to evaluate with greedy decoding; 0 is the base model."""
    sampled: tuple[int, ...] = ()
    """Iterations to evaluate at temperature 1 as well."""
    scenes: int = 1000
    split: str = "test"
    prompts: int = 256
    world: str = "harbour"
    models: str | None = None
    """Folder below ``OUT/models`` with other base models; None for the shipped ones."""

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}/{self.seed}"


def _comparison(name: str, overrides: str) -> list[Job]:
    """Define the jobs of another method, on test scenes."""
    return [Job(name, "comparisons", overrides, seed=seed) for seed in SEEDS]


def _tuning(name: str, overrides: str, **more: Any) -> list[Job]:
    """Define the jobs that compare a setting on development scenes."""
    return [Job(name, "settings", overrides, seed, scenes=500, split="development", **more) for seed in SEEDS]


BASELINE_SIZE = {"prompts": 48, "scenes": 200}
"""Small, so that all presets and seeds take less than an hour on two cores."""

ABLATIONS = {
    "calibrated": "",
    "no self-consistency": "method.reward.consistency=0",
    "no questions": NO_QUESTIONS,
    "a false claim costs no more": "method.reward.false_cost=1",
    "repeats cost nothing": "method.reward.repeat_penalty=0",
    "ending is never rejected": "method.pairs.true_above=1000",
    "no SFT term": "training.trl.loss_weights=[1.0,0.0]",
    "search steered by likelihood": "method.search.steer_by=logprob",
    "no greedy candidate": "method.search.greedy_first=false",
    "whole responses in pairs": WHOLE_RESPONSES,
    "margin 3": "method.pairs.min_margin=3",
    "both judges": "scorer.use=clip+clip_b",
}
"""Parts of the default preset that are changed one at a time."""


def ablation_jobs() -> list[Job]:
    """Define the jobs that change one part of the method, on development scenes of ``prose``, seed by seed."""
    more: dict[str, Any] = {"split": "development", "world": "prose", "measured": (0, 3), **BASELINE_SIZE}
    return [Job(name, "ablations", overrides, seed, **more) for seed in SEEDS for name, overrides in ABLATIONS.items()]


def baseline_jobs(world: str) -> list[Job]:
    """Define the jobs of every preset as it is, on development scenes of a world."""
    more: dict[str, Any] = {"split": "development", "world": world, **BASELINE_SIZE}
    return [
        Job(name, f"baseline-{world}", overrides, seed, measured=(0, 3), **more)
        for name, overrides in baseline.PRESETS.items()
        for seed in SEEDS
    ]


PROSE: dict[str, Any] = {"world": "prose", "prompts": 192, "scenes": 500, "measured": (0, 1, 2, 3)}

JOBS = [
    *(Job("calibrated", "main", seed=s, iterations=5, measured=(0, 1, 2, 3, 4, 5), sampled=(0, 3)) for s in range(5)),
    *(Job("descriptions only", "questions", NO_QUESTIONS, seed=s, measured=(0, 1, 2, 3)) for s in range(5)),
    *(Job("prose", "prose", seed=s, **PROSE) for s in range(5)),
    *(Job("prose with judge B", "prose", "scorer.use=clip_b", seed=s, **PROSE) for s in SEEDS),
    *(Job("prose with both judges", "prose", "scorer.use=clip+clip_b", seed=s, **PROSE) for s in SEEDS),
    *_comparison("random_pairs", "preset=random_pairs"),
    *_comparison("only_rt", "preset=only_rt"),
    *_comparison("only_ri", "preset=only_ri"),
    *_comparison("paper", "preset=paper"),
    *_comparison("paper, our rate", f"preset=paper {OUR_RATE}"),
    *_comparison("official", "preset=official"),
    *_comparison("official, our rate", f"preset=official {OUR_RATE}"),
    *ablation_jobs(),
    *_tuning("calibrated", ""),
    *_tuning("lambda 0.5", "method.lambda=0.5"),
    *_tuning("2 candidates", "method.search.num_candidates=2"),
    *_tuning("8 candidates", "method.search.num_candidates=8"),
    *_tuning("keep 1 and 1", "method.search.keep_top=1 method.search.keep_bottom=1"),
    *_tuning("64 prompts", "", prompts=64),
    *_tuning("1024 prompts", "", prompts=1024),
    *_tuning("half the rate", "training.trl.learning_rate=1.5e-4"),
    *_tuning("double the rate", "training.trl.learning_rate=6e-4"),
    *_tuning("beta 0.03", "training.trl.beta=0.03"),
    *_tuning("beta 0.3", "training.trl.beta=0.3"),
    *(Job("market", "generality", seed=s, measured=(0, 1, 2, 3), world="market", models="market") for s in range(3)),
    *(Job("larger LLaVA", "generality", seed=s, measured=(0, 1, 2, 3), models="larger") for s in range(3)),
    *(Job("Idefics3", "generality", seed=s, measured=(0, 1, 2, 3), models="idefics3") for s in range(3)),
]


def directory_of(job: Job, out: Path) -> Path:
    return out / job.group / f"{job.name.replace(' ', '-').replace(',', '')}-{job.seed}"


def models_of(job: Job, out: Path) -> Path | None:
    return None if job.models is None else out / "models" / job.models


def base_evaluation(job: Job, out: Path, seed: int, temperature: float) -> Path:
    """Return where the base model's metrics are kept: all jobs on the same scenes share them."""
    name = f"{job.models or 'shipped'}-{job.world}-{job.split}-{seed}-{job.scenes}-{temperature:g}.json"
    return out / "base" / name


def run_job(job: Job, out: Path) -> None:
    """Run one job; write ``result.json`` last."""
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
    layer = {key: base[key] for key in ("seed", "model", "scorer", "data")} | {
        "method": {"claims": base["method"]["claims"]},
        "iterations": job.iterations,
        "evaluation": {"audit": "warn"},
    }
    config = load_config(None, job.overrides.split(), base=layer)
    seed = seed_ledger.seed_of(out) if job.split == "test" else DEVELOPMENT_SEED
    world = {"name": job.world, "split": job.split, "seed": seed, "num_scenes": job.scenes}
    measuring = load_config(None, (), base={**layer, "evaluation": {"world": world}})
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
            temperatures = [0.0] * (iteration in job.measured) + [1.0] * (iteration in job.sampled)
            for temperature in temperatures:
                path = run.evaluation_path(iteration, f"world-{temperature:g}")
                if not path.exists():
                    measured = base_evaluation(job, out, seed, temperature) if iteration == 0 else path
                    if not measured.exists():
                        document = evaluate_world(measuring, run.adapter_path(iteration), "", Silent(), temperature)
                        files.write_json(measured, document)
                    if measured != path:
                        shutil.copyfile(measured, path)
    files.write_json(root / "result.json", {"seconds": seconds, "commit": _commit()})


def sweep_lambda(out: Path) -> None:
    """Train on the first ledger of the main run with eleven values of lambda."""
    run = out / "main" / "calibrated-0"
    values = ",".join(f"{tenth / 10:g}" for tenth in range(11))
    scenes = ["evaluation.world.num_scenes=500", "evaluation.world.split=development"]
    scenes.append(f"evaluation.world.seed={DEVELOPMENT_SEED}")
    command = [sys.executable, "-m", "csr_vlm.cli", "sweep", str(run), f"method.lambda={values}", *scenes]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(out / "lambda"), "--quiet", "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    (out / "lambda.json").write_text(done.stdout, encoding="utf-8")


def vary_scorer(out: Path) -> None:
    """Train on the first ledger of the main run, rescored by scorers of increasing quality."""
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
        config = scorer_config(path=str(directory), name=name)
        stages.score(run, 1, config, Silent())
        aucs = evaluate_scorer(
            HARBOUR, load_scorer(config, "cpu"), split=Split.DEVELOPMENT, seed=DEVELOPMENT_SEED, num_scenes=200
        )
        rows += [
            {"steps": steps, **aucs, **result}
            for result in _by_lambda(run, out / "scorers" / name, [f"scorer.name={name}", f"scorer.path={directory}"])
        ]
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def vary_prior(out: Path) -> None:
    """Train one iteration from base models with a weaker or stronger co-occurrence prior than the shipped one."""
    _one_thread()
    from base_models import build_from_shipped

    from csr_vlm.core.progress import Silent
    from csr_vlm.pipeline import stages
    from csr_vlm.store.run import Run
    from csr_vlm.world.build import PICK_UP_HABITS, BuildPlan
    from csr_vlm.world.demo import demo_config
    from csr_vlm.world.scenes import HARBOUR

    path = out / "priors.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for strength in PRIORS:
        models = out / "models" / f"prior-{strength:g}"
        if any(row["strength"] == strength for row in rows):
            continue
        if not (models / "build.json").exists():
            companions = {
                kind: replace(prior, caption=strength * prior.caption, question=strength * prior.question)
                for kind, prior in HARBOUR.companions.items()
            }
            plan = BuildPlan(policy_phases=(replace(PICK_UP_HABITS, steps=PRIOR_STEPS),))
            build_from_shipped(replace(HARBOUR, companions=companions), models, plan)
        run = Run.create(out / "priors" / f"{strength:g}", demo_config(out / "pictures", 0, 256, 500, HARBOUR, models))
        with run.locked():
            stages.check_inputs(run, Silent())
            stages.generate(run, 1, Silent())
        rows += [{"strength": strength, **result} for result in _by_lambda(run, run.root / "policies", [], base=True)]
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _by_lambda(run: Run, out: Path, overrides: list[str], *, base: bool = False) -> Iterator[dict[str, Any]]:
    """Train on a run's first ledger with each lambda of ``WEIGHTS``; yield metrics of the pairs and of the policy."""
    from csr_vlm.config.load import load_config
    from csr_vlm.core.progress import Silent
    from csr_vlm.pipeline import gates, stages
    from csr_vlm.pipeline.policy_evaluation import evaluate_world
    from csr_vlm.store import tables
    from csr_vlm.training.dpo import train

    measuring = load_config(None, [f"evaluation.world={json.dumps(SETTINGS_SCENES)}"], base=run.config.dump())

    def measure(adapter: Path | None) -> dict[str, float]:
        document = evaluate_world(measuring, adapter, "", Silent())
        return {name: metric["value"] for name, metric in document["metrics"].items()}

    if base:
        yield {"lambda": "base", "metrics": measure(None)}
    for weight in WEIGHTS:
        config = load_config(None, [f"method.lambda={weight}", *overrides], base=run.config.dump())
        pairs, _ = stages.derive_pairs(run, 1, config)
        metrics = gates.pair_metrics(run, 1, config)
        adapter = out / weight
        tables.write_pairs(out / f"{weight}.parquet", pairs)
        train(
            [out / f"{weight}.parquet"],
            config.model,
            config.training,
            previous=None,
            adapter=adapter,
            work=out / "work",
            seed=1,
        )
        pair_metrics = {"agreement": metrics["scorer_agreement"], "relevance_win": metrics["relevance_win"]}
        yield {"lambda": weight, **pair_metrics, "metrics": measure(adapter)}


def _one_thread() -> None:
    """Restrict PyTorch to one thread, and silence libraries."""
    import torch

    from csr_vlm.cli.console import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()


def _commit() -> str:
    shown = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return shown.stdout.strip()


def job_of(key: str) -> Job:
    """Return the job with a key, as ``Job.key`` writes it."""
    group = key.partition("/")[0]
    jobs = baseline_jobs(group.removeprefix("baseline-")) if group.startswith("baseline-") else JOBS
    return next(job for job in jobs if job.key == key)


def pending(jobs: Sequence[Job], out: Path) -> Iterator[Job]:
    """Yield the jobs that have no result, and whose world and base models exist."""
    from csr_vlm.world.scenes import all_worlds

    for job in jobs:
        models = models_of(job, out)
        if (directory_of(job, out) / "result.json").exists():
            continue
        if job.world not in all_worlds():
            print(f"{job.key}: this version has no world {job.world!r}", file=sys.stderr)
        elif models is not None and not models.is_dir():
            print(f"{job.key}: no base model in {models}; make evidence builds it", file=sys.stderr)
        else:
            yield job


def run_jobs(jobs: Sequence[Job], out: Path, workers: int) -> None:
    """Run the pending jobs in parallel, each in its own process."""

    def run_in_process(job: Job) -> None:
        started = time.perf_counter()
        command = [sys.executable, __file__, "job", job.key, "--out", str(out)]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        outcome = "done" if done.returncode == 0 else f"failed: {done.stderr.strip().splitlines()[-1:]}"
        print(f"{job.key}: {outcome}, {time.perf_counter() - started:.0f} s", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run_in_process, pending(jobs, out)))


def run_all(out: Path, workers: int, only: str | None, purpose: str, rerun: int | None) -> None:
    """Draw a test seed if a pending job needs one, then run the pending jobs."""
    jobs = [job for job in JOBS if only in (None, job.group)]
    if any(job.split == "test" for job in pending(jobs, out)):
        origin = seed_ledger.Origin("benchmarks/evidence.py " + " ".join(sys.argv[1:]), _commit(), purpose)
        seed = seed_ledger.prepare(out, seed_ledger.LEDGER, origin, rerun)
        print(f"test seed {seed}; commit {seed_ledger.LEDGER} with the tables", flush=True)
    run_jobs(jobs, out, workers)
    if only in (None, "lambda") and not (out / "lambda.json").exists():
        sweep_lambda(out)
    if only in (None, "scorers"):
        vary_scorer(out)
    if only in (None, "priors"):
        vary_prior(out)


def try_settings(setting: str, seeds: list[int], out: Path, world: str, prompts: int) -> None:
    """Run ``label: key=value ...`` and print one row of metrics per iteration."""
    from evidence_report import COLUMNS, Result, cells

    label, _, overrides = setting.partition(":")
    size: dict[str, Any] = {"world": world, "prompts": prompts, "scenes": 500, "split": "development"}
    for seed in seeds:
        job = Job(label.strip(), "tried", overrides.strip(), seed, measured=(0, 1, 2, 3), **size)
        run_job(job, out)
        print(f"{job.name}, seed {seed}:", ", ".join(COLUMNS.values()))
        for iteration in job.measured:
            print(iteration, *cells(Result(job, out).values(iteration), COLUMNS), flush=True)


def run_baseline(out: Path, to: Path, workers: int, world: str, profiles_only: bool) -> None:
    """Measure every preset as it is on the profiles and on a world; write ``baseline.md`` and ``baseline.json``."""
    from evidence_report import write_baseline

    rows = baseline.measure_profiles(out, _commit())
    jobs = [] if profiles_only else baseline_jobs(world)
    run_jobs(jobs, out, workers)
    write_baseline(rows, jobs, out, to)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("run", "job", "write", "try", "baseline"):
        verb = verbs.add_parser(name)
        default = "build/baseline" if name == "baseline" else "build/evidence"
        verb.add_argument("--out", type=Path, default=Path(default), help="folder of results")
        if name in ("run", "baseline"):
            verb.add_argument("--jobs", type=int, default=2, help="number of parallel processes")
        if name == "run":
            verb.add_argument("--only", help="run only this group of jobs")
            verb.add_argument("--purpose", default="docs/evidence/README.md", help="what the ledger says of the seed")
            verb.add_argument("--rerun", type=int, metavar="SEED", help="use this test seed again, although it is used")
        if name == "job":
            verb.add_argument("key", help="group/name/seed")
        if name == "try":
            verb.add_argument("setting", help="'label: key=value ...', overrides of the default preset")
            verb.add_argument("--seeds", type=int, nargs="+", default=[0])
            verb.add_argument("--prompts", type=int, default=256, help="number of images")
        if name in ("write", "baseline"):
            verb.add_argument("--to", type=Path, default=Path("docs/evidence"))
        if name == "write":
            verb.add_argument("--rerun", action="store_true", help="report a used test seed, marked as a rerun")
        if name in ("try", "baseline"):
            verb.add_argument("--world", default="harbour" if name == "try" else "prose", help="world of the runs")
        if name == "baseline":
            verb.add_argument("--profiles-only", action="store_true", help="measure profiles only: no model, minutes")
    return parser.parse_args()


def main() -> int:
    """Parse the command line and run the command."""
    arguments = _arguments()
    out: Path = arguments.out
    try:
        if arguments.verb == "run":
            run_all(out, arguments.jobs, arguments.only, arguments.purpose, arguments.rerun)
        elif arguments.verb == "job":
            run_job(job_of(arguments.key), out)
        elif arguments.verb == "try":
            try_settings(arguments.setting, arguments.seeds, out, arguments.world, arguments.prompts)
        elif arguments.verb == "baseline":
            run_baseline(out, arguments.to, arguments.jobs, arguments.world, arguments.profiles_only)
        else:
            from evidence_report import write

            write(JOBS, out, arguments.to, rerun=arguments.rerun)
    except CsrError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

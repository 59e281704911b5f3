"""Verbs that write take the lock, verbs that read need none; secrets stay where they are."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from csr_vlm.cli import error_messages
from csr_vlm.cli.app import app
from csr_vlm.config.load import load_config, resolve
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Pair, Response
from csr_vlm.core.secrets import is_secret_name, redact, without_secrets
from csr_vlm.report.card import render_card
from csr_vlm.store import files, tables
from csr_vlm.store.lock import lock_directory
from csr_vlm.store.run import Run
from tests.faults.runs import write_run
from tests.unit.builders import REQUIRED

TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = write_run(tmp_path / "run")
    adapter = run.root / "adapter"
    adapter.mkdir()
    for path in (run.iteration(1) / "adapter").iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    return run


def csr(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


WRITING = {
    "merge": (),
    "merge elsewhere": ("--out", "model"),
    "export": ("--format", "sentinel", "--out", "exported"),
    "sweep": ("method.lambda=0.1",),
    "report": (),
    "push": ("me/adapter",),
}


@pytest.mark.parametrize("verb", WRITING)
def test_a_verb_that_writes_is_refused_while_another_holds_the_run(run, verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with run.locked(), pytest.raises(CsrError, match="in use by another process"):
        csr(verb.split()[0], run.root, *WRITING[verb])
    assert not (run.root / "model").exists()
    assert not (tmp_path / "exported").exists()


READING = {
    "show": (),
    "report": ("--out", "elsewhere"),
    "eval": (),
    "push": ("me/adapter", "--dry-run"),
}


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in (root, *root.rglob("*"))}


@pytest.mark.parametrize("verb", READING)
def test_reading_a_finished_run_writes_nothing_in_it(run, verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("csr_vlm.cli.console.quiet_libraries", lambda: None)
    before = snapshot(run.root)
    csr(verb, run.root, *READING[verb])
    assert snapshot(run.root) == before
    assert capsys.readouterr().out


def test_export_from_a_run_on_a_read_only_disk(run, tmp_path, monkeypatch):
    allows = os.access
    denied = (run.root, os.W_OK)
    monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != denied and allows(path, mode))
    before = snapshot(run.root)
    csr("export", run.root, "--format", "sentinel", "--out", tmp_path / "exported")
    assert snapshot(run.root) == before
    with pytest.raises(CsrError, match="in use"), run.locked():
        csr("export", run.root, "--format", "sentinel", "--out", run.root / "exported")


def test_an_export_names_no_image_that_is_absent_or_exchanged(run, tmp_path):
    image = Path(next(run.pairs(1)).prompt.image)
    content = image.read_bytes()
    image.write_bytes(content + b"\0")
    with pytest.raises(CsrError, match="not now: changed"):
        csr("export", run.root, "--format", "llava", "--out", tmp_path / "exported")
    image.unlink()
    with pytest.raises(CsrError, match="missing"):
        csr("export", run.root, "--format", "llava", "--out", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_an_export_says_what_it_writes_and_what_not(run, tmp_path, capsys):
    prompts = list(run.prompts())
    answer = Response("chosen", (1,), -1.0, "Yes.", 1, 0.0, complete=True)
    questions = [
        Pair(replace(prompt, prompt_id=f"{prompt.prompt_id}?0"), 1, answer, replace(answer, text="No."))
        for prompt in prompts
    ]
    pairs = list(run.pairs(1))
    result = {key: value for key, value in run.result(1, "pairs").items() if key != "files"}
    tables.write_pairs(run.questions_path(1), questions, run.root)
    written = [run.pairs_path(1), run.questions_path(1)]
    run.mark_done(1, "pairs", written, **{**result, "questions": len(questions)})

    def export(form, *options):
        csr("export", run.root, "--format", form, "--out", tmp_path / form, *options)
        return capsys.readouterr().err

    half = sum(not pair.chosen.complete for pair in pairs)
    assert 0 < half < len(pairs)
    said = export("sentinel")
    assert f"exported {len(pairs)} sibling pairs and {len(questions)} question pairs of iteration 1" in said
    rows = json.loads((tmp_path / "sentinel" / "pairs.json").read_text())
    assert len(rows) == len(pairs) + len(questions)
    assert [row["margin"] for row in rows] == [*(pair.margin for pair in pairs), *([0.0] * len(questions))]
    assert {row["context"] for row in rows if row["context"]} == {"Sentence 0.", "Sentence 1."}
    assert rows[0]["context"] + rows[0]["y_win"] == pairs[0].chosen.text
    assert f"those of {half} pairs go on" in export("llava")
    assert len(json.loads((tmp_path / "llava" / "pairs.json").read_text())) == len(rows)
    said = export("llamafactory", "--pairs", "responses")
    whole = json.loads((tmp_path / "llamafactory" / "pairs.json").read_text())
    assert (
        f"exported {len(whole)} whole-response pairs in place of {len(pairs)} sibling pairs; "
        f"{len(questions)} question pairs left out" in said
    )
    assert "Write only" not in whole[0]["conversations"][0]["value"]


def test_the_dataset_card_says_what_the_pairs_are(run, tmp_path):
    out = tmp_path / "exported"
    csr("export", run.root, "--format", "sentinel", "--out", out, "--base-model", "org/base")
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["configs"] == [{"config_name": "default", "data_files": "pairs.json"}]
    assert header["size_categories"] == ["n<1K"]
    assert "org/base generated both responses" in card
    assert "sibling pairs" in card
    assert str(tmp_path) not in card
    (out / "README.md").write_text("mine")
    csr("export", run.root, "--format", "sentinel", "--out", out)
    assert (out / "README.md").read_text() == "mine", "a README of another origin is left alone"


def test_the_model_card_is_true_for_external_pairs(run, tmp_path):
    settings = run.config.dump()
    settings["data"]["pairs"] = "openbmb/RLAIF-V-Dataset"
    settings["model"]["path"] = str(tmp_path / "models" / "llava")
    (run.root / "config.yaml").write_text(json.dumps(settings))
    card = render_card(Run.open(run.root))
    header = yaml.safe_load(card.split("---")[1])
    assert header["datasets"] == ["openbmb/RLAIF-V-Dataset"]
    assert "base_model" not in header
    assert "with DPO by csr-vlm" in card
    assert "preference pairs from openbmb/RLAIF-V-Dataset" in card
    assert "external, no rewards" in card
    assert "No human" not in card
    assert str(tmp_path) not in card
    named = render_card(Run.open(run.root), "org/llava")
    assert yaml.safe_load(named.split("---")[1])["base_model"] == "org/llava"
    assert "from_pretrained('org/llava')" in named
    assert named.count("org/llava") >= 3, "also in the recipe"


def test_the_model_card_says_that_pictures_were_limited(run):
    assert "max_image_tokens" not in render_card(run).split("## Recipe")[0]
    settings = run.config.dump()
    settings["model"]["max_image_tokens"] = 768
    (run.root / "config.yaml").write_text(json.dumps(settings))
    assert "at most 768 tokens" in render_card(Run.open(run.root)).split("## Recipe")[0]


def test_push_refuses_weights_that_training_did_not_write(run):
    (run.root / "adapter" / "adapter_model.safetensors").write_bytes(b"\1" * 64)
    with pytest.raises(CsrError, match="was changed"):
        csr("push", run.root, "me/adapter", "--dry-run")


# Temporary files, permissions, locks


def test_temporaries_of_two_processes_and_machines_differ(tmp_path, monkeypatch):
    first = files._temporary(tmp_path / "model")
    monkeypatch.setattr(os, "getpid", lambda: 7)
    second = files._temporary(tmp_path / "model")
    monkeypatch.setattr(files, "_HOST", "elsewhere")
    assert len({first, second, files._temporary(tmp_path / "model")}) == 3
    assert second.name.endswith(".7.tmp")


def test_a_second_writer_leaves_the_half_written_folder_of_the_first(tmp_path):
    half_written = tmp_path / f".model.{files._HOST}.{os.getppid()}.tmp"
    left = tmp_path / f".model.{files._HOST}.{2**22 + 1}.tmp"
    for folder in (half_written, left):
        folder.mkdir()
        (folder / "weights").write_text("half")

    def fill(temporary: Path) -> None:
        temporary.mkdir(exist_ok=True)
        (temporary / "weights").write_text("whole")

    files.replace_directory(tmp_path / "model", fill)
    assert (half_written / "weights").read_text() == "half"
    assert not left.exists(), "its process is gone"
    assert (tmp_path / "model" / "weights").read_text() == "whole"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_get_the_permissions_of_the_umask(tmp_path, umask, mode):
    def fill(temporary: Path) -> None:
        temporary.mkdir(exist_ok=True)
        (temporary / "weights").touch(0o600)

    before = os.umask(umask)
    try:
        files.replace_directory(tmp_path / "model", fill)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model" / "weights").stat().st_mode) == mode
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["weights"]


def test_a_link_that_appears_after_the_check_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("content")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    monkeypatch.setattr(Path, "is_symlink", lambda path: False)
    with pytest.raises((CsrError, OSError)), lock_directory(tmp_path / "run"):
        pytest.fail("the lock followed the link")
    assert (tmp_path / "precious").read_text() == "content"


def test_a_second_command_leaves_the_configuration_of_a_working_run(tmp_path):
    run = Run.create(tmp_path / "new", resolve(REQUIRED))
    before = (run.root / "config.yaml").read_bytes()
    with run.locked(), pytest.raises(CsrError, match="in use by another process"):
        Run.create(run.root, resolve(REQUIRED | {"seed": 7}))
    assert (run.root / "config.yaml").read_bytes() == before
    assert Run.create(run.root, resolve(REQUIRED | {"seed": 7})).config.seed == 7, "nothing was finished"


def test_a_link_in_place_of_a_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("content")
    files._temporary(tmp_path / "new.json").symlink_to(tmp_path / "precious")
    files.write_json(tmp_path / "new.json", 1)
    assert (tmp_path / "precious").read_text() == "content"
    assert (tmp_path / "new.json").read_text() == "1\n"


# Secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {TOKEN}!", "token (redacted)!"),
        ("http://me:pass@host:80/v1 and http://host/a@b", "http://(redacted)@host:80/v1 and http://host/a@b"),
        ("https://host/x?api_key=abcdef123&y=1", "https://host/x?api_key=(redacted)&y=1"),
        ("Authorization: Bearer abc.def-123456", "Authorization: Bearer (redacted)"),
        ("sk-" + "x" * 20, "(redacted)"),
        ("AKIA" + "A" * 16, "(redacted)"),
        *(
            (f"x_{token} y", "x_(redacted) y")
            for token in ("ASIA" + "B" * 16, "npm_" + "a1" * 18, "sk_live_" + "a1" * 10)
        ),
        ("wandb_v1_" + "aB3_" * 9, "(redacted)"),
        (
            "https://b.s3.amazonaws.com/k?X-Amz-Signature=0a1b2c3d&X-Amz-Date=2026",
            "https://b.s3.amazonaws.com/k?X-Amz-Signature=(redacted)&X-Amz-Date=2026",
        ),
        (
            "https://a.blob.core.windows.net/c?sv=2024&sig=ab%2Fcd%3D&se=1",
            "https://a.blob.core.windows.net/c?sv=2024&sig=(redacted)&se=1",
        ),
        ("--hub-token abcdef123 --seed 1234567", "--hub-token (redacted) --seed 1234567"),
        ('"hubToken": "abcdef123", "accountKey=abcdef12"', '"hubToken": "(redacted)", "accountKey=(redacted)"'),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic (redacted)"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\ndef\n-----END RSA PRIVATE KEY-----\nrest", "(redacted)\nrest"),
        ("tokenizer=LlamaTokenizerFast key=validation signature: forward", None),
        ("pad_token: <|endoftext|>\nimage_token: 151655\neos_token: null", None),
        ("max_tokens=100000, num_tokens: 1234567, user@example.org", None),
    ],
)
def test_texts_are_redacted(text, shown):
    assert redact(text) == (text if shown is None else shown)


def test_values_of_secret_environment_variables_are_redacted(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "plain words")
    monkeypatch.setenv("HF_TOKEN", "short")
    assert redact("it said plain words, in short") == "it said (redacted), in short"
    monkeypatch.setenv("SMTP_PASS", "one word more")
    monkeypatch.setenv("GOOGLE_KEY", str(Path(__file__)))
    assert redact(f"one word more in {__file__}") == f"(redacted) in {__file__}"
    monkeypatch.setenv("VLLM_API_KEY", "one&two<three")
    assert redact("a page says one&amp;two&lt;three") == "a page says (redacted)"


@pytest.mark.parametrize(
    "name", ["mlflow_tracking_token", "github_token", "GOOGLE_API_KEY", "ssh_passphrase", "id_token"]
)
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "hf_tokenizer",
        "pad_token",
        "image_token_id",
        "max_new_tokens",
        "num_user_tokens",
        "key",
        "eos_token",
    ],
)
def test_names_that_are_no_secrets(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize("override", ["training.trl.hub_token=abc", f"training.trl.push_to_hub_token={TOKEN}"])
def test_a_secret_in_a_recipe_is_refused_without_repeating_it(override):
    with pytest.raises(CsrError, match="is a secret") as error:
        load_config(None, [override], base=REQUIRED)
    assert override.partition("=")[2] not in str(error.value)
    assert "HF_TOKEN" in error.value.hint
    load_config(None, ["training.trl.hub_token=null", "training.trl.pad_token=<pad>"], base=REQUIRED)


def test_cards_reports_manifests_and_progress_show_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a secret of mine")
    original = write_run(tmp_path / "run")
    secrets = [TOKEN, "me:pass", "a secret of mine"]
    said = [TOKEN, "http://me:pass@host", "a secret of mine"]
    settings = original.config.dump()
    settings["model"]["path"] = f"org/{TOKEN}"
    settings["generation"]["server"] = "http://me:pass@host:8000"
    settings["generation"]["engine"] = "server"
    settings["training"]["trl"]["run_name"] = "a secret of mine"
    run = Run(original.root, resolve(settings))
    run.mark_done(1, "note", note=said)
    csr_report = tmp_path / "report.html"
    from csr_vlm.report.html import write_report

    write_report(run, out=csr_report)
    from csr_vlm.store.progress_file import progress_path, record_progress

    def fail(reporter):
        reporter.log(f"loading {said}")
        raise ValueError(f"{said}")

    with pytest.raises(ValueError, match="pass"), record_progress(run.root, _Said()) as recorder:
        fail(recorder)
    shown = {
        "card": render_card(run),
        "report": csr_report.read_text(),
        "manifest": run.manifest_path.read_text(),
        "progress": progress_path(run.root).read_text(),
    }
    for name, text in shown.items():
        assert "(redacted)" in text, name
        assert not [secret for secret in secrets if secret in text], name


class _Said:
    def log(self, text: str) -> None:
        assert text


def test_error_messages_show_no_secret(capsys):
    error_messages.print_error(CsrError(f"http://me:pass@host refused: {TOKEN}", f"check {TOKEN}"))
    shown = capsys.readouterr().err
    assert "refused" in shown
    assert "pass@" not in shown
    assert TOKEN not in shown
    error_messages.print_error(RuntimeError(TOKEN))
    shown = capsys.readouterr().err
    traceback = Path(shown.rpartition(" in ")[2].strip())
    assert TOKEN not in shown + traceback.read_text()
    traceback.unlink()


def test_plain_data_is_redacted_by_name_and_form():
    value = {"hub_token": "x", "list": [{"url": "ftp://a:b@c"}], "n": 3}
    assert json.dumps(without_secrets(value)) == (
        '{"hub_token": "(redacted)", "list": [{"url": "ftp://(redacted)@c"}], "n": 3}'
    )


# Signals


HEAR_INTERRUPTS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets commands in the background ignore it
"""
START = """
import csr_vlm.cli
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "csr_vlm.cli.app":
            print("importing", flush=True)
            time.sleep(20)
sys.meta_path.insert(0, Slow())
csr_vlm.cli.main()
"""
MERGE = """
import csr_vlm.cli, csr_vlm.cli.app, csr_vlm.cli.console
from csr_vlm.store import files, tables
import types
def merge(model, adapter, directory):
    def fill(temporary):
        temporary.mkdir(exist_ok=True)
        (temporary / "weights").write_text("half")
        print("writing", flush=True)
        time.sleep(20)
    files.replace_directory(directory, fill)
sys.modules["csr_vlm.training.dpo"] = types.SimpleNamespace(merge=merge)
csr_vlm.cli.console.quiet_libraries = lambda: None
csr_vlm.cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", [START, MERGE], ids=["while importing", "during merge"])
def test_a_signal_ends_a_verb_in_one_line(run, script, number):
    command = [sys.executable, "-c", HEAR_INTERRUPTS + script, "merge", str(run.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(number)
        _, said = process.communicate(timeout=15)
    assert process.returncode == 128 + number
    assert len(said.strip().splitlines()) == 1, said
    assert not (run.root / "model").exists()
    assert not list(run.root.glob(".*.tmp"))
    assert not run.in_use()

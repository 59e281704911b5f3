"""Test how prompts become captions and answers, and the protocol that is stored beside them."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.config.load import load_config
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Finish, Prompt
from csr_vlm.evaluation import answers
from csr_vlm.evaluation.answers import AnswerSettings, EvaluationPrompt, complete_sentences, image_id_of
from csr_vlm.evaluation.compare import EvaluatedPolicy, compare, read_documents
from csr_vlm.evaluation.pope import read_answers, read_questions
from csr_vlm.evaluation.reproduction import collect_results
from csr_vlm.store.run import Run
from tests.unit.test_chair import write_annotations

PROMPTS = [
    EvaluationPrompt(Prompt("a", "/x/1.png", "Describe."), None, 1),
    EvaluationPrompt(Prompt("b", "/x/2.png", "Describe."), None, 2),
    EvaluationPrompt(Prompt("7", "/x/2.png", "A dog?"), 7, 2),
]
RESPONSES = [(" A dog. It is", Finish.LENGTH), (" A cat.", Finish.EOS), (" Yes. It", Finish.LENGTH)]


DEFAULT = AnswerSettings(64)


def respond(prompts):
    return RESPONSES[: len(prompts)]


def test_captions_lose_their_unfinished_sentence_and_answers_lose_nothing():
    rows, protocol = answers.answer_prompts(PROMPTS, respond, AnswerSettings(64), {"iteration": 1})
    assert rows == [
        {"id": "a", "image_id": 1, "caption": "A dog."},
        {"id": "b", "image_id": 2, "caption": "A cat."},
        {"question_id": 7, "answer": "Yes. It"},
    ]
    assert (protocol["unfinished"], protocol["empty"], protocol["num_prompts"]) == (2, 0, 3)
    assert protocol["decoding"] == "greedy"
    kept, _ = answers.answer_prompts(PROMPTS, respond, AnswerSettings(64, drop_unfinished=False), {})
    assert kept[0]["caption"] == "A dog. It is"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("A dog. It is", "A dog."),
        ("A dog", ""),
        ("A 1.5 m dog", ""),
        ('He says "go!" and', 'He says "go!'),
        ("A dog.\n\nA cat? An", "A dog.\n\nA cat?"),
        ("", ""),
    ],
)
def test_an_incomplete_last_sentence_is_dropped(text, kept):
    assert complete_sentences(text) == kept


def test_the_protocol_id_depends_on_prompts_and_settings_but_not_on_the_policy():
    def protocol_id(settings=DEFAULT, policy=None, prompts=PROMPTS):
        return answers.answer_prompts(prompts, respond, settings, policy or {})[1]["id"]

    assert protocol_id() == protocol_id(policy={"model": "other"})
    assert (
        len(
            {
                protocol_id(),
                protocol_id(AnswerSettings(512)),
                protocol_id(AnswerSettings(64, 0.5)),
                protocol_id(prompts=PROMPTS[:2]),
            }
        )
        == 4
    )


def test_image_ids_are_parsed_from_file_names():
    assert image_id_of("val2014/COCO_val2014_000000310196.jpg") == 310196
    assert image_id_of("000000310196.jpg") == 310196
    assert image_id_of("images/harbour-test-1-000003.png") == "harbour-test-1-000003.png"


def test_prompts_keep_their_ids(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "COCO_val2014_000000000042.jpg")
    rows = [
        {"question_id": 1, "image": "COCO_val2014_000000000042.jpg", "text": "A dog?", "label": "no"},
        {"id": "b", "image": "COCO_val2014_000000000042.jpg", "text": "Describe.", "image_id": "custom"},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = answers.read_evaluation_prompts(path)
    assert [(item.prompt.prompt_id, item.question_id, item.image_id) for item in found] == [
        ("1", 1, 42),
        ("b", None, "custom"),
    ]
    assert len(answers.read_evaluation_prompts(path, limit=1)) == 1
    with pytest.raises(CsrError, match="line 1: missing") as raised:
        answers.read_evaluation_prompts(path, tmp_path / "elsewhere")
    assert "--images" in raised.value.hint


def test_a_protocol_of_other_answers_is_ignored(tmp_path):
    path = tmp_path / "a.jsonl"
    rows, protocol = answers.answer_prompts(PROMPTS[:2], respond, AnswerSettings(64), {})
    answers.write_answers(path, rows, protocol)
    assert answers.read_protocol(path) == protocol | {"sha256": answers.read_protocol(path)["sha256"]}
    assert [caption.text for caption in answers.read_captions(path)] == ["A dog.", "A cat."]
    path.write_text(path.read_text() + "\n")
    assert answers.read_protocol(path) is None
    answers.protocol_path(path).write_text("{")
    assert answers.read_protocol(path) is None


@pytest.mark.parametrize("row", [{"caption": "A dog."}, {"image_id": 1}, {"image_id": None, "caption": ""}])
def test_bad_captions_are_refused(tmp_path, row):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(CsrError, match="row 1: image_id or caption is missing"):
        answers.read_captions(path)
    path.write_text("")
    with pytest.raises(CsrError, match="contains no captions"):
        answers.read_captions(path)


def run(*arguments: object):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_chair_reports_how_its_captions_were_generated(tmp_path):
    annotations = write_annotations(tmp_path / "annotations")
    path = tmp_path / "a.jsonl"
    answers.write_answers(path, *answers.answer_prompts(PROMPTS[:2], respond, AnswerSettings(64), {"iteration": 1}))
    common = ("chair", "--captions", path, "--annotations", annotations)
    found = json.loads(run(*common, "--json").stdout)
    assert (found["chair_s"], found["chair_i"], found["n"]) == (0.5, 0.5, 2)
    assert found["protocol"]["generation"]["max_new_tokens"] == 64
    assert found["protocol"]["words"] == {"rule": "pattern"}
    assert [row["hallucinated"] for row in found["sentences"]] == [[], ["cat"]]
    again = json.loads(run(*common, "--words", "plain", "--json").stdout)
    assert again["protocol_id"] != found["protocol_id"]
    shown = run(*common)
    assert "chair_s" in shown.stdout
    assert "2 captions" in shown.stdout


def new_run(folder):
    """Create a run whose base model and first iteration can be evaluated."""
    data, model = {"prompts": "p.jsonl"}, {"path": "m"}
    run = Run.create(folder, load_config(None, base={"data": data, "model": model, "scorer": {"path": "s"}}))
    run.mark_done(1, "train")
    return run


def test_results_are_stored_with_the_policy_that_answered_and_can_be_compared(tmp_path):
    annotations, run_ = write_annotations(tmp_path / "annotations"), new_run(tmp_path / "run")
    responses = [[(" A cat.", Finish.EOS), (" A cat.", Finish.EOS)], [(" A dog.", Finish.EOS), (" A cat.", Finish.EOS)]]
    for number, texts in enumerate(responses):
        path = tmp_path / f"{number}.jsonl"
        answered = answers.answer_prompts(
            PROMPTS[:2], lambda _, texts=texts: texts, AnswerSettings(64), {"iteration": number}
        )
        answers.write_answers(path, *answered)
        shown = run("chair", "--captions", path, "--annotations", annotations, "--store", run_.root)
        assert shown.exit_code == 0, shown.output
    (found,) = compare(EvaluatedPolicy(run_, 0), EvaluatedPolicy(run_, 1))
    assert (found.evaluation, found.protocol["max_new_tokens"]) == ("chair", 64)
    assert (found.metrics["chair_s"].before, found.metrics["chair_s"].after) == (1.0, 0.5)
    assert (found.metrics["recall"].before, found.metrics["recall"].after) == (0.0, 1 / 3)
    assert collect_results(run_).by_iteration[1]["chair_s"].metric.value == 50.0


def test_nothing_is_stored_with_another_policy(tmp_path):
    annotations, run_ = write_annotations(tmp_path / "annotations"), new_run(tmp_path / "run")
    path = tmp_path / "a.jsonl"
    common = ("chair", "--captions", path, "--annotations", annotations, "--store", run_.root)
    path.write_text('{"image_id": 1, "caption": "A dog."}\n{"image_id": 1, "caption": "A cat."}\n')
    assert "by an unknown iteration" in run(*common).exception.message
    assert "iteration 2 of" in run(*common, "--iteration", 2).exception.message
    assert "repeated row ids: 1" in run(*common, "--iteration", 1).exception.message
    answers.write_answers(path, *answers.answer_prompts(PROMPTS[:2], respond, AnswerSettings(64), {"iteration": 1}))
    assert "are by iteration 1" in run(*common, "--iteration", 0).exception.message
    assert not run_.evaluation_path(1, "chair").exists()


def test_an_image_without_annotations_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"image_id": 99, "caption": "A dog."}')
    result = run("chair", "--captions", path, "--annotations", write_annotations(tmp_path / "annotations"))
    assert isinstance(result.exception, CsrError)
    assert "lack 1 images, such as 99" in result.exception.message


def test_chair_prompts_are_drawn_by_seed(tmp_path):
    annotations = write_annotations(tmp_path / "annotations")
    common = ("chair-prompts", "--annotations", annotations, "--out", tmp_path / "p.jsonl")
    assert run(*common, "--images", 2).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert {(row["image_id"], row["image"]) for row in rows} == {(1, "COCO_val2014_000000000001.jpg"), (2, "two.png")}
    assert "name only 2 images" in run(*common).exception.message


def test_pope_shows_all_parsers_side_by_side(tmp_path):
    questions, answer_file = tmp_path / "pope_random.jsonl", tmp_path / "a.jsonl"
    questions.write_text("".join(json.dumps({"question_id": at, "text": "?", "label": label}) + "\n"
                                 for at, label in enumerate(("yes", "no", "no"))))  # fmt: skip
    answer_file.write_text("".join(json.dumps({"question_id": at, "answer": text}) + "\n"
                            for at, text in enumerate(("Yes", "No!", "No"))))  # fmt: skip
    found = json.loads(run("pope", "--questions", questions, "--answers", answer_file, "--json").stdout)
    assert (found["accuracy"], found["precision"], found["recall"]) == (2 / 3, 0.5, 1.0)
    assert found["parsers"]["strict"]["settings"]["random"]["accuracy"] == 1.0
    assert found["protocol"]["questions"][0]["n"] == 3
    shown = run("pope", "--questions", tmp_path / "pope_random.jsonl", "--answers", answer_file).stdout
    assert "official, random" in shown
    assert "lenient, random" in shown


def test_pope_is_stored_by_setting_and_as_the_mean(tmp_path):
    run_ = new_run(tmp_path / "run")
    options = []
    for setting, text in (("random", "Yes"), ("popular", "No")):
        questions, answer_file = tmp_path / f"pope_{setting}.jsonl", tmp_path / f"{setting}.jsonl"
        questions.write_text("".join(json.dumps({"question_id": at, "text": "?", "label": label}) + "\n"
                                     for at, label in enumerate(("yes", "no"))))  # fmt: skip
        answer_file.write_text("".join(json.dumps({"question_id": at, "answer": text}) + "\n" for at in range(2)))
        options += ["--questions", questions, "--answers", answer_file]
    assert run("pope", *options, "--store", run_.root, "--iteration", 0).exit_code == 0
    stored = read_documents(run_, 0)["pope"]
    values = {name: metric["value"] for name, metric in stored["metrics"].items()}
    assert (values["f1_random"], values["f1_popular"], values["mean_f1"]) == (2 / 3, 0.0, 1 / 3)
    assert (values["mean_accuracy"], values["precision_popular"], values["mean_precision"]) == (0.5, None, None)
    assert stored["rows"][0]["tallies"]["f1_random"] == [2, 2]
    collected = collect_results(run_).by_iteration[0]
    assert collected["pope_f1"].metric.value == pytest.approx(100 / 3)
    assert collected["pope_accuracy"].metric.value == pytest.approx(50)


@pytest.mark.parametrize(
    ("image", "image_id"),
    [
        ({"image": "b.png"}, "b.png"),
        ({"images": ["b.png"]}, "b.png"),
        ({"file_name": "b.png"}, "b.png"),
        ({"image_path": ".\\b.png"}, "b.png"),
        ({"image": {"path": "b.png"}}, "b.png"),
        ({"image": "COCO_val2014_000000000042.png"}, 42),
        ({"image": "b.png", "image_id": 7}, 7),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_evaluation_prompts_name_their_image_as_prompts_may(tmp_path, image, image_id, mark):
    for name in ("b.png", "COCO_val2014_000000000042.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "p.jsonl").write_bytes(mark + json.dumps({"id": 1, "text": "What is it?", **image}).encode())
    (read,) = answers.read_evaluation_prompts(tmp_path / "p.jsonl")
    assert (read.prompt.prompt_id, read.image_id) == ("1", image_id)


def test_a_byte_order_mark_in_questions_and_answers_is_ignored(tmp_path):
    mark = b"\xef\xbb\xbf"
    question = {"question_id": 1, "image": "a.png", "text": "Is there a boat?", "label": "yes"}
    (tmp_path / "q.json").write_bytes(mark + json.dumps(question).encode())
    (tmp_path / "a.jsonl").write_bytes(mark + json.dumps({"question_id": 1, "answer": "Yes"}).encode())
    assert [question.question_id for question in read_questions(tmp_path / "q.json").questions] == ["1"]
    assert read_answers(tmp_path / "a.jsonl") == {"1": "Yes"}

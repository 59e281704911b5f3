"""From prompts to captions and answers, and the protocol that stays beside them."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from csr_vlm.cli.app import app
from csr_vlm.errors import CsrError
from csr_vlm.evaluation import answers
from csr_vlm.evaluation.answers import Asked, Decoding, finished_part, image_id_of
from csr_vlm.records import Finish, Prompt
from tests.unit.test_chair import write_annotations

ASKED = [
    Asked(Prompt("a", "/x/1.png", "Describe."), None, 1),
    Asked(Prompt("b", "/x/2.png", "Describe."), None, 2),
    Asked(Prompt("7", "/x/2.png", "A dog?"), 7, 2),
]
SAID = [(" A dog. It is", Finish.LENGTH), (" A cat.", Finish.EOS), (" Yes. It", Finish.LENGTH)]


DEFAULT = Decoding(64)


def respond(prompts):
    return SAID[: len(prompts)]


def test_captions_lose_their_unfinished_sentence_and_answers_lose_nothing():
    rows, protocol = answers.answer(ASKED, respond, Decoding(64), {"iteration": 1})
    assert rows == [
        {"id": "a", "image_id": 1, "caption": "A dog."},
        {"id": "b", "image_id": 2, "caption": "A cat."},
        {"question_id": 7, "answer": "Yes. It"},
    ]
    assert (protocol["unfinished"], protocol["empty"], protocol["num_prompts"]) == (2, 0, 3)
    assert protocol["decoding"] == "greedy"
    kept, _ = answers.answer(ASKED, respond, Decoding(64, drop_unfinished=False), {})
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
def test_the_finished_part(text, kept):
    assert finished_part(text) == kept


def test_the_protocol_is_named_by_what_was_chosen_and_not_by_who_answered():
    def named(decoding=DEFAULT, origin=None, asked=ASKED):
        return answers.answer(asked, respond, decoding, origin or {})[1]["id"]

    assert named() == named(origin={"model": "other"})
    assert len({named(), named(Decoding(512)), named(Decoding(64, 0.5)), named(asked=ASKED[:2])}) == 4


def test_names_of_images():
    assert image_id_of("val2014/COCO_val2014_000000310196.jpg") == 310196
    assert image_id_of("000000310196.jpg") == 310196
    assert image_id_of("images/harbour-test-1-000003.png") == "harbour-test-1-000003.png"


def test_prompts_keep_ids_as_they_are_written(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "COCO_val2014_000000000042.jpg")
    rows = [
        {"question_id": 1, "image": "COCO_val2014_000000000042.jpg", "text": "A dog?", "label": "no"},
        {"id": "b", "image": "COCO_val2014_000000000042.jpg", "text": "Describe.", "image_id": "mine"},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = answers.read_asked(path)
    assert [(item.prompt.prompt_id, item.question_id, item.image_id) for item in found] == [
        ("1", 1, 42),
        ("b", None, "mine"),
    ]
    assert len(answers.read_asked(path, limit=1)) == 1
    with pytest.raises(CsrError, match="line 1: missing") as raised:
        answers.read_asked(path, tmp_path / "elsewhere")
    assert "--images" in raised.value.hint


def test_a_protocol_of_other_answers_is_not_taken(tmp_path):
    path = tmp_path / "a.jsonl"
    rows, protocol = answers.answer(ASKED[:2], respond, Decoding(64), {})
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
    with pytest.raises(CsrError, match="row 1: no image_id or no caption"):
        answers.read_captions(path)
    path.write_text("")
    with pytest.raises(CsrError, match="holds no caption"):
        answers.read_captions(path)


def run(*arguments: object):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def test_chair_says_how_its_captions_were_made(tmp_path):
    annotations = write_annotations(tmp_path / "annotations")
    path = tmp_path / "a.jsonl"
    answers.write_answers(path, *answers.answer(ASKED[:2], respond, Decoding(64), {"iteration": 1}))
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


def test_an_image_without_annotations_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"image_id": 99, "caption": "A dog."}')
    result = run("chair", "--captions", path, "--annotations", write_annotations(tmp_path / "annotations"))
    assert isinstance(result.exception, CsrError)
    assert "know nothing of 1 images, such as 99" in result.exception.message


def test_chair_prompts_are_drawn_by_seed(tmp_path):
    annotations = write_annotations(tmp_path / "annotations")
    common = ("chair-prompts", "--annotations", annotations, "--out", tmp_path / "p.jsonl")
    assert run(*common, "--images", 2).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert {(row["image_id"], row["image"]) for row in rows} == {(1, "COCO_val2014_000000000001.jpg"), (2, "two.png")}
    assert "name 2 images" in run(*common).exception.message


def test_pope_shows_all_parsers_side_by_side(tmp_path):
    questions, said = tmp_path / "pope_random.jsonl", tmp_path / "a.jsonl"
    questions.write_text("".join(json.dumps({"question_id": at, "text": "?", "label": label}) + "\n"
                                 for at, label in enumerate(("yes", "no", "no"))))  # fmt: skip
    said.write_text("".join(json.dumps({"question_id": at, "answer": text}) + "\n"
                            for at, text in enumerate(("Yes", "No!", "No"))))  # fmt: skip
    found = json.loads(run("pope", "--questions", questions, "--answers", said, "--json").stdout)
    assert (found["accuracy"], found["precision"], found["recall"]) == (2 / 3, 0.5, 1.0)
    assert found["parsers"]["strict"]["settings"]["random"]["accuracy"] == 1.0
    assert found["protocol"]["questions"][0]["n"] == 3
    shown = run("pope", "--questions", tmp_path / "pope_random.jsonl", "--answers", said).stdout
    assert "official, random" in shown
    assert "lenient, random" in shown

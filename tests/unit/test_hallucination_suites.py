"""Test the rules of the hallucination benchmarks on answers that can be scored on paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.hallucination.amber import AmberSuite, read_output
from csr_vlm.evaluation.hallucination.hallusion import HallusionSuite, read_yes_or_no
from csr_vlm.evaluation.hallucination.mmhal import MMHalSuite, read_rating
from csr_vlm.evaluation.hallucination.objecthal import ObjectHalSuite, read_object_list
from csr_vlm.evaluation.hallucination.suite import AnswerFile, Scoring, Suite, constant_text
from csr_vlm.evaluation.judge import Judge, JudgeSettings
from tests.hallucination_stubs import (
    Reply,
    completion,
    judge_server,
    write_amber,
    write_hallusion,
    write_mmhal,
    write_objecthal,
)


def answered(suite: Suite, folder: Path, texts: dict[str, str]) -> dict[str, AnswerFile]:
    """Write the given answers to a suite's questions, part by part."""
    files = {}
    for part in suite.parts():
        path = folder / f"{part.name}.jsonl"
        rows = [{"question_id": row["question_id"], "answer": texts[str(row["question_id"])]} for row in part.rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[part.name] = AnswerFile(path, path)
    return files


def values(document: dict[str, Any]) -> dict[str, float]:
    return {name: metric["value"] for name, metric in document["metrics"].items()}


def ask(suite: Suite, folder: Path, texts: dict[str, str], reply: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with judge_server(reply) as (url, requests):
        judge = Judge(JudgeSettings(url, "judge"), folder, lambda _: None)
        return suite.score(answered(suite, folder, texts), Scoring(folder, judge)), requests


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes.", True), ("no", False), ("Yes, there is no doubt.", None), ("It is not.", None), ("", None),
        ("The answer is: NO!", False), ("Nothing yesterday", None),
    ],
)  # fmt: skip
def test_an_answer_is_yes_or_no_if_it_has_one_of_the_words(answer: str, read: bool | None) -> None:
    assert read_yes_or_no(answer) is read


def test_hallusion_bench_counts_questions_figures_and_question_texts(tmp_path: Path) -> None:
    suite = HallusionSuite(write_hallusion(tmp_path))
    (part,) = suite.parts()
    assert [row["question_id"] for row in part.rows] == [
        "VD_illusion_0_0_0", "VD_illusion_0_1_0", "VD_illusion_0_1_1", "VS_chart_0_1_0",
    ], "the question without an image is left out"  # fmt: skip
    assert part.rows[0]["text"] == "Is A as big as B? Please answer yes or no."
    texts = dict(zip([row["question_id"] for row in part.rows], ["Yes", "No.", "no", "hard to say"], strict=True))
    document = suite.score(answered(suite, tmp_path, texts), Scoring(tmp_path))
    # Right are the first two of four questions. Figure 0 is right, figure 1 is not, the chart is not. The first
    # question text is right on both of its figures, the other two texts are not.
    assert values(document) == pytest.approx(
        {"hallusion_a_acc": 2 / 4, "hallusion_f_acc": 1 / 3, "hallusion_q_acc": 1 / 3, "hallusion_unread": 1 / 4}
    )
    assert [document["metrics"][f"hallusion_{key}_acc"]["n"] for key in "afq"] == [4, 3, 3]
    assert document["protocol"]["left_out"] == "1 questions without an image"
    assert len({row["id"] for row in document["rows"]}) == len(document["rows"]), "csr compare pairs rows by id"


def test_hallusion_bench_refuses_another_format(tmp_path: Path) -> None:
    (tmp_path / "HallusionBench.json").write_text('[{"category": "VD"}]')
    with pytest.raises(CsrError, match="question 1: subcategory, set_id"):
        HallusionSuite(tmp_path)
    with pytest.raises(CsrError, match="has no questions"):
        HallusionSuite(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Fine.\nRating: 4, somewhat informative", 4), ("rating: 0", 0), ("Rating: 5 or Rating: 2", None),
        ("I cannot rate this.", None), ("", None), ("Rating: 9", None),
    ],
)  # fmt: skip
def test_a_rating_is_read_as_the_benchmark_reads_it(reply: str, rating: int | None) -> None:
    assert read_rating(reply) == rating


def test_mmhal_leaves_an_unread_rating_out_and_counts_it(tmp_path: Path) -> None:
    suite = MMHalSuite(write_mmhal(tmp_path))

    def rate(body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        return completion("Rating: 6" if "zero" in text else "Rating: 1" if "one" in text else "no idea")

    document, requests = ask(suite, tmp_path, {"0": "zero", "1": "one", "2": "two"}, rate)
    assert requests[0]["messages"][0]["content"].startswith("Rate this.\nContents: Boat, Fish\nQuestion: What is here")
    assert any("Standard: A {boat}.\nAnswer: zero\n" in request["messages"][0]["content"] for request in requests)
    assert values(document) == pytest.approx(
        {
            "mmhal_score": 3.5, "mmhal_rate": 0.5, "mmhal_unread": 1 / 3,
            "mmhal_score_attribute": 6.0, "mmhal_score_counting": 1.0,
        }
    )  # fmt: skip
    assert document["metrics"]["mmhal_score"]["n"] == 2
    assert document["outcome"]["unread"] == 1
    assert document["outcome"]["score_with_unread_as_zero"] == pytest.approx(7 / 3)
    assert document["protocol"]["judge"]["served_by"] == ["judge-2026-01-01"]


def test_mmhal_names_a_missing_picture_and_a_changed_script(tmp_path: Path) -> None:
    suite = MMHalSuite(write_mmhal(tmp_path))
    assert len(suite.request_chars()) == 3
    (tmp_path / "images" / "photo1_o.jpg").unlink()
    with pytest.raises(CsrError, match=r"has none of photo1_o\.jpg"):
        suite.parts()
    (tmp_path / "eval_gpt4.py").write_text('template = "Rate {} and {}"')
    with pytest.raises(CsrError, match="2 places to fill, not 4"):
        MMHalSuite(tmp_path)
    (tmp_path / "eval_gpt4.py").write_text("template = open('secret').read()")
    with pytest.raises(CsrError, match="assigns no text to template"):
        MMHalSuite(tmp_path)


def test_a_script_is_parsed_and_never_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nprompt = 'text'\n")
    assert constant_text(script, "prompt") == "text"
    assert not (tmp_path / "ran").exists()
    script.write_text("prompt = (")
    with pytest.raises(CsrError, match="cannot be parsed"):
        constant_text(script, "prompt")


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ('["a boat", "fish"]', ("a boat", "fish")), ("[]", ()), ('Objects:\n["dog"]', ("dog",)),
        ("a boat", None), ('{"objects": []}', None), ("[1, 2]", None), ("", None),
    ],
)  # fmt: skip
def test_a_list_of_objects_is_json(reply: str, found: tuple[str, ...] | None) -> None:
    assert read_object_list(reply) == found


def write_coco(folder: Path) -> Path:
    """Write annotations of two images: a dog with a bench, and an image with nothing annotated."""
    folder.mkdir()
    instances = {
        "images": [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}, {"id": 8, "file_name": "8.jpg"}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "bench"}],
        "annotations": [{"image_id": 7, "category_id": 1}, {"image_id": 7, "category_id": 2}],
    }
    (folder / "instances_val2014.json").write_text(json.dumps(instances))
    captions = {"images": [], "annotations": [{"image_id": 8, "caption": "Two cats on a fire hydrant."}]}
    (folder / "captions_val2014.json").write_text(json.dumps(captions))
    return folder


SYNONYMS = "dog, puppy\nbench\ncat, kitten\nfire hydrant\nkite\n"


def test_object_halbench_compares_the_judges_objects_with_coco(tmp_path: Path) -> None:
    home = write_objecthal(tmp_path / "rlaifv", {7: b"", 8: b""}, SYNONYMS)
    suite = ObjectHalSuite(home, write_coco(tmp_path / "coco"), tmp_path / "images")
    (part,) = suite.parts()
    assert part.rows[0]["image"] == "COCO_val2014_000000000007.jpg", "without a picture in the row, COCO's file"
    lists = {"zero": '["two brown puppies", "kites", "a kite", "sky"]', "one": 'nothing but\n["fire hydrants"]'}

    def objects(body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        assert text.startswith("List the objects.\nQuestion: Describe this image in detail.\nAnswer: ")
        return completion(next(reply for word, reply in lists.items() if word in text))

    document, requests = ask(suite, tmp_path, {"0": "zero is long enough", "1": "one is long enough"}, objects)
    assert len(requests) == 2
    # Image 7 has a dog and a bench: puppies is a dog, kite is absent and counted once. Image 8: cat and hydrant.
    assert values(document) == pytest.approx(
        {
            "objecthal_response": 1 / 2, "objecthal_mention": 1 / 3,
            "objecthal_recall": 2 / 4, "objecthal_unread": 0.0,
        }
    )  # fmt: skip
    assert document["rows"][0]["objects"] == {"puppy": "dog", "kite": "kite"}


def test_object_halbench_asks_nothing_about_short_answers_and_leaves_nonsense_out(tmp_path: Path) -> None:
    home = write_objecthal(tmp_path / "rlaifv", {7: b"", 8: b""}, SYNONYMS)
    suite = ObjectHalSuite(home, write_coco(tmp_path / "coco"), tmp_path / "images")
    texts = {"0": "a dog here", "1": "this answer is judged badly"}
    document, requests = ask(suite, tmp_path, texts, lambda _: completion("sorry"))
    assert len(requests) == 2, "one answer, asked twice"
    assert document["outcome"] | {"transcript": ""} == {"judged": 0, "unread": 1, "short": 1, "transcript": ""}
    assert document["metrics"]["objecthal_unread"]["value"] == 0.5
    assert document["metrics"]["objecthal_response"]["value"] is None, "nothing is left to compute it from"


def test_object_halbench_needs_the_annotations_of_its_images(tmp_path: Path) -> None:
    home = write_objecthal(tmp_path / "rlaifv", {9: b""}, SYNONYMS)
    with pytest.raises(CsrError, match="lacks image 9"):
        ObjectHalSuite(home, write_coco(tmp_path / "coco"), None)


ANSWERS = {"1": "A boat.", "2": "A boat and a fish.", "3": "No, there is not", "4": "Yes.", "5": "yes", "6": "Maybe"}


def test_amber_runs_the_checkouts_script_and_reads_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "hidden from the script")
    suite = AmberSuite(write_amber(tmp_path))
    assert [(part.name, len(part.rows), part.max_new_tokens) for part in suite.parts()] == [
        ("generative", 2, 512), ("discriminative", 4, 16),
    ]  # fmt: skip
    document = suite.score(answered(suite, tmp_path, ANSWERS), Scoring(tmp_path))
    given = json.loads((tmp_path / "amber-inference.json").read_text())
    assert [row["response"] for row in given] == ["A boat.", "A boat and a fish.", "No", "Yes", "Yes", "Maybe"]
    found = values(document)
    assert found["amber_hal"] == 0.5
    assert found["amber_cover"] == 0.5
    assert found["amber_accuracy"] == pytest.approx(2 / 4), "question 5 is labeled no, question 6 is unread"
    assert found["amber_unread"] == pytest.approx(1 / 4)
    assert found["amber_f1_existence"] == 0.71
    assert found["amber_f1_relation"] == 0.72
    assert document["metrics"]["amber_accuracy"]["low"] < 0.5
    assert [document["metrics"][key]["n"] for key in ("amber_hal", "amber_f1")] == [2, 4]


def test_amber_notices_a_script_that_counts_otherwise_or_fails(tmp_path: Path) -> None:
    suite = AmberSuite(write_amber(tmp_path))
    script = tmp_path / "inference.py"
    files = answered(suite, tmp_path, ANSWERS)
    original = script.read_text()
    script.write_text(original.replace("100 * right", "90 * right"))
    with pytest.raises(CsrError, match=r"an accuracy of 0\.450 for answers of which 0\.5000 are right"):
        suite.score(files, Scoring(tmp_path))
    script.write_text("import a_module_that_nobody_has")
    with pytest.raises(CsrError, match=r"script failed: ModuleNotFoundError.*answers are kept"):
        suite.score(files, Scoring(tmp_path))
    with pytest.raises(CsrError, match="cannot be started"):
        AmberSuite(tmp_path, python=tmp_path / "python").score(files, Scoring(tmp_path))


def test_an_output_without_a_number_is_refused() -> None:
    with pytest.raises(CsrError, match="printed no CHAIR, Cover, Hal, Cog"):
        read_output("Descriminative Task:\nAccuracy:\t 50.0\nPrecision: 1.0\nRecall: 2.0\nF1: 3.0\n")
    with pytest.raises(CsrError, match="printed no CHAIR"):
        read_output(
            "CHAIR:\t 50.0",
        )


def test_a_limit_takes_the_first_questions_of_every_kind(tmp_path: Path) -> None:
    suite = AmberSuite(write_amber(tmp_path), limit=1)
    assert [[row["question_id"] for row in part.rows] for part in suite.parts()] == [["1"], ["3", "4", "5"]]

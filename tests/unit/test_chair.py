"""Test CHAIR on captions that can be checked by hand."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.annotations import Annotations, ground_truth, read_annotations
from csr_vlm.evaluation.chair import Caption, ObjectReader, by_length, check_mentions, counts, evaluate, summarize
from csr_vlm.evaluation.objects import ObjectTable, find_objects
from csr_vlm.evaluation.words import word_rule

TABLE = ObjectTable.coco()
READER = ObjectReader(word_rule("pattern"), TABLE)
TRUTH = {1: frozenset({"dog", "person"}), 2: frozenset({"cat"}), 3: frozenset()}


def score_captions(*captions: tuple[int, str]):
    return evaluate([Caption(index, image, text) for index, (image, text) in enumerate(captions)], TRUTH, READER)


def test_hand_worked_rates():
    scores = score_captions((1, "A man and his dog chase a cat, a cat!"), (2, "A cat."), (3, "Nothing here."), (2, ""))
    assert scores[0].checked.mentioned == ("person", "dog", "cat", "cat")
    assert scores[0].checked.hallucinated == ("cat", "cat")
    found = {name: metric.value for name, metric in summarize(scores).items()}
    assert found["chair_s"] == 1 / 4
    assert found["chair_i"] == 2 / 5
    assert found["recall"] == 3 / 4, "the cat of image 2 is missed by the empty caption"
    assert found["f1"] == pytest.approx(2 * 0.6 * 0.75 / (0.6 + 0.75))
    assert found["words"] == pytest.approx((10 + 2 + 2 + 0) / 4)
    assert counts(scores) == {
        "captions": 4,
        "images": 3,
        "empty": 1,
        "without_objects": 2,
        "repeated": 0,
        "images_without_objects": 1,
        "mentions": 5,
        "hallucinated": 2,
    }


def test_chair_i_is_undefined_where_no_object_is_named():
    found = summarize(score_captions((1, "Nothing."), (2, "")))
    assert found["chair_s"].value == 0
    assert found["chair_i"].value is None
    assert found["recall"].value == 0


def test_duplicates_count_individually_and_are_reported():
    scores = score_captions((2, "A dog."), (2, "A dog."), (2, "A cat."))
    assert summarize(scores)["chair_s"].value == 2 / 3
    assert counts(scores)["repeated"] == 1


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.text(max_size=40)), min_size=1, max_size=8), st.randoms())
def test_rates_do_not_depend_on_order_and_stay_in_range(captions, rng: random.Random):
    shuffled = list(captions)
    rng.shuffle(shuffled)
    found, other = summarize(score_captions(*captions)), summarize(score_captions(*shuffled))
    for name in ("chair_s", "chair_i", "recall", "f1"):
        assert found[name].value == other[name].value
        assert found[name].value is None or 0 <= found[name].value <= 1


def test_quarters_are_ordered_from_short_to_long():
    scores = score_captions(*[(1, "dog " * length) for length in (8, 1, 3, 2, 7, 6, 5, 4)])
    assert [part["words"] for part in by_length(scores)] == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert by_length([]) == []


@pytest.mark.parametrize(
    ("words", "objects", "positions"),
    [
        ("a hot dog and a dog", ("hot dog", "dog"), (1, 5)),
        ("a baby elephant", ("elephant",), (1,)),
        ("a baby and an elephant", ("person", "elephant"), (1, 4)),
        ("a passenger train", ("train",), (1,)),
        ("a train track", (), ()),
        ("a bow tie", ("tie",), (1,)),
        ("the toilet seat", ("toilet",), (1,)),
        ("a wine glas", ("wine glass",), (1,)),
        ("motor bike cycle", ("motorcycle", "bicycle"), (0, 2)),
    ],
)
def test_word_pairs_are_merged_from_left_to_right(words, objects, positions):
    mentions = find_objects(words.split(), TABLE)
    assert (mentions.objects, mentions.positions) == (objects, positions)


def test_a_seat_beside_a_toilet_is_dropped_and_later_positions_are_one_too_small():
    mentions = find_objects("a seat by the toilet and a dog".split(), TABLE)
    assert mentions.words == ("toilet", "dog")
    assert mentions.positions == (3, 6), "one less than the true positions, as in the reference"
    assert find_objects("a seat and a dog".split(), TABLE).objects == ("chair", "dog")


def test_special_cases_of_coco_do_not_apply_to_other_tables():
    table = ObjectTable.of([["bow"], ["tie"], ["seat"], ["toilet"], ["tea pot", "kettle"]], of_coco=False)
    mentions = find_objects("a bow tie seat toilet tea pot kettle".split(), table)
    assert mentions.objects == ("bow", "tie", "seat", "toilet", "tea pot", "tea pot")


def test_the_shipped_table_has_cocos_80_objects_and_bad_tables_are_refused(tmp_path):
    assert len(set(TABLE.objects.values())) == 80
    path = tmp_path / "s.txt"
    path.write_text("dog, hound\ncat,  kitten\n", encoding="utf-8")
    assert ObjectTable.read(path).objects == {"dog": "dog", "hound": "dog", "cat": "cat", " kitten": "cat"}
    for text in ("", "\n\n"):
        path.write_text(text)
        with pytest.raises(CsrError, match="is empty"):
            ObjectTable.read(path)
    with pytest.raises(CsrError, match="cannot be read"):
        ObjectTable.read(tmp_path / "absent.txt")


def test_checked_mentions_keep_order():
    checked = check_mentions(find_objects("dog cat dog bird".split(), TABLE), frozenset({"dog", "person"}))
    assert checked.hallucinated == ("cat", "bird")
    assert checked.hallucinated_positions == (1, 3)
    assert checked.recalled == {"dog"}


def write_annotations(folder):
    folder.mkdir(exist_ok=True)
    instances = {
        "images": [{"id": 1, "file_name": "COCO_val2014_000000000001.jpg"}, {"id": 2, "file_name": "two.png"}],
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 18}],
    }
    captions = {"images": [], "annotations": [{"image_id": 1, "caption": "A man's hot dogs."}]}
    (folder / "instances_val2014.json").write_text(json.dumps(instances))
    (folder / "captions_val2014.json").write_text(json.dumps(captions))
    return folder


def test_ground_truth_combines_instances_and_objects_named_in_captions(tmp_path):
    found = read_annotations(write_annotations(tmp_path))
    assert ground_truth(found, {1, 2}, READER) == {1: {"dog", "person", "hot dog"}, 2: frozenset()}
    assert set(found.sources) == {"instances_val2014.json", "captions_val2014.json"}
    assert [found.find(name) for name in (1, "1", "COCO_val2014_000000000001.jpg", "a/two.png", 3, "x")] == [
        1, 1, 1, 2, None, None,
    ]  # fmt: skip


def test_bad_annotations_are_refused(tmp_path):
    with pytest.raises(CsrError, match="does not contain instances_"):
        read_annotations(tmp_path)
    path = write_annotations(tmp_path) / "instances_val2014.json"
    with pytest.raises(CsrError, match=r"does not contain instances_train2014\.json"):
        read_annotations(tmp_path, "train2014")
    for text, complaint in [
        ("{", "cannot be read as JSON"),
        ("[]", "not a JSON object"),
        ("{}", "not in COCO's format"),
    ]:
        path.write_text(text)
        with pytest.raises(CsrError, match=complaint):
            read_annotations(tmp_path)
    with pytest.raises(CsrError, match="lacks categories of the annotations: unicorn"):
        ground_truth(Annotations({}, ("unicorn", "dog"), {}, {}), set(), READER)

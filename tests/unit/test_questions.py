"""Test the questions about a tree's claims and their answers."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from csr_vlm.config.schema import ClaimsConfig, QuestionsConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Pair, Prompt, Response
from csr_vlm.method.questions import choose_questions, choose_unclaimed, clear_answer, select_informative
from csr_vlm.pipeline.claim_questions import answer_auc, text_pairs, worth_training
from csr_vlm.scoring.claim_scorer import ClaimScorer
from csr_vlm.scoring.scorer import ScorerGroup
from tests.unit.builders import config, node, prompt

SETTINGS = QuestionsConfig(per_prompt=6, wordings=("Is there {a} {0}?",))
YES, NO = 5.0, -6.0


def test_no_and_yes_alternate_and_unclear_claims_are_not_asked_about() -> None:
    claimed = {"boat": YES, "owl": 0.0, "fish": NO, "car": YES}
    assert choose_questions(claimed, {}, SETTINGS, "key") == [
        ("Is there a fish?", False),
        ("Is there a boat?", True),
    ], "no more questions with yes than with no"
    assert choose_questions({"boat": YES, "car": YES}, {}, SETTINGS, "key") == []


def test_claims_of_other_trees_are_denied_if_contradicted_and_never_affirmed() -> None:
    unclaimed = {"tree": -3.0, "bus": 9.0, "cat": -2.5}
    actual = choose_questions({"fish": NO, "boat": YES}, unclaimed, SETTINGS, "key")
    # The two kinds of no take turns among themselves.
    assert actual == [
        ("Is there a fish?", False),
        ("Is there a boat?", True),
        ("Is there a tree?", False),
        ("Is there a cat?", False),
    ]
    few = SETTINGS.model_copy(update={"per_prompt": 2})
    assert choose_questions({"fish": NO, "boat": YES}, unclaimed, few, "key") == actual[:2]


def test_an_answer_is_clear_if_evidence_and_prior_are() -> None:
    bound = SETTINGS.min_log_odds
    assert clear_answer(bound - math.log(3), SETTINGS) is True
    assert clear_answer(bound - math.log(3) - 0.01, SETTINGS) is None
    assert clear_answer(-bound - math.log(3) - 0.01, SETTINGS) is False


def test_wordings_take_turns_by_a_hash_and_none_is_the_question_of_the_worlds() -> None:
    default = QuestionsConfig(per_prompt=40)
    things = {f"thing{n}": -9.0 for n in range(40)}
    asked = [question for question, _ in choose_questions(things, {}, default, "key")]
    forms = {re.sub(r"thing\d+", "", question) for question in asked}
    assert len(forms) == len(default.wordings) == 4
    assert all("in the image" not in wording for wording in default.wordings)
    assert asked == [question for question, _ in choose_questions(things, {}, default, "key")]
    assert default.ask("owl", 0) == "Is there an owl in this picture?"


def test_unclaimed_things_depend_only_on_their_names_and_the_key() -> None:
    pool = ["boat", "tree", "cat", "bus", "bird", "house"]
    chosen = choose_unclaimed(["boat"], pool, 3, "0:p")
    assert len(set(chosen)) == 3
    assert "boat" not in chosen
    assert chosen == choose_unclaimed(["boat"], pool[::-1], 3, "0:p")
    assert len({tuple(choose_unclaimed(["boat"], pool, 3, f"0:{name}")) for name in range(20)}) > 5


def answered(*nats: float, logprob: float = -1.0) -> list[Pair]:
    """Create pairs whose correct answer has a higher log-probability by the given nats."""

    def response(value: float) -> Response:
        return Response("0", (1,), value, "Yes.", 1, 0.0, complete=True)

    return [Pair(prompt(f"p?{at}"), 1, response(logprob), response(logprob - gap)) for at, gap in enumerate(nats)]


def test_questions_the_policy_is_sure_of_are_kept_for_a_fraction_of_the_images() -> None:
    never = SETTINGS.model_copy(update={"sure": 3.0, "rehearsed": 0.0})
    assert select_informative(answered(3.0, 9.0), never, "key") == []
    # One unsure answer keeps the sure ones beside it.
    unsure = answered(9.0, 2.9)
    assert select_informative(unsure, never, "key") == unsure
    quarter = never.model_copy(update={"rehearsed": 0.25})
    kept = [bool(select_informative(answered(9.0), quarter, f"0:1:p{number}")) for number in range(400)]
    assert 70 < sum(kept) < 130
    assert kept == [bool(select_informative(answered(9.0), quarter, f"0:1:p{number}")) for number in range(400)]
    always = never.model_copy(update={"rehearsed": 1.0})
    assert select_informative(answered(9.0), always, "key") == answered(9.0)


def test_nothing_is_learned_from_a_question_that_the_policy_does_not_answer_by_yes_or_no() -> None:
    always = SETTINGS.model_copy(update={"rehearsed": 1.0, "min_probability": 0.02})
    unanswered, real = answered(1.4, logprob=math.log(0.004)), answered(1.4, logprob=math.log(0.4))
    assert select_informative(unanswered, always, "key") == []
    assert select_informative(unanswered + real, always, "key") == real


def about(gap: float, holds: bool, number: int) -> Pair:
    """Create a question whose yes is more probable than its no by a gap in nats."""
    answers = ((gap - 2.0, "Yes."), (-2.0, "No."))
    yes, no = (Response("0", (1,), logprob, text, 1, 0.0, complete=True) for logprob, text in answers)
    return Pair(prompt(f"p{number}?0"), 1, *((yes, no) if holds else (no, yes)))


def test_no_question_is_trained_if_the_answers_do_not_depend_on_the_image() -> None:
    settings = config(method={"pairs": {"questions": {"per_prompt": 4}}})
    says_yes = [about(1.0 + 0.01 * (n % 7), n % 2 == 0, n) for n in range(60)]
    messages: list[str] = []
    assert answer_auc(says_yes, "Yes.") == pytest.approx(0.5, abs=0.06)
    assert list(worth_training(lambda: says_yes, settings, 1, messages.append)) == []
    assert "hardly depend on the image (AUC 0." in messages[0]
    # It says yes to everything here too, but more surely where it is right.
    looks = [about(1.6 if n % 2 == 0 else 1.0, n % 2 == 0, n) for n in range(60)]
    assert answer_auc(looks, "Yes.") == 1.0
    assert list(worth_training(lambda: looks, settings, 1, messages.append)) == looks
    few = says_yes[:30]
    assert answer_auc(few, "Yes.") is None
    assert list(worth_training(lambda: few, settings, 1, messages.append)) == few, "too few to tell"
    assert len(messages) == 1


@pytest.mark.parametrize("wording", ["Is it there?", "{0} {1}", "{0:>9}", "{0.__class__}", "{0!r}", "{", "{a}"])
def test_a_wording_has_a_place_for_the_claim_and_nothing_else(wording: str) -> None:
    with pytest.raises(ValueError, match="is not valid"):
        QuestionsConfig(wordings=(wording,))
    with pytest.raises(ValueError, match="is not valid"):
        ClaimsConfig(caption=wording)


def test_a_configuration_with_questions_requires_negative_images() -> None:
    scorer = {"path": "scorer", "others": 0}
    cosine = {"reward": {"unit": "sentence", "image_score": "cosine"}, "pairs": {"questions": {"per_prompt": 1}}}
    with pytest.raises(CsrError, match=r"scorer.others=0, but method.pairs.questions requires"):
        config(preset="paper", scorer=scorer, method=cosine)
    with pytest.raises(CsrError, match=r"scorer.others=0, but method.reward.unit=claim"):
        config(scorer=scorer, method={"reward": {"image_score": "cosine"}, "pairs": {"questions": {"per_prompt": 0}}})
    config(preset="paper", scorer=scorer)


class Seeing:
    """Score a caption high where its last word is in the image's name."""

    name = "clip"

    def score(self, items):  # type: ignore[no-untyped-def]
        return [
            {"clip": (0.4 if text.split()[-1] in p.image else 0.1) + 0.01 * (hash(p.image) % 7)} for p, text in items
        ]

    def forget(self) -> None:
        pass


def test_questions_about_two_images_affirm_what_is_there_and_deny_what_is_not() -> None:
    prompts = [Prompt(f"{n}", f"{n}-{things}.png", "") for n, things in enumerate(("boat-fish", "dog-tree", "owl-car"))]
    group = ScorerGroup([Seeing()])
    group.set_negative_images(prompts, 2)
    claims = ClaimScorer(group, ClaimsConfig())
    texts = [["A boat and a fish.", "Two fish."], ["A dog.", "A tree and dogs."], ["An owl.", "An owl, a car."]]
    trees = [
        [replace(node(str(at), text), claims=claims([(asked, text)])[0]) for at, text in enumerate(sentences)]
        for asked, sentences in zip(prompts, texts, strict=True)
    ]
    settings = config(method={"pairs": {"questions": {"per_prompt": 4}}})
    made = list(text_pairs(prompts, trees, claims, settings, settings.method.pairs.questions))
    assert made
    for pair in made:
        thing = next(
            t for t in ("boat", "fish", "dog", "tree", "owl", "car") if f" {t} " in f"{pair.prompt.text[:-1]} "
        )
        assert (pair.chosen == "Yes.") == (thing in pair.prompt.image)
    assert {pair.chosen for pair in made} == {"Yes.", "No."}


def test_another_language_has_its_own_lexicon_caption_and_question() -> None:
    claims = ClaimScorer(ScorerGroup([Seeing()]), ClaimsConfig(lexicon="zh", caption="一张{0}的照片"))
    assert claims.claims_in("一只小狗在草地上。")[0] == "狗"
    assert QuestionsConfig(wordings=("图中有{0}吗？",)).ask("狗", 0) == "图中有狗吗？"

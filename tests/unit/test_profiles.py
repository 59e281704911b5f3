"""Check benchmarks/profiles.py: the draws follow the profile, and the counts follow the judge."""

from __future__ import annotations

from statistics import fmean

import pytest
from benchmarks.profiles import BASE, PROFILES, Outcome, profile_world, run_profile

from csr_vlm.config.load import load_config
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Expansion
from csr_vlm.evaluation.scorer_profile import Profile, read_profile

SHARP = {"mean": 0.45, "sd": 0.001}
NOTHING = {"mean": 0.0, "sd": 0.001}
PERFECT = {
    "name": "perfect",
    "judge": {
        "sentence": {"lead": SHARP, "grounded": SHARP, "habit": NOTHING, "random": NOTHING, "mood": NOTHING},
        "claim": {"grounded": SHARP, "habit": NOTHING, "random": NOTHING},
        "spread": 0.001,
    },
    "policy": {"num_claims": [1.0]},
}
BLIND = {"mean": 0.0, "sd": 0.02}
NOISE = {
    "name": "noise",
    "judge": {
        "sentence": dict.fromkeys(("lead", "grounded", "habit", "random", "mood"), BLIND),
        "claim": dict.fromkeys(("grounded", "habit", "random"), BLIND),
        "spread": 0.02,
    },
}


def outcome(content: dict[str, object], *overrides: str, prompts: int = 40) -> Outcome:
    return run_profile(Profile.model_validate(content), load_config(None, overrides, base=BASE), prompts)


def flipped(content: dict[str, object]) -> dict[str, object]:
    """Swap what the judge gives to true and to false claims."""
    judge = content["judge"]
    sentence, claim = judge["sentence"], judge["claim"]  # type: ignore[index]
    return content | {
        "judge": judge  # type: ignore[operator]
        | {
            "sentence": sentence | {"grounded": sentence["habit"], "habit": SHARP, "random": SHARP},
            "claim": {"grounded": claim["habit"], "habit": SHARP, "random": SHARP},
        }
    }


def test_a_perfect_judge_prefers_what_is_true():
    found = outcome(PERFECT)
    assert found.right > 100 * max(found.wrong, 1)
    assert found.end_over_true == 0
    assert found.audit != "stop"


def test_a_judge_of_noise_is_right_about_as_often_as_wrong():
    found = outcome(NOISE, "preset=sentences")
    assert 0.5 < found.right / found.wrong < 2.0


def test_flipping_the_truth_flips_the_ratio():
    found = outcome(flipped(PERFECT), "preset=sentences")
    assert found.wrong > 10 * max(found.right, 1)


@pytest.mark.parametrize("content", [NOISE, flipped(PERFECT)], ids=["noise", "flipped"])
def test_claims_get_no_evidence_from_a_useless_judge_and_the_audit_stops(content):
    found = outcome(content)
    assert found.prompts_with_pairs <= 0.05
    assert found.audit == "stop"


def test_claims_are_judged_right_by_a_judge_like_clip():
    found = run_profile(read_profile(PROFILES / "clip-coco.yaml"), load_config(None, base=BASE), 60, seed=5)
    assert found.right > 6 * found.wrong
    assert found.prompts_with_pairs > 0.3
    assert found.end_over_true <= 0.03 * found.pairs
    assert found.questions_nonsense == 0
    assert found.questions_right >= 0.95 * found.questions


def test_the_same_seed_gives_the_same_counts():
    assert outcome(NOISE, prompts=8) == outcome(NOISE, prompts=8)


def test_contrasts_follow_the_profile():
    profile = read_profile(PROFILES / "clip-coco.yaml")
    world = profile_world.ProfileWorld(profile, seed=3, num_pictures=400)
    scorer = world.judge("clip")
    by_truth: dict[str, list[float]] = {"grounded": [], "habit": [], "random": []}
    for prompt in world.prompts:
        picture = world.picture_of(prompt)
        for kind in (*picture.objects[:2], *picture.habits[:2], "ladder", "candle"):
            text = f"a photo of a {profile_world.NOUNS[kind][0]}"
            (row,) = scorer.score([(prompt, text)])
            (shifted,) = scorer.score([(world.prompts[0], "nothing of the kind")])
            assert -1 <= row["clip"] <= 1
            assert -1 <= shifted["clip"] <= 1
            by_truth[picture.truth(kind)].append(row["clip"] - profile.judge.baseline - scorer._offset(text))
    means = {truth: fmean(values) for truth, values in by_truth.items()}
    assert means == pytest.approx({"grounded": 0.035, "habit": 0.010, "random": 0.0}, abs=0.004)


def test_false_claims_grow_along_a_response():
    world = profile_world.ProfileWorld(Profile.model_validate(PERFECT), seed=1, num_pictures=120)
    shares = []
    prefixes: dict[str, tuple[int, ...]] = {prompt.prompt_id: () for prompt in world.prompts}
    for depth in range(5):
        requests = [
            Expansion(p, str(depth), prefixes[p.prompt_id], 4, (0, p.prompt_id, 1, str(depth))) for p in world.prompts
        ]
        false = claims = 0
        for prompt, siblings in zip(world.prompts, world.propose(requests), strict=True):
            written = [c for c in siblings if c.sentence]
            for candidate in written:
                sentence = world.sentences[candidate.sentence]
                picture = world.picture_of(prompt)
                claims += len(sentence.claims)
                false += sum(picture.truth(claim) != "grounded" for claim in sentence.claims)
            if written:
                prefixes[prompt.prompt_id] += written[0].token_ids
        shares.append(false / claims)
    assert shares[0] < 0.01
    assert shares[1] < shares[2] < shares[4]


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_can_be_read(path):
    profile = read_profile(path)
    assert profile.description
    assert profile.source


def test_at_least_twelve_profiles_ship():
    assert len(list(PROFILES.glob("*.yaml"))) >= 12


def test_a_file_that_is_no_profile_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("judge: {sentence: {lead: {mean: 0.1, sd: -1}, mood: 3}}\n")
    with pytest.raises(CsrError, match=r"mine\.yaml is not a profile: judge\.sentence"):
        read_profile(path)


def test_wordings_and_plurals_name_one_kind_each():
    assert profile_world.plural("bus") == "buses"
    assert profile_world.plural("dining table") == "dining tables"
    assert profile_world.plural("woman") == "women"
    assert profile_world.nouns_in("Two kittens sleep near a dining table.") == ("dining table", "cat")
    templates = (*profile_world.MOODS, *profile_world.SETTINGS)
    assert not any(profile_world.nouns_in(text) for text in templates), "what claims nothing names nothing"

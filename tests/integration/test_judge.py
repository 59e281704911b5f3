"""Compare the policy as judge with a direct computation from its logits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from csr_vlm.config.load import scorer_config
from csr_vlm.config.schema import ModelConfig, ScorerConfig, TrainingConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.models.policy import Policy
from csr_vlm.scoring.registry import load_scorer
from csr_vlm.scoring.self_judge import JudgeScorer
from csr_vlm.training.dpo import save_adapter, trainable_policy
from csr_vlm.world.demo import assets
from csr_vlm.world.scenes import HARBOUR, Split, make_scenes

MODEL = ModelConfig(path=str(assets() / "llava"), device="cpu")
QUESTIONS = {"pattern": r"There is an? \w+ (\w+)", "question": "Is there a {0} in the image?"}
SENTENCES = ["There is a red boat.", "There is a blue fish.", "There is a green tree and a red bird."]


def judge_of(adapter: Path | None = None, batch_size: int = 256, **judge: str) -> JudgeScorer:
    settings = ScorerConfig.model_validate({"path": "judge:policy", "batch_size": batch_size, "judge": judge})
    (judge_scorer,) = load_scorer(settings, "cpu", policy=MODEL, adapter=adapter).scorers
    assert isinstance(judge_scorer, JudgeScorer)
    return judge_scorer


@torch.inference_mode()
def p_yes(policy: Policy, prompt: Prompt, question: str) -> float:
    """Compute P(yes) / (P(yes) + P(no)) of one question, with the processor and the model alone."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = policy.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.open(prompt.image).convert("RGB")
    inputs = policy.processor(
        images=[image],
        text=[text],
        return_tensors="pt",
        add_special_tokens=not text.startswith(policy.tokenizer.bos_token),
    )
    probabilities = policy.model(**inputs).logits[0, -1].softmax(dim=-1)
    first = {
        word: {policy.tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms}
        for word, forms in {"yes": ("Yes", "yes", " Yes", " yes"), "no": ("No", "no", " No", " no")}.items()
    }
    assert first["yes"] != first["no"]
    both = first["yes"] & first["no"]
    yes, no = (sum(float(probabilities[i]) for i in first[word] - both) for word in ("yes", "no"))
    return yes / (yes + no)


def test_the_score_is_the_probability_of_yes_over_yes_and_no(policy: Policy, prompts: list[Prompt]) -> None:
    items = [(prompt, sentence) for prompt in prompts[:3] for sentence in SENTENCES]
    scores = [row["clip"] for row in judge_of(**QUESTIONS).score(items)]
    kinds = ["boat", "fish", "tree"]
    expected = [p_yes(policy, prompt, f"Is there a {kind} in the image?") for prompt in prompts[:3] for kind in kinds]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert max(scores) - min(scores) > 0.5, "the judge distinguishes the sentences"


def test_objects_in_the_image_score_higher_than_absent_ones(prompts: list[Prompt]) -> None:
    scenes = list(make_scenes(HARBOUR, Split.DEVELOPMENT, 0, 12))[:6]
    kinds = sorted({item.kind for scene in scenes for item in scene.objects})[:12]
    judge = judge_of(**QUESTIONS)
    present_scores, absent_scores = [], []
    for scene, prompt in zip(scenes, prompts[:6], strict=True):
        present = {item.kind for item in scene.objects}
        for kind, row in zip(kinds, judge.score([(prompt, f"There is a red {kind}.") for kind in kinds]), strict=True):
            (present_scores if kind in present else absent_scores).append(row["clip"])
    assert sum(present_scores) / len(present_scores) > sum(absent_scores) / len(absent_scores) + 0.4


def test_order_and_batches_do_not_matter(prompts: list[Prompt]) -> None:
    items = [(prompt, sentence) for prompt in prompts[:4] for sentence in SENTENCES]
    whole = [row["clip"] for row in judge_of(**QUESTIONS).score(items)]
    singly = [row["clip"] for row in judge_of(batch_size=1, **QUESTIONS).score(items)]
    assert singly == pytest.approx(whole, abs=1e-4)
    shuffled = random.Random(0).sample(range(len(items)), len(items))
    mixed = judge_of(batch_size=5, **QUESTIONS).score([items[index] for index in shuffled])
    assert [row["clip"] for row in mixed] == pytest.approx([whole[index] for index in shuffled], abs=1e-4)


def test_a_question_is_asked_once_until_the_cache_is_dropped(prompts: list[Prompt], monkeypatch) -> None:
    judge = judge_of(**QUESTIONS)
    num_questions = []
    probabilities = judge._answers.probabilities
    monkeypatch.setattr(
        judge._answers,
        "probabilities",
        lambda questions: num_questions.append(len(questions)) or probabilities(questions),
    )
    item = (prompts[0], "There is a red boat.")
    first = judge.score([item, (prompts[0], "There is a blue boat."), item])
    assert first[0] == first[1] == first[2]
    assert judge.score([item]) == first[:1]
    assert num_questions == [1], "all of them are the same question about the same image"
    judge.forget()
    judge.score([item])
    assert num_questions == [1, 1]


def test_the_pattern_selects_the_question() -> None:
    judge = judge_of(**QUESTIONS, otherwise="Is it right that {sentence}")
    assert judge.question("There is a red boat.") == "Is there a boat in the image?"
    assert judge.question("A boat.") == "Is it right that A boat."
    default = judge_of()
    assert default.question("A boat.") == "A boat. Is that true of the image? Answer yes or no."
    optional = judge_of(pattern=r"a (red )?(boat)", question="Is there a {0}{1}?")
    assert optional.question("See a boat.") == "Is there a boat?"
    assert optional.question("See a red boat.") == "Is there a red boat?"


@pytest.mark.parametrize(
    ("judge", "option"),
    [
        ({"question": "Is there a {1}?", "pattern": "(boat)"}, "question"),
        ({"question": "Is there a {kind}?"}, "question"),
        ({"question": "Is there a {0?"}, "question"),
        ({"question": "Is there a {sentence.kind}?"}, "question"),
        ({"pattern": "ghost", "otherwise": "Is there a {0}?"}, "otherwise"),
    ],
)
def test_a_template_that_cannot_be_formatted(judge: dict[str, str], option: str) -> None:
    with pytest.raises(CsrError, match=rf"scorer\.judge\.{option} cannot be formatted") as caught:
        judge_of(**judge).question("A boat.")
    assert "{sentence}" in caught.value.hint


def test_an_invalid_pattern_is_rejected() -> None:
    with pytest.raises(CsrError, match="is not a valid regular expression"):
        scorer_config(path="judge:policy", judge={"pattern": "(boat"})


def test_the_judge_uses_the_adapter(prompts: list[Prompt], tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = trainable_policy(MODEL, TrainingConfig(), None)
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    save_adapter(trained.model, trained.model.state_dict(), tmp_path / "adapter")
    trained.model.eval()
    item = (prompts[0], "There is a red boat.")
    base, adapted = (
        judge_of(adapter, **QUESTIONS).score([item])[0]["clip"] for adapter in (None, tmp_path / "adapter")
    )
    assert adapted == pytest.approx(p_yes(trained, prompts[0], "Is there a boat in the image?"), abs=1e-4)
    assert abs(adapted - base) > 1e-3

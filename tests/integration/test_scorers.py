"""Compare CLIP, SigLIP, SigLIP 2 and open_clip with direct computations, on tiny random checkpoints."""

from __future__ import annotations

import json
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from csr_vlm.config.schema import ModelConfig, ScorerConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.memory import COSTS
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Prompt, negatives_column
from csr_vlm.pipeline import stages
from csr_vlm.scoring.registry import load_scorer
from csr_vlm.store import tables
from csr_vlm.store.run import Run
from csr_vlm.world.demo import assets
from tests.integration.conftest import small_config
from tests.integration.tiny_models import write_clip, write_naflex, write_siglip

WRITERS = {"clip": write_clip, "siglip": write_siglip, "naflex": write_naflex}
SENTENCES = ["There is a red boat.", "there is a blue fish", "A green tree, a red bird and a boat.", "Boat."]
LONG = ", ".join(["there is a red boat", "there is a blue fish", "there is a green tree"] * 8) + "."


@pytest.fixture(scope="module", params=WRITERS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, WRITERS[request.param](tmp_path_factory.mktemp(request.param))


def scorer_of(path: Path | str, **settings: object):
    return load_scorer(ScorerConfig(path=str(path), **settings), "cpu")


@cache
def loaded(path: Path) -> tuple[Any, Any]:
    return AutoModel.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)


def direct(kind: str, path: Path, image: str, sentence: str) -> float:
    """Score one image and one sentence as the models' documentation does."""
    model, processor = loaded(path)
    pixels = processor.image_processor(images=[Image.open(image).convert("RGB")], return_tensors="pt")
    if kind == "clip":
        tokens = processor.tokenizer([sentence], truncation=True, max_length=77, return_tensors="pt")
    else:
        padded = {"padding": "max_length", "truncation": True, "max_length": 64}
        tokens = {"input_ids": processor.tokenizer([sentence.lower()], **padded, return_tensors="pt")["input_ids"]}
    with torch.no_grad():
        output = model(**pixels, **tokens)
    return torch.cosine_similarity(output.image_embeds, output.text_embeds).item()


def test_the_cosine_equals_a_direct_computation(checkpoint, prompts: list[Prompt]) -> None:
    kind, path = checkpoint
    items = [(prompt, sentence) for prompt in prompts[:2] for sentence in SENTENCES]
    scores = [row["clip"] for row in scorer_of(path).score(items)]
    expected = [direct(kind, path, prompt.image, sentence) for prompt, sentence in items]
    assert scores == pytest.approx(expected, abs=2e-6)
    assert max(scores) - min(scores) > 1e-3, "equal scores would make the comparison meaningless"


def test_scores_do_not_depend_on_order_other_items_or_batch_size(checkpoint, prompts: list[Prompt]) -> None:
    _, path = checkpoint
    items = [(prompt, sentence) for prompt in prompts[:3] for sentence in [*SENTENCES, LONG]]
    whole = dict(zip(items, (row["clip"] for row in scorer_of(path).score(items)), strict=True))
    shuffled = random.Random(0).sample(items, len(items)) + items[:2]
    for size in (1, 3):
        rows = scorer_of(path, batch_size=size).score(shuffled)
        assert [row["clip"] for row in rows] == pytest.approx([whole[item] for item in shuffled], abs=2e-6)


def test_a_long_sentence_is_split_into_clauses_or_cut(checkpoint, prompts: list[Prompt]) -> None:
    kind, path = checkpoint
    split, cut = scorer_of(path), scorer_of(path, long_sentences="cut")
    encoder = split.scorers[0]._encoder
    pieces = split.scorers[0]._pieces(LONG, encoder.count_tokens([LONG])[0])
    assert len(pieces) > 1
    assert max(encoder.count_tokens(pieces)) <= encoder.max_tokens
    assert " ".join(pieces) == LONG
    image = prompts[0].image
    mean = sum(direct(kind, path, image, piece) for piece in pieces) / len(pieces)
    assert split.score([(prompts[0], LONG)])[0]["clip"] == pytest.approx(mean, abs=2e-6)
    assert cut.score([(prompts[0], LONG)])[0]["clip"] == pytest.approx(direct(kind, path, image, LONG), abs=2e-6)
    assert split.num_over_length([*SENTENCES, LONG, LONG]) == {"clip": 2}


def test_each_image_and_each_sentence_is_embedded_once(tmp_path: Path, prompts: list[Prompt], monkeypatch) -> None:
    scorer = scorer_of(write_clip(tmp_path))
    encoder = scorer.scorers[0]._encoder
    seen: dict[str, list[int]] = {"embed_images": [], "embed_texts": []}
    for name, counts in seen.items():
        original = getattr(encoder, name)
        monkeypatch.setattr(encoder, name, lambda xs, c=counts, f=original: (c.append(len(xs)), f(xs))[1])
    again = [Prompt("other", prompts[0].image, "Another question?")]
    scorer.score([(prompt, s) for prompt in [prompts[0], prompts[1], *again] for s in [*SENTENCES, *SENTENCES]])
    assert seen["embed_images"] == [2]
    assert sum(seen["embed_texts"]) == 4
    scorer.score([(prompts[0], "A red boat.")])
    assert seen["embed_images"] == [2]
    scorer.forget()
    scorer.score([(prompts[0], "A red boat.")])
    assert seen["embed_images"] == [2, 1]


def test_not_a_number_names_the_prompt(tmp_path: Path, prompts: list[Prompt]) -> None:
    weights = write_clip(tmp_path) / "model.safetensors"
    tensors = load_file(weights)
    tensors["text_projection.weight"][:] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CsrError, match=f"scorer clip returned nan for prompt {prompts[0].prompt_id}"):
        scorer_of(tmp_path).score([(prompts[0], "A boat.")])


def test_other_model_types_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        CsrError, match="'llava' is not a supported scorer type; expected one of: clip, siglip, siglip2"
    ):
        scorer_of(assets() / "llava")
    with pytest.raises(CsrError, match="no such directory"):
        scorer_of(tmp_path / "nothing")


def test_the_scorer_can_use_the_policys_vision_tower(tmp_path: Path, prompts: list[Prompt]) -> None:
    """The world's policy has the scorer's tower, so a scorer with a zeroed tower recovers with it."""
    policy = ModelConfig(path=str(assets() / "llava"))
    tensors = load_file(assets() / "clip" / "model.safetensors")
    for name in tensors:
        if name.startswith("vision_model."):
            tensors[name] = torch.zeros_like(tensors[name])
    for file in (assets() / "clip").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    items = [(prompts[0], sentence) for sentence in SENTENCES]
    whole = scorer_of(assets() / "clip").score(items)
    zeroed = ScorerConfig(path=str(tmp_path))
    repaired = zeroed.model_copy(update={"vision": "policy"})
    assert load_scorer(repaired, "cpu", policy=policy).score(items) == whole
    assert load_scorer(zeroed, "cpu", policy=policy).score(items) != whole
    with pytest.raises(CsrError, match="needs a policy"):
        load_scorer(repaired, "cpu")


def test_a_vision_tower_of_another_shape_is_rejected(tmp_path: Path) -> None:
    config = ScorerConfig(path=str(write_clip(tmp_path)), vision="policy")
    with pytest.raises(CsrError, match=r"embeddings.* is \(.*128.*\) in the policy and \(.*16.*\) in the scorer"):
        load_scorer(config, "cpu", policy=ModelConfig(path=str(assets() / "llava")))


def test_a_missing_open_clip_has_a_hint_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(CsrError, match="needs open_clip") as caught:
        scorer_of("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert caught.value.hint == "pip install 'open_clip_torch>=3'"


def test_open_clip_equals_a_direct_computation(tmp_path: Path, prompts: list[Prompt]) -> None:
    open_clip = pytest.importorskip("open_clip", exc_type=(ImportError, RuntimeError))
    tower = {"layers": 1, "width": 32, "patch_size": 16, "image_size": 32, "head_width": 16}
    text = {"layers": 1, "width": 32, "heads": 2, "context_length": 77, "vocab_size": 49408}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": tower, "text_cfg": text}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    made = open_clip.CLIP(embed_dim=16, vision_cfg=tower, text_cfg=text)
    torch.save(made.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    pixels = preprocess(Image.open(prompts[0].image).convert("RGB"))[None]
    expected = []
    with torch.no_grad():
        for sentence in SENTENCES:
            tokens = open_clip.get_tokenizer("ViT-B-32")([sentence])
            image, words = model.eval().encode_image(pixels), model.encode_text(tokens)
            expected.append(torch.cosine_similarity(image, words).item())
    scorer = scorer_of(f"open_clip:{tmp_path}")
    rows = scorer.score([(prompts[0], sentence) for sentence in SENTENCES])
    assert [row["clip"] for row in rows] == pytest.approx(expected, abs=2e-6)
    assert scorer.num_over_length(["A boat.", "boat " * 75, "boat " * 76]) == {"clip": 1}
    with pytest.raises(CsrError, match="cannot be loaded"):
        scorer_of("open_clip:ViT-B-32/never_trained")


def test_a_resumed_run_with_two_scorers_counts_all_long_sentences(tmp_path: Path) -> None:
    """The second scorer accepts five tokens; the sentences of the world have six."""
    short = write_clip(tmp_path / "short")
    settings = json.loads((short / "config.json").read_text())
    settings["text_config"]["max_position_embeddings"] = 5
    (short / "config.json").write_text(json.dumps(settings))
    tensors = load_file(short / "model.safetensors")
    positions = "text_model.embeddings.position_embedding.weight"
    tensors[positions] = tensors[positions][:5].clone()
    save_file(tensors, short / "model.safetensors", metadata={"format": "pt"})
    scorer = {"path": str(assets() / "clip"), "extra": [{"path": str(short), "name": "short"}], "use": "clip+short"}
    config = small_config(
        tmp_path,
        scorer=scorer,
        iterations=1,
        method={"search": {"max_sentences": 2}, "pairs": {"require_complete": False}},
        generation={"prompts_per_part": 2},
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"limit": 4})})
    run = Run.create(tmp_path / "run", config)
    stages.check_inputs(run, Silent())
    stages.generate(run, 1, Silent())
    first = run.result(1, "generate")
    nodes = [node for part in run.ledger_parts(1) for node in tables.read_nodes(part) if node.sentence]
    columns = {"clip", "short"}
    assert all(set(node.cosines) == columns | {negatives_column(name) for name in columns} for node in nodes)
    assert first["sentences_over_length"]["clip"] == 0
    assert 0.9 * len(nodes) < first["sentences_over_length"]["short"] <= len(nodes)
    # As if killed after the first of two parts.
    for part in run.ledger_parts(1)[1:]:
        part.unlink()
    (run.iteration(1) / "done" / "generate.json").unlink()
    stages.generate(run, 1, Silent())
    again = run.result(1, "generate")
    assert again == first | {cost: again[cost] for cost in COSTS if cost in again}
    stages.make_pairs(run, 1, Silent())
    assert run.result(1, "pairs")["pairs"] > 0

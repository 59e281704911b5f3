"""Compare batched scoring of sentences with scoring one (image, sentence) pair at a time.

    python benchmarks/scoring.py                    # the world's CLIP
    python benchmarks/scoring.py --model base       # random weights in the shape of CLIP ViT-B/32
    python benchmarks/scoring.py --model large      # CLIP ViT-L/14-336, the encoder of LLaVA-1.5
    python benchmarks/scoring.py --model DIRECTORY --device cuda

The baseline decodes and preprocesses the image and runs both encoders for every pair. Both are timed
alternately several times, and medians are reported. All candidates are distinct by default, so that
caching of repeated sentences gives no advantage; with ``--repeated 0.5`` half of them are repeats, as
in a real search. Prints a table, or JSON with ``--json``.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel

from csr_vlm.cli.console import print_json, print_table, quiet_libraries
from csr_vlm.config.schema import ScorerConfig
from csr_vlm.core.records import Prompt
from csr_vlm.data.images import load_image
from csr_vlm.scoring.registry import load_scorer
from csr_vlm.world.corpus import sentence
from csr_vlm.world.demo import assets
from csr_vlm.world.scenes import HARBOUR

SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "base": {
        "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
        "vision_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 32},
    },
    "large": {
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "image_size": 336,
        },
    },
}

TARGET = 15
"""Target speedup over one call per sentence."""


def checkpoint(name: str, directory: Path) -> Path:
    """Return the directory of a model; one with random weights is created for the name of a shape."""
    if name == "world":
        return assets() / "clip"
    if name not in SHAPES:
        return Path(name)
    processor: Any = AutoProcessor.from_pretrained(assets() / "clip")
    shape = SHAPES[name]
    tokenizer = processor.tokenizer
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config=shape["text_config"] | {"vocab_size": 49408} | ids, vision_config=shape["vision_config"]
    )
    side = config.vision_config.image_size
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    CLIPModel(config).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def make_items(images: int, candidates: int, repeated: float, directory: Path) -> list[tuple[Prompt, str]]:
    """Create noise images of COCO's usual size, each with ``candidates`` sentences."""
    rng = random.Random(0)
    words = [
        sentence(HARBOUR, (kind, color)).rstrip(".") for kind, color in itertools.product(HARBOUR.kinds, HARBOUR.colors)
    ]
    items = []
    for image in range(images):
        path = directory / f"{image}.jpg"
        Image.effect_noise((640, 480), 80).convert("RGB").save(path)
        fresh = [", and ".join(rng.sample(words, rng.randint(1, 3))) + "." for _ in range(candidates)]
        texts = [
            rng.choice(fresh[: index or 1]) if rng.random() < repeated else text for index, text in enumerate(fresh)
        ]
        items += [(Prompt(str(image), str(path), "Describe."), text) for text in texts]
    return items


def one_at_a_time(path: Path, device: str) -> Callable[[list[tuple[Prompt, str]]], list[float]]:
    """Return the baseline: a function that runs both encoders for every pair."""
    model, processor = AutoModel.from_pretrained(path).to(device).eval(), AutoProcessor.from_pretrained(path)

    @torch.inference_mode()
    def score(items: list[tuple[Prompt, str]]) -> list[float]:
        cosines = []
        for prompt, text in items:
            image = load_image(prompt.image, 50_000_000)
            inputs = processor(images=[image], text=[text], return_tensors="pt", truncation=True, max_length=77)
            output = model(**inputs.to(device))
            cosines.append(torch.cosine_similarity(output.image_embeds, output.text_embeds).item())
        return cosines

    return score


def timed(call: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Return seconds and result; reading the result waits for the device."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Time both alternately and compare their scores."""
    path = checkpoint(arguments.model, directory / "model")
    items = make_items(arguments.images, arguments.candidates, arguments.repeated, directory)
    scorer = load_scorer(ScorerConfig(path=str(path)), arguments.device)
    baseline = one_at_a_time(path, arguments.device)

    def score_batched() -> list[float]:
        scorer.forget()
        return [row["clip"] for row in scorer.score(items)]

    timed_items = items[: arguments.pairs]
    baseline(timed_items[:2])
    score_batched()
    batched_times, single_times, difference = [], [], 0.0
    for _ in range(arguments.rounds):
        seconds, batched_scores = timed(score_batched)
        batched_times.append(seconds / len(items))
        # The cost of a pair does not depend on the other pairs, so a subset is sufficient.
        seconds, single_scores = timed(lambda: baseline(timed_items))
        single_times.append(seconds / len(timed_items))
        difference = max(difference, *(abs(a - b) for a, b in zip(batched_scores, single_scores, strict=False)))
    ratio = median(single_times) / median(batched_times)
    return {
        "model": arguments.model,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "images": arguments.images,
        "candidates an image": arguments.candidates,
        "repeated": arguments.repeated,
        "rounds": arguments.rounds,
        "one at a time, ms a sentence": round(1000 * median(single_times), 3),
        "batched, ms a sentence": round(1000 * median(batched_times), 3),
        "ratio": round(ratio, 1),
        "target, at 80 candidates an image": TARGET,
        "missed": ratio < TARGET,
        "largest difference of a cosine": difference,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="world", help="world, base, large or a directory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=80)
    parser.add_argument("--repeated", type=float, default=0.0, help="share of candidates that repeat another one")
    parser.add_argument("--pairs", type=int, default=80, help="number of pairs that the baseline is timed on per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as directory:
        result = measure(arguments, Path(directory))
    if arguments.json:
        print_json(result)
    else:
        print_table("scoring", ["", ""], [[name, str(value)] for name, value in result.items()])


if __name__ == "__main__":
    main()

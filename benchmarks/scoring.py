"""How much faster sentences are scored together than one (image, sentence) pair at a time.

    python benchmarks/scoring.py                    # the world's CLIP
    python benchmarks/scoring.py --model base       # random weights in the shape of CLIP ViT-B/32
    python benchmarks/scoring.py --model large      # CLIP ViT-L/14-336, the encoder of LLaVA-1.5
    python benchmarks/scoring.py --model DIRECTORY --device cuda

The rival does what a call a pair costs: decode the image, preprocess it, run both towers.
Both are timed in turns, several times; the medians count. All candidates are distinct, so
nothing is won by repeated sentences; ``--repeated 0.5`` lets half of them be repeats, as
they are in a real search. Prints a table, or JSON with ``--json``.
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
"""How many times as fast as one call a sentence."""


def checkpoint(name: str, directory: Path) -> Path:
    """Return the directory of a model, made with random weights where it is a shape's name."""
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
    """Draw noise as photographs of COCO's usual size, and describe each by some candidates."""
    rng = random.Random(0)
    words = [
        sentence(HARBOUR, (kind, color)).rstrip(".") for kind, color in itertools.product(HARBOUR.kinds, HARBOUR.colors)
    ]
    items = []
    for index in range(images):
        path = directory / f"{index}.jpg"
        Image.effect_noise((640, 480), 80).convert("RGB").save(path)
        fresh = [", and ".join(rng.sample(words, rng.randint(1, 3))) + "." for _ in range(candidates)]
        said = [
            rng.choice(fresh[: place or 1]) if rng.random() < repeated else text for place, text in enumerate(fresh)
        ]
        items += [(Prompt(str(index), str(path), "Describe."), text) for text in said]
    return items


def one_at_a_time(path: Path, device: str) -> Callable[[list[tuple[Prompt, str]]], list[float]]:
    """Make the rival: both towers for every pair."""
    model, processor = AutoModel.from_pretrained(path).to(device).eval(), AutoProcessor.from_pretrained(path)

    @torch.inference_mode()
    def score(items: list[tuple[Prompt, str]]) -> list[float]:
        found = []
        for prompt, text in items:
            image = load_image(prompt.image, 50_000_000)
            inputs = processor(images=[image], text=[text], return_tensors="pt", truncation=True, max_length=77)
            output = model(**inputs.to(device))
            found.append(torch.cosine_similarity(output.image_embeds, output.text_embeds).item())
        return found

    return score


def timed(call: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Return seconds and result; reading the result has waited for the device."""
    started = time.perf_counter()
    found = call()
    return time.perf_counter() - started, found


def measure(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Time both in turns and compare what they say."""
    path = checkpoint(arguments.model, directory / "model")
    items = make_items(arguments.images, arguments.candidates, arguments.repeated, directory)
    scorer = load_scorer(ScorerConfig(path=str(path)), arguments.device)
    rival = one_at_a_time(path, arguments.device)

    def together() -> list[float]:
        scorer.forget()
        return [row["clip"] for row in scorer.score(items)]

    few = items[: arguments.pairs]
    rival(few[:2])
    together()
    ours, theirs, difference = [], [], 0.0
    for _ in range(arguments.rounds):
        seconds, mine = timed(together)
        ours.append(seconds / len(items))
        # A pair costs the rival the same whatever its company, so a few of them do.
        seconds, its = timed(lambda: rival(few))
        theirs.append(seconds / len(few))
        difference = max(difference, *(abs(a - b) for a, b in zip(mine, its, strict=False)))
    ratio = median(theirs) / median(ours)
    return {
        "model": arguments.model,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "images": arguments.images,
        "candidates an image": arguments.candidates,
        "repeated": arguments.repeated,
        "rounds": arguments.rounds,
        "one at a time, ms a sentence": round(1000 * median(theirs), 3),
        "together, ms a sentence": round(1000 * median(ours), 3),
        "ratio": round(ratio, 1),
        "target, at 80 candidates an image": TARGET,
        "missed": ratio < TARGET,
        "largest difference of a cosine": difference,
    }


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="world", help="world, base, large or a directory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--candidates", type=int, default=80)
    parser.add_argument("--repeated", type=float, default=0.0, help="share of candidates that repeat another")
    parser.add_argument("--pairs", type=int, default=80, help="pairs that the rival is timed on, a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as directory:
        found = measure(arguments, Path(directory))
    if arguments.json:
        print_json(found)
    else:
        print_table("scoring", ["", ""], [[name, str(value)] for name, value in found.items()])


if __name__ == "__main__":
    main()

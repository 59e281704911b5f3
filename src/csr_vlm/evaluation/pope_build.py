"""Build POPE questions from any images whose objects are annotated.

As in the original, each selected image gets as many questions about present as about absent
objects, alternating. The absent objects are drawn at random (random), or are the most frequent
objects of the dataset (popular), or those that co-occur most often with the present object of the
preceding question (adversarial).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import article
from csr_vlm.evaluation.pope import SETTINGS, Question


@dataclass(frozen=True)
class Scenery:
    """Hold the objects in each image, and count their co-occurrences."""

    images: Mapping[str, frozenset[str]]
    """Image file name to the names of the objects in it."""
    names: Sequence[str]
    """All objects that questions can be about."""

    def popular(self) -> list[str]:
        """List the objects, those in the most images first."""
        frequency = Counter(name for objects in self.images.values() for name in objects)
        return sorted(self.names, key=lambda name: (-frequency[name], name))

    def co_occurring(self) -> dict[str, list[str]]:
        """Map each object to all other objects, those in the most images together with it first."""
        counters: dict[str, Counter[str]] = {name: Counter() for name in self.names}
        for objects in self.images.values():
            for name in objects:
                counters[name].update(objects - {name})
        return {
            name: sorted(set(self.names) - {name}, key=lambda other: (-counter[other], other))
            for name, counter in counters.items()
        }


def build_questions(
    scenery: Scenery, setting: str, *, num_images: int, per_image: int = 3, seed: int = 0
) -> list[Question]:
    """Build ``2 * per_image`` questions about each of ``num_images`` images.

    For a given seed, all three settings select the same images and the same present objects.

    Raises:
        CsrError: The setting is unknown, or too few images have enough objects.
    """
    if setting not in SETTINGS:
        raise CsrError(f"{setting!r} is not a valid setting", f"expected one of: {', '.join(SETTINGS)}")
    usable = sorted(
        image
        for image, objects in scenery.images.items()
        if per_image <= len(objects) <= len(scenery.names) - per_image
    )
    if len(usable) < num_images:
        raise CsrError(
            f"only {len(usable)} images have at least {per_image} present and {per_image} absent objects",
            "lower --images or --per-image",
        )
    rng = random.Random(seed)
    chosen = rng.sample(usable, num_images)
    present = [rng.sample(sorted(scenery.images[image]), per_image) for image in chosen]
    popular, co_occurring = scenery.popular(), scenery.co_occurring()
    questions: list[Question] = []
    for image, objects in zip(chosen, present, strict=True):
        absent = [name for name in scenery.names if name not in scenery.images[image]]
        rng.shuffle(absent)
        used: set[str] = set(scenery.images[image])
        for name in objects:
            order = {"random": absent, "popular": popular, "adversarial": co_occurring[name]}[setting]
            other = next(candidate for candidate in order if candidate not in used)
            used.add(other)
            for subject, label in ((name, True), (other, False)):
                questions.append(Question(str(len(questions) + 1), image, question_about(subject), label))
    return questions


def question_about(name: str) -> str:
    """Return POPE's question about an object."""
    return f"Is there {article(name)} {name} in the image?"


def rows(questions: Sequence[Question]) -> Iterator[dict[str, object]]:
    """Yield the rows of a POPE question file."""
    for question in questions:
        yield {
            "question_id": int(question.question_id),
            "image": question.image,
            "text": question.text,
            "label": "yes" if question.label else "no",
        }

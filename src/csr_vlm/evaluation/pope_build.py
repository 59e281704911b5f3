"""Building POPE's questions from any images whose objects are annotated.

As in the original, an image with enough objects gets as many questions about objects that
are there as about objects that are not, in turn. The absent ones are drawn at random
(random), or are the objects that most images have (popular), or those that most often
stand beside the object just asked about (adversarial).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.pope import SETTINGS, Question


@dataclass(frozen=True)
class Scenery:
    """Which objects are in which images, and how often they meet."""

    images: Mapping[str, frozenset[str]]
    """Image file name to the names of its objects."""
    names: Sequence[str]
    """Every object that can be asked about."""

    def popular(self) -> list[str]:
        """Sort objects by the number of images that have them."""
        found = Counter(name for objects in self.images.values() for name in objects)
        return sorted(self.names, key=lambda name: (-found[name], name))

    def beside(self) -> dict[str, list[str]]:
        """For each object, sort the others by the number of images that have both."""
        found: dict[str, Counter[str]] = {name: Counter() for name in self.names}
        for objects in self.images.values():
            for name in objects:
                found[name].update(objects - {name})
        return {
            name: sorted(set(self.names) - {name}, key=lambda other: (-counter[other], other))
            for name, counter in found.items()
        }


def build_questions(
    scenery: Scenery, setting: str, *, num_images: int, per_image: int = 3, seed: int = 0
) -> list[Question]:
    """Ask 2 ``per_image`` questions about each of ``num_images`` images.

    All three settings choose the same images and the same present objects for a seed.

    Raises:
        CsrError: An unknown setting, or too few images with enough objects.
    """
    if setting not in SETTINGS:
        raise CsrError(f"there is no setting {setting!r}", f"one of {', '.join(SETTINGS)}")
    usable = sorted(
        image
        for image, objects in scenery.images.items()
        if per_image <= len(objects) <= len(scenery.names) - per_image
    )
    if len(usable) < num_images:
        raise CsrError(
            f"only {len(usable)} images have {per_image} objects or more and lack as many",
            "ask for fewer --images or fewer --per-image",
        )
    rng = random.Random(seed)
    chosen = rng.sample(usable, num_images)
    present = [rng.sample(sorted(scenery.images[image]), per_image) for image in chosen]
    popular, beside = scenery.popular(), scenery.beside()
    questions: list[Question] = []
    for image, asked in zip(chosen, present, strict=True):
        absent = [name for name in scenery.names if name not in scenery.images[image]]
        rng.shuffle(absent)
        used: set[str] = set(scenery.images[image])
        for name in asked:
            order = {"random": absent, "popular": popular, "adversarial": beside[name]}[setting]
            other = next(candidate for candidate in order if candidate not in used)
            used.add(other)
            for subject, label in ((name, True), (other, False)):
                questions.append(Question(str(len(questions) + 1), image, question_about(subject), label))
    return questions


def question_about(name: str) -> str:
    """Word POPE's question about an object."""
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return f"Is there {article} {name} in the image?"


def rows(questions: Sequence[Question]) -> Iterator[dict[str, object]]:
    """Yield questions as rows of a POPE file."""
    for question in questions:
        yield {
            "question_id": int(question.question_id),
            "image": question.image,
            "text": question.text,
            "label": "yes" if question.label else "no",
        }

"""Read captions of pictures with known objects, and label every sentence and every claim as true or false.

A claim is one kind of object that a caption names. It is ``grounded`` if the picture shows it. A
false claim is by ``habit`` if the kind is one of the absent kinds that the picture's objects suggest
most, and ``random`` otherwise. With n(a) the number of other pictures that show a, and c(a, b) the
number of those that also show b or whose captions name b, the objects of a picture suggest b with

    max over objects a of the picture of c(a, b) / (n(a) + 2)

A sentence is grounded if all its claims are; otherwise it is by habit if one of its claims is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csr_vlm.config.schema import ClaimsConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.data.rows import BadRow, resolve_image_path, row_image
from csr_vlm.evaluation.annotations import Annotations, ground_truth, read_annotations
from csr_vlm.evaluation.answers import image_id_of
from csr_vlm.evaluation.chair import Caption, ObjectReader
from csr_vlm.evaluation.pope import read_rows
from csr_vlm.evaluation.scorer_profile import PictureProfile, Size, Truth
from csr_vlm.evaluation.sentence_kinds import SentenceKind, kind_of, split_sentences
from csr_vlm.store.files import sha256_of

NUM_HABITS = int(PictureProfile().num_habits)
"""Number of absent kinds that a picture is taken to suggest."""
MIN_PICTURES_FOR_HABITS = 30
"""Fewest labeled pictures from which co-occurrence is counted."""
SMALL, LARGE = 32**2 / (640 * 480), 96**2 / (640 * 480)
"""Fractions of the picture that bound medium objects: COCO's 32 x 32 and 96 x 96 pixels of 640 x 480."""
_CAPTION_FIELDS = ("caption", "response", "answer", "text")
_LABEL_EXAMPLE = '{"image": "a.jpg", "objects": ["fork", "dining table"]}'
_CAPTION_EXAMPLE = '{"image": "a.jpg", "caption": "A fork lies on a table."}'


@dataclass(frozen=True)
class LabeledPicture:
    """Represent a picture, the objects in it, and the captions that describe it."""

    prompt: Prompt
    objects: frozenset[str]
    sizes: Mapping[str, Size]
    """Size of the largest object of each kind, where known."""
    captions: tuple[str, ...]


@dataclass(frozen=True)
class LabeledText:
    """Represent a sentence, or a claim as a text of its own, with its truth."""

    picture: int
    """Index of the picture."""
    caption: int
    """Index of the caption among those of the picture."""
    position: int
    """Index of the sentence in the caption; for a claim, of the first sentence that makes it."""
    kind: SentenceKind
    text: str
    claims: tuple[str, ...]
    """Different kinds of objects that it names."""
    truth: Truth | None
    """None if it names nothing."""
    size: Size | None = None
    """Size of the object of a true claim, where known."""


@dataclass(frozen=True)
class LabeledCaptions:
    """Hold pictures with their captions, taken apart into sentences and claims."""

    pictures: tuple[LabeledPicture, ...]
    sentences: tuple[LabeledText, ...]
    claims: tuple[LabeledText, ...]
    """One per picture and kind of object that its captions name."""
    habits_known: bool
    """Whether enough pictures are labeled to tell habitual false claims from others."""
    sources: Mapping[str, Any] = field(default_factory=dict)
    """What was read, for the protocol: files, their SHA-256, counts of what was left out."""


def read_labels(path: Path) -> Annotations:
    """Read a COCO directory, or JSON lines with ``image`` and ``objects``.

    A line may also have ``sizes`` (small, medium or large) or ``boxes`` ([left, top, width, height],
    with the picture's ``width`` and ``height``), one per object.

    Raises:
        CsrError: The labels cannot be read.
    """
    if path.is_dir():
        return read_annotations(path)
    names: dict[int | str, str] = {}
    instances: dict[int | str, tuple[str, ...]] = {}
    areas: dict[int | str, tuple[float | None, ...]] = {}
    for number, row in enumerate(read_rows(path), start=1):
        image, objects = _image_of(row), row.get("objects")
        if image is None or not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
            raise CsrError(
                f"{path}, row {number}: image or objects is missing", f"write one row per picture: {_LABEL_EXAMPLE}"
            )
        names[image] = Path(str(image)).name
        instances[image] = tuple(objects)
        areas[image] = _areas(row, f"{path}, row {number}")
    if not names:
        raise CsrError(f"{path} contains no labels", f"write one row per picture: {_LABEL_EXAMPLE}")
    categories = tuple(sorted({name for objects in instances.values() for name in objects}))
    return Annotations(names, categories, instances, {}, areas, {path.name: sha256_of(path)})


def _areas(row: Mapping[str, Any], location: str) -> tuple[float | None, ...]:
    """Return the fraction of the picture that each object of a row covers; a size stands for a fraction within it."""
    number = len(row["objects"])
    typical = {"small": SMALL / 2, "medium": (SMALL + LARGE) / 2, "large": 2 * LARGE}
    try:
        if row.get("sizes") is not None:
            areas = tuple(None if size is None else typical[size] for size in row["sizes"])
        elif row.get("boxes") is not None:
            areas = tuple(float(box[2]) * float(box[3]) / (row["width"] * row["height"]) for box in row["boxes"])
        else:
            return (None,) * number
        if len(areas) != number:
            raise ValueError(f"{len(areas)} for {number} objects")
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CsrError(
            f"{location}: sizes or boxes do not fit the objects: {error!r}",
            "give one of small, medium, large per object, or one box [left, top, width, height] per object with the "
            "picture's width and height",
        ) from None
    return areas


def size_of(area: float | None) -> Size | None:
    """Return the size of an object that covers this fraction of its picture.

    Example:
        >>> size_of(0.001), size_of(0.01), size_of(0.1)
        ('small', 'medium', 'large')
    """
    if area is None:
        return None
    return "small" if area < SMALL else "medium" if area < LARGE else "large"


def read_any_captions(path: Path) -> list[Caption]:
    """Read captions from JSON lines: an image and a caption under any of the usual names.

    The image is ``image_id``, ``image`` or ``file_name``; the caption is ``caption``, ``response``,
    ``answer`` or ``text``; an empty one is a response that says nothing.

    Raises:
        CsrError: A row lacks an image or a caption, or the file has no rows.
    """
    captions = []
    for number, row in enumerate(read_rows(path), start=1):
        image, texts = _image_of(row), [row[name] for name in _CAPTION_FIELDS if isinstance(row.get(name), str)]
        if image is None or not texts:
            raise CsrError(
                f"{path}, row {number}: image or caption is missing", f"write one row per caption: {_CAPTION_EXAMPLE}"
            )
        captions.append(Caption(row.get("id", number), image, texts[0]))
    if not captions:
        raise CsrError(f"{path} contains no captions", f"write one row per caption: {_CAPTION_EXAMPLE}")
    return captions


def _image_of(row: Mapping[str, Any]) -> int | str | None:
    """Return the image that a row is about, as an id or a file name."""
    if isinstance(row.get("image_id"), int | str):
        image: int | str = row["image_id"]
        return image
    try:
        found = row_image(row)
    except BadRow:
        return None
    return found if isinstance(found, str) else None


def label_captions(
    annotations: Annotations,
    captions: Sequence[Caption],
    reader: ObjectReader,
    image_roots: Sequence[Path],
    claims: ClaimsConfig,
) -> LabeledCaptions:
    """Label every sentence and claim of the captions of annotated pictures.

    Args:
        annotations: Objects of the pictures; may have more pictures than the captions.
        captions: Captions; those of other pictures are left out.
        reader: Finds the objects that a text names.
        image_roots: Folders to look for the pictures in.
        claims: How a claim is worded for the scorer.

    Raises:
        CsrError: No caption is about an annotated picture, a picture is missing, or the reader's
            table lacks a category of the annotations.
    """
    by_picture: dict[int | str, list[Caption]] = defaultdict(list)
    for caption in captions:
        image_id = annotations.find(caption.image_id)
        if image_id is None:
            image_id = annotations.find(image_id_of(str(caption.image_id)))
        if image_id is not None:
            by_picture[image_id].append(caption)
    if not by_picture:
        known = next(iter(annotations.file_names.values()), None) or next(iter(annotations.instances), "nothing")
        raise CsrError(
            f"no caption is about an annotated picture: the captions name {captions[0].image_id!r}, the annotations "
            f"{known!r}",
            "image or image_id must be the file name or the id in the annotations; check that both files are of the "
            "same pictures",
        )
    truth = ground_truth(annotations, {*annotations.instances, *by_picture}, reader)
    pictures = tuple(
        LabeledPicture(
            Prompt(str(image_id), path, ""),
            truth[image_id],
            _sizes(annotations, image_id, reader),
            tuple(caption.text for caption in by_picture[image_id]),
        )
        for image_id, path in _paths(annotations, by_picture, image_roots)
    )
    named = [frozenset(name for text in one.captions for name in reader.read(text).objects) for one in pictures]
    others = [objects for image_id, objects in truth.items() if image_id not in by_picture]
    habits_known = len(truth) >= MIN_PICTURES_FOR_HABITS
    suggested: list[frozenset[str]] = [frozenset()] * len(pictures)
    if habits_known:
        suggested = suggested_kinds([(one.objects, also) for one, also in zip(pictures, named, strict=True)], others)
    sentences = [
        sentence
        for index, picture in enumerate(pictures)
        for sentence in _sentences(index, picture, suggested[index], reader)
    ]
    used = sum(map(len, by_picture.values()))
    return LabeledCaptions(
        pictures,
        tuple(sentences),
        tuple(_claims(pictures, sentences, suggested, claims)),
        habits_known,
        {
            "annotations": dict(annotations.sources),
            "labeled_pictures": len(truth),
            "captions": used,
            "captions_of_other_pictures": len(captions) - used,
        },
    )


def truth_of(kind: str, objects: frozenset[str], suggested: frozenset[str]) -> Truth:
    """Return the truth of the claim that a kind is in a picture."""
    return "grounded" if kind in objects else "habit" if kind in suggested else "random"


def _truth_of_all(truths: Iterable[Truth]) -> Truth | None:
    """Return the truth of a sentence from those of its claims; None if it makes none."""
    found = set(truths)
    for truth in ("habit", "random", "grounded"):
        if truth in found:
            return truth
    return None


def _sentences(
    index: int, picture: LabeledPicture, suggested: frozenset[str], reader: ObjectReader
) -> Iterator[LabeledText]:
    for number, caption in enumerate(picture.captions):
        for position, text in enumerate(split_sentences(caption)):
            claims = tuple(dict.fromkeys(reader.read(text).objects))
            truth = _truth_of_all(truth_of(claim, picture.objects, suggested) for claim in claims)
            yield LabeledText(index, number, position, kind_of(text, position, len(claims)), text, claims, truth)


def _claims(
    pictures: Sequence[LabeledPicture],
    sentences: Sequence[LabeledText],
    suggested: Sequence[frozenset[str]],
    config: ClaimsConfig,
) -> Iterator[LabeledText]:
    """Yield each kind that the captions of a picture name, once, with the first sentence that names it."""
    seen: set[tuple[int, str]] = set()
    for sentence in sentences:
        picture = pictures[sentence.picture]
        for claim in sentence.claims:
            if (sentence.picture, claim) in seen:
                continue
            seen.add((sentence.picture, claim))
            truth = truth_of(claim, picture.objects, suggested[sentence.picture])
            yield LabeledText(
                sentence.picture, sentence.caption, sentence.position, sentence.kind, config.caption_of(claim),
                (claim,), truth, picture.sizes.get(claim),
            )  # fmt: skip


def _sizes(annotations: Annotations, image_id: int | str, reader: ObjectReader) -> dict[str, Size]:
    """Map each kind in a picture to the size of its largest object."""
    largest: dict[str, float] = {}
    areas = annotations.areas.get(image_id, ())
    for name, area in zip(annotations.instances.get(image_id, ()), areas, strict=False):
        if area is not None:
            kind = reader.table.objects[name]
            largest[kind] = max(largest.get(kind, 0.0), area)
    return {kind: size for kind, area in largest.items() if (size := size_of(area)) is not None}


def _paths(
    annotations: Annotations, by_picture: Mapping[int | str, Sequence[Caption]], roots: Sequence[Path]
) -> Iterator[tuple[int | str, str]]:
    """Yield the id and the path of each picture.

    Raises:
        CsrError: A picture is in none of the folders.
    """
    found: dict[int | str, str] = {}
    missing: list[str] = []
    for image_id, captions in by_picture.items():
        names = [str(name) for name in (annotations.file_names.get(image_id), captions[0].image_id, image_id) if name]
        path = next((path for root in roots for name in names if (path := _existing(root, name)) is not None), None)
        if path is None:
            missing.append(names[0])
        else:
            found[image_id] = path
    if missing:
        folders = ", ".join(map(str, roots))
        raise CsrError(
            f"{len(missing)} of {len(by_picture)} pictures are missing in {folders}, such as {missing[0]}",
            "pass the folder of the pictures with --images, or leave their captions out",
        )
    yield from found.items()


def _existing(root: Path, name: str) -> str | None:
    try:
        path = resolve_image_path(root.resolve(), name)
    except BadRow:
        return None
    return str(path) if path.is_file() else None


def suggested_kinds(
    captioned: Sequence[tuple[frozenset[str], frozenset[str]]], others: Sequence[frozenset[str]]
) -> list[frozenset[str]]:
    """Return the absent kinds that the objects of each captioned picture suggest most; see the top of this module.

    Args:
        captioned: The objects that each captioned picture shows, and the kinds that its captions name.
        others: The objects of the other labeled pictures.
    """
    shown: Counter[str] = Counter()
    together: dict[str, Counter[str]] = defaultdict(Counter)
    for objects, named in (*captioned, *((one, frozenset()) for one in others)):
        shown.update(objects)
        for kind in objects:
            together[kind].update(objects | named)
    found = []
    for objects, named in captioned:
        strength: dict[str, float] = {}
        for kind in objects:
            for other, count in together[kind].items():
                if other not in objects:  # what this picture's own captions name does not count
                    strength[other] = max(strength.get(other, 0.0), (count - (other in named)) / (shown[kind] + 1))
        ranked = sorted((kind for kind, value in strength.items() if value > 0), key=lambda k: (-strength[k], k))
        found.append(frozenset(ranked[:NUM_HABITS]))
    return found

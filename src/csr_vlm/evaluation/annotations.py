"""Read ground truth in COCO's format: the object instances and reference captions of images."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.chair import Caption, ObjectReader
from csr_vlm.store.files import sha256_of


@dataclass(frozen=True)
class Annotations:
    """Hold the instances and captions of images from one or more COCO-format files."""

    file_names: Mapping[int | str, str]
    """Image id to file name; empty where the files list none."""
    categories: tuple[str, ...]
    """Names of the object categories, in the order of their ids."""
    instances: Mapping[int | str, tuple[str, ...]]
    """Image id to category names, one per instance."""
    captions: Mapping[int | str, tuple[str, ...]]
    """Image id to reference captions."""
    areas: Mapping[int | str, tuple[float | None, ...]] = field(default_factory=dict)
    """Image id to the fraction of the picture that each of its ``instances`` covers, in 0..1; None where unknown."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """File name to SHA-256."""

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.file_names or image_id in self.instances or image_id in self.captions

    def find(self, image: int | str) -> int | str | None:
        """Return the id of an image given as an id, a numeric string or a file name; None if it is unknown."""
        if image in self:
            return image
        text = str(image)
        if text.isdecimal() and int(text) in self:
            return int(text)
        return self._ids_by_name.get(Path(text).name)

    @cached_property
    def _ids_by_name(self) -> dict[str, int | str]:
        return {name: image_id for image_id, name in self.file_names.items()}


def read_annotations(directory: Path, split: str = "*") -> Annotations:
    """Read every ``instances_SPLIT.json`` and ``captions_SPLIT.json`` in a directory.

    Args:
        split: Name of a split, such as val2014; every split by default, because CHAIR
            combines train and val.

    Raises:
        CsrError: The directory has no instances file, or a file is not in COCO's format.
    """
    paths = {kind: sorted(directory.glob(f"{kind}_{split}.json")) for kind in ("instances", "captions")}
    if not paths["instances"]:
        raise CsrError(
            f"{directory} does not contain instances_{split}.json",
            "pass the directory with COCO's instances_*.json and captions_*.json",
        )
    names: dict[int | str, str] = {}
    categories: dict[int, str] = {}
    instances: dict[int | str, list[str]] = defaultdict(list)
    captions: dict[int | str, list[str]] = defaultdict(list)
    pixels: dict[int | str, float] = {}
    covered: dict[int | str, list[float | None]] = defaultdict(list)
    for path in paths["instances"]:
        content = _read_object(path)
        with _expect_coco_format(path):
            names |= {image["id"]: image.get("file_name", "") for image in content.get("images", ())}
            pixels |= {
                image["id"]: image.get("width", 0) * image.get("height", 0) for image in content.get("images", ())
            }
            categories |= {int(category["id"]): str(category["name"]) for category in content["categories"]}
            for item in content["annotations"]:
                instances[item["image_id"]].append(categories[item["category_id"]])
                whole = pixels.get(item["image_id"], 0)
                covered[item["image_id"]].append(item["area"] / whole if whole and "area" in item else None)
    for path in paths["captions"]:
        content = _read_object(path)
        with _expect_coco_format(path):
            names |= {image["id"]: image.get("file_name", "") for image in content.get("images", ())}
            for item in content["annotations"]:
                captions[item["image_id"]].append(str(item["caption"]))
    return Annotations(
        file_names=names,
        categories=tuple(categories[key] for key in sorted(categories)),
        instances={key: tuple(value) for key, value in instances.items()},
        captions={key: tuple(value) for key, value in captions.items()},
        areas={key: tuple(value) for key, value in covered.items()},
        sources={path.name: sha256_of(path) for kind in paths.values() for path in kind},
    )


@contextmanager
def _expect_coco_format(path: Path) -> Iterator[None]:
    """Turn a missing or ill-typed field into an error that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CsrError(f"{path} is not in COCO's format: {error!r}", "see docs/evaluation.md") from None


def _read_object(path: Path) -> Any:
    """Read the JSON object in a file."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CsrError(f"{path} cannot be read as JSON: {error}", "download the annotations again") from None
    if not isinstance(content, dict):
        raise CsrError(f"{path} is not in COCO's format: not a JSON object", "see docs/evaluation.md")
    return content


def ground_truth(
    annotations: Annotations, image_ids: Collection[int | str], reader: ObjectReader
) -> dict[int | str, frozenset[str]]:
    """Return the objects in each image: its annotated categories and the objects named in its captions.

    Raises:
        CsrError: The annotations have a category that the object table lacks.
    """
    unknown = sorted(set(annotations.categories) - reader.table.objects.keys())
    if unknown:
        raise CsrError(
            f"the synonym file lacks categories of the annotations: {', '.join(unknown[:5])}",
            "pass --synonyms a file with one line per category",
        )
    return {image_id: frozenset(_objects(annotations, image_id, reader)) for image_id in set(image_ids)}


def truth_of(
    captions: Sequence[Caption], annotations: Annotations, reader: ObjectReader, source: Path
) -> dict[int | str, frozenset[str]]:
    """Map the image id of every caption to the objects in the image.

    Args:
        source: File of the captions, for messages.

    Raises:
        CsrError: The annotations lack an image.
    """
    ids = {caption.image_id: annotations.find(caption.image_id) for caption in captions}
    unknown = [str(name) for name, image_id in ids.items() if image_id is None]
    if unknown:
        raise CsrError(
            f"{source}: the annotations lack {len(unknown)} images, such as {', '.join(unknown[:3])}",
            "image_id must be COCO's number or the file name; check that the annotations are of these images",
        )
    known = {name: image_id for name, image_id in ids.items() if image_id is not None}
    truth = ground_truth(annotations, set(known.values()), reader)
    return {name: truth[image_id] for name, image_id in known.items()}


def _objects(annotations: Annotations, image_id: int | str, reader: ObjectReader) -> Iterator[str]:
    yield from (reader.table.objects[name] for name in annotations.instances.get(image_id, ()))
    for caption in annotations.captions.get(image_id, ()):
        yield from reader.read(caption).objects

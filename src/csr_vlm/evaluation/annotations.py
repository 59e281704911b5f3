"""Ground truth in COCO's format: instances and reference captions of images."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.chair import Reader
from csr_vlm.store.files import sha256_of


@dataclass(frozen=True)
class Annotations:
    """What some COCO-format files say about images."""

    file_names: Mapping[int | str, str]
    """Image id to file name; empty where the files list none."""
    categories: tuple[str, ...]
    """Names of the object categories, in the order of their ids."""
    instances: Mapping[int | str, tuple[str, ...]]
    """Image id to category names, one an instance."""
    captions: Mapping[int | str, tuple[str, ...]]
    """Image id to reference captions."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """File name to SHA-256."""

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.file_names or image_id in self.instances or image_id in self.captions

    def find(self, image: int | str) -> int | str | None:
        """Return the id of an image named by its id, as a number or in text, or by its file name."""
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
    """Read every ``instances_SPLIT.json`` and ``captions_SPLIT.json`` of a directory.

    Args:
        split: Such as val2014; all there are by default, as CHAIR takes train and val together.

    Raises:
        CsrError: There is no instance file, or one does not read as COCO's format.
    """
    paths = {kind: sorted(directory.glob(f"{kind}_{split}.json")) for kind in ("instances", "captions")}
    if not paths["instances"]:
        raise CsrError(
            f"{directory} holds no instances_{split}.json",
            "give the directory of COCO's annotations (instances, captions)",
        )
    names: dict[int | str, str] = {}
    categories: dict[int, str] = {}
    instances: dict[int | str, list[str]] = defaultdict(list)
    captions: dict[int | str, list[str]] = defaultdict(list)
    for path in paths["instances"]:
        content = _content(path)
        with _format_of(path):
            names |= {image["id"]: image.get("file_name", "") for image in content.get("images", ())}
            categories |= {int(category["id"]): str(category["name"]) for category in content["categories"]}
            for item in content["annotations"]:
                instances[item["image_id"]].append(categories[item["category_id"]])
    for path in paths["captions"]:
        content = _content(path)
        with _format_of(path):
            names |= {image["id"]: image.get("file_name", "") for image in content.get("images", ())}
            for item in content["annotations"]:
                captions[item["image_id"]].append(str(item["caption"]))
    return Annotations(
        file_names=names,
        categories=tuple(categories[key] for key in sorted(categories)),
        instances={key: tuple(value) for key, value in instances.items()},
        captions={key: tuple(value) for key, value in captions.items()},
        sources={path.name: sha256_of(path) for kind in paths.values() for path in kind},
    )


@contextmanager
def _format_of(path: Path) -> Iterator[None]:
    """Turn a missing or ill-typed field into an error that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CsrError(f"{path} is not in COCO's format: {error!r}", "see docs/evaluation.md") from None


def _content(path: Path) -> Any:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CsrError(f"{path} cannot be read as JSON: {error}", "fetch the annotations again") from None
    if not isinstance(content, dict):
        raise CsrError(f"{path} is not in COCO's format: no JSON object", "see docs/evaluation.md")
    return content


def truth_of(
    annotations: Annotations, image_ids: Collection[int | str], reader: Reader
) -> dict[int | str, frozenset[str]]:
    """Return the objects of images: categories of instances and objects that captions name.

    Raises:
        CsrError: A category that the table of objects does not have.
    """
    unknown = sorted(set(annotations.categories) - reader.table.objects.keys())
    if unknown:
        raise CsrError(
            f"the synonym file lacks categories of the annotations: {', '.join(unknown[:5])}",
            "give --synonyms a file with a line for each",
        )
    return {image_id: frozenset(_objects(annotations, image_id, reader)) for image_id in set(image_ids)}


def _objects(annotations: Annotations, image_id: int | str, reader: Reader) -> Iterator[str]:
    yield from (reader.table.objects[name] for name in annotations.instances.get(image_id, ()))
    for caption in annotations.captions.get(image_id, ()):
        yield from reader.read(caption).objects

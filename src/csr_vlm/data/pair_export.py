"""Write a run's pairs as texts and images, in other programs' formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Pair
from csr_vlm.data.images import BadImage, png_as_seen, suffix_of
from csr_vlm.data.preference import ExportedPair, FormattedPair, common_context, image_bytes
from csr_vlm.data.sources import PAIR_FORMATS
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.store.files import store_content


def both_end(pair: Pair) -> bool:
    """Return whether the policy ended both responses of a pair."""
    return pair.chosen.complete and pair.rejected.complete


def needs_template(format_name: str, described: bool) -> bool:
    """Return whether a format holds pairs in the policy's chat template, for which its processor is needed."""
    return format_name == "trl" and described


def write_pairs(
    pairs: Iterable[Pair],
    format_name: str,
    out: Path,
    *,
    copy_images: bool,
    origin: str,
    rule: SentenceRule,
    max_image_pixels: int,
    described: bool = False,
    to_template: Callable[[Pair, str], FormattedPair] | None = None,
) -> Path:
    """Write pairs in another program's format, one at a time.

    Args:
        pairs: Pairs of one iteration.
        format_name: Key of :data:`csr_vlm.data.sources.PAIR_FORMATS`.
        out: Folder for the files; other files in it are left alone.
        copy_images: Embed the images in the file if the format can, else copy them to ``images/``
            with relative paths. If false, write absolute paths.
        origin: Model of the policy that generated the pairs.
        rule: Rule that finds the sentences with which both responses begin.
        max_image_pixels: Largest width times height of an image.
        described: Whether some responses do not end, so that the file has to say which ones do.
        to_template: Function of a pair and its context that returns the pair in the policy's chat template;
            required where :func:`needs_template`.

    Returns:
        The main file.

    Raises:
        CsrError: An image is missing, or ``out`` cannot be written.
    """
    module = PAIR_FORMATS[format_name]

    def exported(pairs: Iterable[Pair]) -> Iterator[ExportedPair]:
        images = _Images(out, module, copy_images, max_image_pixels)
        for pair in pairs:
            context = common_context(pair.chosen.text, pair.rejected.text, rule)
            formatted = None if to_template is None else to_template(pair, context)
            yield ExportedPair(pair, context, *images.of(pair.prompt.image), origin, described, formatted)

    try:
        out.mkdir(parents=True, exist_ok=True)
        main_file: Path = module.write(exported(pairs), out)
    except OSError as error:
        raise CsrError(f"{out} cannot be written to: {error.strerror}", "choose another --out") from None
    return main_file


class _Images:
    """Decide how a file refers to its images, which consecutive pairs share.

    An image that other programs would read otherwise than the policy saw it is written as PNG.
    """

    def __init__(self, out: Path, module: ModuleType, copied: bool, max_pixels: int) -> None:
        self._out = out
        self._max_pixels = max_pixels
        self._copied = copied
        self._embedded = getattr(module, "EMBEDS_ALWAYS", False) or (copied and module.EMBEDS_IMAGES)
        self._last: tuple[str, tuple[str, bytes | None]] | None = None

    def of(self, image: str) -> tuple[str, bytes | None]:
        """Return the path to write for an image, and its content if that goes into the file.

        Raises:
            CsrError: The image cannot be read.
        """
        if self._last is None or self._last[0] != image:
            self._last = (image, self._find(image))
        return self._last[1]

    def _find(self, image: str) -> tuple[str, bytes | None]:
        content = image_bytes(image)
        try:
            png = png_as_seen(image, self._max_pixels)
        except BadImage as error:
            raise CsrError(f"the image {image} cannot be read: {error}", "restore the file") from None
        if self._embedded:
            return (image, content) if png is None else (f"{Path(image).stem}.png", png)
        if png is None and not self._copied:
            return image, None
        suffix = ".png" if png is not None else Path(image).suffix.lower() or suffix_of(content)
        copy = store_content(self._out / "images", content if png is None else png, suffix)
        return (copy.relative_to(self._out).as_posix() if self._copied else str(copy.resolve())), None

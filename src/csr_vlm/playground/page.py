"""Build the page of ``csr try`` with Gradio: one picture, and the answers of several policies side by side.

The browser never names a file: a picture is an upload, which must lie in this process's own upload folder, or
the number of one of the run's pictures.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import gradio as gr
from markupsafe import escape
from starlette.middleware import Middleware

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.data.images import load_prompt_image
from csr_vlm.playground.answering import Sampling
from csr_vlm.playground.markup import Answer, answers_html, questions_html
from csr_vlm.playground.same_site import SameSiteOnly

if TYPE_CHECKING:
    from csr_vlm.playground.session import Playground

_NUM_PICTURES = 24
_THUMBNAIL = 160
_SHOWN = 1024
"""Largest side of a picture on the page, in pixels."""
_MAX_CHARS = 2000
_MAX_TOKENS = 1024
_UPDATES_PER_SECOND = 20
_ON_CLICK = """
element.addEventListener('click', event => {
  const claim = event.target.closest('[data-claim]');
  if (claim) trigger('select', {claim: claim.dataset.claim});
});
"""


class Page:
    """Answer the events of the page.

    Args:
        playground: Loaded policies.
        uploads: Folder of the uploads.
        policies: Policies that are selected at first.
    """

    def __init__(self, playground: Playground, uploads: Path, policies: Sequence[str]) -> None:
        self.playground = playground
        self.uploads = uploads
        self.selected = list(policies)
        self.pictures = playground.pictures(_NUM_PICTURES)
        self._stops: dict[str, Event] = {}

    def build(self) -> Any:
        """Return the page as Gradio's ``Blocks``."""
        root = self.playground.run.root.name
        with gr.Blocks(title=f"csr try {root}", analytics_enabled=False) as blocks:
            gr.Markdown(f"# {_plain(root)}\nBase model and iterations on one picture.")
            picture, asked = gr.State(None), gr.State([])
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    image, gallery = self._picture_inputs()
                    info = gr.HTML("", elem_id="picture")
                    question = gr.Textbox(self.playground.question, label="Question", max_length=_MAX_CHARS)
                    policies = gr.CheckboxGroup(self.playground.policies, value=self.selected, label="Policies")
                    sampling = _sampling_inputs()
                    with gr.Row():
                        ask, stop = gr.Button("Ask", variant="primary"), gr.Button("Stop")
                with gr.Column(scale=2, min_width=300):
                    answers = gr.HTML(answers_html([]), elem_id="answers", js_on_load=_ON_CLICK)
                    gr.Markdown("Click a claim to ask every policy about it, or name a thing:")
                    thing = gr.Textbox(label="Thing", max_length=100, placeholder="umbrella")
                    questions = gr.HTML("", elem_id="questions")
            hidden: dict[str, Any] = {"api_visibility": "private"}
            image.upload(self.uploaded, image, [picture, info], **hidden)
            image.clear(lambda: (None, ""), None, [picture, info], **hidden)
            gallery.select(self.picked, None, [image, picture, info], **hidden)
            for trigger in (ask.click, question.submit):
                trigger(self.answer, [picture, question, policies, *sampling], [answers, asked, questions], **hidden)
            stop.click(self.stop, None, None, queue=False, **hidden)
            about = [picture, policies, asked]
            answers.select(self.clicked, about, [asked, questions], **hidden)
            thing.submit(self.asked_about, [*about, thing], [asked, questions], **hidden)
        return blocks

    def _picture_inputs(self) -> tuple[Any, Any]:
        image = gr.Image(
            type="filepath",
            image_mode=None,  # Gradio keeps the upload as it is; only this package decodes it
            sources=["upload", "clipboard"],
            label="Picture",
            height=280,
            buttons=[],
        )
        gallery = gr.Gallery(
            [self._shown(prompt, _THUMBNAIL) for prompt in self.pictures],
            label="Pictures of the run",
            columns=4,
            height=180,
            allow_preview=False,
            buttons=[],
            interactive=False,
            object_fit="cover",
        )
        return image, gallery

    def _shown(self, prompt: Prompt, side: int) -> Any:
        """Return a picture of the run, no larger than ``side`` pixels."""
        loaded = load_prompt_image(prompt, self.playground.run.config.data.max_image_pixels)
        loaded.thumbnail((side, side))
        return loaded

    def uploaded(self, path: str) -> tuple[str, str]:
        """Accept an upload; return its path for the state of the page, and its size as text.

        Raises:
            Error: It is not a picture in the upload folder.
        """
        file = Path(path).resolve()
        with _shown_errors():
            if not file.is_relative_to(self.uploads):
                raise CsrError("this file was not uploaded", "upload a picture")
            width, height = self.playground.check_picture(file)
        return str(file), f"Your picture, {width} x {height} pixels"

    def picked(self, event: gr.SelectData) -> tuple[Any, int, str]:
        """Show one of the run's pictures; the state of the page holds its number."""
        number = int(event.index)
        with _shown_errors():
            prompt = self.pictures[number]
            return self._shown(prompt, _SHOWN), number, _plain(f"Picture of {prompt.prompt_id}")

    def _prompt(self, picture: str | int | None, question: str) -> Prompt:
        if picture is None:
            raise CsrError("there is no picture", "upload one, or click one of the run's")
        image = self.pictures[picture].image if isinstance(picture, int) else picture
        return Prompt("try", image, question[:_MAX_CHARS].strip() or self.playground.question)

    def answer(
        self,
        picture: str | int | None,
        question: str,
        policies: Sequence[str],
        max_new_tokens: float,
        temperature: float,
        top_p: float,
        seed: float,
        request: gr.Request,
    ) -> Iterator[tuple[str, list[Any], str]]:
        """Yield the answers of all policies as they grow; the claims are marked when an answer is complete."""
        stop = self._stops[str(request.session_hash)] = Event()
        sampling = Sampling(min(int(max_new_tokens), _MAX_TOKENS), float(temperature), float(top_p), int(seed))
        with _shown_errors():
            prompt = self._prompt(picture, question)
            self.playground.require(policies)
            answers = [Answer(policy) for policy in policies]
            for index, policy in enumerate(policies):
                started, shown = time.monotonic(), 0.0
                for text in self.playground.answer(policy, prompt, sampling):
                    if stop.is_set():
                        break
                    answers[index] = replace(answers[index], text=text)
                    if time.monotonic() - shown > 1 / _UPDATES_PER_SECOND:
                        shown = time.monotonic()
                        yield answers_html(answers), [], ""
                marks = self.playground.marks(prompt, answers[index].text)
                answers[index] = replace(answers[index], marks=marks, seconds=time.monotonic() - started)
                yield answers_html(answers), [], ""

    def stop(self, request: gr.Request) -> None:
        """Stop the answers of this browser tab."""
        event = self._stops.get(str(request.session_hash))
        if event is not None:
            event.set()

    def clicked(
        self, picture: str | int | None, policies: Sequence[str], asked: list[Any], event: gr.EventData
    ) -> tuple[list[Any], str]:
        """Ask about the claim that was clicked."""
        return self.asked_about(picture, policies, asked, str(event.claim))

    def asked_about(
        self, picture: str | int | None, policies: Sequence[str], asked: list[Any], thing: str
    ) -> tuple[list[Any], str]:
        """Ask the policies whether a thing is in the picture, and show the answers above the earlier ones."""
        with _shown_errors():
            if not thing.strip():
                raise CsrError("no thing was named", "write a thing, such as umbrella")
            prompt = self._prompt(picture, self.playground.claim_question(thing.strip()[:100]))
            self.playground.require(policies)
            values = {name: self.playground.probability_of_yes(name, prompt.image, prompt.text) for name in policies}
        rows = [(prompt.text, values), *(row for row in asked if row[0] != prompt.text and list(row[1]) == policies)]
        return rows, questions_html(rows)


def _sampling_inputs() -> list[Any]:
    with gr.Accordion("Sampling", open=False):
        return [
            gr.Slider(8, _MAX_TOKENS, 256, step=8, label="Maximum number of tokens"),
            gr.Slider(0, 2, 0, step=0.1, label="Temperature (0 is greedy)"),
            gr.Slider(0.05, 1, 1, step=0.05, label="Probability mass (top p)"),
            gr.Number(0, precision=0, minimum=0, label="Random seed"),
        ]


class _shown_errors:  # noqa: N801 - used like a function
    """Show errors that a user can act on in the page."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, CsrError):
            raise gr.Error(_plain(f"{error.message}. {error.hint}."), duration=10, print_exception=False) from None


def _plain(text: str) -> str:
    """Escape a text for Gradio's messages, which are HTML."""
    return str(escape(text))


@dataclass(frozen=True)
class Address:
    """Hold where a page is served."""

    blocks: Any
    local: str
    public: str | None = None
    password: str | None = None
    """Password of the user ``csr``; None for a page without a public link."""


def serve(
    page: Page, *, port: int | None = None, share: bool = False, max_upload_bytes: int, open_browser: bool = False
) -> Address:
    """Serve the page to this machine in a thread, and with ``share`` to whoever has the link and the password."""
    password = secrets.token_urlsafe(9) if share else None
    blocks = page.build().queue(default_concurrency_limit=1, max_size=16)
    _, local, public = blocks.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=share,
        auth=None if password is None else ("csr", password),
        max_file_size=max_upload_bytes,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        # A public link has a name of its own, and a password.
        app_kwargs=None if share else {"middleware": [Middleware(SameSiteOnly)]},
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=(resources.files("csr_vlm.playground") / "page.css").read_text(encoding="utf-8"),
    )
    return Address(blocks, local, public or None, password)

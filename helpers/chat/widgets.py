"""The chat as widgets: a thin layer over :class:`helpers.chat.session.ChatSession`, for ipywidgets 7.7 (Colab) and 8.

Everything runs inside the callback (Colab does not show what a background thread changes). An exception never
disappears: input that cannot be used gets a sentence, anything else a red box and an entry in ``session.errors``.
"""

from __future__ import annotations

import base64
import functools
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import jinja2
from IPython.display import HTML, display

from helpers import files
from helpers.chat import detectors, feedback
from helpers.chat import session as chat
from helpers.chat.session import BadInput, ChatSession, Picture
from helpers.colab import session as colab
from helpers.data import images
from helpers.judge import figures
from helpers.records import Sample
from helpers.results import category_label

_TEMPLATES = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
_HTML = jinja2.Environment(loader=_TEMPLATES, autoescape=True).get_template("chat.html").module
_LABELS = {"not sure": None, "genuine": "normal", "anomalous": "anomalous"}
_THUMBNAIL, _SHOWN_SIDE = 92, 560


def upload_on_colab(wanted: bool) -> list[Picture]:
    """Ask for files with Colab's own dialog, which takes large ones; elsewhere say where the upload button is."""
    if wanted and not colab.is_colab():
        print("Not on Colab: use the upload button of the chat below.")
    if not wanted or not colab.is_colab():
        return []
    from google.colab import files as colab_files

    return [chat.receive_picture(name, content) for name, content in colab_files.upload().items()]


def guarded(action: Callable[..., None]) -> Callable[..., None]:
    """One action at a time; whatever it raises is shown and noted."""

    @functools.wraps(action)
    def run(self: ChatUI, *_event: Any) -> None:
        if self._busy:
            return
        self._busy, self.message.value = True, ""
        try:
            action(self)
            self._show()
        except BadInput as error:
            self.message.value = str(_HTML.message(str(error), "", ""))
        except Exception as error:
            self.session.errors.append(f"{type(error).__name__}: {error}")
            details = "".join(traceback.format_exception(error))
            self.message.value = str(_HTML.message(f"Something went wrong: {self.session.errors[-1]}", "bad", details))
        finally:
            self._busy = False

    return run


class ChatUI:
    """The widgets of a session; ``root`` is the one to display. The first picture is chosen at once. Pictures are
    ``samples`` (:func:`helpers.chat.session.sample_pictures`) and ``uploads`` (:func:`upload_on_colab`); judgements go
    to ``log``, transcripts into the folder ``transcripts``."""

    def __init__(
        self, session: ChatSession, samples: Mapping[str, Sample], *, uploads: Sequence[Picture] = (), log: Path,
        transcripts: Path,
    ) -> None:  # fmt: skip
        self.session, self.samples, self._log, self._transcripts = session, dict(samples), log, transcripts
        self._uploads, self._busy = {f"uploaded: {one.name}": one for one in uploads}, False
        wide, row = widgets.Layout(width="auto"), widgets.Layout(flex_flow="row wrap", width="auto")
        names = [*self._uploads, *self.samples]
        self.sample = widgets.Dropdown(options=names, description="Picture", layout=wide)
        late = {"layout": wide, "continuous_update": False}
        self.path = widgets.Text(placeholder="/path/to/picture.jpg", description="or path", **late)
        self.upload = widgets.FileUpload(accept="image/*", description="or upload")
        known = {category_label(name): name for name in session.categories}
        self.compared_with = widgets.Dropdown(options=known, description="Painting", layout=wide)
        self.image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%", object_fit="contain"))
        self.view = widgets.ToggleButtons(options=["marked", "picture"])
        self.threshold = widgets.FloatSlider(step=0.001, readout_format=".3f", description="threshold", **late)
        self.line, self.talk, self.message, self.table = (widgets.HTML(layout=wide) for _ in range(4))
        self.quick = [widgets.Button(description=q, layout=widgets.Layout(width="auto")) for q in chat.FIXED_QUESTIONS]
        self.question = widgets.Text(placeholder="Ask about the picture …", layout=widgets.Layout(flex="1 1 auto"))
        self.send, self.again, self.save, self.give = (
            widgets.Button(description=text, layout=widgets.Layout(width="auto", flex="0 0 auto"))
            for text in ("Send", "Start over", "Save transcript", "Save judgement")
        )
        self.verdict = widgets.ToggleButtons(options=list(feedback.VERDICTS), value=None)
        self.view.style.button_width = self.verdict.style.button_width = "84px"
        self.label = widgets.Dropdown(options=list(_LABELS), description="picture is", layout=wide)
        self.region = widgets.Dropdown(options=["", *feedback.CELLS], description="where", layout=wide)
        self.comment = widgets.Text(placeholder="What do you see? (optional)", layout=wide)
        self.keep = widgets.Checkbox(description="keep a copy of the picture", indent=False, layout=wide)
        left = [self.sample, self.path, self.upload, self.compared_with, self.image, self.view, self.threshold]
        typed = [self.question, self.send, self.again, self.save]
        asking = [widgets.HBox(part, layout=row) for part in (self.quick, typed)]
        judging = [widgets.HTML("<b>Your judgement of the last answer</b>"), self.verdict, self.label, self.region]
        right = [self.talk, self.message, *asking, *judging, self.comment, self.keep, self.give]
        half = widgets.Layout(flex="1 1 400px", min_width="300px", padding="0 10px")
        columns = widgets.HBox([widgets.VBox(part, layout=half) for part in (left, right)], layout=row)
        thumbs = widgets.HBox([self._thumbnail(name) for name in names], layout=row)
        self.root = widgets.VBox([widgets.HTML(str(_HTML.style())), thumbs, self.line, columns, self.table])
        self.root.layout.max_width = "1100px"
        self._wire()
        self._choose()

    def _wire(self) -> None:
        changed = {self.sample: self._choose, self.path: self._open, self.upload: self._receive}
        changed |= {self.compared_with: self._compare, self.threshold: self._move, self.view: self._move}
        for widget, action in changed.items():
            widget.observe(action, "value")
        clicked = {self.send: self._ask, self.again: self._start_over, self.save: self._save, self.give: self._give}
        for button, action in (clicked | dict.fromkeys(self.quick, self._ask_fixed)).items():
            button.on_click(action)

    def _thumbnail(self, name: str) -> widgets.VBox:
        one = self._uploads.get(name)
        image = one.image if one else images.load_image(self.samples[name].image_path, max_side=256)
        shown = widgets.Image(value=chat.png_bytes(images.resize(image, _THUMBNAIL)), format="png")
        button = widgets.Button(description=name.split(": ")[-1], layout=widgets.Layout(width=f"{_THUMBNAIL + 6}px"))
        button.on_click(lambda _: setattr(self.sample, "value", name))
        return widgets.VBox([shown, button], layout=widgets.Layout(align_items="center", margin="2px"))

    @guarded
    def _choose(self) -> None:
        sample, uploaded = self.samples.get(self.sample.value), self._uploads.get(self.sample.value)
        self._look_at(uploaded or chat.open_picture(sample.image_path, category=sample.category))

    @guarded
    def _open(self) -> None:
        self._look_at(chat.open_picture(self.path.value))
        self.sample.value = None  # no sample is shown any more

    @guarded
    def _receive(self) -> None:
        value = self.upload.value  # {name: {"content": ...}} in version 7, a tuple of records in 8
        for name, one in value.items() if isinstance(value, Mapping) else [(one["name"], one) for one in value]:
            self._look_at(chat.receive_picture(str(name), bytes(one["content"])))
            self.sample.value = None

    @guarded
    def _compare(self) -> None:
        if self.session.picture is not None:
            self._look_at(self.session.picture, category=self.compared_with.value)

    def _look_at(self, picture: Picture, *, category: str | None = None) -> None:
        self.session.choose(picture, category=category)
        self.compared_with.value = self.session.category
        highest = max(2 * self.session.threshold, self.session.own.anomaly_score)
        with self.threshold.hold_sync(), self.threshold.hold_trait_notifications():
            self.threshold.min, self.threshold.max, self.threshold.value = 0.0, highest, self.session.threshold
        self.verdict.value, self.label.value, self.region.value, self.comment.value = None, "not sure", "", ""

    @guarded
    def _move(self) -> None:
        self.session.threshold = self.threshold.value

    def _ask_fixed(self, button: widgets.Button) -> None:
        self.question.value = button.description
        self._ask()

    @guarded
    def _ask(self) -> None:
        asked = chat.clean_question(self.question.value)

        def so_far(text: str) -> None:
            self.talk.value = str(_HTML.talk(self.session.history, asked, text))

        so_far("")
        self.question.value = ""
        self.session.ask(asked, on_text=so_far)

    @guarded
    def _start_over(self) -> None:
        self.session.start_over()

    @guarded
    def _save(self) -> None:
        path = self._transcripts / f"transcript_{self.session.id}.html"
        head = "<!doctype html><meta charset='utf-8'><title>Transcript</title>"
        files.write_text(path, head + self.transcript().data)
        self.message.value = str(_HTML.message(f"Written: {path}", "good", ""))

    @guarded
    def _give(self) -> None:
        if self.verdict.value is None:
            raise BadInput("Say first whether the answer is correct, wrong, or whether you are unsure.")
        picture, judgement = self.session.picture, {"verdict": self.verdict.value, "comment": self.comment.value}
        judgement |= {"label": _LABELS[self.label.value], "region": self.region.value or None}
        judgement |= {"context": self.session.context(), "keep_image": self.keep.value}
        try:
            feedback.record(self._log, picture.image, image_path=picture.path, **judgement)
        except ValueError as error:
            raise BadInput(str(error)) from error
        self.verdict.value = None
        self.message.value = str(_HTML.message("Thank you, your judgement is saved.", "good", ""))

    def _show(self) -> None:
        self.line.value = f'<div class="art-chat">{_HTML.verdict_line(*self.session.verdict_line())}</div>'
        self.talk.value = str(_HTML.talk(self.session.history, "", ""))
        self.table.value = f'<div class="art-chat">{_HTML.detectors(detectors.table(self.session.verdicts))}</div>'
        self.image.value = self._drawn(self.view.value)

    def _drawn(self, view: str) -> bytes:
        image, own = images.resize(self.session.picture.image, _SHOWN_SIDE), self.session.own
        marked = figures.marked(image, own.anomaly_map, self.session.threshold)
        return chat.png_bytes(marked if view == "marked" else image)

    def transcript(self) -> HTML:
        """Picture, verdicts and conversation as HTML: what a saved notebook keeps where the widgets were."""
        session = self.session
        picture = "data:image/png;base64," + base64.b64encode(self._drawn("marked")).decode()
        footer = f"profile {session.profile}, session {session.id}"
        shown = (session.picture.name, category_label(session.category), picture, *session.verdict_line())
        return HTML(str(_HTML.transcript(*shown, session.history, detectors.table(session.verdicts), footer)))


def show(session: ChatSession, samples: Mapping[str, Sample], **options: Any) -> ChatUI:
    """Show the chat in the cell's output; options as for :class:`ChatUI`."""
    ui = ChatUI(session, samples, **options)
    display(ui.root)
    return ui

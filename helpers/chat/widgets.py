"""The chat as widgets: a thin layer over :class:`helpers.chat.session.ChatSession`, for ipywidgets 7.7 (Colab) and 8.

Only core widgets and only what both versions have. Everything runs inside the callback (Colab does not show what a
background thread changes); while it runs all controls are disabled and further clicks are ignored. An exception never
disappears: input that cannot be used gets a sentence, anything else a red box and an entry in ``session.errors``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from helpers.anomalygpt import conversations
from helpers.chat import chat_html
from helpers.chat import session as chat
from helpers.chat.detectors import Detectors, Verdict
from helpers.chat.session import BadInput, ChatSession, Picture
from helpers.colab import session as colab
from helpers.records import Sample

OWN = "my references"
"""Key of the references that the user gives."""

_ECHO_SECONDS = 0.3
"""A second click that was under way while the first one was answered arrives within milliseconds of its end."""

_GENUINE, _ANOMALOUS, _UNKNOWN = "genuine", "anomalous", "not sure"
_LABELS = {_GENUINE: "normal", _ANOMALOUS: "anomalous", _UNKNOWN: None}
_COLAB_UPLOAD = "On Colab large files get lost here. Tick “upload” in the settings cell above, or give a path."
_ARROWS = ("↖", "↑", "↗", "←", "•", "→", "↙", "↓", "↘")
_SHOWN: list[ChatUI] = []


def show(session: ChatSession, **options: Any) -> ChatUI:
    """Show the chat in the cell's output; a chat shown before is closed, so a cell may run again.

    Args:
        session: what the widgets drive.
        options: see :class:`ChatUI`.
    """
    from IPython.display import display

    while _SHOWN:
        _SHOWN.pop().close()
    ui = ChatUI(session, **options)
    _SHOWN.append(ui)
    display(ui.root)
    return ui


def read_upload(value: Any) -> list[tuple[str, bytes]]:
    """What a FileUpload holds, in either version: ``{name: {"content": bytes}}`` (7) or a tuple of records (8)."""
    if isinstance(value, Mapping):
        return [(str(name), bytes(one["content"])) for name, one in value.items()]
    return [(str(one["name"]), bytes(one["content"])) for one in value]


def upload_on_colab(wanted: bool) -> list[Picture]:
    """Ask for files with Colab's own dialog, which takes large ones; elsewhere say where the upload button is.

    Args:
        wanted: False asks for nothing (a notebook that runs from top to bottom must not wait).
    Raises:
        helpers.chat.session.BadInput: a file is no picture.
    """
    if not wanted:
        return []
    if not colab.is_colab():
        print("Not on Colab: use the tab “Upload” of the chat below.")
        return []
    from google.colab import files

    return [chat.receive_picture(name, content) for name, content in files.upload().items()]


class ChatUI:
    """The widgets of a session.

    Args:
        session: what they drive.
        samples: words -> picture of the dataset, see :func:`helpers.chat.session.sample_pictures`.
        pictures: uploaded ones, offered beside the samples.
        detectors: all other detectors, None to leave them out.
        on_feedback: called with ``image_path, image, verdict, label, region, comment, context, keep_image``.
        transcripts: folder to write transcripts to.

    Attributes:
        root: the widget to display.
        verdicts: of all detectors on the picture, once asked for.
    """

    def __init__(
        self,
        session: ChatSession,
        *,
        samples: Mapping[str, Sample] | None = None,
        pictures: Sequence[Picture] = (),
        detectors: Detectors | None = None,
        on_feedback: Callable[..., Any] | None = None,
        transcripts: Path | None = None,
    ) -> None:
        self.session = session
        self.verdicts: list[Verdict] = []
        self._offered = dict(samples or {}) | {f"uploaded: {one.name}": one for one in pictures}
        self._detectors, self._on_feedback, self._transcripts = detectors, on_feedback, transcripts
        self._last: tuple[str, float] = ("", -1.0)
        self._build_source()
        self._build_picture()
        self._build_talk()
        self._build_verdicts()
        self._build_feedback()
        self.root = self._arranged()
        self._busy = True  # what is set here is nobody's click
        self._scale_threshold()
        self._refresh()
        self._busy = False

    def close(self) -> None:
        """Take the widgets away, shown or not; their session stays."""
        for part in list(vars(self).values()):
            for widget in part if isinstance(part, list) else [part]:
                if isinstance(widget, widgets.Widget):
                    _close(widget)

    # --- parts

    def _build_source(self) -> None:
        offered = [("choose one …", ""), *((name, name) for name in self._offered)]
        self.sample = widgets.Dropdown(options=offered, layout=_growing())
        self.path = widgets.Text(placeholder="/path/to/picture.jpg", continuous_update=False, layout=_growing())
        self.open_path = widgets.Button(description="Open", icon="folder-open")
        self.uploads = widgets.VBox([self._fresh_upload(multiple=False)])
        self.own_folder = widgets.Text(
            placeholder="/folder/with/genuine/pictures", continuous_update=False, layout=_growing()
        )
        self.use_own = widgets.Button(description="Use", icon="check")
        self.own_uploads = widgets.VBox([self._fresh_upload(multiple=True)])
        self.compared_with = widgets.Dropdown(options=self._choices(), value=self.session.key, layout=_growing())
        self.sample.observe(lambda change: self._act("sample", self._choose_sample, change["new"]), "value")
        self.open_path.on_click(lambda _: self._act("open", self._choose_path))
        self.use_own.on_click(lambda _: self._act("own", self._use_folder))
        self.compared_with.observe(lambda change: self._act("compare", self._compare, change["new"]), "value")

    def _build_picture(self) -> None:
        self.image = widgets.Image(format="png", layout=_layout(width="100%", max_height="420px", object_fit="contain"))
        self.view = widgets.ToggleButtons(options=[(name.capitalize(), name) for name in chat.VIEWS], value="overlay")
        self.view.style.button_width = "92px"
        slider = {"continuous_update": False, "layout": _layout(width="auto"), "style": {"description_width": "72px"}}
        self.opacity = widgets.FloatSlider(value=0.85, min=0.0, max=1.0, step=0.05, description="opacity", **slider)
        self.threshold = widgets.FloatSlider(
            value=0.5, min=0.0, max=1.0, step=0.001, readout_format=".3f", description="threshold", **slider
        )
        self.legend = widgets.HTML(layout=_layout(width="auto"))
        for control in (self.view, self.opacity, self.threshold):
            control.observe(lambda _: self._act("view", self._draw), "value")

    def _build_talk(self) -> None:
        self.talk = widgets.HTML(layout=_layout(width="auto"))
        self.message = widgets.HTML(layout=_layout(width="auto"))
        half = {"flex": "1 1 215px", "width": "auto"}
        self.quick = [
            widgets.Button(description=question, tooltip=question, layout=_layout(**half))
            for question in chat.QUICK_QUESTIONS
        ]
        self.question = widgets.Textarea(
            placeholder="Ask about the picture …", layout=_layout(width="auto", height="62px")
        )
        self.send = widgets.Button(description="Send", icon="paper-plane", button_style="primary")
        self.again = widgets.Button(description="Start over", icon="refresh")
        self.save = widgets.Button(description="Save transcript", icon="download")
        for button in self.quick:
            button.on_click(lambda clicked: self._act(clicked.description, self._ask, clicked.description))
        self.send.on_click(lambda _: self._send())
        self.again.on_click(lambda _: self._act("again", self._start_over))
        self.save.on_click(lambda _: self._act("save", self._save))

    def _build_verdicts(self) -> None:
        self.ask_all = widgets.Button(description="Ask every detector", icon="users", layout=_layout(width="190px"))
        self.cards = widgets.HTML(layout=_layout(width="auto"))
        self.ask_all.on_click(lambda _: self._act("all", self._ask_all))

    def _build_feedback(self) -> None:
        self.verdict = widgets.ToggleButtons(
            options=[("✓ correct", "correct"), ("✗ wrong", "wrong"), ("? unsure", "unsure")], value=None
        )
        self.label = widgets.ToggleButtons(options=[_GENUINE, _ANOMALOUS, _UNKNOWN], value=_UNKNOWN)
        cells = [cell for row in conversations.CELLS for cell in row]
        self.region = [
            widgets.ToggleButton(
                description=arrow, tooltip=cell, layout=_layout(width="40px", height="30px", margin="1px")
            )
            for arrow, cell in zip(_ARROWS, cells, strict=True)
        ]
        self.comment = widgets.Text(placeholder="What do you see? (optional)", layout=_growing())
        self.keep_image = widgets.Checkbox(
            value=False,
            indent=False,
            description="Keep a copy of the picture (else only its hash)",
            layout=_layout(width="auto"),
        )
        self.give = widgets.Button(description="Save judgement", icon="check", button_style="success")
        self.verdict.style.button_width = self.label.style.button_width = "96px"
        self.label.observe(self._place_or_none, "value")
        for button in self.region:
            button.observe(self._one_region, "value")
        self.give.on_click(lambda _: self._act("give", self._give))

    def _arranged(self) -> widgets.VBox:
        line = _layout(width="auto", align_items="center")
        upload = widgets.HTML(chat_html.message(_COLAB_UPLOAD)) if colab.is_colab() else self.uploads
        hint = "At least two photographs of the genuine artwork, as a folder or as files:"
        own_upload = [] if colab.is_colab() else [self.own_uploads]
        tabs = widgets.Tab(
            [
                widgets.HBox([self.sample], layout=line),
                widgets.HBox([self.path, self.open_path], layout=line),
                upload,
                widgets.VBox(
                    [widgets.Label(hint), widgets.HBox([self.own_folder, self.use_own], layout=line), *own_upload]
                ),
            ]
        )
        for number, title in enumerate(("Samples", "Path", "Upload", "My references")):
            tabs.set_title(number, title)
        left = [
            widgets.HTML(chat_html.heading("1 · Picture")),
            tabs,
            _labelled("Compared with", self.compared_with),
            self.view,
            widgets.HBox([self.image], layout=_layout(width="auto", justify_content="center", min_height="60px")),
            self.legend,
            self.opacity,
            self.threshold,
        ]
        right = [
            widgets.HTML(chat_html.heading("2 · Conversation")),
            self.talk,
            self.message,
            widgets.HBox(self.quick, layout=_layout(flex_flow="row wrap", width="auto")),
            self.question,
            widgets.HBox([self.send, self.again, self.save], layout=_layout(flex_flow="row wrap")),
        ]
        return self._framed(left, right)

    def _framed(self, left: list[widgets.Widget], right: list[widgets.Widget]) -> widgets.VBox:
        columns = widgets.HBox(
            [
                widgets.VBox(left, layout=_layout(flex="1 1 400px", min_width="320px", padding="0 12px 0 0")),
                widgets.VBox(right, layout=_layout(flex="1 1 440px", min_width="320px")),
            ],
            layout=_layout(flex_flow="row wrap", width="auto"),
        )
        parts = [columns]
        if self._detectors is not None:
            hint = "the same picture, with the thresholds of notebooks 03 to 07"
            title = chat_html.heading("3 · Every detector", hint, ruled=True)
            parts.append(widgets.VBox([widgets.HTML(title), self.ask_all, self.cards], layout=_layout(width="auto")))
        if self._on_feedback is not None:
            parts.append(self._feedback_panel())
        frame = _layout(border="1px solid #d9d5cb", padding="14px 16px", max_width="1100px", width="auto")
        return widgets.VBox(parts, layout=frame)

    def _feedback_panel(self) -> widgets.VBox:
        grid = widgets.VBox([widgets.HBox(self.region[i : i + 3]) for i in (0, 3, 6)])
        fields = widgets.VBox(
            [
                _labelled("The answer is", self.verdict),
                _labelled("The picture is", self.label),
                _labelled("Comment", self.comment),
                widgets.HBox([self.give, self.keep_image], layout=_layout(flex_flow="row wrap", align_items="center")),
            ],
            layout=_layout(flex="0 1 600px", min_width="320px"),
        )
        where = widgets.VBox([widgets.Label("Where is it?"), grid], layout=_layout(width="170px"))
        title = chat_html.heading("4 · Your judgement", "detectors learn from it only outside the test set", ruled=True)
        row = widgets.HBox([fields, where], layout=_layout(flex_flow="row wrap", width="auto"))
        return widgets.VBox([widgets.HTML(title), row], layout=_layout(width="auto"))

    # --- what the controls do

    def _send(self) -> None:
        if not self.question.value.strip() and self._last[0] == "send" and self._is_fresh():
            return  # the second half of a double click: the first one has emptied the field
        self._act("send", self._ask, self.question.value)

    def _ask(self, question: str) -> None:
        asked = chat.clean_question(question)

        def so_far(text: str) -> None:
            self.talk.value = chat_html.bubbles(self.session.history, asking=asked, answer_so_far=text)

        if self.session.picture is not None:
            so_far("")
        self.session.ask(question, on_text=so_far)
        self.question.value = ""
        self.verdict.value = None

    def _choose_sample(self, name: str) -> None:
        if not name:
            return
        chosen = self._offered[name]
        picture = chosen
        if isinstance(chosen, Sample):
            picture = chat.open_picture(chosen.image_path, category=chosen.category)
        self._choose(picture)

    def _choose_path(self) -> None:
        self._choose(chat.open_picture(self.path.value))
        self.sample.value = ""

    def _choose_upload(self, value: Any) -> None:
        received = read_upload(value)
        self.uploads.children = [self._fresh_upload(multiple=False)]
        if received:
            self._choose(chat.receive_picture(*received[-1]))
            self.sample.value = ""

    def _choose(self, picture: Picture) -> None:
        self.session.choose(picture)
        self._renewed()

    def _use_folder(self) -> None:
        self._use(chat.pictures_in(self.own_folder.value))

    def _use_uploads(self, value: Any) -> None:
        received = read_upload(value)
        self.own_uploads.children = [self._fresh_upload(multiple=True)]
        if received:
            self._use([chat.receive_picture(*one) for one in received])

    def _use(self, pictures: Sequence[Picture]) -> None:
        self.session.add_references(OWN, pictures)
        self.compared_with.options = self._choices()
        self._renewed()

    def _compare(self, key: str) -> None:
        self.session.compare_with(key)
        self._renewed()

    def _start_over(self) -> None:
        self.session.start_over()
        self.verdict.value = None

    def _ask_all(self) -> None:
        own, picture = self.session.verdict(), self.session.picture
        category = self.session.references.category
        self.verdicts = [*self._detectors.judge(picture.image, sha256=picture.sha256, category=category), own]

    def _save(self) -> None:
        if self._transcripts is None:
            raise BadInput("No folder for transcripts was given to this chat.")
        page, text = chat_html.write_transcript(self.session, self._transcripts, self.verdicts)
        self.message.value = chat_html.message(f"Written: {page} and {text.name}", kind="done")

    def _give(self) -> None:
        if self.verdict.value is None:
            raise BadInput("Say first whether the answer is correct, wrong, or whether you are unsure.")
        context, picture = self.session.context(), self.session.picture
        chosen = [number for number, button in enumerate(self.region) if button.value]
        try:
            self._on_feedback(
                image_path=picture.path,
                image=picture.image,
                verdict=self.verdict.value,
                label=_LABELS[self.label.value],
                region=chosen[0] if chosen else None,
                comment=self.comment.value,
                context=context,
                keep_image=self.keep_image.value,
            )
        except ValueError as error:
            raise BadInput(str(error)) from error
        self._clear_judgement()
        self.message.value = chat_html.message("Thank you, your judgement is saved.", kind="done")

    def _one_region(self, change: Mapping[str, Any]) -> None:
        """At most one cell of the grid is pressed."""
        if change["new"]:
            for button in self.region:
                if button is not change["owner"]:
                    button.value = False

    def _place_or_none(self, change: Mapping[str, Any]) -> None:
        """A genuine picture has no place of an anomaly."""
        for button in self.region:
            button.disabled = change["new"] == _GENUINE
            button.value = button.value and not button.disabled

    # --- what is shown

    def _renewed(self) -> None:
        """After another picture or other references: verdicts and judgement of the old ones go."""
        self.verdicts = []
        self._clear_judgement()
        self.compared_with.value = self.session.key
        self._scale_threshold()

    def _scale_threshold(self) -> None:
        low, high = self.session.references.limits
        # One message for all three: the browser would cut the old value to the new range and send it back.
        with self.threshold.hold_sync(), self.threshold.hold_trait_notifications():
            self.threshold.min, self.threshold.max = min(low, 0.0), high + (high - low)
            self.threshold.value = self.session.references.threshold

    def _clear_judgement(self) -> None:
        self.verdict.value, self.label.value, self.comment.value = None, _UNKNOWN, ""
        for button in self.region:
            button.value = False

    def _refresh(self) -> None:
        """Show the session as it is."""
        empty = (
            "Choose a picture, then ask about it."
            if self.session.picture is None
            else "Ask something, or press a question below."
        )
        self.talk.value = chat_html.bubbles(self.session.history, empty=empty)
        self.cards.value = chat_html.cards(self.verdicts, self.session.picture.image) if self.verdicts else ""
        self._draw()

    def _draw(self) -> None:
        picture = self.session.picture
        if picture is None:
            return
        limits, threshold = self.session.references.limits, self.threshold.value
        drawn = chat.draw_view(
            picture.image, self.session.anomaly_map, limits, view=self.view.value, opacity=self.opacity.value,
            threshold=threshold,
        )  # fmt: skip
        self.image.value = chat.png_bytes(drawn)
        self.legend.value = chat_html.legend(limits, threshold, chat.describe_map(self.session.anomaly_map, threshold))

    def _choices(self) -> list[tuple[str, str]]:
        return [(one.label, key) for key, one in self.session.known.items()]

    def _fresh_upload(self, *, multiple: bool) -> widgets.FileUpload:
        """A new upload button: neither version lets an old one be emptied in the same way."""
        upload = widgets.FileUpload(accept="image/*", multiple=multiple)
        action = self._use_uploads if multiple else self._choose_upload
        upload.observe(lambda change: self._act("upload", action, change["new"]), "value")
        return upload

    # --- one action at a time

    def _act(self, name: str, action: Callable[..., None], *given: Any) -> None:
        """Do what a control asks for; nothing else happens meanwhile, and no exception disappears."""
        if self._busy or (name == self._last[0] and name not in _REPEATABLE and self._is_fresh()):
            return
        self._busy = True
        self.message.value = ""
        self._enable(False)
        try:
            self._guarded(action, *given)
            self._guarded(self._refresh)
        finally:  # an interrupted cell must not leave the chat dead
            self._enable(True)
            self._last = (name, time.monotonic())
            self._busy = False

    def _guarded(self, action: Callable[..., None], *given: Any) -> None:
        try:
            action(*given)
        except BadInput as error:
            self.session.refused.append(str(error))
            self.message.value = chat_html.message(str(error))
        except Exception as error:
            details = self.session.record_error(error)
            words = f"Something went wrong: {self.session.errors[-1]}"
            self.message.value = chat_html.message(words, kind="error", details=details)

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._last[1] < _ECHO_SECONDS

    def _enable(self, enabled: bool) -> None:
        buttons = (*self.quick, self.send, self.again, self.save, self.open_path, self.use_own, self.ask_all, self.give)
        for control in (*buttons, self.sample, self.compared_with):
            control.disabled = not enabled


_REPEATABLE = ("send", "view", "sample", "compare", "upload")
"""Actions that only a changed value starts, so that two in a row are two."""


def _layout(**values: str) -> widgets.Layout:
    return widgets.Layout(**values)


def _growing() -> widgets.Layout:
    return _layout(flex="1 1 auto", width="auto")


def _labelled(text: str, control: widgets.Widget) -> widgets.HBox:
    label = widgets.Label(text, layout=_layout(width="104px"))
    return widgets.HBox([label, control], layout=_layout(width="auto", align_items="center"))


def _close(widget: widgets.Widget) -> None:
    """Close a widget, what lies in it, and their layouts and styles."""
    for child in getattr(widget, "children", ()):
        _close(child)
    for part in (getattr(widget, "layout", None), getattr(widget, "style", None)):
        if part is not None:
            part.close()
    widget.close()

"""The chat as HTML and Markdown: bubbles, verdict cards, messages, and a transcript to keep.

Every text of a user or a model is escaped here, file names too. Styles stand inside the elements and nothing needs a
script, so the same strings serve the widgets and the self-contained file.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import cv2
import matplotlib as mpl
import numpy as np

from helpers import files as storage
from helpers import results
from helpers.chat.detectors import Verdict
from helpers.chat.session import ChatSession, Turn, describe_map, draw_view
from helpers.data import images
from helpers.judge import figures

_FONT = "font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,'DejaVu Sans',sans-serif"
_EDGE = "#d9d5cb"
_MESSAGES = {"note": ("#c98a2b", "#fdf6e9"), "error": ("#c0271a", "#fdeceb"), "done": ("#2f7d4f", "#eef7f1")}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~])")


def bubbles(
    history: Sequence[Turn], *, asking: str = "", answer_so_far: str = "", height: str = "340px", empty: str = ""
) -> str:
    """The conversation, newest at the bottom and in sight.

    Args:
        history: finished turns.
        asking: a question that is being answered.
        answer_so_far: its answer until now.
        height: of the box, as CSS.
        empty: shown when nothing was asked.
    """
    parts = [_bubble("You", turn.question, _clock(turn), right=True) + _answer(turn) for turn in history]
    if asking:
        parts.append(_bubble("You", asking, "", right=True))
        parts.append(_bubble("AnomalyGPT", f"{answer_so_far} …" if answer_so_far else "thinking …", "", right=False))
    inner = "".join(parts) or f'<div style="color:{figures.MUTED};padding:8px">{escape(empty)}</div>'
    # column-reverse keeps the newest turn in sight without a script
    box = "overflow-y:auto;display:flex;flex-direction:column-reverse;padding:6px 10px;box-sizing:border-box"
    frame = f"background:#faf9f6;border:1px solid {_EDGE};border-radius:8px"
    return f'<div style="{_FONT};height:{height};{box};{frame}"><div>{inner}</div></div>'


def message(text: str, *, kind: str = "note", details: str = "") -> str:
    """A box: ``"note"`` (something was refused), ``"error"`` or ``"done"``; ``details`` are folded away."""
    edge, ground = _MESSAGES[kind]
    folded = ""
    if details:
        folded = (
            '<details style="margin-top:4px"><summary style="cursor:pointer">details</summary>'
            '<pre style="overflow:auto;max-height:180px;font-size:11px;line-height:1.35;margin:4px 0 0">'
            f"{escape(details)}</pre></details>"
        )
    return (
        f'<div style="{_FONT};font-size:13px;line-height:1.45;color:{figures.INK};background:{ground};padding:8px 12px;'
        f'border-left:4px solid {edge};border-radius:4px;overflow-wrap:anywhere">{escape(text)}{folded}</div>'
    )


def heading(text: str, hint: str = "", *, ruled: bool = False) -> str:
    """A title inside the chat, with a smaller hint beside it and, on demand, a line above it."""
    rule = f"border-top:1px solid {_EDGE};padding-top:10px;margin-top:10px;" if ruled else ""
    return (
        f'<div style="{_FONT};{rule}font-size:15px;font-weight:600;line-height:1.5">{escape(text)}'
        f'<span style="font-weight:400;font-size:12.5px;opacity:.75;margin-left:10px">{escape(hint)}</span></div>'
    )


def legend(limits: tuple[float, float], threshold: float, words: str) -> str:
    """The colour scale with the threshold on it, and what the map says in words."""
    low, high = limits
    stops = (mpl.colormaps[figures.MAP_COLORS](level)[:3] for level in np.linspace(0, 1, 9))
    colors = ",".join(f"rgb({int(255 * r)},{int(255 * g)},{int(255 * b)})" for r, g, b in stops)
    place = 100 * min(1.0, max(0.0, (threshold - low) / (high - low)))
    return (
        f'<div style="{_FONT};font-size:12px;line-height:1.4">'
        f'<div style="position:relative;height:11px;border-radius:3px;background:linear-gradient(90deg,{colors})">'
        f'<div style="position:absolute;left:{place:.1f}%;top:-3px;width:2px;height:17px;background:#00b8cc;'
        f'box-shadow:0 0 0 1px white"></div></div>'
        f'<div style="display:flex;justify-content:space-between;opacity:.75"><span>{low:.3g} normal</span>'
        f"<span>{high:.3g} anomalous</span></div><div>{escape(words)}</div></div>"
    )


def cards(verdicts: Sequence[Verdict], image: np.ndarray) -> str:
    """All verdicts side by side, each with its map over the picture where it makes one."""
    grid = "display:grid;grid-template-columns:repeat(auto-fill,minmax(136px,1fr));gap:8px"
    return f'<div style="{_FONT};{grid}">{"".join(_card(one, image) for one in verdicts)}</div>'


def transcript(session: ChatSession, verdicts: Sequence[Verdict] = ()) -> str:
    """The conversation as one self-contained page, with picture, map and verdicts."""
    picture, name = "", ""
    if session.picture is not None:
        name = session.picture.name
        limits, threshold = session.references.limits, session.references.threshold
        drawn = draw_view(session.picture.image, session.anomaly_map, limits, threshold=threshold, max_side=420)
        shown = "".join(
            f'<img alt="{escape(words)}" src="{_jpeg_uri(array)}" style="max-width:100%;height:auto;border-radius:6px">'
            for words, array in (("the picture", images.resize(session.picture.image, 420)), ("its map", drawn))
        )
        words = f"Compared with: {session.references.label}. {describe_map(session.anomaly_map, threshold)}"
        picture = f'<div style="display:flex;flex-wrap:wrap;gap:12px">{shown}</div><p>{escape(words)}</p>'
    found = f"<h2>All detectors</h2>{cards(verdicts, session.picture.image)}" if verdicts else ""
    talk = "".join(_bubble("You", t.question, t.time, right=True) + _answer(t) for t in session.history)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>AnomalyGPT transcript</title></head>'
        f'<body style="{_FONT};max-width:900px;margin:32px auto;padding:0 20px;color:{figures.INK};line-height:1.5">'
        f"<h1>AnomalyGPT: {escape(name) or 'no picture'}</h1>{picture}<h2>Conversation</h2>"
        f"{talk or '<p>Nothing was asked.</p>'}{found}<p>{escape(_record(session))}</p></body></html>\n"
    )


def markdown(session: ChatSession, verdicts: Sequence[Verdict] = ()) -> str:
    """The conversation as Markdown; nothing a user or model wrote is taken for markup."""
    lines = ["# AnomalyGPT transcript", ""]
    if session.picture is not None:
        words = describe_map(session.anomaly_map, session.references.threshold)
        lines += [f"Picture: {_plain(session.picture.name)}", "", _plain(f"{session.references.label}. {words}"), ""]
    for turn in session.history:
        lines += [f"**You** ({turn.time}): {_plain(turn.question)}", ""]
        lines += [f"**AnomalyGPT** ({turn.seconds:.1f} s): {_plain(turn.answer)}", ""]
    if verdicts:
        lines += ["| detector | verdict | score | threshold | p-value |", "|---|---|---|---|---|"]
        for one in verdicts:
            numbers = " | ".join(_number(value) for value in (one.anomaly_score, one.threshold, one.p_value))
            label = _plain(results.method_label(one.method))
            lines.append(f"| {label} | {_plain(_words(one))} | {numbers} |")
        lines.append("")
    return "\n".join([*lines, _plain(_record(session)), ""])


def write_transcript(session: ChatSession, folder: Path, verdicts: Sequence[Verdict] = ()) -> tuple[Path, Path]:
    """Write ``transcript_<session>.html`` and ``.md`` into a folder; returns both paths."""
    page, text = (Path(folder) / f"transcript_{session.id}.{suffix}" for suffix in ("html", "md"))
    storage.write_text(page, transcript(session, verdicts))
    storage.write_text(text, markdown(session, verdicts))
    return page, text


def _clock(turn: Turn) -> str:
    return f"{turn.time[11:16]} UTC"


def _answer(turn: Turn) -> str:
    note = f"{turn.seconds:.1f} s"
    if turn.n_reused:
        note += f", {turn.n_reused} tokens reused"
    return _bubble("AnomalyGPT", turn.answer or "(no words)", note, right=False)


def _bubble(who: str, text: str, note: str, *, right: bool) -> str:
    ground, edge, side = ("#e8f0f5", "#c9dae5", "flex-end") if right else ("#ffffff", _EDGE, "flex-start")
    return (
        f'<div style="display:flex;flex-direction:column;align-items:{side};margin:7px 0">'
        f'<div style="font-size:11px;color:{figures.MUTED};line-height:1.4">{escape(who)} · {escape(note)}</div>'
        f'<div dir="auto" style="max-width:86%;background:{ground};border:1px solid {edge};border-radius:10px;'
        f"padding:6px 11px;font-size:14px;line-height:1.45;color:{figures.INK};overflow-wrap:anywhere;"
        f'white-space:pre-line;unicode-bidi:isolate">{escape(text)}</div></div>'
    )


def _card(one: Verdict, image: np.ndarray) -> str:
    color = {True: figures.ANOMALOUS_COLOR, False: figures.NORMAL_COLOR, None: "#8b939a"}[one.is_predicted_anomalous]
    if one.anomaly_map is None:
        shown = '<span style="padding:0 8px">' + ("no map" if one.note == "" else "–") + "</span>"
    else:
        small = draw_view(image, one.anomaly_map, one.limits, max_side=220)
        shown = f'<img alt="its map" src="{_jpeg_uri(small)}" style="width:100%;height:100%;object-fit:contain">'
    numbers = ""
    if not math.isnan(one.anomaly_score):
        pairs = (("score", one.anomaly_score), ("threshold", one.threshold), ("p-value", one.p_value))
        numbers = "".join(
            f'<div style="display:flex;justify-content:space-between"><span style="color:{figures.MUTED}">{name}</span>'
            f"<span>{_number(value)}</span></div>"
            for name, value in pairs
        )
    note = f'<div style="margin-top:4px;color:{figures.MUTED}">{escape(one.note)}</div>' if one.note else ""
    return (
        f'<div style="box-sizing:border-box;border:1px solid {_EDGE};border-top:4px solid '
        f"{figures.method_color(one.method)};border-radius:6px;padding:8px 10px;background:#ffffff;color:{figures.INK};"
        f'font-size:12px;line-height:1.45">'
        f'<div style="font-weight:600;font-size:13px;min-height:38px">{escape(results.method_label(one.method))}</div>'
        f'<div style="height:110px;display:flex;align-items:center;justify-content:center;background:#f4f2ed;'
        f'color:{figures.MUTED};border-radius:4px;overflow:hidden;margin:2px 0 6px">{shown}</div>'
        f'<div style="display:inline-block;background:{color};color:white;border-radius:9px;padding:1px 9px;'
        f'font-weight:600;margin-bottom:4px">{escape(_words(one))}</div>{numbers}{note}</div>'
    )


def _words(one: Verdict) -> str:
    return {True: "anomalous", False: "normal", None: "no verdict"}[one.is_predicted_anomalous]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _record(session: ChatSession) -> str:
    checkpoint = session.model.checkpoint_id[:12] or "–"
    return (
        f"Session {session.id}, profile {session.profile or '–'}, checkpoint {checkpoint}. "
        "An anomaly score is no proof of a forgery."
    )


def _plain(text: str) -> str:
    """One line of Markdown that shows exactly this text."""
    return _MARKDOWN.sub(r"\\\1", escape(" ".join(text.split()), quote=False))


def _jpeg_uri(image: np.ndarray) -> str:
    _, encoded = cv2.imencode(".jpg", np.ascontiguousarray(image[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 86])
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode('ascii')}"

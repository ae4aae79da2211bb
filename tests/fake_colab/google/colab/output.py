"""Calls that change how Colab shows an output; they show nothing here."""

from google.colab._state import state


def no_vertical_scroll() -> None:
    state.calls.append("output.no_vertical_scroll")


def clear(wait: bool = False, output_tags: tuple[str, ...] = ()) -> None:
    state.calls.append("output.clear")

"""``runtime.unassign`` ends the session."""

from google.colab._state import state


def unassign() -> None:
    state.calls.append("runtime.unassign")

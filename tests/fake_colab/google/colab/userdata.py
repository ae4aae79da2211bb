"""``userdata.get``: secrets, and the three ways in which they are not to be had."""

from __future__ import annotations

from google.colab._state import state


class SecretNotFoundError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(f"Secret {key} does not exist.")


class NotebookAccessError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(f"Notebook does not have access to secret {key}")


class TimeoutException(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(f"Requesting secret {key} timed out. Secrets can only be fetched from the Colab UI.")


def get(key: str) -> str:
    state.calls.append(f"userdata.get({key})")
    if key not in state.secrets:
        raise SecretNotFoundError(key)
    value = state.secrets[key]
    if isinstance(value, Exception):
        raise value
    return value

"""What the stand-in does next; a test sets it, and :meth:`State.reset` forgets it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class State:
    """
    Attributes:
        cloud: folder that plays My Drive; it outlives the virtual machine.
        hosted: False plays Colab Enterprise or another editor.
        mount_errors: exceptions of the next calls of ``drive.mount``, first one first.
        secrets: name -> value, or an exception to raise.
        uploads: name -> content, for the next ``files.upload``.
        calls: what was asked of the package, in order.
    """

    cloud: Path | None = None
    hosted: bool = True
    mount_errors: list[Exception] = field(default_factory=list)
    secrets: dict[str, Any] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def reset(self) -> None:
        self.__init__()


state = State()

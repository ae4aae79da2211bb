"""GGUF files, the format of llama.cpp, through the library ``gguf``: settings, and tensors as float16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and tensors of a GGUF file.

    Args:
        path: the file.
    Returns:
        settings by key (numbers, texts, lists), and float16 arrays by name in row-major shape ``(out, in)``.
    Raises:
        ValueError: not a GGUF file, or one that ends too early.
        ModuleNotFoundError: the library is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The small language model is a GGUF file: pip install gguf") from error
    try:
        reader = gguf.GGUFReader(path)
        settings = {name: field.contents() for name, field in reader.fields.items()}
        arrays = {
            tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
            for tensor in reader.tensors
        }
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}). Install its package again.") from error
    return settings, arrays

"""Published weight files -> checked folders in safetensors."""

from helpers.weights.folders import read_ready, require
from helpers.weights.llama import convert_llama, merge_delta
from helpers.weights.tensors import WeightFileError

__all__ = ["WeightFileError", "convert_llama", "merge_delta", "read_ready", "require"]

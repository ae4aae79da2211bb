"""Data: any folder of pictures -> a frozen dataset (``manifest.csv``) that every notebook reads."""

from helpers.data.layouts import DatasetError
from helpers.data.manifest import (
    Dataset,
    build_manifest,
    dataset_hash,
    load_manifest,
    mask_of,
    open_dataset,
    read_folder,
    write_manifest,
)

__all__ = [
    "Dataset",
    "DatasetError",
    "build_manifest",
    "dataset_hash",
    "load_manifest",
    "mask_of",
    "open_dataset",
    "read_folder",
    "write_manifest",
]

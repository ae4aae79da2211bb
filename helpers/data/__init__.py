"""Data: any folder of pictures -> a frozen dataset (``manifest.csv``) that every notebook reads."""

from helpers.data.manifest import (
    MANIFEST_CSV,
    MANIFEST_JSON,
    Dataset,
    counts,
    dataset_hash,
    load_manifest,
    mask_of,
    open_dataset,
    write_manifest,
)
from helpers.data.names import DatasetError
from helpers.data.reading import FolderReading, build_manifest, near_duplicates, perceptual_hash, read_folder

__all__ = [
    "MANIFEST_CSV",
    "MANIFEST_JSON",
    "Dataset",
    "DatasetError",
    "FolderReading",
    "build_manifest",
    "counts",
    "dataset_hash",
    "load_manifest",
    "mask_of",
    "near_duplicates",
    "open_dataset",
    "perceptual_hash",
    "read_folder",
    "write_manifest",
]

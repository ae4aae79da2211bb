"""Data: any folder of pictures -> a frozen dataset (``manifest.csv``) that every notebook reads."""

from helpers.data.layouts import FolderReading
from helpers.data.manifest import Dataset, dataset_hash, load_manifest, mask_of, open_dataset, write_manifest
from helpers.data.names import DatasetError
from helpers.data.reading import build_manifest, read_folder

__all__ = ["Dataset", "DatasetError", "FolderReading", "build_manifest", "dataset_hash", "load_manifest"]
__all__ += ["mask_of", "open_dataset", "read_folder", "write_manifest"]

"""Speed of reading folders and of making the embedded paintings. Run: python tests/benchmarks/bench_data.py [FOLDER]"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers import data
from helpers.data import images, sources


def main(folder: str | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter(), time.process_time()
        samples = sources.embedded_artworks(Path(name) / "art", max_side=288, seed=2024)
        wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        print(f"embedded_artworks: {len(samples)} pictures of 2 paintings in {wall:.1f} s ({cpu:.1f} s of CPU)")
        source = Path(folder or f"{name}/art")
        start = time.perf_counter(), time.process_time()
        reading = data.read_folder(source / "manifest.csv" if folder is None else source)
        wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
        n = len(reading.samples)
        print(f"read_folder {source.name}: {n} pictures, {n / wall:.0f} a second, {n / cpu:.0f} per second of CPU")
        data.write_manifest(f"{name}/frozen", reading.samples)
        start = time.perf_counter()
        data.open_dataset(f"{name}/frozen", verify_files=True)
        print(f"open_dataset with all files hashed: {time.perf_counter() - start:.3f} s")
        picture = images.load_image(reading.samples[0].image_path)
        start = time.process_time()
        for _ in range(50):
            images.save_png(f"{name}/picture.png", picture)
        print(f"save_png {picture.shape}: {50 / (time.process_time() - start):.0f} per second of CPU")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)

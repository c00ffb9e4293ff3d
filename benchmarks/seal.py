"""What it costs to seal a checkpoint and to read it again: `python -m benchmarks.seal --gb 8 --files 4`.

Writes so many files into a temporary folder (of TMPDIR), then times the flush to disk alone, the whole seal (flush and
sha256, files in the cache as after a save) and the check that a resume makes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from ernie_align.checkpoints import flush_to_disk, integrity_error, manifest_size, write_manifest


def main() -> None:
    """Print seconds and GB/s."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gb", type=float, default=8)
    options.add_argument("--files", type=int, default=4)
    asked = options.parse_args()
    block = os.urandom(2**24)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.monotonic()
        for number in range(asked.files):
            with (folder / f"model-{number}.safetensors").open("wb") as file:
                for _ in range(int(asked.gb * 1e9 / asked.files / len(block))):
                    file.write(block)
        print(f"written in {time.monotonic() - began:.1f} s, on {os.cpu_count()} cores")
        steps = {
            "flush": lambda: [flush_to_disk(path) for path in folder.iterdir()],
            "seal, once flushed": lambda: write_manifest(folder),
            "check by size": lambda: integrity_error(folder),
            "check by hash": lambda: integrity_error(folder, hashes=True),
        }
        for step, act in steps.items():
            began = time.monotonic()
            told = act()
            seconds = time.monotonic() - began
            if step.startswith("check") and told is not None:
                raise AssertionError(told)
            size = manifest_size(folder) / 1e9 if step != "flush" else asked.gb
            print(f"{step}: {seconds:.3f} s, {size / seconds:.2f} GB/s")


if __name__ == "__main__":
    main()

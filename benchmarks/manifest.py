"""Measure writing and verifying a checkpoint manifest: `python -m benchmarks.manifest --gb 8 --files 4`.

Writes the files into a temporary folder (in TMPDIR), then times the flush to disk, writing the manifest (flush and
sha256, with the files cached as after a save) and the verification on resume.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from ernie_align.checkpoints import flush_to_disk, integrity_error, manifest_size, write_manifest


def main() -> None:
    """Print seconds and GB/s of each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=8)
    parser.add_argument("--files", type=int, default=4)
    options = parser.parse_args()
    block = os.urandom(2**24)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.monotonic()
        for number in range(options.files):
            with (folder / f"model-{number}.safetensors").open("wb") as file:
                for _ in range(int(options.gb * 1e9 / options.files / len(block))):
                    file.write(block)
        print(f"written in {time.monotonic() - began:.1f} s, on {os.cpu_count()} cores")
        steps = {
            "flush": lambda: [flush_to_disk(path) for path in folder.iterdir()],
            "manifest, after the flush": lambda: write_manifest(folder),
            "check by size": lambda: integrity_error(folder),
            "check by hash": lambda: integrity_error(folder, hashes=True),
        }
        for step, act in steps.items():
            began = time.monotonic()
            error = act()
            seconds = time.monotonic() - began
            if step.startswith("check") and error is not None:
                raise AssertionError(error)
            size = manifest_size(folder) / 1e9 if step != "flush" else options.gb
            print(f"{step}: {seconds:.3f} s, {size / seconds:.2f} GB/s")


if __name__ == "__main__":
    main()

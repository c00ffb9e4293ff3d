"""What it costs that every process touches every pool, where each of them has images anyway.

    python -m benchmarks.touch          # or: mini, whose steps are longer by far

One process and the `tiny` model, LoRA on attention and both pools: the worst case, for hooks cost by the layer, and its
layers do little. CPU seconds of steps with the hooks and without them by turns, so that what else the machine does
matters little. Beside it, what a batch of text costs that touches vision parts.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ernie_align.models.adapters import attach
from ernie_align.models.load import load_model
from ernie_align.models.touch import touch_every_pool, touch_vision, touch_vision_pool
from ernie_align.recipe import AdapterBlock
from ernie_align.tiny import make_checkpoint

ROUNDS = 40
TOKENS = 512
SIDE = 32  # patches: 16 x 16 = 256 tokens


def batch_of(model: Any, *, image: bool) -> dict[str, torch.Tensor]:
    """One row of 512 tokens, half of them an image's."""
    config = model.config
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 500, (1, TOKENS), generator=draw)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if image:
        count = SIDE * SIDE // 4
        ids[0, 8] = config.image_start_token_id
        ids[0, 9 : 9 + count] = config.image_token_id
        ids[0, 9 + count] = config.image_end_token_id
        patch = model.model.vision_tower.patch_embed
        batch["pixel_values"] = torch.randn(SIDE * SIDE, patch.in_channels * patch.patch_size**2, generator=draw)
        batch["image_grid_thw"] = torch.tensor([[1, SIDE, SIDE]])
    return batch


def hooks(backbone: Any, on: bool) -> None:
    """Install the hooks, or take them out again."""
    if on:
        touch_every_pool(backbone)
        return
    for module in backbone.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(table.items()):
                if hook in (touch_vision, touch_vision_pool):
                    del table[number]
                    module._forward_pre_hooks_with_kwargs.pop(number, None)


def seconds(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """CPU seconds of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    model(**batch, use_cache=False).loss.backward()
    return time.process_time() - start


def main() -> None:
    """Print both ratios."""
    with tempfile.TemporaryDirectory() as folder:
        preset = sys.argv[1] if len(sys.argv) > 1 else "tiny"
        bundle = load_model(make_checkpoint("vl_moe", Path(folder) / preset, preset=preset), dtype="float32")
    base = bundle.model
    attach(bundle, AdapterBlock(scopes=["attention", "text_experts", "vision_experts"], rank=8))
    bundle.model.train()
    for name, image in (("with an image", True), ("text alone", False)):
        batch = batch_of(base, image=image)
        times: dict[bool, list[float]] = {True: [], False: []}
        for round_ in range(ROUNDS + 1):
            for on in (True, False) if round_ % 2 else (False, True):
                hooks(base.model, on)
                times[on].append(seconds(bundle.model, batch))
        ratios = [one / other for one, other in zip(times[True][1:], times[False][1:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        best = min(times[True][1:]) / min(times[False][1:])
        print(
            f"{name}: {statistics.median(times[False]):.3f} s without; with the hooks x {middle:.4f} "
            f"(quartiles {low:.4f} {high:.4f}; fastest against fastest x {best:.4f})"
        )


if __name__ == "__main__":
    main()

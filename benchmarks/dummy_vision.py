"""Measure the overhead of the dummy vision forward in batches that contain images.

    python -m benchmarks.dummy_vision          # or: mini, whose steps take far longer

Uses one process and the `tiny` model with LoRA on attention and both pools: the worst case, because hooks cost time per
layer and these layers do little. There are two measurements. The first alternates steps with and without the hooks in
CPU seconds; on a busy machine the noise is larger than the overhead. The second times the hooks themselves with the
clock of their thread, adds PyTorch's cost of calling them and the one all-reduce per step, and divides by the fastest
step. It is an upper bound, because it includes the clock and leaves the optimizer out of the step. A text-only batch
with the dummy vision forward is measured as well.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ernie_align.models.adapters import attach_adapter
from ernie_align.models.distributed.dummy_vision import (
    clear_unused_vision_gradients,
    dummy_vision_forward,
    dummy_vision_pool_forward,
    install_dummy_vision,
)
from ernie_align.models.load import load_model
from ernie_align.recipe import AdapterBlock
from ernie_align.tiny import make_checkpoint

ROUNDS = 40
TOKENS = 512
SIDE = 32  # patches per side: 16 x 16 = 256 tokens
OURS = (dummy_vision_forward, dummy_vision_pool_forward)


def make_batch(model: Any, *, image: bool) -> dict[str, torch.Tensor]:
    """Return one row of 512 tokens, half of them of an image."""
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
    """Install or remove the hooks."""
    if on:
        install_dummy_vision(backbone)
        return
    for module in backbone.modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for number, hook in list(table.items()):
                if hook in OURS:
                    del table[number]
                    module._forward_pre_hooks_with_kwargs.pop(number, None)


def seconds(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Measure the CPU seconds of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    model(**batch, use_cache=False).loss.backward()
    return time.process_time() - start


def time_hooks(model: Any, backbone: Any, batch: dict[str, torch.Tensor]) -> tuple[list[float], list[float]]:
    """Measure the thread seconds spent in the hooks and the CPU seconds, per step."""
    hooks(backbone, True)
    spent = 0.0

    def timed(hook: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal spent
            start = time.thread_time()
            result = hook(*args)
            spent += time.thread_time() - start
            return result

        return call

    tables = [table for module in backbone.modules() for table in (module._forward_pre_hooks, module._forward_hooks)]
    ours = [(table, number) for table in tables for number, hook in table.items() if hook in OURS]
    kept = [table[number] for table, number in ours]
    for table, number in ours:
        table[number] = timed(table[number])
    of_hooks, of_steps = [], []
    for _ in range(ROUNDS + 1):
        spent = 0.0
        of_steps.append(seconds(model, batch))
        of_hooks.append(spent)
    for (table, number), hook in zip(ours, kept, strict=True):
        table[number] = hook
    return of_hooks[1:], of_steps[1:]


def time_call(module: torch.nn.Module, times: int = 2000) -> float:
    """Measure the CPU seconds of one call of an empty module (minimum of ten)."""
    nothing, found = torch.zeros(1), []
    for _ in range(10):
        start = time.process_time()
        for _ in range(times):
            module(nothing)
        found.append((time.process_time() - start) / times)
    return min(found)


def time_hook_calls(backbone: Any) -> float:
    """Estimate the CPU seconds per step that PyTorch spends on calling the hooks."""
    plain, hooked = torch.nn.Identity(), torch.nn.Identity()
    hooked.register_forward_hook(lambda module, args, output: None)
    count = sum(hook in OURS for module in backbone.modules() for hook in module._forward_hooks.values())
    return (count + 1) * max(time_call(hooked) - time_call(plain), 0.0)


def time_agreement(backbone: Any) -> float:
    """Measure the CPU seconds of the all-reduce over one process (95th percentile)."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    found = []
    for _ in range(ROUNDS):
        backbone.saw_images = True
        start = time.process_time()
        clear_unused_vision_gradients(backbone)
        found.append(time.process_time() - start)
    torch.distributed.destroy_process_group()
    return statistics.quantiles(found, n=20)[-1]


def upper_bound(model: Any, backbone: Any, batch: dict[str, torch.Tensor]) -> str:
    """Return the upper bound of the overhead as a line of text."""
    of_hooks, of_steps = time_hooks(model, backbone, batch)
    hooked, calls, agreement = (
        statistics.quantiles(of_hooks, n=20)[-1],
        time_hook_calls(backbone),
        time_agreement(backbone),
    )
    parts = f"{hooked * 1e6:.0f} µs in the hooks, {calls * 1e6:.0f} to call them, {agreement * 1e6:.0f} in all-reduce"
    share = (hooked + calls + agreement) / min(of_steps)
    return f"upper bound: {parts}, of a step of {min(of_steps) * 1e3:.0f} ms: {share:.2%}"


def main() -> None:
    """Print the upper bound and both ratios."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        preset = sys.argv[1] if len(sys.argv) > 1 else "tiny"
        bundle = load_model(make_checkpoint("vl_moe", Path(folder) / preset, preset=preset), dtype="float32")
    base = bundle.model
    attach_adapter(bundle, AdapterBlock(scopes=["attention", "text_experts", "vision_experts"], rank=8))
    bundle.model.train()
    print("with an image,", upper_bound(bundle.model, base.model, make_batch(base, image=True)))
    for name, image in (("with an image", True), ("text only", False)):
        batch = make_batch(base, image=image)
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

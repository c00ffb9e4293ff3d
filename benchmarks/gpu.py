"""Measure VL-28B-A3B at full size on one large GPU: random bfloat16 weights, LoRA r 8 on attention and both pools.

    python -m benchmarks.gpu --arm ours|stock --task sft|dpo [--checkpointing] [--images]

Each command ends within --minutes; shapes that do not fit into the time or the memory are listed as not measured. No
checkpoint, tokenizer or data is needed. Both arms have the same model, adapter and TRL's fused head; ours adds our LoRA
wrapper, token dispatch, head and image feature cache. The token types are derived at the backbone in both arms, since
otherwise the pools of the stock stack would get the wrong tokens.
The share of the matmul peak counts products with weights (frozen weights twice, forward and backward; once more where
layers are recomputed), not attention scores. `--preset tiny` runs this file without a GPU.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.measure import Stopwatch, keep, machine, matmul_rate, median

# rows x tokens; for pairs, rows are sequences
SHAPES = {"full": ((2, 512), (8, 2048), (1, 16384)), "tiny": ((2, 64), (4, 128))}
GRID = 28  # patches per side of an image: 196 placeholders
SCOPES = ("attention", "text_experts", "vision_experts")


def make_model(preset: str, arm: str, device: str) -> tuple[Any, Any]:
    """Create the PeftModel on the device; return it with its architecture."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration
    from trl.trainer.utils import add_fused_lm_head

    from ernie_align.models.adapters import lora_config
    from ernie_align.models.architecture import Architecture
    from ernie_align.models.routing import install_routing
    from ernie_align.models.token_dispatch import install_token_dispatch
    from ernie_align.models.trainable_parts import adapter_targets
    from ernie_align.recipe import AdapterBlock

    sizes: dict[str, Any] = {}
    if preset == "tiny":
        text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
        text |= {"num_key_value_heads": 2, "moe_intermediate_size": [96, 64], "moe_num_experts": 8, "moe_k": 2}
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [6, 6, 4]}
        text["vocab_size"] = 512
        vision = {"depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128}
        kinds = ("image", "image_start", "image_end", "video", "video_start", "video_end")
        tokens = {f"{kind}_token_id": 500 + number for number, kind in enumerate(kinds)}
        sizes = {"text_config": text, "vision_config": vision, **tokens}
    config = Ernie4_5_VLMoeConfig(**sizes)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Ernie4_5_VLMoeForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    architecture = Architecture.from_config(config.to_dict())
    install_routing(model.model)
    model.requires_grad_(False)
    add_fused_lm_head(model)
    block = AdapterBlock(scopes=list(SCOPES), rank=8, alpha=16)
    adapter = lora_config(adapter_targets(architecture, block), block, architecture)
    if arm == "ours":
        install_token_dispatch(model.model.language_model)
    else:
        adapter = LoraConfig(**adapter.to_dict())  # a plain config: without our wrapper
    return get_peft_model(model, adapter), architecture


def make_batch(config: Any, rows: int, tokens: int, *, images: bool, device: str) -> dict[str, Any]:
    """Return random text, with an image in each row if `images`. The second half of each row is labeled."""
    import torch

    ids = torch.randint(10, min(config.image_token_id, config.image_start_token_id), (rows, tokens))
    batch: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
    if images:
        side = GRID if tokens > 4 * (GRID // 2) ** 2 else 8
        merged = (side // config.vision_config.spatial_merge_size) ** 2
        ids[:, 1] = config.image_start_token_id
        ids[:, 2 : 2 + merged] = config.image_token_id
        ids[:, 2 + merged] = config.image_end_token_id
        patch = config.vision_config.in_channels * config.vision_config.patch_size**2
        batch["pixel_values"] = torch.randn(rows * side**2, patch)
        batch["image_grid_thw"] = torch.tensor([[1, side, side]] * rows)
    labels = ids.clone()
    labels[:, : tokens // 2] = -100
    return {key: value.to(device) for key, value in {"input_ids": ids, "labels": labels, **batch}.items()}


def compute_loss(model: Any, batch: dict[str, Any], task: str, arm: str) -> Any:
    """Cross-entropy for SFT; for DPO, the rows are chosen then rejected, and the reference is the base."""
    from contextlib import nullcontext

    import torch

    from ernie_align.losses import dpo_sigmoid
    from ernie_align.models.image_cache import ImageFeatureCache, find_backbone
    from ernie_align.stages.fused_head import fused_head_forward

    ours = arm == "ours"
    scored = fused_head_forward(model, find_backbone(model)) if ours else model
    images = ImageFeatureCache(frozen=True)

    def logps() -> Any:
        with images.use(model) if ours else nullcontext():
            return scored(**batch, fused_lm_head=True, use_cache=False).log_probs

    if task == "sft":
        return -logps().sum() / (batch["labels"][:, 1:] != -100).sum()
    with torch.no_grad(), model.disable_adapter():
        reference = logps().sum(-1)
    chosen, rejected = (logps().sum(-1) - reference).chunk(2)
    return dpo_sigmoid(chosen, rejected, beta=0.1).mean()


def flops_per_token(architecture: Any, config: Any, task: str, checkpointing: bool) -> float:
    """Count the FLOPs of products with weights per text token. The head processes every second token."""
    share = config.text_config.moe_k / config.text_config.moe_num_experts
    met = {"attention": 1, "dense_mlp": 1, "shared_experts": 1, "text_experts": share, "text_router": 1}
    active = sum(part * sum(tensor.size for tensor in architecture.by_part.get(name, [])) for name, part in met.items())
    active += config.text_config.vocab_size * config.text_config.hidden_size / 2
    passes = 2 + checkpointing + (task == "dpo")
    return 2 * passes * active


def main(arguments: list[str] | None = None) -> None:
    """Measure every shape that fits into time and memory, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="full", choices=sorted(SHAPES))
    parser.add_argument("--arm", default="ours", choices=["ours", "stock"])
    parser.add_argument("--task", default="sft", choices=["sft", "dpo"])
    parser.add_argument("--images", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=7.0)
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model, architecture = make_model(options.preset, options.arm, device)
    model.train()
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = model.get_base_model().config
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-5)
    peak_rate = matmul_rate("bfloat16", size=8192 if device == "cuda" else 256)
    flops = flops_per_token(architecture, config, options.task, options.checkpointing)
    results = []
    for rows, tokens in SHAPES[options.preset]:
        rows = max(rows, 2) if options.task == "dpo" else rows
        figure: dict[str, Any] = {"rows": rows, "tokens": tokens}
        steps: list[dict[str, float]] = []
        try:
            batch = make_batch(config, rows, tokens, images=options.images, device=device)
            while len(steps) <= options.steps and time.monotonic() < end:
                with Stopwatch() as watch:
                    optimizer.zero_grad(set_to_none=True)
                    loss = compute_loss(model, batch, options.task, options.arm)
                    loss.backward()
                    optimizer.step()
                steps.append({"seconds": watch.seconds, "peak": watch.peak, "loss": loss.item()})
        except torch.cuda.OutOfMemoryError:
            figure["not_measured"] = "out of memory"
        if len(steps) > 1 and "not_measured" not in figure:
            seconds = median(steps[1:], "seconds")
            rate = rows * tokens / seconds
            peak = max(step["peak"] for step in steps)
            figure |= {"seconds": seconds, "tokens_per_second": rate, "peak_gigabytes": peak / 1e9}
            figure |= {"share_of_matmul_peak": rate * flops / peak_rate, "losses": [step["loss"] for step in steps]}
        else:
            figure.setdefault("not_measured", "out of time")
        results.append(figure)
        print(figure, flush=True)
    settings = {key: getattr(options, key) for key in ("preset", "arm", "task", "images", "checkpointing")}
    words = [options.preset, options.arm, options.task]
    words += [word for word in ("images", "checkpointing") if getattr(options, word)]
    path = keep("gpu-" + "-".join(words), {**settings, "matmul_flops_per_second": peak_rate, "shapes": results})
    print(f"{machine()}: {path}")


if __name__ == "__main__":
    main()

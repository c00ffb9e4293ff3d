"""The same global batch on one process and on several, case by case: what tests/test_scale.py starts.

    python -m tests.scale_cases FOLDER PROCESSES CASE...

Processes meet by gloo; the rows of a global batch are dealt so that some processes see images where others see text.
All cases share the two processes, for starting one takes longer than training ten steps of a tiny model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, recipe_of, run_quietly, write_rows

GLOBAL_BATCH = 4
GENERATIONS = 4
SCOPES = ("attention", "dense_mlp", "shared_experts", "text_experts", "vision_experts")
SCOPES += ("text_router", "vision_router", "vision_tower", "resampler")
VISION = ["vision_experts", "vision_router", "vision_tower", "resampler"]


def make_rows(folder: Path, digits: Path) -> None:
    """Rows, pairs and prompts in whose order image and text alternate by two, then by four: of four that make a batch,
    the first half has images and the second has none, or all have, or none has."""

    def mixed(with_images: list[dict], text: list[dict], name: str) -> None:
        rows = []
        for block in range(10):
            shows = (True, True, False, False) if block % 3 < 2 else (block % 2 == 0,) * 4
            rows += [(with_images if images else text).pop(0) for images in shows]
        write_rows(folder / f"{name}.jsonl", rows)

    def asked(name: str) -> list[dict]:
        rows = [json.loads(line) for line in (digits / name).read_text().splitlines()]
        return [{**row, "images": [str(digits / image) for image in row["images"]]} for row in rows if row.get("images")]

    def text(number: int, answer: str) -> dict[str, Any]:
        from ernie_align.tiny.tokenizer import NUMBERS

        question = f"What is {NUMBERS[number % 19]} plus {NUMBERS[(3 * number) % 19]}?"
        return {"question": question, "answer": " plus ".join([answer] * (1 + number % 3)), "number": number}

    plain = [text(number, "two") for number in range(40)]
    messages = [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ],
            "images": [],
        }
        for row in plain
    ]
    mixed(asked("val.jsonl"), messages, "rows")
    pairs = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "chosen": [{"role": "assistant", "content": row["answer"]}],
            "rejected": [{"role": "assistant", "content": "nine nine"}],
            "images": [],
        }
        for row in plain
    ]
    mixed(asked("preferences-val.jsonl"), pairs, "pairs")
    prompts = [{"prompt": row["prompt"], "images": []} for row in pairs]
    shown = [{"prompt": row["messages"][:1], "images": row["images"]} for row in asked("val.jsonl")]
    mixed(shown, prompts, "prompts")


def recipe(case: str, folder: Path, model: Path, processes: int) -> dict[str, Any]:
    """A case is a stage and what it trains: sft-all, lora-vision_experts, dpo-adapter, ..."""
    stage, _, what = case.partition("-")
    rows = folder / {"sft": "rows", "lora": "rows", "dpo": "pairs", "upo": "prompts"}[stage]
    made = recipe_of(stage, model, rows.with_suffix(".jsonl"), folder / f"{case}-{processes}")
    made["training"] |= {
        "max_steps": 10,
        "per_device_train_batch_size": GLOBAL_BATCH // processes,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": what.endswith("checkpointing"),
        "learning_rate": 3e-4,
    }
    adapter = {"rank": 4, "alpha": 8}
    if stage == "lora":
        made["adapter"] = {**adapter, "scopes": VISION if what.startswith("vision+") else [what]}
    if stage == "dpo":
        made.pop("adapter")
        if what == "weights":
            made["tune"] = {"scopes": "all"}
        else:
            made["adapter"] = {**adapter, "scopes": [*VISION, "attention", "text_experts"]}
    if stage == "upo":
        made["adapter"] = {**adapter, "scopes": [*VISION, "attention", "text_experts"]}
        made["rewards"] = [
            {"name": "contains", "text": "e", "label": "has_e"},
            {"name": "contains", "text": "a", "label": "has_a", "weight": 0.3},
        ]
        all_teach = {"always_right": False, "always_wrong": False, "refills": 0}
        made["upo"] = {"num_generations": GENERATIONS, "max_completion_length": 6, "filter": all_teach}
        made["training"].pop("train_sampling_strategy")
        made["training"]["per_device_train_batch_size"] *= GENERATIONS
    return made


def draw_by_place() -> None:
    """Draw each completion by its place in its group alone: `generate` draws a batch from one stream of numbers, so that
    a rollout dealt to two processes would be another one."""
    import torch

    def drawn(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        place = torch.arange(len(probabilities)) % GENERATIONS
        quantile = (place[:, None] + 0.5) / GENERATIONS
        return (probabilities.cumsum(dim=-1) < quantile).sum(dim=-1, keepdim=True)

    torch.multinomial = drawn


FSDP2 = {
    "ACCELERATE_TORCH_DEVICE": "cpu",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def shard_on_the_cpu() -> None:
    """Accelerate takes FSDP for DDP where there is no accelerator, and says nothing. All the rest of it works on gloo as
    on NCCL, once its state says that the processes have GPUs."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def launch(
    folder: Path, model: Path, processes: int, cases: list[str], *, fsdp2: bool = False, timeout: float = 600
) -> None:
    """Run the cases in so many processes. Raises AssertionError with what they said where one fails."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.scale_cases", str(folder), str(model), *cases]
    started = []
    for rank in range(processes):
        env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if processes > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            env |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}
        if fsdp2:
            env |= FSDP2
        log = (folder / f"process-{rank}-of-{processes}.log").open("w")
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    said = "\n".join((folder / f"process-{rank}-of-{processes}.log").read_text()[-3000:] for rank in range(processes))
    assert not any(codes), said


def main() -> None:
    """One process of `launch`."""
    from ernie_align.report.console import hush

    hush()
    draw_by_place()
    if "ACCELERATE_USE_FSDP" in os.environ:
        shard_on_the_cpu()
    folder, model, *cases = sys.argv[1:]
    for case in cases:
        os.environ.pop("FSDP_TRANSFORMER_CLS_TO_WRAP", None)  # of the case before
        run_quietly(recipe(case, Path(folder), Path(model), int(os.environ.get("WORLD_SIZE", 1))))


if __name__ == "__main__":
    main()

"""The same steps on one process and on several, case by case: what tests/distributed/test_scale.py starts, and all by hand with

    python -m tests.support.multi_process FOLDER          # every scope and stage, DDP and FSDP2, 2 and 4 processes: half an hour

Processes meet by gloo. The rows of a step are dealt so that some processes see images where others see text. All cases
share the processes, for to start them takes longer than to train a tiny model for ten steps.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

from ernie_align.models.distributed.layout import ParallelLayout
from tests.support.runs import ROOT, logged, recipe_of, run_quietly, write_rows

A_STEP = 4  # examples, of all processes
GENERATIONS = 4
END = 2  # of the tiny tokenizer
_some_end_at_once = False  # whether the completions of the second half of a step's prompts are empty
PARALLEL = {"ep": ParallelLayout(ep_size=2), "tp": ParallelLayout(tp_size=2, ep_size=2)}
SCOPES = ("attention", "dense_mlp", "shared_experts", "text_experts", "vision_experts")
SCOPES += ("text_router", "vision_router", "vision_tower", "resampler")
VISION = ["vision_experts", "vision_router", "vision_tower", "resampler"]
ADAPTER = {"rank": 4, "alpha": 8, "scopes": [*VISION, "attention", "text_experts"]}


def make_rows(folder: Path, digits: Path) -> None:
    """Rows, pairs and prompts, four to a step: images in the first half of it, text alone, images alone, by turns.

    A step of text alone is followed by others: were it taken for one that teaches vision parts, the next would show.
    """
    shutil.copytree(digits / "images", folder / "images")
    shows = ((True, True, False, False), (False,) * 4, (True,) * 4)

    def mixed(with_images: list[dict], text: list[dict], name: str) -> None:
        order = [images for step in range(10) for images in shows[step % 3]]
        write_rows(folder / f"{name}.jsonl", [(with_images if images else text).pop(0) for images in order])

    def asked(name: str) -> list[dict]:
        rows = [json.loads(line) for line in (digits / name).read_text().splitlines()]
        return [row for row in rows if row.get("images")]

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


def make_adapter(folder: Path, model: Path) -> None:
    """A finished adapter, which the cases of +continued go on with."""
    made = recipe_of("lora", model, folder / "rows.jsonl", folder / "adapter", adapter=ADAPTER)
    made["training"] |= {"max_steps": 2}
    run_quietly(made)


def recipe(case: str, folder: Path, model: Path, processes: int, steps: int, resume: bool) -> dict[str, Any]:
    """A case is a stage and what it trains, sharded or not: sft-all, lora-vision, fsdp2:dpo-adapter, ..."""
    sharing, _, rest = case.rpartition(":")
    stage, _, what = rest.partition("-")
    rows = folder / {"sft": "rows", "lora": "rows", "dpo": "pairs", "upo": "prompts"}[stage]
    made = recipe_of(stage, model, rows.with_suffix(".jsonl"), run_dir(case, folder, processes, resume))
    made["training"] |= {
        "max_steps": steps,
        "per_device_train_batch_size": A_STEP // (processes // (2 if sharing == "tp" and processes > 1 else 1)),
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": what.endswith("checkpointing"),
        "learning_rate": 3e-4,
        # Adam divides a gradient by its own size: one of 1e-8, a good part of which is rounding, moves its weight by
        # half the learning rate, and in the next step a token turns to another expert that all but ties. From 1e-5 up,
        # gradients here are well above their rounding (6e-8 at most).
        "adam_epsilon": 1e-5,
    }
    if sharing in ("zero2", "zero3"):
        made["training"] |= {"use_cpu": processes == 1}
    if what.endswith("+streaming"):
        made["data"]["streaming"] = True
        made["training"].pop("train_sampling_strategy")
    if stage in ("sft", "dpo"):  # rows that no number of processes divides
        made["data"]["eval"] = [{"path": str(rows.with_suffix(".jsonl")), "limit": 7}]
        made["training"] |= {"per_device_eval_batch_size": 2}
    if sharing:
        made["training"] |= {"save_strategy": "steps", "save_steps": 2}
    scope = what.partition("+")[0]
    if what == "weights":
        made.pop("adapter")
        made["tune"] = {"scopes": "all"}
    elif scope == "adapter":
        made["adapter"] = dict(ADAPTER)
    elif stage == "lora":
        made["adapter"] = {**ADAPTER, "scopes": VISION if scope == "vision" else [scope]}
    if what.endswith("+continued"):
        made["adapter"]["path"] = str(folder / "adapter" / "final")
    if what.endswith("+bfloat16"):
        # FSDP2 trains float32 copies and computes in bfloat16, which on one process is asked for in this way
        copies = sharing == "fsdp2" and processes == 1 and not resume
        made["model"]["dtype"] = "float32" if copies else "bfloat16"
        made["training"]["bf16"] = True
    if stage == "upo":
        made["rewards"] = [
            {"name": "contains", "text": "e", "label": "has_e"},
            {"name": "contains", "text": "a", "label": "has_a", "weight": 0.3},
        ]
        all_teach = {"always_right": False, "always_wrong": False, "refills": 0}
        made["upo"] = {"num_generations": GENERATIONS, "max_completion_length": 6, "filter": all_teach}
        made["training"].pop("train_sampling_strategy")
        made["training"]["per_device_train_batch_size"] *= GENERATIONS
    return made


def run_dir(case: str, folder: Path, processes: int, resume: bool = False) -> Path:
    """Where a case is kept."""
    return folder / f"{case.replace(':', '-')}-{'resumed-' if resume else ''}{processes}"


def draw_by_place(probabilities: Any, num_samples: int) -> Any:
    """In the place of torch.multinomial: each completion is drawn by its place in its group alone. `generate` draws a
    batch from one stream of numbers, so that a rollout dealt to two processes would be another one."""
    import torch

    row = torch.arange(len(probabilities))
    quantile = (row[:, None] % GENERATIONS + 0.5) / GENERATIONS
    drawn = (probabilities.cumsum(dim=-1) < quantile).sum(dim=-1, keepdim=True)
    if _some_end_at_once:
        row += len(row) * int(os.environ.get("RANK", 0))
        drawn[row >= A_STEP * GENERATIONS // 2] = END
    return drawn


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}  # what `accelerate launch` makes of recipes/accelerate/fsdp2.yaml
HSDP = FSDP2 | {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}  # and of fsdp2_nodes.yaml, on two machines of two processes each
# and of zero2.yaml and zero3.yaml
ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_USE_CPU": "false",  # told that there are none, Accelerate leaves DeepSpeed out
    "DS_ACCELERATOR": "cpu",
}
ZERO3 = ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@contextmanager
def gpus_on_the_cpu(**environment: str) -> Iterator[None]:
    """Accelerate takes FSDP for DDP where there is no accelerator, and says nothing, and refuses tensor parallelism
    there. All the rest of it works on gloo as on NCCL, once its state says that the processes have GPUs."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    stock = PartialState._prepare_backend
    PartialState._reset_state()
    kind = DistributedType.DEEPSPEED if "ACCELERATE_USE_DEEPSPEED" in environment else DistributedType.MULTI_GPU
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", kind)
    before = dict(os.environ)
    os.environ.update(environment | {"ACCELERATE_TORCH_DEVICE": "cpu"})
    try:
        yield
    finally:
        PartialState._prepare_backend = stock
        PartialState._reset_state()
        os.environ.clear()
        os.environ.update(before)


def launch(
    folder: Path, model: Path, processes: int, cases: list[str], *, steps: int = 10, resume: bool = False
) -> None:
    """Run the cases in so many processes. Raises AssertionError with what they said where one fails."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wanted = [str(folder), str(model), str(steps), "resume" if resume else "begin"]
    started = []
    for rank in range(processes):
        env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        env |= {name: str(value) for name, value in place.items()}
        log = (folder / f"process-{rank}-of-{processes}.log").open("w")
        command = [sys.executable, "-m", "tests.support.multi_process", *wanted, *cases]
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(600 * len(cases)) for process in started]
    finally:
        for process in started:
            process.kill()
    said = "\n".join((folder / f"process-{rank}-of-{processes}.log").read_text()[-3000:] for rank in range(processes))
    assert not any(codes), said


def run_case(case: str, folder: Path, model: Path, steps: int, *, resume: bool = False) -> None:
    """One case in this process, which is one of several or the only one."""
    global _some_end_at_once
    import torch

    _some_end_at_once = case.endswith("+early")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    sharing = case.rpartition(":")[0] if processes > 1 else ""
    parallel = PARALLEL.get(sharing)
    hsdp = HSDP if processes == 4 else FSDP2
    ways = {"fsdp2": gpus_on_the_cpu(**FSDP2), "hsdp": gpus_on_the_cpu(**hsdp), "tp": gpus_on_the_cpu()}
    ways |= {"zero2": gpus_on_the_cpu(**ZERO2), "zero3": gpus_on_the_cpu(**ZERO3)}
    with ways.get(sharing, nullcontext()):
        run_quietly(recipe(case, folder, model, processes, steps, resume), resume=resume, parallel=parallel)
        if sharing in ("fsdp2", "hsdp"):
            from accelerate.state import AcceleratorState

            state = AcceleratorState()
            assert state.is_fsdp2 and torch.distributed.get_world_size() == processes
            assert hsdp is FSDP2 or sharing == "fsdp2" or state.device_mesh.shape == (2, 2)


@contextmanager
def held_is_written(run: Path) -> Iterator[None]:
    """While it lasts, each step of an optimizer writes what this process holds: values of trained weights, of their
    gradients and of their moments, and `whole`, what all of these weights come to, name by name."""
    from torch.distributed.tensor import DTensor
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def local(tensor: Any) -> int:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()

    def write(optimizer: Any, args: Any, kwargs: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        moments = [value for weight in weights for value in optimizer.state[weight].values() if value.ndim]
        held = {
            "whole": [list(weight.shape) for weight in weights],
            "weights": [local(weight) for weight in weights],
            "gradients": [0 if weight.grad is None else local(weight.grad) for weight in weights],
            "moments": sum(map(local, moments)),
        }
        if any(held["gradients"]):
            (run / f"held-{os.environ['RANK']}.json").write_text(json.dumps(held))

    handle = register_optimizer_step_post_hook(write)
    try:
        yield
    finally:
        handle.remove()


def apart(one: Path, other: Path, key: str = "loss") -> float:
    """How far the losses of two runs are from each other at most."""
    pairs = zip(logged(one, key), logged(other, key), strict=True)
    return max(abs(left - right) for left, right in pairs)


def by_hand(folder: Path) -> None:
    """Every case against one process, and the checkpoint of two on one and on four. Prints a table."""
    import torch

    from ernie_align.report.console import quiet_libraries
    from ernie_align.tiny import make_checkpoint, make_digits

    quiet_libraries()
    torch.multinomial = draw_by_place
    folder.mkdir(parents=True)
    model, digits = make_checkpoint("vl_moe", folder / "model"), make_digits(folder / "digits")
    make_rows(folder, digits)
    make_adapter(folder, model)
    cases = ["sft-all", *(f"lora-{scope}" for scope in SCOPES), "lora-vision+checkpointing", "lora-attention+streaming"]
    cases += ["dpo-adapter", "dpo-weights", "upo-adapter", "lora-adapter+continued", "dpo-adapter+continued"]
    cases += ["upo-adapter+continued", "sft-all+bfloat16"]
    sharded = [f"{way}:{case}" for way in ("fsdp2", "ep") for case in cases] + ["tp:sft-all"]
    if importlib.util.find_spec("deepspeed"):
        zero3 = ["sft-all", "lora-adapter", "lora-text_experts"]  # what it is refused for: runs.launched
        zero2 = [*zero3, "lora-vision+checkpointing", "dpo-adapter", "upo-adapter"]
        sharded += [f"zero2:{case}" for case in zero2] + [f"zero3:{case}" for case in zero3]
    of_four = ("sft-all", "dpo-adapter", "upo-adapter")
    four = [case for case in cases + sharded if case.endswith(of_four) and "zero" not in case]
    four += [f"hsdp:{case}" for case in of_four]
    for processes, chosen in ((2, cases + sharded), (4, four)):
        for some in (chosen[start : start + 7] for start in range(0, len(chosen), 7)):
            for case in some:
                if not run_dir(case, folder, 1).exists():
                    run_case(case, folder, model, 10)
            launch(folder, model, processes, some)
            for case in some:
                found = apart(run_dir(case, folder, 1), run_dir(case, folder, processes))
                print(f"{case:34} {processes} processes: {found:.1e}", flush=True)
    for way, begun, others in (("fsdp2", 2, (1, 4)), ("ep", 2, (1, 4)), ("hsdp", 4, (1, 2, 4))):
        for case, processes in product((f"{way}:sft-all", f"{way}:dpo-adapter"), others):
            goes_on(case, folder, model, 10, after=4, processes=processes, begun=begun)
            found = apart(run_dir(case, folder, begun), run_dir(case, folder, processes, resume=True))
            print(f"{case:34} checkpoint of {begun} on {processes}: {found:.1e}", flush=True)


def goes_on(case: str, folder: Path, model: Path, steps: int, *, after: int, processes: int, begun: int = 2) -> Path:
    """What so many processes began, gone on with from a checkpoint on others. Returns the run directory."""
    from tests.support.runs import stopped_after

    again = run_dir(case, folder, processes, resume=True)
    shutil.rmtree(again, ignore_errors=True)
    stopped_after(after, run_dir(case, folder, begun), again)
    if processes == 1:
        run_case(case, folder, model, steps, resume=True)
    else:
        launch(folder, model, processes, [case], steps=steps, resume=True)
    return again


def main() -> None:
    """All by hand, or one process of `launch`."""
    from ernie_align.report.console import quiet_libraries

    if len(sys.argv) == 2:
        by_hand(Path(sys.argv[1]))
        return
    import torch

    quiet_libraries()
    torch.multinomial = draw_by_place
    torch.distributed.init_process_group("gloo")
    folder, model, steps, how, *cases = sys.argv[1:]
    processes = torch.distributed.get_world_size()
    for case in cases:
        with held_is_written(run_dir(case, Path(folder), processes, how == "resume")):
            run_case(case, Path(folder), Path(model), int(steps), resume=how == "resume")


if __name__ == "__main__":
    main()

"""The same steps on one process and on several, case by case: started by tests/distributed/test_scale.py, or with

    python -m tests.support.multi_process FOLDER    # every scope and stage, DDP and FSDP2, 2 and 4 ranks: half an hour

Ranks meet over gloo. The rows of a step are ordered so that some ranks see images while others see text. All cases of
a launch share the processes, which are forked from one that has imported everything: importing takes longer than
training a tiny model for ten steps.
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
from tests.support.processes import Ranks, import_all
from tests.support.runs import ROOT, logged, recipe_of, run_quietly, stopped_after, write_rows

BATCH = 4  # examples of a step, over all ranks
GENERATIONS = 4
END = 2  # id of the token that ends a completion of the tiny tokenizer
_some_end_at_once = False  # the completions of the second half of a step's prompts are empty
PARALLEL = {"ep": ParallelLayout(ep_size=2), "tp": ParallelLayout(tp_size=2, ep_size=2)}
SCOPES = ("attention", "dense_mlp", "shared_experts", "text_experts", "vision_experts")
SCOPES += ("text_router", "vision_router", "vision_tower", "resampler")
VISION = ["vision_experts", "vision_router", "vision_tower", "resampler"]
ADAPTER = {"rank": 4, "alpha": 8, "scopes": [*VISION, "attention", "text_experts"]}


def make_rows(folder: Path, digits: Path) -> None:
    """Write rows, pairs and prompts, four to a step, in turns: images in its first half, only text, only images.

    A step of text is followed by others: if it changed vision parts, the losses of the next would show it.
    """
    shutil.copytree(digits / "images", folder / "images")
    has_images = ((True, True, False, False), (False,) * 4, (True,) * 4)

    def mixed(with_images: list[dict], text: list[dict], name: str) -> None:
        order = [images for step in range(10) for images in has_images[step % 3]]
        write_rows(folder / f"{name}.jsonl", [(with_images if images else text).pop(0) for images in order])

    def rows_with_images(name: str) -> list[dict]:
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
    mixed(rows_with_images("val.jsonl"), messages, "rows")
    pairs = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "chosen": [{"role": "assistant", "content": row["answer"]}],
            "rejected": [{"role": "assistant", "content": "nine nine"}],
            "images": [],
        }
        for row in plain
    ]
    mixed(rows_with_images("preferences-val.jsonl"), pairs, "pairs")
    prompts = [{"prompt": row["prompt"], "images": []} for row in pairs]
    visual = [{"prompt": row["messages"][:1], "images": row["images"]} for row in rows_with_images("val.jsonl")]
    mixed(visual, prompts, "prompts")


def make_adapter(folder: Path, model: Path) -> None:
    """Write a finished adapter, with which the cases of +continued start."""
    made = recipe_of("lora", model, folder / "rows.jsonl", folder / "adapter", adapter=ADAPTER)
    made["training"] |= {"max_steps": 2}
    run_quietly(made)


def recipe(case: str, folder: Path, model: Path, processes: int, steps: int, resume: bool) -> dict[str, Any]:
    """Return the recipe of a case: a stage and what it trains, sharded or not: sft-all, lora-vision, fsdp2:dpo-adapter.

    On one process, the way of sharding makes no difference, except for what it means to train bfloat16 weights.
    """
    sharing, _, rest = case.rpartition(":")
    stage, _, what = rest.partition("-")
    rows = folder / {"sft": "rows", "lora": "rows", "dpo": "pairs", "upo": "prompts"}[stage]
    made = recipe_of(stage, model, rows.with_suffix(".jsonl"), run_dir(case, folder, processes, resume))
    made["training"] |= {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH // (processes // (2 if sharing == "tp" and processes > 1 else 1)),
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": what.endswith("checkpointing"),
        "learning_rate": 3e-4,
        # Adam divides a gradient by its own size: one of 1e-8, a large part of which is rounding, moves its weight by
        # half the learning rate, and in the next step a token is routed to another expert of almost the same score.
        # Gradients above 1e-5 are well above their rounding (6e-8 at most).
        "adam_epsilon": 1e-5,
    }
    if sharing in ("zero2", "zero3"):
        made["training"] |= {"use_cpu": processes == 1}
    if what.endswith("+streaming"):
        made["data"]["streaming"] = True
        made["training"].pop("train_sampling_strategy")
    if stage in ("sft", "dpo"):  # a number of rows that no number of ranks divides
        made["data"]["eval"] = [{"path": str(rows.with_suffix(".jsonl")), "limit": 7}]
        made["training"] |= {"per_device_eval_batch_size": 2}
    if sharing or processes == 1:
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
        # FSDP2 trains float32 copies and computes in bfloat16; on one process, this is float32 under autocast
        copies = sharing == "fsdp2" and processes == 1 and not resume
        made["model"]["dtype"] = "float32" if copies else "bfloat16"
        made["training"]["bf16"] = True
    if stage == "upo":
        made["rewards"] = [
            {"name": "contains", "text": "e", "label": "has_e"},
            {"name": "contains", "text": "a", "label": "has_a", "weight": 0.3},
        ]
        no_filter = {"always_right": False, "always_wrong": False, "refills": 0}
        made["upo"] = {"num_generations": GENERATIONS, "max_completion_length": 6, "filter": no_filter}
        made["training"].pop("train_sampling_strategy")
        made["training"]["per_device_train_batch_size"] *= GENERATIONS
    return made


def run_dir(case: str, folder: Path, processes: int, resume: bool = False) -> Path:
    """Return the run directory of a case. On one process, cases that differ only in their sharding are one run."""
    if processes == 1 and not resume and "bfloat16" not in case:
        case = case.rpartition(":")[2]
    return folder / f"{case.replace(':', '-')}-{'resumed-' if resume else ''}{processes}"


def sample_by_position(probabilities: Any, num_samples: int) -> Any:
    """Replace torch.multinomial: sample each completion by its position in its group only.

    `generate` samples a whole batch from one stream of random numbers, so that a rollout split over two ranks would be
    another one.
    """
    import torch

    row = torch.arange(len(probabilities))
    quantile = (row[:, None] % GENERATIONS + 0.5) / GENERATIONS
    drawn = (probabilities.cumsum(dim=-1) < quantile).sum(dim=-1, keepdim=True)
    if _some_end_at_once:
        row += len(row) * int(os.environ.get("RANK", 0))
        drawn[row >= BATCH * GENERATIONS // 2] = END
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
}  # of fsdp2_nodes.yaml, on two machines of two processes each
# of zero2.yaml and zero3.yaml
ZERO2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_USE_CPU": "false",  # with true, Accelerate ignores DeepSpeed
    "DS_ACCELERATOR": "cpu",
}
ZERO3 = ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@contextmanager
def gpus_on_the_cpu(**environment: str) -> Iterator[None]:
    """Make Accelerate use FSDP and tensor parallelism on the CPU: it would silently fall back to DDP, or refuse. All
    the rest works on gloo as on NCCL, once its state says that the processes have GPUs."""
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


class Launcher:
    """Starts the cases on several ranks, all of them forked from one process that has imported everything."""

    def __init__(self, folder: Path, model: Path, *, steps: int = 10):
        self.folder, self.model, self.steps = folder, model, steps
        command = [sys.executable, "-m", "tests.support.multi_process", "--serve"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def launch(self, processes: int, cases: list[str], *, resume: bool = False) -> None:
        """Run the cases one after the other on so many ranks. Raises AssertionError with their output if one fails."""
        request = [str(self.folder), str(self.model), self.steps, processes, resume, cases]
        print(json.dumps(request), file=self.server.stdin, flush=True)
        codes = json.loads(self.server.stdout.readline())
        logs = [self.folder / f"launch-of-{processes}-{rank}.log" for rank in range(processes)]
        assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.stdin.close()
        self.server.wait()


def serve() -> None:
    """Fork ranks for each request of a Launcher, and answer with their exit codes."""
    import torch

    import_all()
    torch.multinomial = sample_by_position
    for line in sys.stdin:
        folder, model, steps, processes, resume, cases = json.loads(line)

        def run_cases(rank: int, folder=Path(folder), model=Path(model), steps=steps, resume=resume, cases=cases):
            torch.distributed.init_process_group("gloo")
            for case in cases:
                with recorded_shards(run_dir(case, folder, int(os.environ["WORLD_SIZE"]), resume)):
                    run_case(case, folder, model, steps, resume=resume)

        ranks = Ranks(Path(folder), f"launch-of-{processes}", run_cases, count=processes)
        print(json.dumps([-1 if code is None else code for code in ranks.wait(limit=600 * len(cases))]), flush=True)


def run_case(case: str, folder: Path, model: Path, steps: int, *, resume: bool = False) -> None:
    """Run a case in this process, which is one of several ranks or the only one."""
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
def recorded_shards(run: Path) -> Iterator[None]:
    """Let each optimizer step write what this rank holds to shards-RANK.json: the number of elements of trained
    weights, of their gradients and of their moments, and `shapes`, those of the whole weights."""
    from torch.distributed.tensor import DTensor
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def local(tensor: Any) -> int:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()

    def write(optimizer: Any, args: Any, kwargs: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        moments = [value for weight in weights for value in optimizer.state[weight].values() if value.ndim]
        sizes = {
            "shapes": [list(weight.shape) for weight in weights],
            "weights": [local(weight) for weight in weights],
            "gradients": [0 if weight.grad is None else local(weight.grad) for weight in weights],
            "moments": sum(map(local, moments)),
        }
        if any(sizes["gradients"]):
            (run / f"shards-{os.environ['RANK']}.json").write_text(json.dumps(sizes))

    handle = register_optimizer_step_post_hook(write)
    try:
        yield
    finally:
        handle.remove()


def max_difference(one: Path, other: Path, key: str = "loss") -> float:
    """Return the largest difference between the logged values of two runs."""
    pairs = zip(logged(one, key), logged(other, key), strict=True)
    return max(abs(left - right) for left, right in pairs)


def compare_all(folder: Path) -> None:
    """Compare every case with one process, and the checkpoint of two ranks on one and on four. Prints a table."""
    import torch

    from ernie_align.tiny import make_checkpoint, make_digits

    import_all()
    torch.multinomial = sample_by_position
    folder.mkdir(parents=True)
    model, digits = make_checkpoint("vl_moe", folder / "model"), make_digits(folder / "digits")
    make_rows(folder, digits)
    make_adapter(folder, model)
    cases = ["sft-all", *(f"lora-{scope}" for scope in SCOPES), "lora-vision+checkpointing", "lora-attention+streaming"]
    cases += ["dpo-adapter", "dpo-weights", "upo-adapter", "lora-adapter+continued", "dpo-adapter+continued"]
    cases += ["upo-adapter+continued", "sft-all+bfloat16"]
    sharded = [f"{way}:{case}" for way in ("fsdp2", "ep") for case in cases] + ["tp:sft-all"]
    if importlib.util.find_spec("deepspeed"):
        zero3 = ["sft-all", "lora-adapter", "lora-text_experts"]  # runs.distributed rejects the others
        zero2 = [*zero3, "lora-vision+checkpointing", "dpo-adapter", "upo-adapter"]
        sharded += [f"zero2:{case}" for case in zero2] + [f"zero3:{case}" for case in zero3]
    on_four = ("sft-all", "dpo-adapter", "upo-adapter")
    four = [case for case in cases + sharded if case.endswith(on_four) and "zero" not in case]
    four += [f"hsdp:{case}" for case in on_four]
    with Launcher(folder, model) as launcher:
        for processes, chosen in ((2, cases + sharded), (4, four)):
            for some in (chosen[start : start + 7] for start in range(0, len(chosen), 7)):
                for case in some:
                    if not run_dir(case, folder, 1).exists():
                        run_case(case, folder, model, 10)
                launcher.launch(processes, some)
                for case in some:
                    difference = max_difference(run_dir(case, folder, 1), run_dir(case, folder, processes))
                    print(f"{case:34} {processes} ranks: {difference:.1e}", flush=True)
        for way, ranks, others in (("fsdp2", 2, (1, 4)), ("ep", 2, (1, 4)), ("hsdp", 4, (1, 2, 4))):
            for case, processes in product((f"{way}:sft-all", f"{way}:dpo-adapter"), others):
                again = run_dir(case, folder, processes, resume=True)
                shutil.rmtree(again, ignore_errors=True)
                stopped_after(4, run_dir(case, folder, ranks), again)
                if processes == 1:
                    run_case(case, folder, model, 10, resume=True)
                else:
                    launcher.launch(processes, [case], resume=True)
                difference = max_difference(run_dir(case, folder, ranks), again)
                print(f"{case:34} checkpoint of {ranks} on {processes}: {difference:.1e}", flush=True)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else compare_all(Path(sys.argv[1]))

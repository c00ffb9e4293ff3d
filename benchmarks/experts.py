"""Measure one expert pool with LoRA on both weights, forward and backward: frozen, ours, and PEFT's own path.

    python -m benchmarks.experts [--hidden 512 --width 384 --experts 64 --top-k 6 --tokens 512 --rank 8]

frozen is transformers' pool without an adapter, with a gradient for its input. Extra memory is the peak of a step minus
that of the frozen pool, in percent of the pool's weights; it includes the adapter and its gradients.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

from benchmarks.measure import Arm, StepServer, check_equal, interleave, keep, machine, matmul_rate, median, ratio, show

ARMS = ("frozen", "grouped", "peft")
SIZES = {"hidden": 512, "width": 384, "experts": 64, "top_k": 6, "tokens": 512, "rank": 8}


def work(arm: str, sizes: argparse.Namespace) -> None:
    """Run one arm in this process."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from torch import nn
    from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeMoeExperts

    from ernie_align.models.expert_lora import register_expert_lora

    server = StepServer()
    torch.manual_seed(0)
    config = SimpleNamespace(
        num_experts=sizes.experts,
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.width,
        hidden_act="silu",
        _experts_implementation="grouped_mm",
    )
    dtype = getattr(torch, sizes.dtype)
    model = nn.ModuleDict({"experts": Ernie4_5_VLMoeMoeExperts(config).to(dtype)})
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.04).requires_grad_(False)
    hidden = torch.randn(sizes.tokens, sizes.hidden, dtype=dtype, requires_grad=True)
    scores, chosen = torch.randn(sizes.tokens, sizes.experts).softmax(-1).topk(sizes.top_k)
    weights = (scores / scores.sum(-1, keepdim=True)).to(dtype).requires_grad_()
    grad = torch.randn(sizes.tokens, sizes.hidden).to(dtype)
    if arm != "frozen":
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        lora = LoraConfig(r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules=[], target_parameters=targets)
        inject_adapter_in_model(register_expert_lora(lora) if arm == "grouped" else lora, model)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=0.02)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    output = None

    def step() -> None:
        nonlocal output
        for tensor in (hidden, weights, *trained):
            tensor.grad = None
        output = None
        output = model["experts"](hidden, chosen, weights)
        output.backward(grad)

    def numbers() -> dict[str, float]:
        norms = [parameter.grad.double().norm() for parameter in trained]
        return {
            "output": output.detach().double().norm().item(),
            "input_gradient": hidden.grad.double().norm().item(),
            "weight_gradient": weights.grad.double().norm().item(),
            "adapter_gradient": float(sum(norms)),
        }

    server.serve(step, numbers)


def main() -> None:
    """Measure the arms, check that they are equal, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=int, default=31)
    parser.add_argument("--name", help="name of the file in results/")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        work(options.arm, options)
        return
    sizes = {name: getattr(options, name) for name in (*SIZES, "dtype")}
    arguments = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    steps = interleave([Arm("benchmarks.experts", arm, arguments) for arm in ARMS], options.repetitions, warm_up=3)
    tolerance = 1e-5 if options.dtype == "float32" else 1e-2
    checked = ("output", "input_gradient", "weight_gradient", "adapter_gradient")
    check_equal(steps["grouped"], steps["peft"], dict.fromkeys(checked, tolerance))

    weights = 3 * options.experts * options.hidden * options.width
    size = weights * (4 if options.dtype == "float32" else 2)
    # each of the k experts of a token multiplies by three matrices, once forward and once backward
    flops = 2 * 2 * options.tokens * options.top_k * weights / options.experts
    rate = matmul_rate(options.dtype)
    base = median(steps["frozen"], "peak")
    figures = {
        arm: {
            "seconds": median(steps[arm], "seconds"),
            "times_frozen": ratio(steps[arm], steps["frozen"]),
            "times_faster_than_peft": ratio(steps["peft"], steps[arm]),
            "extra_memory_percent": 100 * (median(steps[arm], "peak") - base) / size,
            "tokens_per_second": options.tokens / median(steps[arm], "seconds"),
        }
        for arm in ARMS
    }
    floor = {"flops": flops, "matmul_flops_per_second": rate, "seconds": flops / rate}
    print(f"{', '.join(f'{name} {value}' for name, value in sizes.items())}; {machine()}")
    print(f"floor: {flops / 1e9:.1f} GFLOP at {rate / 1e9:.0f} GFLOP/s are {1e3 * flops / rate:.0f} ms\n")
    print("| arm | ms | time / frozen | PEFT time / this | tokens/s | extra memory, % of weights |")
    print("|---|---|---|---|---|---|")
    for arm, figure in figures.items():
        times = f"{1e3 * figure['seconds']:.0f} | {show(figure['times_frozen'])}"
        faster, speed = show(figure["times_faster_than_peft"]), f"{figure['tokens_per_second']:.0f}"
        print(f"| {arm} | {times} | {faster} | {speed} | {figure['extra_memory_percent']:.1f} |")
    name = options.name or f"experts-{options.hidden}x{options.width}-{options.dtype}"
    keep(name, {"sizes": sizes, "repetitions": options.repetitions, "floor": floor, "arms": figures})


if __name__ == "__main__":
    main()

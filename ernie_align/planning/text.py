"""A plan as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from ernie_align.planning.plan import Plan

_GB = 1e9


def format_plan(plan: Plan) -> str:
    """Parameters, memory, verdict, time, the calculator, and what was assumed."""
    setting, needed = plan.setting, plan.memory
    parts = [
        (row.part, f"{row.parameters:,}", f"{row.trainable:,}" if row.trainable else "-")
        for row in plan.parameter_summary.rows
    ]
    parts.append(("all", f"{plan.parameter_summary.parameters:,}", f"{plan.parameter_summary.trainable:,}"))
    held = [(name, format_gb(size)) for name, size in needed.parts().items()]
    held.append(("at the worst moment", format_gb(needed.peak)))
    calculator = [
        (str(row.bits), f"{row.context:,}", format_gb(row.weights), format_gb(row.cache), format_gb(row.serving))
        + ((format_gb(row.training),) if row.training is not None else ("-",))
        for row in plan.calculator
    ]
    heads = ("bits", "context", "weights", "cache", "serving", "training")
    return "\n\n".join(
        [
            f"sizes: {plan.sizes_from}",
            format_table(("part", "parameters", "trained"), parts),
            format_table((f"on each of {setting.gpus} GPU(s), {setting.strategy}", "GB"), held),
            fit_summary(plan),
            _time(plan),
            format_table(heads, calculator)
            + "\nGB; serving: weights and one sequence; training: this recipe at that length",
            _assumed(plan),
        ]
    )


def fit_summary(plan: Plan) -> str:
    """Whether it fits, and if not, the smallest change that does."""
    needed, there = format_gb(plan.memory.peak), format_gb(plan.gpu.memory)
    if plan.fits:
        return f"Fits: {needed} GB of {there}."
    if plan.change is None:
        return f"Does not fit: {needed} GB of {there}; nothing that was tried does."
    change = f"{plan.change.says} ({format_gb(plan.change.peak)} GB)"
    return f"Does not fit: {needed} GB of {there}; smallest change that fits: {change}."


def format_gb(size: float) -> str:
    """Bytes -> GB of 10^9 bytes, three figures."""
    value = size / _GB
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in step: the first to the left, numbers to the right."""
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if not place else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])


def _time(plan: Plan) -> str:
    work, setting = plan.work, plan.setting
    text = (
        f"{work.forward / 1e9:.3g} GFLOP a token forward, {work.step / 1e15:.3g} PFLOP a step of "
        f"{work.tokens:,} tokens: {work.seconds:.3g} s a step"
    )
    if setting.steps is not None:
        text += f", {work.seconds * setting.steps / 3600:.3g} h for {setting.steps:,} steps"
    if setting.drawn:
        text += " (a lower bound: drawing completions is bound by memory)"
    return text


def _assumed(plan: Plan) -> str:
    setting = plan.setting
    lines = [
        "assumed:",
        f"  training reaches {100 * plan.efficiency:.0f} % of {plan.gpu.peak / 1e12:.0f} TFLOP/s in bfloat16 "
        f"({plan.gpu.name}): not measured",
        f"  every row has its full length, {setting.tokens:,} tokens, and all of them are scored",
        "  a GB is 10^9 bytes: what a GPU has beyond that is left to its context and to fragmentation",
    ]
    if setting.shared:
        lines.append("  of a shared prompt only the images are counted once: text that both answers share saves more")
    if setting.vision:
        lines.append(f"  {100 * setting.vision:.0f} % of the tokens are image tokens (--vision-share)")
    if setting.base_bits < 8 * setting.bytes_each or any(row.bits < 16 for row in plan.calculator):
        lines.append(
            "  a quantised base has a 16-bit scale for each 64 weights; this toolkit does not train on one yet"
        )
    if setting.reference or setting.is_adapter:
        state = "adapters, their gradients and AdamW's two values are float32"
    else:
        state = "gradients and AdamW's two values have the dtype of the weights"
    lines.append(f"  {state}")
    return "\n".join(lines)

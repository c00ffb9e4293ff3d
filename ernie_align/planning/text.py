"""Format a plan as plain text."""

from __future__ import annotations

from collections.abc import Sequence

from ernie_align.planning.plan import Plan

_GB = 1e9


def format_plan(plan: Plan) -> str:
    """Format parameters, memory, whether it fits, time, the calculator, and the assumptions."""
    workload, memory, summary = plan.workload, plan.memory, plan.parameter_summary
    parts = [(row.part, f"{row.parameters:,}", f"{row.trainable:,}" if row.trainable else "-") for row in summary.rows]
    parts.append(("all", f"{summary.parameters:,}", f"{summary.trainable:,}"))
    sizes = [(name, format_gb(size)) for name, size in memory.parts().items()]
    sizes.append(("peak", format_gb(memory.peak)))
    calculator = [
        (str(row.bits), f"{row.context:,}", format_gb(row.weights), format_gb(row.cache), format_gb(row.serving))
        + ((format_gb(row.training),) if row.training is not None else ("-",))
        for row in plan.calculator
    ]
    heads = ("bits", "context", "weights", "cache", "serving", "training")
    notes = "\nGB; serving: weights and the cache of one sequence; training: this recipe with rows of that length"
    return "\n\n".join(
        [
            f"sizes from: {plan.sizes_from}",
            format_table(("part", "parameters", "trained"), parts),
            format_table((f"on each of {workload.gpus} GPU(s), {workload.strategy}", "GB"), sizes),
            fit_summary(plan),
            _format_time(plan),
            format_table(heads, calculator) + notes,
            _format_assumptions(plan),
        ]
    )


def fit_summary(plan: Plan) -> str:
    """Say whether the run fits and, if not, the smallest change with which it does."""
    needed, available = format_gb(plan.memory.peak), format_gb(plan.gpu.memory)
    if plan.fits:
        return f"Fits: {needed} GB of {available}."
    if plan.change is None:
        return f"Does not fit: {needed} GB of {available}; no change that was tried fits."
    change = f"{plan.change.description} ({format_gb(plan.change.peak)} GB)"
    return f"Does not fit: {needed} GB of {available}; smallest change that fits: {change}."


def format_gb(size: float) -> str:
    """Format bytes as GB of 10^9 bytes, with three significant digits."""
    value = size / _GB
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])


def _format_time(plan: Plan) -> str:
    work, workload = plan.work, plan.workload
    text = (
        f"{work.forward / 1e9:.3g} GFLOP per token forward, {work.step / 1e15:.3g} PFLOP per step of "
        f"{work.tokens:,} tokens: {work.seconds:.3g} s per step"
    )
    if workload.steps is not None:
        text += f", {work.seconds * workload.steps / 3600:.3g} h for {workload.steps:,} steps"
    if workload.drawn:
        text += " (a lower bound: memory bandwidth limits generation)"
    return text


def _format_assumptions(plan: Plan) -> str:
    workload = plan.workload
    lines = [
        "assumptions:",
        f"  training reaches {100 * plan.efficiency:.0f} % of {plan.gpu.peak / 1e12:.0f} TFLOP/s in bfloat16 "
        f"({plan.gpu.name}): not measured",
        f"  every row has the maximum length, {workload.tokens:,} tokens, and all of them are scored",
        "  1 GB is 10^9 bytes: what a GPU has beyond that is reserved for its context and fragmentation",
    ]
    if workload.shared:
        lines.append("  of a shared prompt only the images are counted once: shared text saves more")
    if workload.vision:
        lines.append(f"  {100 * workload.vision:.0f} % of the tokens are image tokens (--vision-share)")
    if workload.base_bits < 8 * workload.bytes_each or any(row.bits < 16 for row in plan.calculator):
        lines.append("  a quantized base has a 16-bit scale for each 64 weights; training on one is not supported yet")
    if workload.reference or workload.is_adapter:
        state = "adapters, their gradients and AdamW's two values are float32"
    else:
        state = "gradients and AdamW's two values have the dtype of the weights"
    lines.append(f"  {state}")
    return "\n".join(lines)

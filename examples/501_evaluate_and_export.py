"""501: Evaluate three checkpoints, check requirements, write a report, and export the adapter that passes.

    python examples/501_evaluate_and_export.py

What a pipeline does after training; run it from the top of the repository. It compares the digits model of 101 with the
two adapters of 202, and trains those that do not exist. Exit code 4: a requirement was missed, and nothing was
exported.

With the real 28B model two lines change: CHECKPOINTS names yours, and CONFIG names your own rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ernie_align import evaluate, export, load_recipe, run
from ernie_align.report import quiet_libraries, write_page
from ernie_align.tiny import make_checkpoint, make_digits

RUNS = Path("runs/examples")
DIGITS = RUNS / "digits"
CHECKPOINTS = [RUNS / "sft/final", RUNS / "parity/final", RUNS / "inverted/final"]
CONFIG = {
    "data": [{"path": f"{DIGITS}/{name}.jsonl", "limit": 120} for name in ("test", "parity_test", "inverted_test")],
    "metrics": [{"name": "exact_match"}, {"name": "perplexity"}],
    "generation": {"max_new_tokens": 8},
}
# The adapter to ship: it reads inverted digits, and text output is bit-identical to its base.
SHIPPED = CHECKPOINTS[2]
REQUIRE = ["exact_match@inverted_test.jsonl>=0.5", "text_retention>=1"]


def train_missing_checkpoints() -> None:
    """Run the recipes of 101 and 202; finished runs are left unchanged."""
    if not (RUNS / "tiny-vl").exists():
        make_checkpoint("vl_moe", RUNS / "tiny-vl")
    if not DIGITS.exists():
        make_digits(DIGITS)
    for name, recipe, model, rows in (
        ("sft", "digits_sft", RUNS / "tiny-vl", ""),
        ("parity", "digits_lora", CHECKPOINTS[0], "parity_"),
        ("inverted", "digits_vision_lora", CHECKPOINTS[0], "inverted_"),
    ):
        if not (RUNS / name / "final").exists():
            overrides = [f"model.name={model}", f"run.dir={RUNS / name}"]
            overrides += [f"data.{split}[0].path={DIGITS}/{rows}{file}.jsonl" for split, file in
                          (("train", "train"), ("eval", "val"))]  # fmt: skip
            run(load_recipe(f"recipes/demo/{recipe}.yaml", overrides=overrides), resume=True)


def main() -> int:
    """Train, compare, check requirements, export; return the exit code."""
    quiet_libraries()
    train_missing_checkpoints()
    out = RUNS / "comparison"

    # figures with intervals, differences from the first checkpoint, drift of text and routing
    compared = evaluate(CHECKPOINTS, config=CONFIG, out=out)
    for checkpoint in compared.results:
        for figure in checkpoint.figures:
            low, high = figure.interval
            print(f"{checkpoint.name:9} {figure.data:20} {figure.metric:12} {figure.value:.3f} [{low:.3f}, {high:.3f}]")
    write_page([out], out / "report.html")
    print(f"written: {out / 'report.html'}")

    # requirements of the checkpoint to ship, compared with the one it was trained from
    checked = evaluate([CHECKPOINTS[0], SHIPPED], config={**CONFIG, "require": REQUIRE})
    for line in checked.report["requirements"]:
        print(
            f"{'met' if line['passed'] else 'MISSED'}: {line['requirement']} of {line['checkpoint']}: {line['value']}"
        )
    if not checked.passed:
        return 4

    # adapter and base merged in the layout of the hub, compared with the adapter before the folder is created
    folder = RUNS / "merged"
    if not folder.exists():
        export(SHIPPED, to=folder, log=print)
    return 0


if __name__ == "__main__":
    sys.exit(main())

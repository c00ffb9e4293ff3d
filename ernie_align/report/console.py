"""A run on the terminal: lines, tables, one example in colour, and a progress bar."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ernie_align.data.load import SourceStats
from ernie_align.data.preview import TokenSpan
from ernie_align.models.trainable_parts import ParameterSummary

if TYPE_CHECKING:
    from rich.progress import TaskID
    from transformers import TrainerCallback

    from ernie_align.models.text_parity import TextProbe


_WIDTH_OF_FILES = 140
_SHOWN_DROPS = 3  # data.json names more


class Terminal:
    """Tells the user what a run does. Only the first process of several speaks."""

    def __init__(self, console: Console | None = None, *, speaks: bool = True):
        # a file or a pipe has no width of its own: 80 columns would cut the tables
        width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=not speaks, width=width)

    def log(self, line: str) -> None:
        """One line."""
        self.console.print(escape(line))

    def parameter_summary(self, table: ParameterSummary) -> None:
        """Part, parameters, trainable, tensors."""
        rows = Table("part", title="what is trained", title_justify="left")
        for name in ("parameters", "trainable", "tensors"):
            rows.add_column(name, justify="right")
        for row in table.rows:
            style = "bold green" if row.trained_tensors else "dim"
            tensors = f"{row.trained_tensors} of {row.tensors}"
            rows.add_row(
                row.part, f"{row.parameters:,}", f"{row.trainable:,}" if row.trainable else "-", tensors, style=style
            )
        share = 100 * table.trainable / table.parameters
        rows.add_section()
        rows.add_row("all", f"{table.parameters:,}", f"{table.trainable:,}", f"{share:.2f} %")
        self.console.print(rows)

    def sources(self, counts: list[SourceStats]) -> None:
        """What became of the rows of each source."""
        rows = Table("source", "format", title="rows", title_justify="left")
        for name in ("rows", "kept", "examples", "tokens", "trained", "vision", "images"):
            rows.add_column(name, justify="right")
        for count in counts:
            if not count.rows:  # a stream is counted as it is read
                rows.add_row(escape(count.name), count.format, "stream")
                continue
            numbers = (count.rows, count.kept, count.examples, count.tokens, count.trained)
            rows.add_row(
                escape(count.name), count.format, *(f"{n:,}" for n in (*numbers, count.vision_tokens, count.images))
            )
        self.console.print(rows)
        for count in counts:
            for reason, number in count.dropped.items():
                named = count.dropped_rows[reason][:_SHOWN_DROPS]
                more = ", ..." if number > len(named) else ""
                self.log(f"{count.name}: {number} rows dropped: {reason} ({', '.join(named)}{more})")
            if count.cut:
                self.log(f"{count.name}: {count.cut} examples cut to data.max_length, at a turn")
            if count.reasoning_left_out:
                what = f"the reasoning of {count.reasoning_left_out} answers is not trained: thinking is off"
                self.log(f"{count.name}: {what}")
            if count.examples > count.kept:
                what = f"{count.kept} rows give {count.examples} examples"
                self.log(
                    f"{count.name}: {what}: the template renders history unlike the turn it was, so turns stand apart"
                )

    def preview(self, parts: dict[str, list[TokenSpan]]) -> None:
        """The first example: what is trained in green, what goes to the vision pool in magenta."""
        colours = (("trained", "bold green"), ", ", ("vision pool", "magenta"), ", ", ("context", "dim"))
        self.console.print(Text.assemble("one example: ", *colours))
        for name, stretches in parts.items():
            text = Text(f"{name}: " if len(parts) > 1 else "")
            for stretch in stretches:
                style = "bold green" if stretch.trained else "magenta" if stretch.vision else "dim"
                shown = stretch.text.replace("\n", "⏎\n")
                text.append(shown + (f"x{stretch.repeat}" if stretch.repeat > 1 else ""), style=style)
            self.console.print(text)

    def progress(self) -> list[TrainerCallback]:
        """A bar with steps, loss and accuracy."""
        from ernie_align.report.progress import ProgressBar

        return [] if self.console.quiet else [ProgressBar(self.console)]

    @contextmanager
    def counting(self) -> Iterator[Callable[[str, int, int], None]]:
        """A line that tells what is being asked, how far it is and how fast it goes."""
        with self.console.status("loading") as status:
            began: dict[str, tuple[float, int]] = {}

            def tick(name: str, done: int, total: int) -> None:
                start, found = began.setdefault(name, (time.monotonic(), done))
                speed = (done - found) / max(1e-9, time.monotonic() - start)
                pace = f", {speed:.1f} a second, {(total - done) / speed:.0f} s to go" if done > found else ""
                there = f" ({found} done before)" if found else ""
                status.update(f"{escape(name)}: {done} of {total} answers{there}{pace}")

            yield tick

    @contextmanager
    def reading(self) -> Iterator[Callable[[str, int, int], None]]:
        """A bar for each source: rows that were read."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            tasks: dict[str, TaskID] = {}

            def tick(name: str, done: int, total: int) -> None:
                if name not in tasks:
                    tasks[name] = progress.add_task(escape(name), total=total)
                progress.update(tasks[name], completed=done)

            yield tick

    def text_parity(self, probe: TextProbe, unchanged: bool) -> None:
        """Whether text is answered as before, bit for bit."""
        what = f"{probe.rows} text sequences, {probe.tokens} tokens, {probe.vocabulary} logits each"
        verdict = (
            "bit-identical before and after" if unchanged else "CHANGED, though nothing was trained that text touches"
        )
        self.console.print(f"text-only logits ({what}): {verdict}", style="bold green" if unchanged else "bold red")


def checks_table(rows: Iterable[tuple[str, str, str]]) -> Table:
    """(what was checked, pass or fail or neither, in words) as a table."""
    styles = {"pass": "green", "fail": "bold red"}
    table = Table("check", "verdict", "what was found", show_lines=True)
    for name, verdict, what in rows:
        table.add_row(name, Text(verdict, styles.get(verdict, "dim")), escape(what))
    return table


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and advice off the terminal; errors still come through."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")

"""Dataset report: tables for the terminal, and a section of the HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ernie_align.dataset_report import DatasetReport, Histogram, SourceReport
from ernie_align.report import charts
from ernie_align.report.text import visible

_SHOWN_ROWS = 3  # per reason; JSON and the page name more
_SHOWN_SCRIPTS = 4


def tables(report: DatasetReport) -> list[RenderableType]:
    """Return the tables of rows and tokens, costs of max_length, images and answers, then every fault and a verdict."""
    parts: list[RenderableType] = [_row_table(report), _length_table(report)]
    if any(source.images_in_row.most for source in report.sources):
        parts.append(_image_table(report))
    parts.append(_answer_table(report))
    faults = [Text(line) for line in _fault_lines(report)]
    return [*parts, *([Group(*faults)] if faults else []), Text(verdict(report))]


def verdict(report: DatasetReport) -> str:
    """Return one line: whether training would stop, how many rows were read, and how long it took."""
    rows, faulty = sum(one.count.rows for one in report.sources), sum(one.faulty for one in report.sources)
    read = f"{rows:,} rows of {len(report.sources)} sources in {report.seconds:.1f} s by {report.workers} workers"
    if report.sound:
        return f"NO FAULTS: {read}"
    unreadable = sum(bool(one.unreadable) for one in report.sources)
    empty = sum(not one.unreadable and not one.faulty and not one.count.kept for one in report.sources)
    counts = ((faulty, "faulty rows"), (unreadable, "unreadable sources"), (empty, "sources with no row left"))
    return f"FAULTS: {', '.join(f'{number:,} {what}' for number, what in counts if number)}; {read}"


def _table(title: str, *columns: str) -> Table:
    table = Table("source", title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _name(source: SourceReport) -> str:
    return escape(visible(f"{source.part}: {source.count.name}"))


def _row_table(report: DatasetReport) -> Table:
    names = ("format", "rows", "kept", "dropped", "faulty", "repeated prompts", "repeated rows", "also in train")
    table = _table("rows", *names)
    for source in report.sources:
        count = source.count
        numbers = (count.rows, count.kept, sum(count.dropped.values()), source.faulty)
        numbers += (source.duplicate_prompts, source.duplicate_rows)
        also_in_train = "-" if source.also_in_train is None else f"{source.also_in_train:,}"
        shown = (f"{number:,}" for number in numbers)
        table.add_row(_name(source), count.format or "unreadable", *shown, also_in_train)
    return table


def _length_table(report: DatasetReport) -> Table:
    """Return the table of tokens per row, and of the rows that each limit would drop."""
    limits = cost_limits(report)
    pools = ("vision pool",) if report.has_vision else ()
    table = _table("tokens per row, and % of rows over each max_length", "tokens", "trained", *pools)
    for name in ("median", "95 %", "max", *(f"{limit:,}" for limit in limits)):
        table.add_column(name, justify="right")
    for source in report.sources:
        count, lengths = source.count, source.lengths
        if not lengths.count:
            continue
        share = [_percent(count.vision_tokens, count.tokens)] if pools else []
        quantiles = [f"{value:,}" for value in (lengths.quantile(0.5), lengths.quantile(0.95), lengths.most)]
        over = [_percent(source.over.get(limit, [0, 0])[0], lengths.count) for limit in limits]
        tokens = [f"{count.tokens:,}", _percent(count.trained, count.tokens)]
        table.add_row(_name(source), *tokens, *share, *quantiles, *over)
    return table


def cost_limits(report: DatasetReport) -> list[int]:
    """Return the limits worth a column: the recipe's, and from the shortest row to the first above the longest."""
    measured = [source for source in report.sources if source.lengths.count]
    most = max((source.lengths.most for source in measured), default=0)
    least = min((source.lengths.least for source in measured), default=0)
    limits = sorted({limit for source in measured for limit in source.over})
    useful = [limit for limit in limits if limit >= least]
    last = next((place for place, limit in enumerate(useful) if limit >= most), len(useful))
    return sorted({*useful[: last + 1], report.max_length})


def _image_table(report: DatasetReport) -> Table:
    names = ("images", "per row", "width", "height", "long : short", "tokens each", "missing or broken", "unplaced")
    table = _table("images: median (minimum to maximum)", *names)
    for source in report.sources:
        ranges = [_format_range(one) for one in (source.images_in_row, source.widths, source.heights)]
        bad = [f"{number:,}" for number in (source.bad_images, source.unplaced_images)]
        aspects, tokens = _format_range(source.aspects, scale=100), _format_range(source.image_tokens)
        table.add_row(_name(source), f"{source.count.images:,}", *ranges, aspects, tokens, *bad)
    return table


def _answer_table(report: DatasetReport) -> Table:
    names = ("answers with reasoning", "empty answers", "chosen = rejected", "cut", "scripts, % of letters")
    table = _table("answers", *names)
    for source in report.sources:
        numbers = (source.empty_answers, source.equal_sides, source.count.cut)
        thinking = _percent(source.thinking, source.answered)
        table.add_row(_name(source), thinking, *(f"{number:,}" for number in numbers), scripts(source))
    return table


def scripts(source: SourceReport) -> str:
    """Return percentages of letters, such as "Latin 93, Han 7"."""
    total = sum(source.letters.values())
    most = sorted(source.letters.items(), key=lambda pair: -pair[1])
    shown = [f"{name} {100 * number / total:.3g}" for name, number in most[:_SHOWN_SCRIPTS]]
    return ", ".join(shown) + (", ..." if len(most) > _SHOWN_SCRIPTS else "") or "-"


def _fault_lines(report: DatasetReport) -> Iterator[str]:
    for source in report.sources:
        yield from map(visible, map(str, source.unreadable))
        for kind, faults in sorted(source.faults.items(), key=lambda pair: -pair[1].rows):
            yield visible(f"{source.count.name}: {faults.rows:,} faulty rows: {kind}")
            for row, what, fix in faults.named[:_SHOWN_ROWS]:
                yield visible(f"    {row}: {what}" + (f" ({fix})" if fix else ""))
            if faults.rows > _SHOWN_ROWS:
                yield f"    and {faults.rows - _SHOWN_ROWS:,} more"
        for reason, number in source.count.dropped.items():
            named = source.count.dropped_rows[reason][:_SHOWN_ROWS]
            more = ", ..." if number > len(named) else ""
            yield visible(f"{source.count.name}: {number:,} rows dropped: {reason} ({', '.join(named)}{more})")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "-"


def _format_range(histogram: Histogram, *, scale: int = 1) -> str:
    if not histogram.count:
        return "-"
    middle, least, most = (
        f"{value / scale:.4g}" for value in (histogram.quantile(0.5), histogram.least, histogram.most)
    )
    return middle if least == most else f"{middle} ({least} to {most})"


# -- a page ---------------------------------------------------------------------------------------------------------


def section(report: DatasetReport) -> dict[str, Any]:
    """Return the variables of a section of page.html.jinja."""
    return {
        "kind": "data",
        "name": "",
        "verdict": verdict(report),
        "sound": report.sound,
        "sources": [_source_section(source, report, f"d{place}") for place, source in enumerate(report.sources)],
        "charts": [],
    }


def _source_section(source: SourceReport, report: DatasetReport, label: str) -> dict[str, Any]:
    count = source.count
    facts = {
        "format": count.format or "unreadable",
        "rows": f"{count.rows:,}",
        "kept": f"{count.kept:,}",
        "dropped": f"{sum(count.dropped.values()):,}",
        "faulty": f"{source.faulty:,}",
        "tokens": f"{count.tokens:,}",
        "trained tokens": _percent(count.trained, count.tokens),
        **({"tokens of the vision pool": _percent(count.vision_tokens, count.tokens)} if report.has_vision else {}),
        "rows that repeat a prompt": f"{source.duplicate_prompts:,}",
        "rows that repeat a row": f"{source.duplicate_rows:,}",
        **({} if source.also_in_train is None else {"prompts also in train": f"{source.also_in_train:,}"}),
        "answers with reasoning": _percent(source.thinking, source.answered),
        "empty answers": f"{source.empty_answers:,}",
        "chosen = rejected": f"{source.equal_sides:,}",
        "images": f"{count.images:,}",
        "rows with a missing, broken or disallowed image": f"{source.bad_images:,}",
        "rows whose placeholders and images differ": f"{source.unplaced_images:,}",
        "scripts, % of letters": scripts(source),
    }
    costs = [
        (f"{limit:,}", f"{rows:,}", _percent(rows, source.lengths.count), f"{tokens:,}", limit == source.max_length)
        for limit, (rows, tokens) in sorted(source.over.items())
    ]
    return {
        "name": f"{source.part}: {count.name}",
        "unreadable": list(map(str, source.unreadable)),
        "facts": facts,
        "costs": costs,
        "faults": [(kind, f"{faults.rows:,}", faults.named) for kind, faults in source.faults.items()],
        "dropped": [(reason, f"{rows:,}", count.dropped_rows[reason]) for reason, rows in count.dropped.items()],
        "charts": [{"title": title, "svg": svg, "note": note} for title, svg, note in _charts(source, label)],
    }


def _charts(source: SourceReport, label: str) -> Iterator[tuple[str, str, str]]:
    drawn = (
        ("Tokens per row, image tokens included", source.lengths, 1, source.max_length),
        ("Images per row", source.images_in_row if source.images_in_row.most else None, 1, None),
        ("Width of images, pixels", source.widths, 1, None),
        ("Height of images, pixels", source.heights, 1, None),
        ("Long side / short side", source.aspects, 100, None),
        ("Tokens per image", source.image_tokens, 1, None),
    )
    for place, (title, histogram, scale, line) in enumerate(drawn):
        if histogram is not None and histogram.count:
            bins = {edge / scale: number for edge, number in histogram.bins.items()}
            note = f"line: max_length {line:,}" if line else ""
            yield title, charts.histogram(bins, label=f"{label}-{place}", line=line), note
    if source.written:
        yield "Rows by the script of most of their letters", charts.bars(source.written, label=f"{label}-scripts"), ""

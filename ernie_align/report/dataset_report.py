"""What the doctor of data found: tables on the terminal, and a section of a page."""

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

_SHOWN_ROWS = 3  # of each reason; JSON and the page name more
_SHOWN_LETTERS = 4  # scripts


def tables(examination: DatasetReport) -> list[RenderableType]:
    """Rows and tokens, images, costs of max_length, then every fault with its first rows."""
    parts: list[RenderableType] = [_rows(examination), _lengths(examination)]
    if any(found.images_in_row.most for found in examination.sources):
        parts.append(_images(examination))
    parts.append(_text_of(examination))
    faults = [Text(line) for line in _faults(examination)]
    return [*parts, *([Group(*faults)] if faults else []), Text(verdict(examination))]


def verdict(examination: DatasetReport) -> str:
    """One line: whether training would stop, and how long it took to know."""
    sources = examination.sources
    rows, faulty = sum(one.count.rows for one in sources), sum(one.faulty for one in sources)
    pace = f"{rows:,} rows of {len(sources)} sources in {examination.seconds:.1f} s by {examination.workers} workers"
    if examination.sound:
        return f"sound: {pace}"
    lost = sum(bool(one.unreadable) for one in sources)
    empty = sum(not one.unreadable and not one.faulty and not one.count.kept for one in sources)
    what = [f"{faulty:,} faulty rows"] * bool(faulty) + [f"{lost} unreadable sources"] * bool(lost)
    return f"NOT SOUND: {', '.join([*what, *[f'{empty} sources of which no row is left'] * bool(empty)])}; {pace}"


def _table(title: str, *columns: str) -> Table:
    table = Table("source", title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _name(found: SourceReport) -> str:
    return escape(visible(f"{found.part}: {found.count.name}"))


def _rows(examination: DatasetReport) -> Table:
    names = ("format", "rows", "kept", "dropped", "faulty", "same prompt", "same row", "also in train")
    table = _table("rows", *names)
    for found in examination.sources:
        count, also = found.count, found.also_in_train
        numbers = (count.rows, count.kept, sum(count.dropped.values()), found.faulty)
        numbers += (found.duplicate_prompts, found.duplicate_rows)
        shown = "-" if also is None else f"{also:,}"
        table.add_row(_name(found), count.format or "unreadable", *(f"{number:,}" for number in numbers), shown)
    return table


def _lengths(examination: DatasetReport) -> Table:
    """Of rows, and how many each limit would cost."""
    limits = costs(examination)
    pools = ("vision pool",) if examination.has_vision else ()
    table = _table("tokens of a row, and what a max_length costs: % of rows", "tokens", "trained", *pools)
    for name in ("median", "95 %", "most", *(f"{limit:,}" for limit in limits)):
        table.add_column(name, justify="right")
    for found in examination.sources:
        count, lengths = found.count, found.lengths
        if not lengths.count:
            continue
        share = [_percent(count.vision_tokens, count.tokens)] if pools else []
        marks = [f"{value:,}" for value in (lengths.quantile(0.5), lengths.quantile(0.95), lengths.most)]
        lost = [_percent(found.over.get(limit, [0, 0])[0], lengths.count) for limit in limits]
        tokens = [f"{count.tokens:,}", _percent(count.trained, count.tokens)]
        table.add_row(_name(found), *tokens, *share, *marks, *lost)
    return table


def costs(examination: DatasetReport) -> list[int]:
    """Limits that are worth a column: the recipe's, and the others from the last that loses all to the first that
    loses nothing.
    """
    measured = [found for found in examination.sources if found.lengths.count]
    most = max((found.lengths.most for found in measured), default=0)
    least = min((found.lengths.least for found in measured), default=0)
    limits = sorted({limit for found in measured for limit in found.over})
    useful = [limit for limit in limits if limit >= least]
    enough = next((place for place, limit in enumerate(useful) if limit >= most), len(useful))
    return sorted({*useful[: enough + 1], examination.max_length})


def _images(examination: DatasetReport) -> Table:
    names = ("images", "a row", "width", "height", "long : short", "tokens each", "missing or broken", "no place")
    table = _table("images: median (least to most)", *names)
    for found in examination.sources:
        spread = [_spread(one) for one in (found.images_in_row, found.widths, found.heights)]
        bad = [f"{number:,}" for number in (found.bad_images, found.unplaced_images)]
        aspects, tokens = _spread(found.aspects, scale=100), _spread(found.image_tokens)
        table.add_row(_name(found), f"{found.count.images:,}", *spread, aspects, tokens, *bad)
    return table


def _text_of(examination: DatasetReport) -> Table:
    names = ("answers that think", "empty answers", "chosen = rejected", "cut", "scripts, % of letters")
    table = _table("answers", *names)
    for found in examination.sources:
        numbers = (found.empty_answers, found.equal_sides, found.count.cut)
        thinking = _percent(found.thinking, found.answered)
        table.add_row(_name(found), thinking, *(f"{number:,}" for number in numbers), scripts(found))
    return table


def scripts(found: SourceReport) -> str:
    """Latin 93, Han 7"""
    total = sum(found.letters.values())
    most = sorted(found.letters.items(), key=lambda pair: -pair[1])
    shown = [f"{name} {100 * number / total:.3g}" for name, number in most[:_SHOWN_LETTERS]]
    return ", ".join(shown) + (", ..." if len(most) > _SHOWN_LETTERS else "") or "-"


def _faults(examination: DatasetReport) -> Iterator[str]:
    for found in examination.sources:
        yield from map(visible, map(str, found.unreadable))
        for kind, reason in sorted(found.faults.items(), key=lambda pair: -pair[1].rows):
            yield visible(f"{found.count.name}: {reason.rows:,} faulty rows: {kind}")
            for row, what, fix in reason.named[:_SHOWN_ROWS]:
                yield visible(f"    {row}: {what}" + (f" ({fix})" if fix else ""))
            if reason.rows > _SHOWN_ROWS:
                yield f"    and {reason.rows - min(_SHOWN_ROWS, reason.rows):,} more"
        for why, number in found.count.dropped.items():
            named = found.count.dropped_rows[why][:_SHOWN_ROWS]
            more = ", ..." if number > len(named) else ""
            yield visible(f"{found.count.name}: {number:,} rows dropped: {why} ({', '.join(named)}{more})")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3g} %" if whole else "-"


def _spread(histogram: Histogram, *, scale: int = 1) -> str:
    if not histogram.count:
        return "-"
    middle, least, most = (
        f"{value / scale:.4g}" for value in (histogram.quantile(0.5), histogram.least, histogram.most)
    )
    return middle if least == most else f"{middle} ({least} to {most})"


# -- a page ---------------------------------------------------------------------------------------------------------


def section(examination: DatasetReport) -> dict[str, Any]:
    """For page.html.jinja."""
    return {
        "kind": "data",
        "name": "",
        "verdict": verdict(examination),
        "sound": examination.sound,
        "limits": costs(examination),
        "sources": [_source(found, examination, f"d{place}") for place, found in enumerate(examination.sources)],
        "charts": [],
    }


def _source(found: SourceReport, examination: DatasetReport, mark: str) -> dict[str, Any]:
    count = found.count
    facts = {
        "format": count.format or "unreadable",
        "rows": f"{count.rows:,}",
        "kept": f"{count.kept:,}",
        "dropped": f"{sum(count.dropped.values()):,}",
        "faulty": f"{found.faulty:,}",
        "tokens": f"{count.tokens:,}",
        "trained tokens": _percent(count.trained, count.tokens),
        **(
            {"tokens of the vision pool": _percent(count.vision_tokens, count.tokens)} if examination.has_vision else {}
        ),
        "rows that repeat a prompt": f"{found.duplicate_prompts:,}",
        "rows that repeat a row": f"{found.duplicate_rows:,}",
        **({} if found.also_in_train is None else {"prompts that are trained on": f"{found.also_in_train:,}"}),
        "answers that think": _percent(found.thinking, found.answered),
        "empty answers": f"{found.empty_answers:,}",
        "chosen = rejected": f"{found.equal_sides:,}",
        "images": f"{count.images:,}",
        "images missing, broken or out of reach": f"{found.bad_images:,}",
        "images without a place, or places without one": f"{found.unplaced_images:,}",
        "scripts, % of letters": scripts(found),
    }
    costs_of = [
        (f"{limit:,}", f"{rows:,}", _percent(rows, found.lengths.count), f"{tokens:,}", limit == found.max_length)
        for limit, (rows, tokens) in sorted(found.over.items())
    ]
    dropped = [(why, f"{number:,}", count.dropped_rows[why]) for why, number in count.dropped.items()]
    return {
        "name": f"{found.part}: {count.name}",
        "unreadable": list(map(str, found.unreadable)),
        "facts": facts,
        "costs": costs_of,
        "faults": [(kind, f"{reason.rows:,}", reason.named) for kind, reason in found.faults.items()],
        "dropped": dropped,
        "charts": [{"title": title, "svg": svg, "note": note} for title, svg, note in _charts(found, mark)],
    }


def _charts(found: SourceReport, mark: str) -> Iterator[tuple[str, str, str]]:
    drawn = (
        ("Tokens of a row, image tokens included", found.lengths, 1, found.max_length),
        ("Images of a row", found.images_in_row if found.images_in_row.most else None, 1, None),
        ("Width of images, pixels", found.widths, 1, None),
        ("Height of images, pixels", found.heights, 1, None),
        ("Long side to short", found.aspects, 100, None),
        ("Tokens of an image", found.image_tokens, 1, None),
    )
    for place, (title, histogram, scale, line) in enumerate(drawn):
        if histogram is not None and histogram.count:
            bins = {edge / scale: number for edge, number in histogram.bins.items()}
            note = f"line: max_length {line:,}" if line else ""
            yield title, charts.histogram(bins, label=f"{mark}-{place}", line=line), note
    if found.written:
        yield "Rows by the script of most of their letters", charts.bars(found.written, label=f"{mark}-scripts"), ""

"""Examples -> tensors, padded or laid end to end, with the pixels of their images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ernie_align.data import media
from ernie_align.data.render import IGNORE_INDEX, Renderer
from ernie_align.data.row import Row, RowFault
from ernie_align.errors import DataError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


def shared_features() -> dict[str, Any]:
    """Columns that the examples of every stage have, and by which rows are counted."""
    from datasets import Value
    from datasets.features import List

    return {
        "media": List({"path": Value("string"), "bytes": Value("binary")}),
        "length": Value("int64"),  # by which training.train_sampling_strategy: group_by_length groups
        "trained": Value("int64"),
        "vision_tokens": Value("int64"),
        "reasoning_left_out": Value("int64"),
        "cut": Value("bool"),
    }


class RowEncoder:
    """Rows for supervised training: ids, labels and image references, one example per sequence.

    max_length: tokens of an example, image tokens included; cut: end a longer row after the last answer that fits.
    """

    def __init__(self, renderer: Renderer, *, max_length: int, cut: bool = False):
        self.renderer = renderer
        self.max_length = max_length
        self.cut = cut

    def features(self) -> dict[str, Any]:
        """Columns of an example."""
        from datasets import Value
        from datasets.features import List

        return {"input_ids": List(Value("int32")), "labels": List(Value("int32")), **shared_features()}

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        """The row's examples. Raises RowFault and RowDropped."""
        if row.responses:
            raise RowFault("a preference row: this stage trains one answer", "train on it with stage: dpo")
        examples = self.renderer.examples(row, max_length=self.max_length, cut=self.cut)
        return [
            vars(example)
            | {"length": len(example.input_ids), "trained": sum(label != IGNORE_INDEX for label in example.labels)}
            for example in examples
        ]


class Collator:
    """Examples -> input_ids (B, T), attention_mask (B, T), labels (B, T) and, with images, pixel_values (patches, C·P²)
    and image_grid_thw (n, 3).

    `rows` (B, 2) and `vision_tokens` () come along for errors and the routing guard: the trainer takes them out before
    the model sees the batch. Which pool a token goes to does not: the backbone derives it.

    row_name: (source, row) -> the row's name, for errors; left: pad on the left, as generation needs it;
    pad_to_multiple_of: T is one of its multiples.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        image_processor: Any = None,
        row_name: Callable[[int, int], str] = lambda source, row: f"row {row} of source {source}",
        left: bool = False,
        pad_to_multiple_of: int | None = None,
    ):
        self.pad_token_id = pad_token_id
        self.image_processor = image_processor
        self.row_name = row_name
        self.how = {"left": left, "multiple": pad_to_multiple_of}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises DataError where an image is gone or broken since the row was judged."""
        import torch

        batch = {
            "input_ids": pad([example["input_ids"] for example in examples], self.pad_token_id, **self.how),
            "attention_mask": pad([[1] * len(example["input_ids"]) for example in examples], 0, **self.how),
            "labels": pad([example["labels"] for example in examples], IGNORE_INDEX, **self.how),
            "rows": torch.tensor([example["rows"] for example in examples]),
            "vision_tokens": torch.tensor(sum(example["vision_tokens"] for example in examples)),
        }
        return batch | load_pixels(examples, self.image_processor, self.row_name)


class PaddingFreeCollator:
    """Examples -> one sequence without padding, document after document, N tokens in all: input_ids, labels and
    position_ids (1, N), and with images pixel_values and image_grid_thw, in the order of their placeholders.

    position_ids begins anew at 0 with each document, by which the model tells them apart (models.documents). There is
    no attention_mask: nothing is padded, and transformers would no longer look for documents. `rows` (documents, 2) and
    `vision_tokens` () come along as from Collator.

    rows: where an example of data.packing.pack finds its members. An example without members is one document itself.
    """

    def __init__(
        self,
        rows: Dataset | None = None,
        *,
        image_processor: Any = None,
        row_name: Callable[[int, int], str] = lambda source, row: f"row {row} of source {source}",
    ):
        self.rows = rows
        self.image_processor = image_processor
        self.row_name = row_name

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises DataError where an image is gone or broken since the row was judged."""
        import torch

        documents = [document for example in examples for document in self._documents(example)]
        ids = [torch.as_tensor(document["input_ids"], dtype=torch.long) for document in documents]
        labels = [torch.tensor(document["labels"], dtype=torch.long) for document in documents]
        for own in labels:
            own[0] = (
                IGNORE_INDEX  # the token before it is another document's: nothing predicts it, as in a row of its own
            )
        batch = {
            "input_ids": torch.cat(ids)[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([torch.arange(len(own)) for own in ids])[None],
            "rows": torch.tensor([document["rows"] for document in documents]),
            "vision_tokens": torch.tensor(sum(document["vision_tokens"] for document in documents)),
        }
        return batch | load_pixels(documents, self.image_processor, self.row_name)

    def _documents(self, example: dict[str, Any]) -> list[dict[str, Any]]:
        if "members" in example:
            columns = self.rows[example["members"]]
            return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return example.get("documents") or [example]


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch the model is given; the rest is labels, masks and names."""
    names = ("input_ids", "attention_mask", "position_ids", "pixel_values", "image_grid_thw")
    return {name: batch[name] for name in names if name in batch}


def load_pixels(
    examples: list[dict[str, Any]], image_processor: Any, row_name: Callable[[int, int], str]
) -> dict[str, torch.Tensor]:
    """pixel_values (patches, C·P²) and image_grid_thw (n, 3) of the examples' images; nothing where there is none.

    Raises DataError naming the row where an image is gone or broken since the row was judged.
    """
    images = []
    for example in examples:
        for image in example["media"]:
            try:
                images.append(media.load_image(image))
            except RowFault as fault:
                raise DataError.at(row_name(*example["rows"]), fault.what, fix=fault.fix) from None
    if not images:
        return {}
    pixels = image_processor(images=images, return_tensors="pt")
    return {"pixel_values": pixels["pixel_values"], "image_grid_thw": pixels["image_grid_thw"]}


def pad(rows: list[list[int]], value: int, *, left: bool = False, multiple: int | None = None) -> torch.Tensor:
    """Rows of different length -> (B, T) int64. multiple: T is the next one of it, at or over the longest row."""
    import torch

    width = max(map(len, rows))
    width += -width % (multiple or 1)
    padded = torch.full((len(rows), width), value, dtype=torch.long)
    for number, row in enumerate(rows):
        start = width - len(row) if left else 0
        padded[number, start : start + len(row)] = torch.as_tensor(row, dtype=torch.long)
    return padded

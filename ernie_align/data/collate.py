"""Collators: encoded examples -> tensors, padded or concatenated, with the pixels of their images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ernie_align.data import media
from ernie_align.data.render import IGNORE_INDEX, Renderer
from ernie_align.data.row import Row, RowFault
from ernie_align.errors import DataError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

RowName = Callable[[int, int], str]


def example_features(*id_columns: str, **scalars: str) -> dict[str, Any]:
    """Return the `datasets` features of an example: lists of ids, scalars by type, and the columns of every stage.

    The statistics of a source are sums over the columns of every stage.
    """
    from datasets import Value
    from datasets.features import List

    # training.train_sampling_strategy: group_by_length reads `length`
    scalars |= dict.fromkeys(("length", "trained", "vision_tokens", "reasoning_left_out"), "int64") | {"cut": "bool"}
    return {
        **{name: List(Value("int32")) for name in id_columns},
        **{name: Value(kind) for name, kind in scalars.items()},
        "media": List({"path": Value("string"), "bytes": Value("binary")}),
    }


class BaseEncoder:
    """Base of the encoders. max_length: tokens per example, image tokens included; cut: shorten longer rows, instead of
    dropping them."""

    def __init__(self, renderer: Renderer, *, max_length: int, cut: bool = False):
        self.renderer = renderer
        self.max_length = max_length
        self.cut = cut


class RowEncoder(BaseEncoder):
    """Encode rows for supervised training: token ids, labels and image references.

    cut: end a longer row after the last answer that fits.
    """

    def features(self) -> dict[str, Any]:
        """Return the columns of an example."""
        return example_features("input_ids", "labels")

    def __call__(self, row: Row) -> list[dict[str, Any]]:
        """Return the examples of a row. Raises RowFault and RowDropped."""
        if row.responses:
            raise RowFault("a preference row, but this stage trains on one answer per row", "train with stage: dpo")
        examples = self.renderer.examples(row, max_length=self.max_length, cut=self.cut)
        return [
            vars(example)
            | {"length": len(example.input_ids), "trained": sum(label != IGNORE_INDEX for label in example.labels)}
            for example in examples
        ]


class BatchCollator:
    """Base of the collators: padding, images, row numbers and vision token counts.

    image_processor: the checkpoint's, None for a text model; row_name: (source, row) -> name of the row in errors;
    pad_to_multiple_of: the padded length T is rounded up to a multiple of it.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        *,
        image_processor: Any = None,
        row_name: RowName = lambda source, row: f"row {row} of source {source}",
        pad_to_multiple_of: int | None = None,
    ):
        self.pad_token_id = pad_token_id
        self.image_processor = image_processor
        self.row_name = row_name
        self.multiple = pad_to_multiple_of

    def _row_columns(self, examples: list[dict[str, Any]], vision_tokens: int | None = None) -> dict[str, torch.Tensor]:
        """Return rows (B, 2), vision_tokens (), and pixel_values and image_grid_thw if the examples have images.

        The trainer removes `rows` (used in errors) and `vision_tokens` (checked by the training monitor) before the
        model sees the batch. The expert pool of each token is not stored: the backbone derives it from input_ids.
        """
        import torch

        if vision_tokens is None:
            vision_tokens = sum(example["vision_tokens"] for example in examples)
        counts = {
            "rows": torch.tensor([example["rows"] for example in examples]),
            "vision_tokens": torch.tensor(vision_tokens),
        }
        return counts | load_pixels(examples, self.image_processor, self.row_name)

    def _pad_completions(self, sequences: Sequence[tuple[list[int], list[int], list[int]]]) -> dict[str, torch.Tensor]:
        """Pad (prompt ids, completion ids, completion mask) to input_ids, attention_mask, completion_mask (B, T)."""
        ids = [[*prompt, *completion] for prompt, completion, _ in sequences]
        masks = [[0] * len(prompt) + [*mask] for prompt, _, mask in sequences]
        return {
            "input_ids": pad(ids, self.pad_token_id, multiple=self.multiple),
            "attention_mask": pad([[1] * len(row) for row in ids], 0, multiple=self.multiple),
            "completion_mask": pad(masks, 0, multiple=self.multiple),
        }


class Collator(BatchCollator):
    """Collate examples to input_ids, attention_mask and labels (B, T), with the columns of BatchCollator.

    left: pad on the left, as generation needs it.
    """

    def __init__(self, pad_token_id: int, *, left: bool = False, **settings: Any):
        super().__init__(pad_token_id, **settings)
        self.left = left

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, labels = ([example[name] for example in examples] for name in ("input_ids", "labels"))
        columns = ((ids, self.pad_token_id), ([[1] * len(row) for row in ids], 0), (labels, IGNORE_INDEX))
        padded = (pad(rows, value, left=self.left, multiple=self.multiple) for rows, value in columns)
        return dict(zip(("input_ids", "attention_mask", "labels"), padded, strict=True)) | self._row_columns(examples)


class PaddingFreeCollator(BatchCollator):
    """Concatenate examples into one sequence of N tokens: input_ids, labels and position_ids (1, N), and the images.

    position_ids restart at 0 with each document; the model separates documents by them (models.packed_attention).
    There is no attention_mask: nothing is padded, and with a mask transformers would not look for documents.

    rows: the data set that the `members` of a packed example (data.packing.pack) index. An example without members is
    one document.
    """

    def __init__(self, rows: Dataset | None = None, **settings: Any):
        super().__init__(**settings)
        self.rows = rows

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        documents = [document for example in examples for document in self._documents(example)]
        ids = [torch.as_tensor(document["input_ids"], dtype=torch.long) for document in documents]
        labels = [torch.tensor(document["labels"], dtype=torch.long) for document in documents]
        for document_labels in labels:
            document_labels[0] = IGNORE_INDEX  # the token before it belongs to another document
        batch = {
            "input_ids": torch.cat(ids)[None],
            "labels": torch.cat(labels)[None],
            "position_ids": torch.cat([torch.arange(len(document_ids)) for document_ids in ids])[None],
        }
        return batch | self._row_columns(documents)

    def _documents(self, example: dict[str, Any]) -> list[dict[str, Any]]:
        if "members" in example:
            columns = self.rows[example["members"]]
            return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return example.get("documents") or [example]


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a batch that the model takes, without labels, masks and row numbers."""
    names = ("input_ids", "attention_mask", "position_ids", "pixel_values", "image_grid_thw")
    return {name: batch[name] for name in names if name in batch}


def load_pixels(examples: list[dict[str, Any]], image_processor: Any, row_name: RowName) -> dict[str, torch.Tensor]:
    """Return pixel_values (patches, C·P²) and image_grid_thw (n, 3) of the examples' images; empty without images.

    Raises DataError naming the row if an image disappeared or broke after its row was validated.
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
    """Pad rows of different length to (B, T) int64. multiple: round T up to a multiple of it."""
    import torch

    width = max(map(len, rows))
    width += -width % (multiple or 1)
    padded = torch.full((len(rows), width), value, dtype=torch.long)
    for number, row in enumerate(rows):
        start = width - len(row) if left else 0
        padded[number, start : start + len(row)] = torch.as_tensor(row, dtype=torch.long)
    return padded

"""The handwritten-digits task: scikit-learn's real images, as PNG files and JSONL rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ernie_align.errors import DataError
from ernie_align.tiny.tokenizer import NUMBERS

NAME_QUESTION = "Which digit is this?"
COMPARE_QUESTION = "Which image shows the larger digit, the first or the second?"
PARITY_QUESTION = "Is this digit odd or even?"

SIDE = 56  # pixels: the smallest image that the model's processor does not resize
SPLITS = {"train": 1347, "val": 90, "test": 360}  # of 1797 images


def make_digits(folder: str | Path, *, seed: int = 0) -> Path:
    """Write the task into `folder` and return the folder.

    train/val/test.jsonl mix three kinds of rows: name the digit in an image, say which of two images shows the larger
    digit, and sums in words without an image. prompts.jsonl has the questions of train.jsonl without answers.
    parity_*.jsonl asks odd or even. inverted_*.jsonl asks for the name of digits with inverted colors.
    preferences*.jsonl has a better and a worse answer to such questions. An image is in the same split in all files.
    Sums are drawn from the same hundred in all splits.
    Raises DataError if scikit-learn is missing or the folder is not empty.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        fix = "pip install 'ernie-align[demo]'"
        raise DataError.at("tiny digits", "scikit-learn, which has the images, is not installed", fix=fix) from None
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise DataError.at(str(folder), "the folder is not empty", fix="give a new folder, or remove this one")
    digits = load_digits()
    (folder / "images").mkdir(parents=True)
    for number, pixels in enumerate(digits.images):
        _save_image(pixels / 16.0, folder / _image(number))
        _save_image(1.0 - pixels / 16.0, folder / _image(number, inverted=True))

    draw = random.Random(seed)
    order = list(range(len(digits.target)))
    draw.shuffle(order)
    labels = [int(label) for label in digits.target]
    start = 0
    for split, size in SPLITS.items():
        numbers = order[start : start + size]
        start += size
        names = [_row([_image(n)], NAME_QUESTION, NUMBERS[labels[n]], "name") for n in numbers]
        mixed = [*names, *_comparisons(numbers, labels, draw, size // 3), *_sums(draw, max(size // 12, 20))]
        draw.shuffle(mixed)
        _write(folder / f"{split}.jsonl", mixed)
        if split == "train":
            _write(folder / "prompts.jsonl", [_prompt(row) for row in mixed])
        parity = [_row([_image(n)], PARITY_QUESTION, ("even", "odd")[labels[n] % 2], "parity") for n in numbers]
        _write(folder / f"parity_{split}.jsonl", parity)
        inverted = [_row([_image(n, inverted=True)], NAME_QUESTION, NUMBERS[labels[n]], "inverted") for n in numbers]
        _write(folder / f"inverted_{split}.jsonl", inverted)
        suffix = "" if split == "train" else f"-{split}"
        _write(folder / f"preferences{suffix}.jsonl", _preferences(numbers, labels, random.Random(seed)))
    return folder


def _image(number: int, *, inverted: bool = False) -> str:
    return f"images/{'inverted_' if inverted else ''}{number:04d}.png"


def _save_image(pixels: Any, path: Path) -> None:
    import numpy as np
    from PIL import Image

    scale = SIDE // pixels.shape[0]
    Image.fromarray(np.kron(np.round(pixels * 255).astype("uint8"), np.ones((scale, scale), dtype="uint8"))).save(path)


def _row(images: list[str], question: str, answer: str, kind: str) -> dict[str, Any]:
    content: Any = [*({"type": "image"} for _ in images), {"type": "text", "text": question}] if images else question
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    row = {"messages": messages, "images": images, "kind": kind, "answer": answer}
    return row if images else {key: value for key, value in row.items() if key != "images"}


def _prompt(row: dict[str, Any]) -> dict[str, Any]:
    """Return a prompt-only row with the question of a messages row; the answer stays as a column."""
    question, _ = row["messages"]
    return {"prompt": [question], **{key: value for key, value in row.items() if key != "messages"}}


def _comparisons(numbers: list[int], labels: list[int], draw: random.Random, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        first, second = draw.sample(numbers, 2)
        if labels[first] != labels[second]:
            answer = "first" if labels[first] > labels[second] else "second"
            rows.append(_row([_image(first), _image(second)], COMPARE_QUESTION, answer, "compare"))
    return rows


def _preferences(numbers: list[int], labels: list[int], draw: random.Random) -> list[dict[str, Any]]:
    """Return pairs of a correct, short answer with a wrong one, or with a correct but wordy one.

    A model trained by SFT on upright digits prefers correct names already, so every second row shows an inverted digit.
    The other rows keep the model from forgetting upright ones.
    """
    rows = []
    for place, number in enumerate(numbers):
        right = NUMBERS[labels[number]]
        if place % 2 == 0:
            wrong = NUMBERS[draw.choice([label for label in range(10) if label != labels[number]])]
            rows.append(_pair(_row([_image(number, inverted=True)], NAME_QUESTION, right, "wrong"), wrong))
        else:
            rows.append(_pair(_row([_image(number)], NAME_QUESTION, right, "wordy"), f"It is the digit {right}."))
    comparisons = _comparisons(numbers, labels, draw, len(numbers) // 8)
    opposite = {"first": "second", "second": "first"}
    sums = _sums(draw, max(len(numbers) // 12, 20))
    rows += [_pair(row, opposite[row["answer"]]) for row in comparisons]
    rows += [_pair(row, draw.choice([word for word in NUMBERS if word != row["answer"]])) for row in sums]
    draw.shuffle(rows)
    return rows


def _pair(row: dict[str, Any], rejected: str) -> dict[str, Any]:
    """Turn a messages row into a preference row with TRL's columns."""
    question, chosen = row.pop("messages")
    return {"prompt": [question], "chosen": [chosen], "rejected": [{"role": "assistant", "content": rejected}], **row}


def _sums(draw: random.Random, count: int) -> list[dict[str, Any]]:
    pairs = draw.sample([(left, right) for left in range(10) for right in range(10)], min(count, 100))
    return [
        _row([], f"What is {NUMBERS[left]} plus {NUMBERS[right]}?", NUMBERS[left + right], "sum")
        for left, right in pairs
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

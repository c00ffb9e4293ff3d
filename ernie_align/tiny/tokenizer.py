"""A small tokenizer with ERNIE 4.5's real special tokens, trained on a page of text when it is made."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

IMAGE_TOKENS = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
_SPECIAL = ("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>", "<|im_start|>", "<|im_end|>")
_TAGS = ("<think>", "</think>", "<tool_list>", "</tool_list>", "<tool_call>", "</tool_call>")

_UNITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")
NUMBERS = (*_UNITS, *_TEENS)

_CORPUS = (
    "\nAssistant: ",
    "Picture 1: Picture 2: Video 1: User: ",
    "Which digit is this? Which image shows the larger digit, the first or the second? Is this digit odd or even?",
    "What is two plus three? Look at both pictures. It is the first. It is the second. odd even",
    "The model reads a picture of a digit, thinks about it, and answers in one word. You are a helpful assistant.",
    "A preference says which of two answers is better: the right and short one, not the wrong or wordy one.",
    '{"name": "add", "arguments": {"left": 1, "right": 2}}',
    *(f" {word} plus {word}" for word in NUMBERS),
    *NUMBERS,
)


def make_tokenizer(template: str, *, vision: bool, vocab_size: int = 640) -> TokenizersBackend:
    """Train a BPE tokenizer over sentencepiece-style pieces with byte fallback, like ERNIE 4.5's.

    template: `text` or `vl`, a chat template in this folder; vision: add image and video tokens; vocab_size: upper
    bound; the page of text yields fewer tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    pieces = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pieces
    special = [*_SPECIAL, *(IMAGE_TOKENS.values() if vision else ())]
    reserved = len(special) + len(_TAGS) + 256
    learner.train_from_iterator(
        [text for text in _CORPUS for _ in range(4)],
        trainers.BpeTrainer(vocab_size=vocab_size - reserved, min_frequency=2, show_progress=False),
    )
    learned = json.loads(learner.to_str())["model"]
    words = sorted(learned["vocab"], key=learned["vocab"].get)
    names = [*special, *_TAGS, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = Tokenizer(
        models.BPE(
            vocab={name: number for number, name in enumerate(names)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pieces
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in _TAGS])
    extra: dict[str, Any] = {"extra_special_tokens": dict(IMAGE_TOKENS)} if vision else {}
    return TokenizersBackend(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        cls_token="<|begin_of_sentence|>",
        sep_token="<|end_of_sentence|>",
        chat_template=files("ernie_align.tiny").joinpath(f"{template}.jinja").read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        **extra,
    )

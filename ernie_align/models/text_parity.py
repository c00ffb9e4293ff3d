"""The certificate: text alone is answered bit for bit as before, because nothing it touches was trained."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ernie_align.models.load import Bundle

ROWS, LENGTH = 8, 64  # of the probe: every row is a different stretch of random text tokens


@dataclass(frozen=True)
class TextProbe:
    """What the model says to a fixed probe of text tokens.

    digest: SHA-256 of all its logits, bit for bit; machine: what computed them, for another may round otherwise.
    """

    digest: str
    rows: int
    tokens: int
    vocabulary: int
    machine: str


def probe_text(bundle: Bundle, *, seed: int = 0) -> TextProbe:
    """Logits of (ROWS, LENGTH) random text tokens, the same tokens for the same model and seed, computed in eval mode.

    Two of them are equal exactly when every logit is equal in every bit.
    """
    import torch

    model = bundle.model
    text_ids = [
        number
        for number in range(len(bundle.tokenizer))
        if number not in (bundle.modality.ids if bundle.modality else ())
    ]
    draw = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(text_ids), (ROWS, LENGTH), generator=draw)
    input_ids = torch.tensor(text_ids)[choice].to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
    finally:
        model.train(was_training)
    bits = logits.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return TextProbe(hashlib.sha256(bits).hexdigest(), ROWS, ROWS * LENGTH, logits.shape[-1], _machine(logits.device))


def _machine(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} with {torch.get_num_threads()} threads" if device.type == "cpu" else device.type

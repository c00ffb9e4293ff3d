"""Text parity check: training only vision parts leaves the logits on text unchanged, bit for bit."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ernie_align.models.load import Bundle

ROWS, LENGTH = 8, 64  # of the probe: random text tokens, different in each row


@dataclass(frozen=True)
class TextProbe:
    """The logits of a model on a fixed batch of text tokens, as a digest.

    digest: SHA-256 of the bits of all logits; machine: the hardware that computed them, since another may round
    differently.
    """

    digest: str
    rows: int
    tokens: int
    vocabulary: int
    machine: str


def probe_text(bundle: Bundle, *, seed: int = 0) -> TextProbe:
    """Hash the logits of (ROWS, LENGTH) random text tokens, computed in eval mode.

    The tokens depend on the tokenizer and the seed only. Two probes are equal if and only if every logit is equal in
    every bit.
    """
    import torch

    model = bundle.model
    vision_ids = bundle.modality.ids if bundle.modality else ()
    text_ids = [token for token in range(len(bundle.tokenizer)) if token not in vision_ids]
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(len(text_ids), (ROWS, LENGTH), generator=generator)
    input_ids = torch.tensor(text_ids)[choice].to(next(model.parameters()).device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
    finally:
        model.train(was_training)
    bits = logits.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    machine = logits.device.type
    if machine == "cuda":
        machine = torch.cuda.get_device_name(logits.device)
    elif machine == "cpu":
        machine = f"{platform.machine()} with {torch.get_num_threads()} threads"
    return TextProbe(hashlib.sha256(bits).hexdigest(), ROWS, ROWS * LENGTH, logits.shape[-1], machine)

"""How a family is cut where its weights are spread over processes: which classes make a unit of their own.

Routers and correction biases stay float32 beside bfloat16 weights, and FSDP2 takes one dtype for what is trained in a
unit: in full fine-tuning each router is a unit apart. Under ZeRO-3 a pool of experts is a leaf, fetched as one,
whichever of its experts the tokens of a process go to.
"""

from __future__ import annotations

from typing import NamedTuple


class Units(NamedTuple):
    """Names of classes. layers, routers: sharded each for itself; experts: fetched as one."""

    layers: tuple[str, ...]
    routers: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()


UNITS: dict[str, Units] = {
    "dense": Units(("Ernie4_5DecoderLayer",)),
    "moe": Units(("Ernie4_5_MoeDecoderLayer",), ("Ernie4_5_MoeTopKRouter",), ("Ernie4_5_MoeExperts",)),
    "vl_moe": Units(
        ("Ernie4_5_VLMoeDecoderLayer", "Ernie4_5_VLMoeVisionBlock"),
        ("Ernie4_5_VLMoeMoeTopKRouter",),
        ("Ernie4_5_VLMoeMoeExperts",),
    ),
}

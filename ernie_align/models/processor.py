"""transformers' ERNIE 4.5 VL processor, with two workarounds.

The stock one cannot be created without torchvision, which its video processor needs; and it returns
`moe_mm_token_type_ids`, which upstream trainers reject as an unknown column and which fails for prompts of different
lengths. The backbone derives that tensor itself (models.routing).
"""

from __future__ import annotations

from typing import Any

from transformers.models.ernie4_5_vl_moe.processing_ernie4_5_vl_moe import Ernie4_5_VLMoeProcessor as _Stock
from transformers.processing_utils import ProcessorMixin

from ernie_align.models.pixels import pixel_backend


class VideoProcessor(_Stock):
    """Processor for images and videos; needs torchvision."""

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> Any:
        """Process inputs as the stock processor does, without `moe_mm_token_type_ids`."""
        return ProcessorMixin.__call__(self, images=images, text=text, videos=videos, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the stock processor, without `moe_mm_token_type_ids`."""
        return [name for name in super().model_input_names if name != "moe_mm_token_type_ids"]


class ImageOnlyProcessor(VideoProcessor):
    """Processor for images only, for use without torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        for kind in ("image", "video"):
            for end in ("", "_start", "_end"):
                for suffix in ("token", "token_id"):
                    setattr(self, f"{kind}{end}_{suffix}", getattr(tokenizer, f"{kind}{end}_{suffix}"))
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def save_pretrained(self, save_directory: str, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save as ProcessorMixin does: the stock class would also copy the font of a video processor."""
        return ProcessorMixin.save_pretrained(self, save_directory, push_to_hub, **kwargs)


# ProcessorMixin writes the class name into the checkpoint, and stock transformers must find its own class.
VideoProcessor.__name__ = ImageOnlyProcessor.__name__ = _Stock.__name__


def build_processor(name: str, revision: str | None, image_processor: Any, tokenizer: Any) -> ProcessorMixin:
    """Create the processor of a checkpoint from its parts."""
    template = tokenizer.chat_template
    if pixel_backend() == "torchvision":
        from transformers.models.ernie4_5_vl_moe.video_processing_ernie4_5_vl_moe import Ernie4_5_VLMoeVideoProcessor

        video_processor = Ernie4_5_VLMoeVideoProcessor.from_pretrained(name, revision=revision)
        return VideoProcessor(image_processor, tokenizer, video_processor, chat_template=template)
    return ImageOnlyProcessor(image_processor, tokenizer, chat_template=template)

"""Paths, bytes and base64 -> images, upright and in RGB; and their size without decoding them."""

from __future__ import annotations

import base64
import binascii
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ernie_align.data.row import RowFault

if TYPE_CHECKING:
    from PIL.Image import Image

_EXIF_ORIENTATION = 0x0112
_EXIF_SIDEWAYS = (5, 6, 7, 8)
_SHORTEST_BASE64 = 256  # characters; a shorter text without a data: prefix is a path


def reference(value: Any, root: Path | None) -> dict[str, Any]:
    """Whatever a row calls an image -> `{"path": ..., "bytes": ...}`, one of them set. Nothing is opened.

    value: path (relative ones start at `root`), bytes, base64 with or without a `data:` prefix, a PIL image, or a
    mapping with `bytes`, `path` or `url`. Raises RowFault for anything else, URLs among it.
    """
    if isinstance(value, dict):
        found = next((value[key] for key in ("bytes", "path", "url", "image") if value.get(key) is not None), None)
        return reference(found, root)
    if isinstance(value, (bytes, bytearray)):
        return {"path": None, "bytes": bytes(value)}
    if isinstance(value, str):
        return _reference_text(value, root)
    if hasattr(value, "save") and hasattr(value, "size"):
        stream = io.BytesIO()
        value.save(stream, format="PNG")
        return {"path": None, "bytes": stream.getvalue()}
    kind = "nothing" if value is None else type(value).__name__
    raise RowFault(f"an image is {kind}", "give a path, bytes or base64")


def _reference_text(text: str, root: Path | None) -> dict[str, Any]:
    if text.startswith(("http://", "https://")):
        raise RowFault(f"{text}: images are not fetched from the network", "download it and give its path")
    head, comma, body = text.partition(",")
    is_data = head.startswith("data:") and head.endswith(";base64") and bool(comma)
    if is_data or len(text) >= _SHORTEST_BASE64:
        try:
            return {"path": None, "bytes": base64.b64decode(body if is_data else text, validate=True)}
        except (binascii.Error, ValueError):
            if is_data:
                raise RowFault(f"{head}: not base64", "encode the image again") from None
    path = Path(text.removeprefix("file://"))
    return {"path": str(path if root is None else root / path), "bytes": None}


def size(image: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels once upright, read from the header. Raises RowFault where there is no image."""
    with _open(image) as opened:
        width, height = opened.size
        try:
            sideways = opened.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
        except Exception as error:
            raise RowFault(f"{_name(image)}: broken image ({error})", "restore or drop it") from None
    return (width, height) if sideways else (height, width)


def load(image: dict[str, Any]) -> Image:
    """The image, decoded, upright, RGB; of an animation the first frame. Raises RowFault where it is broken."""
    from PIL import ImageOps

    with _open(image) as opened:
        try:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):  # 16 and 32 bits a pixel: PIL would clip at 255 instead of scaling
                upright = upright.point(lambda value: value * (1 / 256)).convert("L")
            return upright.convert("RGB")
        except Exception as error:  # decoders of foreign bytes raise whatever comes up: struct.error, EOFError, ...
            raise RowFault(f"{_name(image)}: broken image ({error})", "restore or drop it") from None


def _open(image: dict[str, Any]) -> Image:
    from PIL import Image as images
    from PIL import UnidentifiedImageError

    try:
        return images.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
    except FileNotFoundError:
        raise RowFault(f"{_name(image)}: no such image", "check data.media_root") from None
    except UnidentifiedImageError:
        raise RowFault(f"{_name(image)}: no image", "restore or drop it") from None
    except Exception as error:  # a bomb of pixels, a folder, a header that lies
        raise RowFault(f"{_name(image)}: {error}", "restore or drop it") from None


def _name(image: dict[str, Any]) -> str:
    return image["path"] or f"an image of {len(image['bytes'])} bytes"

"""Paths, bytes, base64 and URLs -> images, upright and in RGB; and their size without decoding them.

What a row names is foreign: a path may lead only into the folders of its Reach, and nothing but a file of one of the
known image formats is opened.
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ernie_align.data.row import RowFault

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 178_956_970  # decoded as RGB 0.5 GB; PIL's own limit, which a program may switch off
MAX_BYTES = 256 << 20  # of an image's file
# PIL knows many more, among them one that runs Ghostscript
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_EXIF_ORIENTATION = 0x0112
_EXIF_SIDEWAYS = (5, 6, 7, 8)
_SHORTEST_BASE64 = 256  # characters; a shorter text without a data: prefix is a path
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?=//)|data:", re.IGNORECASE)


@dataclass(frozen=True)
class MediaAccess:
    """Where a row's images may come from.

    base: folder that relative paths begin at and that no path leaves, None: no path is read; folders: others that are
    read too; urls: whether http(s) is, from any public address or from the hosts that are listed.
    """

    base: Path | None = None
    folders: tuple[Path, ...] = ()
    urls: bool | tuple[str, ...] = False

    def path(self, text: str) -> str:
        """The path of a file inside. Raises RowFault where it leads outside, by `..`, by a link or by itself."""
        if "\0" in text:
            raise RowFault(f"{text[:80]!r}: no path holds a NUL", "name a file", kind="an image path with a NUL")
        if self.base is None:
            fix = "set data.media_root: a hub data set has no folder of its own"
            raise RowFault(f"{text[:80]}: a path, and no folder for it", fix, kind="an image path without a folder")
        path = str(self.base / text)
        try:
            real = os.path.realpath(path)
        except (OSError, ValueError):
            raise RowFault(f"{text[:80]!r}: no path", "name a file", kind="an image path that is none") from None
        if not any(real == folder or real.startswith(folder + os.sep) for folder in map(_real, self._all)):
            what = f"{path[:200]} leads out of {self.base}"
            fix = "move the image into it, set data.media_root, or name its folder under data.media_folders"
            raise RowFault(what, fix, kind="an image outside of data.media_root")
        return path

    @property
    def _all(self) -> tuple[Path, ...]:
        return (self.base, *self.folders)


@functools.lru_cache(maxsize=256)
def _real(folder: Path) -> str:
    return os.path.realpath(folder).rstrip(os.sep)


def image_reference(value: Any, root: Path | MediaAccess | None) -> dict[str, Any]:
    """Whatever a row calls an image -> `{"path": ..., "bytes": ...}`, one of them set. No file is opened.

    value: path (relative ones start at the root), bytes, base64 with or without a `data:` prefix, a PIL image, a URL,
    or a mapping with `bytes`, `path` or `url`; root: what paths may lead to; None for a path that the user typed.
    A URL is fetched if the root says so. Raises RowFault for anything else.
    """
    for _ in range(2):  # {"image_url": {"url": ...}}
        if isinstance(value, dict):
            value = next((value[key] for key in ("bytes", "path", "url", "image") if value.get(key) is not None), None)
    if isinstance(value, (bytes, bytearray)):
        return {"path": None, "bytes": bytes(value)}
    if isinstance(value, str):
        return _reference_text(value, MediaAccess(root) if isinstance(root, Path) else root)
    if hasattr(value, "save") and hasattr(value, "size"):
        stream = io.BytesIO()
        value.save(stream, format="PNG")
        return {"path": None, "bytes": stream.getvalue()}
    kind = "nothing" if value is None else type(value).__name__
    raise RowFault(f"an image is {kind}", "give a path, bytes or base64")


def _reference_text(text: str, reach: MediaAccess | None) -> dict[str, Any]:
    scheme = _SCHEME.match(text)
    kind = scheme.group().lower() if scheme else ""
    if kind in ("http:", "https:"):
        if reach is None or not reach.urls:
            what = f"{_without_secrets(text)}: images are not fetched from the network"
            raise RowFault(what, "download it and give its path, or set data.allow_urls", kind="a URL")
        from ernie_align.data.fetch import fetch

        return {"path": None, "bytes": fetch(text, hosts=reach.urls)}
    if kind not in ("", "file:", "data:"):
        what = f"{_without_secrets(text)}: {kind}// is not read"
        raise RowFault(what, "download it and give its path", kind="a URL of another kind")
    head, comma, body = text.partition(",")
    if kind == "data:":
        if not (head.endswith(";base64") and comma):
            raise RowFault(
                f"{head[:60]}: not base64", "write data:image/png;base64,...", kind="an image that is no base64"
            )
        return {"path": None, "bytes": _decoded(body, head)}
    if len(text) >= _SHORTEST_BASE64 and not kind:
        try:
            return {"path": None, "bytes": _decoded(text, "")}
        except RowFault:
            pass  # a long path
    text = text[len("file://") :] if kind else text
    if not text:
        raise RowFault("an empty path for an image", "name a file, or drop the image")
    return {"path": str(Path(text)) if reach is None else reach.path(text), "bytes": None}


def _decoded(text: str, head: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RowFault(
            f"{head[:60]}: not base64", "encode the image again", kind="an image that is no base64"
        ) from None


def _without_secrets(url: str) -> str:
    """Without user, password, query and fragment, where keys stand."""
    plain = re.split(r"[?#]", url, maxsplit=1)[0]
    return re.sub(r"(?<=//)[^/@]*@", "", plain)[:200]


def image_size(image: dict[str, Any]) -> tuple[int, int]:
    """Height and width in pixels once upright, read from the header. Raises RowFault where there is no image."""
    with _open(image) as opened:
        width, height = opened.size
        try:
            # PIL turns a TIFF by itself, and says its size once turned
            sideways = opened.format != "TIFF" and opened.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
        except Exception as error:
            raise _broken(image, error) from None
    return (width, height) if sideways else (height, width)


def load_image(image: dict[str, Any]) -> Image:
    """The image, decoded, upright, RGB; of an animation the first frame. Raises RowFault where it is broken."""
    from PIL import ImageOps

    with _open(image) as opened:
        if opened.mode == "F":
            what = f"{_name(image)}: pixels are fractions, and nothing says which is white"
            raise RowFault(what, "save it with 8 or 16 bits a channel", kind="an image of fractions")
        try:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):  # 16 and 32 bits a pixel: PIL would clip at 255 instead of scaling
                upright = upright.point(lambda value: value * (1 / 256)).convert("L")
            return upright.convert("RGB")
        except Exception as error:  # decoders of foreign bytes raise whatever comes up: struct.error, EOFError, ...
            raise _broken(image, error) from None


def read_image_bytes(image: dict[str, Any]) -> bytes:
    """The bytes of its file. Raises RowFault where there is none."""
    with _stream(image) as stream:
        return stream.read()


@contextmanager
def _open(image: dict[str, Any]) -> Iterator[Image]:
    from PIL import Image as images
    from PIL import UnidentifiedImageError

    with _stream(image) as stream:
        try:
            opened = images.open(stream, formats=_readable())
            width, height = opened.size
        except UnidentifiedImageError:
            if not stream.seek(0, io.SEEK_END):
                raise RowFault(f"{_name(image)}: an empty file", "restore or drop it", kind="an empty image") from None
            fix = f"restore or drop it; {', '.join(FORMATS)} are read"
            raise RowFault(f"{_name(image)}: no image", fix, kind="a file that is no image") from None
        except images.DecompressionBombError:
            raise _huge(image) from None
        except Exception as error:  # a header that lies
            raise _broken(image, error) from None
        if width * height > MAX_PIXELS:
            raise _huge(image)
        with opened:
            yield opened


def _stream(image: dict[str, Any]) -> BinaryIO:
    """Bytes, or a regular file. Never waits: a pipe or a device is seen before it is read."""
    if image["bytes"] is not None:
        return io.BytesIO(image["bytes"])
    try:
        descriptor = os.open(image["path"], os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        fix = "check the path; data.media_root says where paths begin"
        raise RowFault(f"{_name(image)}: no such image", fix, kind="a missing image") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RowFault(f"{_name(image)}: {reason}", "restore or drop it", kind="an unreadable image") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
        os.close(descriptor)
        if stat.S_ISREG(found.st_mode):
            what = f"{_name(image)}: {found.st_size:,} bytes are over {MAX_BYTES:,}"
            raise RowFault(what, "save it smaller", kind="a huge image file")
        what = f"{_name(image)}: {'a folder' if stat.S_ISDIR(found.st_mode) else 'a pipe or a device'}, no file"
        raise RowFault(what, "name an image file", kind="an image that is no file")
    return os.fdopen(descriptor, "rb")


@functools.cache
def _readable() -> tuple[str, ...]:
    from PIL import Image as images

    images.init()
    return tuple(name for name in FORMATS if name in images.OPEN)


def _huge(image: dict[str, Any]) -> RowFault:
    what = f"{_name(image)}: over {MAX_PIXELS:,} pixels"
    return RowFault(what, "save it smaller", kind="an image of too many pixels")


def _broken(image: dict[str, Any], error: Exception) -> RowFault:
    return RowFault(f"{_name(image)}: broken image ({error})", "restore or drop it", kind="a broken image")


def _name(image: dict[str, Any]) -> str:
    return image["path"] or f"an image of {len(image['bytes'])} bytes"

"""Images: paths, bytes, base64 and URLs -> upright RGB images, and their size without decoding them.

The values of rows are untrusted: a path may lead only into the folders of its MediaAccess, and only files of known
image formats are opened.
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

MAX_PIXELS = 178_956_970  # 0.5 GB decoded as RGB; PIL's own limit, which a program may switch off
MAX_BYTES = 256 << 20  # of an image file
# PIL knows many more formats, among them one that runs Ghostscript
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_EXIF_ORIENTATION = 0x0112
_EXIF_SIDEWAYS = (5, 6, 7, 8)
_SHORTEST_BASE64 = 256  # characters; a shorter text without a data: prefix is a path
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?=//)|data:", re.IGNORECASE)


@dataclass(frozen=True)
class MediaAccess:
    """Locations that the images of rows may come from.

    base: folder of relative paths, which no path may leave; None: no path is allowed; folders: other allowed folders;
    urls: True allows http(s) URLs of any public address, a tuple allows the listed hosts.
    """

    base: Path | None = None
    folders: tuple[Path, ...] = ()
    urls: bool | tuple[str, ...] = False

    def resolve(self, text: str) -> str:
        """Return the path of a file in an allowed folder. Raises RowFault if `..` or a link leads outside."""
        if "\0" in text:
            raise RowFault(f"{text[:80]!r}: a NUL in an image path", "name a file", kind="an image path with a NUL")
        if self.base is None:
            fix = "set data.media_root: a hub data set has no folder of its own"
            raise RowFault(f"{text[:80]}: a path without a folder", fix, kind="an image path without a folder")
        path = str(self.base / text)
        try:
            real = os.path.realpath(path)
        except (OSError, ValueError):
            raise RowFault(f"{text[:80]!r}: not a path", "name a file", kind="an image path that is invalid") from None
        allowed = map(_real_folder, (self.base, *self.folders))
        if not any(real == folder or real.startswith(folder + os.sep) for folder in allowed):
            what = f"{path[:200]} leads out of {self.base}"
            fix = "move the image into it, set data.media_root, or name its folder under data.media_folders"
            raise RowFault(what, fix, kind="an image outside of data.media_root")
        return path


@functools.lru_cache(maxsize=256)
def _real_folder(folder: Path) -> str:
    return os.path.realpath(folder).rstrip(os.sep)


def image_reference(value: Any, root: Path | MediaAccess | None) -> dict[str, Any]:
    """Convert a row's image value to `{"path": ..., "bytes": ...}`, one of them set. Opens no file.

    value: path, bytes, base64 with or without a `data:` prefix, a PIL image, a URL, or a mapping with `bytes`, `path`
    or `url`; root: the allowed locations, None for a path that the user typed. A URL is fetched if the root allows it.
    Raises RowFault for anything else.
    """
    for _ in range(2):  # {"image_url": {"url": ...}}
        if isinstance(value, dict):
            value = next((value[key] for key in ("bytes", "path", "url", "image") if value.get(key) is not None), None)
    if isinstance(value, (bytes, bytearray)):
        return {"path": None, "bytes": bytes(value)}
    if isinstance(value, str):
        return _text_reference(value, MediaAccess(root) if isinstance(root, Path) else root)
    if hasattr(value, "save") and hasattr(value, "size"):
        stream = io.BytesIO()
        value.save(stream, format="PNG")
        return {"path": None, "bytes": stream.getvalue()}
    kind = "nothing" if value is None else type(value).__name__
    raise RowFault(f"an image is {kind}", "give a path, bytes or base64")


def _text_reference(text: str, access: MediaAccess | None) -> dict[str, Any]:
    scheme = _SCHEME.match(text)
    kind = scheme.group().lower() if scheme else ""
    if kind in ("http:", "https:"):
        if access is None or not access.urls:
            what = f"{_without_secrets(text)}: images are not fetched from the network"
            raise RowFault(what, "download it and give its path, or set data.allow_urls", kind="a URL")
        from ernie_align.data.fetch import fetch

        return {"path": None, "bytes": fetch(text, hosts=access.urls)}
    if kind not in ("", "file:", "data:"):
        what = f"{_without_secrets(text)}: {kind}// is not supported"
        raise RowFault(what, "download it and give its path", kind="a URL of another kind")
    head, comma, body = text.partition(",")
    if kind == "data:":
        if not (head.endswith(";base64") and comma):
            raise _not_base64(head, "write data:image/png;base64,...")
        return {"path": None, "bytes": _decode_base64(body, head)}
    if len(text) >= _SHORTEST_BASE64 and not kind:
        try:
            return {"path": None, "bytes": _decode_base64(text, "")}
        except RowFault:
            pass  # a long path
    text = text[len("file://") :] if kind else text
    if not text:
        raise RowFault("an empty path for an image", "name a file, or drop the image")
    return {"path": str(Path(text)) if access is None else access.resolve(text), "bytes": None}


def _decode_base64(text: str, head: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _not_base64(head, "encode the image again") from None


def _not_base64(head: str, fix: str) -> RowFault:
    return RowFault(f"{head[:60]}: not base64", fix, kind="an image that is not base64")


def _without_secrets(url: str) -> str:
    """Remove user, password, query and fragment, which may contain keys."""
    plain = re.split(r"[?#]", url, maxsplit=1)[0]
    return re.sub(r"(?<=//)[^/@]*@", "", plain)[:200]


def image_size(image: dict[str, Any]) -> tuple[int, int]:
    """Return height and width in pixels of the upright image, read from its header. Raises RowFault if unreadable."""
    with _open(image) as opened:
        width, height = opened.size
        try:
            # PIL rotates a TIFF itself and reports the rotated size
            sideways = opened.format != "TIFF" and opened.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
        except Exception as error:
            raise _broken(image, error) from None
    return (width, height) if sideways else (height, width)


def load_image(image: dict[str, Any]) -> Image:
    """Decode an image: upright, RGB, the first frame of an animation. Raises RowFault if it is broken."""
    from PIL import ImageOps

    with _open(image) as opened:
        if opened.mode == "F":
            what = f"{_name(image)}: floating-point pixels without a known white level"
            raise RowFault(what, "save it with 8 or 16 bits per channel", kind="an image of floating-point pixels")
        try:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode.startswith("I"):  # 16 and 32 bits per pixel: PIL would clip at 255 instead of scaling
                upright = upright.point(lambda value: value * (1 / 256)).convert("L")
            return upright.convert("RGB")
        except Exception as error:  # decoders raise many kinds for broken bytes: struct.error, EOFError, ...
            raise _broken(image, error) from None


def read_image_bytes(image: dict[str, Any]) -> bytes:
    """Return the bytes of an image file. Raises RowFault if it cannot be read."""
    with _open_stream(image) as stream:
        return stream.read()


@contextmanager
def _open(image: dict[str, Any]) -> Iterator[Image]:
    from PIL import Image as images
    from PIL import UnidentifiedImageError

    with _open_stream(image) as stream:
        try:
            opened = images.open(stream, formats=_readable_formats())
            width, height = opened.size
        except UnidentifiedImageError:
            if not stream.seek(0, io.SEEK_END):
                raise RowFault(f"{_name(image)}: an empty file", "restore or drop it", kind="an empty image") from None
            fix = f"restore or drop it; supported formats: {', '.join(FORMATS)}"
            raise RowFault(f"{_name(image)}: not an image", fix, kind="a file that is not an image") from None
        except images.DecompressionBombError:
            raise _too_many_pixels(image) from None
        except Exception as error:  # a corrupt header
            raise _broken(image, error) from None
        if width * height > MAX_PIXELS:
            raise _too_many_pixels(image)
        with opened:
            yield opened


def _open_stream(image: dict[str, Any]) -> BinaryIO:
    """Open the image's bytes or its regular file. Never blocks: a pipe or a device is detected before it is read."""
    if image["bytes"] is not None:
        return io.BytesIO(image["bytes"])
    try:
        descriptor = os.open(image["path"], os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        fix = "check the path; relative paths start at data.media_root"
        raise RowFault(f"{_name(image)}: no such image", fix, kind="a missing image") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RowFault(f"{_name(image)}: {reason}", "restore or drop it", kind="an unreadable image") from None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        what = f"{_name(image)}: {status.st_size:,} bytes are over the limit of {MAX_BYTES:,}"
        raise RowFault(what, "save it smaller", kind="a huge image file")
    what = f"{_name(image)}: {'a folder' if stat.S_ISDIR(status.st_mode) else 'a pipe or a device'}, not a file"
    raise RowFault(what, "name an image file", kind="an image that is not a file")


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    from PIL import Image as images

    images.init()
    return tuple(name for name in FORMATS if name in images.OPEN)


def _too_many_pixels(image: dict[str, Any]) -> RowFault:
    what = f"{_name(image)}: over {MAX_PIXELS:,} pixels"
    return RowFault(what, "save it smaller", kind="an image of too many pixels")


def _broken(image: dict[str, Any], error: Exception) -> RowFault:
    return RowFault(f"{_name(image)}: broken image ({error})", "restore or drop it", kind="a broken image")


def _name(image: dict[str, Any]) -> str:
    return image["path"] or f"an image of {len(image['bytes'])} bytes"

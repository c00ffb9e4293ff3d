"""Malicious images, paths and URLs are refused by name, without hanging and without reading other files."""

from __future__ import annotations

import base64
import io
import json
import os
import resource
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from ernie_align.data import media
from ernie_align.data.collate import RowEncoder
from ernie_align.data.fetch import fetch
from ernie_align.data.load import encode_sample, encode_source
from ernie_align.data.media import MediaAccess
from ernie_align.data.row import RowFault
from ernie_align.data.sources import Source
from ernie_align.errors import DataError
from ernie_align.recipe import DataBlock, SourceBlock
from tests.support.runs import write_rows


def opened(path):
    image = {"path": str(path), "bytes": None}
    size = media.image_size(image)
    loaded = media.load_image(image)
    assert loaded.size == size[::-1]  # the size that is counted is the size that is split into patches
    return loaded


def refused(path, kind):
    for look in (media.image_size, media.load_image):
        with pytest.raises(RowFault) as caught:
            look({"path": str(path), "bytes": None})
    assert caught.value.kind == kind and str(path) in caught.value.what and caught.value.fix


def png(width, height, *, data=b"", chunks=()):
    """Return a PNG whose header claims this size."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*pair) for pair in chunks), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# -- images -----------------------------------------------------------------------------------------------------------


def test_a_billion_pixels_are_detected_before_decoding(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tmp_path / "a.png").write_bytes(png(40_000, 30_000, data=zlib.compress(b"\0" * 1000)))
    refused(tmp_path / "a.png", "an image of too many pixels")
    (tmp_path / "b.png").write_bytes(png(13_000, 14_000, data=zlib.compress(b"\0" * 1000)))
    refused(tmp_path / "b.png", "an image of too many pixels")
    # kilobytes; decoded as RGB the first alone would be 3.6 GB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_compressed_comment_is_not_inflated(tmp_path):
    comment = b"a\0\0" + zlib.compress(b"\0" * (100 << 20), 1)
    pixels = zlib.compress(b"\0" * 31 * 10)
    (tmp_path / "a.png").write_bytes(png(10, 10, data=pixels, chunks=[(b"zTXt", comment)]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "a.png", "a broken image")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_a_truncated_image_is_refused_or_complete(format, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype="uint8"))
    stream = io.BytesIO()
    noise.save(stream, format=format)
    data, path = stream.getvalue(), tmp_path / "a.png"
    refused_count = 0
    for size in range(0, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:size])
        try:
            opened(path)
        except RowFault as fault:
            refused_count += 1
            assert fault.kind in ("a broken image", "an empty image", "a file that is not an image")
    assert refused_count > 50  # of 60


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_an_image_with_corrupt_bytes_is_refused_or_accepted(format, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype="uint8"))
    stream = io.BytesIO()
    noise.save(stream, format=format)
    draw, path = np.random.default_rng(1), tmp_path / "a.png"
    for _ in range(60):
        data = bytearray(stream.getvalue())
        for place in draw.integers(0, min(len(data), 400), 3):
            data[place] = draw.integers(0, 256)
        path.write_bytes(data)
        try:
            size = media.image_size({"path": str(path), "bytes": None})
            loaded = media.load_image({"path": str(path), "bytes": None})
        except RowFault:
            continue
        assert loaded.size == size[::-1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_rotated_image_is_counted_as_it_is_split(format, orientation, tmp_path):
    image = Image.new("RGB", (30, 10))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.img", format=format, exif=exif)
    assert opened(tmp_path / "a.img").size == ((10, 30) if orientation > 4 else (30, 10))


def test_files_that_only_have_the_name_of_an_image(tmp_path):
    files = {
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "html.png": b"<!DOCTYPE html><html><img src=x></html>",
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(a) run\n",  # runs Ghostscript
        "pdf.png": b"%PDF-1.4\n",
        "zip.png": b"PK\x03\x04" + b"\0" * 50,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "a file that is not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    refused(tmp_path / "empty.png", "an empty image")
    Image.fromarray(np.zeros((9, 9), dtype="float32")).save(tmp_path / "a.tif")
    with pytest.raises(RowFault, match="floating-point"):
        media.load_image({"path": str(tmp_path / "a.tif"), "bytes": None})


def test_a_wrong_extension_and_one_pixel_are_fine(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "a.jpg", format="PNG")
    assert opened(tmp_path / "a.jpg").size == (1, 1)
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        frames[0].save(tmp_path / "b", format=format, save_all=True, append_images=frames[1:])
        red, _, blue = opened(tmp_path / "b").getpixel((0, 0))
        assert red > 240 and blue < 15  # the first frame; WebP loses a little


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Make inside/ok.png, a secret file outside of that folder, and links to it."""
    inside = tmp_path / "inside"
    inside.mkdir()
    for path in (inside / "ok.png", tmp_path / "secret.png", tmp_path / "inside2.png"):
        Image.new("RGB", (9, 9)).save(path)
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "up").symlink_to(tmp_path)
    (inside / "good").symlink_to(inside / "ok.png")
    (inside / "loop").symlink_to(inside / "loop")
    (inside / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(inside / "pipe.png")
    (inside / "folder.png").mkdir()
    return inside


OUTSIDE = [
    "../secret.png",
    "../inside2.png",
    "folder.png/../../secret.png",
    "link.png",
    "up/secret.png",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/environ",
    "file:///etc/passwd",
    "FILE://../secret.png",
    "zero.png",
    "../" * 50 + "etc/passwd",
]
UNREADABLE = ["pipe.png", "folder.png", "", "a\0b", "none.png", "ok.png/x", "~/x", "a/" * 3000, "é" * 250, "loop"]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: path[:20])
def test_no_path_leads_out_of_its_folder(folder, path):
    for value in (path, {"path": path}, {"url": path}, {"url": {"url": path}}):
        with pytest.raises(RowFault) as caught:
            media.image_reference(value, folder)
        assert caught.value.kind == "an image outside of data.media_root" and "media_folders" in caught.value.fix


@pytest.mark.parametrize("path", UNREADABLE, ids=lambda path: repr(path[:12]))
def test_a_path_without_a_file_is_refused_at_once(folder, path):
    began = time.monotonic()
    with pytest.raises(RowFault):
        media.image_size(media.image_reference(path, folder))
    assert time.monotonic() - began < 5  # reading a pipe would block forever


def test_paths_inside_are_read_in_any_notation(folder):
    for path in ("ok.png", "./ok.png", "good", "up/inside/ok.png", str(folder / "ok.png"), f"file://{folder}/ok.png"):
        assert media.image_size(media.image_reference(path, folder)) == (9, 9)
    access = MediaAccess(folder, (folder.parent,))
    for path in ("link.png", "../secret.png", str(folder.parent / "secret.png")):
        assert media.image_size(media.image_reference(path, access)) == (9, 9)
    assert media.image_size(media.image_reference(str(folder.parent / "secret.png"), None)) == (
        9,
        9,
    )  # typed by the user


def test_paths_of_a_data_set_without_a_folder_are_not_read():
    with pytest.raises(RowFault, match="a path without a folder") as caught:
        media.image_reference("/etc/passwd", MediaAccess())
    assert "data.media_root" in caught.value.fix


@pytest.mark.parametrize(
    "text", ["ftp://a/b.png", "s3://a/b.png", "gopher://x", "data:image/png,abc", "data:;base64,%%"]
)
def test_other_schemes_are_refused(folder, text):
    with pytest.raises(RowFault) as caught:
        media.image_reference(text, folder)
    assert caught.value.kind in ("a URL of another kind", "an image that is not base64")


def source_of(path, **keys):
    block = SourceBlock(path=str(path))
    return Source(block, DataBlock(train=[block], **keys))


def row_with(image):
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "two"}]
    return {"messages": turns, "images": [image]}


def test_a_row_that_leads_outside_is_refused_with_its_line(folder, renderers):
    path = write_rows(folder / "rows.jsonl", [row_with("ok.png"), row_with("../secret.png"), row_with("pipe.png")])
    encode = RowEncoder(renderers["vl_moe"], max_length=64)
    with pytest.raises(DataError) as caught:
        encode_source(source_of(path), encode)
    assert [fault.where for fault in caught.value.faults] == [f"{path}:2", f"{path}:3"]
    path = write_rows(folder / "rows.jsonl", [row_with("link.png"), row_with(str(folder.parent / "secret.png"))])
    _, count = encode_source(source_of(path, media_folders=[str(folder.parent)]), encode)
    assert count.images == 2


# -- URLs -------------------------------------------------------------------------------------------------------------


def _png():
    stream = io.BytesIO()
    Image.new("RGB", (60, 60)).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def server():
    """A server that answers correctly, too much, too slowly, not at all, or redirects; `requests` has the paths."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            name = self.path.split("?")[0].strip("/")
            data = _png()
            if name.startswith("to-"):
                place = {
                    "to-file": "file:///etc/passwd",
                    "to-other": f"http://localhost:{port}/ok.png",
                    "to-ok": "/ok.png",
                    "to-itself": "/to-itself",
                }[name]
                self.send_response(302)
                self.send_header("Location", place)
                self.end_headers()
                return
            self.send_response(200 if name != "gone.png" else 404)
            if name == "announced.png":
                self.send_header("Content-Length", str(10**12))
            elif name == "short.png":
                self.send_header("Content-Length", str(len(data) + 10))
            self.end_headers()
            try:
                while name == "endless.png":
                    self.wfile.write(b"\0" * 65536)
                while name == "slow.png":
                    self.wfile.write(b"\0")
                    time.sleep(0.05)
                self.wfile.write(data)
            except OSError:
                pass  # the client is gone

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests, port = [], server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{port}"
    yield server
    server.shutdown()
    server.server_close()


def test_no_url_is_fetched_unless_the_recipe_says_so(server, tmp_path, renderers):
    url = f"{server.url.replace('//', '//user:pass@')}/ok.png?key=secret"
    path = write_rows(tmp_path / "rows.jsonl", [row_with(url)])
    with pytest.raises(DataError, match="not fetched") as caught:
        encode_sample(source_of(path), RowEncoder(renderers["vl_moe"], max_length=64))
    assert "allow_urls" in caught.value.faults[0].fix and not server.requests
    assert "secret" not in str(caught.value) and "pass@" not in str(caught.value)


def test_the_image_of_an_allowed_host_is_fetched_and_stored(server, tmp_path, renderers):
    path = write_rows(
        tmp_path / "rows.jsonl", [row_with(f"{server.url}/ok.png?key=1"), row_with(f"{server.url}/to-ok")]
    )
    examples, count = encode_source(
        source_of(path, allow_urls=["127.0.0.1"]), RowEncoder(renderers["vl_moe"], max_length=64)
    )
    assert count.images == 2 and server.requests == ["/ok.png?key=1", "/to-ok", "/ok.png"]
    server.shutdown()  # encoded rows need no network
    assert media.load_image(examples[0]["media"][0]).size == (60, 60)


def test_any_host_means_any_public_host(server, tmp_path, renderers):
    path = write_rows(tmp_path / "rows.jsonl", [row_with(f"{server.url}/ok.png")])
    with pytest.raises(DataError, match="not public"):
        encode_sample(source_of(path, allow_urls=True), RowEncoder(renderers["vl_moe"], max_length=64))
    for address in ("http://169.254.169.254/latest", "http://10.0.0.1/", "http://[::1]/", "http://0.0.0.0/"):
        with pytest.raises(RowFault, match="not public"):
            fetch(address, hosts=True, max_seconds=5)
    assert not server.requests


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/announced.png", "1,000,000,000,000 bytes are over the limit"),
        ("/endless.png", "over 200,000 bytes"),
        ("/slow.png", "took over 1 s"),
        ("/short.png", "bytes arrived"),
        ("/gone.png?key=secret", "answered 404"),
        ("/to-file", "file: is not supported"),
        ("/to-other", "data.allow_urls does not name this host"),
        ("/to-itself", "more than 3 redirects"),
    ],
)
def test_a_url_is_bounded_in_time_and_size(server, path, says):
    began = time.monotonic()
    with pytest.raises(RowFault, match=says) as caught:
        fetch(server.url + path, hosts=("127.0.0.1",), max_bytes=200_000, max_seconds=1)
    assert time.monotonic() - began < 5 and "secret" not in caught.value.what


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://x:99999/", "http://a b/", "http://127.0.0.1:1/", "http:///x"]
)
def test_invalid_urls_are_refused(url):
    with pytest.raises(RowFault):
        fetch(url, hosts=("127.0.0.1", "x", "a b"), max_seconds=5)


def test_base64_that_is_not_an_image_is_refused(tmp_path):
    text = "data:image/png;base64," + base64.b64encode(json.dumps({"a": 1}).encode()).decode()
    with pytest.raises(RowFault, match="not an image"):
        media.image_size(media.image_reference(text, tmp_path))

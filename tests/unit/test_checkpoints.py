"""The manifest of a folder reveals every change."""

from __future__ import annotations

import hashlib
import json

from ernie_align import checkpoints
from ernie_align.checkpoints import MANIFEST, integrity_error, write_manifest


def test_a_change_of_size_is_found(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.bin").write_bytes(b"12345")
    assert integrity_error(tmp_path) == "its write was interrupted"
    write_manifest(tmp_path)
    assert integrity_error(tmp_path) is None
    (tmp_path / "deep" / "a.bin").write_bytes(b"1234")
    assert integrity_error(tmp_path) == "deep/a.bin has 4 bytes instead of 5"


def test_an_unreadable_manifest_is_reported(tmp_path):
    (tmp_path / "a").write_text("a")
    for content in ("", "[]", '{"a": {}}', '{"a": "b"}', "{"):
        (tmp_path / MANIFEST).write_text(content)
        assert integrity_error(tmp_path).startswith(f"{MANIFEST} cannot be read") or content == "[]"
    (tmp_path / MANIFEST).write_text('{"a": 1}')  # of earlier versions
    assert integrity_error(tmp_path, hashes=True) is None


def test_hashes_are_those_of_sha256sum_one_for_each_piece(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "empty").touch()
    write_manifest(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["a"] == {"size": 10, "sha256": [hashlib.sha256(b"0123456789").hexdigest()]}
    assert manifest["empty"]["sha256"] == [hashlib.sha256(b"").hexdigest()]
    monkeypatch.setattr(checkpoints, "_PIECE", 4)
    write_manifest(tmp_path)
    pieces = [hashlib.sha256(piece).hexdigest() for piece in (b"0123", b"4567", b"89")]
    assert json.loads((tmp_path / MANIFEST).read_text())["a"]["sha256"] == pieces
    (tmp_path / "a").write_bytes(b"012345678x")
    assert integrity_error(tmp_path) is None and "sha256 differs" in integrity_error(tmp_path, hashes=True)

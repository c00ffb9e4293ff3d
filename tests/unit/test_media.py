"""Images are loaded upright and in RGB, or an error says what is wrong with them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ernie_align.data import media
from ernie_align.data.row import RowFault
from ernie_align.models.pixels import ImageSizes


def saved(image, path, **options):
    image.save(path, **options)
    return {"path": str(path), "bytes": None}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image = saved(Image.new("RGB", (20, 10), (200, 0, 0)).convert(mode), path)
    assert media.image_size(image) == (10, 20)
    loaded = media.load_image(image)
    assert (loaded.mode, loaded.size) == ("RGB", (20, 10))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 100, dtype="uint16").reshape(10, 10)
    loaded = np.asarray(media.load_image(saved(Image.fromarray(ramp), tmp_path / "a.png")))[..., 0]
    # 16 bits to 8 drops the low byte: off by less than one level
    assert np.abs(loaded.astype(float) - ramp / 256).max() < 1


def test_a_photo_taken_sideways_becomes_upright(tmp_path):
    image = Image.new("RGB", (30, 10))
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6
    sideways = saved(image, tmp_path / "a.png", exif=exif)
    assert media.image_size(sideways) == (30, 10)
    upright = media.load_image(sideways)
    assert upright.size == (10, 30) and upright.getpixel((9, 0)) == (255, 255, 255)


def test_the_first_frame_of_an_animation_is_loaded(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert media.load_image({"path": str(tmp_path / "a.gif"), "bytes": None}).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_refused(format, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype="uint8"))
    stream = io.BytesIO()
    noise.save(stream, format=format)
    path = tmp_path / "half"
    path.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    with pytest.raises(RowFault, match="half"):
        media.load_image({"path": str(path), "bytes": None})


def test_missing_files_and_other_formats_are_refused(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(RowFault, match=r"a\.png: not an image"):
        media.image_size({"path": str(tmp_path / "a.png"), "bytes": None})
    with pytest.raises(RowFault, match="no such image"):
        media.image_size({"path": str(tmp_path / "b.png"), "bytes": None})
    with pytest.raises(RowFault, match="an image of 3 bytes: not an image"):
        media.load_image({"path": None, "bytes": b"abc"})
    with pytest.raises(RowFault):
        media.load_image({"path": str(tmp_path), "bytes": None})


def test_sizes_are_those_of_transformers():
    """Random sizes from 1 to 3000 pixels per side, and the extremes."""
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

    processor, sizes = Ernie4_5_VLMoeImageProcessorPil(), ImageSizes()
    draw = np.random.default_rng(0)
    pairs = [
        *draw.integers(1, 3000, (2000, 2)).tolist(),
        [1, 1],
        [1, 200],
        [56, 56],
        [20000, 20000],
        [13, 14],
        [42, 42],
    ]
    for height, width in pairs:
        if max(height, width) > 200 * min(height, width):
            continue
        grid = sizes.grid(height, width)
        assert int(np.prod(grid)) == processor.get_number_of_image_patches(height, width), (height, width)
        assert sizes.tokens(grid) * 4 == np.prod(grid)
    small = ImageSizes.from_config({"size": {"shortest_edge": 784, "longest_edge": 7840}, "patch_size": 14})
    assert np.prod(small.grid(500, 500)) <= 7840 / 14**2


def test_the_processed_image_has_the_predicted_grid(tmp_path):
    from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

    for height, width in ((56, 56), (10, 300), (333, 57), (1, 1)):
        image = saved(Image.new("L", (width, height)), tmp_path / "a.png")
        processed = Ernie4_5_VLMoeImageProcessorPil()(images=[media.load_image(image)], return_tensors="pt")
        assert tuple(processed["image_grid_thw"][0].tolist()) == ImageSizes().grid(*media.image_size(image))


def test_an_aspect_over_200_is_refused():
    with pytest.raises(ValueError, match="the aspect ratio 201 exceeds 200"):
        ImageSizes().grid(1, 201)
    assert ImageSizes().grid(1, 200)

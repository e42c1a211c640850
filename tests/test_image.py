"""Any PNG, JPEG or WebP becomes an upright RGB picture on white, or is refused with a reason that can be counted."""
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from data import BadSample, load_image


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def one_colour(mode, colour, size=(8, 6)):
    return Image.new(mode, size, colour)


def close(image, colour, tolerance=3):
    return image.mode == "RGB" and np.abs(np.asarray(image, dtype=int) - colour).max() <= tolerance


PALETTE = one_colour("RGB", (200, 30, 60)).quantize(4)


LOSSLESS, LEAF = {"lossless": True}, (200, 30, 60)


@pytest.mark.parametrize("image, format, options, colour", [
    (one_colour("RGB", LEAF), "PNG", {}, LEAF), (one_colour("RGB", LEAF), "JPEG", {"quality": 95}, LEAF),
    (one_colour("RGB", LEAF), "WEBP", LOSSLESS, LEAF), (PALETTE, "PNG", {}, LEAF), (PALETTE, "GIF", {}, LEAF),
    (one_colour("RGB", LEAF), "BMP", {}, LEAF), (one_colour("1", 1), "PNG", {}, (255, 255, 255)),
    (one_colour("L", 77), "PNG", {}, (77, 77, 77)), (one_colour("L", 77), "JPEG", {}, (77, 77, 77)),
    (one_colour("CMYK", (0, 255, 255, 0)), "JPEG", {}, (255, 0, 0)),
    (one_colour("CMYK", (255, 0, 0, 51)), "JPEG", {}, (0, 204, 204)),
    (one_colour("LA", (100, 255)), "PNG", {}, (100, 100, 100)),
    (one_colour("LA", (100, 0)), "PNG", {}, (255, 255, 255)),
    (one_colour("RGBA", (*LEAF, 255)), "PNG", {}, LEAF), (one_colour("RGBA", (*LEAF, 0)), "PNG", {}, (255, 255, 255)),
    (one_colour("RGBA", (0, 100, 200, 51)), "PNG", {}, (204, 224, 244)),
    (one_colour("RGBA", (0, 100, 200, 51)), "WEBP", LOSSLESS, (204, 224, 244)),
    (PALETTE, "PNG", {"transparency": PALETTE.getpixel((0, 0))}, (255, 255, 255)),
    (one_colour("L", 7), "PNG", {"transparency": 7}, (255, 255, 255)),
    (one_colour("RGB", (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}, (255, 255, 255)),
    (one_colour("RGB", (1, 2, 4)), "PNG", {"transparency": (1, 2, 3)}, (1, 2, 4))])
def test_every_mode_shows_its_colour_on_white(image, format, options, colour):
    assert close(load_image(encoded(image, format, **options)), colour)


def test_16_bit_grey_is_scaled_and_not_clipped():
    levels = np.array([[0, 257, 1000, 33000, 40000, 65535]], dtype=np.uint16)
    grey = np.asarray(load_image(encoded(Image.fromarray(levels), "PNG")))
    assert grey[0].tolist() == [[v] * 3 for v in (0, 1, 4, 128, 156, 255)]


# The stored picture is red on the left, blue on the right; EXIF says how to turn it. -> (size, corner where red shows)
@pytest.mark.parametrize("format, options", [
    ("JPEG", {"quality": 95, "subsampling": 0}), ("PNG", {}), ("WEBP", LOSSLESS)])
@pytest.mark.parametrize("orientation, size, red", [
    (1, (32, 16), "left"), (2, (32, 16), "right"), (3, (32, 16), "right"), (4, (32, 16), "left"),
    (5, (16, 32), "top"), (6, (16, 32), "top"), (7, (16, 32), "bottom"), (8, (16, 32), "bottom")])
def test_exif_turns_the_picture_upright(format, options, orientation, size, red):
    picture = Image.new("RGB", (32, 16), "blue")
    picture.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = load_image(encoded(picture, format, exif=exif, **options))
    at = {"left": (1, 8), "right": (30, 8), "top": (8, 1), "bottom": (8, 30)}[red]
    assert upright.size == size and upright.getpixel(at)[0] > 200 > 50 > upright.getpixel(at)[2]


def test_a_broken_exif_block_does_not_cost_the_picture():
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    wreck = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x02\x00\x05")  # a tag of the wrong type: turning fails
    assert wreck != exif.tobytes()
    for block in (wreck, b"Exif\0\0garbage", b"Exif\0\0"):
        assert close(load_image(encoded(one_colour("RGB", (10, 200, 30)), "JPEG", exif=block)), (10, 200, 30))


def test_path_bytes_and_open_file_are_the_same_picture(tmp_path):
    picture = Image.effect_noise((20, 10), 90).convert("RGB")
    picture.save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        sources = tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), file
        ways = [load_image(source) for source in sources]
    assert all(way.tobytes() == picture.tobytes() for way in ways)


def test_a_large_jpeg_is_decoded_small_but_never_below_the_size_wanted():
    jpeg = encoded(Image.linear_gradient("L").resize((1600, 1200)).convert("RGB"), "JPEG", quality=95)
    assert [load_image(jpeg, size).size for size in (None, 1201, 600, 599, 224, 10)] == [
        (1600, 1200), (1600, 1200), (800, 600), (800, 600), (400, 300), (200, 150)]
    whole = load_image(jpeg).resize((200, 150), Image.Resampling.BOX)
    assert np.abs(np.asarray(whole, dtype=int) - np.asarray(load_image(jpeg, 150))).max() <= 4
    red = encoded(one_colour("CMYK", (0, 255, 255, 0), (800, 800)), "JPEG")
    assert load_image(red, 100).getpixel((5, 5)) == (255, 0, 0)
    assert load_image(encoded(one_colour("RGB", 0, (800, 800)), "PNG"), 100).size == (800, 800)


# ---- what is refused -------------------------------------------------------------------------------------------------

def refusal(source, **options):
    with pytest.raises(BadSample) as caught:
        load_image(source, **options)
    return caught.value


def test_a_missing_file_is_named(tmp_path):
    bad = refusal(tmp_path / "folder" / "gone.png")
    assert (bad.reason, bad.detail) == ("image missing", str(tmp_path / "folder" / "gone.png"))


@pytest.mark.parametrize("content", [
    b"", b"not a picture", b"<html></html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_picture_will_not_decode(tmp_path, content):
    (tmp_path / "odd.jpg").write_bytes(content)
    bad = refusal(tmp_path / "odd.jpg")
    assert bad.reason == "image will not decode" and "odd.jpg" in bad.detail


def test_formats_outside_the_list_are_not_even_tried():
    for format in ("TIFF", "PPM"):
        assert refusal(encoded(one_colour("RGB", 0), format)).reason == "image will not decode"


NOISE = Image.effect_noise((64, 64), 90).convert("RGB")


@pytest.mark.parametrize("format, reasons", [
    ("JPEG", {"image truncated"}), ("PNG", {"image truncated"}), ("WEBP", {"image will not decode"})])
def test_half_a_file_is_refused_wherever_it_is_cut(format, reasons):
    content = encoded(NOISE, format)
    assert load_image(content).size == (64, 64)
    assert {refusal(content[:len(content) * tenths // 10]).reason for tenths in range(3, 10)} == reasons


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_damaged_bytes_give_a_picture_or_a_refusal_and_nothing_else(format):
    content, pick, refused = encoded(NOISE, format), np.random.default_rng(0), 0
    for _ in range(150):
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[pick.integers(0, min(len(content), 400), 12)] = pick.integers(0, 256, 12)
        try:
            assert load_image(damaged.tobytes(), max_pixels=10**6).mode == "RGB"
        except BadSample:
            refused += 1
    assert refused > 0


def test_a_picture_over_the_limit_is_refused_before_it_is_decoded():
    content = encoded(one_colour("L", 0, (1000, 1001)), "PNG")
    assert load_image(content, max_pixels=1_001_000).size == (1000, 1001)
    bad = refusal(content, max_pixels=1_000_999)
    assert bad.reason == "image too large" and "1000 x 1001" in bad.detail
    assert refusal(content[:100], max_pixels=1_000_999).reason == "image too large"  # the header alone decides


@pytest.mark.parametrize("width", [8001, 20_000])  # beyond our own default, and beyond what Pillow opens at all
def test_a_decompression_bomb_is_refused_by_default(width):
    bomb = encoded(one_colour("1", 0, (width, 8000 if width == 8001 else 20_000)), "PNG")
    assert len(bomb) < 100_000 and refusal(bomb).reason == "image too large"


def test_a_refusal_survives_the_trip_from_a_worker_and_reads_as_one_line():
    bad = pickle.loads(pickle.dumps(BadSample("image missing", "a.png")))
    assert (bad.reason, bad.detail, str(bad)) == ("image missing", "a.png", "image missing: a.png")

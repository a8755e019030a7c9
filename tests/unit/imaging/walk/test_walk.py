"""Walks over image files: what is kept for decoders, and what is refused before they see it."""

import zlib

import numpy as np
import pytest
from PIL import Image
from skimage import data

import hostile_images as hostile
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.imaging.decode import decode_image, inspect_image
from heatlens_server.imaging.limits import MAX_PARTS, PART_BYTES, PASSES
from image_files import saved

PIXELS = np.random.default_rng(4).integers(0, 256, (24, 40, 3), dtype=np.uint8)
SMALL = Image.fromarray(PIXELS)
MANY = 3 * MAX_PARTS


@pytest.fixture(scope="module")
def cat():
    return Image.fromarray(data.chelsea())


def inspect(encoded, **options):
    return inspect_image(encoded, **{"max_pixels": 1_000_000, **options})


def decoded(encoded, **options):
    return decode_image(encoded, **{"max_pixels": 1_000_000, **options}).values


def refused(encoded, **options):
    with pytest.raises(InvalidArgument) as caught:
        inspect(encoded, **options)
    return caught.value


@pytest.mark.parametrize(
    ("encoded", "named"),
    [
        (hostile.jpeg_with(SMALL, hostile.jpeg_segment(0xFE) * MANY), "segments"),
        (hostile.jpeg_with(SMALL, hostile.jpeg_segment(0xE2, b"x") * MANY), "segments"),
        (hostile.jpeg_with(SMALL, b"\xff\x01" * MANY), "segments"),
        (hostile.png_with(SMALL, hostile.png_chunk(b"teXt") * MANY), "chunks"),
        (hostile.png_of_empty_data(SMALL, MANY), "chunks"),
        (hostile.png_with(SMALL, hostile.png_chunk(b"fdAT", bytes(4)) * MANY, at=b"IEND"), "chunks"),
        (hostile.webp_with(SMALL, hostile.webp_chunk(b"none") * MANY), "chunks"),
        (hostile.gif_with_comments(SMALL, MANY), "blocks"),
        (hostile.tiff_of({code: (4, [1]) for code in range(300, 300 + MANY)}, b""), "tags"),
    ],
)
def test_files_of_too_many_parts_are_refused_by_the_limits_name(encoded, named):
    error = refused(encoded)
    assert error.reason == "IMAGE_TOO_COMPLEX"
    assert named in str(error)
    assert error.metadata == {"max_image_parts": str(MAX_PARTS)}
    assert error.violations[0].field == "image.encoded"


@pytest.mark.parametrize(
    "encoded",
    [
        hostile.jpeg_with(SMALL, hostile.jpeg_segment(0xFE) * (MAX_PARTS - 30)),
        hostile.png_with(SMALL, hostile.png_chunk(b"teXt") * (MAX_PARTS - 10)),
        hostile.webp_with(SMALL, hostile.webp_chunk(b"none") * (MAX_PARTS - 10)),
        hostile.gif_with_comments(SMALL, MAX_PARTS - 10),
    ],
)
def test_fewer_parts_are_fine_and_decoders_do_not_see_them(encoded):
    file = inspect(encoded)
    assert len(file.encoded) < len(encoded) - MAX_PARTS
    assert decoded(encoded).shape == PIXELS.shape


def test_large_files_may_have_a_part_for_every_few_kilobytes():
    chunks = 2 * MAX_PARTS
    whole = hostile.png_with(SMALL, hostile.png_chunk(b"prIv", bytes(PART_BYTES)) * chunks)
    np.testing.assert_array_equal(decoded(whole), PIXELS)


def test_scans_are_bounded_by_what_they_go_over():
    # 13 passes of one component, 8 of them of a full image, are plain; the last scan of all is of one component.
    plain = inspect(hostile.jpeg_of_scans(640, 480, 0))
    more = inspect(hostile.jpeg_of_scans(640, 480, 10))
    assert more.samples - plain.samples == 10 * 640 * 480
    error = refused(hostile.jpeg_of_scans(640, 480, 40), max_pixels=640 * 480)
    assert error.reason == "IMAGE_TOO_COMPLEX"
    assert error.metadata == {"max_image_samples": str(PASSES * 640 * 480)}
    # A smaller image has room for more.
    assert decoded(hostile.jpeg_of_scans(64, 48, 200)).shape == (48, 64, 3)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_a_plain_progressive_image_of_the_largest_size_has_room_twice_over(cat, subsampling):
    encoded = saved(cat, "JPEG", progressive=True, subsampling=subsampling)
    assert inspect(encoded).samples < PASSES * cat.width * cat.height / 2


def test_what_lies_between_segments_is_left_out(cat):
    plain = saved(cat, "JPEG")
    odd = hostile.jpeg_with(cat, hostile.jpeg_segment(0xE1, b"Exif\0\0" + hostile.exif(1)) + b"\xff" * 100_000)
    assert inspect(odd).encoded == inspect(plain).encoded


def test_an_image_behind_the_first_is_left_out(cat):
    plain = saved(cat, "JPEG")
    assert inspect(plain + saved(SMALL, "JPEG")).encoded == plain


def test_markers_within_a_scan_are_found_behind_long_data():
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (700, 700, 3), dtype=np.uint8))
    encoded = saved(noise, "JPEG", quality=97, restart_marker_blocks=3)
    assert len(encoded) > 1 << 19  # longer than one search
    file = inspect(encoded)
    assert file.encoded == encoded
    assert file.samples < PASSES * 700 * 700


@pytest.mark.parametrize("kind", [0xC9, 0xCA])
def test_arithmetic_codes_are_refused(cat, kind):
    encoded = saved(cat, "JPEG").replace(b"\xff\xc0", bytes([0xFF, kind]), 1)
    error = refused(encoded)
    assert error.reason == "IMAGE_UNDECODABLE"
    assert "arithmetic" in str(error)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_pillow_whatever_lies_beside_them(orientation):
    turned = Image.fromarray(PIXELS)
    plain = hostile.exif(orientation)
    full = hostile.exif(orientation, filler_entries=5000)
    files = [
        hostile.jpeg_with(turned, hostile.jpeg_segment(0xE1, b"Exif\0\0" + plain)),
        hostile.jpeg_with(turned, hostile.jpeg_segment(0xE1, b"Exif\0\0" + full)),
        hostile.png_with(turned, hostile.png_chunk(b"eXIf", full)),
        hostile.webp_with(turned, hostile.webp_chunk(b"EXIF", full)),
    ]
    steps = [None, *Image.Transpose]
    wanted = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"}
    wanted |= {5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
    step = next(step for step in steps if getattr(step, "name", None) == wanted[orientation])
    expected = np.asarray(turned if step is None else turned.transpose(step))
    for encoded in files:
        assert inspect(encoded).orientation == orientation
        values = decoded(encoded)
        assert values.shape == expected.shape
        if not encoded.startswith(b"\xff\xd8"):
            np.testing.assert_array_equal(values, expected)


def test_packed_texts_and_profiles_are_not_unpacked():
    texts = hostile.packed_text(8_000_000) * 50 + hostile.png_chunk(b"iCCP", b"x\0\0" + bytes(1000))
    encoded = hostile.png_with(SMALL, texts)
    np.testing.assert_array_equal(decoded(encoded), PIXELS)
    assert len(inspect(encoded).encoded) < 4000


def test_a_corrupt_chunk_that_is_left_out_does_no_harm_and_one_that_is_kept_does():
    text = bytearray(hostile.png_chunk(b"tEXt", b"note\0x"))
    text[-1] ^= 1
    np.testing.assert_array_equal(decoded(hostile.png_with(SMALL, bytes(text))), PIXELS)
    whole = bytearray(saved(SMALL, "PNG"))
    whole[-20] ^= 1
    assert refused(bytes(whole)).reason == "IMAGE_UNDECODABLE"


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF"])
def test_the_first_frame_of_an_animation_is_kept(cat, file_format):
    image = cat.quantize(64).convert("RGB") if file_format == "GIF" else cat
    encoded = hostile.animation(image, file_format, 5)
    np.testing.assert_array_equal(decoded(encoded), np.asarray(image))
    if file_format != "GIF":
        assert len(inspect(encoded).encoded) < len(encoded)


def test_run_lengths_of_bmp_are_decoded():
    values = decoded(hostile.bmp_of_runs(700, 50))
    assert values.shape == (50, 700, 3)
    assert (values == [255, 0, 0]).all()


def test_a_gif_frame_beyond_its_canvas_counts():
    encoded = bytearray(saved(SMALL, "GIF"))
    frame = encoded.index(b"\x2c\0\0\0\0")
    encoded[frame + 5 : frame + 9] = (30_000).to_bytes(2, "little") * 2
    assert refused(bytes(encoded)).reason == "IMAGE_TOO_LARGE"


def test_strips_of_a_tiff_may_not_overlap():
    row = hostile.empty_deflate(1000, bytes(64))
    assert decoded(hostile.tiff_of_strips(64, 300, row, 8, apart=True)).shape == (300, 64, 3)
    error = refused(hostile.tiff_of_strips(64, 300, row, 8))
    assert error.reason == "IMAGE_TOO_COMPLEX"
    assert "overlap" in str(error)


def test_strips_of_a_tiff_are_counted():
    error = refused(hostile.tiff_of_strips(1, 70_000, b"\0", 1, apart=True))
    assert error.reason == "IMAGE_TOO_COMPLEX"
    assert "strips" in str(error)


def test_values_of_a_tiff_are_counted():
    tags = {256: (4, [8]), 257: (4, [8]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 273: (4, [8]), 279: (4, [64])}
    error = refused(hostile.tiff_of(tags | {340: (3, [0] * 5000)}, bytes(64)))
    assert error.reason == "IMAGE_TOO_COMPLEX"
    assert "340" in str(error)


def test_scans_within_a_tiff_are_counted():
    strip = hostile.jpeg_of_scans(400, 400, 60)
    tags = {256: (4, [400]), 257: (4, [400]), 258: (3, [8, 8, 8]), 259: (3, [7]), 262: (3, [6]), 277: (3, [3])}
    tags |= {273: (4, [8]), 278: (3, [400]), 279: (4, [len(strip)])}
    assert refused(hostile.tiff_of(tags, strip), max_pixels=160_000).reason == "IMAGE_TOO_COMPLEX"


def test_tiles_of_a_tiff_count_as_they_are_unpacked():
    def tiled(side, starts=324):
        tile = zlib.compress(bytes(side * side), 9)
        tags = {256: (4, [64]), 257: (4, [64]), 258: (3, [8]), 259: (3, [8]), 262: (3, [1]), 277: (3, [1])}
        tags |= {322: (4, [side]), 323: (4, [side]), starts: (4, [8]), 325: (4, [len(tile)])}
        return hostile.tiff_of(tags, tile)

    assert decoded(tiled(64)).shape == (64, 64, 3)
    assert inspect(tiled(960)).samples == 960 * 960
    assert refused(tiled(4000)).reason == "IMAGE_TOO_LARGE"
    # Offsets of strips are as good to libtiff.
    assert refused(tiled(4000, starts=273)).reason == "IMAGE_TOO_LARGE"
    assert refused(tiled(0)).reason == "IMAGE_UNDECODABLE"


def tiff_of_jpegs(strips, **without):
    starts = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    tags = {256: (4, [64]), 257: (4, [8 * len(strips)]), 258: (3, [8, 8, 8]), 259: (3, [7]), 262: (3, [6])}
    tags |= {273: (4, starts), 277: (3, [3]), 278: (3, [8]), 279: (4, [len(strip) for strip in strips])}
    return hostile.tiff_of(tags | without.get("tags", {}), b"".join(strips))


def test_segments_of_all_strips_are_counted_together():
    image = Image.new("RGB", (64, 8))
    plain = saved(image, "JPEG")
    assert decoded(tiff_of_jpegs([plain] * 200)).shape == (1600, 64, 3)
    # Each strip by itself has fewer than there may be.
    error = refused(tiff_of_jpegs([hostile.jpeg_with(image, hostile.jpeg_segment(0xFE) * 900)] * 200))
    assert error.reason == "IMAGE_TOO_COMPLEX"
    assert "segments" in str(error)


def test_strips_of_jpeg_that_no_walk_would_see_are_refused():
    bomb = hostile.jpeg_of_scans(64, 8, 1200)
    assert refused(tiff_of_jpegs([bomb], tags={279: (4, [])})).reason == "IMAGE_UNDECODABLE"
    # One that is longer than the file hides that the others are the file, again and again.
    lengths = [len(bomb)] * 500 + [1 << 31]
    overlapping = tiff_of_jpegs([bomb], tags={257: (4, [8 * 501]), 273: (4, [8] * 501), 279: (4, lengths)})
    assert "truncated" in str(refused(overlapping))


@pytest.mark.parametrize("compression", [6, 34661, 34712])
def test_other_compressions_of_tiff_are_refused_by_their_number(compression):
    error = refused(hostile.tiff_of_strips(8, 8, bytes(8), compression, apart=True))
    assert error.reason == "IMAGE_UNDECODABLE"
    assert str(compression) in str(error)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "lzma", "zstd"])
def test_every_compression_of_tiff_that_pillow_writes_is_read(cat, compression):
    options = {} if compression == "raw" else {"compression": compression}
    values = decoded(saved(cat, "TIFF", **options))
    assert np.abs(values.astype(int) - np.asarray(cat)).mean() < (3 if compression == "jpeg" else 1e-9)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_cut_or_changed_anywhere_is_refused_or_read_and_never_fails_otherwise(file_format):
    rng = np.random.default_rng(5)
    whole = saved(SMALL, file_format)
    for _ in range(150):
        encoded = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for at in rng.integers(0, len(encoded), rng.integers(0, 4)):
            encoded[at] = rng.integers(0, 256)
        try:
            reason = ""
            inspect(bytes(encoded))
        except InvalidArgument as error:
            reason = error.reason
        assert reason in {"", "IMAGE_UNDECODABLE", "IMAGE_TOO_LARGE", "IMAGE_TOO_COMPLEX"}

"""What the values of an image become: kept with their order and range, or refused."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_dpm.data import DataError, load_images
from diffusers_dpm.image_values import BrokenImageError, channels_first


RNG = np.random.default_rng(0)
RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def first_image(folder, **options):
    return load_images(folder, **options)[0]["images"].double().numpy()


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 1, "float32"), (-1024, 3071, "float32"), (0, 60000, "int32"), (-32768, 32767, "int16"), (0, 4095, "uint16")],
)
@pytest.mark.parametrize("suffix", ["tif", "npy"])
def test_values_of_any_range_are_kept(tmp_path, low, high, dtype, suffix):
    array = (low + RAMP * (high - low)).astype(dtype)
    for i in range(2):
        path = tmp_path / f"{i}.{suffix}"
        np.save(path, array) if suffix == "npy" else Image.fromarray(array).save(path)
    found = first_image(tmp_path, value_range=(low, high))[0]
    np.testing.assert_allclose(found, (array.astype(float) - low) / (high - low) * 2 - 1, atol=1e-6)
    if dtype != "uint16":
        with pytest.raises(DataError, match="--value-range"):
            load_images(tmp_path)


def test_values_beyond_the_range_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.full((2, 1, 8, 8), 3, np.uint8))
    with pytest.raises(DataError, match=r"x\.npy\[0\] .*3 to 3.*\[0, 2\]"):
        load_images(tmp_path / "x.npy", value_range=(0, 2))
    assert load_images(tmp_path / "x.npy", value_range=(0, 3))[0]["images"].eq(1).all()


@pytest.mark.parametrize("value_range", [(1, 0), (0, 0), (0, float("nan")), (0, float("inf")), (1,)])
def test_range_that_is_none(tmp_path, value_range):
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 8, 8), np.uint8))
    with pytest.raises(DataError, match="--value-range"):
        load_images(tmp_path / "x.npy", value_range=value_range)


def test_floats_from_zero_to_one_must_be_told(tmp_path):
    """The commonest convention of arrays is not ours: neither is guessed."""
    np.save(tmp_path / "x.npy", RAMP.reshape(4, 1, 8, 8).astype(np.float32))
    with pytest.raises(DataError, match=r"\[0, 1\].*--value-range 0 1.*-1 1"):
        load_images(tmp_path / "x.npy", resolution=[4])  # whose resizing would give negative values
    for low in (0, -1):
        found = load_images(tmp_path / "x.npy", value_range=(low, 1))[0]["images"]
        assert found.min() == (-1 if low == 0 else 0)


@pytest.mark.parametrize(
    ("dtype", "hint"), [("int64", "--value-range"), ("complex64", "real numbers"), ("datetime64[s]", "real numbers")]
)
def test_other_types_are_refused(tmp_path, dtype, hint):
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 8, 8), dtype))
    with pytest.raises(DataError, match=f"{re.escape(dtype)}.*{hint}"):
        load_images(tmp_path / "x.npy")


def test_infinity_is_no_value_range(tmp_path):
    np.save(tmp_path / "x.npy", np.full((2, 1, 8, 8), np.inf))
    with pytest.raises(DataError, match=r"from inf to inf.*save finite numbers"):
        load_images(tmp_path / "x.npy", value_range=(0, 1))


def test_masks(tmp_path):
    np.save(tmp_path / "x.npy", np.eye(8, dtype=bool)[None, None].repeat(2, 0))
    assert torch.equal(load_images(tmp_path / "x.npy")[0]["images"][0], 2 * torch.eye(8) - 1)


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
@pytest.mark.parametrize("suffix", ["png", "npy"])
def test_mixed_depths(tmp_path, cache_bytes, suffix):
    """Each by its own depth, in any order."""
    other = RAMP * 2 - 1 if suffix == "npy" else (RAMP * 65535).astype(np.uint16)
    for i, array in enumerate(((RAMP * 255).astype(np.uint8), other, (RAMP * 255).astype(np.uint8))):
        path = tmp_path / f"{i}.{suffix}"
        np.save(path, array) if suffix == "npy" else Image.fromarray(array).save(path)
    images = load_images(tmp_path, cache_bytes=cache_bytes)[[0, 1, 2]]["images"]
    np.testing.assert_allclose(images.numpy(), np.broadcast_to(RAMP * 2 - 1, (3, 1, 16, 16)), atol=2 / 255)


# Files that Pillow reads in part -------------------------------------------------------------------------------------


def png(width, height, bits, colour, rows):
    """A PNG file of any header: Pillow writes 16 bits for grey only."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = [
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(array, photometric, bits=8):
    """An uncompressed TIFF of any number of bands."""
    height, width, bands = array.shape
    data = array.tobytes()
    tags = [(256, [width]), (257, [height]), (258, [bits] * bands), (259, [1]), (262, [photometric]), (273, [0])]
    tags += [
        (277, [bands]),
        (278, [height]),
        (279, [len(data)]),
        (338, [0] * (bands - (3 if photometric == 2 else 1))),
    ]
    tags = [(tag, numbers) for tag, numbers in tags if numbers]
    start = 8 + 2 + 12 * len(tags) + 4
    more, entries = b"", b""
    room = sum(2 * len(numbers) for _, numbers in tags if len(numbers) > 2)
    for tag, numbers in tags:
        numbers = [start + room] if tag == 273 else numbers
        packed = struct.pack(f"<{len(numbers)}H", *numbers)
        entries += struct.pack("<HHI", tag, 3, len(numbers))
        if len(packed) > 4:
            entries += struct.pack("<I", start + len(more))
            more += packed
        else:
            entries += packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + more + data


@pytest.mark.parametrize(
    ("bands", "photometric", "bits", "message"),
    [
        pytest.param(
            *(4, 2, 8, "4 bands, of which Pillow reads 3"),
            marks=pytest.mark.needs("Pillow>=10.4", reason="earlier ones read all 4 bands"),
        ),
        (5, 2, 8, "5 bands"),
        (2, 1, 8, "(2 bands|cannot identify)"),  # by Pillow's version
        (3, 2, 16, "16 bits"),
    ],
)
@pytest.mark.parametrize("channels", [None, 3])
def test_tiff_with_more_than_pillow_reads(tmp_path, bands, photometric, bits, message, channels):
    array = RNG.integers(0, 200, (8, 8, bands)).astype(f"<u{bits // 8}")
    (tmp_path / "0.tif").write_bytes(tiff(array, photometric, bits))
    with pytest.raises(DataError, match=rf"0\.tif:? .*{message}.*\.npy"):
        load_images(tmp_path, channels=channels)


def test_the_tiff_of_these_tests_is_one(tmp_path):
    array = RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    (tmp_path / "0.tif").write_bytes(tiff(array, 2))
    np.testing.assert_allclose(first_image(tmp_path), array.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(("channels", "colour"), [(2, 4), (3, 2), (4, 6)])
def test_sixteen_bit_colour_is_refused(tmp_path, channels, colour):
    rows = (b"\0" + RNG.bytes(8 * channels * 2)) * 8
    (tmp_path / "0.png").write_bytes(png(8, 8, 16, colour, rows))
    with pytest.raises(DataError, match=r"0\.png .*16 bits.*\.npy"):
        load_images(tmp_path)


@pytest.mark.needs("Pillow>=11", reason="16-bit grey can be saved as PGM")
def test_sixteen_bit_portable_pixmap(tmp_path):
    grey = RNG.integers(0, 65536, (8, 8)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "0.pgm")
    np.testing.assert_allclose(first_image(tmp_path)[0], grey / 32767.5 - 1, atol=1e-6)
    (tmp_path / "1.ppm").write_bytes(b"P6 8 8 65535\n" + bytes(8 * 8 * 6))
    with pytest.raises(DataError, match=r"1\.ppm .*16 bits"):
        load_images(tmp_path, channels=1)


@pytest.mark.parametrize("header", [b"P6 8 8 255\n", b"P6 8 8 100\n", b"P3 8 8 255\n"])
def test_portable_pixmap_of_eight_bits(tmp_path, header):
    (tmp_path / "0.ppm").write_bytes(header + (b"0 " if header[1:2] == b"3" else b"\0") * 192)
    assert (first_image(tmp_path) == -1).all()


@pytest.mark.parametrize(("damage", "error"), [(b"no image", BrokenImageError), (None, DataError)])
def test_a_worker_of_the_loader_names_the_error_alone(tmp_path, damage, error):
    for i in range(2):
        Image.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    data = load_images(tmp_path, cache_bytes=0)
    (tmp_path / "1.png").write_bytes(damage) if damage else Image.new("L", (4, 4)).save(tmp_path / "1.png")
    with pytest.raises(error) as raised:
        list(DataLoader(data, batch_size=2, num_workers=1))
    assert re.match(r"broken image /\S+1\.png: \w" if damage else "images of mixed sizes", str(raised.value))


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_animations_are_refused(tmp_path, suffix):
    frames = [Image.fromarray(np.full((8, 8), 90 * i, np.uint8)) for i in range(3)]
    frames[0].save(tmp_path / f"0.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=rf"0\.{suffix} holds 3 frames"):
        load_images(tmp_path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_put_on_white(tmp_path, caplog, mode):
    """Their hidden colour would else be trained on."""
    image = Image.new("RGBA", (8, 8), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (0, 4, 8, 8))
    image.convert(mode).save(tmp_path / "0.png")
    found = first_image(tmp_path)
    assert (found[:, 0] == 1).all()
    assert len(found) == (1 if mode == "LA" else 3)
    assert "transparent pixels are put on white; --channels 4 keeps alpha" in caplog.text
    assert (first_image(tmp_path, channels=4)[3, 0] == -1).all()


def test_opaque_alpha_is_dropped_without_a_word(tmp_path, caplog):
    Image.new("RGBA", (8, 8), (0, 255, 0, 255)).save(tmp_path / "0.png")
    assert first_image(tmp_path)[:, 0, 0].tolist() == [-1, 1, -1]
    assert not caplog.text


@pytest.mark.parametrize("damage", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_damaged_file_is_named(tmp_path, damage):
    (tmp_path / "0.png").write_bytes(damage)
    with pytest.raises(DataError, match=r"broken image .*0\.png"):
        load_images(tmp_path)


def test_image_bomb(tmp_path):
    (tmp_path / "0.png").write_bytes(png(50000, 50000, 8, 0, b""))
    with pytest.raises(DataError, match=r"broken image .*0\.png.*2500000000"):
        load_images(tmp_path)


# Axes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((8, 6), None, (1, 8, 6)),
        ((3, 8, 6), None, (3, 8, 6)),
        ((8, 6, 3), None, (3, 8, 6)),
        ((16, 8, 8), None, (16, 8, 8)),
        ((64, 64, 200), None, (200, 64, 64)),
        ((3, 4, 4), None, (3, 4, 4)),
        ((4, 4, 3), None, (3, 4, 4)),
        ((16, 30, 40), 16, (16, 30, 40)),
        ((30, 40, 16), 16, (16, 30, 40)),
        ((2, 2, 64), 64, (64, 2, 2)),
    ],
)
def test_axis_of_channels(shape, channels, expected):
    array = np.arange(np.prod(shape)).reshape(shape)
    found = channels_first(array, channels, "x")
    assert found.shape == expected
    if shape != expected and len(shape) == 3:
        np.testing.assert_array_equal(found[0], array[..., 0])


@pytest.mark.parametrize("shape", [(16, 30, 40), (2, 2, 64), (3, 8, 3), (8, 8, 8), (7,), (2, 2, 8, 8)])
def test_unclear_axis_of_channels(shape):
    with pytest.raises(DataError, match=re.escape(str(shape))):
        channels_first(np.zeros(shape), None, "x")


@pytest.mark.parametrize("shape", [(1000, 128), (1000, 128, 1), (8, 8, 3), (3, 8, 8)])
def test_one_array_of_signals_is_refused(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
    for data in (tmp_path / "x.npy", tmp_path):
        with pytest.raises(DataError, match=re.escape(f"{shape}; one file alone holds images as (N, C, H, W)")):
            load_images(data)


def test_no_channel_of_an_array_is_dropped(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 8, 8), np.uint8))
    assert load_images(tmp_path / "x.npy").shape == (4, 8, 8)
    with pytest.raises(DataError, match="4 channels, which cannot become 3"):
        load_images(tmp_path / "x.npy", channels=3)


def test_alpha_of_images_without_it_is_opaque(tmp_path):
    for mode in ("L", "RGB", "CMYK"):
        Image.new(mode, (4, 4)).save(tmp_path / f"{mode}.tiff")
    data = load_images(tmp_path, channels=4)
    assert data.shape == (4, 4, 4)
    assert (data[[0, 1, 2]]["images"][:, 3] == 1).all()


@pytest.mark.parametrize("channels", [2, 4])
def test_a_grey_array_gets_no_other_channels(tmp_path, channels):
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 8, 8), np.uint8))
    with pytest.raises(DataError, match=f"1 channel, which cannot become {channels}"):
        load_images(tmp_path, channels=channels)


@pytest.mark.parametrize("content", [b"", b"not numbers", np.array([{}])])
def test_npy_without_numbers(tmp_path, content):
    path = tmp_path / "x.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(DataError, match=r"cannot read .*x\.npy: it is not a complete \.npy file of numbers"):
        load_images(path)

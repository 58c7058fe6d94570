"""Every kind of data, and a clear word about data that cannot be used."""

import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from diffusers_dpm.data import DataError, load_images


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


RNG = np.random.default_rng(0)


def pixels(*shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def save_images(folder, images, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.{suffix}")


def in_range(images):
    """uint8 (N, H, W, C) or (N, H, W) as the network sees it."""
    images = images[..., None] if images.ndim == 3 else images
    return torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_digits():
    data = load_images("digits", split="all")
    assert (len(data), data.shape, data.num_classes) == (1797, (1, 8, 8), 10)
    batch = data[[0, 5, 7]]
    expected = torch.from_numpy(load_digits().images[[0, 5, 7]]).float()[:, None] / 8 - 1
    torch.testing.assert_close(batch["images"], expected)
    assert batch["labels"].tolist() == load_digits().target[[0, 5, 7]].tolist()
    one = data[5]
    assert one["images"].shape == (1, 8, 8)
    assert one["images"].dtype == torch.float32
    assert one["labels"] == 5
    assert isinstance(one["labels"], int)
    everything = data[list(range(1797))]["images"]
    assert (everything.min(), everything.max()) == (-1, 1)


def test_digits_are_split_into_train_and_test():
    parts = {split: load_images("digits", split=split) for split in ("all", "train", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"all": 1797, "train": 1500, "test": 297}
    drawn = {
        split: sorted((*part["images"].flatten().tolist(), label) for part in part for label in [part["labels"]])
        for split, part in parts.items()
    }
    assert sorted(drawn["train"] + drawn["test"]) == drawn["all"]  # every digit once
    counts = torch.bincount(torch.tensor([example["labels"] for example in parts["test"]]))
    assert counts.min() >= 28  # stratified
    with pytest.raises(DataError, match=r"'validation'.* train, test, all"):
        load_images("digits", split="validation")


def test_works_in_a_plain_data_loader():
    batch = next(iter(torch.utils.data.DataLoader(load_images("digits", split="all"), batch_size=4)))
    assert batch["images"].shape == (4, 1, 8, 8)
    assert batch["labels"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_image_folder_with_classes(tmp_path, cache_bytes):
    images = pixels(6, 8, 8, 3)
    save_images(tmp_path / "data" / "cat", images[:4])
    save_images(tmp_path / "data" / "dog", images[4:])
    data = load_images(tmp_path / "data", cache_bytes=cache_bytes)
    assert data.in_memory == (cache_bytes > 0)
    assert data.class_names == ["cat", "dog"]
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1]
    torch.testing.assert_close(data[list(range(6))]["images"], in_range(images))


def test_image_folder_without_classes(tmp_path):
    images = pixels(3, 8, 6)
    save_images(tmp_path / "data", images)
    data = load_images(tmp_path / "data")
    assert (data.shape, data.num_classes) == ((1, 8, 6), 0)
    assert data[0]["labels"] == -1
    torch.testing.assert_close(data[[0, 1, 2]]["images"], in_range(images))
    with pytest.raises(DataError, match="each class into one folder"):
        load_images(tmp_path / "data", require_labels=True)


@pytest.fixture
def table():
    """A data set with columns of unusual names."""
    images = pixels(4, 8, 8)
    columns = {
        "picture": [Image.fromarray(image) for image in images],
        "kind": [1, 0, 1, 2],
        "word": ["b", "a", "b", "c"],
    }
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["x", "y", "z"]),
            "word": datasets.Value("string"),
        }
    )
    return images, datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("form", ["parquet file", "parquet folder", "saved", "saved with splits"])
def test_columns_are_found_by_type(tmp_path, table, form):
    images, dataset = table
    path = tmp_path / "data"
    if form.startswith("parquet"):
        path.mkdir()
        dataset.to_parquet(path / "train.parquet")
        path = path / "train.parquet" if form.endswith("file") else path
    elif form == "saved":
        dataset.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(path)
    data = load_images(path)
    torch.testing.assert_close(data[[0, 1, 2, 3]]["images"], in_range(images))
    assert data.labels.tolist() == [1, 0, 1, 2]
    assert data.class_names == ["x", "y", "z"]


def test_columns_by_name(tmp_path, table):
    table[1].save_to_disk(tmp_path / "data")
    data = load_images(tmp_path / "data", image_column="picture", label_column="word")
    assert data.class_names == ["a", "b", "c"]
    assert data.labels.tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"label_column": "class"}, "'class' .*--label-column.* picture, kind, word"),
        ({"image_column": "image"}, "'image' .*--image-column.* picture, kind, word"),
        ({"image_column": "kind"}, "column 'kind'"),
        ({"label_column": "picture"}, "column 'picture'"),
    ],
)
def test_wrong_columns(tmp_path, table, names, message):
    table[1].save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "data", **names)


def test_sixteen_bits_are_kept(tmp_path):
    images = pixels(3, 8, 8, dtype=np.uint16)
    save_images(tmp_path / "data", images)
    data = load_images(tmp_path / "data")
    found = (data[[0, 1, 2]]["images"][:, 0] + 1) * 32767.5
    assert np.abs(found.numpy() - images).max() < 0.01


@pytest.mark.parametrize("layout", ["CHW", "HWC", "HW", "stack in a folder", "stack", "grey stack"])
def test_npy(tmp_path, layout):
    folder = tmp_path / "data"
    folder.mkdir()
    values = RNG.uniform(-1, 1, (5, 1 if layout in ("HW", "grey stack") else 3, 8, 6)).astype(np.float32)
    if "stack" in layout:
        np.save(folder / "all.npy", values[:, 0] if layout == "grey stack" else values)
    else:
        for i, image in enumerate(values):
            stored = {"CHW": image, "HWC": np.moveaxis(image, 0, 2), "HW": image[0]}[layout]
            np.save(folder / f"{i}.npy", stored)
    data = load_images(folder if layout != "stack" else folder / "all.npy")
    torch.testing.assert_close(data[list(range(5))]["images"], torch.from_numpy(values), rtol=0, atol=0)
    assert data.num_classes == 0


def test_npy_integers_are_scaled_by_their_depth(tmp_path):
    for dtype in (np.uint8, np.uint16):
        values = pixels(2, 3, 8, 8, dtype=dtype)
        np.save(tmp_path / f"{dtype.__name__}.npy", values)
        found = load_images(tmp_path / f"{dtype.__name__}.npy")[[0, 1]]["images"].numpy()
        np.testing.assert_allclose(found, values / (np.iinfo(dtype).max / 2) - 1, atol=1e-6)


def test_npy_folders_are_classes(arrays):
    data = load_images(arrays)
    assert (len(data), data.class_names) == (40, ["class_0", "class_1"])
    assert data.labels.tolist() == [0] * 20 + [1] * 20


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 3, 8, 8), 1.5, np.float32), r"1.5 .*1.5.*\[-1, 1\]"),
        (np.full((2, 3, 8, 8), np.nan, np.float32), r"\[-1, 1\]"),
        (np.zeros((2, 3, 8, 8), np.int64), "int64"),
        (np.zeros(7, np.float32), r"\(7,\)"),
    ],
)
def test_npy_out_of_range(tmp_path, array, message):
    np.save(tmp_path / "all.npy", array)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "all.npy")


def test_empty_folder(tmp_path):
    (tmp_path / "data" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "data"))):
        load_images(tmp_path / "data")


def test_folder_without_images(tmp_path):
    (tmp_path / "notes.dat").write_text("nothing")
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        load_images(tmp_path)


@pytest.mark.parametrize("damage", ["not an image", "cut short"])
def test_broken_image_is_named(tmp_path, damage):
    save_images(tmp_path / "data", pixels(4, 32, 32, 3))
    broken = tmp_path / "data" / "2.png"
    broken.write_bytes(b"no image" if damage == "not an image" else broken.read_bytes()[:400])
    with pytest.raises(DataError, match=re.escape(str(broken))):
        load_images(tmp_path / "data")


def test_broken_array_is_named(tmp_path):
    np.save(tmp_path / "0.npy", np.zeros((8, 8), np.uint8))
    (tmp_path / "1.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "1.npy"))):
        load_images(tmp_path)


def test_mixed_sizes_need_a_resolution(tmp_path):
    save_images(tmp_path / "data" / "a", pixels(2, 8, 8, 3))
    save_images(tmp_path / "data" / "b", pixels(2, 10, 12, 3))
    with pytest.raises(DataError, match=r"8x8 .*a/0.png.* 10x12 .*b/0.png.*--resolution"):
        load_images(tmp_path / "data")
    assert load_images(tmp_path / "data", resolution=[6, 4]).shape == (3, 6, 4)
    assert load_images(tmp_path / "data", resolution=[6]).shape == (3, 6, 6)


def test_mixed_channels_need_a_number(tmp_path):
    save_images(tmp_path / "data" / "a", pixels(1, 8, 8))
    save_images(tmp_path / "data" / "b", pixels(1, 8, 8, 3))
    with pytest.raises(DataError, match="--channels"):
        load_images(tmp_path / "data")
    for channels in (1, 3):
        assert load_images(tmp_path / "data", channels=channels).shape == (channels, 8, 8)


def test_channels(tmp_path):
    rgba = pixels(2, 8, 8, 4)
    save_images(tmp_path / "data", rgba)
    white = rgba[..., :3] * (rgba[..., 3:] / 255) + 255 - rgba[..., 3:].astype(float)
    found = load_images(tmp_path / "data")[[0, 1]]["images"]
    torch.testing.assert_close(found, in_range(white).float(), rtol=0, atol=1.01 / 127.5)
    torch.testing.assert_close(load_images(tmp_path / "data", channels=4)[[0, 1]]["images"], in_range(rgba))
    grey = np.stack([np.asarray(Image.fromarray(image.round().astype(np.uint8)).convert("L")) for image in white])
    found = load_images(tmp_path / "data", channels=1)[[0, 1]]["images"]
    torch.testing.assert_close(found, in_range(grey), rtol=0, atol=2.01 / 127.5)
    with pytest.raises(DataError, match=r"\.png .*3 .*2$"):
        load_images(tmp_path / "data", channels=2)


def test_resizing_crops_the_centre(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    save_images(tmp_path / "data", [wide])
    torch.testing.assert_close(
        load_images(tmp_path / "data", resolution=[4, 4])[0]["images"], torch.full((3, 4, 4), 200 / 127.5 - 1)
    )


def test_resizing_agrees_with_pil(tmp_path):
    image = np.asarray(Image.fromarray(pixels(6, 6)).resize((48, 48), Image.Resampling.BICUBIC))
    save_images(tmp_path / "data", [image])
    expected = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC))
    found = load_images(tmp_path / "data", resolution=[16])[0]["images"]
    torch.testing.assert_close(found, in_range(expected[None])[0], rtol=0, atol=1.01 / 127.5)

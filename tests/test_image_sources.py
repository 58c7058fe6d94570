"""Which images, splits and classes a source has: of local files, of tables, of names."""

import io
import os
import re

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from diffusers_dpm.data import DataError, check_disjoint, load_images


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def image(value):
    return np.full((4, 4), value, np.uint8)


def save(folder, *names, first=0):
    """Images or arrays whose pixels number them."""
    for value, name in enumerate(names, first):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, image(value)) if path.suffix == ".npy" else Image.fromarray(image(value)).save(path)


def values(data):
    """The numbers of the images."""
    return ((data[list(range(len(data)))]["images"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def encoded(value):
    buffer = io.BytesIO()
    Image.fromarray(image(value)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def table(first, num, labels=None):
    columns = {"image": [encoded(first + i) for i in range(num)]}
    features = {"image": datasets.Image()}
    if labels:
        columns["label"], features["label"] = labels, datasets.ClassLabel(names=["x", "y"])
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


# Splits --------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["png", "npy", "npy file", "parquet file", "parquet folder", "saved", "saved with splits"])
def two_splits(request, tmp_path):
    """(data with the images 0 .. 3 as train, with 4 .. 6 as test, whether both are one source)."""
    form, root = request.param, tmp_path / "data"
    if form in ("png", "npy"):
        save(root, *(f"train/{i}.{form}" for i in range(4)))
        save(root, *(f"test/{i}.{form}" for i in range(3)), first=4)
        return root, root
    root.mkdir()
    parts = {"train": (0, 4), "test": (4, 3)}
    if form == "npy file":
        for name, (first, num) in parts.items():
            np.save(
                root / f"{name}.npy", np.stack([np.full((8, 8), first + i, np.uint8) for i in range(num)])[:, None]
            )
        return root / "train.npy", root / "test.npy"
    if form.startswith("parquet"):
        for name, part in parts.items():
            table(*part).to_parquet(root / f"{name}-00000-of-00001.parquet")
        if form == "parquet folder":
            return root, root
        return root / "train-00000-of-00001.parquet", root / "test-00000-of-00001.parquet"
    if form == "saved":
        for name, part in parts.items():
            table(*part).save_to_disk(root / name)
        return root / "train", None
    datasets.DatasetDict({name: table(*part) for name, part in parts.items()}).save_to_disk(root)
    return root, root


def test_only_the_images_of_the_split_come(two_splits):
    train, test = two_splits
    assert values(load_images(train, split="train")) == values(load_images(train)) == [0, 1, 2, 3]
    assert load_images(train).source.split == "train"
    if test is not None:
        found = load_images(test, split="test")
        assert (values(found), found.source.split) == ([4, 5, 6], "test")


def test_a_split_that_is_not_there_is_refused(two_splits):
    for split in ("validation", "val", "other") + (() if two_splits[0] == two_splits[1] else ("test",)):
        with pytest.raises(DataError, match=f"no split '{split}': there is .*train"):
            load_images(two_splits[0], split=split)


def test_the_only_split_is_the_default(tmp_path):
    save(tmp_path / "test-only", "test/0.png", "test/1.png")
    save(tmp_path / "plain", "0.png", "1.png")
    datasets.DatasetDict({"odd": table(0, 2)}).save_to_disk(tmp_path / "saved")
    for folder, split in (("test-only", "test"), ("plain", "train"), ("saved", "odd")):
        for default in ("train", "test"):
            assert load_images(tmp_path / folder, default_split=default).source.split == split
    save(tmp_path / "several", "train/0.png", "val/1.png")
    with pytest.raises(DataError, match="no split 'test': there is train, validation"):
        load_images(tmp_path / "several", default_split="test")


@pytest.mark.parametrize("word", ["val", "validation", "valid", "dev", "Val"])
@pytest.mark.parametrize("suffix", ["png", "npy"])
def test_folders_of_splits_are_no_classes(tmp_path, word, suffix):
    save(tmp_path, f"photos/training/a.{suffix}", f"photos/training/b.{suffix}", f"photos/{word}/c.{suffix}")
    if suffix == "npy":
        save(tmp_path, f"photos/{word}/d.npy", first=3)
    train, held_out = load_images(tmp_path), load_images(tmp_path, split="validation")
    assert (values(train), train.num_classes, held_out.num_classes) == ([0, 1], 0, 0)
    assert values(held_out)[0] == 2


@pytest.mark.parametrize(
    "names",
    [
        ("train/0.png", "plane/1.png"),
        ("train station/0.png", "test tube/1.png"),
        ("best_test.png", "steam-train-1.png"),
        ("a/best_test.png", "b/train.png"),
    ],
)
def test_words_in_other_names_are_no_splits(tmp_path, names):
    save(tmp_path, *names)
    data = load_images(tmp_path)
    assert sorted(values(data)) == [0, 1]
    folders = sorted({name.rpartition("/")[0] for name in names} - {""})
    assert (data.class_names or []) == folders


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/0.png", "test/1.png", "extra/2.png"), "test, train.*extra"),
        (("test/0.png", "1.png"), "holds splits, test, but also images"),
        (("cat/train/0.png", "cat/test/1.png", "dog/train/2.png"), "holds test, train within other folders"),
    ],
)
def test_images_beside_splits_are_refused(tmp_path, names, message):
    save(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path)


def test_classes_are_those_of_all_splits(tmp_path):
    save(tmp_path, "train/cat/0.png", "train/dog/1.png", "test/dog/2.png")
    data = load_images(tmp_path, split="test")
    assert (data.class_names, data.labels.tolist()) == (["cat", "dog"], [1])


@pytest.mark.parametrize("source", ["digits", "files", "table"])
def test_part_of_a_split(tmp_path, source):
    """Both parts hold every class, together they are the split, and neither depends on the other being asked for."""
    path = source
    if source == "files":
        path = tmp_path / "files"
        save(path, *(f"{'ab'[i // 10]}/{i:02d}.png" for i in range(20)))
    elif source == "table":
        path = tmp_path / "table"
        table(0, 20, [0] * 10 + [1] * 10).save_to_disk(path)
    rest, part, whole = (load_images(path, split=split) for split in ("train[:80%]", "train[80%:]", "train"))
    assert len(part) == len(whole) // 5
    assert len(rest) + len(part) == len(whole)
    assert {*rest.labels.tolist()} == {*part.labels.tolist()} == {*whole.labels.tolist()}
    check_disjoint(rest, part)
    with pytest.raises(DataError, match=f"{len(part)} of the {len(part)} .*'train\\[80%:\\]'"):
        check_disjoint(whole, part)
    assert torch.equal(part[[0, 1]]["images"], load_images(path, split="train[80%:]")[[0, 1]]["images"])


def test_points_of_the_swiss_roll_lie_on_the_spiral():
    """The radius is the angle, turns counted, up to the noise; the axes are scikit-learn's first and last."""
    parts = [load_images("swiss-roll", split=split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [10_000, 2_000]
    check_disjoint(*parts)
    points = parts[0][list(range(10_000))]["images"]
    assert points.shape == (10_000, 2, 1, 1)
    assert 0.7 < points.abs().max() < 1
    x, y = 17 * points[..., 0, 0].T
    radius, turn = torch.hypot(x, y), 2 * torch.pi
    off = torch.remainder(torch.atan2(y, x) - radius + torch.pi, turn) - torch.pi
    assert off.mean().abs() < 0.03  # noise across the radius lengthens it by 0.5^2 / 2 r
    assert off.std().item() == pytest.approx(0.5, rel=0.05)


def test_points_of_the_moons_lie_on_two_half_circles():
    data = load_images("two-moons", split="test")
    batch = data[list(range(len(data)))]
    x, y = (2 * batch["images"][..., 0, 0] + torch.tensor([0.5, 0.25])).T
    lower = batch["labels"] == 1
    assert data.class_names == ["upper", "lower"]
    radius = torch.hypot(x - lower.float(), y - 0.5 * lower)
    assert (radius - 1).abs().max() < 6 * 0.05
    assert lower.sum() == 1000


@pytest.mark.parametrize("split", ["train[", "train[:90%]+test", "train[:101%]", "train[a:b]"])
def test_part_that_cannot_be_read(split):
    with pytest.raises(DataError, match=re.escape(repr(split))):
        load_images("digits", split=split)


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "npy"])
@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("cat/0", "dog/1"), ["cat", "dog"]),
        (("all/cat/0", "all/dog/1"), ["cat", "dog"]),
        (("cat/0", "dog/1", ".ipynb_checkpoints/2", "__MACOSX/3"), ["cat", "dog"]),
        (("cat/0", "dog/1", "2"), None),
        (("cat/monday/0", "dog/monday/1"), None),
        (("only/0", "only/1"), None),
    ],
)
def test_classes_of_folders(tmp_path, suffix, names, classes):
    save(tmp_path, *(f"{name}.{suffix}" for name in names))
    data = load_images(tmp_path)
    hidden = sum(name.startswith((".", "__")) for name in names)
    assert (data.class_names, len(data)) == (classes, len(names) - hidden)
    if classes is None:
        with pytest.raises(DataError, match="each class into one folder"):
            load_images(tmp_path, require_labels=True)
    else:
        assert data.labels.tolist() == [0, 1]


@pytest.mark.parametrize("suffix", ["png", "npy"])
def test_links_are_followed_once(tmp_path, suffix):
    save(tmp_path / "elsewhere", f"a/0.{suffix}", f"b/1.{suffix}")
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "a" / "loop").symlink_to(tmp_path / "data")
    data = load_images(tmp_path / "data")
    assert (data.class_names, values(data)) == (["a", "b"], [0, 1])


def test_one_folder_is_no_class(tmp_path):
    save(tmp_path, "cat/0.png", "cat/1.png")
    with pytest.raises(DataError, match="all lie in cat: one class is none"):
        load_images(tmp_path, require_labels=True)


def test_a_link_to_a_sibling_is_a_class_of_its_own(tmp_path):
    save(tmp_path, "b/0.png", "b/1.png")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    data = load_images(tmp_path)
    assert (data.class_names, data.labels.tolist(), values(data)) == (["a", "b"], [0, 0, 1, 1], [0, 1, 0, 1])


def test_a_split_that_is_a_link_is_not_held_out(tmp_path):
    save(tmp_path, "train/0.png", "train/1.png")
    (tmp_path / "test").symlink_to("train")
    with pytest.raises(DataError, match="2 of the 2 held-out images are also trained on"):
        check_disjoint(load_images(tmp_path), load_images(tmp_path, split="test"))


@pytest.mark.parametrize("names", [("train-0", "test-0"), ("train/a", "test/a"), ("a/train", "a/test-1")])
def test_folders_of_tables_with_brackets(tmp_path, names):
    for first, name in enumerate(names):
        path = tmp_path / "set [1]" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table(10 * first, 2, [0, 1]).to_parquet(path)
    for split, expected in (("train", [0, 1]), ("test", [10, 11])):
        data = load_images(tmp_path / "set [1]", split=split)
        assert (values(data), data.class_names) == (expected, ["x", "y"])
    with pytest.raises(DataError, match="no split 'validation'"):
        load_images(tmp_path / "set [1]", split="validation")


@pytest.mark.parametrize("name", ["photos [v1]", "[2024] set/x", "what?*"])
@pytest.mark.parametrize("form", ["png", "npy", "parquet", "saved"])
def test_brackets_in_a_path(tmp_path, name, form):
    path = tmp_path / name
    path.mkdir(parents=True)
    if form == "parquet":
        path = path / "images.parquet"
        table(0, 2).to_parquet(path)
    elif form == "saved":
        table(0, 2).save_to_disk(path)
    else:
        save(path, f"0.{form}", f"1.{form}")
    assert values(load_images(path)) == [0, 1]


def test_captions_and_runs_are_no_data(tmp_path):
    save(tmp_path, "0.png", "1.png", "2.png", "run/samples/3.png")
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("a square")
        (tmp_path / f"{i}.json").write_text('{"text": "a square"}')
    (tmp_path / "run" / "training_options.json").write_text("{}")
    assert values(load_images(tmp_path)) == [0, 1, 2]


def test_metadata_goes_to_datasets(tmp_path):
    """Labels in a file beside the images, whose names are no splits."""
    save(tmp_path, "[1]/best_test.png", "[1]/train-1.png")
    rows = "file_name,kind\nbest_test.png,b\ntrain-1.png,a\n"
    (tmp_path / "[1]" / "metadata.csv").write_text(rows)
    data = load_images(tmp_path / "[1]", label_column="kind")
    assert sorted(zip(values(data), data.labels.tolist(), strict=True)) == [(0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("stray", "message"),
    [("mean.npy", r"\.npy files .*mean\.npy"), ("x.parquet", r"tables .*x\.parquet"), ("x.heic", r"x\.heic")],
)
def test_mixed_kinds_are_refused(tmp_path, stray, message):
    save(tmp_path, "0.png", "1.png")
    np.save(tmp_path / stray, image(0)) if stray == "mean.npy" else (tmp_path / stray).write_bytes(b"")
    with pytest.raises(DataError, match=message):
        load_images(tmp_path)


@pytest.mark.parametrize("name", ["x.npz", "one.png", "x.pt", "rows.jsonl", "archive.zip", "plain"])
def test_file_of_an_unread_kind(tmp_path, name):
    (tmp_path / name).write_bytes(b"0")
    with pytest.raises(DataError, match=rf"{name}: --data takes .*not a \.?\w+ file") as refused:
        load_images(tmp_path / name)
    assert "Hub" not in str(refused.value)


def test_upper_case_suffixes(tmp_path):
    save(tmp_path, "0.PNG", "1.PNG")
    assert values(load_images(tmp_path)) == [0, 1]
    with open(tmp_path / "x.NPY", "wb") as file:
        np.save(file, np.stack([np.full((8, 8), i, np.uint8) for i in range(3)]))
    assert values(load_images(tmp_path / "x.NPY", channels=1)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("imags", "imags; did you mean images"),
        ("./imags", "imags; did you mean images"),
        ("images/trian", "no such file or folder: images/trian"),
        ("a/b/c", "no such file or folder: a/b/c"),
        ("images.npy", "no such file or folder: images.npy; did you mean images"),
        ("set.zip", "no such file or folder: set.zip"),
    ],
)
def test_mistyped_path(tmp_path, monkeypatch, data, message):
    """Named at once: where the Hub cannot be asked, and before it is where the name is that of a path."""
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match=re.escape(message)):
        load_images(data)


# Tables --------------------------------------------------------------------------------------------------------------


def test_columns_of_another_writer(tmp_path):
    rows = {"image": [encoded(i) for i in range(3)], "label": [0, 1, 0]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "x.parquet")
    assert values(load_images(tmp_path / "x.parquet")) == [0, 1, 2]


def test_row_without_an_image(tmp_path, caplog):
    rows = {"image": [encoded(0), None, encoded(2)]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match=r"row 1 of .*--skip-broken"):
        load_images(tmp_path / "data")
    assert values(load_images(tmp_path / "data", skip_broken=True)) == [0, 2]
    assert "1 of 3" in caplog.text


def test_images_without_labels(tmp_path):
    table(0, 2, [-1, -1]).save_to_disk(tmp_path / "none")
    table(0, 2, [1, -1]).save_to_disk(tmp_path / "some")
    assert load_images(tmp_path / "none").labels.tolist() == [-1, -1]
    assert load_images(tmp_path / "some").labels.tolist() == [1, -1]
    for name in ("none", "some"):
        with pytest.raises(DataError, match=r"row \d of .*no label"):
            load_images(tmp_path / name, require_labels=True)


def test_lists_of_pixels_are_refused(tmp_path):
    rows = {"pixels": [[[0, 300], [0, 0]]] * 2}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match=r"'pixels'.* \.npy"):
        load_images(tmp_path / "data", image_column="pixels")


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_broken_images_are_skipped_on_request(tmp_path, caplog, cache_bytes):
    save(tmp_path, "a/0.png", "a/1.png", "b/2.png", "b/3.png")
    for name in ("a/0.png", "b/2.png"):
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "b" / "9.png").symlink_to(tmp_path / "nowhere")
    data = load_images(tmp_path, skip_broken=True, cache_bytes=cache_bytes)
    assert (values(data), data.labels.tolist()) == ([1, 3], [0, 1])
    assert re.search(rf"3 of 5 .*{re.escape(os.fspath(tmp_path))}/a/0\.png", caplog.text)


def test_damaged_table_says_why(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"cannot load .*: Parquet file size is 4 bytes"):
        load_images(tmp_path / "x.parquet")

"""Folders that are written whole or not at all."""

import pytest

from diffusers_dpm.records import TEMPORARY, atomic_folder, move_children, remove_folder
from diffusers_dpm.training.checkpoints import (
    checkpoint_folder,
    list_checkpoints,
    prune_checkpoints,
    remove_incomplete,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(folder, text="new"):
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_text(text)


def test_folder_appears_when_it_is_complete(tmp_path):
    target = checkpoint_folder(tmp_path, 7)
    with atomic_folder(target) as folder:
        fill(folder)
        assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(tmp_path) == [target]
    assert (target / "sub" / "file").read_text() == "new"
    assert names(target.parent) == [target.name]


def test_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with atomic_folder(target) as folder:
        fill(folder)
    assert names(target) == ["sub"]
    assert names(tmp_path) == ["target"]


def write_and_fail(target):
    with atomic_folder(target) as folder:
        fill(folder)
        raise RuntimeError("disk on fire")


def test_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "target"
    fill(target, "old")
    with pytest.raises(RuntimeError, match="disk on fire"):
        write_and_fail(target)
    assert (target / "sub" / "file").read_text() == "old"
    assert names(tmp_path) == ["target"]


def test_only_complete_checkpoints_are_listed_by_number(tmp_path):
    assert list_checkpoints(tmp_path) == []
    for step in (100_000_000, 2000, 300):
        fill(checkpoint_folder(tmp_path, step))
    for stray in (f"{TEMPORARY}step-00004000", "step-00005000.tmp", "step-best"):
        fill(tmp_path / "checkpoints" / stray)
    (tmp_path / "checkpoints" / "step-00006000").write_text("a file")
    assert list_checkpoints(tmp_path) == [checkpoint_folder(tmp_path, step) for step in (300, 2000, 100_000_000)]


@pytest.mark.parametrize(("limit", "kept"), [(0, [1, 2, 3]), (1, [3]), (2, [2, 3]), (5, [1, 2, 3])])
def test_pruning_keeps_the_latest(tmp_path, limit, kept):
    for step in (1, 2, 3):
        fill(checkpoint_folder(tmp_path, step))
    prune_checkpoints(tmp_path, limit)
    assert list_checkpoints(tmp_path) == [checkpoint_folder(tmp_path, step) for step in kept]


def test_leftovers_are_removed(tmp_path):
    fill(tmp_path / f"{TEMPORARY}pipeline")
    fill(tmp_path / "checkpoints" / f"{TEMPORARY}step-00000004")
    fill(checkpoint_folder(tmp_path, 3))
    remove_incomplete(tmp_path)
    assert names(tmp_path) == ["checkpoints"]
    assert names(tmp_path / "checkpoints") == ["step-00000003"]


def test_removing_what_is_not_there(tmp_path):
    remove_folder(tmp_path / "nothing")


def test_children_are_moved_over_older_ones(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    fill(source)
    (source / "model_index.json").write_text("new")
    fill(target, "old")
    (target / "sub" / "mine").write_text("mine")
    (target / "other").write_text("kept")
    move_children(source, target)
    assert names(target) == ["model_index.json", "other", "sub"]
    assert (target / "sub" / "file").read_text() == "new"
    assert names(target / "sub") == ["file", "mine"]
    assert not source.exists()

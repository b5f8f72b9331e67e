"""Output folders and files that appear whole or not at all."""

import os

import pytest

from hf_fff.files import atomic_file, atomic_folder, check_output


def write(folder, text="new"):
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text(text)


def content(root):
    return {str(p.relative_to(root)): p.read_text() if p.is_file() else None for p in root.rglob("*")}


@pytest.fixture
def old(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    return folder


OLD = {"out": None, "out/old": "old"}
NEW = {"out": None, "out/sub": None, "out/sub/file": "new"}


def test_new(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        write(folder)
        assert not (tmp_path / "out").exists()
    assert content(tmp_path) == NEW


def test_parents_are_made(tmp_path):
    with atomic_folder(tmp_path / "a" / "b" / "out") as folder:
        write(folder)
    assert content(tmp_path / "a" / "b") == NEW


def test_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_folder(type(tmp_path)("out")) as folder:
        write(folder)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert content(tmp_path) == {**NEW, "elsewhere": None}


def test_an_empty_folder_is_no_hindrance(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        write(folder)
    assert content(tmp_path) == NEW


def test_a_full_folder_is_untouched(tmp_path, old):
    with pytest.raises(FileExistsError, match=r"out exists and is not empty"), atomic_folder(old):
        pytest.fail("came in")
    assert content(tmp_path) == OLD


def test_overwrite_replaces(tmp_path, old):
    with atomic_folder(old, overwrite=True) as folder:
        write(folder)
        assert content(old) == {"old": "old"}
    assert content(tmp_path) == NEW


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_in_the_way(tmp_path, overwrite):
    (tmp_path / "out").write_text("file")
    with pytest.raises(FileExistsError, match="is no folder"), atomic_folder(tmp_path / "out", overwrite=overwrite):
        pytest.fail("came in")
    assert content(tmp_path) == {"out": "file"}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(3), ValueError("no")]
)
def test_errors_inside(tmp_path, old, error):
    for path, overwrite in ((tmp_path / "fresh", False), (old, True)):
        with pytest.raises(type(error)) as caught, atomic_folder(path, overwrite=overwrite) as folder:
            write(folder)
            raise error
        assert caught.value is error
        assert content(tmp_path) == OLD


def test_no_parents_are_left_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="no"), atomic_folder(tmp_path / "a" / "b" / "out"):
        raise ValueError("no")
    assert content(tmp_path) == {}


def test_the_last_step_fails(tmp_path, old, monkeypatch):
    """The new folder cannot take its place: the old one is put back."""
    path_class = type(tmp_path)
    rename = path_class.rename

    def failing(self, target):
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(path_class, "rename", failing)
    with pytest.raises(OSError, match="No space"), atomic_folder(old, overwrite=True) as folder:
        write(folder)
    assert content(tmp_path) == OLD


def test_a_link_keeps_being_one(tmp_path, old):
    (tmp_path / "link").symlink_to(old)
    with atomic_folder(tmp_path / "link", overwrite=True) as folder:
        write(folder)
    assert (tmp_path / "link").is_symlink() and content(old) == {"sub": None, "sub/file": "new"}


def test_the_current_folder_is_refused(old, monkeypatch):
    monkeypatch.chdir(old)
    for path in (old, old.parent):
        with pytest.raises(FileExistsError, match="current folder"):
            check_output(path, overwrite=True)
    assert content(old) == {"old": "old"}


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="file is not a folder"):
        check_output(tmp_path / "file" / "out", overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="cannot be made"):
            check_output(tmp_path / "out", overwrite=False)
    finally:
        tmp_path.chmod(0o700)


def test_permissions_are_the_usual_ones(tmp_path):
    (tmp_path / "usual").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        write(folder)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_others_may_read_what_is_written(tmp_path):
    with atomic_folder(tmp_path / "out") as new:
        (new / "inner").mkdir()
        for path in (new / "weights", new / "inner" / "more"):
            path.touch(mode=0o600)
    (tmp_path / "any").touch()
    usual = (tmp_path / "any").stat().st_mode
    assert {(tmp_path / "out" / name).stat().st_mode for name in ("weights", "inner/more")} == {usual}


def test_a_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as work:
        work.write_text("half")
        raise RuntimeError
    assert content(tmp_path) == {"a.txt": "old"}
    with atomic_file(path) as work:
        work.write_text("new")
        assert work.suffix == ".txt" and path.read_text() == "old"
    assert content(tmp_path) == {"a.txt": "new"}

"""Stage 1's folders: sets of photos that join, grow and move; edits that another tool made; a
concept that is made anew."""

import hashlib
import shutil

import pytest
from conftest import Tower, run_main, script, table, torchrun
from PIL import Image, ImageOps
from tiny_pipelines import pixels, psnr, rows, scene, write_made

import dataset
import runs

SMALL = ("--demo", "--size", 32, "--train", 4, "--test", 2)


def negatives(images, names, prompts, seeds):
    """A teacher; concepts whose prompt says so are dark."""
    edits = []
    for photo, prompt in zip(images, prompts, strict=True):
        edit = ImageOps.invert(photo)
        edits.append(edit.point(lambda x: x // 3) if "dark" in prompt else edit)
    return edits


@pytest.fixture
def edit_photos(load_stage, monkeypatch, capsys, tmp_path):
    """edit_photos(folder, "sketch", ...) runs the stage on photos in a folder of tmp_path, by
    default with a teacher that makes negatives; returns what it printed."""

    def call(images, concept, *flags, teacher=negatives):
        module = load_stage("01")
        monkeypatch.setattr(module, "Clip", Tower)
        if teacher:
            monkeypatch.setattr(module, "load_teacher", lambda *_: teacher)
            flags = ("--teacher", "negatives", *flags)
        capsys.readouterr()
        where = ("--images", tmp_path / images, "--out", tmp_path / "pairs")
        run_main(module, *SMALL, *where, "--concept", f"{concept}=make it {concept}", *flags)
        return capsys.readouterr().out

    return call


def write_photos(folder, seeds, size=(48, 36)):
    folder.mkdir(exist_ok=True)
    for seed in seeds:
        scene(*size, seed=seed).save(folder / f"{seed}.png")


def photos_of(pairs, images, split):
    """{file: photo} of a set."""
    return runs.read_json(pairs / "photos.json")[str(images)][split]


def source_hashes(pairs, split, names):
    """Of what the photos of a split show."""
    paths = [pairs / split / "source" / name for name in names]
    return {hashlib.sha256(pixels(path).tobytes()).hexdigest() for path in paths}


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("0*.png")}


# ---- Folders that change -------------------------------------------------------------------------


def test_a_folder_that_changed_goes_on_with_the_photos_that_the_pairs_have(edit_photos, tmp_path):
    photos, pairs = tmp_path / "photos", tmp_path / "pairs"
    write_photos(photos, range(6))
    edit_photos(photos, "sketch")
    before = modified(pairs)
    assert len(before) == 12
    write_photos(photos, [6])
    assert "1 photo more, 0 fewer than before; going on with the 6" in edit_photos(photos, "sketch")
    gone = photos_of(pairs, photos, "train")["00002.png"]
    (photos / gone).unlink()
    words = edit_photos(photos, "dark")
    assert "1 photo more, 1 fewer than before" in words and "done already" not in words
    assert before.items() <= modified(pairs).items()
    assert len(rows(pairs, "train", "test")) == 12
    for path in sorted(pairs.glob("t*/dark/*.png")):  # of the photo that is gone, too
        source = pixels(path.parent.with_name("source") / path.name)
        assert psnr((255 - source) // 3, pixels(path)) > 50


def test_a_folder_that_moved_is_the_same_set(edit_photos, tmp_path):
    photos, pairs = tmp_path / "photos", tmp_path / "pairs"
    write_photos(photos, range(6))
    edit_photos(photos, "sketch")
    before = (pairs / "photos.json").read_bytes()
    photos.rename(tmp_path / "moved")
    assert "done already" in edit_photos("moved", "sketch")
    edit_photos("moved", "dark")
    assert (pairs / "photos.json").read_bytes() == before and len(rows(pairs)) == 12


@pytest.mark.parametrize("teacher_size", [32, 64])
def test_a_photo_that_shows_something_else_since_is_not_edited(edit_photos, tmp_path, teacher_size):
    """Its square is. The names may also be those of another folder's photos."""
    photos, pairs = tmp_path / "photos", tmp_path / "pairs"
    write_photos(photos, range(6))
    edit_photos(photos, "sketch")
    changed = photos_of(pairs, photos, "train")["00002.png"]
    scene(48, 36, seed=50).save(photos / changed)
    edit_photos(photos, "night", "--teacher-size", teacher_size)
    for path in pairs.glob("t*/night/*.png"):
        source = pixels(path.parent.with_name("source") / path.name)
        assert psnr(255 - source, pixels(path)) > 20, path.name


def test_what_a_set_was_asked_for_with_stays(edit_photos, error_of, tmp_path):
    write_photos(tmp_path / "photos", range(6))
    edit_photos("photos", "sketch")
    flags = ("--images", tmp_path / "photos", "--out", tmp_path / "pairs")
    line = error_of("01", *SMALL, *flags, "--train", 3)
    assert "with other settings (train 4 there, 3 here)" in line
    for path in (tmp_path / "photos").iterdir():
        path.rename(path.with_stem(f"other {path.stem}"))
    assert "has photos of another folder" in error_of("01", *SMALL, *flags)


def test_a_concept_that_failed_does_not_stand_in_the_way_of_others(edit_photos, tmp_path):
    def broken(*_):
        raise runs.UserError("out of memory")

    write_photos(tmp_path / "photos", range(6))
    with pytest.raises(runs.UserError, match="out of memory"):
        edit_photos("photos", "dark", teacher=broken)
    edit_photos("photos", "sketch")
    assert list(dataset.read_concepts(tmp_path / "pairs")) == ["sketch"]


def test_two_processes_find_that_all_is_done(edit_photos, tmp_path):
    photos, pairs = tmp_path / "photos", tmp_path / "pairs"
    write_photos(photos, range(6))
    edit_photos("photos", "sketch")
    before = (pairs / "result.json").stat().st_mtime_ns
    flags = (*SMALL, "--images", photos, "--out", pairs, "--teacher", "negatives")
    torchrun(script("01"), *flags, "--concept", "sketch=make it sketch")
    assert (pairs / "result.json").stat().st_mtime_ns == before


# ---- Concepts with photos of their own -----------------------------------------------------------


def test_a_second_set_joins(edit_photos, tmp_path):
    """Its numbers go on; a photo that both have keeps its number, and is trained on or held out for
    all. Stages 2 and 3 take each concept's own photos."""
    pairs, cache = tmp_path / "pairs", tmp_path / "cache"
    write_photos(tmp_path / "photos", range(6))
    write_photos(tmp_path / "faces", range(10, 16), (36, 48))
    edit_photos("photos", "sketch")
    before = modified(pairs)
    shared = {"train": "c.png", "test": "j.png"}  # new names, which come first in seed 0's order
    for split, name in shared.items():
        photo = photos_of(pairs, tmp_path / "photos", split)["00001.png"]
        shutil.copy(tmp_path / "photos" / photo, tmp_path / "faces" / name)
    edit_photos("faces", "dark", "--train", 5, "--test", 3)
    assert before.items() <= modified(pairs).items()
    concepts = dataset.read_concepts(pairs)
    assert concepts["sketch"]["images"] == str(tmp_path / "photos")
    assert concepts["dark"]["images"] == str(tmp_path / "faces")
    hashes = {}
    for split, first, count in (("train", 4, 5), ("test", 2, 3)):
        photos = photos_of(pairs, tmp_path / "faces", split)
        assert photos["00001.png"] == shared[split] and len(photos) == count
        assert sorted(photos)[1:] == [f"{i:05}.png" for i in range(first, first + count - 1)]
        assert dataset.edit_names(pairs, split, ["dark"]) == {"dark": sorted(photos)}
        for file, name in photos.items():
            found = pixels(pairs / split / "source" / file)
            wanted = dataset.read_square(tmp_path / "faces" / name, 32)
            assert psnr(found, wanted) > 98
            assert psnr((255 - found) // 3, pixels(pairs / split / "dark" / file)) > 50
        files = dataset.edit_names(pairs, split, ["source"])["source"]
        hashes[split] = source_hashes(pairs, split, files)
        assert len(hashes[split]) == len(files) == first + count - 1
    assert not hashes["train"] & hashes["test"]
    for split in ("train", "test"):
        for row in rows(pairs, split):
            photos = photos_of(pairs, concepts[row["concept"]]["images"], split)
            assert photos[row["source"].removeprefix("source/")] == row["photo"]
    assert "done already" in edit_photos("photos", "sketch")

    run_main("02", "--pairs", pairs, "--out", tmp_path / "clusters", "--base", 2, "--samples", 3)
    edits = dataset.edit_names(pairs, "train", concepts)
    for concept in concepts:
        chosen = (tmp_path / f"clusters/samples/{concept}.txt").read_text().split()
        assert len(chosen) == 3 and {*chosen} <= {*edits[concept]}
    small = "--arch e2gan --width 8 --steps 2 --batch 4 --fid off --device cpu --perceptual 0"
    where = ("--pairs", pairs, "--clusters", tmp_path / "clusters", "--cache", cache)
    run_main("03", *small.split(), *where, "--out", tmp_path / "base")
    measured = table(tmp_path / "base", "Base concepts, held-out photos")
    assert [row["concept"] for row in measured] == ["sketch", "dark"]


# ---- A concept made anew -------------------------------------------------------------------------


def test_redo_makes_one_concept_anew(edit_photos, error_of, tmp_path):
    photos, pairs = tmp_path / "photos", tmp_path / "pairs"
    write_photos(photos, range(6))
    edit_photos("photos", "sketch")
    edit_photos("photos", "night")
    kept = {path: when for path, when in modified(pairs).items() if path.parent.name != "night"}
    flags = (*SMALL, "--images", photos, "--out", pairs, "--teacher", "negatives")
    line = error_of("01", *flags, "--concept", "night=a dark night")
    assert "has another 'night'" in line and "--redo night" in line
    line = error_of("01", *flags, "--concept", "sketch=make it sketch", "--redo", "night")
    assert "--redo night: say what it is" in line
    edit_photos("photos", "sketch", "--concept", "night=a dark night", "--redo", "night")
    assert kept.items() <= modified(pairs).items() and len(kept) == 12
    assert dataset.read_concepts(pairs)["night"]["prompt"] == "a dark night"
    for path in pairs.glob("t*/night/*.png"):
        source = pixels(path.parent.with_name("source") / path.name)
        assert psnr((255 - source) // 3, pixels(path)) > 50


# ---- Edits that another tool made ----------------------------------------------------------------


@pytest.fixture
def made(edit_photos, tmp_path):
    """made() runs the stage on ten photos and the edits of them that another tool made."""
    write_made(tmp_path)
    flags = ("--teacher", tmp_path / "edits", "--train", 9)
    return lambda *more: edit_photos("photos", "negative", *flags, *more, teacher=None)


def all_negative(pairs):
    found = [(split, row) for split in ("train", "test") for row in rows(pairs, split)]
    for split, row in found:
        photo, edit = (pixels(pairs / split / row[key]) for key in ("source", "file_name"))
        assert psnr(255 - photo, edit) > 22, row["photo"]
    return {row["photo"] for _, row in found}


def test_photos_without_an_edit_are_left_out_and_counted(made, error_of, tmp_path):
    (tmp_path / "edits/negative/a b/1.png").unlink()
    words = made()
    assert "1 of 10 photos have no edit in" in words and "the first is a b/1.jpg" in words
    assert len(all_negative(tmp_path / "pairs")) == 9
    where = ("--images", tmp_path / "photos", "--out", tmp_path / "other")
    flags = (*SMALL, *where, "--teacher", tmp_path / "edits", "--concept", "other=do it")
    assert "edits/other does not exist: --teacher takes" in error_of("01", *flags)
    write_photos(tmp_path / "edits/other", [77])
    assert "other holds no edit of a photo: it should be named" in error_of("01", *flags)
    assert not (tmp_path / "other").exists()


def test_edits_that_cannot_be_used_are_skipped_and_named(made, tmp_path):
    """One is truncated, one shows another part of its photo; three are off by the rounding of both
    sides to multiples of 8 or 64, or to a pixel."""
    edits = tmp_path / "edits/negative"
    data = (tmp_path / "photos/4.jpg").read_bytes()
    (edits / "4.png").write_bytes(data[:3000])
    Image.new("RGB", (176, 100), "red").save(edits / "2.WEBP")  # of 192x120
    for name, size in (("0.jpg", (168, 120)), ("6.jpg", (152, 120)), ("a b/3.jpg", (161, 120))):
        edit = Image.open(edits / name)
        edit.resize(size).save(edits / name, quality=95)
    words = made()
    assert "skipped for 'negative': 4.jpg: " in words and "4.png is not a picture" in words
    assert "2.WEBP is 176x100, but its photo 192x120" in words
    assert len(all_negative(tmp_path / "pairs")) == 8
    assert "done already" in made()


def test_names_that_differ_in_case_or_in_how_accents_are_written(made, tmp_path):
    for path in ("photos/0.jpg", "edits/negative/0.jpg"):
        (tmp_path / path).rename(
            tmp_path / path.replace("0", "caf\u00e9" if path[0] == "p" else "cafe\u0301")
        )
    (tmp_path / "photos/2.jpg").rename(tmp_path / "photos/IMG_2.JPG")
    (tmp_path / "edits/negative/2.WEBP").rename(tmp_path / "edits/negative/img_2.webp")
    made()
    assert {"caf\u00e9.jpg", "IMG_2.JPG"} < all_negative(tmp_path / "pairs")


def test_no_edit_is_taken_for_two_photos(tmp_path):
    edits = {name: tmp_path / name for name in ("a.png", "b.webp")}
    found = dataset.match_names(["A.jpg", "a.jpg", "a.png", "b.jpg"], edits)
    assert found == {"a.png": tmp_path / "a.png", "b.jpg": tmp_path / "b.webp"}

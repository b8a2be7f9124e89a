"""Pairs and their pictures: which pictures a batch holds, the file that they are decoded into, and
what is said of a folder that cannot be used."""

import io
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from conftest import ROOT
from PIL import Image, ImageCms

import dataset
import runs
import training

CPU = torch.device("cpu")
EDITS = {"sketch": lambda x: 1 - x, "night": lambda x: 0.3 * x}


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_pairs):
    """Seven photos with two edits each, but one: a gate may have rejected it."""
    folder = write_pairs(tmp_path_factory.mktemp("data") / "pairs", EDITS, 7, 2, 24)
    (folder / "train/night/00002.png").unlink()
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "pairs")


def find(folder):
    return dataset.find_pairs(folder, "train", list(EDITS))


def draw(pairs, steps=range(9), batch=4):
    """The batches of some steps, beyond an epoch: [(photo, edit, concept), ...]."""
    return list(pairs.batches(batch, steps, 3, CPU))


def equal(one, two):
    """Whether two lists of batches hold the same numbers."""
    return all(map(torch.equal, sum(one, ()), sum(two, ())))


def files_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


# ---- Batches -------------------------------------------------------------------------------------


def test_a_batch_is_the_pngs_that_the_picks_name(made, tmp_path):
    pairs = find(made).cache(tmp_path)
    for step, (photos, edits, concepts) in enumerate(draw(pairs)):
        picks, flips = dataset.draw_picks([7, 6], 4, step, 3)
        assert torch.equal(concepts, picks[:, 0])
        for photo, edit, (c, i), flip in zip(photos, edits, picks.tolist(), flips, strict=True):
            name = list(EDITS)[c]
            file = dataset.edit_names(made, "train", [name])[name][i]
            for found, kind in ((photo, "source"), (edit, name)):
                pixels = dataset.read_image(made / "train" / kind / file)
                assert torch.equal(found, dataset.to_float(pixels.flip(-1) if flip else pixels))


def test_picks_are_even_complete_and_repeatable():
    counts, batch = [10, 10, 5], 6
    steps = dataset.steps_per_epoch(counts, batch)
    epoch = []
    for step in range(steps):
        picks, flips = dataset.draw_picks(counts, batch, step, seed=3)
        assert torch.bincount(picks[:, 0], minlength=3).tolist() == [2, 2, 2]
        epoch.append(picks)
    assert torch.equal(epoch[1], dataset.draw_picks(counts, batch, 1, seed=3)[0])
    assert not torch.equal(epoch[0], dataset.draw_picks(counts, batch, steps, seed=3)[0])
    assert not torch.equal(epoch[0], dataset.draw_picks(counts, batch, 0, seed=4)[0])
    epoch = torch.cat(epoch)
    for concept, n in enumerate(counts):
        seen = epoch[epoch[:, 0] == concept, 1]
        assert torch.bincount(seen).tolist() == [10 // n] * n


def test_a_batch_is_full_even_if_there_are_fewer_pairs():
    assert dataset.steps_per_epoch([3, 2], 8) == 1
    picks, flips = dataset.draw_picks([3, 2], 8, 5, seed=0)
    assert len(picks) == len(flips) == 8 and torch.bincount(picks[:, 0]).tolist() == [4, 4]
    assert len({tuple(pick) for pick in picks.tolist()}) == 5


def test_two_processes_share_every_batch_evenly(made, tmp_path, monkeypatch):
    pairs = find(made).cache(tmp_path)
    whole, shares = draw(pairs), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(draw(pairs))
    for step, batches in enumerate(zip(*shares, strict=True)):
        for parts in zip(whole[step], *batches, strict=True):
            assert torch.equal(parts[0], torch.stack(parts[1:], 1).flatten(0, 1))
    with pytest.raises(runs.UserError, match="--batch 3 cannot be shared evenly by 2 processes"):
        draw(pairs, batch=3)


def test_a_chosen_part_is_all_that_is_drawn(made, tmp_path):
    pairs = dataset.find_pairs(made, "train", ["night"], {"00000.png", "00003.png"})
    edits = torch.cat([edits for _, edits, _ in draw(pairs.cache(tmp_path))])
    files = [dataset.read_image(made / f"train/night/{i:05}.png") for i in (0, 3)]
    wanted = torch.stack([dataset.to_float(x) for file in files for x in (file, file.flip(-1))])
    assert pairs.counts == [2] and torch.equal(edits.unique(dim=0), wanted.unique(dim=0))
    whole = dataset.find_pairs(made, "train", ["night"])
    assert whole.data_hash != pairs.data_hash and whole.cache_hash == pairs.cache_hash


def shown_at(picture, crop):
    """Bool (17, 17): whether a crop of 8 pixels is what the picture shows there."""
    windows = picture.unfold(1, 8, 1).unfold(2, 8, 1)  # (3, 17, 17, 8, 8)
    return (windows == crop[:, None, None]).all(-1).all(-1).all(0)


def test_crops_show_photo_and_edit_at_one_place_and_all_places(made, tmp_path):
    pairs, corners = find(made).cache(tmp_path), torch.zeros(17, 17)
    cuts = list(pairs.batches(4, range(30), 3, CPU, 8))
    for batch, cut in zip(draw(pairs, range(30)), cuts, strict=True):
        for photo, edit, *crops in zip(*batch[:2], *cut[:2], strict=True):
            found = shown_at(photo, crops[0]) & shown_at(edit, crops[1])
            assert found.any()
            corners += found
    assert all(side.any() for side in (corners[0], corners[16], corners[:, 0], corners[:, 16]))
    assert equal(list(pairs.batches(4, range(25, 30), 3, CPU, 8)), cuts[25:])


@pytest.mark.parametrize("crop", [20, 12, 40])
def test_a_crop_that_does_not_fit_is_refused(crop):
    words = f"--crop {crop}: give a multiple of 8 from 24 to .* 32"
    with pytest.raises(runs.UserError, match=words):
        training.check_crop(crop, 32)
    with pytest.raises(runs.UserError, match="--crop 24: this network takes whole"):
        training.check_crop(24, 32, whole_only=True)


# ---- The cache -----------------------------------------------------------------------------------


def test_the_cache_is_shared_and_used_again(made, folder, tmp_path, monkeypatch):
    pairs = find(made).cache(tmp_path / "cache")
    assert files_in(tmp_path / "cache") == [f"{pairs.cache_hash}.u8"]
    monkeypatch.setattr(dataset.Pairs, "load", lambda *_: pytest.fail("decoded again"))
    again = find(folder).cache(tmp_path / "cache")  # the same pictures in another place
    assert equal(draw(again), draw(pairs))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells how it maps")
def test_the_cache_is_mapped_shared_and_only_to_read(made, tmp_path):
    """A private mapping of a file counts as memory that may be needed, and one that is larger than
    memory and swap is refused."""
    pairs = find(made).cache(tmp_path)
    maps = Path("/proc/self/maps").read_text().splitlines()
    ways = [line.split()[1] for line in maps if line.endswith(f"{pairs.cache_hash}.u8")]
    assert ways and set(ways) == {"r--s"}


def test_files_are_hashed_a_few_at_a_time(tmp_path, monkeypatch):
    """Seen by how many are read before an error ends it."""
    read = []

    def fingerprint(path):
        read.append(path)
        raise OSError("gone")

    monkeypatch.setattr(dataset, "file_fingerprint", fingerprint)
    with pytest.raises(OSError):
        dataset.Pictures([tmp_path] * 10_000, 32, [])
    assert len(read) < 100


def test_only_the_first_process_reads_files_to_hash_them(made, monkeypatch):
    monkeypatch.setattr(dataset, "rank", lambda: 1)
    monkeypatch.setattr(dataset, "file_fingerprint", lambda path: pytest.fail("read"))
    assert len(find(made).files) == 7 + 7 + 6


def test_photos_are_listed_once_for_all_concepts(made, monkeypatch):
    plain, listed = dataset.list_pictures, []
    monkeypatch.setattr(dataset, "list_pictures", lambda x: listed.append(x.name) or plain(x))
    find(made)
    assert sorted(listed) == ["night", "sketch", "source"]


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x + b"0", lambda x: b""])
def test_a_cache_file_of_another_size_is_made_anew(made, tmp_path, change):
    wanted = draw(find(made).cache(tmp_path))
    [file] = tmp_path.glob("*.u8")
    file.write_bytes(change(file.read_bytes()))
    assert equal(draw(find(made).cache(tmp_path)), wanted)


def test_another_picture_is_another_cache_file_and_other_data(made, folder, tmp_path):
    before = find(made).cache(tmp_path / "cache")
    path = folder / "train/night/00003.png"
    pixels = dataset.read_image(path)
    pixels[0, 5, 5] += 1
    runs.write_png(path, dataset.to_pil(pixels))
    after = find(folder).cache(tmp_path / "cache")
    assert len(files_in(tmp_path / "cache")) == 2 and before.data_hash != after.data_hash
    assert not equal(draw(after), draw(before))


def test_who_asks_at_the_same_time_waits_and_decodes_nothing(made, tmp_path, monkeypatch):
    plain, loaded, data = dataset.Pairs.load, [], [find(made) for _ in range(3)]
    monkeypatch.setattr(dataset.Pairs, "load", lambda self, i: loaded.append(i) or plain(self, i))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda pairs: pairs.cache(tmp_path), data))
    assert sorted(loaded) == list(range(len(data[0].files)))


def test_tokens_are_the_towers_that_the_generator_knows(made):
    tokens, tower = dataset.prompt_tokens(made, [{"name": "night"}])
    assert tokens[0].shape == (4, 16) and tower == "ViT-S-32:random"
    with pytest.raises(runs.UserError, match="ViT-S-32:random, and .* ViT-B-32:openai"):
        dataset.prompt_tokens(made, [{"name": "night"}], "ViT-B-32:openai")
    with pytest.raises(runs.UserError, match="features.safetensors lacks .*comic"):
        dataset.prompt_tokens(made, [{"name": "comic"}])


def test_bf16_only_where_pytorch_may_use_its_units(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    for level, wanted in (("AVX512", True), ("AVX2", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda level=level: level)
        assert training.has_bf16(CPU) == wanted


# ---- Picture files as people have them -----------------------------------------------------------


def test_folders_that_servers_and_packers_leave_are_no_photos(tmp_path):
    picture = Image.new("RGB", (8, 8))
    for name in ("a.png", "sub/b.png", "sub/@eaDir/b.png", "#recycle/c.png", ".x/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name)
    for name in ("$RECYCLE.BIN", "__MACOSX"):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "e.png")
    assert dataset.list_pictures(tmp_path) == [tmp_path / "a.png"]
    both = [tmp_path / "a.png", tmp_path / "sub/b.png"]
    assert dataset.list_pictures(tmp_path, subfolders=True) == both


@pytest.mark.skipif(sys.platform != "linux", reason="names there are always Unicode")
def test_names_that_are_not_utf8_stay_apart(tmp_path):
    for name in (b"\xe9.png", b"\xf6.png"):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            Image.new("RGB", (8, 8)).save(file, format="png")
    named = dataset.named_pictures(tmp_path)
    assert list(named) == ["?.png", "??.png"] and len(set(named.values())) == 2


def test_linked_folders_are_followed_without_loops(tmp_path):
    photos, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for folder in (photos / "own", elsewhere):
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    (photos / "link").symlink_to(elsewhere)
    (photos / "own/up").symlink_to(photos)
    (photos / "again").symlink_to(photos / "own")
    found = dataset.list_pictures(photos, subfolders=True)
    assert found == [photos / "link/a.png", photos / "own/a.png"]


@pytest.mark.parametrize("kind", [np.float32, np.int32, "below 0"])
def test_grey_of_floats_and_32_bits_is_neither_black_nor_noise(tmp_path, kind):
    grey = np.linspace(0.1, 0.9, 64).reshape(8, 8)
    values, wanted = grey.astype(np.float32), grey * 255
    if kind is np.int32:
        values = (grey * 65535).astype(np.int32)
    if kind == "below 0":
        values, wanted = (grey * 2 - 1).astype(np.float32), (grey - 0.1) / 0.8 * 255
    Image.fromarray(values).save(tmp_path / "a.tiff")
    found = np.asarray(dataset.read_picture(tmp_path / "a.tiff"))[..., 0]
    assert np.abs(found - wanted).max() <= 1


def test_grey_that_is_not_finite_is_refused(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(runs.UserError, match="a.tiff .*not finite"):
        dataset.read_picture(tmp_path / "a.tiff")


def test_colours_are_those_of_the_profile(tmp_path):
    """A photo in sRGB, written by another profile's numbers, comes back as it was."""
    photo = tiny_pipelines.scene(64, 64)
    profile = tiny_pipelines.display_p3()
    theirs = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    wide = ImageCms.profileToProfile(photo, ImageCms.createProfile("sRGB"), theirs)
    wide.save(tmp_path / "a.png", icc_profile=profile)
    found = np.asarray(dataset.read_picture(tmp_path / "a.png")).astype(float)
    assert np.abs(np.asarray(wide).astype(float) - np.asarray(photo)).max() > 8
    assert np.abs(found - np.asarray(photo)).max() <= 4  # rounded twice


def test_a_broken_profile_is_left_out_and_named(tmp_path, capsys):
    photo = tiny_pipelines.scene(16, 16)
    photo.save(tmp_path / "a.png", icc_profile=b"no profile" * 20)
    assert dataset.read_picture(tmp_path / "a.png").tobytes() == photo.tobytes()
    assert "a.png: its colour profile cannot be used" in capsys.readouterr().out


def test_heic_is_read_where_its_package_is_installed(tmp_path):
    pytest.importorskip("pillow_heif")
    Image.new("RGB", (48, 32), "teal").save(tmp_path / "phone.heic")
    Image.new("RGB", (48, 32), "teal").save(tmp_path / "phone.heif")
    for path in dataset.list_pictures(tmp_path):
        assert dataset.read_image(path).shape == (3, 32, 48)
    assert len(dataset.list_pictures(tmp_path)) == 2


def test_a_large_jpeg_is_read_where_draft_makes_it_small(tmp_path):
    Image.new("RGB", (12_000, 9_000), "red").save(tmp_path / "a.jpg")
    assert dataset.read_square(tmp_path / "a.jpg", 64).size == (64, 64)
    with pytest.raises(runs.UserError, match="12000x9000 are too many pixels"):
        dataset.read_picture(tmp_path / "a.jpg")


def test_no_flip_mirrors_nothing(made, tmp_path):
    pairs = find(made).cache(tmp_path)
    plain = list(pairs.batches(4, range(9), 3, CPU, flip=False))
    mirrored = 0
    for step, (batch, usual) in enumerate(zip(plain, draw(pairs), strict=True)):
        flips = dataset.draw_picks([7, 6], 4, step, 3)[1]
        for own, other, flip in zip(batch[0], usual[0], flips, strict=True):
            assert torch.equal(own, other.flip(-1) if flip else other)
            mirrored += int(flip)
    assert mirrored > 5


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_and_lists_as_windows_writes_them(tmp_path, encoding):
    """With a byte order mark, and other line ends."""
    (tmp_path / "a.json").write_text('{"é": 1}', encoding=encoding)
    assert runs.read_json(tmp_path / "a.json") == {"é": 1}
    (tmp_path / "a.txt").write_bytes("é.png\r\nb.png\r\n".encode(encoding))
    assert runs.read_text(tmp_path / "a.txt").split("\n") == ["é.png", "b.png", ""]


def test_a_console_without_the_letters_decides_nothing():
    program = "import runs; runs.run(lambda: print('\u96ea' * 10**6))"
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, capture_output=True, env=environment, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith(b"\\u96ea") and not done.stderr


def test_a_reader_that_leaves_ends_no_run(tmp_path):
    """As `| head -1` does."""
    program = """
import pathlib, sys
import runs

def main():
    for i in range(100_000):
        print("skipped", i)
    pathlib.Path(sys.argv[1]).write_text("there")

runs.run(main)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "result")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    assert process.stdout.readline() == "skipped 0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    assert (tmp_path / "result").read_text() == "there"


# ---- Labels that are not ASCII -------------------------------------------------------------------


def sheet_of(*labels):
    """A sheet of black pictures, its rows labelled so."""
    pictures = [[torch.zeros(3, 8, 8, dtype=torch.uint8)] for _ in labels]
    return dataset.picture_grid(pictures, [""], labels, cell=16).tobytes()


def test_labels_are_letters_and_no_boxes():
    """Boxes are all alike."""
    assert sheet_of("\u0424\u043e\u0442\u043e") != sheet_of("\u0422\u0435\u043c\u0430")
    assert sheet_of("\u00e9t\u00e9") != sheet_of("ete")


def test_a_label_that_no_font_can_write_is_its_number(tmp_path, monkeypatch, recwarn):
    nothing = "\U0001fbff\U000e0041"  # no font has it
    assert dataset.font_with(nothing) is None
    assert dataset.writable(["a", nothing, "a", nothing]) == ["a", "2", "a", "2"]
    assert sheet_of("a", nothing) == sheet_of("a", "2")
    rows = [{"step": 1, "PSNR dB": {"\u0424\u043e\u0442\u043e": 1.0, nothing: 2.0}}]
    training.write_curve(tmp_path / "curve.png", rows)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert dataset.read_image(tmp_path / "curve.png").shape[1] > 100

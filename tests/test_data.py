"""Pairs and their pictures: which pictures a batch holds, the file that they are decoded into, and
what is said of a folder that cannot be used."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

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
            file = dataset.edit_names(made, "train", name)[i]
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

"""Training pictures: wherever they are held (memory, a raw file, PNGs), batches are the same bytes; broken files show. The field's
layouts that stage 5 reads: what a batch shows, and what is said of folders that are none."""

import hashlib
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
import torch.multiprocessing
from PIL import Image

import common

CPU = torch.device("cpu")
EDITS = {"sketch": lambda x: 1 - x, "night": lambda x: 0.3 * x}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_pairs):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs", EDITS, train=7, test=2, size=24)


def find(folder):
    return common.find_pairs(folder, "train", list(EDITS))


def draw(pairs, steps=range(9), batch=4, rank=0, world=1):
    """All tensors of some steps, beyond one epoch (three steps of 4 of its 14 pairs)."""
    return [
        torch.cat([part.flatten() for part in parts])
        for parts in zip(*pairs.batches(batch, steps, 3, rank, world, CPU))
    ]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def no_room(monkeypatch):
    plain = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plain._replace(free=2e9))


def test_a_batch_is_the_pngs_that_the_picks_name(folder):
    pairs = find(folder)
    for step, (photo, edit, concept) in zip(
        range(9), pairs.batches(4, range(9), 3, 0, 1, CPU), strict=True
    ):
        picks, flips = common.draw_picks(pairs.counts, 4, step, 3)
        assert torch.equal(concept, picks[:, 0])
        for i, ((c, k), flip) in enumerate(zip(picks.tolist(), flips.tolist())):
            for made, name in ((photo, "source"), (edit, list(EDITS)[c])):
                pixels = common.read_image(folder / "train" / name / f"{k:05}.png")
                assert torch.equal(made[i], common.to_float(pixels.flip(-1) if flip else pixels))


def test_every_home_gives_the_same_batches(folder, tmp_path, monkeypatch, capsys):
    wanted = draw(find(folder))  # PNGs, decoded batch by batch
    assert same(draw(common.load_pairs(folder, "train", list(EDITS))), wanted)
    memory, raw, pngs = find(folder), find(folder), find(folder)
    memory.hold(1, tmp_path, CPU)
    assert (
        memory.pixels is not None and not list(tmp_path.iterdir()) and not capsys.readouterr().out
    )
    raw.hold(0, tmp_path, CPU)
    assert (
        raw.pixels is None
        and [raw.raw] == list(tmp_path.iterdir())
        and str(raw.raw) in capsys.readouterr().out
    )
    raw.raw.rename(tmp_path / "elsewhere")
    no_room(monkeypatch)
    pngs.hold(0, tmp_path, CPU)
    assert pngs.pixels is None and pngs.raw is None
    assert len(lines := capsys.readouterr().out.splitlines()) == 1 and "too little room" in lines[0]
    raw.raw = tmp_path / "elsewhere"
    for pairs in (memory, raw, pngs):
        assert same(draw(pairs), wanted)
        assert same(draw(pairs, range(4, 9)), draw(find(folder), range(4, 9)))  # continued
        assert same(
            [
                torch.cat(parts).sort().values
                for parts in zip(draw(pairs, rank=0, world=2), draw(pairs, rank=1, world=2))
            ],
            [part.sort().values for part in wanted],
        )


def test_shares_must_be_even(folder):
    with pytest.raises(common.UserError, match="--batch 4 cannot be shared evenly by 3 processes"):
        draw(find(folder), world=3)


def test_the_raw_file_is_used_again_if_it_is_whole_and_of_this_data(folder, tmp_path, monkeypatch):
    pairs = find(folder)
    pairs.hold(0, tmp_path, CPU)
    marked = bytearray(pairs.raw.read_bytes())
    marked[0] ^= 255
    pairs.raw.write_bytes(marked)
    again = find(folder)
    again.hold(0, tmp_path, CPU)
    assert again.raw.read_bytes() == marked  # not decoded again
    again.raw.write_bytes(marked[:-1])
    cut = find(folder)
    cut.hold(0, tmp_path, CPU)
    assert (
        cut.raw == pairs.raw
        and len(cut.raw.read_bytes()) == len(marked)
        and cut.raw.read_bytes() != marked
    )
    shutil.copytree(folder, tmp_path / "pairs")
    image = common.read_image(tmp_path / "pairs/train/night/00003.png")
    image[0, 5, 5] += 1
    common.write_png(tmp_path / "pairs/train/night/00003.png", common.to_pil(image))
    other = find(tmp_path / "pairs")
    other.hold(0, tmp_path, CPU)
    assert other.raw != pairs.raw and same(draw(other), draw(find(tmp_path / "pairs")))


def test_the_raw_file_goes_when_the_run_is_complete(folder, tmp_path):
    find(folder).hold(0, tmp_path, CPU)
    common.write_result(tmp_path, "x", 0, [], {})
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def break_middle(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8] = bytes(8)
    path.write_bytes(data)


@pytest.mark.parametrize("cache_gb", [1, 0])
def test_a_broken_picture_is_named_and_leaves_no_file(folder, tmp_path, cache_gb):
    shutil.copytree(folder, tmp_path / "pairs")
    break_middle(
        tmp_path / "pairs/train/night/00003.png"
    )  # its ends are whole: found when it is decoded
    (tmp_path / "out").mkdir()
    with pytest.raises(common.UserError, match="night/00003.png is not a picture"):
        find(tmp_path / "pairs").hold(cache_gb, tmp_path / "out", CPU)
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(common.UserError, match="night/00003.png is not a picture"):
        draw(find(tmp_path / "pairs"))


def test_a_picture_cut_short_is_found_before_the_run_begins(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pairs")
    path = tmp_path / "pairs/train/source/00006.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(common.UserError, match="source/00006.png is not a picture"):
        find(tmp_path / "pairs")


def hold_and_compare(rank, world, folder, out, wanted):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out}/meet", rank=rank, world_size=world
    )
    for cache_gb in (1, 0):
        pairs = find(folder)
        pairs.hold(cache_gb, out, CPU, rank, world)
        assert (pairs.pixels is None) == (pairs.raw is not None) == (cache_gb == 0)
        assert same(draw(pairs, rank=rank, world=world), wanted[rank])
    torch.distributed.destroy_process_group()


def test_two_processes_decode_once_between_them(folder, tmp_path):
    wanted = [draw(find(folder), rank=rank, world=2) for rank in range(2)]
    torch.multiprocessing.spawn(hold_and_compare, (2, folder, tmp_path, wanted), nprocs=2)
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "meet"] == [".u8"]


def test_pictures_in_another_memory_are_gathered_there(folder):
    """A probe's pictures stay on the CPU while the network is on a GPU: places must not be sent to it first."""
    pairs = common.load_pairs(folder, "train", list(EDITS))
    batch = next(pairs.batches(4, range(1), 0, 0, 1, torch.device("meta")))
    assert [part.device.type for part in batch] == ["meta"] * 3 and batch[0].shape == (4, 3, 24, 24)


# ---------------------------------------------------------------------------------------------------------------------
# pix2pix's, CycleGAN's, flat, CIFAR-10


@pytest.fixture(scope="module")
def five(load_stage):
    return load_stage("05")


def save_random(path, width, height, **options):
    """A smooth random picture, so that a JPEG is near it; returns its bytes as they were saved."""
    rng = np.random.default_rng(list(str(path.parent.name + path.name).encode()))
    picture = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


def save_all(folder, names, width, height):
    """5 training and 3 other pictures in each of the folders."""
    for name in names:
        for i in range(5 if "train" in name else 3):
            save_random(folder / name / f"{i}.jpg", width, height, quality=95)
    return folder


def pixels_of(path):
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def in_rows(data, batch=4, steps=range(6), rank=0, world=1):
    """The batches' rows, as tuples of pictures' bytes."""
    for *parts, concept in data.batches(batch, steps, 3, rank, world, CPU):
        assert len(concept) == batch // world and not concept.any()
        yield from (
            tuple(common.to_uint8(picture).numpy().tobytes() for picture in row)
            for row in zip(*parts)
        )


def either_way(pixels):
    """{bytes: is it mirrored}"""
    return {pixels.numpy().tobytes(): False, pixels.flip(-1).contiguous().numpy().tobytes(): True}


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
@pytest.mark.parametrize("held_out", ["test", "val"])
def test_side_by_side_is_cut_into_photo_and_edit(five, tmp_path, direction, held_out):
    save_all(tmp_path, ["train", held_out], 64, 32)
    train, test = five.find_data("pix2pix", tmp_path, 32, direction)
    halves = {}
    for i in range(5):
        a, b = pixels_of(tmp_path / f"train/{i}.jpg").split(32, 2)
        photo, edit = (a, b) if direction == "AtoB" else (b, a)
        for mirrored in (False, True):  # photo and edit are mirrored together
            halves[
                tuple(
                    ((x.flip(-1) if mirrored else x).contiguous()).numpy().tobytes()
                    for x in (photo, edit)
                )
            ] = i
    rows = list(in_rows(train))
    assert {halves[row] for row in rows} == set(range(5)) and len(set(rows)) > 5
    test.decoded()
    assert (
        train.counts == [5]
        and test.counts == [3]
        and test.photos.shape == test.edits[0].shape == (3, 3, 32, 32)
    )
    assert torch.equal(
        torch.cat([test.photos, test.edits[0]][:: 1 if direction == "AtoB" else -1], 3)[1],
        pixels_of(tmp_path / held_out / "1.jpg"),
    )
    assert test.concepts == train.concepts == [{"name": tmp_path.name, "prompt": ""}]


def test_common_measures_side_by_side(five, tmp_path):
    _, test = five.find_data("pix2pix", save_all(tmp_path, ["train", "val"], 64, 32), 32)
    generator = common.build_network(common.generator_config("unet256", 4, 32, test.concepts))
    assert [row["concept"] for row in common.evaluate(generator, test)] == [tmp_path.name]
    assert common.progress_picture(generator, test).width > 3 * 160


@pytest.fixture(scope="module")
def cycle(tmp_path_factory):
    folder = save_all(
        tmp_path_factory.mktemp("cycle"), ["trainA", "trainB", "testA", "testB"], 32, 32
    )
    for i in (5, 6):
        save_random(folder / f"trainB/{i}.png", 32, 32)
    return folder


def test_unpaired_rows_are_drawn_and_mirrored_apart(five, cycle):
    train, test = five.find_data("cyclegan", cycle, 32)
    kinds = [
        {
            key: (path.name, mirrored)
            for path in sorted((cycle / kind).iterdir())
            for key, mirrored in either_way(pixels_of(path)).items()
        }
        for kind in ("trainA", "trainB")
    ]
    rows = [(kinds[0][a], kinds[1][b]) for a, b in in_rows(train, batch=2, steps=range(30))]
    assert {a[0] for a, _ in rows} == {f"{i}.jpg" for i in range(5)} and len(
        {b[0] for _, b in rows}
    ) == 7
    assert {(a[1], b[1]) for a, b in rows} == {(x, y) for x in (False, True) for y in (False, True)}
    assert (
        len({(a[0], b[0]) for a, b in rows}) > 20
    )  # of 35 couples, not the same seven again and again
    assert common.steps_per_epoch(train.counts, 7) == 1  # an epoch passes over the larger set
    assert (
        len(
            {
                b[0]
                for _, b in [
                    (kinds[0][a], kinds[1][b]) for a, b in in_rows(train, batch=7, steps=range(1))
                ]
            }
        )
        == 7
    )
    assert torch.equal(test.photos[2], pixels_of(cycle / "testA/2.jpg")) and torch.equal(
        test.others[0], pixels_of(cycle / "testB/0.jpg")
    )


def test_pairs_taken_apart_share_no_photo(five, folder):
    train, test = five.unpaired_from_pairs(folder, "night")
    names = [
        {path.name for path in part}
        for part in (train.files[: train.first_b], train.files[train.first_b :])
    ]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 7
    assert {path.parent.name for path in train.files[: train.first_b]} == {"source"}
    assert {path.parent.name for path in train.files[train.first_b :]} == {"night"}
    assert torch.equal(train.load(6), common.read_image(folder / "train/night/00006.png"))
    assert isinstance(test, common.Pairs) and test.photos.shape == (2, 3, 24, 24)


def test_a_flat_folder_holds_a_tenth_out(five, tmp_path):
    for i in range(21):
        save_random(
            tmp_path / ("sub" if i % 2 else ".") / f"{i}.{'JPG' if i % 3 else 'png'}", 48, 32
        )
    (tmp_path / ".thumbnails").mkdir()
    shutil.copy(tmp_path / "0.png", tmp_path / ".thumbnails/0.png")
    train, test = five.find_data("dcgan", tmp_path, 32)
    assert (
        train.counts == [19]
        and test.pixels.shape == (2, 3, 32, 32)
        and not set(train.files) & set(test.files)
    )
    middles = [either_way(pixels_of(path)[:, :, 8:40].contiguous()) for path in train.files]
    seen = list(in_rows(train, batch=1, steps=range(38)))
    assert all(sum(row[0] in middle for row in seen) == 2 for middle in middles)
    assert {
        row[0] in list(middle)[:1] for row in seen for middle in middles if row[0] in middle
    } == {False, True}


@pytest.mark.parametrize("task", ["pix2pix", "cyclegan", "dcgan"])
def test_two_processes_share_every_batch_of_every_layout(five, cycle, tmp_path, task):
    data = cycle if task != "pix2pix" else save_all(tmp_path, ["train", "test"], 64, 32)
    train, _ = five.find_data(task, data, 32)
    for step in range(5):
        shares = [list(in_rows(train, 4, range(step, step + 1), rank, 2)) for rank in range(2)]
        assert sorted(shares[0] + shares[1]) == sorted(in_rows(train, 4, range(step, step + 1)))


@pytest.mark.parametrize("task", ["pix2pix", "cyclegan", "dcgan"])
def test_every_home_gives_the_same_batches_of_every_layout(five, cycle, tmp_path, task):
    data = cycle if task != "pix2pix" else save_all(tmp_path / "data", ["train", "test"], 64, 32)
    (tmp_path / "out").mkdir()
    files, memory, raw = (five.find_data(task, data, 32)[0] for _ in range(3))
    memory.hold(1, tmp_path / "out", CPU)
    raw.hold(0, tmp_path / "out", CPU)
    assert memory.pixels is not None and raw.raw.exists()
    assert same(draw(files), draw(memory)) and same(draw(files), draw(raw))


def test_fingerprints_change_with_the_data(five, tmp_path):
    both = save_all(
        tmp_path / "data", ["train", "test", "trainA", "trainB", "testA", "testB"], 64, 32
    )

    def prints(**more):
        return {
            task: five.find_data(task, both, 32, **more)[0].fingerprint
            for task in ("pix2pix", "cyclegan", "dcgan")
        }

    first = prints()
    assert prints() == first
    assert prints(direction="BtoA")["pix2pix"] != first["pix2pix"]
    assert five.find_data("dcgan", both, 64)[0].fingerprint != first["dcgan"]
    for name in ("train", "trainB"):
        for path in sorted((both / name).iterdir()):
            Image.open(path).convert("L").convert("RGB").save(path)
    assert not set(prints().items()) & set(first.items())


def test_pictures_of_every_kind_are_fitted(five, tmp_path):
    """Upright, on white where transparent, the middle square of the short side."""
    tall = Image.new("RGB", (40, 80), "red")
    tall.paste("blue", (0, 20, 40, 60))  # the middle square
    turned = Image.Exif()
    turned[0x0112] = 6
    tall.rotate(90, expand=True).save(tmp_path / "turned.png", exif=turned)
    tall.save(tmp_path / "upright.png")
    Image.new("RGBA", (50, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("P", (50, 40), 0).save(tmp_path / "palette.png")
    Image.fromarray(np.full((40, 50), 128 * 257, np.uint16)).save(tmp_path / "sixteen.png")
    Image.new("CMYK", (50, 40)).save(tmp_path / "press.jpg")
    data = five.Flat(files=sorted(tmp_path.iterdir()), size=24, concepts=[])
    shown = {path.stem: data.load(i) for i, path in enumerate(data.files)}
    assert all(
        pixels.shape == (3, 24, 24) and pixels.dtype == torch.uint8 for pixels in shown.values()
    )
    assert (
        shown["clear"].min() == 255
        and shown["sixteen"].unique().tolist() == [128]
        and shown["press"].min() > 250
    )
    assert torch.equal(shown["turned"], shown["upright"]) and shown["upright"][2].min() > 200


def write_cifar(folder, monkeypatch, train=4, test=3):
    """CIFAR-10's files with a few pictures each; torchvision is told their MD5s. Returns the training and test pictures."""
    from torchvision import datasets

    rng, lists, pictures = (
        np.random.default_rng(0),
        {"train_list": [], "test_list": []},
        {"train_list": [], "test_list": []},
    )
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        which, n = ("test_list", test) if "test" in name else ("train_list", train)
        data = rng.integers(0, 255, (n, 3072), dtype=np.uint8)
        content = pickle.dumps(
            {"label_names": ["x"]} if name == "batches.meta" else {"data": data, "labels": [0] * n}
        )
        path = folder / "cifar-10-batches-py" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if name == "batches.meta":
            monkeypatch.setattr(
                datasets.CIFAR10,
                "meta",
                {**datasets.CIFAR10.meta, "md5": hashlib.md5(content).hexdigest()},
            )
        else:
            lists[which].append([name, hashlib.md5(content).hexdigest()])
            pictures[which].append(torch.from_numpy(data.reshape(n, 3, 32, 32)))
    for which, entries in lists.items():
        monkeypatch.setattr(datasets.CIFAR10, which, entries)
    return [torch.cat(part) for part in pictures.values()]


def test_cifar_is_read_through_torchvision(five, tmp_path, monkeypatch):
    wanted, held_out = write_cifar(tmp_path, monkeypatch)
    train, test = five.find_data("dcgan", tmp_path, 32)
    assert torch.equal(
        torch.stack([train.load(i) for i in range(train.places)]), wanted
    ) and torch.equal(test.pixels, held_out)
    assert all(any(row[0] in either_way(x) for x in wanted) for row in in_rows(train))
    before = train.fingerprint
    assert five.find_data("dcgan", tmp_path, 64)[1].pixels.shape == (3, 3, 64, 64)
    write_cifar(tmp_path, monkeypatch, train=5)
    assert five.find_data("dcgan", tmp_path, 32)[0].fingerprint != before


def test_a_changed_cifar_file_is_not_unpickled(five, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py/data_batch_2").write_bytes(pickle.dumps({"data": 1}))
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(
        common.UserError, match="CIFAR-10 cannot be read from .*corrupted.*unpack https://"
    ):
        five.find_data("dcgan", tmp_path, 32)


def test_cifar_that_cannot_be_downloaded(five, tmp_path, monkeypatch):
    from torchvision import datasets

    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        common.UserError,
        match=re.escape(
            f"downloaded to runs/cifar10 (no route to host); unpack {datasets.CIFAR10.url}"
        ),
    ):
        five.find_data("dcgan", five.Path("cifar10"), 32)


def add(folder, *names):
    for name in names:
        save_random(folder / name, 64, 32)


BAD_FOLDERS = {
    "no folder": ("cyclegan", lambda f: shutil.rmtree(f), 32, "data is no folder"),
    "an empty folder": (
        "dcgan",
        lambda f: None,
        32,
        "finds no data in .*looked for train/.*trainA/.*cifar.*; found nothing",
    ),
    "one picture": ("dcgan", lambda f: add(f, "0.png"), 32, "two or more pictures.*found 0.png"),
    "nothing held out": (
        "pix2pix",
        lambda f: add(f, "train/0.png"),
        32,
        "train/ and test/ or val/.*found train$",
    ),
    "another layout": (
        "pix2pix",
        lambda f: add(f, "trainA/0.png", "trainB/0.png"),
        32,
        "--task pix2pix finds no data.*found trainA, trainB",
    ),
    "a set missing": (
        "cyclegan",
        lambda f: add(f, "trainA/0.png", "trainB/0.png", "testA/0.png"),
        32,
        "found testA, trainA, trainB",
    ),
    "no two squares": (
        "pix2pix",
        lambda f: (add(f, "train/0.png", "val/0.png"), save_random(f / "train/1.png", 60, 32)),
        32,
        "train/1.png is 60x32; A|B side by side is twice as wide",
    ),
    "no picture": (
        "cyclegan",
        lambda f: (
            add(f, "trainA/0.png", "trainB/0.png", "testA/0.png", "testB/0.png"),
            (f / "trainB/1.jpg").write_bytes(b"GIF89a"),
        ),
        32,
        "trainB/1.jpg is not a picture",
    ),
    "a size": (
        "pix2pix",
        lambda f: None,
        60,
        "--size 60: the networks need a multiple of 8 from 24 on",
    ),
    "a size of 0": ("cyclegan", lambda f: None, 0, "--size 0: the networks need"),
    "a size for dcgan": (
        "dcgan",
        lambda f: None,
        48,
        "--size 48: dcgan needs a power of two from 8 on",
    ),
}


@pytest.mark.parametrize("task, change, size, words", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders(five, tmp_path, task, change, size, words):
    (tmp_path / "data").mkdir()
    change(tmp_path / "data")
    with pytest.raises(common.UserError) as error:
        five.find_data(task, tmp_path / "data", size)
    assert re.search(words.replace("A|B", r"A\|B"), str(error.value)), error.value


def test_a_jpeg_cut_short_is_named(five, cycle, tmp_path):
    shutil.copytree(cycle, tmp_path / "data")
    path = tmp_path / "data/trainB/3.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    data, _ = five.find_data("cyclegan", tmp_path / "data", 32)
    with pytest.raises(common.UserError, match="trainB/3.jpg is not a picture"):
        data.decoded()

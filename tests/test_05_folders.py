"""Stage 5's folders as people have them: layouts, pictures of any shape, pictures that cannot be
read."""

import pytest
import torch
from PIL import Image, ImageOps
from tiny_pipelines import scene

import dataset


@pytest.fixture
def find(load_stage, tmp_path):
    """find("pix2pix", folder, ...) -> training and held-out pictures of 32 pixels, decoded."""

    def call(task, folder, *more):
        found = load_stage("05").find_data(task, folder, 32, *more)
        return [part.cache(tmp_path / "cache") for part in found]

    return call


def save(path, seed, width=48, height=32):
    """Saves a picture of this seed, and returns it."""
    picture = scene(width, height, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return picture


def middle(picture):
    """Its middle square as stage 5 should see it, uint8 (3, 32, 32)."""
    square = ImageOps.fit(picture, (32, 32), Image.Resampling.LANCZOS)
    return dataset.to_pixels(square)


def close(one, two, levels=1):
    return (one.short() - two.short()).abs().max() <= levels


def seeds_of(pictures, seeds, size=(48, 32)):
    """Which seeds' pictures these are, in order."""
    known = {middle(scene(*size, seed)).numpy().tobytes(): seed for seed in seeds}
    return [known[x.numpy().tobytes()] for x in pictures]


@pytest.mark.parametrize("width, height", [(64, 32), (96, 32), (97, 40), (48, 64)])
@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_side_by_side_of_any_shape(find, tmp_path, width, height, direction):
    """Cut at half the width; of each half the middle square."""
    whole = save(tmp_path / "data/train/cam1/0.png", 0, width, height)
    save(tmp_path / "data/test/0.png", 1, width, height)
    train, _ = find("pix2pix", tmp_path / "data", direction)
    half = width // 2
    sides = [whole.crop((0, 0, half, height)), whole.crop((width - half, 0, width, height))]
    if direction == "BtoA":
        sides.reverse()
    for found, side in zip(train.pictures(0), sides, strict=True):
        assert close(found[0], middle(side))


LAYOUTS = {
    "CycleGAN": "trainA/{}.png trainB/{}.png testA/{}.png testB/{}.png",
    "CycleGAN, val": "trainA/{}.png trainB/{}.png valA/{}.png valB/{}.png",
    "cameras": "trainA/cam1/{}.png trainB/cam1/{}.png testA/x/y/{}.png testB/x/y/{}.png",
    "img2img-turbo": "train_A/{}.png train_B/{}.png test_A/{}.png test_B/{}.png",
    "not combined yet": "A/train/{}.png B/train/{}.png A/val/{}.png B/val/{}.png",
    "folders in splits": "train/A/{}.png train/B/{}.png test/A/{}.png test/B/{}.png",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_of_a_and_b(find, tmp_path, layout):
    """A has seeds 0 to 19, B those after 20; pictures of equal numbers are pairs."""
    train_a, train_b, test_a, test_b = LAYOUTS[layout].split()
    data = tmp_path / "data"
    for i in range(3):
        for beginning, pattern in ((0, train_a), (20, train_b), (10, test_a), (30, test_b)):
            save(data / pattern.format(i), beginning + i)
    for direction, first, second in (("AtoB", 0, 20), ("BtoA", 20, 0)):
        for part, beginning in zip(find("pix2pix", data, direction), (0, 10), strict=True):
            photos, edits = part.pictures(0)
            wanted = [beginning + i for i in range(3)]
            assert seeds_of(photos, range(40)) == [first + seed for seed in wanted]
            assert seeds_of(edits, range(40)) == [second + seed for seed in wanted]
    for part, beginning in zip(find("cyclegan", data), (0, 10), strict=True):
        for number, start in ((0, 0), (1, 20)):
            found = seeds_of(part.pictures(number), range(40))
            assert found == [start + beginning + i for i in range(3)]


def test_a_tenth_is_held_out_where_nothing_else_is(find, tmp_path, capsys):
    data = tmp_path / "data"
    for i in range(21):
        save(data / f"A/{i:02}.png", i)
        if i:
            save(data / f"B/{i:02}.png", 30 + i)
    save(data / "B/other.png", 99)
    train, test = find("pix2pix", data)
    printed = capsys.readouterr().out
    assert "1 of 21 pictures" in printed and "00.png" in printed
    assert "has no test pictures: 2 of its others are held out" in printed
    seen = []
    for part in (train, test):
        photos, edits = part.pictures(0)
        seen += seeds_of(photos, range(21))
        assert seeds_of(edits, range(60)) == [30 + i for i in seeds_of(photos, range(21))]
    assert sorted(seen) == list(range(1, 21)) and len(test.pictures(0)[0]) == 2
    for part, count in zip(find("cyclegan", data), (19, 2), strict=True):
        assert len(part.pictures(0)) == len(part.pictures(1)) == count


def test_edits_in_a_folder_of_their_own_are_fitted_to_their_photos(find, tmp_path):
    """Turned by EXIF, and scaled to multiples of 8."""
    data, exif = tmp_path / "data", Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    for split in ("train", "test"):
        photo = save(data / split / "B/0.png", 5, 90, 130)
        photo.resize((88, 128)).save(data / split / "B/0.png")
        (data / split / "A").mkdir()
        sideways = photo.transpose(Image.Transpose.ROTATE_90)
        sideways.save(data / split / "A/0.JPG", exif=exif, quality=98)
    train, _ = find("pix2pix", data)
    photos, edits = train.pictures(0)
    assert close(photos[0], middle(photo), 20) and close(edits[0], middle(photo), 20)


@pytest.mark.parametrize("task", ["pix2pix", "cyclegan", "dcgan"])
def test_pictures_that_cannot_be_read_are_skipped_and_named(find, tmp_path, capsys, task):
    """Today and when the cache is there."""
    data = tmp_path / "data"
    for i in range(8):
        for folder in ("trainA", "trainB", "testA", "testB"):
            save(data / folder / f"{i}.png", i + (20 if folder[-1] == "B" else 0))
    path = data / "trainB/3.png"
    path.write_bytes(path.read_bytes()[:500])
    for _ in range(2):
        train, test = find(task, data)
        [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("skipped")]
        assert "trainB/3.png is not a picture" in line
        if task == "dcgan":
            assert len(train.pictures(0)) + len(test.pictures(0)) == 31
        elif task == "cyclegan":
            assert len(train.pictures(0)) == 8
            assert seeds_of(train.pictures(1), range(40)) == [20, 21, 22, 24, 25, 26, 27]
        else:
            photos, edits = train.pictures(0)
            assert seeds_of(photos, range(40)) == [0, 1, 2, 4, 5, 6, 7]
            assert seeds_of(edits, range(40)) == [20, 21, 22, 24, 25, 26, 27]
        for *pictures, _ in train.batches(4, range(12), 0, torch.device("cpu")):
            assert all(x.flatten(1).std(1).min() > 0.01 for x in pictures)  # none is black


def test_once_its_package_is_installed_heic_is_tried_again(find, tmp_path, monkeypatch, capsys):
    """Though the cache remembers that it could not be read. Other folders stay as they are."""
    data = tmp_path / "data"
    for i in range(4):
        save(data / f"trainA/{i}.png", i)
        save(data / f"testA/{i}.png", 10 + i)
    (data / "trainA/phone.heic").write_bytes(b"no picture")
    hashes = []
    for installed, words in ((False, "pip install pillow-heif"), (True, "is not a picture")):
        monkeypatch.setattr(dataset, "reads_heic", lambda: installed)  # noqa: B023
        found = find("dcgan", data / "trainA"), find("dcgan", data / "testA")
        hashes.append([part.cache_hash for parts in found for part in parts])
        [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("skipped")]
        assert "phone.heic" in line and words in line
    changed = [one != two for one, two in zip(*hashes, strict=True)]
    assert sum(changed) == 1 and not any(changed[2:])

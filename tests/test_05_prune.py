"""Stage 5 on data that takes seconds: every network meets its target, whatever the task, method and
layout; a pruned base keeps what it learned; a killed run ends in the same bytes."""

import argparse
import shutil

import numpy as np
import pytest
import torch
from conftest import read_log, run_main, table
from PIL import Image

import common
import dataset
import runs
import training

CPU = torch.device("cpu")
SIZES = "--width 8 --search-epochs 3 --epochs 1"
SMALL = f"{SIZES} --batch 4 --fid off --device cpu --lr 1e-3 --lr-search 2e-4"


@pytest.fixture(scope="module")
def five(load_stage):
    return load_stage("05")


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_pairs):
    """Pairs of one edit, the same pictures in the other layouts, a generator of another size."""
    root = tmp_path_factory.mktemp("data")
    write_pairs(root / "pairs", {"dark": lambda x: 0.25 * x}, train=24, test=6)
    for path in (root / "pairs").glob("*/source/*"):
        split, edit = path.parts[-3], path.parents[1] / "dark" / path.name
        both = torch.cat([dataset.read_image(path), dataset.read_image(edit)], 2)
        runs.write_png(root / "sides" / split / path.name, dataset.to_pil(both))
        kinds = {f"unpaired/{split}A": path, f"flat/{split}": path}
        if path.stem < "00020":  # the sets need not be equally large
            kinds[f"unpaired/{split}B"] = edit
        for folder, source in kinds.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(source, root / folder)
    dark = [{"name": "dark", "prompt": "darken it"}]
    common.save_network(root / "base", common.new_generator("resnet9", 8, 64, dark))
    return root


def flags_of(data, text: str) -> list[str]:
    """The words, D/ as the data's folder."""
    return [word.replace("D/", f"{data}/") for word in f"--cache D/cache {SMALL} {text}".split()]


@pytest.fixture
def prune(five, data, tmp_path):
    """prune("--keep 0.3 ...") runs stage 5 in this process; returns its folder."""

    def call(text):
        run_main(five, *flags_of(data, text), "--out", tmp_path / "out")
        return tmp_path / "out"

    return call


# ---- Pruning -------------------------------------------------------------------------------------

TASKS = {
    "A|B, unet256": "--task pix2pix --data D/sides --generator unet256 --size 32",
    "pairs, resnet9": "--task pix2pix --pairs D/pairs --generator resnet9",
    "pairs, e2gan": "--task pix2pix --pairs D/pairs --generator e2gan --width 16",
    "trainA trainB, resnet9": "--task cyclegan --data D/unpaired --size 32 --width 4",
    "pairs taken apart, e2gan": "--task cyclegan --pairs D/pairs --concept dark --generator e2gan",
    "flat, dcgan": "--task dcgan --data D/flat --size 32 --search-epochs 6 --epochs 6",
}


@pytest.mark.parametrize("flags", TASKS.values(), ids=TASKS)
def test_every_task_meets_its_target_from_below_for_all_networks(prune, flags):
    out = prune(f"{flags} --prune-discriminator --keep 0.3")
    rows = table(out, "Pruning")
    assert len(rows) == (4 if "cyclegan" in flags else 2)
    assert all(29 < row["MACs %"] <= 30 for row in rows), rows
    generators = list(out.glob("generator*.safetensors"))
    assert len(generators) == (2 if "cyclegan" in flags else 1)
    for path in generators:
        kind = "dcgan generator" if "dcgan" in flags else "generator"
        network = common.load_network(path, kind)
        assert network.config["widths"] != network.config["full"]
        assert ("text_dim" in network.config) == ("--pairs D/pairs --generator e2gan" in flags)
    shares = [row["MACs %"] for row in read_log(out / "search-log.jsonl") if "MACs %" in row]
    for name in shares[0]:
        assert shares[0][name] > 80 and shares[-1][name] <= 30
    state, _ = runs.read_tensors(out / "search-state.safetensors", "state")
    hidden = [tensor for name, tensor in state.items() if name.endswith(".b0")]
    assert hidden and not any(tensor.any() for tensor in hidden)  # starting from weights, b0 stays
    for name in ("pruning.png", "search-curve.png", "converge-curve.png"):
        assert dataset.read_image(out / name).shape[1] > 100
    measured = table(out, f"Pruned {flags.split()[1]}, held-out pictures")[-1]
    assert all(np.isfinite(value) for value in measured.values() if isinstance(value, float))


def test_unpaired_training_finds_an_edit_of_which_it_never_saw_a_pair(prune):
    flags = TASKS["pairs taken apart, e2gan"]
    out = prune(f"{flags} --keep 0.5 --search-epochs 4 --epochs 16 --lr 5e-4")
    there, back = table(out, "Pruned cyclegan, held-out pictures")
    assert there["PSNR dB"] > there["picture unchanged dB"] + 2
    assert back["PSNR dB"] > back["picture unchanged dB"] + 1


@pytest.fixture(scope="module")
def base(data):
    flags = "--width 8 --batch 8 --lr 2e-3 --epochs 24 --eval-every 24 --fid off --concept dark"
    where = f"--pairs {data}/pairs --cache {data}/cache --out {data}/trained"
    run_main("03", *flags.split(), *where.split())
    return data / "trained/generator.safetensors"


def test_pruning_meets_its_target_and_keeps_what_was_learned(base, prune):
    flags = "--pairs D/pairs --batch 8 --keep 0.4 --search-epochs 6 --epochs 10"
    out = prune(f"{flags} --generator {base}")
    small, full = common.load_generator(out / "generator.safetensors"), common.load_generator(base)
    assert 0.39 < common.count_macs(small, 32) / common.count_macs(full, 32) <= 0.4
    assert small.config["full"] == full.config["widths"]
    assert small.config["concepts"] == full.config["concepts"]
    [row] = table(out, "Pruned pix2pix, held-out pictures")
    assert all(row[f"PSNR dB{when}"] > 20 for when in ("", " before", " sliced"))


class Toy(common.Network):
    """Photo -> 12 channels -> photo, without norms. Its photos have no blue."""

    def __init__(self, config):
        super().__init__(config)
        widths = common.all_widths(config)
        self.write = common.conv(widths, "rgb", "middle", kernel=1)
        self.read = common.conv(widths, "middle", "rgb", kernel=1)

    def forward(self, photo):
        return self.read(torch.relu(self.write(photo)))

    def example(self, size=8, batch=1, device="meta"):
        photo = torch.rand(batch, 3, size, size, device=device)
        photo[:, 2] = 0
        return (photo,)


@pytest.fixture
def toy():
    """The odd channels have large weights, of which the large ones read the blue that is not there;
    the even ones have small weights, and all that the toy does goes through them."""
    torch.manual_seed(0)
    toy = Toy({"widths": {"middle": 12}, "full": {"middle": 12}, "size": 8})
    with torch.no_grad():
        toy.write.weight.uniform_(0.1, 0.3)
        toy.read.weight.uniform_(0.1, 0.3)
        toy.write.weight[1::2, :2] = 0
        toy.write.weight[1::2, 2] = 3.0
        toy.read.weight[:, 1::2] = 3.0
    return toy


def test_the_search_keeps_what_the_loss_needs_though_its_weights_are_small(five, toy):
    before = toy(*toy.example(device="cpu"))
    target = five.Target(toy, 0.5)
    by_size = target.kept(five.weight_sizes(toy), 0.5)
    assert by_size["middle"].tolist() == [1, 3, 5, 7, 9, 11]
    five.add_latents(toy, "weights")
    left, steps = [], 40
    args = argparse.Namespace(method="coronet", start_from="weights", keep=0.5)
    for step in range(steps):
        [photo] = toy.example(batch=4, device="cpu")
        (toy(photo) - 0.3 * photo.mean(1, keepdim=True)).square().mean().backward()
        five.measure_importance(toy, step)
        shares = five.shrink_latents({"toy": toy}, {"toy": target}, args, step + 1, steps)
        left.append(shares["toy"])
        toy.zero_grad()
    assert left[:4] == [1.0] * 4 and left == sorted(left, reverse=True)
    assert 0.45 < left[-1] <= 0.5
    assert toy.latents["middle"].tolist() == [1.0, 0.0] * 6
    assert before.shape == toy(photo[:1]).shape
    # what is at 0 is gone already: slicing changes nothing
    searched = toy(photo)
    kept = target.kept(five.channel_scores(toy, target, args), 0.5)
    common.merge(toy)
    del toy.latents, toy.importance
    small = common.slice_network(toy, kept)
    assert small.config["widths"] == {"middle": 6}
    assert torch.allclose(small(photo), searched, atol=1e-6)


def test_no_group_is_emptied_and_important_groups_stay_wider(five):
    network = common.new_generator("e2gan", 16, 64, [{"name": "a", "prompt": ""}])
    target, widths = five.Target(network, 0.25), network.config["widths"]
    args = argparse.Namespace(method="uniform")
    alike = target.kept(five.channel_scores(network, target, args), 0.25)
    latents, importance = {}, {}
    for group, count in widths.items():
        latents[group] = torch.ones(count)
        importance[group] = torch.arange(1.0, count + 1) / count
        if group in ("rb1", "up1"):
            importance[group] *= 1000
    kept = target.kept(five.latent_worth(target, latents, importance), 0.25)
    for group, count in widths.items():
        assert kept[group].tolist() == list(range(count - len(kept[group]), count))
        assert len(kept[group]) > 0.5 * len(alike[group])
    assert len(kept["rb1"]) == len(kept["up1"]) * 2 == 64
    assert min(len(kept[group]) - len(alike[group]) for group in widths) < 0


def test_uniform_keeps_the_largest_channels_and_narrows_all_groups_alike(five, toy):
    network = common.new_generator("e2gan", 16, 64, [{"name": "a", "prompt": ""}])
    target, args = five.Target(network, 0.25), argparse.Namespace(method="uniform")
    kept = target.kept(five.channel_scores(network, target, args), 0.25)
    sizes = five.weight_sizes(network)
    for group, size in sizes.items():
        assert 0.35 < len(kept[group]) / len(size) < 0.6
        largest = size.argsort(descending=True)[: len(kept[group])]
        assert kept[group].tolist() == sorted(largest.tolist())


@pytest.mark.parametrize("method", ["uniform", "random", "magnitude", "coronet --start-from paper"])
def test_methods_to_compare_with_meet_the_same_target(prune, method):
    out = prune(f"--pairs D/pairs --generator resnet9 --keep 0.25 --method {method}")
    [row] = table(out, "Pruning")
    assert row["search steps"] + row["converge steps"] == 4 * 6  # epochs, steps in one
    assert 24 < row["MACs %"] <= 25 and row["method"] == method.split()[0]
    if method == "uniform":
        shares = [row["after"] / row["before"] for row in table(out, "Channels")]
        assert max(shares) - min(shares) < 0.2


def test_the_last_channel_that_fits_is_kept(five):
    network = common.new_generator("unet256", 8, 32, [{"name": "a", "prompt": ""}])
    target = five.Target(network, 0.37)
    torch.manual_seed(0)
    latents = {g: torch.randn(n) for g, n in network.config["widths"].items()}
    kept = target.kept(latents, 0.37)
    widths = {**target.full, **{g: len(indices) for g, indices in kept.items()}}
    assert target.share(widths) <= 0.37
    for g, n in network.config["widths"].items():
        assert widths[g] == n or target.share({**widths, g: widths[g] + 1}) > 0.37
        magnitude = latents[g].abs()
        assert magnitude[kept[g]].min() >= magnitude.sort(descending=True).values[widths[g] - 1]


STOPPED = {
    "search": "--task cyclegan --data D/unpaired --search-epochs 4 --epochs 1",
    "converge": "--task dcgan --data D/flat --search-epochs 2 --epochs 4",
}


@pytest.mark.parametrize("phase", STOPPED)
def test_runs_stopped_and_continued_end_in_the_same_bytes(prune, tmp_path, monkeypatch, phase):
    """Stopped when they have saved for the second time in a phase."""
    monkeypatch.setattr(training, "write_curve", runs.write_json)  # pictures take the most time
    flags = f"{STOPPED[phase]} --size 32 --width 4 --keep 0.5 --prune-discriminator --save-every 7"
    prune(flags).rename(tmp_path / "whole")
    save, saved = training.Loop.save, []

    def save_and_stop(loop):
        save(loop)
        saved.append(loop.prefix)
        if saved.count(f"{phase}-") == 2:
            raise SystemExit

    monkeypatch.setattr(training.Loop, "save", save_and_stop)
    with pytest.raises(SystemExit):
        prune(flags)
    monkeypatch.setattr(training.Loop, "save", save)
    out, whole = prune(flags), tmp_path / "whole"
    files = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    files += ["search-log.jsonl", "converge-log.jsonl", "pruning.png"]
    for path in files:
        assert (whole / path).read_bytes() == (out / path).read_bytes(), path


# ---- CycleGAN's pool, DCGAN ----------------------------------------------------------------------


def test_a_full_pool_gives_half_earlier_fakes_back(five, monkeypatch):
    monkeypatch.setattr(five, "POOL", 8)
    torch.manual_seed(0)
    pool, picture = [], torch.arange(108.0).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    assert torch.equal(five.swap(pool, picture[:8]), picture[:8])  # while it fills
    given = torch.cat([five.swap(pool, part) for part in picture[8:].split(4)])[:, 0, 0, 0]
    earlier, fresh = given != picture[8:, 0, 0, 0], picture[8:, 0, 0, 0]
    assert 30 < earlier.sum() < 70 and len(pool) == 8
    assert (given[earlier] < fresh[earlier]).all() and len(set(given.tolist())) == len(given)


# ---- Layouts -------------------------------------------------------------------------------------


def save_random(path, width, height) -> None:
    """A smooth random picture, so that a JPEG is near it."""
    rng = np.random.default_rng(list(str(path.parent.name + path.name).encode()))
    picture = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((width, height), Image.Resampling.BICUBIC).save(path)


def save_all(folder, names, width, height):
    """5 training and 3 other pictures in each of the folders."""
    for name in names.split():
        for i in range(5 if "train" in name else 3):
            save_random(folder / name / f"{i}.jpg", width, height)
    return folder


@pytest.fixture
def find(five, tmp_path):
    """find(task, folder, ...) -> training and held-out pictures, decoded."""

    def call(*args):
        return [part.cache(tmp_path / "cache") for part in five.find_data(*args)]

    return call


def rows_of(data, batch=4, steps=range(6)) -> list[tuple]:
    """The batches' rows, as tuples of pictures' bytes."""
    rows = []
    for *parts, concept in data.batches(batch, steps, 3, CPU):
        assert not concept.any()
        for row in zip(*parts, strict=True):
            rows.append(tuple(dataset.to_uint8(picture).numpy().tobytes() for picture in row))
    return rows


def either_way(*pictures) -> dict[tuple, bool]:
    """{row's bytes: is it mirrored}"""
    plain = tuple(x.contiguous().numpy().tobytes() for x in pictures)
    return {plain: False, tuple(x.flip(-1).contiguous().numpy().tobytes() for x in pictures): True}


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
@pytest.mark.parametrize("held_out", ["test", "val"])
def test_side_by_side_is_cut_into_photo_and_edit(find, tmp_path, direction, held_out):
    folder = save_all(tmp_path / "data", f"train {held_out}", 64, 32)
    train, test = find("pix2pix", folder, 32, direction)
    known = {}
    for i in range(5):
        a, b = dataset.read_image(folder / f"train/{i}.jpg").split(32, 2)
        known |= dict.fromkeys(either_way(*((a, b) if direction == "AtoB" else (b, a))), i)
    rows = rows_of(train)
    assert {known[row] for row in rows} == set(range(5)) and len(set(rows)) > 5
    photos, edits = test.pictures(0)
    both = [photos[1], edits[1]] if direction == "AtoB" else [edits[1], photos[1]]
    assert torch.equal(torch.cat(both, 2), dataset.read_image(folder / held_out / "1.jpg"))
    assert test.concepts == train.concepts == [{"name": "data", "prompt": ""}]
    generator = common.new_generator("unet256", 4, 32, test.concepts)
    assert [row["concept"] for row in training.evaluate(generator, test)] == ["data"]


def test_unpaired_rows_are_drawn_and_mirrored_apart(find, tmp_path):
    folder = save_all(tmp_path / "data", "trainA trainB testA testB", 32, 32)
    for i in (5, 6):
        save_random(folder / f"trainB/{i}.png", 32, 32)
    train, test = find("cyclegan", folder, 32)
    known = {}
    for path in sorted(folder.glob("train*/*")):
        for key, mirrored in either_way(dataset.read_image(path)).items():
            known[key[0]] = path.relative_to(folder), mirrored
    rows = [(known[a], known[b]) for a, b in rows_of(train, 2, range(30))]
    assert {str(a[0].parent) + str(b[0].parent) for a, b in rows} == {"trainAtrainB"}
    assert len({a[0] for a, _ in rows}) == 5 and len({b[0] for _, b in rows}) == 7
    assert len({(a[1], b[1]) for a, b in rows}) == 4
    assert len({(a[0], b[0]) for a, b in rows}) > 20  # of 35 couples, not the same again and again
    assert dataset.steps_per_epoch(train.counts, 7) == 1  # an epoch passes over the larger set
    assert len({known[b] for _, b in rows_of(train, 7, range(1))}) == 7
    a, b = test.pictures(0), test.pictures(1)
    assert torch.equal(a[2], dataset.read_image(folder / "testA/2.jpg"))
    assert torch.equal(b[0], dataset.read_image(folder / "testB/0.jpg"))


def test_pairs_taken_apart_share_no_photo(five, data):
    train, test = five.unpair(data / "pairs", "dark")
    a, b = train.files[:12], train.files[12:]
    assert not {x.name for x in a} & {x.name for x in b} and len(b) == 12
    assert {x.parent.name for x in a} == {"source"} and {x.parent.name for x in b} == {"dark"}
    test.cache(data / "cache")
    assert test.paired and len(test.pictures(0)) == len(test.pictures(1)) == 6
    for number, kind in enumerate(("source", "dark")):
        wanted = dataset.read_image(data / f"pairs/test/{kind}/00004.png")
        assert torch.equal(test.pictures(number)[4], wanted)


def test_a_flat_folder_holds_a_tenth_out(find, tmp_path):
    folder = tmp_path / "data"
    for i in range(21):
        name = f"{i}.{'JPG' if i % 3 else 'png'}"
        save_random(folder / "sub" / name if i % 2 else folder / name, 48, 32)
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "0.png", folder / ".thumbnails/0.png")
    train, test = find("dcgan", folder, 32)
    assert train.counts == [19] and test.pixels.shape == (2, 3, 32, 32)
    assert not set(train.files) & set(test.files)
    seen, mirrored = rows_of(train, 1, range(38)), set()
    for path in train.files:
        middle = either_way(dataset.read_image(path)[:, :, 8:40])
        assert sum(row in middle for row in seen) == 2
        mirrored |= {middle[row] for row in seen if row in middle}
    assert mirrored == {False, True}


def test_hashes_change_with_the_data(five, tmp_path):
    both = save_all(tmp_path, "train test trainA trainB testA testB", 64, 32)
    asked = [("pix2pix", 32), ("pix2pix", 32, "BtoA"), ("cyclegan", 32)]
    asked += [("dcgan", 32), ("dcgan", 64)]

    def hashes():
        return {five.find_data(task, both, *more)[0].data_hash for task, *more in asked}

    first = hashes()
    assert hashes() == first and len(first) == 5
    for path in [*both.glob("train/*"), *both.glob("trainB/*")]:
        Image.open(path).convert("L").convert("RGB").save(path)
    assert not hashes() & first


BAD_FOLDERS = [
    ("dcgan", "", "data holds nothing; --task dcgan wants four or more pictures"),
    ("dcgan", "0.png 1.png 2.png", "holds 0.png, 1.png, 2.png; --task dcgan wants four or more"),
    ("pix2pix", "test/0.png", r"holds test/ \(1 pictures\); --task pix2pix wants A|B in train/"),
    ("pix2pix", "train/0.png", "1 pictures are too few to hold some out"),
    (
        "cyclegan",
        "trainA/0.png testA/0.png",
        r"holds testA/ \(1 pictures\), trainA/ \(1 pictures\)",
    ),
    ("pix2pix", "train/bad.png val/0.png", "no picture is left: .*bad.png is not a picture"),
    ("pix2pix", "A/0.png B/1.png", "B holds no picture named as one in .*A, such as 0.png"),
]


@pytest.mark.parametrize("task, names, words", BAD_FOLDERS)
def test_bad_folders(find, tmp_path, task, names, words):
    for name in names.split():
        save_random(tmp_path / "data" / name, 64, 32)
        if "bad" in name:
            (tmp_path / "data" / name).write_bytes(b"GIF89a")
    with pytest.raises(runs.UserError, match=words):
        find(task, tmp_path / "data", 32)


BAD_FLAGS = [
    ("--task dcgan --pairs D/pairs", "give --data"),
    ("--task dcgan --data D/flat --size 48", "dcgan makes pictures of 8, 16, 32, 64, ... pixels"),
    ("--task dcgan --data D/flat --size 32 --keep 0.001", "a share of the MACs from 0.0"),
    ("--task dcgan --data D/flat --generator e2gan", "takes no --generator e2gan but dcgan"),
    ("--task cyclegan --pairs D/pairs", "one --concept"),
    ("--task pix2pix --data D/sides --size 60", "a multiple of 8 from 24 on"),
    ("--pairs D/pairs --generator D/base --start-from paper", "forgets what a generator"),
    ("--pairs D/pairs --generator D/base --keep 0.5", "trained at 64 pixels"),
    ("--pairs D/pairs --generator resnet", "or a trained one's file"),
    ("--data D/sides --concept dark", "leave one out"),
]


@pytest.mark.parametrize("flags, words", BAD_FLAGS)
def test_bad_input_is_one_line(data, error_of, tmp_path, flags, words):
    assert words in error_of("05", *flags_of(data, flags), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0.1, 0.37, 0.9])
def test_widths_in_multiples(five, keep):
    """Of the largest latents, in the last eight of every group that fit; whole groups may be any
    number."""
    concepts = [{"name": "a", "prompt": ""}]
    network = common.new_generator("e2gan", 20, 32, concepts)
    target = five.Target(network, keep, multiple=8)
    torch.manual_seed(0)
    latents = {group: torch.randn(count) for group, count in network.config["widths"].items()}
    kept = target.kept(latents, keep)
    widths = {**target.full, **{group: len(indices) for group, indices in kept.items()}}
    assert target.share(widths) <= keep
    small = common.slice_network(network, kept)
    for group, count in network.config["widths"].items():
        width = small.config["widths"][group]
        assert width == widths[group] and (width % 8 == 0 or width == count)
        more = {**widths, group: min(width + 8, count)}
        assert width == count or target.share(more) > keep
        magnitude = latents[group].abs()
        assert magnitude[kept[group]].min() >= magnitude.sort(descending=True).values[width - 1]
    assert common.count_macs(small) / common.count_macs(network) == pytest.approx(
        target.share(widths)
    )


def test_a_target_that_multiples_cannot_meet_is_refused(five):
    network = common.new_generator("e2gan", 16, 32, [{"name": "a", "prompt": ""}])
    five.Target(network, 0.1)
    with pytest.raises(runs.UserError, match="below 1, of widths in multiples of 32"):
        five.Target(network, 0.1, multiple=32)

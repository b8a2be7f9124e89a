"""Training pairs: wherever pictures are held (memory, a raw file, PNGs), batches are the same bytes; broken files show."""
import shutil

import pytest
import torch
import torch.multiprocessing

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
    return [torch.cat([part.flatten() for part in parts]) for parts in zip(*pairs.batches(batch, steps, 3, rank, world, CPU))]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def no_room(monkeypatch):
    plain = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plain._replace(free=2e9))


def test_a_batch_is_the_pngs_that_the_picks_name(folder):
    pairs = find(folder)
    for step, (photo, edit, concept) in zip(range(9), pairs.batches(4, range(9), 3, 0, 1, CPU), strict=True):
        picks, flips = common.draw_picks(pairs.counts, 4, step, 3)
        assert torch.equal(concept, picks[:, 0])
        for i, ((c, k), flip) in enumerate(zip(picks.tolist(), flips.tolist())):
            for made, name in ((photo, "source"), (edit, list(EDITS)[c])):
                pixels = common.read_image(folder / "train" / name / f"{k:05}.png")
                assert torch.equal(made[i], common.to_float(pixels.flip(-1) if flip else pixels))


def test_every_home_gives_the_same_batches(folder, tmp_path, monkeypatch, capsys):
    wanted = draw(find(folder))                                 # PNGs, decoded batch by batch
    assert same(draw(common.load_pairs(folder, "train", list(EDITS))), wanted)
    memory, raw, pngs = find(folder), find(folder), find(folder)
    memory.hold(1, tmp_path, CPU)
    assert memory.pixels is not None and not list(tmp_path.iterdir()) and not capsys.readouterr().out
    raw.hold(0, tmp_path, CPU)
    assert raw.pixels is None and [raw.raw] == list(tmp_path.iterdir()) and str(raw.raw) in capsys.readouterr().out
    raw.raw.rename(tmp_path / "elsewhere")
    no_room(monkeypatch)
    pngs.hold(0, tmp_path, CPU)
    assert pngs.pixels is None and pngs.raw is None
    assert len(lines := capsys.readouterr().out.splitlines()) == 1 and "too little room" in lines[0]
    raw.raw = tmp_path / "elsewhere"
    for pairs in (memory, raw, pngs):
        assert same(draw(pairs), wanted)
        assert same(draw(pairs, range(4, 9)), draw(find(folder), range(4, 9)))              # continued
        assert same([torch.cat(parts).sort().values for parts in zip(draw(pairs, rank=0, world=2), draw(pairs, rank=1, world=2))],
                    [part.sort().values for part in wanted])


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
    assert again.raw.read_bytes() == marked                     # not decoded again
    again.raw.write_bytes(marked[:-1])
    cut = find(folder)
    cut.hold(0, tmp_path, CPU)
    assert cut.raw == pairs.raw and len(cut.raw.read_bytes()) == len(marked) and cut.raw.read_bytes() != marked
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
    data[len(data) // 2:len(data) // 2 + 8] = bytes(8)
    path.write_bytes(data)


@pytest.mark.parametrize("cache_gb", [1, 0])
def test_a_broken_picture_is_named_and_leaves_no_file(folder, tmp_path, cache_gb):
    shutil.copytree(folder, tmp_path / "pairs")
    break_middle(tmp_path / "pairs/train/night/00003.png")      # its ends are whole: found when it is decoded
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
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=world)
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

"""Stage 4: adapters as it makes and saves them, what each mode learns, which photos it uses, and
its two searches, on pairs and a random base that take seconds."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import random_rows, run_main, script, table, torchrun

import common
import dataset
import runs
import training

WARM = np.array([[1.0, 0.5, 0.2], [0.3, 0.6, 0.1], [0.2, 0.1, 0.1]])
EDITS = {"dark": lambda x: 0.25 * x, "inverted": lambda x: 1 - x, "warm": lambda x: x @ WARM}
TITLE = "New concepts, held-out photos"


@pytest.fixture(scope="module")
def world(tmp_path_factory, write_pairs):
    """Pairs of three concepts, `warm` the new one, half of its photos chosen; a random base."""
    root = tmp_path_factory.mktemp("world")
    write_pairs(root / "pairs", EDITS)
    clusters = {"base": ["dark", "inverted"], "new": ["warm"]}
    runs.write_json(root / "clusters/concepts.json", clusters)
    chosen = "".join(f"{i:05}.png\n" for i in range(0, 12, 2))
    runs.write_text(root / "clusters/samples/warm.txt", chosen)
    torch.manual_seed(0)
    concepts = [{"name": name, "prompt": f"make it {name}"} for name in clusters["base"]]
    tokens = [random_rows(f"tokens/{name}", 4) for name in clusters["base"]]
    base = common.new_generator("e2gan", 8, 32, concepts, tokens, "ViT-S-32:random")
    common.save_network(root / "base.safetensors", base)
    common.save_network(root / "discriminator.safetensors", common.new_discriminator(base))
    return root


def flags_of(root, flags) -> list[str]:
    where = "--pairs W/pairs --clusters W/clusters --base W/base.safetensors --cache W/cache"
    return f"{where} --batch 6 --lr 3e-3 --fid off {flags}".replace("W/", f"{root}/").split()


@pytest.fixture
def stage04(world, load_stage):
    """stage04("--steps 3 ...") runs stage 4 in this process on the world."""
    module = load_stage("04")

    def call(flags):
        run_main(module, *flags_of(world, flags))

    call.module = module
    return call


# ---- Adapters ------------------------------------------------------------------------------------


def test_the_papers_ranks_are_one_percent_of_the_weights_and_150_kilobytes(load_stage, tmp_path):
    stage = load_stage("04")
    prompt = [{"name": "a", "prompt": "turn it into a pencil sketch"}]
    generator = common.new_generator("e2gan", 64, 256, prompt, [torch.randn(9, 512)])
    whole, shapes = common.count_parameters(generator), stage.layer_shapes(generator)
    ranks = stage.layer_ranks(shapes, stage.PAPER_RANKS)
    trained = sum(p.numel() for p in stage.add_lora(generator, ranks, 16.0))
    assert trained == stage.lora_weights(shapes, stage.PAPER_RANKS) <= 0.01 * whole
    stage.save_adapter(tmp_path / "adapter.safetensors", generator, "a", "0" * 64, 16.0)
    assert (tmp_path / "adapter.safetensors").stat().st_size <= 150_000


def test_an_adapter_learns_the_new_concept_and_leaves_the_base(world, stage04, tmp_path):
    before = runs.sha256(world / "base.safetensors")
    stage04(f"--out {tmp_path} --steps 60 --rank 2")
    [row], adapter = table(tmp_path / "warm", TITLE), tmp_path / "warm/adapter.safetensors"
    assert row["concept"] == "warm" and row["photos"] == 6 and row["steps"] == 60
    assert row["PSNR dB"] > max(row["before dB"], row["photo unchanged dB"]) + 3
    base, module = common.load_generator(world / "base.safetensors"), stage04.module
    about = runs.read_tensors(adapter, "adapter")[1]
    assert about["base"] == base.sha256 == before and about["name"] == "warm"
    assert {module.layer_group(name) for name in about["ranks"]} == {*module.PAPER_RANKS}
    share = row["trained weights"] / common.count_parameters(base)
    assert row["trained %"] == pytest.approx(100 * share)
    place = common.load_adapter(base, adapter)
    assert base.config["concepts"][place]["prompt"] == "make it warm"
    test = dataset.find_pairs(world / "pairs", "test", ["warm"]).cache(world / "cache")
    [again] = training.evaluate(base, test)
    assert again["PSNR dB"] == pytest.approx(row["PSNR dB"], abs=0.1)  # fp16 file


def test_start_gradient_begins_in_the_directions_of_the_losses_gradient(world, load_stage):
    stage = load_stage("04")
    args = Namespace(l1=10.0, perceptual=0.0, seed=0, crop=0, no_flip=True, alpha=16.0)
    args.start_from = "gradient"
    train = dataset.find_pairs(world / "pairs", "train", ["dark"]).cache(world / "cache")
    generator, twin = (common.load_generator(world / "base.safetensors") for _ in range(2))
    stage.adapt(args, generator, train, {"down2": 2})
    rows = generator.down2.conv.parametrizations.weight[0].lora_A
    steps = range(stage.FIRST_PAIRS)
    batches = train.batches(1, steps, 0, torch.device("cpu"), flip=False)
    photos, edits, concepts = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = (twin(photos, concepts) - edits).abs().mean()  # all pairs at once
    [gradient] = torch.autograd.grad(loss, [twin.down2.conv.weight])
    most = torch.linalg.svdvals(gradient.flatten(1))[:2].norm()
    kept = torch.linalg.norm(gradient.flatten(1) @ rows.T)
    assert kept.item() == pytest.approx(most.item(), rel=1e-3)


# ---- Modes and photos ----------------------------------------------------------------------------


@pytest.mark.parametrize("flag, same", [("", True), ("--new-discriminator", False)])
def test_training_goes_on_with_the_bases_discriminator(stage04, world, tmp_path, flag, same):
    stage04(f"--out {tmp_path} --steps 1 --lr-d 1e-12 {flag}")
    state, _ = runs.read_tensors(tmp_path / "warm/state.safetensors", "state")
    base, _ = runs.read_tensors(world / "discriminator.safetensors", "discriminator")
    assert torch.allclose(state["d/convs.0.weight"], base["convs.0.weight"]) == same


@pytest.mark.parametrize("mode", ["full", "scratch"])
def test_other_modes_write_a_generator_of_one_concept(stage04, tmp_path, mode):
    stage04(f"--mode {mode} --epochs 2 --samples all --out {tmp_path}")
    [row] = table(tmp_path / "warm", TITLE)
    assert row["trained %"] == 100 and row["photos"] == 12 and row["steps"] == 4
    generator = common.load_generator(tmp_path / "warm/generator.safetensors")
    assert [concept["name"] for concept in generator.config["concepts"]] == ["warm"]
    assert torch.equal(generator.tokens[0], random_rows("tokens/warm", 4))


def test_a_new_prompt_needs_no_new_base_or_clusters(stage04, write_pairs, tmp_path, capsys):
    write_pairs(tmp_path / "pairs", {**EDITS, "bright": lambda x: 0.5 + 0.5 * x})
    flags = f"--pairs {tmp_path}/pairs --concept bright --steps 40 --out {tmp_path}/lora"
    stage04(flags)
    assert "chose no photos for bright" in capsys.readouterr().out
    [row] = table(tmp_path / "lora/bright", TITLE)
    assert row["photos"] == 12 and row["PSNR dB"] > row["before dB"] + 3
    stage04(flags)
    assert "done already" in capsys.readouterr().out


def test_random_photos_are_as_many_as_asked_and_follow_the_seed(world, stage04):
    def drawn(count, seed):
        args = Namespace(pairs=world / "pairs", samples=f"random:{count}", seed=seed)
        assert stage04.module.training_pairs(args, "warm").counts == [count]
        return {*stage04.module.chosen_samples(args, "warm")}

    assert drawn(5, 1) == drawn(5, 1) != drawn(5, 2)
    assert drawn(5, 1) < drawn(8, 1)


def test_photos_that_judge_probes_are_none_that_probes_train_on(world, stage04):
    for samples, judges in (("clusters", range(1, 12, 2)), ("all", range(0, 12, 5))):
        args = Namespace(pairs=world / "pairs", clusters=world / "clusters", samples=samples)
        train, held_out = stage04.module.validation_split(args, "warm")
        assert held_out == [f"{i:05}.png" for i in judges]
        assert sorted(train + held_out) == [f"{i:05}.png" for i in range(12)]


# ---- Searches ------------------------------------------------------------------------------------

SEARCH = "--layers search --rank auto --probe-steps 2 --steps 1 --rank-threshold 0.02"


def test_searches_find_the_same_when_stopped_and_later_runs_use_it(
    world, stage04, monkeypatch, tmp_path
):
    whole, stopped, finetune = tmp_path / "whole", tmp_path / "stopped", stage04.module.finetune
    stage04(f"{SEARCH} --out {whole}")
    asked = []

    def stop_fourth(*args):
        asked.append(args)
        if len(asked) == 4:
            raise SystemExit
        return finetune(*args)

    monkeypatch.setattr(stage04.module, "finetune", stop_fourth)
    with pytest.raises(SystemExit):
        stage04(f"{SEARCH} --out {stopped}")
    assert not (stopped / "layer-search/result.json").exists()
    stage04(f"{SEARCH} --out {stopped}")
    probes, adapter = "layer-search/probes.json", "warm/adapter.safetensors"
    for name in (probes, "layer-search/crucial.json", "warm/probes.json", adapter):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()

    rows = table(whole / "layer-search", "Crucial layers, held-out error relative to the base's")
    gains = [row["gain % per 1000 weights"] for row in rows]
    shapes = stage04.module.layer_shapes(common.load_generator(world / "base.safetensors"))
    assert {row["layers"] for row in rows} == {stage04.module.layer_group(name) for name in shapes}
    assert gains == sorted(gains, reverse=True)
    crucial = runs.read_json(whole / "layer-search/crucial.json")["groups"]
    assert crucial == [row["layers"] for row in rows if row["crucial"] == "yes"]

    [found] = table(whole / "warm", "Rank search, found")
    ranks = {group: int(rank) for group, rank in (p.split(":") for p in found["ranks"].split())}
    about = runs.read_tensors(whole / adapter, "adapter")[1]
    assert about["ranks"] == stage04.module.layer_ranks(shapes, ranks) and {*ranks} == {*crucial}
    assert len(runs.read_json(whole / "warm/probes.json")) == found["probes"] + 1  # and the base

    runs.write_json(tmp_path / "later/layer-search/crucial.json", {"groups": ["out", "up2"]})
    stage04(f"--steps 1 --out {tmp_path}/later")
    about = runs.read_tensors(tmp_path / "later" / adapter, "adapter")[1]
    assert list(about["ranks"]) == ["up2.conv", "out"]


def test_rank_search_doubles_what_helps_and_nothing_else(world, stage04):
    search = stage04.module.search_ranks
    shapes = stage04.module.layer_shapes(common.load_generator(world / "base.safetensors"))
    wanted, asked = {"down1": 4, "tb": 1, "up1": 16, "out": 2}, []

    def error(ranks):  # falls to what is wanted and no further
        asked.append(ranks)
        return 100 - 3 * sum(min(rank, wanted[g]).bit_length() for g, rank in ranks.items())

    ranks, path, cost = search(Namespace(error=error), shapes, list(wanted), threshold=0.01)
    assert ranks == wanted and cost["probes"] == len(path) == len(asked)
    assert cost["all combinations"] == 5 * 5 * 5 * 3  # out: 1, 2, 3
    ranks = search(Namespace(error=error), shapes, list(wanted), threshold=0.5)[0]
    assert ranks == dict.fromkeys(wanted, 1)


def test_layers_that_add_nothing_to_better_ones_are_not_crucial(stage04, monkeypatch, tmp_path):
    def error(ranks):  # up1 and up2 do the same, out does something else, the rest nothing
        return 1 - 0.3 * bool(ranks.keys() & {"up1", "up2"}) - 0.1 * ("out" in ranks)

    monkeypatch.setattr(stage04.module, "Probes", lambda *_: Namespace(error=error))
    stage04(f"--layers search --steps 1 --out {tmp_path}")
    found = runs.read_json(tmp_path / "layer-search/crucial.json")["groups"]
    assert found == ["up2", "out"]  # up2 has fewer weights than up1


def test_two_processes_search_the_same_way(world, tmp_path):
    """They end, so none waited for a probe that the other did not make."""
    probes = "--layers down1,out --rank auto --probe-steps 1 --rank-threshold 0 --steps 3"
    flags = flags_of(world, f"{probes} --start-from gradient --out {tmp_path}")
    torchrun(script("04"), *flags)
    assert table(tmp_path / "warm", TITLE)[0]["steps"] == 3

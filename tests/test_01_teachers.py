"""Stage 1's teachers that are diffusers pipelines: of each kind one of a few thousand weights."""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny_pipelines
import torch
from conftest import run_main, script, torchrun
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import contents, pixels, psnr, rows, scene

import runs

TWO = ("--concept", "wave=make it a wave", "--concept", "starry=make it night")


@pytest.fixture
def refusal(run_stage_1):
    """refusal(...) runs the stage, whose CLIP is a stand-in, and returns its UserError's words."""

    def call(*flags):
        with pytest.raises(runs.UserError) as error:
            run_stage_1(*flags)
        return str(error.value)

    return call


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    """edit(kind, out, ...): the flags of a small run with a saved pipeline of that kind."""
    photos, folder = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("pipelines")
    for i in range(3):
        scene(160, 120, seed=i).save(photos / f"photo {i}.jpg", quality=95)
    small = ("--demo", "--images", photos, "--train", 2, "--test", 1, "--size", 32, "--steps", 2)

    def flags(kind, out, *more):
        if not (folder / kind).exists():
            getattr(tiny_pipelines, kind)(folder / kind)
        return (*small, *TWO, "--teacher", folder / kind, "--out", out, *more)

    return flags


def test_edits_depend_neither_on_the_batch_nor_on_how_many_processes(run_stage_1, edit, tmp_path):
    """Two processes make the same files as one; larger batches round otherwise."""
    one, two, four = (tmp_path / name for name in ("one", "two", "four"))
    run_stage_1(*edit("instruct_pix2pix", one, "--batch", 1))
    run_stage_1(*edit("instruct_pix2pix", four, "--batch", 4))
    torchrun(script("01"), *edit("instruct_pix2pix", two, "--batch", 1))
    for path in one.glob("t*/*/*.png"):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()
        assert psnr(pixels(path), pixels(four / path.relative_to(one))) >= 45
    assert contents(one).keys() == contents(two).keys()
    made = [pixels(one / "train" / row["file_name"]) for row in rows(one, "train")]
    for a, b in itertools.combinations(made, 2):
        assert psnr(a, b) < 40  # photo, prompt and noise matter


def test_text_to_image_checkpoint_edits_image_to_image(run_stage_1, refusal, edit, tmp_path):
    far = {}
    for strength in (0.3, 1.0):
        out, arguments = tmp_path / str(strength), json.dumps({"strength": strength})
        run_stage_1(*edit("text_to_image", out, "--steps", 10, "--arguments", arguments))
        entry = runs.read_json(out / "concepts.json")["starry"]
        assert entry["arguments"] == {"strength": strength, "num_inference_steps": 10}
        far[strength] = [pixels(out / "train" / row["file_name"]) for row in rows(out, "train")]
    assert all(psnr(a, b) < 45 for a, b in zip(far[0.3], far[1.0], strict=True))
    line = refusal(*edit("text_to_image", out, "--steps", 9, "--arguments", arguments))
    assert "'num_inference_steps': 10" in line and "'num_inference_steps': 9" in line
    line = refusal(*edit("text_to_image", tmp_path / "a", "--arguments", '{"colour": 1}'))
    assert "Img2ImgPipeline does not take colour; it takes" in line and "guidance_scale" in line
    line = refusal(*edit("text_to_image", tmp_path / "a", "--arguments", '{"prompt": "x"}'))
    assert "--arguments: prompt is given by the stage itself" in line
    assert not (tmp_path / "a").exists()


def test_lora_of_ones_own(run_stage_1, edit, refusal, tmp_path):
    """It changes the edits by its scale, whatever its trainer called the layers; another file of
    the same name is not taken for the same concept."""
    made = {}
    own = tiny_pipelines.write_lora(tmp_path / "own.safetensors")
    kohya = tiny_pipelines.write_lora(tmp_path / "kohya.safetensors", form="kohya")
    for name, loras in (
        ("none", ()),
        ("zero", (f"{own}:0",)),
        ("own", (own,)),
        ("half", (f"{own}:0.5",)),
        ("kohya", (kohya,)),
        ("twice", (f"{own}:0.5", f"{kohya}:0.5")),
    ):
        flags = [flag for lora in loras for flag in ("--teacher-lora", lora)]
        run_stage_1(*edit("instruct_pix2pix", tmp_path / name, *flags))
        made[name] = pixels(tmp_path / name / "train/starry/00000.png")
    assert psnr(made["none"], made["zero"]) > 60 and psnr(made["own"], made["kohya"]) > 60
    assert psnr(made["own"], made["twice"]) > 60
    assert psnr(made["none"], made["own"]) < psnr(made["none"], made["half"]) < 50
    entry = runs.read_json(tmp_path / "half/concepts.json")["starry"]
    assert entry["teacher_lora"] == [f"{runs.sha256(own)}:0.5"]
    again = edit("instruct_pix2pix", tmp_path / "own", "--teacher-lora", own)
    before = contents(tmp_path / "own")
    run_stage_1(*again, Clip=None, load_teacher=None)  # done already
    tiny_pipelines.write_lora(own, seed=1)
    assert "(teacher_lora ['" in refusal(*again)
    assert contents(tmp_path / "own") == before


def test_loras_that_cannot_be_used(edit, refusal, tmp_path, monkeypatch):
    file = tiny_pipelines.write_lora(tmp_path / "own.safetensors")
    wide = tiny_pipelines.write_lora(tmp_path / "wide.safetensors", width=24)
    other, cut, pickled = (
        tmp_path / name for name in ("other.safetensors", "cut.safetensors", "p.pt")
    )
    flux = {f"transformer.x.to_q.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}
    save_file(flux, other)
    cut.write_bytes(file.read_bytes()[:-9])
    torch.save({"lora": torch.zeros(2)}, pickled)
    out = tmp_path / "out"
    for lora, words in (
        (wide, "wide.safetensors does not fit StableDiffusionInstructPix2Pix"),
        (other, "other.safetensors does not fit StableDiffusionInstructPix2Pix"),
        (cut, "cut.safetensors is no safetensors file, or truncated"),
        (pickled, "p.pt: only .safetensors are read, no pickles"),
        (f"{file}:much", "own.safetensors:much does not exist"),
        (f"{file}:nan", "its scale nan is no number"),
    ):
        line = refusal(*edit("instruct_pix2pix", out, "--teacher-lora", lora))
        assert words in line, line
    line = refusal("--demo", *TWO, "--out", out, "--teacher-lora", file)
    assert "--teacher styles does not take --teacher-lora" in line
    monkeypatch.setitem(sys.modules, "peft", None)
    line = refusal(*edit("instruct_pix2pix", out, "--teacher-lora", file))
    assert "needs the package peft: pip install peft" in line
    assert not out.exists()


@pytest.mark.parametrize(
    "text, path, scale",
    [
        ("style.safetensors", "style.safetensors", 1),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        (r"C:\\x.safetensors", r"C:\\x.safetensors", 1),
        (r"C:\\x.safetensors:-1", r"C:\\x.safetensors", -1),
        ("a:b.safetensors", "a:b.safetensors", 1),
    ],
)
def test_paths_and_scales_of_loras(load_stage, tmp_path, monkeypatch, text, path, scale):
    """The colon after a drive's letter is none before a scale."""
    monkeypatch.chdir(tmp_path)
    tiny_pipelines.write_lora(Path(path))
    lora = load_stage("01").read_lora(text)
    assert (str(lora.path), lora.scale) == (path, scale)


def test_teachers_and_towers_that_cannot_be_loaded(error_of, edit, tmp_path):
    """They are named before anything is made."""
    flags, weights = edit("instruct_pix2pix", tmp_path / "out"), "unet/diffusion_pytorch_model"
    good, pickled, broken = (tmp_path / name for name in "abc")
    tiny_pipelines.instruct_pix2pix(good)
    shutil.copytree(good, pickled)
    (pickled / f"{weights}.safetensors").rename(pickled / f"{weights}.bin")
    shutil.copytree(good, broken)
    os.truncate(broken / f"{weights}.safetensors", 5000)
    for teacher, words in (
        (pickled, "no file named diffusion_pytorch_model.safetensors"),
        (broken, "unet/diffusion_pytorch_model.safetensors"),
        ("no such/model/here", "neither a file nor a folder here, nor a hub id"),
    ):
        line = error_of("01", *flags, "--teacher", teacher)
        assert line.startswith(f"error: --teacher {teacher} cannot be loaded: ") and words in line
    for tower in ("ViT-B-32", "ViT-S-32:nobody", "ViT-Z:random"):
        assert "stand-in ViT-S-32:random" in error_of("01", *flags, "--clip", tower)
    assert not (tmp_path / "out").exists()


def test_a_concept_without_edits_may_be_redefined(run_stage_1, edit, refusal, tmp_path):
    """A first try fails, the corrected command goes on. A negative prompt is a string."""
    out, wrong = tmp_path / "out", '{"negative_prompt": 5}'
    right = '{"negative_prompt": "blurry"}'
    flags = edit("instruct_pix2pix", out, "--arguments")
    assert "fails on" in refusal(*flags, wrong)
    run_stage_1(*flags, right)
    assert len(rows(out, "train")) == 4
    assert "has another" in refusal(*flags, "{}")


# ---- Kinds of pipelines --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, arguments",
    [
        ("xl_instruct_pix2pix", {"negative_prompt": "a", "negative_prompt_2": "b"}),
        ("stable_diffusion_3", {"negative_prompt": "a"}),
        ("flux", {}),
        ("z_image", {"negative_prompt": "a"}),
    ],
)
def test_kinds_of_pipelines(run_stage_1, edit, tmp_path, capsys, kind, arguments):
    """Text-to-image ones edit image-to-image. All edit several photos at a time."""
    run_stage_1(*edit(kind, tmp_path, "--arguments", json.dumps(arguments)))
    assert "one photo at a time" not in capsys.readouterr().out
    made = [pixels(tmp_path / "train" / row["file_name"]) for row in rows(tmp_path, "train")]
    assert [edit.shape for edit in made] == [(32, 32, 3)] * 4
    for a, b in itertools.combinations(made, 2):
        assert psnr(a, b) < 40


def test_references_of_one_edit(run_stage_1, edit, tmp_path, capsys):
    """FLUX.2 klein looks at all photos of a call, and so it is given one at a time."""
    arguments = '{"text_encoder_out_layers": [0, 1, 2]}'
    for batch in (1, 8):
        out = tmp_path / str(batch)
        flags = ("--size", 64, "--batch", batch, "--arguments", arguments)  # 64: its least
        run_stage_1(*edit("flux2_klein", out, *flags))
        said = "one photo at a time, slower than --batch 6: an edit differs by"
        assert (said in capsys.readouterr().out) == (batch == 8)
    assert contents(tmp_path / "1") == contents(tmp_path / "8")


def test_editor_that_chooses_its_own_size(run_stage_1, edit, tmp_path):
    """Flux Kontext resizes a square to a square, and the stage back."""
    arguments = '{"max_area": 2304, "_auto_resize": false}'  # 48x48
    run_stage_1(*edit("flux_kontext", tmp_path, "--arguments", arguments))
    for row in rows(tmp_path, "train"):
        assert pixels(tmp_path / "train" / row["file_name"]).shape == (32, 32, 3)


def test_pipelines_that_need_more_than_a_photo_and_a_prompt(edit, refusal, tmp_path):
    advice = "use an editor (timbrooks/instruct-pix2pix) or a text-to-image checkpoint"
    line = refusal(*edit("inpainting", tmp_path / "out"))
    assert f"StableDiffusionInpaintPipeline needs a mask: {advice}" in line
    line = refusal(*edit("controlnet", tmp_path / "out"))
    assert "would take the photo as its control map" in line and advice in line
    assert not (tmp_path / "out").exists()


# ---- Batches -------------------------------------------------------------------------------------


def fake_teacher(calls: list, mixes: bool = False, most: int = 8):
    """Darkens each photo; one that mixes gives all of a call the mean; takes `most` a call."""

    def teacher(images, names, prompts, seeds):
        calls.append(len(images))
        if len(images) > most:
            raise runs.UserError(f"takes {most}")
        made = [np.asarray(image) // 2 for image in images]
        if mixes:
            made = [np.mean(made, 0).astype(np.uint8)] * len(made)
        return [Image.fromarray(edit) for edit in made]

    return teacher


@pytest.mark.parametrize(
    "behaviour, calls, said",
    [
        ({}, [3, 1, 3], ""),
        ({"mixes": True}, [3, 1, 1, 1, 1, 1, 1, 1], "an edit differs by"),
        ({"most": 1}, [3, 1, 1, 1, 1, 1, 1, 1], "takes 1"),
    ],
)
def test_batches_that_change_edits(load_stage, capsys, behaviour, calls, said):
    """They are found out with the first one, at the cost of one edit."""
    made = []
    teacher = load_stage("01").alone_as_in_a_batch(fake_teacher(made, **behaviour))
    photos = [scene(32, 32, seed=i) for i in range(3)]
    for _ in range(2):
        edits = teacher(photos, ["a"] * 3, ["b"] * 3, [1, 2, 3])
        for photo, edit in zip(photos, edits, strict=True):
            assert np.array_equal(np.asarray(edit), np.asarray(photo) // 2)
    out = capsys.readouterr().out
    assert made == calls and said in out and out.count("one photo at a time") == bool(said)


# ---- Weights of every form -----------------------------------------------------------------------


def edits_in(out: Path) -> dict[str, bytes]:
    paths = [*out.glob("train/*/*.png"), *out.glob("test/*/*.png")]
    assert paths
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def test_single_file(run_stage_1, edit, refusal, tmp_path, monkeypatch):
    """It edits as the folder does whose weights it holds."""
    flags = edit("text_to_image", tmp_path / "folder")
    folder = flags[flags.index("--teacher") + 1]
    file = tiny_pipelines.write_single_file(folder, tmp_path / "one.safetensors")
    run_stage_1(*flags)
    run_stage_1(
        *edit("text_to_image", tmp_path / "file", "--teacher", file, "--teacher-config", folder)
    )
    for path in (tmp_path / "folder").glob("t*/*/*.png"):
        assert (
            path.read_bytes()
            == (tmp_path / "file" / path.relative_to(path.parents[2])).read_bytes()
        )
    entry = runs.read_json(tmp_path / "file/concepts.json")["wave"]
    assert entry["teacher_config"] == str(folder)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out, cut, pickled = tmp_path / "out", tmp_path / "cut.safetensors", tmp_path / "one.ckpt"
    cut.write_bytes(file.read_bytes()[:-9])
    torch.save({"state_dict": {}}, pickled)
    for more, words in (
        ((file,), "it looks like stable-diffusion-v1-5/stable-diffusion-v1-5: offline, give that"),
        ((cut,), "cut.safetensors is no safetensors file, or truncated"),
        ((pickled,), "one.ckpt: only .safetensors are read, no pickles"),
        ((folder, "--teacher-config", folder), "goes with --teacher FILE.safetensors alone"),
        ((tmp_path / "not.safetensors",), "neither a file nor a folder here, nor a hub id"),
    ):
        line = refusal(*edit("text_to_image", out, "--teacher", *more))
        assert words in line, line
    assert not out.exists()


def test_folder_with_half_precision_files_alone(run_stage_1, edit, tmp_path):
    flags = edit("instruct_pix2pix", tmp_path / "plain")
    run_stage_1(*flags)
    half = shutil.copytree(flags[flags.index("--teacher") + 1], tmp_path / "half")
    for path in half.rglob("*model.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    run_stage_1(*edit("instruct_pix2pix", tmp_path / "out", "--teacher", half))
    for path in (tmp_path / "plain").glob("t*/*/*.png"):
        assert (
            path.read_bytes() == (tmp_path / "out" / path.relative_to(path.parents[2])).read_bytes()
        )


def test_dtype(run_stage_1, edit, tmp_path):
    for dtype in ("float32", "bfloat16"):
        run_stage_1(*edit("instruct_pix2pix", tmp_path / dtype, "--teacher-dtype", dtype))
    a, b = (pixels(tmp_path / dtype / "train/wave/00000.png") for dtype in ("float32", "bfloat16"))
    assert 30 < psnr(a, b) < 99


def test_safety_checker(run_stage_1, edit, refusal, tmp_path, capsys):
    """What it made black is said, and made anew without it; as a pickle it is not read."""
    out = tmp_path / "out"
    flags = edit("careful", out)
    with pytest.raises(runs.UserError, match="too few edits of 'wave'"):
        run_stage_1(*flags)
    hint = "add --no-safety-checker --redo wave --redo starry"
    assert hint in capsys.readouterr().out
    run_stage_1(*flags, *hint.split()[1:])
    assert len(rows(out, "train")) == 4 and hint not in capsys.readouterr().out
    pickled = shutil.copytree(flags[flags.index("--teacher") + 1], tmp_path / "pickled")
    weights = pickled / "safety_checker/model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    flags = edit("careful", tmp_path / "other", "--teacher", pickled)
    assert "no file named model.safetensors" in refusal(*flags)
    run_stage_1(*flags, "--no-safety-checker")


# ---- What goes wrong, in one line ----------------------------------------------------------------


def test_edits_that_are_not_finite(edit, refusal, tmp_path):
    """They would be black pictures, after hours."""
    flags = edit("instruct_pix2pix", tmp_path / "out")
    spoilt = shutil.copytree(flags[flags.index("--teacher") + 1], tmp_path / "spoilt")
    weights = spoilt / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["decoder.conv_out.bias"].fill_(float("nan"))
    save_file(tensors, weights, {"format": "pt"})
    line = refusal(*flags, "--teacher", spoilt)
    assert "they are not finite (--teacher-dtype float32 or bfloat16)" in line
    assert not [*(tmp_path / "out").rglob("wave/*")]


def test_strength_that_leaves_no_step(edit, refusal, tmp_path):
    line = refusal(*edit("text_to_image", tmp_path, "--arguments", '{"strength": 0.3}'))
    assert "strength 0.3 x 2 steps < 1: raise one" in line


def test_typo_and_lack_of_network_are_told_apart(load_stage, monkeypatch):
    stage = load_stage("01")
    unknown = huggingface_hub.errors.RepositoryNotFoundError
    unknown = unknown.__new__(unknown)  # made of a server's answer otherwise
    for trouble, words in (
        (unknown, "no such model on huggingface.co"),
        (ConnectionError("no route"), r"huggingface.co cannot be reached \(no route\)"),
    ):
        monkeypatch.setattr("huggingface_hub.list_repo_files", raises(trouble))
        with pytest.raises(runs.UserError, match=words):
            stage.pipeline_files("timbroks/instruct-pix2pix")


def raises(error: Exception):
    def call(*_):
        raise error

    return call


def test_progress_bars_do_not_precede_an_error(edit, tmp_path, capfd):
    flags = edit("instruct_pix2pix", tmp_path / "out")
    broken = shutil.copytree(flags[flags.index("--teacher") + 1], tmp_path / "broken")
    os.truncate(broken / "vae/diffusion_pytorch_model.safetensors", 5000)  # the last to be loaded
    capfd.readouterr()
    with pytest.raises(SystemExit):
        runs.run(lambda: run_main("01", *flags, "--teacher", broken))
    err = capfd.readouterr().err
    assert err.startswith("error: --teacher") and err.count("\n") == 1, err


# ---- All of it at once ---------------------------------------------------------------------------


def test_the_first_day(run_stage_1, edit, tmp_path, capsys):
    """A LoRA on a Stable Diffusion that is one file, a negative prompt, and a folder as people have
    it: a picture in Display P3, a HEIC file, a truncated one and one with a Cyrillic name."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for i, name in enumerate(("a.jpg", "b.jpg", "Фото.jpg")):
        scene(160, 120, seed=i).save(photos / name, quality=95)
    scene(160, 120, seed=3).save(photos / "p3.jpg", icc_profile=tiny_pipelines.display_p3())
    (photos / "cut.jpg").write_bytes((photos / "a.jpg").read_bytes()[:2000])
    (photos / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    flags = edit("text_to_image", out)
    folder = flags[flags.index("--teacher") + 1]
    file = tiny_pipelines.write_single_file(folder, tmp_path / "one.safetensors")
    lora = tiny_pipelines.write_lora(tmp_path / "own.safetensors")
    more = ("--images", photos, "--train", 9, "--teacher", file, "--teacher-config", folder)
    more += ("--teacher-lora", f"{lora}:0.8", "--arguments", '{"negative_prompt": "blurry"}')
    run_stage_1(*flags, *more)
    assert len(rows(out)) == 8 and {row["photo"] for row in rows(out)} == {
        "a.jpg",
        "b.jpg",
        "Фото.jpg",
        "p3.jpg",
    }
    said = capsys.readouterr().out
    assert "skipped cut.jpg" in said and "skipped phone.heic" in said

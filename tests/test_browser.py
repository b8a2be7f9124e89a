"""The exported folder's page in headless Chromium: it shows what Python makes, fetches an adapter
for another concept and nothing else, and what fails leaves the last edit as it was."""

import base64
import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from conftest import run_python, script, write_adapter
from PIL import Image
from safetensors import torch as files

import common
import runs
from assets.editor import Editor

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="apt-get install chromium")
CAMERAS = "--use-fake-device-for-media-stream=device-count=2"
FLAGS = ["--no-sandbox", CAMERAS, "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def folder(good, tmp_path_factory):
    """An exported folder: `dark` of the base, `inverted` of an adapter; then three bad
    concepts, of an adapter cut short, of another base's, and of one in bf16."""
    out = tmp_path_factory.mktemp("browser") / "onnx"
    flags = f"--pairs {good}/pairs --generator {good}/base.safetensors --size 32 --threads 1"
    adapter = good / "adapter.safetensors"
    run_python(script("06"), *flags.split(), "--adapter", adapter, "--out", out)
    index = runs.read_json(out / "index.json")
    if index["web"] != "ort/":
        pytest.skip("npm gives no onnxruntime-web")
    whole = (out / "adapters/inverted.safetensors").read_bytes()
    other = common.load_generator(good / "base.safetensors")
    other.sha256 = "of another"
    write_adapter(out / "adapters/foreign.safetensors", other, "foreign", {"down1.conv": 2})
    (out / "adapters/cut.safetensors").write_bytes(whole)
    write_bf16(whole, out / "adapters/bf16.safetensors")
    for name in ("cut", "foreign", "bf16"):
        path = out / f"adapters/{name}.safetensors"
        index["concepts"].append({"name": name, "prompt": name, "adapter": f"adapters/{path.name}"})
        about = {"bytes": path.stat().st_size, "sha256": runs.sha256(path)}
        index["files"][f"adapters/{path.name}"] = about
    (out / "adapters/cut.safetensors").write_bytes(whole[:-100])
    runs.write_json(out / "index.json", index)
    return out


def write_bf16(adapter: bytes, path) -> None:
    """The adapter with all its tensors in bf16."""
    length = int.from_bytes(adapter[:8], "little")
    metadata = json.loads(adapter[8 : 8 + length])["__metadata__"]
    tensors = files.load(adapter)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    files.save_file(tensors, path, metadata)


@pytest.fixture(scope="module")
def address(folder):
    """Where `--serve` shows the folder; 0 is any free port."""
    command = [sys.executable, script("06"), "--out", str(folder), "--serve", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().split("open ")[1].split(",")[0]
        server.kill()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture
def page(browser, address, tmp_path):
    """The page once it has edited a photo of 128 x 96 pixels; .photo is its file."""
    with browser.new_context(viewport={"width": 390, "height": 844}) as context:
        page = context.new_page()
        page.goto(address)
        page.get_by_label("Pixels").select_option("128", timeout=60_000)
        page.photo = tmp_path / "photo.png"
        noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((128, 96)).save(page.photo)
        page.get_by_label("Photo", exact=True).set_input_files(page.photo)
        page.wait_for_function("document.getElementById('before').height === 96")
        wait(page)
        yield page


def wait(page):
    page.wait_for_selector("figure[aria-busy=false]")


def shown(page) -> np.ndarray:
    """What the page shows as the edit, (H, W, 3)"""
    data = page.evaluate("document.getElementById('after').toDataURL()").split(",")[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def made(folder, page, name, strength=1.0) -> np.ndarray:
    return Editor(folder).use(name, strength).edit(np.asarray(Image.open(page.photo))).astype(int)


@pytest.fixture
def fresh(browser):
    """A page that is not open yet, whose every fetch the test can change."""
    with browser.new_context(service_workers="block") as context:
        yield context.new_page()


def test_while_all_loads_the_photo_and_the_progress_are_shown(fresh, address):
    fresh.add_init_script("""
        window.told = [];
        const note = () => told.push(document.getElementById("status")?.textContent ?? "");
        const options = { subtree: true, childList: true };
        new MutationObserver(note).observe(document, options);
    """)
    held = []
    fresh.route("**/*.wasm", lambda route: held.append(route))
    with fresh.expect_request("**/*.wasm", timeout=60_000):
        fresh.goto(address)
    live = fresh.locator("form :is(button, select, input):enabled:visible")
    assert live.count() == 0 and fresh.locator("#divider").is_hidden()
    assert fresh.locator("#before").evaluate("canvas => canvas.width") == 32  # the sample photo
    fresh.wait_for_timeout(100)  # ms, in which the fetch reaches `held`
    held[0].continue_()
    fresh.wait_for_selector("figure[aria-busy=false]", timeout=60_000)
    told = fresh.evaluate("told")
    assert any(re.match(r"Loading ort-wasm\S+: \S+ of \d+\.\d MB", words) for words in told)
    assert "Starting …" in told and "CPU" in told[-1]
    assert live.count() > 0 and fresh.locator("#loading").is_hidden()


def test_one_thread_is_explained(fresh, address):
    def without_headers(route):
        answer = route.fetch()
        names = ("cross-origin-opener-policy", "cross-origin-embedder-policy")
        kept = {name: value for name, value in answer.headers.items() if name not in names}
        route.fulfill(response=answer, headers=kept)

    fresh.route(f"{address}/", without_headers)
    fresh.goto(address)
    fresh.wait_for_selector("figure[aria-busy=false]", timeout=60_000)
    status = fresh.locator("#status").inner_text()
    assert "one thread: for more, the server must send the headers that serve.py" in status


def test_edits_equal_pythons_and_an_adapter_is_all_that_is_fetched(folder, page):
    assert np.abs(shown(page) - made(folder, page, "dark")).max() <= 1
    assert page.get_by_label("Strength").is_disabled()
    fetched = []
    page.on("response", lambda response: fetched.append(response.url.rsplit("/", 1)[1]))
    page.get_by_role("radio", name="inverted").check(force=True)
    wait(page)
    fetched = [name for name in fetched if name != "icon.svg"]  # asked for when the link changes
    assert fetched == ["inverted.safetensors"]
    inverted = made(folder, page, "inverted")
    assert np.abs(shown(page) - inverted).max() <= 1
    page.get_by_label("Strength").fill("0")  # the base's weights
    wait(page)
    weakened = made(folder, page, "inverted", 0)
    assert np.abs(shown(page) - weakened).max() <= 1 < np.abs(weakened - inverted).max()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    assert (np.asarray(Image.open(download.value.path()).convert("RGB")) == shown(page)).all()


BAD = {
    "cut": "is damaged",
    "foreign": "adapters/foreign.safetensors belongs to another base.",
    "bf16": "adapters/bf16.safetensors: down1.conv.lora_A is BF16, not F16 or F32.",
}


@pytest.mark.parametrize("name, words", BAD.items())
def test_a_bad_adapter_is_a_sentence(folder, page, name, words):
    before = shown(page)
    page.get_by_role("radio", name=name).click(force=True)  # check() wants it to stay so
    wait(page)
    assert words in page.get_by_role("alert").inner_text()
    assert page.get_by_role("radio", name="dark").is_checked() and (shown(page) == before).all()
    page.get_by_role("radio", name="inverted").check(force=True)
    assert page.get_by_role("alert").inner_text() == ""
    wait(page)
    assert np.abs(shown(page) - made(folder, page, "inverted")).max() <= 1


def test_a_slow_edit_is_told_and_the_new_photo_is_shown_alone(page, tmp_path):
    assert re.fullmatch(r"128 × 96, \d+ ms", page.locator("#speed").inner_text())
    page.evaluate("""async () => {
        const { Editor } = await import("./editor.js");
        const { run } = Editor.prototype;
        const goOn = new Promise((resolve) => (window.goOn = resolve));
        Editor.prototype.run = async function (...photo) {
            await goOn;
            return await run.apply(this, photo);
        };
    }""")
    Image.new("RGB", (60, 90), "teal").save(tmp_path / "tall.png")
    page.get_by_label("Photo", exact=True).set_input_files(tmp_path / "tall.png")
    page.wait_for_function("document.getElementById('speed').value === 'editing …'")
    assert page.locator("#before").evaluate("canvas => canvas.height") == 90
    assert page.locator("#after").is_hidden()
    assert page.get_by_role("button", name="Save").is_disabled()
    page.evaluate("goOn()")
    wait(page)
    assert re.fullmatch(r"85 × 128, \d+ ms", page.locator("#speed").inner_text())
    assert page.locator("#after").is_visible()
    assert page.get_by_role("button", name="Save").is_enabled()


def test_where_the_gpu_fails_the_cpu_goes_on(folder, page):
    """The GPU is the CPU here, under another name."""
    page.evaluate("""async () => {
        const { Editor } = await import("./editor.js");
        const { run } = Editor.prototype;
        Editor.prototype.run = async function () {
            Editor.prototype.run = run;
            this.provider = "webgpu";
            this.backends = [["wasm", 1]];
            throw Error("The device is lost.");
        };
    }""")
    page.get_by_role("radio", name="inverted").check(force=True)
    wait(page)
    assert np.abs(shown(page) - made(folder, page, "inverted")).max() <= 1
    assert page.get_by_role("alert").inner_text() == ""
    assert "one thread of the CPU" in page.locator("#status").inner_text()


def test_a_slow_camera_is_edited_at_a_smaller_size(fresh, address, folder):
    """By a clock that stands still but while an edit is made."""
    index = runs.read_json(folder / "index.json")
    fresh.route("**/index.json", lambda route: route.fulfill(json={**index, "size": 256}))
    fresh.goto(address)
    fresh.wait_for_selector("figure[aria-busy=false]", timeout=60_000)
    fresh.evaluate("""async () => {
        const { Editor } = await import("./editor.js");
        const { run } = Editor.prototype;
        let clock = performance.now();
        performance.now = () => clock;
        window.milliseconds = 100; // of an edit
        Editor.prototype.run = async function (...photo) {
            const edit = await run.apply(this, photo);
            clock += milliseconds;
            return edit;
        };
    }""")
    fresh.get_by_role("button", name="Camera", exact=True).click()
    for milliseconds, shown_size in ((100, "184 × 138"), (20, "256 × 192"), (1000, "128 × 96")):
        fresh.evaluate("value => (window.milliseconds = value)", milliseconds)
        size = "size => document.getElementById('speed').value.startsWith(size)"
        fresh.wait_for_function(size, arg=shown_size)
    fresh.get_by_label("Pixels").select_option("192")  # what is chosen is kept to
    fresh.wait_for_function(size, arg="192 × 144, 1.0 frames/s")


def test_styles_change_while_the_camera_runs(folder, page):
    def frames(count):
        for _ in range(count):
            old = page.locator("#speed").inner_text()
            page.wait_for_function("old => document.getElementById('speed').value !== old", arg=old)

    page.get_by_role("button", name="Camera", exact=True).click()
    assert page.evaluate("document.activeElement.id") == "camera"
    frames(3)
    for name in ("inverted", "cut"):
        page.get_by_role("radio", name=name).click(force=True)
        frames(3)
    page.wait_for_function("document.getElementById('error').textContent.includes('damaged')")
    assert page.get_by_role("radio", name="inverted").is_checked()
    page.get_by_role("button", name="Camera", exact=True).click()
    page.get_by_role("radio", name="dark").check(force=True)  # of the camera's last picture
    wait(page)
    assert np.abs(shown(page) - made(folder, page, "dark")).max() > 1


def test_of_two_photos_the_later_counts(folder, page, tmp_path):
    large = np.random.default_rng(1).integers(0, 256, (2400, 3200, 3), dtype=np.uint8)
    Image.fromarray(large).save(tmp_path / "large.png")
    for path in (tmp_path / "large.png", page.photo):
        page.get_by_label("Photo", exact=True).set_input_files(path)
    page.wait_for_timeout(1500)  # ms, in which the large one is decoded as well
    assert np.abs(shown(page) - made(folder, page, "dark")).max() <= 1


def test_keyboard_width_and_what_is_no_picture(page, tmp_path):
    page.get_by_label("Divider").press("ArrowRight")
    assert "--at: 51%" in page.locator("figure").get_attribute("style")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("crossOriginIsolated")  # or there are no threads
    (tmp_path / "words.png").write_text("no picture")
    page.get_by_label("Photo", exact=True).set_input_files(tmp_path / "words.png")
    page.wait_for_function("document.getElementById('error').textContent.includes('no picture')")


def open_again(page, address, link=""):
    """The page from its start, at a link, once it has edited its sample photo."""
    page.goto("about:blank")
    page.goto(address + link)
    wait(page)
    assert page.get_by_role("alert").inner_text() == ""


def test_a_link_mixes_two_styles_and_their_share_is_a_slider(folder, page, address):
    open_again(page, address, "/#inverted=0.8&dark=0.25")
    assert page.get_by_label("Strength").input_value() == "0.8"
    assert page.get_by_label("Mix with").input_value() == "dark"
    page.get_by_label("Pixels").select_option("128")
    page.get_by_label("Photo", exact=True).set_input_files(page.photo)
    page.wait_for_function("document.getElementById('before').height === 96")
    wait(page)
    photo = np.asarray(Image.open(page.photo))
    mixed = Editor(folder).use({"inverted": 0.75 * 0.8, "dark": 0.25}).edit(photo).astype(int)
    assert np.abs(shown(page) - mixed).max() <= 1 < np.abs(mixed - made(folder, page, "dark")).max()
    page.get_by_label("Share").fill("1")  # the second style alone
    wait(page)
    assert np.abs(shown(page) - made(folder, page, "dark")).max() <= 1
    assert page.url.endswith("#inverted=0.8&dark=1")
    page.get_by_label("Share").fill("0")
    wait(page)
    assert np.abs(shown(page) - made(folder, page, "inverted", 0.8)).max() <= 1
    assert "inverted" in page.locator("#news").inner_text()


def test_a_long_picture_keeps_its_shape_and_is_saved_at_its_own_size(page, tmp_path):
    Image.new("RGB", (2000, 100), "teal").save(tmp_path / "long.png")
    page.get_by_label("Photo", exact=True).set_input_files(tmp_path / "long.png")
    page.wait_for_function("document.getElementById('before').height === 6")  # 128 x 6
    wait(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    assert Image.open(download.value.path()).size == (2000, 100)


def frame_size(page, video) -> list[int]:
    """Width and height of a video file, as the browser itself plays it."""
    data = base64.b64encode(video.path().read_bytes()).decode()
    suffix = video.suggested_filename.rsplit(".", 1)[1]
    return page.evaluate(
        """async (address) => {
            const video = document.createElement("video");
            video.src = address;
            await new Promise((resolve, reject) => {
                video.onloadeddata = resolve;
                video.onerror = reject;
            });
            return [video.videoWidth, video.videoHeight];
        }""",
        f"data:video/{suffix};base64,{data}",
    )


def test_on_a_phone_the_camera_mixes_two_styles_is_recorded_and_saved(page):
    assert page.get_by_role("button", name="Record").is_hidden()
    page.get_by_role("button", name="Camera", exact=True).click()
    page.get_by_label("Mix with").select_option("inverted")
    page.get_by_label("Share").fill("0.4")
    mixed = "The camera is edited: dark mixed with 40 % inverted."
    page.wait_for_function(
        "text => document.getElementById('news').textContent === text", arg=mixed
    )
    page.get_by_role("button", name="Record").click()
    page.wait_for_timeout(2000)  # ms of video
    with page.expect_download() as download:
        page.get_by_role("button", name="Stop").click()
    assert download.value.suggested_filename.startswith("dark+inverted.")
    assert frame_size(page, download.value) == [640, 480]
    for is_live in (True, False):  # the camera's picture of this moment, then the one that stays
        with page.expect_download() as download:
            page.get_by_role("button", name="Save").click()
        assert Image.open(download.value.path()).size == (640, 480)
        assert page.evaluate("document.getElementById('video').srcObject !== null") == is_live
        if is_live:
            page.get_by_role("button", name="Camera", exact=True).click()
            wait(page)


def test_a_video_that_cannot_be_recorded_is_a_sentence(page):
    page.evaluate("""() => {
        MediaRecorder.prototype.start = () => {
            throw new DOMException("No encoder", "NotSupportedError");
        };
    }""")
    page.get_by_role("button", name="Camera", exact=True).click()
    page.get_by_role("button", name="Record").click()
    assert page.get_by_role("alert").inner_text() == "No video can be recorded: No encoder."
    page.get_by_role("button", name="Camera", exact=True).click()
    wait(page)


def test_a_button_turns_to_the_other_camera(page):
    page.evaluate("window.isOn = () => document.getElementById('video').srcObject !== null")
    camera = "document.getElementById('video').srcObject.getTracks()[0].getSettings().deviceId"
    page.get_by_role("button", name="Camera", exact=True).click()
    page.get_by_role("button", name="Other camera").wait_for()
    first = page.evaluate(camera)
    page.get_by_role("button", name="Other camera").click()
    page.wait_for_function(f"first => isOn() && {camera} !== first", arg=first)
    assert page.get_by_role("alert").inner_text() == ""


def test_a_phones_front_camera_is_a_mirror_and_its_other_one_is_not(page):
    page.evaluate("""async () => {
        const { Editor } = await import("./editor.js");
        const { frame } = Editor.prototype;
        Editor.prototype.frame = function (source, size, isMirrored) {
            window.isMirrored = isMirrored;
            return frame.call(this, source, size, isMirrored);
        };
        const devices = navigator.mediaDevices;
        const getUserMedia = devices.getUserMedia.bind(devices);
        devices.getUserMedia = async ({ video }) => {
            MediaStreamTrack.prototype.getSettings = () => ({ facingMode: video.facingMode });
            return await getUserMedia({ video: true });
        };
    }""")
    assert not page.evaluate("window.isMirrored")  # a photo
    page.get_by_role("button", name="Camera", exact=True).click()
    page.wait_for_function("window.isMirrored === true")
    page.get_by_role("button", name="Other camera").click()
    page.wait_for_function("window.isMirrored === false")
    page.get_by_role("button", name="Other camera").click()
    page.wait_for_function("window.isMirrored === true")


def test_a_mirrored_frame(page):
    [plain, mirrored] = page.evaluate("""async () => {
        const { Editor } = await import("./editor.js");
        const photo = document.getElementById("before");
        const pixels = (isMirrored) => Editor.prototype.frame(photo, photo.width, isMirrored).data;
        return [false, true].map((isMirrored) => Array.from(pixels(isMirrored)));
    }""")
    shape = (96, 128, 4)
    assert (np.reshape(mirrored, shape) == np.reshape(plain, shape)[:, ::-1]).all()


@pytest.mark.parametrize(
    "name, words",
    {
        "OverconstrainedError": "there is none of this kind",
        "NotAllowedError": "the browser was not allowed to",
    }.items(),
)
def test_why_there_is_no_camera_is_a_sentence(page, name, words):
    page.evaluate(
        """(name) => {
            const refusal = new DOMException("Invalid constraint", name);
            navigator.mediaDevices.getUserMedia = () => Promise.reject(refusal);
        }""",
        name,
    )
    page.get_by_role("button", name="Camera", exact=True).click()
    page.wait_for_function("document.getElementById('error').textContent !== ''")
    assert page.get_by_role("alert").inner_text() == f"The camera cannot be used: {words}."
    assert page.get_by_role("button", name="Record").is_hidden()


def test_the_end_of_the_camera_is_told_and_its_last_picture_stays(page):
    page.get_by_role("button", name="Camera", exact=True).click()
    page.get_by_role("button", name="Record").wait_for()
    page.evaluate("""() => {
        const [track] = document.getElementById("video").srcObject.getTracks();
        track.dispatchEvent(new Event("ended"));
    }""")
    wait(page)
    assert "camera has ended" in page.get_by_role("alert").inner_text()
    assert page.get_by_role("button", name="Record").is_hidden()
    assert page.evaluate("document.getElementById('before').height") == 96  # of 128 x 96


SCREENS = [(390, 844), (320, 568), (844, 390), (1280, 800), (1280, 600)]


@pytest.mark.parametrize("width, height", SCREENS)
def test_all_buttons_are_on_the_screen_while_two_styles_are_mixed(page, width, height):
    """The camera's picture is higher than wide, as phones' are."""
    page.set_viewport_size({"width": width, "height": height})
    page.get_by_label("Mix with").select_option("inverted")
    page.evaluate("""() => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [480, 640];
        const context = canvas.getContext("2d");
        setInterval(() => context.fillRect(0, 0, 480, 640), 50);
        navigator.mediaDevices.getUserMedia = async () => canvas.captureStream();
    }""")
    page.get_by_role("button", name="Camera", exact=True).click()
    page.wait_for_function("document.getElementById('speed').value.startsWith('96 × 128, ')")
    for picture in ("figure", "figcaption"):
        box = page.locator(picture).bounding_box()
        assert box["y"] + box["height"] <= height
    assert box["height"] < 30  # a line
    for name in ("Camera", "Save", "Record", "Other camera"):
        button = page.get_by_role("button", name=name, exact=True)
        button.wait_for()
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert box["y"] >= 0 and box["y"] + box["height"] <= height
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_what_is_dropped_or_pasted_without_a_picture_is_a_sentence(page):
    page.evaluate("""() => {
        const dataTransfer = new DataTransfer();
        document.dispatchEvent(new DragEvent("drop", { dataTransfer }));
    }""")
    assert page.get_by_role("alert").inner_text() == "What was dropped holds no picture."
    page.evaluate("""() => {
        const clipboardData = new DataTransfer();
        document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
    }""")
    assert page.get_by_role("alert").inner_text() == "What was pasted holds no picture."


def test_the_runtime_travels_compressed(folder, address):
    name = "ort-wasm-simd-threaded.wasm"
    request = urllib.request.Request(f"{address}/ort/{name}", headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request) as response:
        data = response.read()
    whole = (folder / "ort" / name).read_bytes()
    assert gzip.decompress(data) == whole and 3 * len(data) < len(whole)
    assert runs.read_json(folder / "index.json")["web bytes"][name] == len(whole)
    request.add_header("If-None-Match", response.headers["ETag"])
    with pytest.raises(urllib.error.HTTPError, match="304"):  # the browser has it
        urllib.request.urlopen(request)


def test_offline_after_the_first_visit(folder, page, address):
    page.wait_for_function("navigator.serviceWorker.controller !== null")
    page.context.set_offline(True)
    open_again(page, address)
    page.get_by_role("radio", name="inverted").check(force=True)  # was never chosen before
    wait(page)
    assert page.get_by_role("alert").inner_text() == ""
    page.context.set_offline(False)

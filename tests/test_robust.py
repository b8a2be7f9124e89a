"""Nothing lost, nothing let in: no code from files, one process a folder, and what strangers' files may hold."""
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import common
from conftest import ROOT, script


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, write_pairs):
    return write_pairs(tmp_path_factory.mktemp("robust") / "pairs", {"dark": lambda x: 0.3 * x}, train=4, test=2)


def train(pairs, out, *flags):
    """Flags of a stage 3 that needs no CLIP."""
    return list(map(str, ["--pairs", pairs, "--concept", "dark", "--arch", "resnet9", "--width", 8, "--batch", 4, "--fid", "off",
                          "--device", "cpu", "--out", out, *flags]))


# ---------------------------------------------------------------------------------------------------------------------
# No code from files

FORBIDDEN = {
    "torch.load without weights_only=True": r"\btorch\.load\((?![^\n]*weights_only=True)",
    "pickle": r"\b(?:c?[Pp]ickle|dill|joblib|shelve|marshal)\b\s*(?:\.|import|$)|import (?:pickle|dill|joblib|shelve|marshal)|allow_pickle=True",
    "code from a hub or a file": r"trust_remote_code|torch\.hub\.load\(",
    "eval or exec": r"(?<![\w.])(?:eval|exec|compile)\(",
    "YAML that makes objects": r"yaml\.(?:unsafe_)?load\(",
    "a shell": r"os\.system\(|shell=True",
}


def test_no_file_is_run_or_unpickled():
    exempt = {ROOT / "tests/test_robust.py", ROOT / "tests/test_data.py"}       # the latter writes CIFAR-10's files
    for path in {*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")} - exempt:
        for what, pattern in FORBIDDEN.items():
            found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
            assert not found, f"{path.name}: {what}: {found.group()}"
    for line in ("x = torch.load(path)", "import pickle", "np.load(f, allow_pickle=True)", "eval(text)", "pickle.loads(b)",
                 "from_pretrained(x, trust_remote_code=True)"):
        assert any(re.search(pattern, line) for pattern in FORBIDDEN.values()), line


# ---------------------------------------------------------------------------------------------------------------------
# One process a folder

def test_a_second_process_is_kept_out_until_the_first_is_dead(pairs, error_of, tmp_path):
    out, flags = tmp_path / "out", train(pairs, tmp_path / "out", "--epochs", 100_000)
    first = subprocess.Popen([sys.executable, script("03"), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.time() + 60
        while not (out / "settings.json").exists() and time.time() < deadline:
            time.sleep(0.05)
        for more in ([], ["--overwrite"]):
            assert f"another process is at work in {out}" in error_of("03", *flags, *more)
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    settings = common.read_json(out / "settings.json")
    assert common.prepare_folder(out, settings, False) is False            # nothing is left to clean up

"""Disturbed at any moment (SIGKILL, SIGINT, SIGTERM, a full disk), the same command run again ends
in the bytes of a run that was not. killed.py says how."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def report(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(ROOT / "tests/killed.py"), str(folder), *request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


FEW = pytest.param(["--times", "2"], id="few")
MANY = pytest.param(["--times", "20", "--seed", "1"], id="many", marks=pytest.mark.slow)


@pytest.mark.parametrize("report", [FEW, MANY], indirect=True)
@pytest.mark.parametrize("number", ["01", "02", "03", "04", "05", "06"])
def test_a_disturbed_run_loses_nothing(report, number):
    assert report[number]["disturbed"] >= 5
    assert not report[number]["problems"], "\n".join(report[number]["problems"])

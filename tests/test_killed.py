"""Disturbed at any moment (SIGKILL, SIGINT, SIGTERM, a full disk, a read-only folder), the same command run again ends in the bytes of
a run that was not. killed.py says how."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT

STAGES = ("01", "02", "03", "04", "05", "06")


def disturb(folder, *flags) -> dict:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/killed.py"), str(folder), *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return disturb(tmp_path_factory.mktemp("few"), "--times", 2)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return disturb(tmp_path_factory.mktemp("many"), "--times", 20, "--seed", 1)


@pytest.mark.parametrize("number", STAGES)
def test_a_disturbed_run_loses_nothing(few, number):
    assert few[number]["killed"] == 2 and not few[number]["problems"], "\n".join(
        few[number]["problems"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", STAGES)
def test_a_run_disturbed_at_many_moments_loses_nothing(many, number):
    assert many[number]["killed"] == 20 and not many[number]["problems"], "\n".join(
        many[number]["problems"]
    )

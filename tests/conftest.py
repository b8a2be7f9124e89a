"""How tests run a stage: as a user does, in a process of its own, or in this process where start-up time would dominate."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def script(number: str) -> Path:
    return next(ROOT.glob(f"{number}_*.py"))


@pytest.fixture(scope="session")
def stage():
    """stage("03", "--demo", ..., cwd=folder) runs a stage and returns its CompletedProcess; status 0 unless told otherwise."""
    def call(number, *flags, cwd=None, status=0, **environment):
        done = subprocess.run([sys.executable, str(script(number)), *map(str, flags)], cwd=cwd, text=True,
                              capture_output=True, env={**os.environ, **environment}, timeout=600)
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done
    return call


@pytest.fixture(scope="session")
def load_stage():
    """load_stage("01") imports a numbered script as a module."""
    def load(number):
        spec = importlib.util.spec_from_file_location(f"stage_{number}", script(number))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return load


@pytest.fixture
def error_of(load_stage, monkeypatch, capsys):
    """error_of("03", "--pairs", folder) runs a stage in this process, asserts that it ends in one `error:` line and
    status 2 without a traceback, and returns that line."""
    def call(number, *flags):
        import common
        monkeypatch.setattr(sys, "argv", [str(script(number)), *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            common.run(load_stage(number).main)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        assert stop.value.code == 2
        assert lines and lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines), lines
        return lines[-1]
    return call

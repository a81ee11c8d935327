import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}


class Script:
    """A script of the project as a child process, in a process group of its own as a terminal would start it."""

    def __init__(self, name: str, *arguments: object, log_dir: Path):
        command = [sys.executable, str(ROOT / name), *map(str, arguments), "--log-dir", str(log_dir)]
        self.log_dir = log_dir
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's "&" ignores it
        )

    def finish(self, timeout: float = 60) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def wait_for_episodes(self, count: int, checkpoint: bool = False) -> Path:
        """Return the run's folder as soon as `count` episodes are in its table, and a checkpoint if asked for."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            for table in self.log_dir.glob("*/episodes.csv"):
                is_saved = (table.parent / "checkpoint.pt").exists() or not checkpoint
                if is_saved and len(table.read_text().splitlines()) > count:
                    return table.parent
            time.sleep(0.02)
        raise AssertionError(f"no {count} episodes: {self.finish(5)}")


@pytest.fixture
def start(tmp_path):
    """Start a script with its log directory in the test's own folder; whatever is left of it is killed afterwards."""
    scripts = []

    def start_script(name, *arguments):
        scripts.append(Script(name, *arguments, log_dir=tmp_path / "runs"))
        return scripts[-1]

    yield start_script
    for script in scripts:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.process.pid, signal.SIGKILL)
        script.process.wait()


@pytest.fixture
def only_run(tmp_path):
    """Return the folder of the one run below the test's own folder."""

    def find() -> Path:
        (folder,) = (tmp_path / "runs").iterdir()
        return folder

    return find

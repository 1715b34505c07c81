"""A run that gets a signal ends its step, saves, prints how to resume, and exits with the code of that signal."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_fit import assert_same_run, metrics, quiet
from tiny import tiny_run
from typer.testing import CliRunner

from open_mythos.cli import app
from open_mythos.training import fit as fitting
from open_mythos.training.fit import Watch, fit
from open_mythos.training.objective import Objective
from open_mythos.training.owner import LOCK
from open_mythos.training.stopping import SIGNALS, Stop
from open_mythos.training.trainer import Trainer

LONG = bool(os.environ.get("OPEN_MYTHOS_LONG"))
LAUNCHES = """
import os, signal, sys, time
from pathlib import Path
from tiny import tiny_run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from open_mythos.training.fit import Watch, fit

def train(run, asked, victims=()):
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    (run.parent / os.environ["RANK"]).write_text(str(os.getpid()))
    def record(line):
        for victim in [who for who, step in victims[attempt:attempt + 1] if line["step"] == step]:
            os.kill(int((run.parent / victim).read_text()), signal.SIGKILL)
        if line["step"] == asked:
            os.kill(os.getppid(), signal.SIGTERM)
            while not signal.getsignal(signal.SIGTERM).__self__.asked:
                time.sleep(0.01)
    fit(tiny_run(), run, "auto", Watch(record, lambda said: print(said, flush=True), again="mythos again"))

def launch(run, asked, victims=()):
    config = LaunchConfig(1, 1, 2, run_id=run.name, start_method="fork", rdzv_endpoint="localhost:0",
                          rdzv_backend="c10d", monitor_interval=0.1, max_restarts=len(victims))
    elastic_launch(config, train)(run, asked, victims)

folder = Path(sys.argv[1])
try:
    launch(folder / "stopped", 6)
except SignalException as error:
    assert error.sigval == signal.SIGTERM
launch(folder / "stopped", 0)
launch(folder / "whole", 0)
launch(folder / "killed", 0, [("1", 6), ("0", 10)])
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run to compare with."""
    run = tmp_path_factory.mktemp("whole") / "run"
    fit(tiny_run(), run, watch=quiet())
    return run


def signal_at_step(number: int, step: int, messages: list[str], times: int = 1) -> Watch:
    def record(line: Any) -> None:
        for _ in range(times if line["step"] == step else 0):
            signal.raise_signal(number)

    return Watch(record, messages.append, again="mythos again")


def exited_by(number: int, error: BaseException) -> bool:
    return type(error) is KeyboardInterrupt if number == signal.SIGINT else error.args == (128 + number,)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_step_saves_and_prints_how_to_resume(tmp_path: Path, undisturbed: Path, number: int) -> None:
    before, messages = [signal.getsignal(each) for each in SIGNALS], list[str]()
    with pytest.raises((KeyboardInterrupt, SystemExit)) as left:
        fit(tiny_run(), tmp_path / "stopped", watch=signal_at_step(number, 6, messages))
    assert exited_by(number, left.value)
    saved = tmp_path / "stopped/checkpoints/step_00000006"
    name = signal.Signals(number).name
    assert messages == [f"stopped by {name}; {saved} is saved; continue from it with mythos again"]
    assert saved.is_dir() and not (tmp_path / "stopped" / LOCK).exists()
    assert [signal.getsignal(each) for each in SIGNALS] == before
    fit(tiny_run(), tmp_path / "stopped", "auto", quiet())
    assert_same_run(tmp_path / "stopped", undisturbed)


def test_a_signal_within_a_step_lets_it_finish(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, calls = Objective.__call__, [0]

    def interrupted(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            signal.raise_signal(signal.SIGTERM)
        return call(*args)

    monkeypatch.setattr(Objective, "__call__", interrupted)
    with pytest.raises(SystemExit):
        fit(tiny_run(), tmp_path / "stopped", watch=quiet())
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["step_00000003"]
    fit(tiny_run(), tmp_path / "stopped", "auto", quiet())
    assert_same_run(tmp_path / "stopped", undisturbed)


@pytest.mark.parametrize("call", [4, 5])
def test_a_signal_between_steps_saves_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    is_asked, calls = Stop.is_asked, [0]

    def then_asked(stop: Stop) -> bool:
        answer = is_asked(stop)
        calls[0] += 1
        if calls[0] == call:
            signal.raise_signal(signal.SIGTERM)
        return answer

    monkeypatch.setattr(Stop, "is_asked", then_asked)
    with pytest.raises(SystemExit):
        fit(tiny_run("save_every=100"), tmp_path, watch=quiet())
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert saved.name == f"step_{metrics(tmp_path)[-1]['step']:08}"


def test_a_second_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    messages: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_run(), tmp_path, watch=signal_at_step(signal.SIGINT, 6, messages, times=2))
    assert messages == [
        f"stopped by SIGINT; {tmp_path / 'checkpoints/step_00000004'} is saved; continue from it with mythos again"
    ]


@pytest.mark.parametrize("stage", ["Trainer", "finish"])
def test_a_signal_before_or_after_training_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(fitting, stage, lambda *args: signal.raise_signal(signal.SIGHUP))
    with pytest.raises(SystemExit) as left:
        fit(tiny_run(), tmp_path / "run", watch=signal_at_step(0, -1, messages))
    assert left.value.code == 129
    if stage == "Trainer":
        assert messages == ["stopped by SIGHUP; nothing was saved"] and not (tmp_path / "run").exists()
    else:
        assert "step_00000012 is saved; continue from it with mythos again" in messages[0]


def test_ignored_signals_stay_ignored_and_other_threads_set_no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.asked == 0
    finally:
        signal.signal(signal.SIGHUP, before)

    def elsewhere() -> None:
        with Stop():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()


def test_a_stopped_or_killed_torchrun_job_resumes_bit_for_bit(tmp_path: Path) -> None:
    """torchrun's own agent passes a signal on to two processes, which are forked and so need not import anything.

    Each kill costs a restart: first the second process is killed, then the first, which holds the lock.
    """
    places = os.pathsep.join(str(Path(__file__).parents[i]) for i in range(3))
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": places}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # step 6 had ended; all processes learn of the signal at the end of the next step
    saved = tmp_path / "stopped/checkpoints/step_00000007"
    assert f"stopped by SIGTERM; {saved} is saved; continue from it with mythos again" in done.stdout.splitlines()
    assert f"resuming from {saved}" in done.stdout.splitlines()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert done.stdout.count("which has ended without releasing it: taking it over") == 1
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.skipif(not LONG, reason="three starts of torchrun; OPEN_MYTHOS_LONG=1")
@pytest.mark.parametrize("number", SIGNALS)
def test_the_command_printed_under_torchrun_resumes_bit_for_bit(tmp_path: Path, number: int) -> None:
    words = ["train", "debug", "steps=40", "log_every=1", "evaluation.loops=1", "evaluation.examples=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    torchrun += ["--nproc-per-node", "2", "-m", "open_mythos"]
    run, undisturbed = tmp_path / "a run", tmp_path / "whole"
    victim = start_training([*torchrun, *words, "--out", str(run)], run)
    victim.send_signal(number)
    output, _ = victim.communicate(timeout=60)
    (line,) = [line for line in output.splitlines() if f"stopped by {signal.Signals(number).name}" in line]
    command = shlex.split(line.partition("continue from it with ")[2])
    assert command[:5] == ["torchrun", *torchrun[-4:]] and command[5:] == [
        *words, "--out", str(run), "--resume", "auto",
    ]  # fmt: skip
    assert 3 <= int(line.partition("step_")[2][:8]) < 40
    for again in (command[5:], [*words, "--out", str(undisturbed)]):
        subprocess.run([*torchrun, *again], check=True, capture_output=True, timeout=300)
    for name in ("model/model.safetensors", "evaluation.json"):
        assert (run / name).read_bytes() == (undisturbed / name).read_bytes()
    assert metrics(run) == metrics(undisturbed)


def start_training(command: list[str], run: Path, **options: Any) -> subprocess.Popen[str]:
    """Start a training and wait until it has written three lines of metrics."""
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    file, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < 3:
        assert victim.poll() is None and time.monotonic() < deadline, "it should be training"
        time.sleep(0.02)
    return victim


def test_the_printed_command_resumes_the_run(tmp_path: Path) -> None:
    run = tmp_path / "a run"
    words = ["train", "debug", "steps=100000", "save_every=100000", "log_every=1", "--out", str(run)]
    victim = start_training([sys.executable, "-m", "open_mythos", *words], run)
    victim.send_signal(signal.SIGTERM)
    output, _ = victim.communicate(timeout=60)
    assert victim.returncode == 143, output
    (line,) = [line for line in output.splitlines() if "stopped by SIGTERM" in line]
    command = shlex.split(line.partition("continue from it with ")[2])
    assert command[0] == "mythos" and command[1:] == [*words, "--resume", "auto"]
    step = int(line.partition("step_")[2][:8])
    shown: list[str] = []
    with pytest.MonkeyPatch.context() as patch:  # the same command, in this process, stopped at its first line
        patch.setattr("open_mythos.cli.watch.live_line", lambda numbers, steps: shown.append(numbers) or "")
        patch.setattr(Trainer, "check_going", lambda *args: signal.raise_signal(signal.SIGINT))
        done = CliRunner().invoke(app, command[1:])
    assert done.exit_code == 130 and "continue from it with mythos train" in done.output, done.output
    assert shown[0]["step"] == step + 1

"""What runs on a GPU within a time limit: parts that end in time, and a training that is tried again."""

import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from tests.scripting import script

gpu_all = script("gpu_all")

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
#: Stands for train.py: waits where it is to compile, fails where PyTorch's fused attention is used, and else leaves a
#: checkpoint.
TRAIN = """
import sys, time, torch
from pathlib import Path
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if sys.argv[1] == "weights":
    Path(options["--out"]).write_text("weights")
elif "--compile" in sys.argv:
    time.sleep(600)
elif torch.backends.cuda.flash_sdp_enabled():
    sys.exit("an illegal memory access was encountered")
else:
    print({name: options[name] for name in ("--device", "--minutes", "--weights")}, "10 steps/s", flush=True)
    work = Path(options["--work"])
    work.mkdir()
    (work / "checkpoint.pt").write_text("state")
    (work / "losses.jsonl").write_text("losses")
"""


def runs(process: int) -> bool:
    """Whether a process is there and no zombie, which nobody may wait for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_jobs_end_in_time_with_what_they_began(tmp_path, capsys):
    began = time.monotonic()
    jobs = [gpu_all.Job(tmp_path / "long.log", ["-c", PARENT]), gpu_all.Job(tmp_path / "short.log", ["-c", "exit(3)"])]
    while not (tmp_path / "long.log").read_text().strip():
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    assert gpu_all.run(jobs, 1) == [-9, 3]
    child = int((tmp_path / "long.log").read_text())
    until = time.monotonic() + 30
    while runs(child):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert "long: exit code -9" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [300, 50])
def test_a_training_that_does_not_run_is_tried_in_other_ways(tmp_path, monkeypatch, seconds):
    stands_for = tmp_path / "train.py"
    stands_for.write_text(TRAIN)
    plain = gpu_all.PLAIN.replace(gpu_all.TRAIN, str(stands_for))
    starts = {"training-compiled": [stands_for], "training": [stands_for], "training-plain": ["-c", plain]}
    attempts = [(name, starts[name], *more) for name, _, *more in gpu_all.ATTEMPTS]
    monkeypatch.setattr(gpu_all, "ATTEMPTS", attempts)
    monkeypatch.setattr(gpu_all, "TRAIN", stands_for)
    monkeypatch.setattr(gpu_all, "FIRST_STEPS", 15)
    weights = tmp_path / "first.safetensors"
    gpu_all.train(Namespace(out=tmp_path, data=tmp_path, weights=weights), seconds)
    assert (tmp_path / "training-compiled.log").read_text() == ""
    again = tmp_path / "training-plain"
    assert (tmp_path / "weights.safetensors").is_file() == again.is_dir() == (seconds == 300)
    if seconds == 300:
        assert "illegal memory access" in (tmp_path / "training.log").read_text()
        assert [path.name for path in again.iterdir()] == ["losses.jsonl"]
        said = (tmp_path / "training-plain.log").read_text()
        assert f"'--weights': '{weights}'" in said and "'--device': 'cuda'" in said


def test_what_is_asked_of_the_report_is_there(monkeypatch):
    report = script("gpu_report")
    monkeypatch.setattr(report, "has_fp8", lambda device: True)
    names = {part.name for part in report.parts(torch.device("cuda"))}
    assert set(gpu_all.GRAPHS) <= set(gpu_all.PARTS) <= names

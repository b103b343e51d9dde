"""benchmarks/mesh.py: what it makes of figures, and how it goes on after what hangs or crashes."""

import json
import pathlib
import sys
import time

import pytest

from benchmarks.mesh import PARTS, Run, summary

WRITE = "import json, sys; open(sys.argv[-1], 'w').write(json.dumps({'rows': [1]}));"


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path, time.monotonic() + 60, gpus=2, demo=True)
    run.report = {name: {} for name in PARTS}
    return run


def test_summary():
    report = {
        "forwards": {
            "rows": [
                {"mesh": "single", "forward_seconds": 8.8},
                {"mesh": "cfg2", "step_seconds": 8.9},
                {"mesh": "ulysses2", "forward_seconds": 4.5, "weight_bytes": 28},
                {"mesh": "ring2", "forward_seconds": 1.0, "difference_to_first": 0.7},
                {"mesh": "tensor2", "error": "ended"},
                {"mesh": "fsdp2", "forward_seconds": 4.6, "weight_bytes": 14},
            ]
        },
        "peer": {"seconds": 5.7},
        "pipeline": {"rows": [{"mesh": "single", "forward_seconds": 4.6}, {"mesh": "pipeline2", "step_seconds": 5.0}]},
        "decode": {"single": {"rows": [{"seconds": 1.7}]}, "cfg2": {"rows": [{"seconds": 0.9}]}},
        "video": {
            "steps": 4,
            "rows": [{"name": "video, denoise", "seconds": 36.0}, {"name": "video, total", "seconds": 40.0}],
        },
    }
    assert summary(report, 2) == pytest.approx(
        {
            "two forwards on one GPU over a guided step on cfg2": 17.6 / 8.9,
            "forward on one GPU over ulysses2": 8.8 / 4.5,
            "forward on one GPU over fsdp2": 8.8 / 4.6,
            "our fastest forward over diffusers'": 4.5 / 5.7,
            "weights on a GPU, fsdp over whole": 0.5,
            "forward, fsdp over whole weights": 4.6 / 4.5,
            "throughput of pipeline2 over two GPUs": 4.6 / 5.0,
            "decode on one GPU over all": 1.7 / 0.9,
            "seconds of a guided step in a video": 9.0,
            "seconds of a video of 40 steps": 40.0 + 36 * 9.0,
        }
    )
    assert summary({"forwards": {"error": "no"}, "decode": {"error": "left out"}, "video": {"steps": 2}}, 2) == {}


def test_a_process_that_hangs_ends_with_all_that_it_started(run, tmp_path):
    pid = tmp_path / "pid"
    start = "import subprocess; child = subprocess.Popen(['sleep', '500'])"
    code = f"{WRITE} {start}; open({str(pid)!r}, 'w').write(str(child.pid)); child.wait()"
    figures = run.process("hangs", [sys.executable, "-S", "-c", code], 6)
    assert figures["error"] == "ended after 6 s"
    assert figures["rows"] == [1]  # what it wrote before
    until = time.monotonic() + 60
    while is_running(pid.read_text()):
        assert time.monotonic() < until


def is_running(pid: str) -> bool:
    """A process that was killed stays in the table, as a zombie, until init has taken its exit code."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_that_fails_says_why(run):
    figures = run.process("fails", [sys.executable, "-c", f"{WRITE} raise SystemExit('no memory')"], 60)
    assert figures["error"] == "exit code 1"
    assert "no memory" in figures["stderr"]


def test_goes_on_after_the_mesh_at_which_it_crashed(run, monkeypatch):
    asked = []

    def bench(part, size, limit, *arguments, flags=""):
        meshes = [argument.removeprefix("--mesh=") for argument in arguments if argument.startswith("--mesh=")]
        asked.append(meshes)
        done = meshes[: meshes.index("tensor2")] if "tensor2" in meshes else meshes
        return {"rows": [{"mesh": mesh, "forward_seconds": 1.0} for mesh in done], "error": "exit code 3"}

    monkeypatch.setattr(run, "bench", bench)
    run.meshes("forwards", "1280x720", 100, ["single", "tensor2", "ring2"])
    assert asked == [["single", "tensor2", "ring2"], ["ring2"]]
    rows = json.loads((run.folder / "mesh.json").read_text())["forwards"]["rows"]
    assert [row["mesh"] for row in rows] == ["single", "tensor2", "ring2"]
    assert rows[1]["error"] == "exit code 3"

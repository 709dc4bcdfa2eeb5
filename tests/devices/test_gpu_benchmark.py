"""``benchmarks/gpu.py``, run as where there is a card, but over the fakes: what breaks loses its own rows only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings: pip install 'uvas[test]'")

HERE = Path(__file__).resolve()
BENCHMARKS = HERE.parents[2] / "benchmarks"
PEER = """
import os, runpy, sys, time
sys.path[:0] = [{tests!r}, {benchmarks!r}]
import fake_cuda, fake_cupy
class Patch:
    setattr = staticmethod(setattr)
    setitem = staticmethod(lambda mapping, key, value: mapping.update({{key: value}}))
fake = fake_cuda.FakeDriver(fake_cuda.FakeCard(memory=4 << 30)).install(Patch)
fake_cupy.install(Patch, fake)
broken = {broken!r}.get(sys.argv[-1], "")
if broken == "dies":
    os.abort()
if broken == "hangs":
    fake.cuCtxSynchronize = time.sleep(1000)
runpy.run_path({benchmarks!r} + "/gpu_peer.py", run_name="__main__")
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Any:
    """The benchmark, on what a fake can bear."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu
    import harness

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "ROUND", [sys.executable, "-c", "pass"])
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick"])
    return gpu


def run(gpu, monkeypatch, tmp_path, *targets: Any, broken: dict[str, str] | None = None) -> dict[str, Any]:
    peer = tmp_path / "peer.py"
    peer.write_text(PEER.format(tests=str(HERE.parents[1]), benchmarks=str(BENCHMARKS), broken=broken or {}))
    monkeypatch.setattr(gpu, "PEER", [sys.executable, "-W", "ignore", str(peer)])
    monkeypatch.setattr(gpu, "TARGETS", targets)
    assert gpu.main() == 0
    content: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    return content


def test_every_peer_that_is_there_does_its_work(gpu, monkeypatch, tmp_path, capsys):
    mib = 1 << 20
    targets = [
        gpu.Target("G1", (2 * mib,), 1, 1),
        gpu.Target("G2", (512, 4 * mib), 3, 1),
        gpu.Target("G3", (2 * mib,), 1, 1),
        gpu.Target("G3 beside", (0, 3), 1, 1),
        gpu.Target("G4", (4 * mib,), 1, 1),
        gpu.Target("G5 walk", (100,), 1, 1),
        gpu.Target("G5 trip", (8,), 10, 1),
        gpu.Target("G5 touch", (mib,), 1, 1),
        gpu.Target("G9", (1,), 1, 1e9),
    ]
    content = run(gpu, monkeypatch, tmp_path, *targets)
    assert (content["card"], content["driver"], content["strategy"]) == ("Fake 0", 13010, "hmm")
    missing = {one.partition(":")[0] for one in content["left_out"]}
    measured = {f"{row['id']} {row['what']}" for row in content["rows"]}
    for target in targets[:-1]:
        for name in gpu.peers()[target.name]:
            id, _, part = target.name.partition(" ")
            row = f"{id} {name} {part}".rstrip()
            foreign = any(word in name for word in ("torch", "rmm", "cuda.core"))  # they know no fake
            assert row in measured or (foreign and f"{target.name} {name}" in missing), (row, content["left_out"])
    assert "G9: no time" in content["left_out"]
    assert "G6 rounds in which nothing was lost" in measured
    assert all(row["low"] <= row["ns"] <= row["high"] for row in content["rows"])
    assert "G6   2 rounds, nothing lost" in capsys.readouterr().out


def test_what_dies_or_hangs_loses_its_own_rows(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "START_S", 6.0)
    broken = {"cudaMallocManaged": "dies", "uvas hmm": "dies"}
    content = run(gpu, monkeypatch, tmp_path, gpu.Target("G5 touch", (1 << 20,), 1, 1), broken=broken)
    assert [row["what"] for row in content["rows"]] == ["rounds in which nothing was lost"]
    broken["uvas hmm"] = "hangs"  # once: nine seconds go by until it is given up and gone
    content = run(gpu, monkeypatch, tmp_path, gpu.Target("G5 walk", (100,), 1, 1), broken=broken)
    assert "G5 walk cudaMallocManaged: its process ended with -6" in content["left_out"]
    assert "G5 walk uvas hmm: no answer in 6 s" in content["left_out"]
    walked = {row["what"] for row in content["rows"] if row["id"] == "G5"}
    assert walked == {"cudaMallocHost walk", "uvas register walk", "uvas vmm, on the host walk"}


def test_more_managed_memory_than_half_of_what_is_free_is_not_asked_for(gpu, monkeypatch, tmp_path):
    content = run(gpu, monkeypatch, tmp_path, gpu.Target("G5 touch", (3 << 30,), 1, 1))
    for name in ("cudaMallocManaged", "uvas hmm"):
        (why,) = [one for one in content["left_out"] if one.startswith(f"G5 touch {name}")]
        assert "more than half of what the card has free" in why
    content = run(gpu, monkeypatch, tmp_path, gpu.Target("G4", (5 << 30,), 1, 1))
    (why,) = [one for one in content["left_out"] if one.startswith("G4 uvas hmm")]
    assert "more than half of what the card has free" in why


def test_without_a_card_it_says_what_is_missing(gpu, capsys):
    ended = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True, timeout=60, check=True
    )
    if not ended.stdout.startswith("nothing is measured: CUDA: "):
        pytest.skip("there is a card")

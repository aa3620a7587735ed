"""What a container may use, by files like those of its cgroup."""

import math
import os

from nnunet_semiseg.inference import machine


def write(root, **files):
    for name, text in files.items():
        file = root / name.replace("__", "/").replace("_DOT_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    assert machine.threads(tmp_path / "none") == 16
    assert machine.threads(write(tmp_path / "v2", cpu_DOT_max="250000 100000\n")) == 3
    assert machine.threads(write(tmp_path / "free", cpu_DOT_max="max 100000\n")) == 16
    files = {"cpu__cpu_DOT_cfs_quota_us": "50000\n", "cpu__cpu_DOT_cfs_period_us": "100000\n"}
    assert machine.threads(write(tmp_path / "v1", **files)) == 1
    files["cpu__cpu_DOT_cfs_quota_us"] = "-1\n"
    assert machine.threads(write(tmp_path / "v1free", **files)) == 16


def test_memory(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert machine.free_memory(tmp_path / "none", meminfo) == 5000 * 1024
    assert machine.free_memory(tmp_path / "none", tmp_path / "none") == math.inf
    files = {"memory_DOT_max": "3000000\n", "memory_DOT_current": "2000000\n"}
    files["memory_DOT_stat"] = "anon 7\ninactive_file 500000\n"
    assert machine.free_memory(write(tmp_path / "v2", **files), meminfo) == 1500000
    files["memory_DOT_max"] = "max\n"
    assert machine.free_memory(write(tmp_path / "free", **files), meminfo) == 5000 * 1024

"""``mgq doctor``: what is broken is a row with its mend, never a traceback."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mgq.bench import doctor
from mgq.bench.doctor import Check, Diagnosis, State, list_checks
from mgq.export.native.cpu import get_level
from mgq.runtime import engine_faults
from mgq.system.environment import cgroup_cores, cgroup_memory
from tests.conftest import Mgq


def check_called(name: str, save: Path = Path("runs")) -> Check:
    return next(check for check in list_checks(save) if check.name == name)


def test_a_healthy_machine_classifies_images(mgq: Mgq) -> None:
    said = mgq("doctor", "--json")
    body = json.loads(said.out)
    found = {finding["name"]: finding for finding in body["findings"]}
    assert said.code == 0 and body["works"] and said.err == ""
    assert found["MegEngine"]["state"] == "fine" and found["MegEngine"]["found"] == "1.13.0"
    assert "efficientnet_lite0" in found["weights"]["found"]


@pytest.mark.parametrize(
    ("code", "said"),
    [("raise ImportError('libbroken.so: no such file')", "libbroken.so"), ("import os; os.abort()", "crashes")],
)
def test_a_package_that_breaks_on_import_is_a_row_with_a_mend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, said: str
) -> None:
    (tmp_path / "openvino.py").write_text(code)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    finding = check_called("OpenVINO").run()
    assert finding.state is State.LACKING and said in finding.found and "mgq[deploy]" in finding.mend
    assert "\n" not in finding.found and "Traceback" not in finding.found


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda package: None)
    finding = check_called("ONNX Runtime").run()
    assert finding.found == "not installed" and finding.mend == "pip install 'mgq[deploy]'"


@pytest.mark.parametrize("amx", [True, False])
def test_a_version_with_a_known_fault_is_a_row_with_a_mend_where_it_shows(
    monkeypatch: pytest.MonkeyPatch, amx: bool
) -> None:
    monkeypatch.setattr(doctor, "check_package", lambda *_: "1.23.2")
    monkeypatch.setattr(engine_faults, "processor_has", lambda flag: amx)
    finding = check_called("ONNX Runtime").run()
    assert finding.state is (State.LACKING if amx else State.FINE) and finding.found.startswith("1.23.2")
    assert ("AMX" in finding.found, finding.mend) == ((True, engine_faults.MEND) if amx else (False, ""))


def test_the_native_engine_says_what_it_runs_and_where_it_keeps_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MGQ_NATIVE_CACHE", str(tmp_path))
    (tmp_path / "one.native").write_bytes(bytes(2_000_000))
    finding = check_called("native engine").run()
    assert finding.state is State.FINE
    assert f"kernels for {get_level('native').key}, " in finding.found and finding.found.endswith("2.0 MB")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("MGQ_NATIVE_CACHE", str(tmp_path / "file"))
    assert "is a file" in check_called("native engine").run().found


def test_without_a_linker_the_row_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgq.export.native.linker.link_command", lambda: None)
    finding = check_called("linker").run()
    assert finding.state is State.LACKING and "mgq[native]" in finding.mend
    monkeypatch.setattr("mgq.export.native.linker.link_command", lambda: [sys.executable, "-m", "ziglang", "cc", "-s"])
    assert check_called("linker").run().found == "ziglang cc"


def broken() -> str:
    raise ZeroDivisionError("by\nsurprise")


def test_only_what_the_main_job_needs_makes_it_fail(mgq: Mgq, monkeypatch: pytest.MonkeyPatch) -> None:
    for essential in (False, True):
        made_up = (Check("thing", broken, "mend it", essential), Check("other", lambda: "there"))
        monkeypatch.setattr(doctor, "list_checks", lambda save, made_up=made_up: made_up)
        said = mgq("doctor")
        assert said.code == int(essential) and said.err == ""
        assert "ZeroDivisionError: by\\nsurprise" in said.out and "mend: mend it" in said.out and "other" in said.out
        assert all(len(line) <= 80 for line in said.out.splitlines())


def test_folders_that_cannot_be_written_to_are_told_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = check_called("runs", tmp_path / "file" / "runs").run()
    assert finding.state is State.LACKING and "is a file" in finding.found and "--save" in finding.mend
    assert check_called("runs", tmp_path / "a" / "b").run().state is not State.BROKEN
    assert not (tmp_path / "a").exists()


def test_a_processor_without_vnni_gets_the_target_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for flags, state in (("avx avx2 fma", State.LACKING), ("avx2 avx_vnni", State.FINE)):
        (tmp_path / "cpuinfo").write_text(f"model name : Made Up\nflags : {flags}\n")
        monkeypatch.setattr("mgq.system.environment.CPU_INFO", tmp_path / "cpuinfo")
        finding = check_called("processor").run()
        assert finding.state is state and "Made Up" in finding.found
        assert ("onnx-avx2" in finding.mend) == (state is State.LACKING)


def test_limits_of_a_container_in_both_layouts(tmp_path: Path) -> None:
    assert cgroup_cores(tmp_path) is None and cgroup_memory(tmp_path) == (None, 0)
    for name, text in {
        "old/cpu/cpu.cfs_quota_us": "150000",
        "old/cpu/cpu.cfs_period_us": "100000",
        "old/memory/memory.limit_in_bytes": "1000",
        "old/memory/memory.usage_in_bytes": "400",
        "new/cpu.max": "150000 100000",
        "new/memory.max": "1000",
        "new/memory.current": "400",
        "free/cpu.max": "max 100000",
        "free/memory.max": "max",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    for layout in ("old", "new"):
        assert cgroup_cores(tmp_path / layout) == 1.5 and cgroup_memory(tmp_path / layout) == (1000, 400)
    assert cgroup_cores(tmp_path / "free") is None and cgroup_memory(tmp_path / "free") == (None, 0)


def test_nothing_found_is_nothing_broken() -> None:
    assert Diagnosis().works and Diagnosis().to_json() == {"works": True, "findings": []}

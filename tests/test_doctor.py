"The doctor tries things, and says when they do not work"
import json
import sys

import pytest

from gausssafe import doctor
from gausssafe.doctor import Check, Diagnosis, check_guard, check_memory, diagnose, format_checks, preflight, smoke_test


def test_verdict_is_the_worst():
    checks = [Check("a", "ok", ""), Check("b", "warn", "", "do b"), Check("c", "fail", "", "do c")]
    assert Diagnosis(tuple(checks)).verdict == "fail" and Diagnosis(tuple(checks)).next_command == "do c"
    assert Diagnosis(tuple(checks[:2])).verdict == "warn" and Diagnosis(tuple(checks[:1])).verdict == "ok"
    assert "FAIL  c" in format_checks(checks) and "-> do c" in format_checks(checks)


def test_a_missing_package_names_its_cure():
    check = doctor._package_check("nothing", "no-such-package-at-all", "")
    assert check.verdict == "fail" and check.cure == "pip install no-such-package-at-all"


def test_a_package_that_is_broken_fails():
    check = doctor._package_check("torch", "torch", "raise ImportError('libcudart.so: wrong version')")
    assert check.verdict == "fail" and "libcudart.so: wrong version" in check.detail


def test_a_crash_does_not_take_the_doctor_along():
    exit_code, _ = doctor._try("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert exit_code != 0
    assert diagnose((lambda: 1 / 0,)).checks[0].detail == "ZeroDivisionError: division by zero"


def test_the_guard_is_really_tried():
    check = check_guard("150MB")
    assert check.verdict == "ok" and "containment: " in check.detail and "of 150 MB" in check.detail


def test_low_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "memory_limits", lambda: {"host": 8_000_000_000, "cgroup": 900_000_000})
    assert check_memory().verdict == "warn" and "the tightest limit is cgroup: 900 MB" in check_memory().detail


def test_smoke_is_smallest_first_and_says_where_it_stops():
    diagnosis = diagnose((check_memory,))
    record = smoke_test("1GB", sizes=((4, 2), (8, 3)))
    assert record.status == "ok" and [c.verdict for c in preflight(diagnosis, record, ((4, 2), (8, 3)))][-2:] == ["ok", "ok"]
    tight = smoke_test("120MB", sizes=((4, 2), (8, 3)))
    listed = preflight(diagnosis, tight, ((4, 2), (8, 3)))
    assert tight.status == "oom_ram" and [c.verdict for c in listed[-2:]] == ["fail", "fail"] and "not reached" in listed[-1].detail


def test_json_is_whole():
    report = json.loads(diagnose((doctor.check_platform,)).to_json())
    assert report["checks"][0]["detail"].count(f"Python {sys.version_info.major}") == 1 and report["next_command"].startswith("gausssafe run")


@pytest.mark.gpu
def test_cuda_is_tried(): assert doctor.check_cuda().detail.startswith("found ")

"""How far a run overshoots its limit, what watching costs, and whether anything survives a killed runner.

    python benchmarks/guard.py [--tries 20] [--orphans 50] [--quick] [--out benchmarks/results/guard.json]

Overshoot is read three times: from our record, from the operating system's high-water mark of the reaped processes (ru_maxrss), and, where
this user may make a control group, from that group's own maximum. The rival is what people write by hand: psutil, asked every half second.
"""
import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from gausssafe.guard import GuardSpec, guard_command

LIMIT = 10**9
ONE_BLOCK = "b'x' * 4_000_000_000"
IN_PIECES = "kept = []\nwhile len(kept) < 400: kept.append(b'x' * 10_000_000)"
EIGHT = ("import subprocess, sys\n"
         f"for child in [subprocess.Popen([sys.executable, '-c', {IN_PIECES!r}]) for _ in range(8)]: child.wait()")
BUSY = """
import os, time
end = time.monotonic() + 10
while time.monotonic() < end: block = b"x" * 400_000_000; sum(range(300_000)); del block
"""
FAMILY = """
import os, subprocess, sys, time
subprocess.Popen(["sleep", "300"])
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(300)
    os._exit(0)
os.wait()
while True: time.sleep(0.01)
"""
RUNNER = """
import os, subprocess, sys
from gausssafe.guard import GuardSpec, guard_command
spec = GuardSpec(sys.argv[1], runner_pid=os.getpid())
subprocess.Popen([*guard_command(spec), sys.executable, "-c", sys.argv[2]], stdin=subprocess.PIPE).wait()
"""


@contextmanager
def busy_cores(wanted):
    "Every core has something better to do"
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() if wanted else 0)]
    try: yield
    finally:
        for process in burners: process.kill(); process.wait()


@contextmanager
def accounting_group():
    "A control group (v1) whose maximum nobody but the operating system writes; None where we may not make one"
    own = [line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line]
    group = Path(f"/sys/fs/cgroup/memory{own[0] if own else ''}/gausssafe-bench-{uuid.uuid4().hex}")
    try: group.mkdir()
    except OSError: group = None
    try: yield group
    finally:
        if group: group.rmdir()


def guarded(code, *, group=None, prefix=(), **limits):
    "Run code under a guard: its status, and the high-water mark the operating system kept of the reaped"
    with TemporaryDirectory() as folder:
        spec = GuardSpec("bench", status_path=f"{folder}/status.json", runner_pid=os.getpid(), **limits)
        enter = ["sh", "-c", f"echo $$ > {group}/cgroup.procs; exec \"$@\"", "sh"] if group else []
        process = subprocess.Popen([*prefix, *guard_command(spec), *enter, sys.executable, "-c", code], stdin=subprocess.PIPE)
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
        process.stdin.close()
        return json.loads(Path(spec.status_path).read_text()), usage.ru_maxrss * 1024


def overshoot(code, tries, *, busy=False, prefix=()):
    "Percent above the limit: worst and median of each reading"
    readings = {"record": [], "high-water mark": [], "control group": []}
    with busy_cores(busy):
        for _ in range(tries):
            with accounting_group() as group:
                status, high_water = guarded(code, group=group, limit_bytes=LIMIT, prefix=prefix)
                assert status["reason"] == "memory", status
                readings["record"].append(status["peak_bytes"])
                if status["leaked"] == []: readings["high-water mark"].append(max(high_water, status["kernel_hwm_bytes"]))
                if group: readings["control group"].append(int((group / "memory.max_usage_in_bytes").read_text()))
    return {name: summary([100 * (n / LIMIT - 1) for n in values]) for name, values in readings.items() if values}


def summary(values): return {"worst": round(max(values), 2), "median": round(statistics.median(values), 2), "n": len(values)}


def psutil_overshoot(code, tries, every_s):
    "The loop people write by hand"
    found = []
    for _ in range(tries):
        process = psutil.Popen([sys.executable, "-c", code])
        while process.memory_info().rss < LIMIT and process.status() != "zombie": time.sleep(every_s)
        process.kill()
        _, _, usage = os.wait4(process.pid, 0)
        found.append(100 * (usage.ru_maxrss * 1024 / LIMIT - 1))
    return {"high-water mark": summary(found)}


def cpu_cost(code, **limits):
    "Percent of a core that the guard uses beyond its start"
    start_s = min(guarded("pass")[0]["guard_cpu_s"] for _ in range(3))
    status, _ = guarded(code, **limits)
    return {"percent of a core": round(100 * (status["guard_cpu_s"] - start_s) / status["seconds"], 3), "seconds": status["seconds"],
            "start, CPU ms": round(1e3 * start_s, 1)}


def survivors(run_id):
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("GAUSSSAFE_RUN") == run_id or any(run_id in part for part in process.cmdline())
            if ours and process.status() != "zombie": found.append(process)
    return found


def orphans(trials):
    "Kill -9 of the runner at random moments of its first second and a half; survivors a second later"
    left, seconds, complete = 0, [], 0
    for _ in range(trials):
        run_id = uuid.uuid4().hex
        runner = subprocess.Popen([sys.executable, "-c", RUNNER, run_id, FAMILY])
        time.sleep(random.uniform(0.02, 1.5))
        complete += len(survivors(run_id)) >= 4
        runner.kill()
        began = time.monotonic()
        runner.wait()
        while (there := survivors(run_id)) and time.monotonic() < began + 1: time.sleep(0.005)
        left += len(there)
        seconds.append(time.monotonic() - began)
    return {"survivors": left, "trials": trials, "whole family there": complete,
            "worst s": round(max(seconds), 3), "median s": round(statistics.median(seconds), 3)}


def measure(tries, trials):
    yield "4 GB in one block under 1 GB, %", overshoot(ONE_BLOCK, tries)
    yield "4 GB in pieces of 10 MB, %", overshoot(IN_PIECES, tries)
    yield "one block, every core busy, %", overshoot(ONE_BLOCK, tries, busy=True)
    if os.geteuid() == 0:
        unprivileged = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
        yield "one block, cores busy, no privileges, %", overshoot(ONE_BLOCK, tries, busy=True, prefix=unprivileged)
    yield "8 children of 4 GB, %", overshoot(EIGHT, tries)
    yield "rival: psutil every 0.5 s, one block, %", psutil_overshoot(ONE_BLOCK, max(1, tries // 4), 0.5)
    yield "rival: psutil every 0.1 s, one block, %", psutil_overshoot(ONE_BLOCK, max(1, tries // 4), 0.1)
    yield "cost, idle 10 s", cpu_cost("import time; time.sleep(10)", limit_bytes=LIMIT)
    yield "cost, busy 10 s at up to half the limit", cpu_cost(BUSY, limit_bytes=LIMIT)
    yield "kill -9 of the runner", orphans(trials)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--orphans", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="2 tries, 5 trials")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "guard.json")
    options = parser.parse_args()
    tries, trials = (2, 5) if options.quick else (options.tries, options.orphans)
    results = {"machine": {"system": platform.platform(), "python": platform.python_version(), "n_cores": os.cpu_count(),
                           "memory_bytes": psutil.virtual_memory().total, "load": os.getloadavg()[0]}}
    for name, row in measure(tries, trials):
        results[name] = row
        print(f"{name:42s} " + "   ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()

"Batches: what the settings say, what is on disk after a kill, what is never run twice"
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gausssafe.batch import _Admission, _again, _replay, _row, _State, run_batch
from gausssafe.errors import DiskFull, InvalidInput
from gausssafe.journal import Journal, read_journal
from gausssafe.report import write_report
from gausssafe.settings import BatchSpec, Mutation, expand

COMMAND = Path(sys.executable).parent / "gausssafe"


@pytest.fixture
def notebook(tmp_path):
    def notebook(*sources, name="in", parameters="size, seconds = 1, 0.0"):
        cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(nbformat.v4.new_code_cell, sources)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}),
                       tmp_path / f"{name}.ipynb")
        return str(tmp_path / f"{name}.ipynb")
    return notebook


WORK = "import time\nblock = bytearray(int(size * 1_000_000))\ntime.sleep(seconds)"


class Told:
    "An executor that answers at once, as it is told"

    def __init__(self, answer): self.answer, self.tasks = answer, []

    def submit(self, _, task):
        self.tasks.append(task)
        future = Future()
        found = self.answer(task, len(self.tasks))
        if isinstance(found, Exception): future.set_exception(found)
        else: future.set_result({"peak_bytes": 10**8, "seconds": 1.0, "energy_source": "none"} | found)
        return future


def spec_of(path, **options):
    experiment = {"notebook": path, "grid": {"size": [1, 2, 3]}} | options.pop("experiment", {})
    return BatchSpec(**{"name": "sweep", "memory_limit": "200MB", "experiments": [experiment]} | options)


def batch(spec, tmp_path, answer, **options):
    told = Told(answer)
    return run_batch(spec, tmp_path / "results", told, memory="1GB", **options), told.tasks


# Settings

@pytest.mark.parametrize("change, text", [
    ({"naem": 1}, "naem: Extra inputs are not permitted"), ({"experiments": []}, "experiments: List should have at least 1 item"),
    ({"memory_limit": "lots"}, "memory_limit: "), ({"stages": [["nobody"]]}, "stages: no experiment is called 'nobody'"),
    ({"name": "a/b"}, "'a/b': letters, digits"),
])
def test_a_wrong_settings_file_is_told_with_its_place(notebook, tmp_path, change, text):
    page = {"name": "x", "experiments": [{"notebook": notebook()}]} | change
    (tmp_path / "s.json").write_text(json.dumps(page))
    with pytest.raises(InvalidInput) as refused: BatchSpec.from_file(tmp_path / "s.json")
    assert str(refused.value).startswith(f"{tmp_path}/s.json: ") and text in str(refused.value)


def test_a_torn_page_and_yaml_that_builds_objects(tmp_path):
    (tmp_path / "s.json").write_text('{"name": "x",\n "experiments": [}')
    with pytest.raises(InvalidInput, match=r"s.json, line 2: "): BatchSpec.from_file(tmp_path / "s.json")
    (tmp_path / "s.yaml").write_text("name: !!python/object/apply:os.system [touch hacked]")
    with pytest.raises(InvalidInput, match=r"s.yaml, line 1: could not determine a constructor"): BatchSpec.from_file(tmp_path / "s.yaml")
    assert not (tmp_path / "hacked").exists()


KINDS = [{"uniform": [0, 1]}, {"loguniform": [1e-4, 1]}, {"randint": [0, 9]}, {"choice": [1, "a"]}]


@given(st.integers(1, 6), st.integers(0, 5), st.sampled_from(KINDS))
def test_more_draws_leave_the_first_ones_as_they_were(n, more, kind):
    few, many = Mutation(n=n, **kind).draw((1, 2)), Mutation(n=n + more, **kind).draw((1, 2))
    assert many[:n] == few


def test_the_example_of_the_manual_has_twelve_runs(notebook):
    page = {"name": "noise-sweep", "runs_per_config": 2, "experiments": [{
        "notebook": notebook(), "grid": {"size": [1, 2]}, "mutate": {"seconds": {"loguniform": [1e-4, 1e-2], "n": 3}}}]}
    runs = expand(BatchSpec.model_validate(page))
    assert len(runs) == 12 == len({run.key for run in runs}) and [r.key for r in runs] == [r.key for r in expand(BatchSpec.model_validate(page))]


def test_an_explosion_asks_first(notebook):
    spec = spec_of(notebook(), runs_per_config=4000)
    with pytest.raises(InvalidInput, match="sweep has 12,000 runs, more than 10,000"): expand(spec)
    assert len(expand(spec, allow_many=True)) == 12_000


def test_the_shipped_settings_are_ten_runs_in_five_stages(monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    runs = expand(BatchSpec.from_file("nbs/experiments/alternating.json"))
    assert [(r.experiment, r.stage) for r in runs[::2]] == [("a-first", 0), ("b", 1), ("a-again", 2), ("c", 3), ("a-last", 4)] and len(runs) == 10


# Bookkeeping, with an executor that answers at once

def test_failures_are_tried_again_and_lost_runs_do_not_count(notebook, tmp_path):
    def answer(task, n): return {1: {"status": "lost", "error": "signal 9"}, 2: {"status": "error", "error": "ValueError"}}.get(n, {"status": "ok"})
    result, tasks = batch(spec_of(notebook(), experiment={"grid": {"size": [1]}}, max_retries=1), tmp_path, answer)
    row, = result.rows
    assert (row["status"], row["attempts"], row["run_lost"], len(tasks), result.exit_code) == ("ok", 2, 1, 3, 0)
    assert [task["name"] for task in tasks] == ["attempt-1", "attempt-2", "attempt-3"]


def test_a_run_is_told_its_own_folder(notebook, tmp_path):
    spec = spec_of(notebook("where = ''"), experiment={"grid": {"size": ["{run_folder}/a.csv"]}})
    result, (task,) = batch(spec, tmp_path, lambda *_: {"status": "ok"})
    assert task["parameters"]["size"] == f"{task['folder']}/a.csv" and task["folder"].startswith(str(result.folder))


def test_a_notebook_with_an_out_dir_gets_its_own_folder(notebook, tmp_path):
    path, seen = notebook(parameters="size, out_dir = 1, 'results'"), []
    for own in ({}, {"out_dir": "here"}):
        _, (task,) = batch(spec_of(path, experiment={"grid": {"size": [1]}, "parameters": own}), tmp_path, lambda *_: {"status": "ok"})
        seen.append(task["parameters"]["out_dir"])
    assert seen[1] == "here" and Path(seen[0]).parent.parent == tmp_path / "results"


def test_an_executor_that_loses_its_worker(notebook, tmp_path):
    result, tasks = batch(spec_of(notebook(), experiment={"grid": {"size": [1]}}), tmp_path, lambda *_: RuntimeError("worker died"))
    assert result.rows[0]["status"] == "lost" and result.rows[0]["run_error"] == "RuntimeError: worker died" and len(tasks) == 6
    assert result.exit_code == 1 and "1 lost" in str(result)


def test_out_of_memory_is_tried_smaller_and_called_so(notebook, tmp_path):
    spec = spec_of(notebook(), experiment={"grid": {"size": [8]}, "max_retries": 2, "downscale": {"parameter": "size", "memory_factor": 1.5}})
    result, tasks = batch(spec, tmp_path, lambda task, _: {"status": "ok" if task["parameters"]["size"] <= 2 else "oom_ram"})
    assert [(t["parameters"]["size"], t["memory_limit"]) for t in tasks] == [(8, 200 * 10**6), (4, 300 * 10**6), (2, 450 * 10**6)]
    assert result.rows[0]["status"] == "ok_downscaled" and result.rows[0]["training_success"] and result.rows[0]["size"] == 2


def test_a_finished_batch_is_told_again_and_new_starts_afresh(notebook, tmp_path):
    spec = spec_of(notebook())
    first, tasks = batch(spec, tmp_path, lambda *_: {"status": "ok"})
    again, none = batch(spec, tmp_path, lambda *_: {"status": "ok"})
    fresh, anew = batch(spec, tmp_path, lambda *_: {"status": "ok"}, resume=False)
    assert (len(tasks), len(none), len(anew)) == (3, 0, 3) and again.rows == first.rows and again.folder == first.folder != fresh.folder
    table = pd.read_csv(first.folder / "summary.csv")
    assert list(table.columns[:4]) == ["size", "training_success", "status", "attempts"] and len(table) == 3


def test_configurations_are_shared_between_batches_but_failures_are_not(notebook, tmp_path):
    path = notebook()
    batch(spec_of(path), tmp_path, lambda task, _: {"status": "ok" if task["parameters"]["size"] < 3 else "error"})
    result, tasks = batch(spec_of(path, name="other"), tmp_path, lambda *_: {"status": "ok"})
    assert [t["parameters"]["size"] for t in tasks] == [3] and sorted(row["status"] for row in result.rows) == ["ok", "skipped", "skipped"]


def test_stages_wait_for_each_other(notebook, tmp_path):
    experiments = [{"notebook": notebook(), "name": name, "grid": {"size": [1, 2]}} for name in ("late", "early")]
    spec = BatchSpec(name="x", experiments=experiments, stages=[["early"], ["late"]], memory_limit="100MB")
    _, tasks = batch(spec, tmp_path, lambda *_: {"status": "ok"}, jobs=8)
    assert [Path(t["folder"]).name.split("-")[0] for t in tasks] == ["early", "early", "late", "late"]


def test_learned_peaks_let_more_runs_in(notebook):
    run = expand(spec_of(notebook()))[0]
    admission = _Admission(10**9)
    assert admission.predict(run) == (200 * 10**6, 0)
    for peak in (30, 40): admission.learn(run, {"status": "ok", "run_peak_bytes": peak * 10**6, "run_device_bytes": None})
    assert admission.predict(run) == (50 * 10**6, 0) and admission.admits(run, [(940 * 10**6, 0)]) and not admission.admits(run, [(960 * 10**6, 0)])
    admission.learn(run, {"status": "ok", "run_peak_bytes": 90 * 10**6, "run_device_bytes": None})  # They differ too much to be believed
    assert admission.predict(run) == (200 * 10**6, 0)


def test_a_graphics_card_is_shared_by_what_is_declared_and_learned(notebook, monkeypatch):
    free = [10 * 10**9]
    monkeypatch.setattr("gausssafe.batch.device_left_bytes", lambda: free[0])
    run = expand(spec_of(notebook(), experiment={"device_memory": "4GB"}))[0]
    admission = _Admission(10**9, free[0])
    assert admission.predict(run)[1] == 4 * 10**9
    assert admission.admits(run, [(10**6, 6 * 10**9)]) and not admission.admits(run, [(10**6, 7 * 10**9)])
    admission.learn(run, {"status": "ok", "run_peak_bytes": 10**6, "run_device_bytes": 6 * 10**9})
    assert admission.predict(run)[1] == 7.5 * 10**9 and not admission.admits(run, [(10**6, 3 * 10**9)])
    free[0] = 10**9  # Somebody else took the card
    assert not admission.admits(run, [(10**6, 0)]) and admission.admits(run, [])  # When nothing runs, waiting would be for ever
    assert _Admission(10**9, None).admits(run, [(10**6, 0)])


def test_more_of_the_card_than_there_is_is_refused(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr("gausssafe.batch.device_left_bytes", lambda: 10**9)
    with pytest.raises(InvalidInput, match="in asks for 4.00 GB of the graphics card, and 1.00 GB are free"):
        batch(spec_of(notebook(), experiment={"device_memory": "4GB"}), tmp_path, lambda *_: {"status": "ok"})


def test_the_published_schema_is_that_of_the_code():
    assert json.loads((Path(__file__).parent.parent / "nbs/batch.schema.json").read_text()) == json.loads(BatchSpec.schema_json())


def test_a_run_too_large_for_the_batch_is_refused_before_anything_starts(notebook, tmp_path):
    with pytest.raises(InvalidInput, match=r"in asks for 2.00 GB .* the batch has 1.00 GB"):
        batch(spec_of(notebook(), memory_limit="2GB"), tmp_path, lambda *_: {"status": "ok"})
    assert not (tmp_path / "results").exists()


def test_two_batches_do_not_share_a_folder(notebook, tmp_path):
    spec = spec_of(notebook())
    result, _ = batch(spec, tmp_path, lambda *_: {"status": "ok"})
    with Journal(result.folder / "journal.jsonl"), pytest.raises(InvalidInput, match="another batch is at work in"):
        batch(spec, tmp_path, lambda *_: {"status": "ok"})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["start", "ok", "error", "lost"])), max_size=12), st.integers(0, 40))
def test_a_journal_cut_anywhere_says_what_is_left(tmp_path_factory, events, cut):
    "Replaying a prefix, however torn, gives a state that the longer journal passes through"
    folder = tmp_path_factory.mktemp("journal")
    code = nbformat.v4.new_code_cell("size = 1", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[code]), folder / "in.ipynb")
    runs = expand(spec_of(str(folder / "in.ipynb"), max_retries=1))
    live = {run.key: _State(run) for run in runs}
    with Journal(folder / "j.jsonl") as journal:
        for i, status in events:
            state = live[runs[i].key]
            if state.row is not None: continue
            if status == "start": journal.append(event="start", key=state.run.key); continue
            state.attempts, state.lost = state.attempts + (status != "lost"), state.lost + (status == "lost")
            row = _row(state, {"status": status}, folder)
            again = _again(state, row)
            journal.append(event="end", key=state.run.key, attempts=state.attempts, lost=state.lost, row=row, again=again, scaled=False)
            if again is None: state.row = row
    found = _replay(runs, read_journal(folder / "j.jsonl"))
    def about(state): return (state.attempts, 0, None) if state.row and state.row["status"] == "lost" else (
        state.attempts, state.lost, state.row and state.row["status"])
    assert {k: about(s) for k, s in found.items()} == {k: about(s) for k, s in live.items()}
    whole = (folder / "j.jsonl").read_bytes()
    (folder / "j.jsonl").write_bytes(whole[:max(0, len(whole) - cut)])
    kept = read_journal(folder / "j.jsonl")
    assert kept == read_journal(folder / "j.jsonl")[:len(kept)]
    with Journal(folder / "j.jsonl") as journal: journal.append(event="start", key="x")
    assert read_journal(folder / "j.jsonl") == [*kept, {"event": "start", "key": "x"}]


# Disks

def test_a_results_folder_that_cannot_be_written(notebook, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cannot write .*file/results: Not a directory"):
        run_batch(spec_of(notebook()), tmp_path / "file/results", memory="1GB")
    result, _ = batch(spec_of(notebook()), tmp_path, lambda *_: {"status": "ok"})
    (result.folder / "journal.jsonl").unlink()
    (result.folder / "journal.jsonl").mkdir()
    with pytest.raises(InvalidInput, match="cannot write .*journal.jsonl: Is a directory"):
        batch(spec_of(notebook()), tmp_path, lambda *_: {"status": "ok"})


@pytest.mark.parametrize("n_good", range(1, 9))
def test_a_disk_that_fills_up_stops_the_batch_and_loses_nothing(notebook, tmp_path, monkeypatch, n_good):
    "The n-th write finds no room; when there is room again, the same call goes on"
    spec, really, left = spec_of(notebook()), os.fsync, [n_good]

    def fsync(fd):
        left[0] -= 1
        if left[0] < 0: raise OSError(errno.ENOSPC, "No space left on device")
        really(fd)
    monkeypatch.setattr(os, "fsync", fsync)
    done = []
    def answer(task, _): done.append(task["parameters"]["size"]); return {"status": "ok"}
    with pytest.raises(DiskFull, match="Nothing that was saved is lost"): batch(spec, tmp_path, answer)
    left[0] = 10**6
    result, _ = batch(spec, tmp_path, answer)
    assert sorted(row["size"] for row in result.rows) == [1, 2, 3] and result.exit_code == 0
    ends = [e["key"] for e in read_journal(result.folder / "journal.jsonl") if e["event"] == "end"]
    assert len(ends) == len(set(ends)) == 3 and len(done) <= 5  # One that ended unwritten, and one that had begun beside it, are run again


# For real

def interrupt(process, times):
    for _ in range(times):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.5)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_finishes_what_runs_and_twice_stops_it(notebook, tmp_path, times):
    page = {"name": "long", "memory_limit": "300MB", "experiments": [{
        "notebook": notebook(f"open({str(tmp_path / 'started')!r}, 'a').close()", WORK), "grid": {"size": [1, 2, 3]}, "parameters": {"seconds": 3}}]}
    (tmp_path / "s.json").write_text(json.dumps(page))
    command = [COMMAND, "batch", tmp_path / "s.json", "--results", tmp_path / "results", "--memory", "400MB", "-q", "--warm", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline: time.sleep(0.05)
    interrupt(process, times)
    told, warned = process.communicate(timeout=60)
    assert process.returncode == 130 and "finishing what runs; Ctrl-C again stops it" in warned
    assert ("1 of 3 runs: 1 ok, 2 not run" if times == 1 else "0 of 3 runs: 3 not run") in told
    assert not alive(str(tmp_path))


def alive(marker): return [p.pid for p in psutil.process_iter(["cmdline"]) if marker in " ".join(p.info["cmdline"] or [])]


def test_outcomes_of_real_runs_and_the_report(notebook, tmp_path):
    good, bad = notebook(WORK), notebook("1 / 0", name="bad")
    spec = BatchSpec(name="real", memory_limit="300MB", timeout="60s", experiments=[
        {"notebook": good, "name": "good", "background": {"notebook": notebook("while True: pass", name="load"), "memory_limit": "200MB"}},
        {"notebook": good, "name": "greedy", "parameters": {"size": 3000}, "expect": "oom_ram"}, {"notebook": bad}])
    result = run_batch(spec, tmp_path / "results", jobs=2, memory="1GB")
    assert {row["run_experiment"]: row["status"] for row in result.rows} == {"good": "ok", "greedy": "oom_ram", "bad": "error"}
    cells = {row["run_experiment"]: row["run_cell"] for row in result.rows}  # as saved, after the two cells that papermill inserts
    assert result.exit_code == 1 and cells == {"good": None, "greedy": 4, "bad": 3}
    page = write_report(result.folder).read_text()
    assert "1 of 3 runs did not end as they were meant to." in page and "ZeroDivisionError" in page and 'href="../run_' in page
    assert not alive(str(tmp_path))


def test_joules_are_named_after_their_source(notebook, tmp_path):
    "A machine without a counter, and a user who knows what its cores draw"
    row, = run_batch(spec_of(notebook(), experiment={"grid": {"size": [1]}}, watts_per_core=4), tmp_path / "results", memory="1GB").rows
    assert row["run_energy_source"] in ("nvml_counter", "nvml_power", "rapl", "model") and row["run_joules"] > 0
    if row["run_energy_source"] == "model": assert row["run_joules"] > 4 * 0.2  # a kernel that starts and imports


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_batch_that_is_killed_goes_on_where_it_was(notebook, tmp_path):
    experiment = {"notebook": notebook(WORK), "grid": {"size": [1, 2, 3]}, "parameters": {"seconds": 2}}
    page = {"name": "killed", "memory_limit": "300MB", "experiments": [experiment]}
    (tmp_path / "s.json").write_text(json.dumps(page))
    command = [COMMAND, "batch", tmp_path / "s.json", "--results", tmp_path / "results", "--memory", "1GB", "-q"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    def ends(): return [e for p in tmp_path.glob("results/*/journal.jsonl") for e in read_journal(p) if e["event"] == "end"]
    while not ends() and time.monotonic() < deadline: time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while alive(str(tmp_path)) and time.monotonic() < deadline + 20: time.sleep(0.1)
    assert ends() and not alive(str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True)
    folder, = (tmp_path / "results").iterdir()
    table = pd.read_csv(folder / "summary.csv")
    assert done.returncode == 0 and sorted(table["size"]) == [1, 2, 3] and set(table["status"]) == {"ok"} and set(table["attempts"]) == {1}
    assert "3 of 3 runs: 3 ok" in done.stdout and (folder / "report.html").exists()
    again = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert again.returncode == 0 and len(json.loads(again.stdout)) == 3


def test_two_batches_and_a_cleaner_leave_each_other_alone(notebook, tmp_path):
    batches = []
    for name in ("one", "two"):
        path = notebook(f"open({str(tmp_path / name)!r}, 'a').close()", WORK, name=name)
        page = {"name": name, "memory_limit": "200MB", "experiments": [{"notebook": path, "grid": {"size": [1, 2]}, "parameters": {"seconds": 2}}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(page))
        command = [COMMAND, "batch", tmp_path / f"{name}.json", "--results", tmp_path / "results", "--memory", "500MB", "-q", "--warm", "json"]
        batches.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    deadline = time.monotonic() + 60
    while not ((tmp_path / "one").exists() and (tmp_path / "two").exists()) and time.monotonic() < deadline: time.sleep(0.05)
    cleaned = subprocess.run([COMMAND, "clean", "--processes", "--shm", "--yes"], capture_output=True, text=True)
    assert "no processes left behind" in cleaned.stdout
    for process in batches: assert "2 of 2 runs: 2 ok" in process.communicate(timeout=60)[0] and process.returncode == 0
    assert len(list(tmp_path.glob("results/run_*"))) == 2


@pytest.fixture
def no_helpers_left():
    "Dask starts multiprocessing's helpers, which would live on below this process, and be measured with it"
    yield
    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()


def test_a_cluster_that_loses_a_worker(notebook, tmp_path, no_helpers_left):
    "Dask: a worker is killed in the middle of a run; another one takes the run over, and nothing is left behind"
    distributed = pytest.importorskip("distributed")
    options = dict(n_workers=2, threads_per_worker=1, memory_limit=0, dashboard_address=None)
    with distributed.LocalCluster(**options) as cluster, cluster.get_client() as client:
        started = tmp_path / "started"
        path = notebook(f"from pathlib import Path\nPath({str(started)!r}).touch()", WORK)
        spec = spec_of(path, experiment={"grid": {"size": [1, 2]}, "parameters": {"seconds": 2}})
        victim = min(client.run(os.getpid).values())

        def shoot():
            while not started.exists(): time.sleep(0.05)
            os.kill(victim, signal.SIGKILL)
        shooter = threading.Thread(target=shoot, daemon=True)
        shooter.start()
        result = run_batch(spec, tmp_path / "results", client.get_executor(), memory="1GB")
        shooter.join()
        assert [row["status"] for row in result.rows] == ["ok", "ok"] and victim not in client.run(os.getpid).values()
    deadline = time.monotonic() + 20
    while alive(str(tmp_path)) and time.monotonic() < deadline: time.sleep(0.1)
    assert not alive(str(tmp_path))


@pytest.mark.parametrize("arguments, text", [
    (["gone.json"], "no such settings file: gone.json"), (["{s}", "--jobs", "0"], "jobs is at least 1, not 0")])
def test_one_line_for_a_mistake(notebook, tmp_path, arguments, text):
    (tmp_path / "s.json").write_text(json.dumps({"name": "x", "experiments": [{"notebook": notebook()}]}))
    done = subprocess.run([COMMAND, "batch", *(a.format(s=tmp_path / "s.json") for a in arguments)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == f"gausssafe: {text}\n"
    assert not list(tmp_path.glob("results/run_*"))

"Runs are written down whatever happens to the process or the server, and what a server missed is sent later"
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gausssafe import tracking
from gausssafe.cli import main
from gausssafe.errors import InvalidInput
from gausssafe.tracking import JOURNAL, Journal, Tracker, read_journal, status_of, sync, upload


class Server:
    "Takes what MLflow's client would send; breaks down at the calls it is told"
    def __init__(self, *failures): self.numbers, self.params, self.files, self.status, self.n_calls, self.failures = [], {}, [], None, 0, failures
    def _call(self):
        self.n_calls += 1
        if self.n_calls in self.failures: raise ConnectionError("gone")
    def get_experiment_by_name(self, name): return None
    def create_experiment(self, name, **_): return "7"
    def create_run(self, *_, **named): self.name = named["run_name"]; return SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    def log_artifact(self, run_id, path): self._call(); self.files.append(os.path.basename(path))
    def update_run(self, run_id, status): self.status = status
    def set_terminated(self, run_id, status, t_ms): self._call(); self.status = status
    def log_batch(self, run_id, metrics=(), params=()):
        self._call()
        self.numbers += [(m.key, m.step, m.value) for m in metrics]
        self.params |= {p.key: p.value for p in params}


@pytest.fixture(autouse=True)
def entities(monkeypatch):
    plain = SimpleNamespace(Metric=lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step),
                            Param=lambda key, value: SimpleNamespace(key=key, value=value))
    monkeypatch.setattr(tracking, "_entities", lambda: plain)


def written(folder, n=5):
    with Journal(folder, run="mine", uri="http://stand-in") as journal:
        journal.log_params({"seed": 41, "hidden": (256, 256), "out": None})
        for epoch in range(1, n + 1): journal.log_row({"epoch": epoch, "mmd": 1 / epoch, "kl": math.nan, "note": "x"})
        (folder / "a.npz").write_bytes(b"x")
        journal.log_file(folder / "a.npz")
    return folder


def test_everything_arrives(tmp_path):
    server = Server()
    assert upload(written(tmp_path), client=server) == 9
    assert server.name == "mine" and server.params == {"seed": "41", "hidden": "(256, 256)", "out": "None"} and server.files == ["a.npz"]
    assert server.numbers == [("mmd", e, 1 / e) for e in range(1, 6)] and server.status == "FINISHED" and upload(tmp_path, client=server) == 0


@pytest.mark.parametrize("failing", range(1, 12))
def test_a_server_that_breaks_down_misses_nothing_in_the_end(tmp_path, failing):
    server = Server(failing)
    written(tmp_path)
    for _ in range(2):
        try: upload(tmp_path, client=server, n_batch=2)
        except ConnectionError: assert status_of(tmp_path).n_left > 0
    assert set(server.numbers) == {("mmd", e, 1 / e) for e in range(1, 6)} and server.status == "FINISHED" and status_of(tmp_path).n_left == 0


def test_a_line_cut_short_spoils_no_other(tmp_path):
    written(tmp_path)
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read_journal(tmp_path)) == 8
    with Journal(tmp_path, uri="http://stand-in") as again: again.log_row({"epoch": 6, "mmd": 0.5})
    kinds = [record["kind"] for record, _ in read_journal(tmp_path)]
    assert kinds[-4:] == ["unreadable", "go_on", "metrics", "end"]
    server = Server()
    upload(tmp_path, client=server)
    assert ("mmd", 6, 0.5) in server.numbers and server.status == "FINISHED"


def test_a_killed_process_has_written_all_its_rows(tmp_path):
    code = ("import os, signal, sys; from gausssafe.tracking import Journal\njournal = Journal(sys.argv[1])\n"
            "for epoch in range(200): journal.log_row({'epoch': epoch, 'x': 1.0})\nos.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == -signal.SIGKILL
    assert [record["step"] for record, _ in read_journal(tmp_path)[1:]] == list(range(200))


def test_numbers_of_every_kind_and_only_valid_json(tmp_path):
    row = {"epoch": np.int64(3), "a": np.float32(1.5), "b": torch.tensor(2.0), "c": np.int64(4), "d": True, "e": torch.tensor(5, requires_grad=False),
           "f": np.array(6.0), "g": torch.tensor(7.0, requires_grad=True), "h": np.bool_(True)}
    left_out = {"inf": math.inf, "nan": np.float32("nan"), "minus": torch.tensor(-math.inf), "text": "1.5", "none": None, "many": torch.ones(3),
                "one": np.ones(1), "list": [1], "complex": 1j, "huge": 10**400}
    with Journal(tmp_path) as journal: journal.log_row(row | left_out)
    def refuse(name): raise AssertionError(f"{name} is not JSON")
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    assert lines[1]["values"] == {"a": 1.5, "b": 2, "c": 4, "d": 1, "e": 5, "f": 6, "g": 7, "h": 1} and lines[1]["step"] == 3


def test_an_exception_is_a_failure(tmp_path):
    with pytest.raises(ZeroDivisionError), Journal(tmp_path): 1 / 0  # noqa: B018
    assert read_journal(tmp_path)[-1][0]["status"] == "FAILED"


@pytest.mark.parametrize("uri", ["mlflow.db", "ftp://host", "", 7, "sqlite:mlflow.db"])
def test_addresses_that_cannot_be(tmp_path, uri):
    with pytest.raises(InvalidInput, match="uri is a database such as 'sqlite:///mlflow.db' or"): Tracker(tmp_path / "new", uri=uri)
    assert not (tmp_path / "new").exists()


def test_without_mlflow_the_journal_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="mlflow is not installed, so the run is kept in .*gausssafe track sync"): tracker = Tracker(tmp_path)
    with tracker: tracker.log_row({"epoch": 1, "x": 2.0})
    assert len(read_journal(tmp_path)) == 3
    done = CliRunner().invoke(main, ["track", "sync", str(tmp_path)])
    assert done.exit_code == 2 and "mlflow is not installed: pip install 'gausssafe[tracking]'" in done.output


def test_sync_from_the_command_line(tmp_path, monkeypatch):
    written(tmp_path / "a"), written(tmp_path / "deep/b"), Journal(tmp_path / "nowhere").close()
    server = Server()
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(tracking, "_connect", lambda uri: server)
    done = CliRunner().invoke(main, ["track", "sync", str(tmp_path)])
    assert done.exit_code == 1 and "a: 9 of 9 records uploaded\n" in done.output
    assert "nowhere: 0 of 2 records uploaded (no uri: give one)" in done.output
    assert len(server.numbers) == 10
    assert CliRunner().invoke(main, ["track", "sync", str(tmp_path), "--uri", "http://other"]).exit_code == 0
    assert CliRunner().invoke(main, ["track", "sync", str(tmp_path / "gone")]).output.startswith("gausssafe: there is no folder")


def test_a_missing_file_is_told_at_once(tmp_path):
    with Journal(tmp_path) as journal, pytest.raises(InvalidInput, match="there is no file"): journal.log_file(tmp_path / "gone.png")


def test_two_uploaders_of_one_run_take_turns(tmp_path):
    written(tmp_path, 50)
    server = Server()
    server.log_batch = lambda run_id, metrics=(), params=(): (time.sleep(0.001), server.numbers.extend(m.step for m in metrics))
    threads = [threading.Thread(target=upload, args=(tmp_path,), kwargs=dict(client=server, n_batch=5)) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert sorted(server.numbers) == list(range(1, 51))


@pytest.mark.slow
def test_mlflow_gets_it_from_the_background_and_after_a_kill(tmp_path):
    MlflowClient = pytest.importorskip("mlflow").MlflowClient
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with Tracker(tmp_path / "a", uri=uri) as tracker:
        tracker.log_params({"seed": 1})
        for epoch in range(1, 30): tracker.log_row({"epoch": epoch, "x": float(epoch)})
    code = ("import os, signal, sys; from gausssafe.tracking import Tracker\n"
            "t = Tracker(sys.argv[1], uri=sys.argv[2])\nfor e in range(9): t.log_row({'epoch': e, 'x': 1.0})\nos.kill(os.getpid(), signal.SIGKILL)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b"), uri])
    deadline = time.time() + 120
    while status_of(tmp_path / "b").n_left != 0 and time.time() < deadline: time.sleep(0.5)
    time.sleep(2)
    client = MlflowClient(tracking_uri=uri)
    runs = {r.info.run_name: r for r in client.search_runs([client.get_experiment_by_name("gausssafe").experiment_id])}
    n_points = {name: len(client.get_metric_history(run.info.run_id, "x")) for name, run in runs.items()}
    assert runs["a"].info.status == "FINISHED" and runs["a"].data.params == {"seed": "1"} and runs["b"].info.status == "KILLED"
    assert n_points == {"a": 29, "b": 9}


@pytest.mark.slow
def test_a_dead_server_stops_nothing_and_gets_it_later(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.undo()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = time.perf_counter()
    with pytest.warns(UserWarning, match=r"4 records of .* are not at http://127.0.0.1:.*gausssafe track sync"), Tracker(
            tmp_path / "a", uri=f"http://127.0.0.1:{port}", wait_s=30) as tracker:
        for epoch in (1, 2): tracker.log_row({"epoch": epoch, "x": 1.0})
        assert time.perf_counter() - started < 5
    assert json.loads((tmp_path / "a" / tracking.SYNCED).read_text())["error"]
    state, = sync(tmp_path, uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert state.n_left == 0 and state.error is None

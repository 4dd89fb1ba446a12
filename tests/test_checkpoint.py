"Checkpoints are whole or not there, the right ones stay, and a full disk loses nothing"
import errno
import gzip
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors

from gausssafe import checkpoint
from gausssafe.checkpoint import Checkpoint, Checkpoints, load_checkpoint, plan_cleaning, read_about, save_checkpoint, split_by_worth, write_whole
from gausssafe.cli import main
from gausssafe.errors import DiskFull, InvalidInput

STATE = {"weights/w": torch.randn(40, generator=torch.Generator().manual_seed(0)), "state/adam": torch.arange(100, dtype=torch.float64)}


def known(epoch, loss=None, readable=True): return Checkpoint(None, epoch, loss, 1, 0.0, False, readable)


@given(st.lists(st.one_of(st.none(), st.floats(-5, 5)), max_size=30), st.integers(1, 6), st.integers(0, 4))
@settings(deadline=None, max_examples=60)
def test_worth_by_an_obvious_version(losses, keep_last, keep_best):
    checkpoints = [known(epoch, loss) for epoch, loss in enumerate(losses)]
    last, light, gone = split_by_worth(checkpoints, keep_last=keep_last, keep_best=keep_best)
    assert {c.epoch for c in last} == set(range(len(losses))[-keep_last:])
    best = sorted((loss, epoch) for epoch, loss in enumerate(losses) if loss is not None)[:keep_best]
    assert {c.epoch for c in light} == {epoch for _, epoch in best} - {c.epoch for c in last}
    assert sorted(c.epoch for c in last + light + gone) == list(range(len(losses)))


def test_a_damaged_one_is_never_counted_as_worth_keeping():
    last, light, gone = split_by_worth([known(1, 3.0), known(2, 2.0), known(3, readable=False)], keep_last=2)
    assert [c.epoch for c in last] == [1, 2] and [c.epoch for c in gone] == [3] and not light
    assert split_by_worth([known(1, readable=False)]) == ([], [], [])  # Nothing shows whose it is


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_every_bit_comes_back(tmp_path, dtype):
    tensor = (torch.randn(3, 5, generator=torch.Generator().manual_seed(1)) * 9).to(dtype)
    forms = {"t": tensor, "transposed": tensor.T, "empty": tensor[:0], "scalar": tensor[0, 0]}
    save_checkpoint(tmp_path / "a.safetensors", forms, {"x": [0.1, None, "é"]})
    tensors, about = load_checkpoint(tmp_path / "a.safetensors")
    assert all(torch.equal(tensors[name], forms[name]) and tensors[name].dtype == dtype for name in forms) and about["x"] == [0.1, None, "é"]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_of_a_history_come_back_exactly(value):
    assert json.loads(json.dumps(value)) == value


def test_any_cut_is_told(tmp_path):
    path = tmp_path / "epoch_00001.safetensors"
    save_checkpoint(path, STATE, {})
    whole = path.read_bytes()
    for n in range(0, len(whole), 37):
        path.write_bytes(whole[:n])
        with pytest.raises(InvalidInput, match="epoch_00001.safetensors is truncated or not a checkpoint"): load_checkpoint(path)
    with pytest.raises(InvalidInput, match="there is no checkpoint"): load_checkpoint(tmp_path / "gone.safetensors")


def test_a_pickle_is_not_read(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "epoch_00001.safetensors")
    with pytest.raises(InvalidInput, match="not a checkpoint"): load_checkpoint(tmp_path / "epoch_00001.safetensors")
    assert read_about(tmp_path / "epoch_00001.safetensors") is None


def test_the_state_goes_and_the_best_stay(tmp_path):
    run = Checkpoints(tmp_path, keep_last=2, keep_best=1)
    for epoch, loss in enumerate([3.0, 1.0, 2.0, 5.0], 1): run.save(epoch, STATE, {"config": "c"}, loss=loss)
    assert [(c.epoch, c.light) for c in run.list()] == [(2, True), (3, False), (4, False)] and run.latest().epoch == 4
    tensors, about = load_checkpoint(run.list()[0].path)
    assert set(tensors) == {"weights/w"} and about == {"config": "c", "epoch": 2, "loss": 1.0, "light": True}
    assert "3, " in repr(run)


def test_a_disk_that_fills_up_loses_nothing(tmp_path, monkeypatch):
    run = Checkpoints(tmp_path)
    run.save(1, STATE, {})
    def full(_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(DiskFull, match="epoch_00002.safetensors needs .* Nothing that was saved is lost.*gausssafe clean"): run.save(2, STATE, {})
    assert [c.epoch for c in run.list()] == [1] and len(os.listdir(tmp_path)) == 1
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"): run.save(2, STATE, {})
    assert len(os.listdir(tmp_path)) == 1


def test_a_real_limit_on_files(tmp_path):
    code = ("import sys, signal, resource, torch; from gausssafe.checkpoint import *\n"
            "run = Checkpoints(sys.argv[1]); run.save(1, {'w': torch.zeros(100)}, {})\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
            "run.save(2, {'w': torch.zeros(5000)}, {})")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "DiskFull" in done.stderr and os.listdir(tmp_path) == ["epoch_00001.safetensors"]


def test_a_killed_write_leaves_the_old_file(tmp_path):
    code = ("import sys, os, signal; from pathlib import Path; from gausssafe import checkpoint\n"
            "path = Path(sys.argv[1]); checkpoint.write_whole(path, b'old')\n"
            "checkpoint.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL); checkpoint.write_whole(path, b'new')")
    path = tmp_path / "epoch_00001.safetensors"
    save_checkpoint(tmp_path / "epoch_00002.safetensors", STATE, {})  # Shows that the folder is a run's
    done = subprocess.run([sys.executable, "-c", code, str(path)])
    assert done.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    partial, = tmp_path.glob("*.partial")
    assert plan_cleaning(tmp_path)[0].why == "cannot be read"  # "old" is no checkpoint; the partial one may still be written
    os.utime(partial, (0, 0))
    assert [a.path for a in plan_cleaning(tmp_path) if a.why == "a write that was killed"] == [partial]


def test_cleaning_is_listed_then_done(tmp_path):
    (tmp_path / "a/checkpoints").mkdir(parents=True)
    for epoch in range(1, 13): save_checkpoint(tmp_path / f"a/checkpoints/epoch_{epoch:05}.safetensors", STATE, {"loss": 1 / epoch})
    (tmp_path / "a/model.pt").write_bytes(b"mine")
    os.utime(tmp_path / "a/checkpoints/epoch_00012.safetensors", (0, 0))
    def clean(*options): return CliRunner().invoke(main, ["clean", "--checkpoints", str(tmp_path), *options])
    listed = clean()
    assert listed.exit_code == 0 and "8 files, " in listed.output and "nothing was touched: add --yes" in listed.output
    assert listed.output.count("remove") == 7 and "days old" in listed.output and len(list((tmp_path / "a/checkpoints").iterdir())) == 12
    done = clean("--yes")
    assert "8 files done, " in done.output and "gained" in done.output
    left = sorted(p.name for p in (tmp_path / "a/checkpoints").iterdir())
    assert left == [*(f"epoch_000{e:02}.safetensors" for e in (8, 9, 10, 11)), "epoch_00012.safetensors.gz"] and (tmp_path / "a/model.pt").exists()
    assert "nothing to clean" in clean().output
    assert torch.equal(load_checkpoint(tmp_path / "a/checkpoints/epoch_00012.safetensors.gz")[0]["state/adam"], STATE["state/adam"])
    assert clean("--keep-last", "0").exit_code == 2
    missing = CliRunner().invoke(main, ["clean", "--checkpoints", str(tmp_path / "gone")])
    assert missing.exit_code == 2 and missing.output.startswith("gausssafe: there is no folder")


FOREIGN = {"no metadata": save_tensors({"w": torch.ones(3)}), "other metadata": save_tensors({"w": torch.ones(3)}, {"format": "pt"}), "empty": b"",
           "no tensors": save_tensors({}), "cut": save_tensors({"w": torch.ones(3)})[:20], "text": b"not ours", "list": b"\2" + 7 * b"\0" + b"[]"}


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_cleaning_leaves_the_files_of_others(tmp_path, name, archived):
    path = tmp_path / ("epoch_1.safetensors" + ".gz" * archived)
    path.write_bytes(gzip.compress(FOREIGN[name]) if archived else FOREIGN[name])
    (tmp_path / "epoch_2.safetensors").mkdir()
    partial = tmp_path / ".epoch_3.safetensors.7.partial"
    partial.write_bytes(FOREIGN[name])
    for old in (path, partial): os.utime(old, (0, 0))
    assert plan_cleaning(tmp_path, keep_last=1, keep_best=0) == [] and Checkpoints(tmp_path).latest() is None
    done = CliRunner().invoke(main, ["clean", "--checkpoints", str(tmp_path), "--yes"])
    assert done.exit_code == 0 and path.exists() and partial.exists()
    if name not in ("no metadata", "other metadata", "no tensors"): return
    for epoch in range(5, 9): Checkpoints(tmp_path, keep_last=1).save(epoch, STATE, {})
    assert path.exists()


@pytest.mark.parametrize("archived", [False, True])
def test_a_cut_checkpoint_is_seen_without_its_tensors(tmp_path, archived):
    run = Checkpoints(tmp_path)
    for epoch in (1, 2, 3): run.save(epoch, STATE, {})
    path, newest = (tmp_path / f"epoch_0000{epoch}.safetensors" for epoch in (1, 3))
    if archived: newest = newest.rename(newest.with_suffix(".safetensors.gz")); newest.write_bytes(gzip.compress(newest.read_bytes()))
    assert run.latest().epoch == 3
    newest.write_bytes(newest.read_bytes()[:-10])
    assert run.latest().epoch == 2 and [c.readable for c in run.list()] == [True, True, False]
    assert [(a.what, a.path, a.why) for a in plan_cleaning(tmp_path)] == [("remove", newest, "cannot be read")] and path.exists()


def test_write_whole_replaces(tmp_path):
    for data in (b"one", b"two"): write_whole(tmp_path / "x", data)
    assert (tmp_path / "x").read_bytes() == b"two" and os.listdir(tmp_path) == ["x"]

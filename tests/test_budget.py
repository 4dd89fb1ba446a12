"Budgets refuse in time, models predict to the byte, and the search for a batch survives what it meets"
import pickle
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gausssafe import budget
from gausssafe.budget import (
    LinearMemoryModel,
    MemoryBudget,
    MemoryModel,
    chunk_size,
    find_batch_size,
    fit_memory_model,
    is_out_of_memory,
)
from gausssafe.errors import InvalidInput, MemoryBudgetExceeded, TimeLimitExceeded
from gausssafe.memory import count_tensor_bytes

MB = 10**6

# A budget


def test_a_refusal_says_what_how_much_and_what_to_do():
    with pytest.raises(MemoryBudgetExceeded) as refused, MemoryBudget("2GB").reserve(1_500 * MB) as left:
        left.require(1_073_741_824, what="20 qubits x batch 64", advice="Use batch_size <= 29.")
    assert str(refused.value) == "20 qubits x batch 64 needs 1.07 GB; 500 MB of the 2.00 GB budget is left. Use batch_size <= 29."
    assert (refused.value.needed_bytes, refused.value.left_bytes, refused.value.limit_bytes) == (1_073_741_824, 500 * MB, 2000 * MB)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value) and isinstance(refused.value, MemoryError)


def test_what_just_fits_is_granted_and_one_byte_more_is_not():
    small = MemoryBudget(1000)
    small.require(1000)
    small.require(0)
    with pytest.raises(MemoryBudgetExceeded, match="this step needs 2.00 kB; 1.00 kB of the 1.00 kB budget is left. Use a larger memory_limit."):
        small.require(2000)
    with pytest.raises(MemoryBudgetExceeded): small.require(1001)


def test_reservations_nest_and_come_back_even_after_an_error():
    small = MemoryBudget(1000)
    with pytest.raises(ZeroDivisionError), small.reserve(600), small.reserve(400):
        assert small.left_bytes == 0 and repr(small) == "MemoryBudget(0 B of 1.00 kB left)"
        1 / 0  # noqa: B018
    assert small.left_bytes == 1000
    with small.reserve(600), pytest.raises(MemoryBudgetExceeded, match="the critic needs 401 B; 400 B of"):
        small.reserve(401, what="the critic").__enter__()
    assert small.left_bytes == 1000


def test_threads_never_hold_more_than_there_is():
    small, most, granted = MemoryBudget(1000), [], []

    def take():
        for _ in range(200):
            try:
                with small.reserve(300):
                    most.append(small.left_bytes)
                    granted.append(1)
            except MemoryBudgetExceeded: pass
    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert min(most) >= 0 and granted and small.left_bytes == 1000


@pytest.mark.parametrize("bad", [-1, float("nan")])
def test_what_is_no_number_of_bytes_is_refused(bad):
    for ask in (MemoryBudget(10).require, lambda n: MemoryBudget(10).reserve(n).__enter__()):
        with pytest.raises(InvalidInput, match="this step: a number of bytes is at least 0, not"): ask(bad)


def test_a_malformed_limit_is_refused_at_the_call():
    for ask in (MemoryBudget, lambda limit: find_batch_size(print, limit=limit)):
        with pytest.raises(InvalidInput, match="limit: '2 gigs' is not a size: write \"2GB\""): ask("2 gigs")


def test_none_is_what_the_guard_has_left():
    code = ("from gausssafe.budget import MemoryBudget; from gausssafe.memory import read_memory; "
            "print(MemoryBudget().limit_bytes + read_memory().tree_bytes)")
    done = subprocess.run([sys.executable, "-c", code], env={"GAUSSSAFE_LIMIT_BYTES": "400000000"}, capture_output=True, text=True, check=True)
    assert abs(int(done.stdout) - 400 * MB) < 5 * MB


# Models

LINES = st.tuples(st.integers(0, 10**6), st.integers(0, 10**4))


@given(LINES, st.integers(1, 10**9))
def test_largest_is_the_last_that_fits(line, budget_bytes):
    model = LinearMemoryModel(*line)
    n = model.largest(budget_bytes)
    if n == sys.maxsize: assert line[1] == 0 and line[0] <= budget_bytes
    else: assert (n == 0 or model.predict(n) <= budget_bytes) and model.predict(n + 1) > budget_bytes


@given(st.lists(LINES, min_size=1, max_size=30), st.integers(1, 10**9))
def test_the_envelope_is_the_largest_of_all_lines(lines, budget_bytes):
    model = MemoryModel(budget._envelope(lines))
    for n in (1, 2, 3, 10, 97, 1000, 10**6): assert model.predict(n) == max(LinearMemoryModel(*line).predict(n) for line in lines)
    assert model.largest(budget_bytes) == min(LinearMemoryModel(*line).largest(budget_bytes) for line in lines)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 9), st.booleans()), min_size=1, max_size=8), st.integers(1, 5), st.integers(1, 50))
def test_two_probes_predict_any_linear_program_to_the_byte(moments, small, more):
    "Whichever moment is the peak: made of tensors of a + b n floats, some kept and some dropped"
    def step(n):
        kept = []
        for fixed, per_item, keep in moments:
            made = torch.zeros(fixed + per_item * n)
            if keep: kept.append(made)

    model = fit_memory_model(step, small=small, large=small + more)
    for n in (1, small, 7, 100, 1000):
        with count_tensor_bytes() as counted: step(n)
        assert model.predict(n) == counted.peak_bytes


def network_step(width):
    net = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.BatchNorm1d(width), torch.nn.LeakyReLU(), torch.nn.Linear(width, 1))

    def step(n):
        net.zero_grad()
        net(torch.randn(n, 2)).pow(2).mean().backward()
    return step


@pytest.mark.parametrize("width", [4, 64, 300])
def test_a_training_step_is_predicted_beyond_its_bend(width):
    step = network_step(width)
    model = fit_memory_model(step)
    for n in (3, 50, 400, 3000):
        with count_tensor_bytes() as counted: step(n)
        assert model.predict(n) == counted.peak_bytes
    limit_bytes = model.predict(1234)
    assert model.largest(limit_bytes) == 1234


def test_a_first_call_that_keeps_something_does_not_spoil_the_fit():
    state = {}
    def step(n):
        if not state: state["plan"] = torch.zeros(10**6)
        return torch.zeros(n)
    assert fit_memory_model(step, small=10, large=20).lines == (LinearMemoryModel(0, 4),)


def test_a_step_that_takes_nothing_always_fits():
    model = fit_memory_model(lambda n: None)
    assert model.predict(10**6) == 0 and model.largest(1) == sys.maxsize and chunk_size(77, model, 1) == 77


def test_different_operations_are_warned_of():
    with pytest.warns(RuntimeWarning, match="the step ran 2 operations on 2 items and 4 on 4, so its memory is extrapolated from two peaks"):
        model = fit_memory_model(lambda n: [torch.zeros(25) for _ in range(n)], small=2, large=4)
    assert model.predict(10) == 1000


@pytest.mark.parametrize("options, message", [
    ({"step": 3}, "step must be a function of the number of items, not 3"), ({"small": 0}, "1 <= small < large, not small=0 and large=64"),
    ({"large": 32}, "1 <= small < large, not small=32 and large=32")])
def test_bad_probes_fail_at_the_call(options, message):
    calls = []
    with pytest.raises(InvalidInput) as refused: fit_memory_model(**{"step": calls.append} | options)
    assert message in str(refused.value) and not calls


# Chunks


@given(st.integers(1, 10**5), st.integers(0, 1000), st.integers(1, 100), st.integers(1, 10**6))
def test_a_chunk_fits_and_a_larger_one_would_not(n_items, fixed, per_item, limit):
    model = LinearMemoryModel(fixed, per_item)
    try: n = chunk_size(n_items, model, limit)
    except MemoryBudgetExceeded: assert fixed + per_item > limit
    else: assert 1 <= n <= n_items and model.predict(n) <= limit and (n == n_items or model.predict(n + 1) > limit)


def test_not_even_one_item_says_what_it_would_take():
    shared = MemoryBudget(10_000)
    with shared.reserve(9_500), pytest.raises(MemoryBudgetExceeded) as refused: chunk_size(50, LinearMemoryModel(1000, 200), shared, what="one row")
    assert str(refused.value) == "one row needs 1.20 kB; 500 B of the 10.0 kB budget is left. No chunk fits: use memory_limit=10700 or more."
    with MemoryBudget(10_700).reserve(9_500) as enough: assert chunk_size(50, LinearMemoryModel(1000, 200), enough) == 1
    with pytest.raises(InvalidInput, match="n_items must be at least 1, not 0"): chunk_size(0, LinearMemoryModel(1, 1), "1GB")


# The batch that fits


def fits(fixed, per_item, power=1):
    "A step with a known peak"
    def step(n): return torch.zeros((fixed + per_item * n**power) // 4)
    return step


@pytest.mark.parametrize("step, limit, expected", [
    (fits(0, 1000), 100_000, 64), (fits(60_000, 1000), 100_000, 32), (fits(90_000, 100), 100_000, 64), (fits(0, 100, power=2), 100_000, 16),
    (fits(0, 100_000 // 8), 100_000, 8)])
def test_the_largest_that_fits_is_found(step, limit, expected):
    found = find_batch_size(step, limit=limit)
    assert found.batch_size == expected
    assert [row.batch for row in found.rows] == [8 * 2**i for i in range(len(found.rows))]
    assert [row.status for row in found.rows[:-1]] == ["fits"] * (len(found.rows) - 1)
    assert all(row.predicted_bytes == row.peak_bytes for row in found.rows[2:-1])


@pytest.mark.parametrize("power", [1, 2, 3])
def test_a_size_predicted_over_the_limit_is_not_tried(power):
    tried = []
    def step(n): tried.append(n); return fits(1000, 10, power)(n)
    found = find_batch_size(step, limit="10MB")
    assert tried == [row.batch for row in found.rows[:-1]] and found.rows[-1].status == "not tried: memory"
    assert found.rows[-1].predicted_bytes > 10 * MB and found.rows[-1].seconds is None
    assert 1000 + 10 * tried[-1] ** power <= 10 * MB < 1000 + 10 * (2 * tried[-1]) ** power


@pytest.mark.parametrize("error", [
    MemoryError(), MemoryBudgetExceeded(needed_bytes=10), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    RuntimeError("CUDA error: out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), None])
def test_running_out_of_memory_ends_the_search_and_not_the_program(error):
    def step(n):
        if n < 32: return torch.zeros(n)
        if error is None: return torch.empty(10**17)  # As the CPU allocator says it
        raise error
    found = find_batch_size(step, limit="1GB")
    assert found.batch_size == 16 and found.rows[-1].status == "oom" and found.rows[-1].batch == 32


def test_a_tensor_that_the_failed_step_held_is_free_again():
    counters = []
    def step(n):
        with count_tensor_bytes() as counter:
            counters.append(counter)
            held = torch.zeros(n)  # noqa: F841
            if n > 8: raise MemoryError
    find_batch_size(step, limit="1GB")
    assert [counter.peak_bytes for counter in counters] == [32, 64] and not any(counter.alive_bytes for counter in counters)


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyboardInterrupt()])
def test_a_bug_is_a_bug(error):
    def step(n): raise error
    with pytest.raises(type(error)): find_batch_size(step, limit="1GB")


def test_memory_that_torch_does_not_see_counts():
    found = find_batch_size(lambda n: len(bytearray(4 * MB * n)), limit="300MB", max_batch=1024)
    assert found.batch_size == 64 and found.rows[3].peak_bytes == pytest.approx(256 * MB, abs=40 * MB)


def test_time_is_predicted_and_kept():
    def step(n): time.sleep(n / 100)
    found = find_batch_size(step, start=4, limit="1GB", timeout_s=1)
    assert found.batch_size in (32, 64) and found.rows[-1].status in ("not tried: time", "timeout")
    assert all(row.seconds <= 1 for row in found.rows if row.status == "fits")


def test_a_size_that_took_too_long_is_not_the_answer(monkeypatch):
    monkeypatch.setattr(budget, "_predict", lambda trials, n: 0)
    found = find_batch_size(lambda n: time.sleep(0.3 * (n > 16)), limit="1GB", timeout_s="250ms")
    assert (found.batch_size, found.rows[-1].status) == (16, "timeout")


def test_nothing_fits_is_an_error_with_numbers():
    with pytest.raises(MemoryBudgetExceeded) as refused: find_batch_size(fits(0, 1000), limit="5kB")
    assert str(refused.value) == "batch 8 took 8.00 kB; the limit is 5.00 kB. Use a smaller start or a larger limit."
    assert (refused.value.needed_bytes, refused.value.limit_bytes) == (8000, 5000)
    def fails(n): held = torch.zeros(1000); raise MemoryError(held)
    with pytest.raises(MemoryBudgetExceeded, match="batch 8 ran out of memory at 4.00 kB; the limit is 1.00 GB"): find_batch_size(fails, limit="1GB")
    with pytest.raises(TimeLimitExceeded, match=r"batch 8 took 0.\d+ s of the 0.01 s allowed. Use a smaller start or a larger timeout_s") as late:
        find_batch_size(lambda n: time.sleep(0.05), limit="1GB", timeout_s=0.01)
    assert late.value.timeout_s == 0.01


@pytest.mark.parametrize("start, max_batch, sizes", [(8, 8, [8]), (8, 20, [8, 16, 20]), (1, 4, [1, 2, 4]), (5, 40, [5, 10, 20, 40])])
def test_the_sizes_are_start_times_two_up_to_max_batch(start, max_batch, sizes):
    found = find_batch_size(lambda n: torch.zeros(n), start=start, max_batch=max_batch, limit="1GB")
    assert [row.batch for row in found.rows] == sizes and found.batch_size == max_batch


def test_each_size_runs_once():
    calls = []
    find_batch_size(calls.append, limit="1GB", max_batch=64)
    assert calls == [8, 16, 32, 64]


@pytest.mark.parametrize("options, message", [
    ({"step": None}, "step must be a function of the batch size, not None"), ({"start": 0}, "start=0 and max_batch=1048576 must be whole numbers"),
    ({"start": 2.5}, "start=2.5 and"), ({"start": 9, "max_batch": 8}, "start=9 and max_batch=8 must be whole numbers with 1 <= start <= max_batch"),
    ({"max_batch": "all"}, "max_batch='all'"), ({"timeout_s": 0}, "timeout_s: 0 is not a duration"),
    ({"timeout_s": "soon"}, "timeout_s: 'soon' is not a duration"), ({"limit": 0.5}, "limit: 0.5 is not a size")])
def test_bad_settings_fail_before_the_first_step(options, message):
    calls = []
    with pytest.raises(InvalidInput) as refused: find_batch_size(**{"step": calls.append} | options)
    assert message in str(refused.value) and not calls


def test_the_table_reads_well_in_text_html_and_pandas():
    found = find_batch_size(fits(0, 1000), limit=20_000)
    assert repr(found).splitlines() == [
        "batch size 16 fits in 20.0 kB and 5m00s",
        "    batch   seconds  predicted       peak  status",
        f"        8 {budget.format_duration(found.rows[0].seconds):>9}               8.00 kB  fits",
        f"       16 {budget.format_duration(found.rows[1].seconds):>9}    16.0 kB    16.0 kB  fits",
        "       32              32.0 kB             not tried: memory"]
    html = found._repr_html_()
    assert html.count("<tr>") == 4 and "not tried: memory" in html and "<th" in html
    frame = found.to_frame()
    assert list(frame) == ["batch", "seconds", "predicted_bytes", "peak_bytes", "status"] and list(frame.batch) == [8, 16, 32]


def test_a_quick_search_says_nothing(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_batch_size(fits(0, 1000), limit=20_000)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("error, expected", [
    (MemoryError(), True), (torch.OutOfMemoryError("x"), True), (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), True),
    (RuntimeError("CUDA error: out of memory"), True), (RuntimeError("shape mismatch"), False), (ValueError("out of memory"), False),
    (OSError(), False)])
def test_an_allocation_failure_is_told_from_a_bug(error, expected):
    assert is_out_of_memory(error) is expected

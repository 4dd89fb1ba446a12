"""500 samples against 20,000 target points: time and memory of the two MMDs, ours and the plain full matrices.

    python benchmarks/metrics.py [--repeats 5] [--points 20000] [--out benchmarks/results/metrics.json]

Every timing is a call in a fresh process of one thread; the rivals and ours take turns, and the table shows medians and ratios of medians.
A "cold" call prepares the target itself, a "prepared" one is given a Target that was used once. Bytes are read twice: logical ones
(tensors alive, by `count_tensor_bytes`, in a process of their own) and the process's high-water mark, both above what the inputs left.
The plain five-kernel version holds four matrices of 20,500 x 20,500: 13.4 GB at 20,000 points. It is skipped, with a line, where that is not free.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

SCALES = (0.1, 0.5, 1.0, 2.0, 5.0)
MATRICES = {"plain float64": {"mmd": 2, "mmd_multiscale": 4}, "scikit-learn": {"mmd": 2}}
METHODS = {"mmd": ["plain float64", "scikit-learn", "plain, in rows", "ours, cold", "ours, prepared"],
           "mmd_multiscale": ["plain float64", "plain, in rows", "ours, cold", "ours, prepared"]}


def plain_mmd(x, y):
    "As the formula stands, in float64"
    import torch
    x, y = x.double(), y.double()
    def mean(a, b): return torch.exp(-torch.cdist(a, b) ** 2).mean()
    return (mean(x, x) + mean(y, y) - 2 * mean(x, y)).sqrt().item()


def plain_mmd_multiscale(x, y):
    "All pairs of both clouds at once, five kernels added up"
    import torch
    n, z, median = len(x), torch.cat([x, y]).double(), median_squared_distance(y)
    squares = torch.cdist(z, z) ** 2
    kernel = sum(torch.exp(-squares / (2 * scale * median)) for scale in SCALES) / len(SCALES)
    def off_diagonal(k): return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))
    return (off_diagonal(kernel[:n, :n]) + off_diagonal(kernel[n:, n:]) - 2 * kernel[:n, n:].mean()).item()


def median_squared_distance(y):
    "Of the 2,000 points that a Target takes, so that the values can be compared"
    from gausssafe import metrics
    return metrics.Target(y).median_sq_distance


def sklearn_mmd(x, y):
    "With scikit-learn's kernel, float64"
    from sklearn.metrics.pairwise import rbf_kernel
    x, y = x.double().numpy(), y.double().numpy()
    return float((rbf_kernel(x, gamma=1).mean() + rbf_kernel(y, gamma=1).mean() - 2 * rbf_kernel(x, y, gamma=1).mean()) ** 0.5)


def in_rows(x, y, gammas, unbiased):
    "The same sums, 64 rows of the matrix at a time: bounded memory by chunking alone"
    import torch
    x, y, n, m = x.double(), y.double(), len(x), len(y)
    def total(a, b): return sum(torch.exp(-gamma * torch.cdist(rows, b) ** 2).sum().item() for rows in a.split(64) for gamma in gammas) / len(gammas)
    xx, xy, yy = total(x, x), total(x, y), total(y, y)
    if unbiased: return (xx - n) / (n * (n - 1)) + (yy - m) / (m * (m - 1)) - 2 * xy / (n * m)
    return (xx / n**2 + yy / m**2 - 2 * xy / (n * m)) ** 0.5


def rows_mmd(x, y): return in_rows(x, y, [1.0], False)


def rows_mmd_multiscale(x, y):
    median = median_squared_distance(y)
    return in_rows(x, y, [1 / (2 * scale * median) for scale in SCALES], True)


RIVALS = {("plain float64", "mmd"): plain_mmd, ("plain float64", "mmd_multiscale"): plain_mmd_multiscale, ("scikit-learn", "mmd"): sklearn_mmd,
          ("plain, in rows", "mmd"): rows_mmd, ("plain, in rows", "mmd_multiscale"): rows_mmd_multiscale}


def make_call(metric, method, x, y):
    "The call to time"
    if (method, metric) in RIVALS: return lambda: RIVALS[method, metric](x, y)
    from gausssafe import metrics
    ours, target = getattr(metrics, metric), y
    if method == "ours, prepared":
        target = metrics.Target(y)
        ours(x, target)
    return lambda: float(ours(x, target))


def process_bytes(field):
    "VmRSS or VmHWM"
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def work(metric, method, n_points, logical):
    "One call in this process: seconds and bytes"
    import sklearn.metrics.pairwise  # noqa: F401
    import torch

    from gausssafe.memory import count_tensor_bytes
    from gausssafe.mixture import two_gaussians
    torch.set_num_threads(1)
    mixture = two_gaussians()
    x, y = mixture.sample(500, seed=1), mixture.sample(n_points, seed=0)
    call = make_call(metric, method, x, y)
    if logical:
        with count_tensor_bytes() as counted: call()
        return {"logical_bytes": counted.peak_bytes}
    Path("/proc/self/clear_refs").write_text("5")  # The high-water mark starts again from what is resident now
    before = process_bytes("VmRSS")
    started = time.perf_counter()
    value = call()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "value": value, "process_bytes": process_bytes("VmHWM") - before}


def in_fresh_process(*arguments):
    "A worker's answer"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--work", json.dumps(arguments)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def fits(metric, method, n_points):
    "Whether the rival's matrices are free"
    import psutil
    needed = 8 * (n_points + 500) ** 2 * MATRICES.get(method, {}).get(metric, 0) + 10**9
    return needed < psutil.virtual_memory().available


def machine():
    "What it ran on"
    import psutil
    import torch
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.machine(), "n_cores": os.cpu_count(), "ram_bytes": psutil.virtual_memory().total, "n_threads": 1,
            "load": os.getloadavg(), "python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}


def summarize(metric, method, runs, logical, reference):
    "A row of the table"
    seconds = [run["seconds"] for run in runs]
    return {"metric": metric, "method": method, "seconds": statistics.median(seconds), "seconds_min": min(seconds), "n_runs": len(runs),
            "process_bytes": max(run["process_bytes"] for run in runs), "logical_bytes": logical,
            "value": runs[0]["value"], "relative_difference": abs(runs[0]["value"] / reference - 1) if reference else None}


def measure(repeats, n_points):
    "Rows for every method that fits, taking turns"
    rows = []
    for metric, methods in METHODS.items():
        able = [method for method in methods if fits(metric, method, n_points)]
        for method in set(methods) - set(able): print(f"skipped: {metric}, {method}: its matrices do not fit in the free memory", file=sys.stderr)
        runs = {method: [] for method in able}
        for _ in range(repeats):
            for method in able: runs[method].append(in_fresh_process(metric, method, n_points, False))
        reference = runs["plain float64"][0]["value"] if "plain float64" in runs else None
        for method in able:
            logical = None if method == "scikit-learn" else in_fresh_process(metric, method, n_points, True)["logical_bytes"]
            rows.append(summarize(metric, method, runs[method], logical, reference))
    return rows


def table(rows):
    "Markdown, with each method's time over the plain one's"
    lines = ["| metric | method | median s | times faster | process MB | logical MB | difference from plain |", "|---|---|---|---|---|---|---|"]
    plain = {row["metric"]: row["seconds"] for row in rows if row["method"] == "plain float64"}
    for row in rows:
        ratio = f"{plain[row['metric']] / row['seconds']:.1f}" if row["metric"] in plain else "-"
        logical = "-" if row["logical_bytes"] is None else f"{row['logical_bytes'] / 1e6:,.1f}"
        difference = "-" if row["relative_difference"] is None else f"{row['relative_difference']:.0e}"
        timing = f"{row['metric']} | {row['method']} | {row['seconds']:.4f} | {ratio}"
        lines.append(f"| {timing} | {row['process_bytes'] / 1e6:,.1f} | {logical} | {difference} |")
    return "\n".join(lines)


def main():
    "Command line"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/metrics.json"))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work: return print(json.dumps(work(*json.loads(arguments.work))))
    rows = measure(arguments.repeats, arguments.points)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "n_samples": 500, "n_points": arguments.points, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__": main()

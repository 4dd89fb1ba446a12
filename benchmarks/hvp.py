"""Hessian-vector products: curvlinops, PyHessian, hessian-eigenthings and ours in turn, on a GPT, a CNN and a layer-norm MLP.

    python benchmarks/hvp.py [--cases gpt mlp cnn] [--rounds 3] [--out benchmarks/results/hvp.json]

Every timing is one product after a warm-up, in a fresh process of one thread; the methods take turns, and the table shows medians over rounds.
"gradients" is that time over k full gradients of the same process (the best chunk, fused attention). Peak bytes are read in processes of their own:
logical ones (tensors alive, v left out, Hv included) and the process's high-water mark above what it held before. The error is that of the
first column against double backward in float64. Peers are skipped, with a line, where they cannot be imported:
pip install curvlinops-for-pytorch pyhessian hessian-eigenthings (some ask for an older torch: use an environment of their own, with --no-deps).
"""
import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PEERS = {"curvlinops": "curvlinops", "PyHessian": "pyhessian", "hessian-eigenthings": "hessian_eigenthings"}
LIMITS = {"gpt": {1: ["2GB", "40MB", "22MB"], 8: ["2GB", "150MB", "95MB", "69MB"]}, "gpt-10m": {1: ["2GB", "250MB"], 8: ["1.2GB", "800MB"]},
          "cnn": {1: ["2GB", "20MB"], 8: ["2GB", "40MB"]}, "mlp": {1: ["2GB", "10MB"], 8: ["2GB", "20MB"]}}
SKIPPED = {("gpt-10m", "curvlinops", 8)}  # 10 GB


def make_case(name):
    "(model, loss_fn, x, y)"
    import cases
    import torch
    from torch import nn
    torch.manual_seed(0)

    class LMLoss(nn.CrossEntropyLoss):
        def forward(self, logits, y): return super().forward(logits.flatten(0, 1), y.flatten())
    if name.startswith("gpt"):
        model, n = (cases.GPT(65, 128, 128, 4, 4), 32) if name == "gpt" else (cases.GPT(65, 256, 384, 6, 6), 8)
        tokens = torch.randint(65, (n, 129))
        return model, LMLoss(), tokens[:, :-1], tokens[:, 1:]
    if name == "cnn":
        model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
                              nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(8,
                                  64), nn.SiLU(), nn.Flatten(), nn.Linear(4096, 10))
        return cases.randomize(model), nn.CrossEntropyLoss(), torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
    return cases.randomize(model), nn.CrossEntropyLoss(), torch.randn(1024, 64), torch.randint(10, (1024,))


def make_product(method, limit, model, loss_fn, x, y):
    "V (d, k) -> HV, and what tells how"
    import torch
    params = list(model.parameters())
    if method == "ours":
        from gausssafe.hvp import HessianOperator
        H = HessianOperator(model, loss_fn, params, [(x, y)], memory_limit=limit)
        return lambda V: H @ (V if V.shape[1] > 1 else V[:, 0]), lambda: H.plan
    if method == "curvlinops":
        from curvlinops import HessianLinearOperator
        H = HessianLinearOperator(model, loss_fn, params, [(x, y)], check_deterministic=False)
        return lambda V: H @ V, None
    shapes = [p.shape for p in params]
    def split(v): return [part.view(shape) for part, shape in zip(v.split([s.numel() for s in shapes]), shapes, strict=True)]
    def flat(parts): return torch.cat([part.reshape(-1) for part in parts])
    if method == "PyHessian":
        from pyhessian import hessian
        from pyhessian.utils import hessian_vector_product

        def product(V):
            H = hessian(model, loss_fn, data=(x, y), cuda=False)
            return torch.stack([flat(hessian_vector_product(H.gradsH, H.params, split(v))) for v in V.T], 1)
        return product, None
    from hessian_eigenthings.operators.hessian import HessianOperator
    H = HessianOperator(model, [(x, y)], lambda model, batch: loss_fn(model(batch[0]), batch[1]))
    return lambda V: torch.stack([H.matvec(v.contiguous()) for v in V.T], 1), None


def gradient_seconds(model, loss_fn, x, y):
    "One full gradient at its best chunk"
    import torch
    params, times = list(model.parameters()), []
    for chunk in (len(x), max(1, len(x) // 4), len(x), max(1, len(x) // 4)):
        started = time.perf_counter()
        for i in range(0, len(x), chunk): torch.autograd.grad(loss_fn(model(x[i:i + chunk]), y[i:i + chunk]), params)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def process_bytes(field):
    "VmRSS or VmHWM"
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def work(case, method, k, limit, what):
    "Measure one thing in this process"
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from gausssafe.memory import count_tensor_bytes
    torch.set_num_threads(1)
    model, loss_fn, x, y = make_case(case)
    model.eval()
    V = torch.randn(k, sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(1)).T
    if method == "curvlinops": V = V.contiguous()
    with sdpa_kernel(SDPBackend.MATH) if method != "ours" else nullcontext():
        product, plan = make_product(method, limit, model, loss_fn, x, y)
        if what == "bytes":
            with count_tensor_bytes() as counted: product(V)
            own = {"plan": vars(plan())} if plan else {}
            return {"logical_bytes": counted.peak_bytes, **own}
        if what == "process":
            before = process_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            product(V)
            return {"process_bytes": process_bytes("VmHWM") - before}
        found = product(V)
        started = time.perf_counter()
        product(V)
        seconds = time.perf_counter() - started
    gradient = gradient_seconds(model, loss_fn, x, y)
    answer = {"seconds": seconds, "gradient_s": gradient, "gradients": seconds / gradient / k, "d": V.shape[0]}
    if what == "error":
        from reference import double_backward
        exact = double_backward(model, loss_fn, x.double() if x.is_floating_point() else x, y, V[:, 0])
        answer["error"] = float((found.reshape(V.shape)[:, 0].double() - exact).norm() / exact.norm())
    return answer


def in_fresh_process(*arguments):
    "A worker's answer"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, "--work", json.dumps(arguments)], env=environment, capture_output=True, text=True)
    if done.returncode: return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def methods_of(case, k):
    "(method, limit) to compare"
    able = [peer for peer, module in PEERS.items() if importlib.util.find_spec(module) and (case, peer, k) not in SKIPPED]
    return [(peer, None) for peer in able] + [("ours", limit) for limit in LIMITS[case][k]]


def measure(case, k, rounds):
    "Rows for every method, taking turns"
    runs = {method: [] for method in methods_of(case, k)}
    for i in range(rounds):
        for method, limit in runs: runs[method, limit].append(in_fresh_process(case, method, k, limit, "time" if i else "error"))
    for (method, limit), found in runs.items():
        failed = [run["failed"] for run in found if "failed" in run]
        if failed:
            print(f"skipped: {case}, {method}, k = {k}: {failed[0]}", file=sys.stderr)
            continue
        memory = {**in_fresh_process(case, method, k, limit, "bytes"), **in_fresh_process(case, method, k, limit, "process")}
        yield {"case": case, "d": found[0]["d"], "k": k, "method": method, "limit": limit,
            "gradients": statistics.median(run["gradients"] for run in found),
               "seconds": statistics.median(run["seconds"] for run in found), "n_runs": len(found), "error": found[0]["error"], **memory}


def machine():
    "What it ran on"
    import psutil
    import torch
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.machine(), "n_cores": os.cpu_count(), "ram_bytes": psutil.virtual_memory().total, "n_threads": 1,
            "load": os.getloadavg(), "python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()}


def table(rows):
    "Markdown; ours with v, as its limit counts it, in a column of its own"
    lines = ["| case | d | k | method | gradients a product | logical MB above v | process MB | of its limit, with v | predicted off by | error |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        plan = row.get("plan")
        name = f"ours, {plan['engine']}, {plan['chunk']} samples in {row['limit']}" if plan else row["method"]
        used = f"{plan['peak_bytes'] / plan['limit_bytes']:.0%} ({plan['peak_bytes'] / 1e6:,.1f} MB)" if plan else "-"
        off = f"{plan['predicted_bytes'] / plan['peak_bytes'] - 1:+.1%}" if plan else "-"
        numbers = f"{row['gradients']:.2f} | {row.get('logical_bytes', 0) / 1e6:,.1f} | {row.get('process_bytes', 0) / 1e6:,.1f}"
        lines.append(f"| {row['case']} | {row['d']:,} | {row['k']} | {name} | {numbers} | {used} | {off} | {row['error']:.0e} |")
    return "\n".join(lines)


def main():
    "Command line"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["gpt", "cnn", "mlp"], choices=list(LIMITS))
    parser.add_argument("--k", nargs="+", type=int, default=[1, 8], choices=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hvp.json"))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work: return print(json.dumps(work(*json.loads(arguments.work))))
    for peer, module in PEERS.items():
        if not importlib.util.find_spec(module): print(f"skipped: {peer} is not installed", file=sys.stderr)
    rows = [row for case in arguments.cases for k in arguments.k for row in measure(case, k, arguments.rounds)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__": main()

"""The GAN study against the reports' way: time of an epoch, memory, bytes kept, quality, the cost of tracking.

    python benchmarks/wgan.py [--quality] [--seeds 5] [--epochs 30] [--out benchmarks/results/wgan.json]

"plain" is the reports' loop written down again: separate passes of the critic for data, fake and the points between, Adam as it comes, a loss
read out at every step, noise drawn anew for each critic step. The reports' six metrics, with two full kernel matrices (13 GB), are the business of
`benchmarks/metrics.py`; here only the training part is compared. Both ways take turns in one process of one thread, epoch by epoch, and the
table shows medians and ratios of medians, in processor seconds, which neighbours on the machine disturb less. Whole runs are by the clock.
Memory is the high-water mark of a fresh process above what its imports left.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from metrics import machine, process_bytes

REPORTS = dict(n_points=20_000, n_train=16_000, batch_size=256, hidden=(256, 256), critic_hidden=(256, 256), n_critic=5)
NOISES = ("normal", "uniform", "quantum", "shadow")
KINDS = {**{noise: dict(noise=noise) for noise in NOISES}, "bfloat16": dict(noise="normal", precision="bfloat16")}


class PlainLoop:
    "WGAN-GP as the reports' code has it, on the same networks"

    def __init__(self, config):
        import torch

        from gausssafe import wgan
        training = wgan._Training(config)
        self.config, self.gan, self.critic, self.real, self.n_steps = config, training.gan, training.critic, training.real, training.n_steps
        self.adams = [torch.optim.Adam(net.parameters(), lr=config.learning_rate, betas=(0.5, 0.9)) for net in (self.gan, self.critic)]
        self.order = torch.Generator().manual_seed(1)

    def critic_step(self, real):
        import torch
        fake = self.gan(len(real)).detach()
        share = torch.rand(len(real), 1)
        between = (share * fake + (1 - share) * real).requires_grad_(True)
        scores = self.critic(between)
        slope = torch.autograd.grad(scores, between, grad_outputs=torch.ones_like(scores), create_graph=True, retain_graph=True)[0]
        penalty = ((slope.norm(2, dim=1) - 1) ** 2).mean()
        loss = self.critic(fake).mean() - self.critic(real).mean() + self.config.gradient_penalty * penalty
        self.adams[1].zero_grad()
        loss.backward()
        self.adams[1].step()
        return loss.item()

    def generator_step(self):
        loss = -self.critic(self.gan(self.config.batch_size)).mean()
        self.adams[0].zero_grad()
        loss.backward()
        self.adams[0].step()
        return loss.item()

    def epoch(self):
        import torch
        for _ in range(self.n_steps):
            for _ in range(self.config.n_critic):
                self.critic_step(self.real[torch.randint(len(self.real), (self.config.batch_size,), generator=self.order)])
            self.generator_step()


def time_epochs(repeats):
    "Processor seconds of an epoch, each way in turn"
    import torch

    from gausssafe import wgan
    torch.set_num_threads(1)
    config = wgan.WGANConfig(noise="normal", **REPORTS)
    plain, others = PlainLoop(config), {kind: wgan._Training(wgan.WGANConfig(**changes, **REPORTS)) for kind, changes in KINDS.items()}
    judges = {noise: wgan._Judge(training) for noise, training in others.items()}
    taken = {"plain, training": [], **{f"{noise}, {part}": [] for noise in KINDS for part in ("training", "metrics")}}
    for repeat in range(repeats + 1):
        for name, call in [("plain, training", plain.epoch), *((f"{noise}, training", others[noise].epoch) for noise in KINDS),
                           *((f"{noise}, metrics", lambda judge=judges[noise]: judge.scores(judge.samples())) for noise in KINDS)]:
            started = time.process_time()
            call()
            if repeat: taken[name].append(time.process_time() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def time_run(n_threads, epochs, out_dir=None, precision="float32"):
    "A whole run: seconds, peak above the imports, bytes kept"
    import scipy.optimize
    import scipy.spatial  # noqa: F401

    from gausssafe.wgan import WGANConfig, train_wgan
    Path("/proc/self/clear_refs").write_text("5")
    before = process_bytes("VmRSS")
    config = WGANConfig(noise="normal", epochs=epochs, n_threads=n_threads, out_dir=out_dir, precision=precision, **REPORTS)
    result = train_wgan(config, progress=False)
    files = [path for path in Path(out_dir).rglob("*") if path.is_file()] if out_dir else []
    peak_bytes = process_bytes("VmHWM") - before
    return {"seconds": result.seconds, "epoch_seconds": statistics.median(result.history.seconds), "process_bytes": peak_bytes,
            "n_checkpoints": sum(path.suffix == ".safetensors" for path in files), "kept_bytes": sum(path.stat().st_size for path in files)}


def quality(kind, seed, epochs):
    "A trained generator on 20,000 samples, and its floors"
    import torch

    from gausssafe import metrics
    from gausssafe.wgan import WGANConfig, train_wgan
    config = WGANConfig(epochs=epochs, seed=seed, metrics_every=epochs, gradient_penalty=0.1, **KINDS[kind], **REPORTS)
    result = train_wgan(config, progress=False)
    from gausssafe.mixture import two_gaussians
    known, x = two_gaussians(), torch.from_numpy(result.sample(20_000, seed=1))
    target, modes = metrics.Target(known.sample(20_000, seed=99), source=known), metrics.modes(x, known)
    scores = metrics.measure(("log_likelihood", "wasserstein_axes", "kl_divergence", "sliced_wasserstein", "mmd"), x, target, known)
    shape = {"stds": list(modes["std"]), "widths": list(modes.width), "share": modes.share[0], "inside": modes.inside.sum()}
    return {"noise": kind, "seed": seed, "seconds": result.seconds, **shape,
            **{name: {"value": score.value, "stderr": score.stderr, "floor": score.floor} for name, score in scores.items()}}


def time_tracking(epochs):
    "Seconds an epoch spends in the tracker, with MLflow on sqlite in the background"
    from gausssafe.tracking import Tracker
    from gausssafe.wgan import WGANConfig, train_wgan
    taken, config = [], WGANConfig(noise="normal", epochs=epochs, **REPORTS)
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(Path(folder) / "runs", experiment="bench", uri=f"sqlite:///{folder}/mlflow.db")
        def row(values):
            started = time.perf_counter()
            tracker.log_row(values)
            taken.append(time.perf_counter() - started)
        with tracker: tracked = train_wgan(config, progress=False, callback=row)
    without = train_wgan(config, progress=False)
    epochs = {"epoch_with": tracked.history.seconds.median(), "epoch_without": without.history.seconds.median()}
    return {"call_seconds": statistics.median(taken), **epochs}


WORK = {"epochs": time_epochs, "run": time_run, "quality": quality, "tracking": time_tracking}


def in_fresh_process(name, *arguments):
    "A worker's answer"
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments[0] if name == "run" else 1), "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--work", json.dumps([name, *arguments])]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def time_table(found):
    "Markdown"
    seconds, run, rows = found["epochs"], found["run"], []
    both = {noise: seconds[f"{noise}, training"] + seconds[f"{noise}, metrics"] for noise in KINDS}
    def row(*cells): rows.append("| " + " | ".join(cells) + " |")
    def parts(kind): return f"{both[kind]:.2f} s ({seconds[f'{kind}, training']:.2f} + {seconds[f'{kind}, metrics']:.2f})"
    row("one epoch, classical, 1 thread", "1.4 s + 20 s of metrics", parts("normal"), "1.35 s")
    row("the same, bfloat16 inside the networks", "", parts("bfloat16"), "1.35 s")
    gains = {kind: seconds["plain, training"] / seconds[f"{kind}, training"] for kind in ("normal", "bfloat16")}
    row("training part over the plain loop", f"{seconds['plain, training']:.2f} s", f"{gains['normal']:.2f} x faster", "1.15 x")
    row("the same, bfloat16", "", f"{gains['bfloat16']:.2f} x faster", "")
    for noise in ("quantum", "shadow"):
        row(f"one epoch, {noise} noise, over the classical", "~7 min, without gradients", f"{both[noise] / both['normal']:.2f} x", "1.1 x")
    row(f"{run['epochs']} epochs, 2 threads", "10-20 min", f"{run['two']['seconds']:.1f} s", "35 s")
    row(f"{run['epochs']} epochs, 2 threads, bfloat16", "", f"{run['low']['seconds']:.1f} s", "35 s")
    row(f"{run['epochs']} epochs, 1 thread", "", f"{run['one']['seconds']:.1f} s", "")
    row("peak above the imports", "13.3 GB", f"{run['one']['process_bytes'] / 1e6:.0f} MB", "150 MB")
    kept, n = run["kept"], run["kept_epochs"]
    row(f"checkpoints and samples of {n} epochs", f"{n}, 1.6 MB each, and a CSV each",
        f"{kept['n_checkpoints']}, {kept['kept_bytes'] / 1e6:.1f} MB in all: {1 - kept['kept_bytes'] / (1.62e6 * n):.0%} fewer bytes", "8, 85 %")
    if "tracking" in found:
        told = found["tracking"]
        call, epoch = told["call_seconds"] / told["epoch_without"], told["epoch_with"] / told["epoch_without"] - 1
        row("tracking, MLflow sqlite, of an epoch", "0.1-0.5 s", f"{1e3 * told['call_seconds']:.2f} ms ({call:.3%}); whole epoch {epoch:+.1%}", "1 %")
    return "\n".join(["| | reports | measured | goal |", "|---|---|---|---|", *rows])


def quality_table(rows):
    "Markdown: medians over seeds, and floors"
    lines = ["| noise | log-likelihood | std of modes | width within 3 std | share of the left | per-axis W1 | KL | sliced W1 |", "|---" * 8 + "|"]
    for noise in dict.fromkeys(row["noise"] for row in rows):
        own = [row for row in rows if row["noise"] == noise]
        def median(name, own=own): return f"{statistics.median(row[name]['value'] for row in own):.3f} (floor {own[0][name]['floor']:.3f})"
        stds, widths = ([statistics.median(row[what][mode] for row in own) for mode in (0, 1)] for what in ("stds", "widths"))
        shares = [row["share"] for row in own]
        spread = f"{statistics.median(shares):.3f} ({min(shares):.3f}-{max(shares):.3f})"
        cells = [noise, median("log_likelihood"), f"{stds[0]:.2f}, {stds[1]:.2f}", f"{widths[0]:.2f}, {widths[1]:.2f}", spread,
                 *map(median, ("wasserstein_axes", "kl_divergence", "sliced_wasserstein"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def runs(epochs):
    "Whole runs"
    with tempfile.TemporaryDirectory() as folder:
        return {"epochs": epochs, "two": in_fresh_process("run", 2, epochs), "one": in_fresh_process("run", 1, epochs),
                "low": in_fresh_process("run", 2, epochs, None, "bfloat16"),
                "kept_epochs": 50, "kept": in_fresh_process("run", 1, 50, folder)}


def main():
    "Command line"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quality", action="store_true", help="also train over seeds and judge what came out (a quarter of an hour)")
    parser.add_argument("--noises", nargs="*", default=["normal", "bfloat16", "quantum", "shadow"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/wgan.json"))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        name, *rest = json.loads(arguments.work)
        return print(json.dumps(WORK[name](*rest)))
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    found |= {"machine": machine(), "epochs": in_fresh_process("epochs", arguments.repeats), "run": runs(arguments.epochs)}
    try: found["tracking"] = in_fresh_process("tracking", 10)
    except subprocess.CalledProcessError: print("tracking is not measured: mlflow is not installed", file=sys.stderr)
    if arguments.quality:
        seeds = range(41, 41 + arguments.seeds)
        found["quality"] = [in_fresh_process("quality", noise, seed, arguments.epochs) for noise in arguments.noises for seed in seeds]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(time_table(found), *([quality_table(found["quality"])] if "quality" in found else []), sep="\n\n")


if __name__ == "__main__": main()

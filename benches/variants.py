#!/usr/bin/env python3
"""Trains variants of the default run, or samples one in several ways, and judges each: the tables of docs/recipes.md.

    cargo build --release
    benches/variants.py OUT recipes [--seeds 0,1,2] [--only NAME;...] [--program target/release/ddpm-cuda]
    benches/variants.py OUT objectives ...
    benches/variants.py OUT samplers --run RUN
    benches/variants.py OUT guidance --run RUN          # trained with classes=10 label_dropout=0.15
    benches/variants.py OUT classifier --run RUN --flags "--classifier RUN"

A recipe or an objective is `ddpm-cuda train` on the built-in digits with the settings below, then `quality` on 2,000
samples as the default draws them, and for an objective `eval` on 40 held-out images. The other tables are `quality` on
2,000 samples of RUN with the flags below. OUT/NAME-SEED/ keeps quality.json, eval.json, seconds.json and the run; what
is there is not done again, so a stopped comparison goes on. Needs Python alone. A recipe and seed takes 9 to
18 minutes on two cores.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

# What the same ten minutes can do: name, settings of the training that differ from the preset's.
RECIPES = {
    "before": "prediction=eps cooldown=0",
    "cooldown 0.5": "prediction=eps cooldown=0.5",
    "cooldown 1": "prediction=eps cooldown=1",
    "rate 2e-3, cooldown 1": "prediction=eps cooldown=1 learning_rate=2e-3",
    "v": "prediction=v cooldown=0.5",
    "v, min-SNR": "prediction=v loss=min_snr cooldown=0.5",
    "x0, min-SNR": "prediction=x0 loss=min_snr cooldown=0.5",
    "x0": "prediction=x0 cooldown=0.5",
    "x0, batch 16": "prediction=x0 cooldown=0.5 batch=16",
    "x0, rate 2e-3": "prediction=x0 cooldown=0.5 learning_rate=2e-3",
    "x0, ema 0.995": "prediction=x0 cooldown=0.5 ema_decay=0.995",
    "x0, linear": "prediction=x0 cooldown=0.5 schedule=linear",
    "x0, sigmoid": "prediction=x0 cooldown=0.5 schedule=sigmoid",
    "x0, stratified": "prediction=x0 cooldown=0.5 timestep_sampling=stratified",
    "x0, widths 24,48,64": "prediction=x0 cooldown=0.5 widths=24,48,64",
}

# The paper's table 2: what the network predicts, the variance, and the loss.
OBJECTIVES = {
    f"{prediction}, {loss}, {variance}": f"prediction={prediction} loss={loss} variance={variance}"
    for prediction, loss, variance in [
        ("mu", "vlb", "learned_range"),
        ("mu", "vlb", "learned"),
        ("mu", "vlb", "fixed_small"),
        ("mu", "simple", "fixed_small"),
        ("x0", "simple", "fixed_small"),
        ("eps", "vlb", "learned_range"),
        ("eps", "vlb", "learned"),
        ("eps", "vlb", "fixed_small"),
        ("eps", "hybrid", "learned_range"),
        ("eps", "simple", "fixed_small"),
        ("eps", "simple", "fixed_large"),
        ("v", "simple", "fixed_small"),
    ]
}

# How a run is sampled: name, flags of `quality`.
SAMPLERS = {
    "ddpm, 50": "--steps 50",
    "ddpm, 100": "",
    "ddpm, 250": "--steps 250",
    "ddpm, 1000": "--steps 1000",
    "fixed_large, 1000": "--steps 1000 --variance fixed_large",
    "ddim, 50": "--sampler ddim --steps 50",
    "ddim, 100": "--sampler ddim --steps 100",
    "dpm++, 15": "--sampler dpm++ --steps 15",
    "dpm++, 25": "--sampler dpm++ --steps 25",
    "heun, 25": "--sampler heun --steps 25",
}

# Quality against diversity: how strongly the run of a conditional network is guided.
GUIDANCE = {f"W = {w}": f"--guidance {w}" for w in (0, 1, 1.5, 2, 3, 5, 8)}
CLASSIFIER = {f"scale {s}": f"--classifier-scale {s}" for s in (0, 0.5, 1, 2, 4, 8)}

TABLES = {
    "recipes": RECIPES,
    "objectives": OBJECTIVES,
    "samplers": SAMPLERS,
    "guidance": GUIDANCE,
    "classifier": CLASSIFIER,
}


def run(program, arguments, log):
    """Seconds that the program takes; its output goes to the file `log`."""
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as out:
        subprocess.run([program, *arguments], stdout=out, stderr=subprocess.STDOUT, check=True)
    return time.monotonic() - start


def trained(program, folder, settings, seed):
    """The run with these settings, trained or gone on with if need be."""
    to, seconds = folder / "run", folder / "seconds.json"
    if not seconds.exists():
        sets = [word for s in [*settings.split(), f"seed={seed}", "sample_every=0"] for word in ("--set", s)]
        resume = (to / "config.toml").exists() and any((to / "checkpoints").glob("*"))
        arguments = ["--resume", str(to)] if resume else [*sets, "--out", str(to)]
        took = run(program, ["train", *arguments], folder / "train.log")
        seconds.write_text(json.dumps({"train": took}), encoding="utf-8")
    return to


def judge(program, folder, model, command, flags):
    """Writes the figures of `quality` or `eval` to the folder, and how long the command took."""
    to = folder / f"{command}.json"
    if not to.exists():
        arguments = [command, "--model", str(model), "--data", "mnist", "--json", str(to), *flags]
        took = run(program, arguments, folder / f"{command}.log")
        (folder / f"{command}-seconds.json").write_text(json.dumps(took), encoding="utf-8")


def spread(values):
    """Mean and, of several, half the range."""
    text = f"{statistics.mean(values):.3g}"
    return text if len(values) < 2 else f"{text} ± {(max(values) - min(values)) / 2:.2g}"


def table(out, variants):
    print("| variant | settings | seeds | Frechet distance | precision | recall | bits/dim |")
    print("|---|---|---|---|---|---|---|")
    for name, settings in variants.items():
        folders = [f for f in sorted(out.glob(f"{name}-*")) if (f / "quality.json").exists()]
        quality = [json.loads((f / "quality.json").read_text(encoding="utf-8")) for f in folders]
        bound = [f / "eval.json" for f in folders if (f / "eval.json").exists()]
        bound = [json.loads(file.read_text(encoding="utf-8")) for file in bound]
        if quality:
            figures = [spread([q[key] for q in quality]) for key in ("frechet_distance", "precision", "recall")]
            bits = spread([b["bits_per_dim"] for b in bound]) if bound else ""
            print(f"| {name} | `{settings}` | {len(quality)} | {' | '.join(figures)} | {bits} |", flush=True)


def figure(out, variants, to):
    """Draws precision against recall and the Frechet distance, a point for each strength of guidance."""
    from matplotlib import pyplot as plt

    found = [(name, out / f"{name}-0" / "quality.json") for name in variants]
    found = [(name, json.loads(file.read_text(encoding="utf-8"))) for name, file in found if file.exists()]
    panes, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.8), layout="constrained")
    recall, precision, distance = ([q[key] for _, q in found] for key in ("recall", "precision", "frechet_distance"))
    left.plot(recall, precision, marker="o")
    for (name, _), x, y in zip(found, recall, precision):
        left.annotate(name, (x, y), textcoords="offset points", xytext=(6, 4))
    left.set(xlabel="recall (diversity)", ylabel="precision (quality)")
    left.margins(0.15)
    right.plot([float(name.split()[-1]) for name, _ in found], distance, marker="o")
    right.set(xlabel="strength of guidance", ylabel="Frechet distance", ylim=(0, None))
    panes.savefig(to, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("what", choices=list(TABLES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--run", help="the run to sample: for samplers, guidance and classifier")
    parser.add_argument("--flags", default="", help="further flags of quality, such as --classifier RUN")
    parser.add_argument("--settings", default="", help="settings of every training, such as 'steps=1200 batch=16'")
    parser.add_argument("--figure", help="also draw the table of guidance or classifier as this PNG; needs matplotlib")
    parser.add_argument("--only", help="names of variants, separated by semicolons")
    parser.add_argument("--program", default="target/release/ddpm-cuda")
    args = parser.parse_args()
    variants = TABLES[args.what]
    trains = args.what in ("recipes", "objectives")
    if args.run is None and not trains:
        sys.exit(f"{args.what} needs --run RUN")
    if args.only:
        wanted = args.only.split(";")
        unknown = [name for name in wanted if name not in variants]
        if unknown:
            sys.exit(f"there is no variant {unknown[0]!r}; there are {', '.join(variants)}")
        variants = {name: variants[name] for name in wanted}
    for seed in args.seeds.split(","):
        for name, settings in variants.items():
            try:
                folder = args.out / f"{name}-{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                model = trained(args.program, folder, f"{settings} {args.settings}", seed) if trains else args.run
                flags = args.flags.split() if trains else [*settings.split(), "--seed", seed, *args.flags.split()]
                judge(args.program, folder, model, "quality", flags)
                if args.what == "objectives":
                    judge(args.program, folder, model, "eval", ["--count", "40"])
            except subprocess.CalledProcessError as error:
                print(f"{name}, seed {seed}: {' '.join(error.cmd)} ended with {error.returncode}", file=sys.stderr)
    table(args.out, variants)
    if args.figure:
        figure(args.out, variants, args.figure)


main()

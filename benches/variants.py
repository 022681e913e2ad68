#!/usr/bin/env python3
"""Trains variants of the default run and judges each: the tables of docs/recipes.md.

    cargo build --release
    benches/variants.py OUT recipes [--seeds 0,1,2] [--only NAME,...] [--program target/release/ddpm-cuda]
    benches/variants.py OUT objectives ...

Every variant is `ddpm-cuda train` on the built-in digits with the settings below, then `quality` on 2,000 samples as
the default draws them, and `eval` on 100 held-out images. OUT/NAME-SEED/ keeps quality.json, eval.json, seconds.json
and the run; what is there is not done again, so a stopped comparison goes on. Needs Python alone. About 12 minutes a
variant and seed on two cores.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

# What one network does in the same number of steps: name, settings of the training.
RECIPES = {
    "before": "cooldown=0",
    "cooldown 0.25": "cooldown=0.25",
    "cooldown 0.5": "cooldown=0.5",
    "cooldown 1": "cooldown=1",
    "rate 2e-3, cooldown 1": "cooldown=1 learning_rate=2e-3",
    "ema 0.995": "cooldown=0.5 ema_decay=0.995",
    "stratified": "cooldown=0.5 timestep_sampling=stratified",
    "v": "cooldown=0.5 prediction=v",
    "x0": "cooldown=0.5 prediction=x0",
    "min-SNR": "cooldown=0.5 loss=min_snr",
    "v, min-SNR": "cooldown=0.5 prediction=v loss=min_snr",
    "linear": "cooldown=0.5 schedule=linear",
    "sigmoid": "cooldown=0.5 schedule=sigmoid",
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


def run(program, arguments, log):
    """Seconds that the program takes; its output goes to the file `log`."""
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as out:
        subprocess.run([program, *arguments], stdout=out, stderr=subprocess.STDOUT, check=True)
    return time.monotonic() - start


def judge(program, folder, settings, seed):
    folder.mkdir(parents=True, exist_ok=True)
    trained, seconds = folder / "run", folder / "seconds.json"
    if not seconds.exists():
        sets = [word for s in [*settings.split(), f"seed={seed}", "sample_every=0"] for word in ("--set", s)]
        resume = (trained / "config.toml").exists() and any((trained / "checkpoints").glob("*"))
        to = ["--resume", str(trained)] if resume else [*sets, "--out", str(trained)]
        took = run(program, ["train", *to], folder / "train.log")
        seconds.write_text(json.dumps({"train": took}), encoding="utf-8")
    for command, arguments in [("quality", []), ("eval", ["--count", "100"])]:
        to = folder / f"{command}.json"
        if not to.exists():
            arguments = [command, "--model", str(trained), "--data", "mnist", "--json", str(to), *arguments]
            run(program, arguments, folder / f"{command}.log")


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("what", choices=["recipes", "objectives"])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", help="names of variants, separated by semicolons")
    parser.add_argument("--program", default="target/release/ddpm-cuda")
    args = parser.parse_args()
    variants = RECIPES if args.what == "recipes" else OBJECTIVES
    if args.only:
        wanted = args.only.split(";")
        unknown = [name for name in wanted if name not in variants]
        if unknown:
            sys.exit(f"there is no variant {unknown[0]!r}; there are {', '.join(variants)}")
        variants = {name: variants[name] for name in wanted}
    for seed in args.seeds.split(","):
        for name, settings in variants.items():
            try:
                judge(args.program, args.out / f"{name}-{seed}", settings, seed)
            except subprocess.CalledProcessError as error:
                print(f"{name}, seed {seed}: {' '.join(error.cmd)} ended with {error.returncode}", file=sys.stderr)
    table(args.out, variants)


main()

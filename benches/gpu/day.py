#!/usr/bin/env python3
"""The first day on a GPU: everything worth knowing of a machine that is there for half an hour.

    day.sh [--emulated] STAGE... | all

Runs in a folder that pack.sh has filled, without Rust, a network or the repository. Each stage has its own time limit;
one that fails or runs out of time does not stop the next. record.json holds what has been measured, and is replaced
after every stage; logs/ holds what the programs said. README.md says what each stage gives and how the record is read.
"""

import argparse
import array
import csv
import datetime
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK, LOGS, RECORD = HERE / "work", HERE / "logs", HERE / "record.json"

# Of record.json; raised when a reader of the old form would misread the new one.
FORMAT = 1

# Two levels, attention at the lower one: milliseconds a step on a GPU, a second on the emulator.
TINY = ["--set", "widths=8,16", "--set", "groups=4", "--set", "attention_resolutions=14", "--set", "timesteps=50"]

# Whatever is measured, nothing else is done in the run. The first steps are as long as the others.
BARE = ["--set", "validate_every=0", "--set", "sample_every=0", "--set", "checkpoint_every=0"]
BARE += ["--set", "warmup_steps=0"]

# A test binary's tests on the emulator, where all of them take a quarter of an hour; without a line: all.
EMULATED_TESTS = {"ops": ["silu::"], "unet": ["the_kernels_agree_with_pytorch_in_bf16"],
                  "gpu": ["a_warm_step_allocates_nothing"], "kernels": ["a_launch_that_does_not_fit"],
                  "driver": ["nothing_can_be_copied"]}

# What is kept in the record of a kernel that ncu has measured in full.
NCU_FIGURES = [
    "gpu__time_duration.sum",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sector_hit_rate.pct",
    "l1tex__t_sector_hit_rate.pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "smsp__thread_inst_executed_per_inst_executed.ratio",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
    "launch__waves_per_multiprocessor",
]


class Failed(Exception):
    """A stage cannot go on; a sentence says why."""


class OutOfTime(Exception):
    """The stage's time is used up."""


class Absent(Exception):
    """The stage needs something that is not here; a sentence says what."""


class Ran:
    """A program that has ended: its exit code, its output, its seconds and those of processor time."""

    def __init__(self, code, out, err, seconds, cpu_s, stopped):
        self.code, self.out, self.err, self.seconds, self.cpu_s, self.stopped = code, out, err, seconds, cpu_s, stopped

    def last(self):
        """The last thing it said."""
        lines = [line for line in (self.out + self.err).splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it said nothing"


class Stage:
    """One stage at work: runs programs within its time and collects what it measures."""

    def __init__(self, day, name, limit):
        self.day, self.name, self.limit, self.lock = day, name, limit, threading.Lock()
        self.began, self.number = time.monotonic(), 0
        self.entry = {"state": "running", "limit_s": limit, "figures": {}, "facts": {}, "absent": {}}

    def left(self):
        """Seconds until the limit."""
        return self.began + self.limit - time.monotonic()

    def figure(self, name, values, unit):
        """A measured number with its spread."""
        values = [values] if isinstance(values, (int, float)) else list(values)
        if not values:
            raise Failed(f"{name} was not measured once")
        if not all(map(math.isfinite, values)):
            raise Failed(f"{name} is not finite: {values}")
        self.entry["figures"][name] = {"median": statistics.median(values), "min": min(values), "max": max(values),
                                       "runs": len(values), "unit": unit}

    def fact(self, name, value):
        """Anything else worth keeping."""
        self.entry["facts"][name] = value

    def absent(self, what, why):
        """A part of the stage that cannot be had here."""
        self.entry["absent"][what] = why

    def run(self, command, env=None, limit=None, check=True):
        """Runs a program to its end, or to the end of `limit` or of the stage, when its whole process group is killed.

        With `check` a program that fails, or was stopped, ends the stage.
        """
        with self.lock:
            self.number += 1
            number = self.number
        limit = min(limit or math.inf, self.left())
        if limit <= 0:
            raise OutOfTime()
        command = [str(part) for part in command]
        out, err = (LOGS / f"{self.name}-{number:03}.{stream}" for stream in ("out", "err"))
        with open(out, "wb") as to_out, open(err, "wb") as to_err:
            to_err.write(f"$ {' '.join(command)}\n".encode())
            to_err.flush()
            started = time.monotonic()
            try:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=to_out, stderr=to_err, cwd=WORK,
                                           env={**self.day.env, **(env or {})}, start_new_session=True)
            except OSError as e:
                raise Failed(f"{command[0]} does not start: {e.strerror}") from e
            stopped = threading.Event()

            def stop():
                stopped.set()
                kill(process)

            timer = threading.Timer(limit, stop)
            timer.start()
            try:
                _, status, usage = os.wait4(process.pid, 0)
            finally:
                timer.cancel()
                # Also what it has left running.
                kill(process)
            seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        read = lambda path: path.read_text(encoding="utf-8", errors="replace")
        ran = Ran(process.returncode, read(out), read(err).split("\n", 1)[1], seconds, usage.ru_utime + usage.ru_stime,
                  stopped.is_set())
        if ran.stopped and self.left() <= 1:
            raise OutOfTime()
        if check and (ran.stopped or ran.code != 0):
            what = f"was stopped after {seconds:.0f} s" if ran.stopped else f"ended with {ran.code}: {ran.last()}"
            raise Failed(f"{Path(command[0]).name} {what} (logs/{err.name})")
        return ran

    def train(self, name, network, steps, batch, precision="f32", env=None, wrap=(), every=None, keep=False, more=()):
        """Trains a fresh network for a few steps; returns the process and the images per second of each log line."""
        out = WORK / f"run-{name}"
        shutil.rmtree(out, ignore_errors=True)
        command = [*wrap, self.day.program, "train", "--device", "cuda", "--precision", precision, "--out", out]
        command += ["--steps", steps, "--batch", batch, *network, *BARE, "--set", f"log_every={every or steps}", *more]
        try:
            ran = self.run(command, env)
            log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        finally:
            if not keep:
                shutil.rmtree(out, ignore_errors=True)
        return ran, [line["images_per_s"] for line in log]

    def tool(self, name, *places):
        """A tool of CUDA's toolkit, or None, which is noted."""
        named, usual = os.environ.get(name.upper().replace("-", "_")), f"/usr/local/cuda/bin/{name}"
        for place in (named, shutil.which(name), *places, usual):
            if place and os.access(place, os.X_OK):
                return place
        self.absent(name, f"there is no {name} in PATH or /usr/local/cuda/bin")
        return None

    def twin(self, *args, limit=None):
        """What a command of twin.py measures."""
        device = "cpu" if self.day.emulated else "cuda"
        env = {"TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"), "TRITON_CACHE_DIR": str(WORK / "triton")}
        ran = self.run([self.day.python, HERE / "twin.py", *args, "--device", device], env, limit, check=False)
        lines = ran.out.strip().splitlines()
        if ran.stopped or not lines or not lines[-1].startswith("{"):
            what = f"was stopped after {ran.seconds:.0f} s" if ran.stopped else f"failed: {ran.last()}"
            raise Failed(f"twin.py {args[0]} {what}")
        return json.loads(lines[-1])

    def has_torch(self):
        """Whether there is PyTorch; notes it if not."""
        why = self.day.torch_is_absent(self)
        if why:
            self.absent("torch", why)
        return not why


def kill(process):
    """Ends a program and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


class Day:
    """The folder, its settings and its record."""

    def __init__(self, emulated):
        self.emulated = emulated
        if not (HERE / "pack.json").exists():
            sys.exit(f"{HERE}: holds no pack.json; day.sh runs in a folder that benches/gpu/pack.sh has filled")
        self.packed = json.loads((HERE / "pack.json").read_text())
        self.program = HERE / "bin" / "ddpm-cuda"
        self.python = os.environ.get("DDPM_DAY_PYTHON", sys.executable)
        self.torch = None
        unpack(self.packed["packed"])
        for folder in (WORK, LOGS):
            folder.mkdir(exist_ok=True)
        # Settings that happen to be there must not change what is measured.
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("DDPM_", "CUDA_EMU_", "RUST_"))}
        self.env["RUST_BACKTRACE"] = "1"
        if emulated:
            emulator = str(HERE / "bin" / "libcuda_emu.so")
            self.env.update(DDPM_CUDA_DRIVER=emulator, CUDA_EMU_CHECKS="fast", CUDA_EMU_LOG="errors")
        self.record = self.open_record()

    def open_record(self):
        """The record of this folder, if it is of this build and this kind of device; the old one is put aside."""
        new = {"format": FORMAT, **self.packed, "emulated": self.emulated, "began": now(), "card": None, "driver": None,
               "stages": {}}
        if not RECORD.exists():
            return new
        old = json.loads(RECORD.read_text())
        if all(old.get(key) == new[key] for key in ("format", "commit", "packed", "emulated")):
            return old
        aside = next(p for n in range(1, 10_000) if not (p := HERE / f"record-{n}.json").exists())
        RECORD.rename(aside)
        print(f"record.json is of another build or device; it is {aside.name} now")
        return new

    def write(self):
        """Replaces the record: a reader, or a machine that is switched off, finds the old one or the new one."""
        beside = RECORD.with_suffix(".partial")
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(self.record, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, RECORD)

    def torch_is_absent(self, stage):
        """Why there is no PyTorch for this device; empty if there is."""
        if self.torch is None:
            need = "import numpy, torch" if self.emulated else "import numpy, torch; torch.zeros(1).cuda()"
            ran = stage.run([self.python, "-c", need], limit=60, check=False)
            self.torch = "" if ran.code == 0 else f"{self.python}: {ran.last()}"
        return self.torch

    def network(self):
        """The network to measure: the paper's for CIFAR-10 on a GPU, a tiny one on the emulator."""
        if self.emulated:
            return TINY
        noise = WORK / "noise.npy"
        if not noise.exists():
            # Not zeros: products of zeros take less power, and then run faster than any real ones.
            write_npy(noise, "|u1", (2048, 32, 32, 3), random.Random(0).randbytes(2048 * 32 * 32 * 3))
        return ["--preset", "cifar10", "--data", str(noise)]

    def model(self, stage):
        """A model of that network whose weights are those of no fresh one, which predicts almost zero."""
        out = WORK / "run-model"
        if not any(checkpoint.name.isdigit() for checkpoint in out.glob("checkpoints/*")):
            batch = 2 if self.emulated else 16
            stage.train("model", self.network(), 5, batch, keep=True, more=["--set", "learning_rate=0.001"])
        return out

    def go(self, name, limit, work):
        """Runs one stage and writes the record."""
        for old in LOGS.glob(f"{name}-*"):
            old.unlink()
        stage = Stage(self, name, limit)
        stage.entry["began"] = now()
        try:
            work(stage)
            state, why = "done", None
        except OutOfTime:
            state, why = "timed out", f"{limit:g} s were not enough"
        except Absent as e:
            state, why = "absent", str(e)
        except Exception as e:  # Whatever it is, the next stage is worth its time.
            state, why = "failed", str(e) if isinstance(e, Failed) else f"{type(e).__name__}: {e}"
        stage.entry.update(state=state, seconds=round(time.monotonic() - stage.began, 1))
        if why:
            stage.entry["why"] = why
        self.record["stages"][name] = stage.entry
        self.write()
        show(name, stage.entry)
        return state


# -------------------------------------------------------------------------------------------------------------- stages


def card(stage):
    """Name, clocks, driver; copies and matrix products, which no kernel can beat."""
    day = stage.day
    said = stage.run([day.program, "info"], limit=30).out
    gpu = re.search(r"cuda:0 (.+), compute capability ([\d.]+).*, ([\d.]+) GiB", said)
    if not gpu:
        raise Failed("the program sees no GPU: " + " ".join(line for line in said.splitlines() if "GPU" in line))
    driver = re.search(r"^driver: (.+)$", said, re.M)
    day.record["card"] = {"name": gpu[1], "capability": gpu[2], "memory_gib": float(gpu[3])}
    day.record["driver"] = driver[1] if driver else None
    stage.fact("kernels", re.search(r"^kernels: (.+)$", said, re.M)[1])
    if day.emulated:
        stage.absent("nvidia-smi", "the emulator is no GPU")
    elif smi := stage.tool("nvidia-smi", "/usr/local/nvidia/bin/nvidia-smi"):
        keys = ["name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "clocks.mem",
                "power.limit", "temperature.gpu", "ecc.mode.current", "mig.mode.current"]
        command = [smi, f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "--id=0"]
        ran = stage.run(command, limit=15, check=False)
        values = [value.strip() for value in ran.out.strip().split(",")]
        day.record["card"]["nvidia-smi"] = dict(zip(keys, values)) if ran.code == 0 else ran.last()
    if stage.has_torch():
        rates = stage.twin("rates")
        stage.fact("torch", rates["torch"])
        for name, values in rates.items():
            if isinstance(values, list):
                stage.figure(name, values, "GB/s" if name.endswith("gb_s") else "TFLOP/s")


def start(stage):
    """One step from nothing and one more; the driver's compiler; memory against the estimate."""
    day, batch = stage.day, 2 if stage.day.emulated else 128
    precision = "bf16"

    def once(name, cache, jit=False):
        env = {"CUDA_CACHE_PATH": str(cache), **({"CUDA_FORCE_PTX_JIT": "1"} if jit else {})}
        ran, windows = stage.train("start", day.network(), 1, batch, precision, env)
        seconds.setdefault(name, []).append(ran.seconds)
        steps.setdefault(name, []).append(1e3 * batch / windows[0])
        for name, values in seconds.items():
            stage.figure(f"{name}_process", values, "s")
            stage.figure(f"{name}_step", steps[name], "ms")
        return ran

    seconds, steps = {}, {}
    caches = [WORK / f"cache-{n}" for n in range(3)]
    for cache in caches:
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir()
    stage.fact("said", once("cold", caches[0]).out.splitlines())
    said = once("warm", caches[0]).out
    once("warm", caches[0])
    once("cold", caches[1])
    needed = re.search(r"([\d.]+) GiB of memory needed", said)
    stage.figure("memory_needed", float(needed[1]), "GiB")
    if day.emulated:
        stage.absent("peak memory", "the emulator's memory is the host's")
    elif smi := stage.tool("nvidia-smi", "/usr/local/nvidia/bin/nvidia-smi"):
        peak = lambda network, n: peak_memory(stage, smi, lambda: stage.train("start", network, 3, n, precision))
        # A network of no size shows what the driver itself takes for a context and the loaded kernels.
        context, whole = peak(TINY, 2), peak(day.network(), batch)
        stage.figure("memory_of_context", context, "GiB")
        stage.figure("memory_peak", whole, "GiB")
        stage.figure("memory_peak_without_context", whole - context, "GiB")
    # Last, because it takes longest: as on a card for which the program holds no machine code.
    if day.emulated:
        stage.absent("compilation by the driver", "the emulator runs PTX as it is")
    else:
        once("cold_from_ptx", caches[2], jit=True)
        once("warm_from_ptx", caches[2], jit=True)


def peak_memory(stage, smi, work):
    """The most memory of the card, in GiB, that is in use while `work` runs, beside what was in use before."""
    ask = [smi, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    before = float(stage.run(ask, limit=15).out)
    with open(LOGS / "start-memory.txt", "wb") as to:
        watcher = subprocess.Popen([*ask, "-lms", "50"], stdout=to, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            work()
        finally:
            kill(watcher)
            watcher.wait()
    seen = [float(word) for word in (LOGS / "start-memory.txt").read_text().split() if re.fullmatch(r"\d+", word)]
    return (max(seen, default=before) - before) / 1024


def tests(stage):
    """Every test on the device; those that fail, or never came to their turn, once more, each in its own process."""
    day = stage.day
    env = test_settings(day)
    if not day.packed["tests"]:
        raise Absent("no test binary was packed")
    passed, failed, skipped, alone = 0, {}, set(), {}
    for name in day.packed["tests"]:
        binary, filters = HERE / "bin" / "tests" / name, EMULATED_TESTS.get(name, []) if day.emulated else []
        listed = stage.run([binary, "--list", *filters], env, limit=30)
        wanted = [line[: -len(": test")] for line in listed.out.splitlines() if line.endswith(": test")]
        if not wanted:
            raise Failed(f"{name} has no test of {filters}")
        # A kernel that hangs must leave time for the others.
        ran = stage.run([binary, *filters], env, limit=0.7 * stage.left(), check=False)
        outcome = outcomes(ran.out)
        skipped.update(re.findall(r"\*\*\* SKIPPED: (.*?) \*\*\*", ran.err))
        good = [test for test in wanted if outcome.get(test) in ("ok", "ignored")]
        passed += len(good)
        for test in sorted(set(wanted) - set(good)):
            failed[f"{name} {test}"] = outcome.get(test, "did not come to its end")
        stage.figure("passed", passed, "tests")
        stage.fact("failed", failed)
        stage.fact("skipped", sorted(skipped))
    # One fault breaks the context for all tests after it in its process.
    for full in failed:
        name, test = full.split(" ", 1)
        command = [HERE / "bin" / "tests" / name, "--exact", test, "--nocapture", "--test-threads=1"]
        ran = stage.run(command, {**env, "DDPM_TRACE": "sync"}, limit=60, check=False)
        good = not ran.stopped and outcomes(ran.out).get(test) == "ok"
        told = re.compile("panicked|failed with|error", re.I)
        said = [line for line in (ran.out + ran.err).splitlines() if told.search(line)]
        alone[full] = "ok" if good else ("it hangs" if ran.stopped else "; ".join(said[:4]) or ran.last())
        stage.fact("failed_alone", alone)
    still = [full for full, outcome in alone.items() if outcome != "ok"]
    stage.figure("failed_alone", len(still), "tests")
    if still:
        raise Failed(f"{len(still)} of {passed + len(failed)} tests fail alone, too: {', '.join(still[:5])}")


def test_settings(day):
    """Where test binaries find what they need, and where they run. They ask the emulator for all of its checks."""
    return {"DDPM_TEST_ROOT": str(HERE), "DDPM_TEST_PROGRAM": str(day.program),
            "DDPM_TEST_EMULATOR": str(HERE / "bin" / "libcuda_emu.so"), "CUDA_EMU_CHECKS": "all",
            "DDPM_TEST_DEVICE": "emulated" if day.emulated else "cuda"}


def outcomes(said):
    """What a test binary said of each of its tests: `test NAME ... ok`, with what the test printed before the `ok`."""
    found, name = {}, None
    for line in said.splitlines():
        if begun := re.match(r"test (\S+)(?: - should panic)? \.\.\. ", line):
            name = begun[1]
        if name and (outcome := re.search(r"(?:^|\W)(ok|FAILED|ignored)(?:, .*)?$", line)):
            found[name], name = outcome[1], None
    return found


def predict(stage):
    """Three networks, once each in f32, tf32 and bf16, against numbers of PyTorch in f64, recorded or computed here."""
    day, fixtures = stage.day, HERE / "tests" / "fixtures"
    has_torch = stage.has_torch()
    cases = [(name, fixtures / name) for name in ("unet_gray16", "unet_rgb16")]
    if has_torch:
        cases.append(("network", day.model(stage)))
    worst, bad = {}, []
    for name, model in cases:
        recorded = model / "io.safetensors"
        if recorded.exists():
            io = safetensors(recorded)
            shape, x = io["x"]
            t, labels, want = io["t"][1], io.get("labels", (None, None))[1], io["out"][1]
        else:
            rng, shape = random.Random(1), (4, 1, 28, 28) if day.emulated else (4, 3, 32, 32)
            x = [rng.gauss(0.0, 1.0) for _ in range(math.prod(shape))]
            t, labels, want = [0, 20, 30, 49] if day.emulated else [0, 10, 500, 999], None, None
        at = lambda what: WORK / f"{name}-{what}.npy"
        write_npy(at("x"), "<f4", shape, array.array("f", x).tobytes())
        write_npy(at("t"), "<f4", (len(t),), array.array("f", t).tobytes())
        args = ["--model", model, "--x", at("x"), "--t", at("t")]
        if labels:
            write_npy(at("labels"), "<i8", (len(labels),), array.array("q", labels).tobytes())
            args += ["--labels", at("labels")]
        if has_torch:
            stage.twin("predict", *args, "--out", at("{}"), "--precision", "f64", "f32", "tf32", "bf16")
            want = read_npy(at("f64"))
            for precision in ("f32", "tf32", "bf16"):
                error = apart(read_npy(at(precision)), want)
                stage.figure(f"{name}_{precision}_error_of_twin", error, "of the largest")
            if recorded.exists():
                checked = stage.twin("check", "--model", model)
                if not checked["agrees"]:
                    bad.append(f"the twin's {checked['worst']} in {name} by {checked['worst_error']:.1e}")
                stage.figure(f"{name}_gradients_error_of_twin", checked["worst_error"], "of the largest")
        for precision in ("f32", "tf32", "bf16"):
            command = [day.program, "predict", *args, "--device", "cuda", "--precision", precision, "--out", at("ours")]
            stage.run(command)
            worst[name, precision] = apart(read_npy(at("ours")), want)
            stage.figure(f"{name}_{precision}_error", worst[name, precision], "of the largest")
    # As tests/support/network.rs allows for a whole network: in bf16 it has some 50 to 200 operations, of which tf32
    # rounds both operands, to three bits more.
    allowed = {"f32": 2e-5, "tf32": math.sqrt(2) * 2.0 / 4096.0 * math.sqrt(2 * 200),
               "bf16": 2.0 / 512.0 * math.sqrt(2 * 200)}
    bad += [f"{name} in {p} by {error:.1e}" for (name, p), error in worst.items() if not error <= allowed[p]]
    if bad:
        raise Failed("numbers differ from PyTorch's: " + ", ".join(bad))


def apart(got, want):
    """The largest difference, relative to the largest number of `want`."""
    if len(got) != len(want):
        raise Failed(f"{len(got)} numbers were predicted, {len(want)} are wanted")
    if not all(map(math.isfinite, got)):
        return math.inf
    return max(abs(a - b) for a, b in zip(got, want)) / max(map(abs, want))


def sanitizer(stage):
    """compute-sanitizer's four tools on two training steps of a two-level network."""
    if stage.day.emulated:
        raise Absent("compute-sanitizer needs a GPU; the emulator's own checks are on in its tests")
    tool = stage.tool("compute-sanitizer")
    if not tool:
        raise Absent("there is no compute-sanitizer")
    tools, found = ("memcheck", "racecheck", "initcheck", "synccheck"), {}
    runs = [(precision, name) for precision in ("f32", "tf32", "bf16") for name in tools]
    for done, (precision, name) in enumerate(runs):
        out = WORK / "run-sanitizer"
        shutil.rmtree(out, ignore_errors=True)
        command = [tool, "--tool", name, "--print-limit", "20", stage.day.program, "train", "--device", "cuda"]
        command += ["--precision", precision, "--out", out, "--steps", "2", "--batch", "4", *TINY, *BARE]
        # One that takes very long leaves time for the others.
        ran = stage.run(command, limit=2 * stage.left() / (len(runs) - done), check=False)
        summary = re.search(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) (?:error|hazard)", ran.out + ran.err)
        key = f"{name}_{precision}"
        if summary is None:
            stage.absent(key, f"no summary after {ran.seconds:.0f} s: {ran.last()}")
            continue
        stage.figure(f"{key}_errors", int(summary[1]), "errors")
        if int(summary[1]):
            told = r"=+ +(?:Invalid|Error|Race|Uninit|Barrier|at )"
            found[key] = [line.strip("= ") for line in (ran.out + ran.err).splitlines() if re.match(told, line)][:6]
            stage.fact("found", found)
    if found:
        raise Failed("compute-sanitizer reports errors: " + ", ".join(sorted(found)))


# Precision, batch, steps of a window. A window of a step's time is long beside the reading of its measurements.
SPEEDS = [("bf16", 128, 20), ("f32", 128, 10), ("tf32", 128, 10), ("bf16", 512, 5)]


def speed(stage):
    """Images per second in training: the median of six windows after one to warm up."""
    day = stage.day
    for precision, batch, every in [("f32", 2, 1), ("tf32", 2, 1), ("bf16", 2, 1)] if day.emulated else SPEEDS:
        count = 2 if day.emulated else 6
        _, windows = stage.train("speed", day.network(), every * (count + 1), batch, precision, every=every)
        stage.figure(f"{precision}_{batch}", windows[1:], "images/s")


def kernels(stage):
    """Where the time of a step goes, kernel by kernel: by the program's events, and by ncu."""
    day, batch = stage.day, 2 if stage.day.emulated else 128
    for precision in ("bf16", "tf32", "f32"):
        ran, _ = stage.train("kernels", day.network(), 3, batch, precision, {"DDPM_TRACE": "time"})
        found = re.findall(r"^kernel time: (\S+), (\d+) launches, ([\d.]+) ms, ([\d.]+) %", ran.err, re.M)
        if not found:
            stage.absent(f"events_{precision}", "the program printed no line `kernel time: ...` for DDPM_TRACE=time")
            continue
        table = [{"name": n, "launches": int(k), "ms": float(ms), "percent": float(p)} for n, k, ms, p in found]
        stage.fact(f"events_{precision}", sorted(table, key=lambda row: -row["ms"]))
        stage.figure(f"events_{precision}_step", sum(row["ms"] for row in table) / 3, "ms")
    if day.emulated:
        stage.absent("ncu", "the emulator is no GPU")
    elif ncu := stage.tool("ncu"):
        for precision in ("bf16", "tf32", "f32"):
            log = LOGS / f"kernels-ncu-{precision}.csv"
            wrap = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
                    "--metrics", "gpu__time_duration.sum", "--log-file", log]
            stage.train("kernels", day.network(), 1, batch, precision, wrap=wrap)
            rows = {}
            for launch in ncu_rows(log):
                rows.setdefault(launch["Kernel Name"], []).append(number(launch["gpu__time_duration.sum"]) / 1e6)
            table = [{"name": name, "launches": len(ms), "ms": sum(ms), "longest": ms.index(max(ms))}
                     for name, ms in rows.items()]
            stage.fact(f"ncu_{precision}", sorted(table, key=lambda row: -row["ms"]))
            stage.figure(f"ncu_{precision}_step", sum(row["ms"] for row in table), "ms")
    if not stage.entry["figures"]:
        raise Failed("no kernel was timed: " + "; ".join(stage.entry["absent"].values()))


def ncu_rows(path):
    """The launches in a CSV of ncu's raw page: a line of names, a line of units, then one line for each."""
    lines = path.read_text(errors="replace").splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        raise Failed(f"ncu wrote no table: {lines[-1] if lines else 'nothing'}")
    return [row for row in csv.DictReader(lines[head:]) if row["ID"]]


def number(text):
    """A number of ncu's, which may have separators."""
    return float(text.replace(",", ""))


def ncu(stage):
    """ncu's full set for the longest launch of each of the eight heaviest kernels; the reports are in ncu/."""
    day = stage.day
    if day.emulated:
        raise Absent("ncu needs a GPU; the emulator's counters come from CUDA_EMU_PROFILE")
    tool = stage.tool("ncu")
    if not tool:
        raise Absent("there is no ncu")
    facts = day.record["stages"].get("kernels", {}).get("facts", {})
    heavy = facts.get("ncu_bf16") or facts.get("events_bf16")
    if not heavy:
        raise Failed("the stage kernels, which says which kernels are heavy, has no figures: run it first")
    (HERE / "ncu").mkdir(exist_ok=True)
    table = {}
    for row in heavy[:8]:
        report = HERE / "ncu" / row["name"]
        wrap = [tool, "--set", "full", "--clock-control", "none", "--kernel-name", row["name"], "--launch-count", "1",
                "--launch-skip", row.get("longest", 0), "--force-overwrite", "--export", report]
        stage.train("ncu", day.network(), 1, 128, "bf16", wrap=wrap)
        ran = stage.run([tool, "--import", f"{report}.ncu-rep", "--csv", "--page", "raw", "--print-units", "base"])
        csv_path = LOGS / f"ncu-{row['name']}.csv"
        csv_path.write_text(ran.out)
        launch = ncu_rows(csv_path)[0]
        table[row["name"]] = {key: number(launch[key]) for key in NCU_FIGURES if launch.get(key)}
        table[row["name"]].update(grid=launch.get("Grid Size"), block=launch.get("Block Size"))
        stage.fact("kernels", table)
    stage.figure("kernels", len(table), "kernels")


def variants(stage):
    """Kernels changed and rebuilt here by nvcc: do the tests pass, and is it faster. The list is variants.json."""
    day = stage.day
    nvcc = stage.tool("nvcc")
    if not nvcc:
        raise Absent("there is no nvcc to rebuild kernels with")
    stage.fact("nvcc", re.search(r"release ([\d.]+)", stage.run([nvcc, "--version"]).out)[1])
    refuse_unread_kernels(stage)
    ready = []
    for variant in json.loads((HERE / "variants.json").read_text()):
        name = variant["name"]
        if day.emulated:
            variant["stems"] = variant["stems"][:1]
        try:
            folder = rebuild(stage, nvcc, variant)
            env = {**test_settings(day), "DDPM_KERNELS": str(folder), "DDPM_TEST_ONE_SCHEDULE": "1"}
            if "ops" in day.packed["tests"]:
                # The tests of kernels: those of the CPU path have no kernels to vary.
                wanted = [f"{stem}::{start}" for stem in variant["stems"] for start in ("gpu", "the_gpu", "on_the_gpu")]
                ran = stage.run([HERE / "bin" / "tests" / "ops", *wanted], env, check=False)
                outcome = outcomes(ran.out)
                stage.fact(f"{name}_tests_failed", sorted(test for test in outcome if outcome[test] == "FAILED"))
                stage.figure(f"{name}_tests_passed", sum(o == "ok" for o in outcome.values()), "tests")
            ready.append((name, folder))
        except Failed as e:
            stage.absent(name, str(e))
    speeds, batch, every = {}, 2 if day.emulated else 128, 1 if day.emulated else 10
    for _ in range(1 if day.emulated else 2):
        # In turn, so that a card that gets warm slows all of them.
        for name, folder in [("built_in", None), *ready]:
            env = {"DDPM_KERNELS": str(folder)} if folder else {}
            _, windows = stage.train("variants", day.network(), 3 * every, batch, "bf16", env, every=every)
            speeds.setdefault(name, []).extend(windows[1:])
            stage.figure(f"{name}_bf16_{batch}", speeds[name], "images/s")
    for name, _ in ready:
        if not day.emulated:
            ratio = statistics.median(speeds[name]) / statistics.median(speeds["built_in"])
            stage.figure(f"{name}_to_built_in", ratio, "times as fast")
    if not ready:
        raise Failed("no variant could be built: " + "; ".join(stage.entry["absent"].values()))


def refuse_unread_kernels(stage):
    """Makes sure that the program reads DDPM_KERNELS: with kernels that are none it must fail."""
    broken = WORK / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "conv2d.ptx").write_text("no PTX\n")
    try:
        stage.train("variants", TINY, 1, 2, env={"DDPM_KERNELS": str(broken)})
    except Failed:
        return
    raise Absent("this program does not read DDPM_KERNELS: it trains with kernels that are none")


def rebuild(stage, nvcc, variant):
    """Compiles a variant's kernels; notes their registers. Returns the folder for DDPM_KERNELS."""
    source, folder = WORK / "variants" / f"{variant['name']}-source", WORK / "variants" / variant["name"]
    for old in (source, folder):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(HERE / "kernels", source)
    folder.mkdir(parents=True)
    for file, pattern, to in variant.get("patches", []):
        path = source / file
        text, count = re.subn(pattern, to, path.read_text())
        if count == 0:
            raise Failed(f"{file} has no place for {pattern!r}")
        path.write_text(text)
    flags = ["-ptx", "-arch=compute_80", "-std=c++17", "-O3", f"-I{source / 'include'}", *variant.get("flags", [])]

    def one(stem):
        raw, ptx = folder / f"{stem}.raw", folder / f"{stem}.ptx"
        stage.run([nvcc, *flags, source / f"{stem}.cu", "-o", raw])
        text = raw.read_text()
        # As in the build: nvcc declares the newest PTX version that it knows, which the driver may not; the built-in
        # file has one that does.
        own = re.search(r"^\.version \S+", (HERE / "kernels" / f"{stem}.ptx").read_text(), re.M)[0]
        ptx.write_text(re.sub(r"^\.version \S+", own, text, count=1, flags=re.M))
        raw.unlink()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, variant["stems"]))
    capability = (stage.day.record["card"] or {}).get("capability", "8.0").replace(".", "")
    if ptxas := stage.tool("ptxas", Path(nvcc).with_name("ptxas")):
        registers = {}
        for stem in variant["stems"]:
            command = [ptxas, "-v", f"-arch=sm_{capability}", folder / f"{stem}.ptx", "-o", "/dev/null"]
            said = stage.run(command, check=False)
            if said.code != 0:
                raise Failed(f"ptxas refuses {stem} of {variant['name']}: {said.last()}")
            of_entry = r"Compiling entry function '(\w+)'(.*?Used \d+ registers)"
            for entry, rest in re.findall(of_entry, said.err + said.out, re.S):
                spills = re.search(r"(\d+) bytes spill stores", rest)
                registers[entry] = [int(re.search(r"Used (\d+) registers", rest)[1]), int(spills[1]) if spills else 0]
        stage.fact(f"{variant['name']}_registers_and_spills", registers)
    return folder


# Precision, batch, mode. What is compared first comes first.
TWINS = [("bf16", 128, "eager"), ("bf16", 128, "compile"), ("bf16", 128, "reduce-overhead"), ("f32", 128, "eager"),
         ("bf16", 512, "reduce-overhead"), ("tf32", 128, "compile"), ("f32", 128, "compile")]


def twin(stage):
    """The same step in PyTorch: eager, compiled, compiled with graphs; and how much faster or slower ours is."""
    day = stage.day
    if not stage.has_torch():
        raise Absent(stage.entry["absent"]["torch"])
    model, best = day.model(stage), {}
    ours = day.record["stages"].get("speed", {}).get("figures", {})
    for precision, batch, mode in [("f32", 2, "eager")] if day.emulated else TWINS:
        name = f"{mode}_{precision}_{batch}"
        few = ["--steps", "1", "--windows", "2", "--warm-up", "1"] if day.emulated else []
        args = ["time", "--model", model, "--batch", batch, "--precision", precision, "--mode", mode, *few]
        try:
            measured = stage.twin(*args)
        except Failed as e:
            stage.absent(name, str(e))
            continue
        stage.figure(name, measured["images_per_s"], "images/s")
        stage.figure(f"{name}_warm_up", measured["warm_up_s"], "s")
        stage.fact("parameters", measured["parameters"])
        key = f"{precision}_{batch}"
        best[key] = max(best.get(key, 0.0), measured["median_images_per_s"])
        if key in ours and not day.emulated:
            stage.figure(f"ours_to_best_{key}", ours[key]["median"] / best[key], "times as fast")
    if day.emulated:
        stage.absent("ratio", "times of the emulator mean nothing")
    elif not ours:
        stage.absent("ratio", "the stage speed has no figures: run it first")
    if not best:
        raise Failed("the twin was not measured once: " + "; ".join(stage.entry["absent"].values()))


def host(stage):
    """What a step costs the host: steps a second where the GPU idles, processor time of a step, which is one launch of
    a graph, and of each of its launches without graphs."""
    day = stage.day
    few, many = (1, 3) if day.emulated else (100, 1100)
    launches = lambda ran: len(re.findall(r"^\w+ on \d+x\d+x\d+ blocks of ", ran.err, re.M))
    traced = [stage.train("host", TINY, steps, 2, env={"DDPM_TRACE": "1"})[0] for steps in (1, 3)]
    a_step = (launches(traced[1]) - launches(traced[0])) / 2
    stage.figure("launches_of_a_step", a_step, "launches")
    cpu, eager, rates = [], [], []

    def of_a_step(*more):
        short, _ = stage.train("host", TINY, few, 2, more=more)
        long, windows = stage.train("host", TINY, many, 2, every=1 if day.emulated else 100, more=more)
        return 1e3 * (long.cpu_s - short.cpu_s) / (many - few), windows

    for _ in range(1 if day.emulated else 3):
        ms, windows = of_a_step()
        cpu.append(ms)
        rates += [window / 2 for window in windows[1:]]
        eager.append(of_a_step("--eager")[0])
        stage.figure("steps", rates, "steps/s")
        stage.figure("processor_time_of_a_step", cpu, "ms")
        stage.figure("processor_time_of_a_launch", [1e3 * ms / a_step for ms in eager], "us")


# Name, seconds, work: in the order of `all`. The limits are for calls of at most ten minutes each: card to predict,
# sanitizer to ncu, variants to host.
STAGES = [("card", 75, card), ("start", 110, start), ("tests", 330, tests), ("predict", 70, predict),
          ("sanitizer", 200, sanitizer), ("speed", 130, speed), ("kernels", 100, kernels), ("ncu", 130, ncu),
          ("variants", 150, variants), ("twin", 250, twin), ("host", 40, host)]

# --------------------------------------------------------------------------------------------------------------- files


def now():
    """The time, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def unpack(packed):
    """The programs, which travel as one archive: they hold the same kernels, so together they are small."""
    archive, stamp = HERE / "binaries.tar.xz", HERE / "bin" / "packed"
    if stamp.exists() and stamp.read_text() == packed:
        return
    partial = HERE / "unpacked.partial"
    for old in (partial, HERE / "bin"):
        shutil.rmtree(old, ignore_errors=True)
    with tarfile.open(archive, "r:xz") as tar:
        tar.extractall(partial, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    for image in (partial / "kernels").iterdir():
        os.replace(image, HERE / "kernels" / image.name)
    os.replace(partial / "bin", HERE / "bin")
    shutil.rmtree(partial)
    # Last, since it says that all of it is there.
    stamp.write_text(packed)


def write_npy(path, kind, shape, data):
    """An array in NumPy's format 1.0."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({', '.join(map(str, shape))},), }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + data)


def read_npy(path):
    """The numbers of an array of f32."""
    data = path.read_bytes()
    if data[:6] != b"\x93NUMPY" or b"'<f4'" not in data[:200]:
        raise Failed(f"{path} is no array of f32")
    (length,) = struct.unpack("<H", data[8:10])
    return array.array("f", data[10 + length :])


def safetensors(path):
    """Shape and numbers of each tensor of a safetensors file, but for the gradients."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    kinds, found = {"F32": "f", "I32": "i"}, {}
    for name, info in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__" and not name.startswith("grad"):
            begin, end = (8 + length + offset for offset in info["data_offsets"])
            found[name] = (info["shape"], array.array(kinds[info["dtype"]], data[begin:end]))
    return found


# --------------------------------------------------------------------------------------------------------------- table


def show(name, entry):
    """A stage's part of the table."""
    line = f"{name:<10} {entry['state']:<10} {entry['seconds']:7.1f} s of {entry['limit_s']}  {entry.get('why', '')}"
    print(line.rstrip())
    for figure, f in entry["figures"].items():
        spread = f" ({f['min']:.6g} to {f['max']:.6g}, {f['runs']} runs)" if f["runs"] > 1 else ""
        print(f"    {figure:<42} {f['median']:12.6g} {f['unit']}{spread}")
    for what, why in entry["absent"].items():
        print(f"    {what:<42}       absent {why}")
    sys.stdout.flush()


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="day.sh", description=__doc__, formatter_class=formatter)
    names = [name for name, _, _ in STAGES]
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"all, or some of: {', '.join(names)}")
    emulated = "on the emulator, with tiny networks; its times mean nothing"
    parser.add_argument("--emulated", action="store_true", help=emulated)
    parser.add_argument("--limit", type=float, metavar="S", help="seconds for each stage in place of its own limit")
    parser.add_argument("--limits", action="store_true", help="print the time limit of each stage in seconds, and exit")
    args = parser.parse_args()
    if args.limits:
        for name, limit, _ in STAGES:
            print(f"{name} {limit}")
        return 0
    wanted = names if "all" in args.stages else args.stages
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        parser.error(f"{', '.join(unknown) or 'no stage'}: all, or some of {', '.join(names)} are expected")
    # So that what a stage has started ends with it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    day = Day(args.emulated)
    states = [day.go(name, args.limit or limit, work) for name, limit, work in STAGES if name in wanted]
    print(f"record: {RECORD}")
    return 0 if all(state in ("done", "absent") for state in states) else 1


if __name__ == "__main__":
    sys.exit(main())

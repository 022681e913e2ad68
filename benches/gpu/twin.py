#!/usr/bin/env python3
"""The same training step in plain PyTorch, to compare with: numbers, then times.

    twin.py check --model M [--io IO]                     loss and gradients against recorded ones
    twin.py update --before C --after C                   clipping, Adam and moving average against two checkpoints
    twin.py predict --model M --x X --t T --out OUT       one evaluation, as `ddpm-cuda predict`
    twin.py time --model M --batch N --precision P --mode eager|compile|reduce-overhead
    twin.py rates                                         copies and matrix products of the device

M is a model folder as ddpm-cuda writes and diffusers reads it. Each command prints one line of JSON. Needs PyTorch and
numpy, neither diffusers nor safetensors. Without --device it takes a GPU where there is one.
"""

import argparse
import json
import math
import os
import statistics
import struct
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# The recipe of the preset cifar10, which is the paper's.
LEARNING_RATE = 2e-4
GRAD_CLIP = 1.0
EMA_DECAY = 0.9999

# Largest error of a tensor, relative to its largest element: as tests/support/network.rs has it for f32.
TOLERANCE = 2e-5

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I32": torch.int32,
          "I64": torch.int64, "U8": torch.uint8}


# ------------------------------------------------------------------------------------------------------------- network


class Resnet(nn.Module):
    """x + conv2(dropout(silu(norm2(conv1(silu(norm1 x)) + proj temb)))), with a 1x1 shortcut if the widths differ."""

    def __init__(self, c_in, c_out, features, groups, eps, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(features, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, temb):
        shift = self.time_emb_proj(temb)[:, :, None, None]  # (n, c, 1, 1)
        h = self.conv1(F.silu(self.norm1(x))) + shift  # (n, c, h, w)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (n, c, h, w)
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """x + out(softmax(q k^T / sqrt d) v) over the pixels."""

    def __init__(self, c, heads, groups, eps):
        super().__init__()
        self.heads = heads
        self.group_norm = nn.GroupNorm(groups, c, eps)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        n, c, h, w = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (n, hw, c)
        q, k, v = (p(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        y = F.scaled_dot_product_attention(q, k, v)  # (n, heads, hw, d)
        y = self.to_out[0](y.transpose(1, 2).flatten(2))  # (n, hw, c)
        return x + y.transpose(1, 2).unflatten(2, (h, w))


class Resample(nn.Module):
    """The 3x3 convolution between two levels, under the name that the files have."""

    def __init__(self, c, stride, padding):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=stride, padding=padding)


class Level(nn.Module):
    """Residual blocks, each followed by attention or none is."""

    def __init__(self, resnets, attentions):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)

    def block(self, j, x, temb):
        x = self.resnets[j](x, temb)
        return self.attentions[j](x) if hasattr(self, "attentions") else x


class UNet(nn.Module):
    """eps_theta(x_t, t), from the config.json of a model folder; parameters have the names of its weights."""

    def __init__(self, config):
        super().__init__()
        get = config.get
        widths, blocks = config["block_out_channels"], get("layers_per_block", 2)
        groups, eps, dropout = get("norm_num_groups", 32), get("norm_eps", 1e-5), get("dropout", 0.0)
        head_dim, features = get("attention_head_dim", 8), 4 * widths[0]
        self.width, self.freq_shift, self.flip = widths[0], get("freq_shift", 0), get("flip_sin_to_cos", True)
        self.padding = get("downsample_padding", 1)

        def level(attention, pairs):
            heads = lambda c: c // head_dim if head_dim else 1
            resnets = [Resnet(a, b, features, groups, eps, dropout) for a, b in pairs]
            return Level(resnets, [Attention(b, heads(b), groups, eps) for _, b in pairs] if attention else [])

        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = nn.ModuleDict(
            {"linear_1": nn.Linear(widths[0], features), "linear_2": nn.Linear(features, features)}
        )
        if get("num_class_embeds"):
            self.class_embedding = nn.Embedding(config["num_class_embeds"], features)

        c, skips, down, up = widths[0], [widths[0]], [], []
        for i, width in enumerate(widths):
            pairs = [(c if j == 0 else width, width) for j in range(blocks)]
            down.append(level("Attn" in config["down_block_types"][i], pairs))
            skips += [width] * blocks
            c = width
            if i + 1 < len(widths):
                down[-1].downsamplers = nn.ModuleList([Resample(c, 2, self.padding)])
                skips.append(c)
        middle = level(True, [(c, c), (c, c)])
        del middle.attentions[1]
        for i, width in enumerate(reversed(widths)):
            pairs = [((c if j == 0 else width) + skips.pop(), width) for j in range(blocks + 1)]
            up.append(level("Attn" in config["up_block_types"][i], pairs))
            c = width
            if i + 1 < len(widths):
                up[-1].upsamplers = nn.ModuleList([Resample(c, 1, 1)])
        self.down_blocks, self.mid_block, self.up_blocks = nn.ModuleList(down), middle, nn.ModuleList(up)
        self.conv_norm_out = nn.GroupNorm(groups, c, eps)
        self.conv_out = nn.Conv2d(c, config["out_channels"], 3, padding=1)

    def embed(self, t):
        """Sines and cosines of the timesteps, in f64, (n, width)."""
        half = self.width // 2
        k = torch.arange(half, dtype=torch.float64, device=t.device)
        angles = t.double()[:, None] * torch.exp(-math.log(1e4) * k / max(half - self.freq_shift, 1))
        parts = [angles.cos(), angles.sin()] if self.flip else [angles.sin(), angles.cos()]
        return F.pad(torch.cat(parts, 1), (0, self.width % 2))

    def forward(self, x, t, labels=None):
        temb = self.embed(t).to(x.dtype)
        temb = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](temb)))  # (n, features)
        if labels is not None:
            temb = temb + self.class_embedding(labels)
        temb = F.silu(temb)

        h = self.conv_in(x)
        skips = [h]
        for level in self.down_blocks:
            for j in range(len(level.resnets)):
                h = level.block(j, h, temb)
                skips.append(h)
            if hasattr(level, "downsamplers"):
                if self.padding == 0:
                    h = F.pad(h, (0, 1, 0, 1))
                h = level.downsamplers[0].conv(h)
                skips.append(h)
        h = self.mid_block.resnets[0](h, temb)
        h = self.mid_block.attentions[0](h)
        h = self.mid_block.resnets[1](h, temb)
        for level in self.up_blocks:
            for j in range(len(level.resnets)):
                h = level.block(j, torch.cat([h, skips.pop()], 1), temb)
            if hasattr(level, "upsamplers"):
                h = level.upsamplers[0].conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(h)))


# --------------------------------------------------------------------------------------------------------------- files


def tensors(path):
    """Every tensor of a safetensors file, by name, and its metadata."""
    with open(path, "rb") as file:
        data = bytearray(file.read())
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__", {})

    def one(info):
        start, end = (8 + size + offset for offset in info["data_offsets"])
        # Copied, because the data of a file need not be aligned.
        return torch.frombuffer(data[start:end], dtype=DTYPES[info["dtype"]]).reshape(info["shape"])

    return {name: one(info) for name, info in header.items()}, metadata


def folder(model):
    """The folder of the U-Net: of a model, of a checkpoint, or of a run's newest checkpoint."""
    checkpoints = os.path.join(model, "checkpoints")
    if os.path.isdir(checkpoints):
        model = os.path.join(checkpoints, max(filter(str.isdigit, os.listdir(checkpoints)), key=int))
    unet = os.path.join(model, "unet")
    return unet if os.path.isdir(unet) else model


def load(model, dtype=torch.float32):
    """The network with the weights of a model folder, which must have exactly its parameters."""
    place = folder(model)
    with open(os.path.join(place, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    weights, _ = tensors(os.path.join(place, "diffusion_pytorch_model.safetensors"))
    with torch.device("meta"):
        unet = UNet(config)
    ours = sum(w.numel() for w in weights.values())
    twins = sum(p.numel() for p in unet.parameters())
    assert ours == twins, f"{model} has {ours} parameters, the twin {twins}"
    unet.load_state_dict(weights, strict=True, assign=True)
    return unet.to(dtype), config, twins


# ------------------------------------------------------------------------------------------------------------- numbers


def share(got, want, scale=None):
    """The largest error, relative to the largest element."""
    largest = want.double().abs().max().item() if scale is None else scale
    return (got.double().cpu() - want.double()).abs().max().item() / largest


def check(args):
    """L_simple and every gradient for recorded inputs: x, t, target, labels -> loss, out, grad_x, grad.NAME."""
    exact(args.precision)
    dtype = {"f32": torch.float32, "f64": torch.float64}[args.precision]
    unet, _, count = load(args.model, dtype)
    io, _ = tensors(args.io or os.path.join(folder(args.model), "io.safetensors"))
    unet = unet.to(args.device).eval()
    x = io["x"].to(args.device, dtype).requires_grad_()
    labels = io["labels"].to(args.device) if "labels" in io else None
    out = unet(x, io["t"].to(args.device), labels)
    loss = F.mse_loss(out, io["target"].to(args.device, dtype))
    loss.backward()

    # Gradients that are zero but for rounding, such as that of the bias of the keys, are judged by those beside them.
    block = lambda name: ".".join(name.split(".")[:4])
    of_block = {}
    for name, _ in unet.named_parameters():
        largest = io[f"grad.{name}"].double().abs().max().item()
        of_block[block(name)] = max(largest, of_block.get(block(name), 0.0))
    errors = {"loss": abs(loss.item() - io["loss"].item()) / io["loss"].item(), "out": share(out.detach(), io["out"]),
              "grad_x": share(x.grad, io["grad_x"])}
    for name, p in unet.named_parameters():
        want, scale = io[f"grad.{name}"], of_block[block(name)]
        tiny = want.double().abs().max().item() <= 1e-9 * scale
        errors[f"grad.{name}"] = share(p.grad, want, scale if tiny else None)
    worst = max(errors, key=errors.get)
    agrees = errors[worst] <= TOLERANCE
    result = {"parameters": count, "tensors": len(errors), "loss": loss.item(), "recorded_loss": io["loss"].item(),
              "loss_error": errors["loss"], "out_error": errors["out"], "worst": worst, "worst_error": errors[worst],
              "tolerance": TOLERANCE, "agrees": agrees}
    return result, 0 if agrees else 1


def update(args):
    """One step's clipped gradient, Adam and moving average, from two checkpoints of a run, one step apart.

    The first moments before and after give the gradient that Adam was given, which must not be longer than clipping
    allows; Adam and the moving average must lead with it from the numbers before to those after.
    """

    def read(place):
        state, metadata = tensors(os.path.join(place, "training_state.safetensors"))
        averages, _ = tensors(os.path.join(folder(place), "diffusion_pytorch_model.safetensors"))
        numbers = lambda part: [state[f"{part}.{name}"].double() for name in averages]
        parts = {part: numbers(part) for part in ("weights", "adam_m", "adam_v")}
        return {**parts, "ema": [w.double() for w in averages.values()], "step": int(metadata["step"])}

    before, after = read(args.before), read(args.after)
    step = after["step"]
    assert step == before["step"] + 1, f"{args.before} is of step {before['step']}, {args.after} of step {step}"
    params = [w.clone().requires_grad_() for w in before["weights"]]
    optimiser = torch.optim.Adam(params, lr=args.learning_rate)
    for p, m, v, next_m in zip(params, before["adam_m"], before["adam_v"], after["adam_m"]):
        p.grad = (next_m - 0.9 * m) / 0.1
        optimiser.state[p] = {"step": torch.tensor(float(step - 1)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    norm = math.sqrt(sum((p.grad * p.grad).sum().item() for p in params))
    optimiser.step()
    with torch.no_grad():
        # The average of a young run is shorter.
        torch._foreach_lerp_(before["ema"], params, 1.0 - min(args.ema_decay, (1.0 + step) / (10.0 + step)))
    largest = lambda all: max(x.abs().max().item() for x in all)
    apart = lambda got, want: largest([g.detach() - w for g, w in zip(got, want)])
    got_v = [optimiser.state[p]["exp_avg_sq"] for p in params]
    moved = apart(params, before["weights"])
    errors = {"weights_error": apart(params, after["weights"]) / moved,
              "ema_error": apart(before["ema"], after["ema"]) / moved,
              "adam_v_error": apart(got_v, after["adam_v"]) / largest(after["adam_v"])}
    # Weights and averages are rounded to f32, beside an update of the learning rate; the rest is a few roundings.
    allowed = 2.0**-23 * largest(params) / moved + TOLERANCE
    agrees = max(errors.values()) <= allowed and norm <= GRAD_CLIP * (1 + TOLERANCE)
    result = {"step": step, "clipped_norm": norm, "largest_update": moved, **errors, "allowed": allowed}
    return {**result, "agrees": agrees}, 0 if agrees else 1


def predict(args):
    """The network's output for x (n, c, h, w) and t (n) from .npy files, into others, f32; `{}` is the precision."""
    read = lambda path: torch.from_numpy(np.load(path)).to(args.device)
    labels = read(args.labels).long() if args.labels else None
    for precision in args.precision:
        exact(precision)
        dtype = torch.float64 if precision == "f64" else torch.float32
        unet, _, count = load(args.model, dtype)
        unet = unet.to(args.device).eval()
        with torch.inference_mode(), autocast(args.device, precision):
            out = unet(read(args.x).to(dtype), read(args.t), labels)
        np.save(args.out.replace("{}", precision), out.float().cpu().numpy())
    return {"parameters": count}, 0


# --------------------------------------------------------------------------------------------------------------- times


def autocast(device, precision):
    """bf16 activations over f32 weights, as ddpm-cuda has them; nothing in other precisions."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def exact(precision):
    """f32 means f32: without it PyTorch's convolutions may use tf32, which is what ddpm-cuda calls so too."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True


def windows(device, work, steps, count, warm_up):
    """Seconds a call of `work` takes, for each of `count` windows of `steps` calls; and what the warm-up took."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    started = time.perf_counter()
    for _ in range(warm_up):
        work()
    wait()
    warm_up_s = time.perf_counter() - started
    seconds = []
    for _ in range(count):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(steps):
                work()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3 / steps)
        else:
            began = time.perf_counter()
            for _ in range(steps):
                work()
            seconds.append((time.perf_counter() - began) / steps)
    return seconds, warm_up_s


def timing(args):
    """A training step: draw, q_sample, forward, L_simple, backward, clip, Adam, moving average."""
    exact(args.precision)
    torch.manual_seed(0)
    unet, config, count = load(args.model)
    unet = unet.to(args.device, memory_format=torch.channels_last).train()
    params = list(unet.parameters())
    ema = [p.detach().clone() for p in params]
    fused = {"fused": True} if args.device == "cuda" else {}
    optimiser = torch.optim.Adam(params, lr=LEARNING_RATE, **fused)
    size, channels, batch = config["sample_size"], config["in_channels"], args.batch
    h, w = (size, size) if isinstance(size, int) else size
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1.0 - betas, 0).float().to(args.device)
    images = torch.randint(0, 256, (2048, channels, h, w), dtype=torch.uint8, device=args.device)
    images = images.contiguous(memory_format=torch.channels_last)
    classes = config.get("num_class_embeds")

    def loss_of(x_0, t, eps, labels):
        a = alpha_bar[t][:, None, None, None]
        with autocast(args.device, args.precision):
            out = unet(a.sqrt() * x_0 + (1.0 - a).sqrt() * eps, t, labels)
        return F.mse_loss(out.float(), eps)

    modes = {"eager": lambda f: f, "compile": torch.compile,
             "reduce-overhead": lambda f: torch.compile(f, mode="reduce-overhead")}
    compiled = modes[args.mode](loss_of)

    def step():
        if args.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        rows = torch.randint(0, len(images), (batch,), device=args.device)
        x_0 = images[rows].float() / 127.5 - 1.0
        mirrored = torch.rand(batch, 1, 1, 1, device=args.device) < 0.5
        x_0 = torch.where(mirrored, x_0.flip(3), x_0).contiguous(memory_format=torch.channels_last)
        t = torch.randint(0, 1000, (batch,), device=args.device)
        labels = torch.randint(0, classes, (batch,), device=args.device) if classes else None
        loss = compiled(x_0, t, torch.randn_like(x_0), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, GRAD_CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1.0 - EMA_DECAY)

    seconds, warm_up_s = windows(args.device, step, args.steps, args.windows, args.warm_up)
    result = {"mode": args.mode, "precision": args.precision, "batch": batch, "parameters": count,
              "images_per_s": [batch / s for s in seconds], "ms": [1e3 * s for s in seconds], "warm_up_s": warm_up_s,
              "torch": torch.__version__, "threads": torch.get_num_threads()}
    if args.device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result, 0


def rates(args):
    """GB/s of copies and TFLOP/s of matrix products on random numbers: what the device can reach."""
    device, small = args.device, args.device != "cuda"
    n, megabytes = (256, 4) if small else (8192, 256)
    result = {"device": torch.cuda.get_device_name() if not small else "CPU", "torch": torch.__version__}
    pinned = torch.empty(megabytes << 20, dtype=torch.uint8, pin_memory=not small).random_()
    pageable = torch.empty(megabytes << 20, dtype=torch.uint8).random_()
    there, other = (torch.empty(megabytes << 20, dtype=torch.uint8, device=device).random_() for _ in range(2))
    copies = {"host_to_device_pinned": (there, pinned, 1), "host_to_device_pageable": (there, pageable, 1),
              "device_to_host_pinned": (pinned, there, 1), "device_to_device": (other, there, 2)}
    for name, (to, origin, passes) in copies.items():
        seconds, _ = windows(device, lambda: to.copy_(origin, non_blocking=True), 4, args.windows, 2)
        result[f"{name}_gb_s"] = [passes * (megabytes << 20) / s / 1e9 for s in seconds]
    for precision, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("f32", torch.float32)):
        exact(precision)
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds, _ = windows(device, lambda: a @ b, 4, args.windows, 2)
        result[f"{precision}_tflop_s"] = [2.0 * n**3 / s / 1e12 for s in seconds]
    return result, 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, precisions=("f32",), several=False):
        sub = commands.add_parser(name, help=run.__doc__.split("\n")[0])
        sub.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
        more = {"nargs": "+", "default": precisions[:1]} if several else {"default": precisions[0]}
        sub.add_argument("--precision", choices=precisions, **more)
        sub.set_defaults(run=run)
        return sub

    sub = command("check", check, ("f32", "f64"))
    sub.add_argument("--model", required=True)
    sub.add_argument("--io", help="recorded numbers; default: io.safetensors beside the weights")
    sub = command("update", update)
    sub.add_argument("--before", required=True)
    sub.add_argument("--after", required=True)
    sub.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    sub.add_argument("--ema-decay", type=float, default=EMA_DECAY)
    sub = command("predict", predict, ("f32", "tf32", "bf16", "f64"), several=True)
    for name in ("model", "x", "t", "out"):
        sub.add_argument(f"--{name}", required=True)
    sub.add_argument("--labels")
    sub = command("time", timing, ("f32", "tf32", "bf16"))
    sub.add_argument("--model", required=True)
    sub.add_argument("--batch", type=int, required=True)
    sub.add_argument("--mode", choices=["eager", "compile", "reduce-overhead"], required=True)
    sub.add_argument("--steps", type=int, default=10, help="steps of a window")
    sub.add_argument("--windows", type=int, default=5)
    sub.add_argument("--warm-up", type=int, default=5, help="steps before the first window")
    sub = command("rates", rates)
    sub.add_argument("--windows", type=int, default=5)
    args = parser.parse_args()
    result, code = args.run(args)
    for name, values in list(result.items()):
        if isinstance(values, list):
            result[f"median_{name}"] = statistics.median(values)
    print(json.dumps(result))
    return code


if __name__ == "__main__":
    sys.exit(main())

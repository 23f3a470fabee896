"""Week 1: an AC-WGAN-GP on MNIST.

The log trained a Wasserstein GAN with gradient penalty (Gulrajani et al. 2017, arXiv 1704.00028) whose generator is told
which digit to draw and is held to it by an auxiliary classifier (Odena et al. 2017, arXiv 1610.09585), and showed 32
"nice" samples. This script trains one, draws the same figure, and measures: how often an independent classifier reads
the digit that was asked for, and how far the samples are from MNIST's test images.

    python acwgan.py                          the default run, minutes on two CPU cores
    python acwgan.py --epochs 50              the run of the README
    python acwgan.py --epochs 50 --resume     goes on where that run was stopped
    python acwgan.py --benchmark              where the time of a training step goes

Writes into --out: checkpoint.pt, samples.npz (images uint8 (N, 28, 28), labels int64 (N,)), AC-WGAN_GP.png, results.json.
"""

import copy
import math
import time

from common import (
    Failure,
    Misuse,
    Stopped,
    ctrl_c,
    frechet_distance,
    load_checkpoint,
    load_digits,
    make_folder,
    parser,
    percent,
    pick_device,
    positive,
    run,
    save_checkpoint,
    save_npz,
    save_png,
    whole,
    wilson,
    write_results,
)


def settings(argv=None):
    """The flags. A default is what reached the README's quality soonest on two CPU cores; in brackets, the log's."""
    p = parser(__doc__, "acwgan", "auto", ("auto", "mnist", "glyphs"))
    add = p.add_argument
    add("--epochs", type=whole(1), default=3, help="passes over the training images [about 13]")
    add("--batch-size", type=whole(2), default=32, help="real images per step [64]")
    add("--critic-steps", type=whole(1), default=1, help="critic steps per generator step, on one real batch [5]")
    add("--critic-lr", type=positive, default=2e-3, help="Adam's step size for the critic [1e-4]")
    add("--generator-lr", type=positive, default=4e-3, help="Adam's step size for the generator [1e-4]")
    add("--beta2", type=positive, default=0.99, help="Adam's second beta; the first is 0 [0.9]")
    add("--decay", choices=("linear", "none"), default="linear", help="of both step sizes, to 0 at the end [none]")
    add("--penalty", type=positive, default=10.0, help="weight of the gradient penalty, lambda [10]")
    add("--penalty-share", type=positive, default=0.5, help="share of the batch it is taken on [1]")
    add("--latent", type=whole(11), default=74, help="the generator's input numbers, ten of them the class [100]")
    add("--image-size", type=int, choices=(28, 64), default=28, help="pixels the networks work at [64]")
    add("--width", type=whole(1), default=32, help="channels of the networks' widest maps; multiplied by depth [64]")
    add("--average", type=float, default=0.999, help="decay per step of the averaged generator; 0: no averaging [0]")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where the hardware has it")
    add("--samples", type=whole(10), default=10_000, help="images in samples.npz and in every measured number")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--benchmark", action="store_true", help="time the training step as it is and without each speed-up, and stop")
    args = p.parse_args(argv)
    if not (0 <= args.average < 1 and args.beta2 < 1 and args.penalty_share <= 1):
        p.error("--average must lie in [0, 1), --beta2 in (0, 1), --penalty-share in (0, 1]")
    if args.resume and args.benchmark:
        p.error("--benchmark trains nothing that --resume could go on with")
    return args


if __name__ == "__main__":
    settings()  # --help and a mistyped flag answer before torch loads

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

CLASSES = 10

# ------------------------------------------------------------------------------------------------------------ networks


def leaky_relu(x):
    """max(x, x / 5), written as a product with a constant.

    The gradient penalty differentiates the backward pass, and there autograd's own leaky ReLU sends its second
    derivative, all zeros, back through the whole network once more. A constant slope has nothing to send.
    """
    return x * x.detach().sign().mul_(0.4).add_(0.6)


class Generator(nn.Module):
    """Draws the digits it is asked for: latent (N, latent) and labels (N,) int64 -> images (N, 1, S, S) in [0, 1].

    As in the log, the first ten latent numbers are overwritten by the one-hot label, and the network is DCGAN's
    (Radford et al. 2015): transposed convolutions with batch norm. It starts at 7 or 8 pixels; its last doubling is a
    pixel shuffle, because a convolution to one channel keeps a CPU's vector units idle.
    """

    def __init__(self, latent=74, width=32, image_size=28):
        super().__init__()
        self.latent, self.image_size = latent, image_size
        self.start = {28: 7, 64: 8}[image_size]
        doublings = (image_size // self.start).bit_length() - 2  # but the pixel shuffle's
        wide = width << doublings + 1
        self.project = nn.Linear(latent, wide * self.start**2, bias=False)
        layers = [nn.BatchNorm2d(wide), nn.ReLU()]
        layers += [nn.Conv2d(wide, wide // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(wide // 2), nn.ReLU()]
        for depth in range(doublings):
            c = wide >> depth + 1
            layers += [nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(c // 2), nn.ReLU()]
        self.draw = nn.Sequential(*layers, nn.Conv2d(width, 4, 3, 1, 1), nn.PixelShuffle(2), nn.Sigmoid())
        self.to(memory_format=torch.channels_last)

    def forward(self, latent, labels):
        code = torch.cat([F.one_hot(labels, CLASSES).to(latent), latent[:, CLASSES:]], 1)
        maps = self.project(code).view(len(code), -1, self.start, self.start)
        return self.draw(maps.contiguous(memory_format=torch.channels_last))


class Critic(nn.Module):
    """Images (N, 1, S, S) in [0, 1] -> Wasserstein score (N,) and the auxiliary classifier's logits (N, 10).

    Critic and classifier share a trunk without any normalisation: the penalty holds each example's gradient, so no
    example's score may depend on another's. The first layer sees 2x2 pixels as four channels, again for the CPU.
    """

    def __init__(self, width=32, image_size=28):
        super().__init__()
        doublings = {28: 1, 64: 2}[image_size]
        self.unshuffle = nn.PixelUnshuffle(2)
        self.layers = nn.ModuleList([nn.Conv2d(4, width, 3, 1, 1)])
        self.layers += [nn.Conv2d(width << d, width << d + 1, 4, 2, 1) for d in range(doublings)]
        self.layers += [nn.Conv2d(width << doublings, width << doublings + 1, 3, 1, 1)]
        side = image_size // 2 >> doublings
        self.heads = nn.Linear((width << doublings + 1) * side**2, 1 + CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        maps = self.unshuffle(2 * images - 1).contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            maps = leaky_relu(layer(maps))
        out = self.heads(maps.flatten(1)).float()
        return out[:, 0], out[:, 1:]


class DigitReader(nn.Module):
    """The independent classifier that measures: images (N, 1, 28, 28) in [0, 1] -> logits (N, 10).

    `features` are the 64 numbers before its last layer, the space of our Frechet distance. It shares no weight, no
    architecture and no random number with the networks that train.
    """

    def __init__(self):
        super().__init__()

        def block(c_in, c_out, stride):
            return [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

        self.features = nn.Sequential(
            nn.PixelUnshuffle(2), *block(4, 32, 1), *block(32, 64, 2), *block(64, 64, 1), *block(64, 128, 2),
            nn.Flatten(), nn.Linear(128 * 16, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.head(self.features(images))


# -------------------------------------------------------------------------------------------------------------- losses


def gradient_penalty(critic, real, fake, rng=None):
    """Mean of (||grad score(x)||_2 - 1)^2 over x = u * real + (1 - u) * fake (Gulrajani et al. 2017, algorithm 1).

    `critic`: images -> (scores (N,), anything); real, fake: (N, C, H, W). One u ~ U(0, 1) per example, not per pixel,
    and the norm is over all of an example's pixels. Returns a scalar that can be differentiated once more.
    """
    u = torch.rand(len(real), 1, 1, 1, device=real.device, generator=rng)
    between = (u * real + (1 - u) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between)[0].sum(), between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def critic_loss(critic, real, labels, fake, penalty, share=1.0):
    """What the critic descends: -(Wasserstein estimate) + penalty * gradient penalty + auxiliary loss on real images.

    The penalty is taken on the first `share` of the batch: it is a mean either way, and its double backward is the
    dearest part of a step. Returns (loss, dictionary of its parts).
    """
    n = len(real)
    scores, logits = critic(torch.cat([real, fake]))
    wasserstein = scores[:n].mean() - scores[n:].mean()
    k = max(1, round(n * share))
    gp = gradient_penalty(critic, real[:k], fake[:k])
    auxiliary = F.cross_entropy(logits[:n], labels)
    return penalty * gp + auxiliary - wasserstein, {"wasserstein": wasserstein, "penalty": gp, "auxiliary": auxiliary}


def generator_loss(critic, fake, labels):
    """What the generator descends: minus its critic score, plus the auxiliary loss on the class it was asked for."""
    scores, logits = critic(fake)
    return F.cross_entropy(logits, labels) - scores.mean()


# ------------------------------------------------------------------------------------------------------------ training


class Training:
    """The networks, their optimisers and the position of a run: all that a checkpoint holds."""

    def __init__(self, args, device, dataset, n):
        torch.manual_seed(args.seed)
        self.args, self.device, self.steps, self.seconds, self.history = args, device, 0, 0.0, []
        self.bf16 = args.precision == "bf16" or (args.precision == "auto" and has_bf16(device))
        elsewhere = ("data", "out", "device", "limit", "samples", "resume", "benchmark")  # these don't shape a training
        self.shape = {k: v for k, v in vars(args).items() if k not in elsewhere}
        self.shape |= {"dataset": dataset, "dataset_size": n, "precision": "bf16" if self.bf16 else "fp32"}
        self.generator = Generator(args.latent, args.width, args.image_size).to(device)
        self.critic = Critic(args.width, args.image_size).to(device)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        fused, betas = device.type != "mps", (0.0, args.beta2)
        self.generator_adam = torch.optim.Adam(self.generator.parameters(), args.generator_lr, betas, fused=fused)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), args.critic_lr, betas, fused=fused)

    def step(self, real, labels, remaining=1.0):
        """`critic_steps` critic updates and one generator update on real images (N, 1, S, S) in [0, 1].

        `remaining` is the share of the run still to come, for the learning rate. Returns the losses' parts as tensors.
        """
        args, n = self.args, len(real)
        if args.decay == "linear":
            self.generator_adam.param_groups[0]["lr"] = args.generator_lr * remaining
            self.critic_adam.param_groups[0]["lr"] = args.critic_lr * remaining
        for last in [False] * (args.critic_steps - 1) + [True]:
            with torch.set_grad_enabled(last), self.autocast():  # the last fake batch serves the generator's update too
                drawn = self.generator(self.noise(n), labels).float()
            with self.autocast():
                loss, parts = critic_loss(self.critic, real, labels, drawn.detach(), args.penalty, args.penalty_share)
            self.critic_adam.zero_grad()
            loss.backward()
            self.critic_adam.step()

        self.critic.requires_grad_(False)
        with self.autocast():
            parts["generator"] = generator_loss(self.critic, drawn, labels)
        self.generator_adam.zero_grad()
        parts["generator"].backward()
        self.generator_adam.step()
        self.critic.requires_grad_(True)

        self.steps += 1
        keep = min(args.average, 1 - 8 / (self.steps + 8))  # early on the average is short, or it would hold noise
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.generator.parameters()), 1 - keep)
            for mean, now in zip(self.average.buffers(), self.generator.buffers(), strict=True):
                mean.copy_(now)
        return parts

    def noise(self, n):
        return torch.randn(n, self.args.latent, device=self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    PARTS = ("generator", "critic", "average", "generator_adam", "critic_adam")

    def save(self, path):
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        position = {"steps": self.steps, "seconds": self.seconds, "history": self.history, "random": random}
        networks = {name: getattr(self, name).state_dict() for name in self.PARTS}
        save_checkpoint(path, {"kind": "acwgan", "shape": self.shape, **position, **networks})

    def load(self, path):
        """Go on from the checkpoint at `path`. Raises Misuse if it was trained with other settings."""
        if not path.exists():
            raise Misuse(f"there is nothing to resume: no {path}; leave out --resume to train from the start")
        there = load_checkpoint(path, "acwgan", "leave out --resume to train from the start")
        shape = there.get("shape", {})
        if differs := [f"{k} is {shape.get(k)} there, {v} here" for k, v in self.shape.items() if shape.get(k) != v]:
            raise Misuse(f"--resume contradicts {path}: {'; '.join(differs)}")
        try:
            for name in self.PARTS:
                getattr(self, name).load_state_dict(there[name])
            self.steps, self.seconds, self.history = there["steps"], there["seconds"], there["history"]
            torch.set_rng_state(there["random"]["cpu"])
            if self.device.type == "cuda" and "cuda" in there["random"]:
                torch.cuda.set_rng_state(there["random"]["cuda"], self.device)
        except (KeyError, TypeError, RuntimeError, ValueError) as problem:
            raise Failure(f"{path} does not fit this version ({problem!r:.200}); train anew without --resume") from None


def has_bf16(device):
    """Whether `device` multiplies bfloat16 in hardware; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def epoch_order(n, seed, epoch):
    """The order in which an epoch sees the training images; a run resumed in its middle finds the same."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def train(training, images, labels, evaluate):
    """Train to the end of the last epoch; a checkpoint is kept once a minute, after each epoch, and at Ctrl-C."""
    args, path = training.args, training.args.out / "checkpoint.pt"
    per_epoch = len(images) // args.batch_size
    total = args.epochs * per_epoch
    began, saved, order_of = time.time() - training.seconds, time.time(), None
    with ctrl_c() as stop, tqdm(total=total, initial=training.steps, unit="step", disable=None) as bar:
        while training.steps < total:
            epoch, i = divmod(training.steps, per_epoch)
            if epoch != order_of:
                order, order_of = epoch_order(len(images), args.seed, epoch).to(images.device), epoch
            batch = order[i * args.batch_size :][: args.batch_size]
            parts = training.step(fit(images[batch], args.image_size), labels[batch], 1 - training.steps / total)
            training.seconds = time.time() - began
            bar.update()

            epoch_ends = i + 1 == per_epoch
            save = epoch_ends or stop.pressed or time.time() - saved > 60
            if save or training.steps % 50 == 0:
                values = {name: value.item() for name, value in parts.items()}
                bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
                if not all(map(math.isfinite, values.values())):
                    raise Failure(
                        f"a loss is no longer a number at step {training.steps:,} ({values}); {path} holds the last "
                        "good state; start anew with a lower --critic-lr and --generator-lr"
                    )
            if epoch_ends and (epoch + 1) % 10 == 0 and training.steps < total:
                training.history.append(evaluate())
            if save:
                training.save(path)
                saved = time.time()
            if stop.pressed:
                raise Stopped(f"stopped; {path} holds step {training.steps:,} of {total:,}, --resume goes on from it")


def fit(images, size):
    """Images (N, 1, H, W) in [0, 1] at the networks' size, smoothed where they shrink."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp(0, 1)


# ---------------------------------------------------------------------------------------------- sampling and measuring


@torch.no_grad()
def generate(generator, labels, seed):
    """Images (N, 1, 28, 28) float32 in [0, 1], as an 8-bit file holds them, for labels (N,) int64.

    The latent numbers depend on `seed` and N alone, on every device; so (seed, i) names one sample of a generator.
    """
    latent = torch.randn(len(labels), generator.latent, generator=torch.Generator().manual_seed(seed))
    drawn = [generator(z.to(labels.device), y) for z, y in zip(latent.split(1000), labels.split(1000), strict=True)]
    return (fit(torch.cat(drawn), 28) * 255).round() / 255


@torch.no_grad()
def read(reader, images):
    """The reader's answers: features (N, 64) as float64 in NumPy, and labels (N,) int64."""
    features = torch.cat([reader.features(part) for part in images.split(1000)])
    return features.double().cpu().numpy(), reader.head(features).argmax(1)


def digit_reader(out, dataset, images, labels):
    """The reader for these training images: the one kept in `out`, or else a new one, kept there."""
    path, kind = out / "reader.pt", f"digit reader of {len(images)} {dataset} images"
    reader = DigitReader().to(images.device)
    if path.exists():
        advice = "delete it, or choose another --out; a reader is trained where there is none"
        try:
            reader.load_state_dict(load_checkpoint(path, kind, advice)["network"])
        except (KeyError, RuntimeError):
            raise Failure(f"{path} does not fit this version; {advice}") from None
        return reader.eval().requires_grad_(False)
    reader = train_reader(images, labels)
    save_checkpoint(path, {"kind": kind, "network": reader.state_dict()})
    return reader


def train_reader(images, labels, seed=1234, epochs=3, batch=128):
    """A `DigitReader` trained on digits (N, 1, 28, 28) that are moved by up to 2 pixels: 99.5 % on MNIST."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = DigitReader().to(images.device)
    rng = torch.Generator().manual_seed(seed)
    batch = min(batch, len(images))
    total = epochs * (len(images) // batch)
    adam = torch.optim.AdamW(reader.parameters(), weight_decay=0.01, fused=images.device.type != "mps")
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 4e-3, total, pct_start=0.2)
    batches = (order for _ in range(epochs) for order in torch.randperm(len(images), generator=rng).split(batch))
    for order in tqdm((b for b in batches if len(b) == batch), "digit reader", total, unit="step", disable=None):
        dx, dy = torch.randint(5, (2,), generator=rng)
        moved = F.pad(images[order.to(images.device)], (2, 2, 2, 2))[:, :, dy : dy + 28, dx : dx + 28]
        loss = F.cross_entropy(reader(moved), labels[order.to(images.device)], label_smoothing=0.05)
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
    return reader.eval().requires_grad_(False)


def statistics(features):
    """Mean (D,) and covariance (D, D) of features (N, D)."""
    return features.mean(0), np.cov(features, rowvar=False)


def measure(training, reader, samples, asked, images, test_images):
    """The numbers of the report on samples (N, 1, 28, 28) that were asked for the classes `asked` (N,)."""
    n = len(samples)
    features, answers = read(reader, samples)
    test = statistics(read(reader, test_images)[0])
    distance = frechet_distance(*statistics(features), *test)
    floor = frechet_distance(*statistics(read(reader, images[:n])[0]), *test)

    real, fake = (fit(x[:1000], training.args.image_size) for x in (test_images, samples))
    k = min(len(real), len(fake))
    u = torch.rand(k, 1, 1, 1, generator=torch.Generator().manual_seed(0)).to(real.device)
    between = (u * real[:k] + (1 - u) * fake[:k]).requires_grad_()
    (gradient,) = torch.autograd.grad(training.critic(between)[0].sum(), between)
    with torch.no_grad():
        wasserstein = training.critic(real)[0].mean() - training.critic(fake)[0].mean()
    return {
        "asked_class_read": wilson((answers == asked).sum().item(), n),
        "frechet_distance_reader_features": distance,
        "frechet_distance_floor": floor,
        "frechet_distance_over_floor": distance / floor,
        "gradient_norm_on_interpolates": gradient.flatten(1).norm(dim=1).mean().item(),
        "wasserstein_estimate": wasserstein.item(),
    }


# -------------------------------------------------------------------------------------------------------------- report


def figure(samples, sample_labels, images, labels):
    """The log's figure: 4x8 generated digits above 4x8 real digits of the same classes, each under its class."""
    zoom, cell, rows, columns, title = 2, 28 * 2 + 18, 4, 8, 30
    font, small = ImageFont.load_default(18), ImageFont.load_default(13)
    wanted = [i % CLASSES for i in range(rows * columns)]
    page = Image.new("L", (columns * cell + 8, 2 * (rows * cell + title) + 8), 0)
    ink, top = ImageDraw.Draw(page), 0
    for name, digits, classes in (("generated", samples, sample_labels), ("real", images, labels)):
        ink.text((8, top + 6), name, 255, font)
        pools = [iter((classes == c).nonzero().flatten().tolist()) for c in range(CLASSES)]
        for i, c in enumerate(wanted):
            x, y = 8 + i % columns * cell, top + title + i // columns * cell
            ink.text((x, y), str(c), 160, small)
            if (index := next(pools[c], None)) is not None:
                digit = Image.fromarray((digits[index, 0] * 255).round().byte().cpu().numpy())
                page.paste(digit.resize((28 * zoom, 28 * zoom), Image.NEAREST), (x + 9, y))
        top += rows * cell + title
    return page


def benchmark(args, images, labels):
    """Time a training step as it is and without each speed-up, interleaved; print and return the ratios."""
    from torch.utils.flop_counter import FlopCounterMode

    device, batch = images.device, slice(args.batch_size)
    real, classes = fit(images[batch], args.image_size), labels[batch]
    ours, torchs = leaky_relu, lambda x: F.leaky_relu(x, 0.2)

    def without(activation=ours, memory_format=torch.channels_last, foreach=False, **flags):
        training = Training(type(args)(**{**vars(args), **flags}), device, args.dataset, len(images))
        training.generator.to(memory_format=memory_format)
        training.critic.to(memory_format=memory_format)
        if foreach:
            for adam in (training.generator_adam, training.critic_adam):
                adam.param_groups[0].update(fused=False, foreach=False)
        return training, activation

    variants = {
        "as it is": without(),
        "without bf16": without(precision="fp32"),
        "penalty on the whole batch": without(penalty_share=1.0),
        "torch's leaky_relu": without(torchs),
        "weights not channels-last": without(memory_format=torch.contiguous_format),
        "Adam not fused": without(foreach=True),
        "none of them": without(torchs, torch.contiguous_format, True, precision="fp32", penalty_share=1.0),
    }
    times = {name: [] for name in variants}
    for turn in tqdm(range(33), disable=None):
        for name, (training, activation) in variants.items():
            globals()["leaky_relu"] = activation
            began = time.perf_counter()
            training.step(real, classes)["generator"].item()
            if turn >= 3:
                times[name].append(time.perf_counter() - began)
    globals()["leaky_relu"] = ours
    with FlopCounterMode(display=False) as flops:
        variants["as it is"][0].step(real, classes)
    median = {name: float(np.median(t)) for name, t in times.items()}
    for name, seconds in median.items():
        print(
            f"{name:28} {seconds * 1e3:7.2f} ms/step  {args.batch_size / seconds:7,.0f} images/s  {seconds / median['as it is']:5.2f}x"
        )
    print(f"{flops.get_total_flops() / 1e9:.2f} GFLOP/step")
    return {"milliseconds_per_step": {n: s * 1e3 for n, s in median.items()}, "flop_per_step": flops.get_total_flops()}


def main(argv=None):
    """Train, sample, measure, write everything into --out; returns the numbers of results.json."""
    args = settings(argv)
    device = pick_device(args.device)
    make_folder(args.out)
    path = args.out / "checkpoint.pt"
    dataset, images, labels = load_digits(args.dataset, args.data, True, args.limit)
    _, test_images, test_labels = load_digits(dataset, args.data, False)
    if len(images) < args.batch_size:
        raise Misuse(f"--batch-size {args.batch_size} is more than the {len(images)} training images")
    images, labels, test_images, test_labels = (x.to(device) for x in (images, labels, test_images, test_labels))
    if args.benchmark:
        return benchmark(args, images, labels)

    training = Training(args, device, dataset, len(images))
    if args.resume:
        training.load(path)
    reader = digit_reader(args.out, dataset, images, labels)
    accuracy = wilson((read(reader, test_images)[1] == test_labels).sum().item(), len(test_labels))
    print(f"{dataset}: the independent digit reader reads {percent(accuracy)} real test digits correctly")
    asked = torch.arange(args.samples, device=device) % CLASSES

    def evaluate():
        samples = generate(training.average, asked, args.seed)
        numbers = measure(training, reader, samples, asked, images, test_images)
        print(
            f"step {training.steps:,}, {training.seconds:,.0f} s: the class asked for is read from "
            f"{percent(numbers['asked_class_read'])} samples; Frechet distance to the test images (reader's features) "
            f"{numbers['frechet_distance_reader_features']:.3f}, {numbers['frechet_distance_over_floor']:.2f}x the floor"
        )
        return {"step": training.steps, "training_seconds": round(training.seconds, 1), **numbers}

    train(training, images, labels, evaluate)
    numbers = evaluate()
    samples = generate(training.average, asked, args.seed)
    save_npz(
        args.out / "samples.npz",
        images=(samples[:, 0] * 255).round().byte().cpu().numpy(),
        labels=asked.cpu().numpy(),
    )
    save_png(args.out / "AC-WGAN_GP.png", figure(samples, asked, test_images, test_labels))
    numbers |= {"reader_accuracy_on_test_images": accuracy, "history": training.history}
    facts = {"dataset": dataset, "dataset_size": len(images), "device": str(device), "bf16": training.bf16}
    print(f"everything is in {args.out}")
    return write_results(args, numbers, **facts)


if __name__ == "__main__":
    run(main)

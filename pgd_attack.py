"""Weeks 3 to 5: PGD, a single-label attack, on a multi-label classifier.

PGD moves each pixel by at most eps so that a classifier gives a label that the attacker chose. In
the log it switched nearly every label off (week 3), hardly moved an ImageNet network (week 4) and,
asked for more donuts, got fewer of everything (week 5). A possible cause: the package that the
log's TResNet used gave a wrong gradient (asl_model.inplace_abn_1_0_12). Here the attacks on record
run with that gradient and the right one, beside noise and `margin`, which switches one label only.

    python pgd_attack.py                    margin on scenes of digits
    python pgd_attack.py --dataset coco --model asl --target person    COCO, published TResNet-M
    python pgd_attack.py --week 5           or 3: on scenes, or --dataset coco
    python pgd_attack.py --week 4           on digits; --model resnet18: on photos
    python pgd_attack.py --sweep            over eps, with controls
    python pgd_attack.py --image photo.jpg --target dog                one photo
    torchrun --nproc-per-node 8 pgd_attack.py ...                      images shared out

Writes into --out: results.json, adversarial.npz, pgd-attack-on-<model>.png and, of weeks 3 and 5,
bars.png, of --sweep sweep.png.
"""

import datetime
import functools
import math
import os
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
from torchvision.transforms.functional import to_pil_image

import acwgan
import asl_model
import common
import transfer

PINNED = "inplace-abn-1.0.12"  # the gradient of the package that the log's TResNet was pinned to
SWEEP = tuple(eps / 255 for eps in (0, 1 / 4, 1 / 2, 1, 2, 4, 8, 16))
DATASETS = {  # that a kind of model can be shown; the first one unless --dataset says
    "asl": ("scenes", "coco"),
    "own": ("coco",),
    "digits": ("auto", "mnist", "glyphs"),
    "torchvision": ("imagenet", "coco"),
}
DEFAULTS = {  # target, eps, images at a time
    "scenes": ("8", 0.1, 256),
    "coco": ("person", 8 / 255, 16),
    "digits": ("3", 0.3, 256),
    "torchvision": ("night snake", 8 / 255, 16),  # ImageNet's class 60, as in the log
}


def settings(argv=None):
    """The flags, every default resolved, and `kind`, of DATASETS."""
    names, limit = dict.fromkeys(sum(DATASETS.values(), ())), "attack only the first N"
    p = common.parser(__doc__, None, None, names, "what is attacked (otherwise it varies)", limit)
    add, count, positive = p.add_argument, common.count, common.positive
    mode = p.add_mutually_exclusive_group().add_argument
    mode("--image", type=Path, metavar="FILE", help="attack this one photo")
    mode("--week", type=int, choices=(3, 4, 5), help="the attacks on record, beside the right one")
    mode("--sweep", action="store_true", help="eps from 0 to 16/255, and controls")
    model = "asl; FILE.py:FUNCTION, your own; digits; or torchvision's, such as resnet18"
    add("--model", help=f"{model} (otherwise asl, with --week 4 digits)")
    add("--weights", type=Path, metavar="FILE", help="its weights (otherwise those published)")
    add("--gradient", choices=("right", PINNED), default="right", help="that the attack follows")
    add("--split", choices=("val2017", "train2017"), default="val2017", help="of coco")
    add("--augment", action="store_true", help="show coco's photos as in training")
    add("--digits", choices=("auto", "mnist", "glyphs"), default="auto", help="that scenes show")
    add("--target", metavar="NAME", help="label to switch (otherwise it varies, see DEFAULTS)")
    add("--direction", choices=("on", "off", "flip"), help="of the switch (flip; with --week, on)")
    add("--loss", choices=LOSS, default="margin", help="of the attack")
    add("--threshold", type=positive, default=0.5, help="a label is present above this probability")
    add("--eps", type=positive, help="pixels' largest change, of 1 (8/255; scenes 0.1; digits 0.3)")
    add("--alpha", type=positive, default="2/255", help="size of a step, of 1")
    add("--steps", type=count(1), default=40, help="steps of each image, at most")
    add("--restarts", type=count(0), default=2, help="further tries of margin, from random starts")
    add("--save", type=count(0), metavar="N", default=16, help="images kept in adversarial.npz")
    add("--batch-size", type=count(1), help="images at once (16 photos, else 256)")
    args = p.parse_args(argv)

    args.model = args.model or ("digits" if args.week == 4 else "asl")
    args.kind = "own" if ":" in args.model else args.model
    args.kind = args.kind if args.kind in DATASETS else "torchvision"
    several, shown = args.kind in ("asl", "own"), DATASETS[args.kind]
    if args.dataset is None and (args.image or args.kind != "torchvision" or not args.week):
        args.dataset = "coco" if several and (args.image or args.weights) else shown[0]
    photos = several and args.dataset == "coco" and not args.image
    for refused, text in (
        (args.dataset not in (None, *shown), f"--dataset of this model: {' or '.join(shown)}"),
        (args.threshold >= 1, "--threshold must lie below 1"),
        (several and args.week == 4, "--week 4 needs one label: --model digits, or resnet18"),
        (not several and args.week in (3, 5), f"--week {args.week} needs --model asl or your own"),
        (not several and args.sweep, "--sweep needs --model asl or your own"),
        (args.loss != "margin" and (args.week or not several), "--loss needs labels and no --week"),
        (args.image and args.kind == "digits", "--image needs a network of photos"),
        (args.augment and not photos, "--augment is of --dataset coco"),
        (args.weights and args.kind in ("own", "digits"), "--weights: this model has its own"),
    ):
        if refused:
            p.error(text)
    target, eps, batch_size = DEFAULTS[args.dataset if several else args.kind]
    if args.week == 5 and args.dataset == "coco":
        target = "dining table"  # the log's output 60, which it took for donut
    args.target = target if args.target is None else args.target
    args.eps = args.eps or eps
    args.batch_size = args.batch_size or batch_size
    args.direction = args.direction or ("on" if args.week or not several else "flip")
    run = f"week{args.week}" if args.week else "sweep" if args.sweep else "attack"
    subject = "digits" if args.kind == "digits" else args.dataset or args.kind
    run = f"image-{args.image.stem}" if args.image else f"{run}-{subject}"
    args.out = args.out or Path("runs/pgd_attack", run)
    return args


def pgd(model, images, targets, loss, eps=8 / 255, alpha=2 / 255, steps=40,
        random_start=False, early_stop=False, clip=(0, 1), momentum=0):  # fmt: skip
    """Targeted L-inf PGD (Madry et al. 2018, arXiv 1706.06083): alpha * sign(gradient) down `loss`.

    model: images (N, C, H, W) in `clip` -> logits (N, L). It is run in eval mode, left as it was.
    targets: what `loss(logits, targets)` needs, a row per image: class indices (N,) int64, or
    wanted labels (N, L) of 0 and 1. The loss is a scalar or one value per image; of a scalar, no
    image's part may depend on another's.
    early_stop: an image that has reached its goal leaves the batch as it is then. True: see
    `goal_reached`; or a callable (logits, targets) -> bool (N,).
    random_start: from a uniformly random point of the ball, of torch's global generator.
    momentum: share of the last step's direction, of gradients of equal L1 norm (Dong et al. 2018,
    arXiv 1710.06081).

    Returns the adversarial images, of the same shape, within eps of `images` and within `clip`.
    Raises ValueError for images outside `clip` and sizes that make no sense, and common.Failure
    if the model's answer or the gradient is no finite number.
    """
    if not (eps >= 0 and alpha >= 0 and steps >= 0 and len(images) == len(targets)):
        text = f"{len(images)} images with {len(targets)} targets"
        raise ValueError(f"{text}; eps {eps}, alpha {alpha}, steps {steps}: none may be negative")
    if len(images) and not (clip[0] <= images.min() and images.max() <= clip[1]):
        text = f"images from {images.min():.3g} to {images.max():.3g} lie outside clip {clip}"
        raise ValueError(f"{text}: give them in [0, 1], and normalise inside the model")
    goal = early_stop if callable(early_stop) else goal_reached
    modes = {m: m.training for m in model.modules()} if isinstance(model, nn.Module) else {}
    images, targets = images.detach(), targets.detach()
    low, high = (images - eps).clamp(*clip), (images + eps).clamp(*clip)
    adv = images + eps * (2 * torch.rand_like(images) - 1) if random_start else images.clone()
    adv = adv.clamp(low, high)
    result, active = adv.clone(), torch.arange(len(images), device=images.device)
    direction, finite = torch.zeros_like(images), True
    try:
        for module in modes:
            module.training = False
        for _ in range(steps if len(images) else 0):
            with torch.enable_grad():
                adv.requires_grad_()
                logits = model(adv)
                (gradient,) = torch.autograd.grad(loss(logits, targets).sum(), adv)
            # asked at the end: no GPU waits
            finite &= logits.isfinite().all() & gradient.isfinite().all()
            if momentum:
                norm = gradient.abs().mean((1, 2, 3), keepdim=True)
                gradient = direction = momentum * direction + gradient / norm.clamp(min=1e-30)
            before, adv = adv.detach(), adv.detach() - alpha * gradient.sign()
            adv = adv.clamp(low, high)
            if early_stop:
                left = (~goal(logits.detach(), targets)).nonzero()[:, 0]
                if len(left) < len(active):
                    result[active] = before
                    state = adv, targets, low, high, direction, active
                    adv, targets, low, high, direction, active = (x[left] for x in state)
                if not len(active):
                    break
        result[active] = adv.detach()
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not finite:
        raise common.Failure("the model's answer, or the loss's gradient, is not finite")
    return result


def goal_reached(logits, targets):
    """Whether top-1 is the target (indices), or every logit on the wanted side of 0 (labels)."""
    if targets.ndim == 1:
        return logits.argmax(1) == targets
    return ((logits > 0) == (targets > 0.5)).all(1)


# --- losses of several labels: logits (N, L), wanted (N, L) of 0 and 1, target index -> (N,)

MARGIN, KEEP = 1.0, 0.2  # how far past the threshold `margin` pushes the target, keeps the others
SLACK = 0.05  # an image is done a little past the threshold, not on it, where rounding decides


def softmax_ce(logits, wanted, target, threshold):
    """On record on 9 June (week 3): one label's cross-entropy. It falls as all others do."""
    sign = 2 * wanted[:, target] - 1
    return -sign * logits.log_softmax(1)[:, target]


def bce(logits, wanted, target, threshold):
    """On record on 11 June, just before week 3's entry: sigmoid, cross-entropy of all labels."""
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)


def softmax_bce(logits, wanted, target=None, threshold=None):
    """Weeks 4 and 5: binary cross-entropy on a softmax, whose labels share a sum of 1.

    As torch has it, cut at log(p) = -100; but torch refuses wanted values outside [0, 1], such as
    the raw logits that week 4's batch wanted.
    """
    p = logits.float().softmax(1)
    with torch.no_grad():
        loss = -wanted * p.log().clamp(min=-100) - (1 - wanted) * (1 - p).log().clamp(min=-100)
        slope = (p - wanted) / (p * (1 - p)).clamp(min=1e-12)
    return (loss + slope * (p - p.detach())).mean(1)


def margin(logits, wanted, target, threshold):
    """Right: the target is pushed until it is MARGIN past the threshold, any other label until it
    is KEEP past it, on its side: a hinge for each, as in Carlini & Wagner 2017 (arXiv 1608.04644)
    for the top class."""
    past = distance_past(logits, wanted, threshold)
    others = (KEEP - past).relu().sum(1) - (KEEP - past[:, target]).relu()
    return (MARGIN - past[:, target]).relu() + others


def distance_past(logits, wanted, threshold):
    """How far each logit (N, L) is past the threshold's, on the wanted side."""
    return (2 * wanted - 1) * (logits - math.log(threshold / (1 - threshold)))


LOSS = {"softmax-ce": softmax_ce, "bce": bce, "softmax-bce": softmax_bce, "margin": margin}


class Row(NamedTuple):
    """An attack: a row of a week's table."""

    name: str
    loss: str | None  # of LOSS, or one of week 4's; None: uniform noise of size eps
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
)
WHEN = "actual", "before", "after"
COUNTS = [f"{what}_{when}" for what in ("target", "labels") for when in WHEN]


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

    def wanted(self, logits):
        """The labels wanted, float (N, L): the prediction, but for the target."""
        wanted = self.predicted(logits).float()
        flipped = 1 - wanted[:, self.target]
        wanted[:, self.target] = {"on": 1.0, "off": 0.0, "flip": flipped}[self.direction]
        return wanted

    def asked(self, logits):
        """Of which images a change is asked, (N,) bool."""
        return (self.wanted(logits) != self.predicted(logits)).any(1)

    def achieved(self, before, after):
        """Whether logits `after` are what was asked, given those `before`, (N,) bool."""
        return (distance_past(after, self.wanted(before), self.threshold) > 0).all(1)

    def words(self, logits):
        """The labels present in one image, {label: label and probability}."""
        present = self.predicted(logits).nonzero()[:, 0].tolist()
        return {self.names[j]: f"{self.names[j]} {logits[j].sigmoid():.2f}" for j in present}

    def attack(self, network, images, logits, row):
        """`row`'s attack on images (N, 3, S, S) of logits (N, L), judged in float32: images."""
        if row.loss is None:
            return (images + row.eps * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
        wanted = self.wanted(logits)

        def right(logits, wanted):
            return (distance_past(logits, wanted, self.threshold) > SLACK).all(1)

        stop = right if row.restarts is not None else False
        loss = functools.partial(LOSS[row.loss], target=self.target, threshold=self.threshold)
        result, rest = images.clone(), torch.arange(len(images), device=images.device)
        for number in range(1 + (row.restarts or 0)):
            how = row.eps, row.alpha / 2**number, row.steps, number > 0, stop
            momentum = 0.75 if number else 0
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
                adv = pgd(network, images[rest], wanted[rest], loss, *how, momentum=momentum)
            with torch.no_grad():
                done = self.achieved(logits[rest], network(adv))
            kept = done | (number == 0)
            result[rest[kept]] = adv[kept]
            rest = rest[~done]
            if not len(rest):
                break
        return result

    def count(self, found, name, truth):
        """A row's numbers: labels counted over all images, rates over the images asked.
        `truth` (N, L): the actual labels, or None."""
        before, after = self.predicted(found["before"]), self.predicted(found[name])
        asked, achieved = self.asked(found["before"]), self.achieved(found["before"], found[name])
        n, numbers = int(asked.sum()), dict.fromkeys(COUNTS)
        for when, labels in zip(WHEN, (truth, before, after), strict=True):
            if labels is not None:
                numbers[f"target_{when}"] = int(labels[:, self.target].sum())
                numbers[f"labels_{when}"] = int(labels.sum())
        changed, present = (before != after)[asked], before[asked]
        switched = changed[:, self.target].clone()
        changed[:, self.target] = present[:, self.target] = False
        lost = changed & present
        return numbers | {
            "target_switched": common.wilson(switched.sum(), n),
            "exact": common.wilson(achieved[asked].sum(), n),
            "others_lost": common.wilson(lost.sum(), present.sum()),
            "others_new": (changed & ~present).sum().item(),
        }

    def report(self, rows):
        """Print the log's six counts, of the first and last row, and the rates of all."""
        ends = dict.fromkeys([next(iter(rows)), list(rows)[-1]])
        lines = [[key.replace("_", " "), *(rows[end][key] for end in ends)] for key in COUNTS]
        common.print_table([f"target: {self.names[self.target]}", *ends], lines)
        lines = []
        for name, row in rows.items():
            counts = [f"{row[f'{x}_before']} -> {row[f'{x}_after']}" for x in ("target", "labels")]
            lost = common.cell(row["others_lost"]).split()[0]
            lines.append([name, *counts, row["target_switched"], row["exact"], lost])
        print()
        common.print_table(("", "target", "all labels", "switched", "exact", "lost"), lines)
        print("exact: switched, all else as before; lost: share of other labels that were on")


# week 4: "one-hot" is softmax_bce towards the target alone, "raw logits" towards a copy of the
# logits with the target's set to 1, "class" cross-entropy; without a loss there is only the cut
WEEK_4 = (
    Row("cut alone", None, 0.3),
    Row("single photo's", "one-hot", 0.3),  # "very effective"
    Row("batch's", "raw logits", 0.3),  # "little influence"
)
LEAD = 0.5  # in logits: an image is done when the target leads all other classes by it


class TopClass(NamedTuple):
    """What is asked of a classifier of one label: the target, for every image."""

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
        """One image's top class, {class: class}."""
        return {self.names[logits.argmax()]: self.names[logits.argmax()]}

    def attack(self, network, images, logits, row):
        """`row`'s attack on images (N, C, S, S) of logits (N, L): images."""
        targets = torch.full((len(images),), self.target, device=images.device)
        if row.loss == "class":

            def leads(logits, targets):
                return transfer.lead(logits, targets) > LEAD

            how = functools.partial(F.cross_entropy, reduction="none"), row.eps, row.alpha
            return pgd(network, images, targets, *how, row.steps, early_stop=leads)
        wanted = F.one_hot(targets, logits.shape[1]).float()
        if row.loss == "raw logits":  # the log's fault: a logit of 10 weighs 10 times the target
            wanted = logits.clone()
            wanted[:, self.target] = 1
        images = (images - self.mean) / self.std
        # the other fault: [0, 1] is the range of pixels, and here it cuts normalised values
        low, high = (images - row.eps).clamp(0, 1), (images + row.eps).clamp(0, 1)
        adv = images.clamp(0, 1)
        for _ in range(row.steps if row.loss else 0):
            adv.requires_grad_()
            loss = softmax_bce(network(adv * self.std + self.mean), wanted)
            (gradient,) = torch.autograd.grad(loss.sum(), adv)
            adv = (adv.detach() - row.alpha * gradient.sign()).clamp(low, high)
        return adv * self.std + self.mean

    def count(self, found, name, truth):
        """A row's numbers, over the images asked; truth (N,): the classes, or None."""
        before, after = found["before"].argmax(1), found[name].argmax(1)
        asked, p = self.asked(found["before"]), found[name][:, self.target].double().sigmoid()
        numbers = {
            "target_reached": common.wilson((after == self.target)[asked].sum(), asked.sum()),
            "top_class_changed": common.wilson((after != before)[asked].sum(), asked.sum()),
            "mean_sigmoid": p.mean().item(),  # the log's own metric
        }
        if truth is not None:  # no class is -1, which stands for an unknown one
            known = (truth >= 0).sum()
            numbers["right_before"] = common.wilson((before == truth).sum(), known)
            numbers["right_after"] = common.wilson((after == truth).sum(), known)
        return numbers

    def report(self, rows):
        """Print the table of week 4."""
        before = next(iter(rows.values())).get("right_before")
        print(f"before, the classifier is right on {common.cell(before)} of the known classes")
        keys = "target_reached", "top_class_changed", "right_after", "mean_sigmoid"
        lines = [[name, *(row.get(key) for key in keys)] for name, row in rows.items()]
        common.print_table(["", *(key.replace("_", " ") for key in keys)], lines)


def over_batches(network, images, attacks, args, device, rank, world):
    """Every attack {name: attack(images, logits) -> images} on every image, of [0, 1].

    Returns {"before" or name: logits, (name, "linf" | "seconds"): (N,)} of all N images and
    {("clean" or name, "pixels"): uint8} of the first ones, on the CPU. Of torchrun's processes each
    attacks every `world`-th batch; batches and random numbers are always the same.
    """
    total, logits = len(images), torch.no_grad()(lambda x: network(x).float())
    batches, keep = torch.arange(total).split(args.batch_size), min(max(args.save, 2), total)
    mine, found = range(rank, len(batches), world), {}
    sampler, workers = [batches[b].tolist() for b in mine], asl_model.workers(images, device)
    loader = DataLoader(images, batch_sampler=sampler, num_workers=workers)

    def note(key, values, n=total):  # small tensors fragment memory
        rows = batches[b][batches[b] < n]
        if key not in found:
            found[key] = torch.zeros(n, *values.shape[1:], dtype=values.dtype)
        found[key][rows] = values[: len(rows)].cpu()

    for b, clean in zip(mine, common.progress(loader, "attacking", disable=rank > 0), strict=True):
        clean = clean.to(device)
        before = logits(clean)
        note("before", before)
        note(("clean", "pixels"), (clean * 255).round().byte(), keep)
        for i, (name, attack) in enumerate(attacks.items()):
            torch.manual_seed(1_000_003 * args.seed + 1_000 * b + i)
            began = time.perf_counter()
            adversarial = attack(clean, before)
            note(name, logits(adversarial))
            seconds = (time.perf_counter() - began) / len(clean)
            note((name, "seconds"), torch.full((len(clean),), seconds))
            note((name, "linf"), (adversarial - clean).abs().amax((1, 2, 3)))
            note((name, "pixels"), (adversarial.clamp(0, 1) * 255).round().byte(), keep)
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, found)
        found = {key: sum(x[key] for x in shares if key in x) for key in shares[0]}
    return found


def figure(title, found, columns, goal):
    """A page: lines of images, clean and by each attack, with the changes magnified below. Images
    of which a change was asked come first; labels that came are green."""
    side, gap, top, font = 160, 12, 62, ImageFont.load_default(13)
    asked = goal.asked(found["before"][: len(found["clean", "pixels"])])
    some = asked.sort(descending=True, stable=True).indices[:2].tolist()
    logits = found | {"clean": found["before"]}
    words = {(i, name): goal.words(logits[name][i]) for i in some for name in columns}
    height = 2 * side + 16 + 16 * min(max(map(len, words.values())), 8)
    width = gap + len(columns) * (side + gap)
    page = Image.new("RGB", (width, top + len(some) * height), "white")
    ink = ImageDraw.Draw(page)
    ink.text((gap, 8), title, "black", ImageFont.load_default(18))
    for column, name in enumerate(columns):
        x, y = gap + column * (side + gap), top
        ink.text((x, y - 4), name, "black", font, "ld")
        for i in some:
            pixels = found[name, "pixels"][i]
            change = pixels.float() - found["clean", "pixels"][i]
            magnified = 127.5 + 127.5 * change / change.abs().max().clamp(min=1)
            for image, down in ((pixels, 0), (magnified.byte(), side + 2)):
                image = to_pil_image(image).resize((side, side), Image.NEAREST)
                page.paste(image, (x, y + down))
            for line, (word, text) in enumerate([*words[i, name].items()][:8]):
                colour = "black" if word in words[i, "clean"] else "green"
                ink.text((x, y + 2 * side + 6 + 16 * line), text, colour, font)
            y += height
    return page


def bars(rows):
    """A picture of how often each row switched the target, and lost other labels."""
    page = Image.new("RGB", (860, 24 + 36 * len(rows)), "white")
    ink, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for line, (name, row) in enumerate(rows.items()):
        ink.text((12, 28 + 36 * line), name, "black", font, "lm")
        switched = row["target_switched"]["rate"], "target switched", "seagreen"
        lost = (row["others_lost"] or {"rate": 0})["rate"], "other labels lost", "firebrick"
        for (share, what, colour), y in ((switched, 20), (lost, 36)):
            x, y = 170 + 500 * share, y + 36 * line
            ink.rectangle((170, y - 6, x, y + 6), colour)
            ink.text((x + 6, y), f"{share:.1%} {what}", colour, font, "lm")
    return page


SWEEP_KINDS = "noise", "steps x 2", "3 restarts", "attack"


def sweep_rows(ours):
    """The rows of `--sweep`: the attack over eps, and its controls."""
    rows = []
    for eps in SWEEP:
        # alpha shrinks with eps, or a step would cross the ball
        row = ours._replace(eps=eps, alpha=min(ours.alpha, eps / 4), restarts=0)
        changes = {"loss": None}, {"steps": 2 * ours.steps}, {"restarts": 3}, {}
        for kind, change in zip(SWEEP_KINDS, changes, strict=True):
            rows.append(row._replace(name=f"{kind} {eps * 255:g}/255", **change))
    return rows


def report_sweep(rows):
    """Print `--sweep`'s table and verdicts on the controls; returns these and the curves."""
    switched = [row["target_switched"] for row in rows.values()]
    if None in switched:
        raise common.Failure("no image lacks what is asked for: there is nothing to switch")
    table, eps = np.array(switched).reshape(len(SWEEP), len(SWEEP_KINDS)), np.multiply(SWEEP, 255)
    lines = [[f"{e:g}/255", *line] for e, line in zip(eps, table, strict=True)]
    common.print_table(["eps", *SWEEP_KINDS], lines)
    rates = np.vectorize(lambda cell: cell["rate"])(table).T
    attack, noise = rates[3], rates[0].max()
    steps, restarts = (rates[1:3] - attack).max(1)
    controls = (
        ("growth", (np.diff(attack) >= 0).all(), "success never falls as eps grows"),
        ("limit", attack[-1] == 1, f"success reaches 100 % (here {attack[-1]:.1%})"),
        ("steps", steps <= 0.05, f"twice the steps gain at most 5 % (here {steps:.1%})"),
        ("restarts", restarts <= 0.05, f"restarts gain at most 5 % (here {restarts:.1%})"),
        ("noise", noise <= 0.05, f"noise switches at most 5 % (here {noise:.1%})"),
    )
    for _, holds, text in controls:
        print("holds:" if holds else "FAILS:", text)
    curves = {kind: (eps, line) for kind, line in zip(SWEEP_KINDS, rates, strict=True)}
    return {name: bool(holds) for name, holds, _ in controls}, curves


def report_photo(network, pixels, found, goal, path):
    """Print --image's labels before, and after, from its 8-bit pixels, saved at `path`."""
    with torch.no_grad():
        after = network(pixels.float() / 255).float().cpu()
    for when, logits in (("before", found["before"]), (f"after, from the pixels of {path}", after)):
        print(f"{when}: {', '.join(goal.words(logits[0]).values()) or 'no label'}")
    if not goal.achieved(found["before"], after).item():
        print("these 8-bit pixels do not do what was asked; try a larger --eps")


def load_multi_label(args, device):
    """Weeks 3 and 5: (network, goal, rows, [(dataset, images, actual labels, what they are)])."""
    scenes, source = args.dataset == "scenes", args.model
    if args.kind == "own":
        network, names = asl_model.own_network(args.model)
    elif scenes and not args.weights:
        how = {"device": device, "digits": args.digits}
        network, names, source = asl_model.scenes_classifier(args.data, **how)
    else:
        source = args.weights or asl_model.published("tresnet_m", args.data)
        network, names = asl_model.load_asl(source)
    print(f"attacked: {source}")
    images, truth, what = common.Photos([args.image], network.image_size), None, str(args.image)
    if not args.image:
        split, limit = ("test", args.limit or 500) if scenes else (args.split, args.limit)
        how = network.image_size, split, names, limit, args.digits, args.seed
        images, truth, names, what = asl_model.load_data(args.dataset, args.data, *how)
    if args.augment:
        images = asl_model.Augmented(images, args.seed)
    target = asl_model.label_index(args.target, names)
    bf16 = args.kind == "asl" and common.has_bf16(device)
    goal = Labels(names, target, args.direction, args.threshold, bf16)
    restarts = args.restarts if args.loss == "margin" else None
    ours = Row(args.loss, args.loss, args.eps, args.gradient, args.alpha, args.steps, restarts)
    rows = sweep_rows(ours) if args.sweep else (*{3: WEEK_3, 5: WEEK_5}.get(args.week, ()), ours)
    return network, goal, rows, [(args.dataset, images, truth, what)]


def load_single_label(args, device):
    """Week 4: (network, goal, rows, [(dataset, images, classes or None, what they are)])."""
    sets = []
    if args.kind == "digits":
        name, *digits = common.load_digits(args.dataset, args.data)
        network = acwgan.digit_reader(args.out, name, *(x.to(device) for x in digits))
        names, (mean, std) = list("0123456789"), torch.tensor([0.1307, 0.3081])  # MNIST's
        digits = common.load_digits(name, args.data, False, args.limit or 1000)[1:]
        sets.append((name, *digits, f"test images of {name}"))
    else:
        network, names, mean, std = asl_model.torchvision_network(args)
        for dataset in [args.dataset] if args.dataset else ("coco", "imagenet"):
            paths, truth = [args.image], None
            if dataset == "imagenet" and not args.image:
                paths, truth = asl_model.load_imagenet(args.data, names, args.limit)
            elif not args.image:
                paths = common.load_coco(args.data, 1, args.limit, args.split)[0].paths
            # the middle 7/8, as ImageNet's networks see photos
            cropped = functools.partial(ImageOps.fit, bleed=1 / 16)
            images = common.Photos(paths, network.image_size, cropped)
            sets.append((dataset, images, truth, f"photos of {dataset}"))
    target = asl_model.label_index(args.target, names)
    goal = TopClass(names, target, mean.to(device), std.to(device))
    right = Row("right", "class", args.eps, args.gradient, args.alpha, args.steps)
    rows = (*WEEK_4, right._replace(name="right pinned", gradient=PINNED)) if args.week else ()
    return network, goal, (*rows, right), sets


def main(argv=None):
    """Attack, print, draw; returns the record (None in torchrun's other processes)."""
    args = settings(argv)
    device = common.pick_device(args.device)
    common.make_folder(args.out)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1), device_id=gpu)
    if rank:  # the first process trains or downloads what the others then find
        dist.barrier()
    load = load_multi_label if args.kind in ("asl", "own") else load_single_label
    network, goal, rows, sets = load(args, device)
    if world > 1 and not rank:
        dist.barrier()
    network = network.eval().requires_grad_(False).to(device)
    networks = {"right": network, PINNED: asl_model.inplace_abn_1_0_12(network)}
    attacks = {}
    for row in rows:
        attacks[row.name] = functools.partial(goal.attack, networks[row.gradient], row=row)
    record, pictures = {"dataset_size": {}, "rows": {}}, {}
    for dataset, images, truth, what in sets:
        found = over_batches(network, images, attacks, args, device, rank, world)
        if rank:
            continue
        results = {row.name: goal.count(found, row.name, truth) for row in rows}
        for name, row in results.items():
            row["linf"] = found[name, "linf"].max().item()
            row["seconds_per_image"] = found[name, "seconds"].mean().item()
        record["dataset_size"][dataset], record["rows"][dataset] = len(images), results
        asked = int(goal.asked(found["before"]).sum())
        print(f"{len(images):,} images, {what}; {args.target} asked of {asked:,}")
        if args.kind in ("asl", "own") and not args.image:
            p = found["before"].sigmoid().numpy()
            record["mAP"] = float(asl_model.average_precision(p, truth.numpy()).mean())
            print(f"the classifier's mAP on them, over the classes present: {record['mAP']:.1%}")
        if args.sweep:
            record["controls"], curves = report_sweep(results)
            pictures["sweep"] = acwgan.plot("target switched", "eps, in 255ths", curves)
        elif not args.image:
            goal.report(results)
        if args.week in (3, 5) and asked:
            pictures["bars"] = bars(results)
    if rank:
        return None
    last = rows[-1].name
    shown = rows[-13::4] if args.sweep else (*rows[:3], rows[-1])
    columns = list(dict.fromkeys(["clean", *(row.name for row in shown)]))
    name = Path(args.model.partition(":")[0]).stem
    title = f"{name}: {args.target}, {args.direction}"
    pictures[f"pgd-attack-on-{name}"] = figure(title, found, columns, goal)
    if args.image:
        pixels, photo = found[last, "pixels"][:1], f"{args.image.stem}-adversarial"
        pictures[photo] = to_pil_image(pixels[0])
        report_photo(network, pixels.to(device), found, goal, args.out / f"{photo}.png")
    for name, picture in pictures.items():
        save = functools.partial(picture.save, format="png")
        common.write_file(args.out / f"{name}.png", save)
    arrays = {"clean": found["clean", "pixels"], "adversarial": found[last, "pixels"]}
    arrays |= {"before": found["before"], "after": found[last]}
    arrays = {key: x[: args.save] for key, x in arrays.items()}
    save = functools.partial(np.savez_compressed, **arrays)
    common.write_file(args.out / "adversarial.npz", save)
    print(f"{args.out} holds {', '.join(pictures)} (.png) and adversarial.npz")
    facts = {"device": str(device), "processes": world, "dataset": [what for *_, what in sets]}
    return common.write_results(args, record, **facts)


if __name__ == "__main__":
    common.run(main)

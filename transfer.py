"""Week 2: from a conditional GAN to a generator of adversarial digits.

Approach 1 trained a new generator against a finished critic, an auxiliary and a target classifier;
its samples "remained just noise images". Approach 2 retrained week 1's generator, as AT-GAN does
(Wang, He & Hopcroft 2019, arXiv 1904.07793), with an FID as the distance; the digits degraded. This
script repeats both losses, varies them row by row, and ends at digits that the target takes for the
next class, and judges for their own.

    python acwgan.py && python transfer.py          week 1's generator, then every row
    python transfer.py --variant ours-no-gradient   one row, or several
    python transfer.py --resume                     train the rows that are not finished yet

Writes into --out: for each row generator-<variant>.pt, history-<variant>.csv (its losses) and
samples-<variant>.npz; four figures; results.json; and the classifiers.
"""

import copy
import functools
import hashlib
import time
from collections import deque, namedtuple
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision.transforms.functional import to_pil_image

import acwgan
import common
from acwgan import CLASSES


class Variant(NamedTuple):
    """A row of the experiment: how its generator is made."""

    start: str  # see `new_generator`
    weights: dict  # of the terms of its loss, see `loss_term`
    rounds: float = 1  # of --steps
    rate: float = 3e-3  # Adam's step size; x 800 steps: a quarter of the log's 1e-4 x 94,000
    betas: tuple = (0.0, 0.9)  # Adam's
    scheduled: bool = False  # the step size decays to 0, the weight of the L2 distance rises
    sees_gradient: bool = False  # of the target, when it draws, too; see `Refiner`
    attacked: str = "target"  # or random_target: approach 1 never loaded its weights
    wanted: int | None = None  # the class to be taken for; None: the next
    critic_trains: bool = False


BOTH = {"auxiliary": 1, "adversarial": 1}  # beta, gamma
RANDOM = {"attacked": "random_target", "wanted": 7, "rate": 2e-3}
OURS = {"start": "refiner", "rate": 2e-3, "betas": (0.9, 0.99), "scheduled": True}
HINGES = {"adversarial hinge": 1, "robust hinge": 1}
VARIANTS = {
    "original": Variant("original", {}, rounds=0),
    # approach 1 as logged; then with a critic that trains, too
    "scratch": Variant("untrained", {"critic": 1, **BOTH}, **RANDOM),
    "scratch-live": Variant("untrained", {"critic": 1, **BOTH}, **RANDOM, critic_trains=True),
    # approach 2: gamma was 0, so nothing asked for adversarial digits; the FID was detached, so it
    # moved no weight. Then gamma = 1; an FID with its gradient; AT-GAN's distance
    "as-logged": Variant("pretrained", {"auxiliary": 1}),
    "adversarial": Variant("pretrained", BOTH),
    "fid": Variant("pretrained", {"frechet": 1, **BOTH}),
    "euclidean": Variant("pretrained", {"noisy euclidean": 0.05, **BOTH}),
    # a U-Net behind the original; then it sees the target's gradient
    "ours-no-gradient": Variant(weights={**HINGES, "euclidean": 0.14}, rounds=4, **OURS),
    "ours-gradient": Variant(
        weights={**HINGES, "euclidean": 0.2}, rounds=1.5, sees_gradient=True, **OURS
    ),
}
ANEW = "delete it, and it is trained anew"
SHAPING = ("seed", "steps", "batch_size")  # flags: of every training
ONE_RUN = ("out", "device", "resume", "force")  # flags that --resume does not restore


def settings(argv=None):
    """The flags, with every default resolved; with --resume those of the newest generator."""
    datasets, hint = ("auto", "mnist", "glyphs"), "auto: the one the generator was trained on"
    out, week1 = Path("runs/transfer"), Path("runs/acwgan/checkpoint.pt")
    p = common.parser(__doc__, out, "auto", datasets, hint, "train on N images", True)
    add, count = p.add_argument, common.count
    add("--generator", type=Path, default=week1, help="week 1's checkpoint")
    add("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="rows to train")
    add("--steps", type=count(1), default=800, help="steps; ours take more")
    add("--batch-size", type=count(2), default=64, help="samples per step")
    add("--samples", type=count(20), default=10_000, help="digits behind every number")
    args = p.parse_args(argv)
    if args.resume:
        generators = sorted(args.out.glob("generator-*.pt"), key=lambda path: path.stat().st_mtime)
        if not generators:
            p.error(f"there is no finished variant in {args.out}; leave out --resume")
        with common.advise(generators[-1], ANEW):
            p.set_defaults(**common.load_checkpoint(generators[-1], "transfer", ANEW)["flags"])
        args = p.parse_args(argv)
    args.variant = list(dict.fromkeys(["original", *args.variant]))  # what the others start from
    return args


def autocast(device):
    """A context that multiplies in bfloat16, where `device` does so in hardware."""
    return torch.autocast(device.type, torch.bfloat16, enabled=common.has_bf16(device))


class Classifier(nn.Module):
    """Images (N, 1, 28, 28) in [0, 1] -> logits (N, 10); `features` feed the last layer."""

    def __init__(self, features, width):
        super().__init__()
        self.features, self.head = nn.Sequential(*features), nn.Linear(width, CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.head(self.features(images)).float()


def model_a():
    """The target: Model A of Tramer et al. 2018 (arXiv 1705.07204), with a stride of 2."""
    layers = [nn.Conv2d(1, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 5, 2), nn.ReLU(), nn.Dropout(0.25)]
    layers += [nn.Flatten(), nn.Linear(6400, 128), nn.ReLU(), nn.Dropout(0.5)]
    return Classifier(layers, 128)


class Contrast(nn.Module):
    """Darkens dark pixels, brightens bright ones, which a robust classifier learns slowly."""

    def forward(self, images):
        return torch.sigmoid(10 * images - 5)


def convolutional(layers, inputs, robust=False):
    """A classifier of layers (channels in, out, kernel size, stride), whose last has `inputs`."""
    network = [*([Contrast()] if robust else []), nn.PixelUnshuffle(2)]
    for c_in, c_out, size, stride in layers:
        norm = [nn.BatchNorm2d(c_out)] if robust else []
        network += [nn.Conv2d(c_in, c_out, size, stride, 1, bias=not robust), *norm, nn.ReLU()]
    return Classifier([*network, nn.Flatten(), nn.Linear(inputs, 128), nn.ReLU()], 128)


class Refiner(nn.Module):
    """`ours`: week 1's generator, frozen, and a small U-Net that adds a residual to its digit,
    for the next class. With a target, the U-Net also sees its logits and the gradient of that
    class's lead, and in eval mode gives `smallest`: two more forward passes."""

    def __init__(self, original, target=None):
        super().__init__()
        self.original, self.target = copy.deepcopy(original), copy.deepcopy(target)
        self.latent = original.latent
        self.first, self.facts = nn.Conv2d(8, 40, 3, 1, 1), nn.Linear(3 * CLASSES, 40)
        self.encoder = nn.Sequential(nn.ReLU(), nn.Conv2d(40, 40, 3, 1, 1))
        layers = [nn.ReLU(), nn.Conv2d(40, 80, 2, 2), nn.ReLU(), nn.Conv2d(80, 80, 3, 1, 1)]
        layers += [nn.ReLU(), nn.Conv2d(80, 80, 3, 1, 1), nn.ReLU()]
        self.coarse = nn.Sequential(*layers, nn.ConvTranspose2d(80, 40, 2, 2))
        layers = [nn.ReLU(), nn.Conv2d(40, 40, 3, 1, 1), nn.ReLU(), nn.Conv2d(40, 4, 3, 1, 1)]
        self.decoder = nn.Sequential(*layers)
        for weight in self.decoder[-1].parameters():  # the first digits are the original's
            nn.init.zeros_(weight)
        self.to(memory_format=torch.channels_last)

    def forward(self, latent, labels):
        with autocast(latent.device):
            image = self.original(latent, labels).float()
            return self.refine(image, labels, wanted_class(labels))

    def refine(self, image, labels, wanted):
        hint, logits = (image > 0.5).float(), image.new_zeros(len(image), CLASSES)
        if self.target:
            with torch.enable_grad():
                seen = image.detach().requires_grad_()
                logits = self.target(seen)
                (gradient,) = torch.autograd.grad(lead(logits, wanted).sum(), seen)
            hint, logits = 10 * F.normalize(gradient.flatten(1)).view_as(image), logits.detach()
        maps = F.pixel_unshuffle(torch.cat([2 * image - 1, hint], 1), 2)
        classes = [F.one_hot(x, CLASSES) for x in (labels, wanted)]
        facts = self.facts(torch.cat([*classes, logits / 10], 1))[:, :, None, None]
        fine = self.encoder(self.first(maps.contiguous(memory_format=torch.channels_last)) + facts)
        residual = F.pixel_shuffle(self.decoder(fine + self.coarse(fine)), 2)
        adv = (image + residual.float()).clamp(0, 1)
        if self.training or not self.target:
            return adv
        return smallest(self.target, image, adv, wanted, lead(logits, wanted))


def load_generator(path, dataset):
    """Week 1's generator and critic, frozen, and their settings, with a hash of the file. Raises
    Failure if they are not of `dataset`, unless that is auto, or don't fit."""
    advice = f"make one with: python acwgan.py --out {path.parent}"
    checkpoint = common.load_checkpoint(path, "acwgan", advice)
    with common.advise(f"{path} does not fit", advice):
        made, marks = dict(checkpoint["settings"]), len(checkpoint["curve"])
        if made["image_size"] != 28 or dataset not in ("auto", made["dataset"]):
            drawn = f"{made['dataset']} at {made['image_size']} pixels, not {dataset} at 28"
            raise common.Failure(f"{path} draws {drawn}; {advice}", 2)
        generator = acwgan.Generator(made["latent"], made["width"])
        critic = acwgan.Critic(made["width"])
        generator.load_state_dict(checkpoint["average"])
        critic.load_state_dict(checkpoint["critic"])
    if marks < 10:
        print(f"{path} is unfinished, {marks} of 10 parts; acwgan.py --resume continues it")
    made["file"] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return generator.eval().requires_grad_(False), critic.eval().requires_grad_(False), made


def wanted_class(labels, wanted=None):
    """The classes (N,) that digits of `labels` (N,) are to be taken for: `wanted`, or the next."""
    return (labels + 1) % CLASSES if wanted is None else torch.full_like(labels, wanted)


def new_generator(name, networks):
    """The generator that a variant starts from. All but week 1's own normalise by the batch when
    they draw, too, as the log's did."""
    variant, original = VARIANTS[name], networks.original
    if variant.start == "refiner":
        refiner = Refiner(original, networks.target if variant.sees_gradient else None)
        return refiner.to(next(original.parameters()).device)
    generator = copy.deepcopy(original).requires_grad_(True)
    for module in generator.modules():
        if variant.start == "untrained" and hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if variant.start != "original" and isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    return generator


def lead(logits, labels):
    """The logit of each label less the largest other, (N,): above 0, the label is the answer."""
    label = logits.gather(1, labels[:, None])[:, 0]
    return label - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def pgd(network, images, labels, sign=1, eps=0.3, alpha=0.02, steps=40, noise=0.0):
    """L-inf PGD (Madry et al. 2018, arXiv 1706.06083) on the cross-entropy of the labels (N,), from
    up to `noise` off the images; sign -1: towards the labels. Returns images in [0, 1]."""
    adv = images + noise * (2 * torch.rand_like(images) - 1)
    for _ in range(steps):
        adv.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(adv), labels), adv)
        adv = adv.detach() + sign * alpha * gradient.sign()
        adv = adv.clamp(images - eps, images + eps).clamp(0, 1)
    return adv


def carlini_wagner(network, images, wanted, searches=6, steps=150, rate=0.05):
    """The least L2 change that a search finds (Carlini & Wagner 2017, arXiv 1608.04644): Adam, in
    tanh space, on ||change||^2 + c * hinge on the lead of the class wanted, with the smallest c
    that succeeds, by a binary search for each image. Returns images in [0, 1]."""
    best, least = images.clone(), images.new_full((len(images),), torch.inf)
    low, high, c = torch.zeros_like(least), least.clone(), torch.ones_like(least)
    for _ in range(searches):
        free = torch.atanh((2 * images - 1) * (1 - 1e-6)).requires_grad_()
        adam, succeeded = torch.optim.Adam([free], rate), wanted < 0  # none yet
        for _ in range(steps):
            adv = (free.tanh() + 1) / 2
            size = (adv - images).square().flatten(1).sum(1)
            ahead = lead(network(adv), wanted) - 0.1  # or rounding to 8 bits undoes it
            (free.grad,) = torch.autograd.grad((size + c * (-ahead).relu()).sum(), free)
            better = (ahead > 0) & (size < least)
            best[better], least[better] = adv.detach()[better], size.detach()[better]
            succeeded |= ahead > 0
            adam.step()
        low, high = torch.where(succeeded, low, c), torch.where(succeeded, c, high)
        c = torch.where(high.isinf(), 10 * c, (low + high) / 2)
    return best


@torch.no_grad()
def smallest(network, images, adv, wanted, start, margin=0.5, steps=2):
    """As much of the change from images to adv (N, 1, 28, 28) as the class wanted needs to lead
    by `margin`, as if its lead, at first `start` (N,), were linear along it."""
    change, share = adv - images, torch.ones_like(images[:, :1, :1, :1])
    for _ in range(steps):
        ahead = lead(network((images + share * change).clamp(0, 1)), wanted)
        factor = ((margin - start) / (ahead - start)).nan_to_num(0)  # 0 / 0: nothing is needed
        share = share * factor.clamp(0, 1.3).view_as(share)
    return (images + share * change).clamp(0, 1)


AUXILIARY = functools.partial(convolutional, ((4, 32, 3, 1), (32, 64, 3, 2), (64, 128, 3, 2)), 2048)
JUDGE = functools.partial(convolutional, ((4, 32, 3, 1), (32, 64, 4, 2), (64, 64, 3, 1)), 3136)
PGD_JUDGE = functools.partial(convolutional, ((4, 32, 5, 1), (32, 64, 5, 2)), 1600, True)
# FGSM from a random start (Wong et al. 2020, arXiv 2001.03994), and three steps of PGD
ONE_STEP = {"steps": 1, "alpha": 0.375, "noise": 0.3}
THREE_STEPS = {"steps": 3, "alpha": 0.15, "noise": 0.3}
CLASSIFIERS = {  # network, seed, arguments of `acwgan.train_classifier`, of `pgd` if adversarial
    "target": (model_a, 1, {"epochs": 3, "lr": 1e-3}, {}),  # it is attacked
    "auxiliary": (AUXILIARY, 3, {"epochs": 3, "lr": 3e-3, "shift": 2}, {}),
    "robust_auxiliary": (AUXILIARY, 4, {"epochs": 4, "lr": 3e-3}, ONE_STEP),
    # judges: in no loss, of other architectures and trainings
    "judge": (JUDGE, 5, {"epochs": 7, "lr": 4e-3}, ONE_STEP),
    "pgd_judge": (PGD_JUDGE, 6, {"epochs": 4, "lr": 5e-3}, THREE_STEPS),
}
# what a generator is trained against and measured with, all frozen
Networks = namedtuple("Networks", ("original", "critic", "random_target", *CLASSIFIERS))


def classifier(name, out, dataset, images, labels):
    """One of CLASSIFIERS, trained on these images (N, 1, 28, 28), or the one kept in `out`."""
    make, seed, how, attack = CLASSIFIERS[name]
    torch.manual_seed(seed)
    network = make().to(images.device)
    how = {"seed": seed, "attack": attack, **how}
    made = {"network": str(network), "dataset": dataset, "images": len(images), **how}
    how["attack"] = functools.partial(pgd, **attack) if attack else None
    fit = functools.partial(acwgan.train_classifier, images=images, labels=labels, **how)
    return acwgan.kept_classifier(out / f"{name}.pt", made, network, fit)


class FeatureBank:
    """The Frechet distance of generated to real digits in a classifier's features, over the total
    variance of the real ones. A batch is too few for a covariance: the last seven join it."""

    def __init__(self, network, images):
        self.network, rng = network, torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(images), generator=rng)[:2048].to(images.device)
        real = network.features(images[chosen]).float()
        # few rows of the same mean and covariance, or each step would factor 2,048
        spread = torch.linalg.qr((real - real.mean(0)) / (len(real) - 1) ** 0.5).R
        spread *= (len(spread) - 0.5) ** 0.5
        self.reference = torch.cat([real.mean(0) + spread, real.mean(0) - spread])
        self.recent = deque(maxlen=7)

    def distance(self, images):
        """A scalar, differentiable in images (N, 1, 28, 28), which join the bank."""
        features = self.network.features(images).float()
        bank = torch.cat([features, *self.recent])
        self.recent.append(features.detach())
        distance = common.frechet_distance_torch(bank, self.reference)
        distance = distance / self.reference.var(0).sum()
        # only the newest batch, an eighth of the bank, has a gradient: make up for that
        distance.register_hook(lambda gradient: len(bank) / len(features) * gradient)
        return distance


def loss_term(term, networks, bank, images, latent, labels, wanted):
    """One term of a variant's loss, a scalar, for images (N, 1, 28, 28) drawn from latent
    (N, latent) and labels (N,), to be taken for the classes wanted (N,)."""
    match term:
        case "critic":
            return -networks.critic(images)[0].mean()
        case "auxiliary":
            return F.cross_entropy(networks.auxiliary(images), labels)
        case "adversarial":
            return F.cross_entropy(networks.target(images), wanted)
        case "frechet":
            return bank.distance(images)
        case "euclidean" | "noisy euclidean":
            original = networks.original(latent, labels).float()
            if term == "noisy euclidean":  # as in AT-GAN's equation 5
                original = original + 0.1 * torch.randn_like(original)
            return (images - original).square().flatten(1).sum(1).mean()
        case "adversarial hinge":
            return (1.5 - lead(networks.target(images), wanted)).relu().mean()
        case "robust hinge":
            return (2.0 - lead(networks.robust_auxiliary(images), labels)).relu().mean()


def train(name, args, networks, images, labels):
    """Train a variant's generator beside real images (N, 1, 28, 28) in [0, 1], labels (N,) int64.
    Returns it, frozen, and its history: the terms of every 50th step."""
    variant, device, began = VARIANTS[name], images.device, time.time()
    steps, size = int(variant.rounds * args.steps), args.batch_size
    torch.manual_seed(args.seed)
    generator = new_generator(name, networks)
    adam = torch.optim.Adam(generator.parameters(), variant.rate, variant.betas, fused=True)
    if variant.critic_trains:
        networks = networks._replace(critic=copy.deepcopy(networks.critic).requires_grad_(True))
        critic_adam = torch.optim.Adam(networks.critic.parameters(), 1e-3, (0.0, 0.99))
    bank, history = FeatureBank(networks.auxiliary, images), []
    bar = common.progress(range(steps), name, unit="step")
    for step in bar:
        weights = dict(variant.weights)
        if variant.scheduled:
            adam.param_groups[0]["lr"] = variant.rate * min(1, (step + 1) / 50) * (1 - step / steps)
            weights["euclidean"] *= min(1, step / (0.7 * steps))
        latent = torch.randn(size, generator.latent, device=device)
        asked = torch.randint(CLASSES, (size,), device=device)
        wanted = wanted_class(asked, variant.wanted)
        with autocast(device):
            drawn = generator(latent, asked).float()
        if variant.critic_trains:
            chosen = torch.randint(len(images), (size,), device=device)
            real = (images[chosen], labels[chosen])
            with autocast(device):
                loss, _ = acwgan.critic_loss(networks.critic, *real, drawn.detach(), share=0.5)
            critic_adam.zero_grad()
            loss.backward()
            critic_adam.step()
        # a context of its own: that above keeps bfloat16 weights from before the critic's step
        with autocast(device):
            batch = networks, bank, drawn, latent, asked, wanted
            terms = {term: loss_term(term, *batch) for term in weights}
        loss = sum(weight * terms[term] for term, weight in weights.items())
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % 50 == 0 or step == steps - 1:
            if not loss.isfinite():
                raise common.Failure(f"{name}: the loss is no number; lower its rate")
            row = {"step": step + 1, "seconds": round(time.time() - began, 2)}
            history.append(row | {term: value.item() for term, value in terms.items()})
            bar.set_postfix(history[-1], refresh=False)
    return generator.eval().requires_grad_(False), history


def classify(network, images):
    """The classes (N,) int64 that `network` reads from images (N, 1, 28, 28)."""
    return acwgan.predict(network, images).argmax(1)


def measure(images, original, asked, wanted, networks):
    """The classes (N,) that the target reads from images (N, 1, 28, 28), and their row's numbers,
    without images asked for the wanted class. original: week 1's images of the same (z, y)."""
    counts = asked != wanted
    readers = networks.target, networks.judge, networks.pgd_judge
    predicted, judge, pgd_judge = (classify(network, images) for network in readers)
    fooled = predicted == wanted
    hits = {
        "target_fooled": fooled,
        "judge_reads_y": judge == asked,
        "pgd_judge_reads_y": pgd_judge == asked,
        "both": fooled & (judge == asked),
        "both_by_pgd_judge": fooled & (pgd_judge == asked),
    }
    row = {name: common.wilson(hit[counts].sum(), counts.sum()) for name, hit in hits.items()}
    change = (images - original).flatten(1)[counts]
    row |= {"l2": change.norm(dim=1).mean().item(), "linf": change.abs().amax(1).mean().item()}
    return predicted, row


def timed(make, *args):
    """The images that `make(*args)` returns, and how many it makes in a second."""
    began = time.perf_counter()
    images = make(*args)
    images.sum().item()  # on a GPU: wait for it
    return images, len(images) / (time.perf_counter() - began)


ATTACKS = {"pgd": (functools.partial(pgd, sign=-1), 500), "carlini-wagner": (carlini_wagner, 200)}
FIGURES = {
    "synthetic-adversarial-framework.png": ("original", "scratch", "scratch-live"),
    "synthetic-adversarial-framework-with-fid.png": [x for x in VARIANTS if "scratch" not in x],
}


def page_of(lines):
    """A picture of lines of ten digits, (name, images (10, 1, 28, 28) in [0, 1])."""
    digits = torch.cat([images for _, images in lines]).cpu()
    grid = to_pil_image(torchvision.utils.make_grid(digits, 10, pad_value=0.3))
    grid = grid.resize((780, 780 * grid.height // grid.width), Image.BICUBIC)
    page = ImageOps.expand(grid, (120, 0, 0, 0), "white")
    ink = ImageDraw.Draw(page)
    for i, (name, _) in enumerate(lines):
        ink.text((4, (i + 0.5) * page.height / len(lines)), name, "black", anchor="lm")
    return page


def report(out, rows, drawn):
    """Print the table of the rows; write the figures of their digits, the first ten, into `out`."""
    print("% of digits; wanted: y + 1; scratch, scratch-live: 7, of a random target")
    head = "fooled", "judge", "both", "pgd judge", "both", "L2", "over C&W", "L-inf", "digits/s"
    keys = ["target_fooled", "judge_reads_y", "both", "pgd_judge_reads_y", "both_by_pgd_judge"]
    keys += ["l2", "l2_over_cw", "linf", "digits_per_second"]
    lines = []
    for name, row in rows.items():
        cells = (100 * row[x]["rate"] if isinstance(row[x], dict) else row[x] for x in keys)
        lines.append([name, *(f"{x:.4g}" for x in cells)])
    common.print_table(["variant", *head], lines)
    digits, pages, points = {name: x[:10] for name, x in drawn.items()}, {}, {}
    for path, names in FIGURES.items():
        pages[path] = page_of([(name, digits[name]) for name in names if name in digits])
    lines = [("original", digits["original"])]
    closest = "ours-gradient", "ours-no-gradient", "carlini-wagner"
    for name in [name for name in closest if name in digits]:
        change = (digits[name] - digits["original"] + 0.5).clamp(0, 1)
        lines += [(name, digits[name]), ("its change", change)]
    pages["closest.png"] = page_of(lines)
    for name, row in rows.items():
        read, fooled = (row[key]["rate"] for key in ("judge_reads_y", "target_fooled"))
        points[f"{name}, L2 {row['l2']:.1f}"] = [read], [fooled]
    pages["scatter.png"] = acwgan.plot("target fooled", "judge reads y", points, joined=False)
    for path, page in pages.items():
        common.write_file(out / path, functools.partial(page.save, format="png"))


def main(argv=None):
    """Train, measure and draw the variants; returns what results.json holds."""
    args = settings(argv)
    original, critic, week1 = load_generator(args.generator, args.dataset)
    device = common.pick_device(args.device)
    common.make_folder(args.out)
    dataset, images, labels = common.load_digits(week1["dataset"], args.data, True, args.limit)
    test = common.load_digits(dataset, args.data, False, args.samples)[1:]
    images, labels, test_images, test_labels = (x.to(device) for x in (images, labels, *test))
    facts = {"dataset": dataset, "dataset_size": len(images)}
    flags = {flag: value for flag, value in vars(args).items() if flag not in ONE_RUN}
    flags |= {"data": str(args.data), "generator": str(args.generator)}
    shared = {"week_1": week1["file"], **facts, **{flag: flags[flag] for flag in SHAPING}}
    made = {name: shared | VARIANTS[name]._asdict() for name in args.variant}
    paths = {name: args.out / f"generator-{name}.pt" for name in args.variant}
    # other settings in --out are refused before any training
    kept = {x: acwgan.starting_point(paths[x], "transfer", made[x], args) for x in paths}
    trained = {x: classifier(x, args.out, dataset, images, labels) for x in CLASSIFIERS}
    torch.manual_seed(7)
    random_target = model_a().to(device).eval().requires_grad_(False)
    networks = Networks(original.to(device), critic.to(device), random_target, **trained)
    right = {}
    for name, network in trained.items():
        right[name] = classify(network, test_images) == test_labels
        if "judge" in name:
            attack = functools.partial(pgd, network)
            adv = acwgan.in_parts(attack, test_images[:1000], test_labels[:1000])
            right[f"{name}_under_pgd"] = classify(network, adv) == test_labels[:1000]
    accuracy = {name: common.wilson(hits.sum(), len(hits)) for name, hits in right.items()}
    common.print_table(["classifier", "right on test images"], accuracy.items())
    asked = torch.arange(args.samples, device=device) % CLASSES
    drawn, rows = {}, {}
    for name in args.variant:
        variant = VARIANTS[name]
        wanted = wanted_class(asked, variant.wanted)
        attacked = networks._replace(target=getattr(networks, variant.attacked))
        if kept[name]:
            generator = new_generator(name, attacked)
            with common.advise(paths[name], ANEW):
                generator.load_state_dict(kept[name]["generator"])
            generator.eval().requires_grad_(False)
        else:
            generator, history = train(name, args, attacked, images, labels)
            if history:
                acwgan.write_history(args.out / f"history-{name}.csv", history)
            content = {"kind": "transfer", "settings": made[name], "flags": flags}
            common.save_checkpoint(paths[name], content | {"generator": generator.state_dict()})
        drawn[name], speed = timed(acwgan.generate, generator, asked, args.seed)
        predicted, row = measure(drawn[name], drawn["original"], asked, wanted, attacked)
        rows[name] = row | {"digits_per_second": speed}
        goals = {"target": wanted, "predicted": predicted}
        acwgan.save_samples(args.out / f"samples-{name}.npz", drawn[name], asked, **goals)
    wanted = wanted_class(asked)
    for name, (attack, n) in ATTACKS.items():
        start, goal = drawn["original"][:n], wanted[:n]
        attack = functools.partial(attack, networks.target)
        adv, speed = timed(acwgan.in_parts, attack, start, goal)
        drawn[name] = (adv * 255).round() / 255
        _, row = measure(drawn[name], start, asked[:n], goal, networks)
        rows[name] = row | {"digits_per_second": speed}
    floor, n = rows["carlini-wagner"]["l2"], len(drawn["carlini-wagner"])
    for name, row in rows.items():
        change = (drawn[name][:n] - drawn["original"][:n]).flatten(1)
        row["l2_over_cw"] = change.norm(dim=1).mean().item() / max(floor, 1e-9)
    report(args.out, rows, drawn)
    facts |= {"device": str(device), "accuracy": accuracy}
    return common.write_results(args, {"rows": rows}, **facts)


if __name__ == "__main__":
    common.run(main)

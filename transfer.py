"""Week 2: from a conditional GAN to a generator of adversarial digits.

Approach 1 trained a new generator against a finished critic, an auxiliary and a target classifier;
its samples "remained just noise images". Approach 2 retrained week 1's generator, as AT-GAN does
(Wang, He & Hopcroft 2019, arXiv 1904.07793), with an FID as the distance; the digits degraded.
This script repeats both, changes one thing per row, and ends with digits that the target classifier
takes for the next class, while independent judges still see their own.

    python acwgan.py && python transfer.py      train week 1's generator, then every row
    python transfer.py --variant ours --force   retrain one row; the others stay in the report

Writes generator-<row>.pt, samples-<row>.npz, figures, results.json and the classifiers into --out.
"""

import hashlib
from collections import deque, namedtuple
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.autograd import grad
from torch.optim import SGD, Adam

import acwgan
import common
from acwgan import CLASSES, autocast, classify, cnn, random_stream
from common import Failure, number, positive_int


class Variant(NamedTuple):
    """One row of the experiment: how its generator is trained."""

    start: str  # what the generator starts from, see `new_generator`
    weights: dict  # of the terms of the loss, see `loss_term`
    rounds: int = 1  # generator steps, in multiples of --steps
    # rate x 800 steps: a quarter of the log's 1e-4 x 94,000
    lr: float = 3e-3
    betas: tuple | None = (0.0, 0.9)  # of Adam, as in the log; None: plain SGD
    scheduled: bool = False  # the learning rate falls, the euclidean weight rises
    target: str = "target"  # the classifier to be fooled
    wanted: int | None = None  # the class to be mistaken for; None: the next class
    critic_trains: bool = False  # whether the critic keeps training


APPROACH_1 = {"critic": 1, "auxiliary": 1, "adversarial": 1}  # alpha, beta, gamma
SCRATCH = Variant("untrained", APPROACH_1, lr=2e-3, target="random_target", wanted=7)
OURS = {"adversarial hinge": 1, "robust hinge": 1, "euclidean": 0.24}
VARIANTS = {
    "original": Variant("original", {}, rounds=0),
    # approach 1 as logged: the target's weights were never loaded; then the critic keeps training
    "scratch": SCRATCH,
    "scratch-live": SCRATCH._replace(critic_trains=True),
    # approach 2 as logged: gamma was 0, so nothing asked for adversarial digits, and the FID was
    # detached, so it moved no weight; then gamma = 1, an FID with a gradient, AT-GAN's distance
    "as-logged": Variant("pretrained", {"auxiliary": 1}),
    # Adam rescales the gradient that is left, which is nearly zero, to steps of full size
    "as-logged-sgd": Variant("pretrained", {"auxiliary": 1}, betas=None),
    "adversarial": Variant("pretrained", {"auxiliary": 1, "adversarial": 1}),
    "fid": Variant("pretrained", {"frechet": 1, "auxiliary": 1, "adversarial": 1}),
    "euclidean": Variant(
        "pretrained", {"noisy euclidean": 0.05, "auxiliary": 1, "adversarial": 1}
    ),
    "ours": Variant(
        "refiner", OURS, rounds=8, lr=2.5e-3, betas=(0.9, 0.99), scheduled=True
    ),
}
WARM_UP = 50  # steps in which a scheduled learning rate rises at first
RISE = 0.7  # share of the steps in which a scheduled weight rises
TARGET_MARGIN = 1.5  # by which the wanted class should lead, see "adversarial hinge"
ROBUST_MARGIN = 2.0  # by which the digit's own class should lead, see "robust hinge"
BATCH_SIZE = 64  # digits in a step
CRITIC_RATE = 1e-3  # learning rate of a critic that keeps training
BANK_BATCHES = 7  # earlier batches that join the newest one in the Frechet distance
# with most seeds, an untrained classifier takes nearly all digits for a 7, or nearly none; with
# this one, about a tenth
RANDOM_TARGET_SEED = 25
VERSION = 2  # raised where generators that earlier code trained must not be reused
CW_DIGITS = 200  # digits for Carlini & Wagner's search, which is slow


def parse_args(argv=None):
    """Parse the flags."""
    parser = common.parser(
        "transfer.py",
        __doc__,
        "runs/transfer",
        ("auto", "mnist", "glyphs"),
        "the digits; auto: those that the generator was trained on",
        "train on the first N images; default: all",
    )
    add = parser.add_argument
    add(
        "--generator",
        type=Path,
        default="runs/acwgan/checkpoint.pt",
        help="week 1's checkpoint",
    )
    add(
        "--variant",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        help="rows to train",
    )
    add(
        "--steps",
        type=positive_int,
        default=800,
        help="training steps per row (ours: 8 times as many)",
    )
    add(
        "--samples",
        type=number(int, 20),
        default=10_000,
        help="digits drawn per row; best a multiple of 125",
    )
    args = parser.parse_args(argv)
    if args.limit == 1:
        parser.error("--limit 1: a Frechet distance needs at least 2 images")
    args.variant = ["original", *args.variant]  # the others are compared with it
    return args


def model_a():
    """Model A of Tramer et al. 2018 (arXiv 1705.07204), but its first stride is 2, for speed."""
    layers = [
        nn.Conv2d(1, 64, 5, 2),
        nn.ReLU(),
        nn.Conv2d(64, 64, 5),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(4096, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
    ]
    return acwgan.Classifier(layers)


class Contrast(nn.Module):
    """Darken dark pixels and brighten bright ones, which robust classifiers learn slowly."""

    def forward(self, images):
        return torch.sigmoid(10 * images - 5)


def pgd_judge():
    """A convolutional network with batch norm, behind `Contrast`."""
    network = cnn([(32, 5, 1), (64, 5, 2)], 1600, norm=True)
    network.features.insert(0, Contrast())
    return network


AUXILIARY = ([(32, 3, 1), (64, 3, 2), (128, 3, 2)], 2048)
JUDGE = ([(32, 3, 1), (64, 4, 2), (64, 3, 1)], 3136)
# adversarial training by FGSM (Wong et al. 2020, arXiv 2001.03994) or PGD, from a random start
FGSM = {"steps": 1, "alpha": 0.375, "noise": 0.3}
PGD = {"steps": 3, "alpha": 0.15, "noise": 0.3}
CLASSIFIERS = {  # network, its arguments, its training, the attack if that is adversarial
    "target": (model_a, (), {"seed": 1, "epochs": 3, "lr": 1e-3}, None),
    # these help to train the generators
    "auxiliary": (cnn, AUXILIARY, {"seed": 3, "epochs": 3, "lr": 3e-3, "shift": 2}, None),
    "robust_auxiliary": (cnn, AUXILIARY, {"seed": 4, "epochs": 4, "lr": 3e-3}, FGSM),
    # the judges are in no loss; pgd_judge differs from all others in its training, too
    "judge": (cnn, JUDGE, {"seed": 5, "epochs": 7, "lr": 4e-3}, FGSM),
    "pgd_judge": (pgd_judge, (), {"seed": 6, "epochs": 4, "lr": 5e-3}, PGD),
}
# what generators are trained against and measured with, frozen; original: week 1's generator
Networks = namedtuple("Networks", ("original", "critic", "random_target", *CLASSIFIERS))


def relu_convolution(c_in, c_out):
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, 3, padding=1))


class Refiner(nn.Module):
    """`ours`: a U-Net that adds a residual to the digits of week 1's frozen generator.
    Latent (N, latent), labels (N,) -> images (N, 1, 28, 28) in [0, 1]; it runs without a target."""

    def __init__(self, original):
        super().__init__()
        self.latent = original.latent
        self.original = deepcopy(original)
        self.first = nn.Conv2d(4, 40, 3, padding=1)
        self.classes = nn.Linear(CLASSES, 40)
        self.encoder = relu_convolution(40, 40)
        self.coarse = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(40, 80, 2, 2),
            relu_convolution(80, 80),
            relu_convolution(80, 80),
            nn.ReLU(),
            nn.ConvTranspose2d(80, 40, 2, 2),
        )
        self.decoder = nn.Sequential(relu_convolution(40, 40), relu_convolution(40, 4))
        for weight in self.decoder[-1].parameters():  # it starts as the original
            nn.init.zeros_(weight)
        self.to(memory_format=torch.channels_last)

    def forward(self, latent, labels):
        return self.refine(self.original(latent, labels).float(), labels)

    def refine(self, images, labels):
        """Add the residual to week 1's images (N, 1, 28, 28) of these labels (N,)."""
        maps = F.pixel_unshuffle(2 * images - 1, 2)
        maps = self.first(maps.contiguous(memory_format=torch.channels_last))
        classes = self.classes(F.one_hot(labels, CLASSES).float())
        fine = self.encoder(maps + classes[:, :, None, None])
        residual = F.pixel_shuffle(self.decoder(fine + self.coarse(fine)), 2).float()
        # softsign, x / (1 + |x|), never loses its gradient; a clamp did, and training stopped
        return (images + F.softsign(residual)).clamp(0, 1)


def load_week_1(path, dataset, device=None):
    """Week 1's generator and critic, frozen; its data set and a hash of its weights.
    Raises Failure if the checkpoint does not fit, or is not of `dataset` (auto: of any)."""
    checkpoint = common.load_checkpoint(
        path, f"train one with: python acwgan.py --out {path.parent}", "acwgan"
    )
    if checkpoint["steps"] < checkpoint["total_steps"]:
        print(f"{path} is unfinished: python acwgan.py --resume --out {path.parent}")
    trained_with = checkpoint["settings"]
    known = ("auto", trained_with["dataset"])
    if trained_with["image_size"] != 28 or dataset not in known:
        raise Failure(
            f"{path} does not draw 28 x 28 digits of --dataset {dataset}; name another "
            f"--generator, or train one: python acwgan.py --dataset {dataset} --out FOLDER",
            2,
        )
    generator = acwgan.Generator(trained_with["latent"], trained_with["width"], 28)
    critic = acwgan.Critic(trained_with["width"], 28)
    # of the weights: the file also holds paths, which may differ
    digest = hashlib.sha256()
    for network, name in ((generator, "average"), (critic, "critic")):
        network.load_state_dict(checkpoint[name])
        network.eval().requires_grad_(False).to(device)
        for weight in checkpoint[name].values():
            digest.update(weight.numpy().tobytes())
    facts = {"week_1": digest.hexdigest()[:12], "dataset": trained_with["dataset"]}
    return generator, critic, facts


def new_generator(variant, original):
    """The generator that a row starts from."""
    if variant.start == "refiner":
        return Refiner(original)
    generator = deepcopy(original).requires_grad_(True)
    for module in generator.modules():
        if variant.start == "untrained" and hasattr(module, "reset_parameters"):
            module.reset_parameters()
        # like the log's generators, these use batch statistics even when sampling
        if variant.start != "original" and isinstance(module, nn.BatchNorm2d):
            module.running_mean = None
            module.running_var = None
    return generator


def wanted_classes(variant, labels):
    """The classes (N,) that a row's digits of the classes `labels` (N,) should pass for."""
    if variant.wanted is None:
        return (labels + 1) % CLASSES
    return torch.full_like(labels, variant.wanted)


def margin(logits, labels):
    """Each label's logit minus the largest other one, (N,); above 0, the label is predicted."""
    index = labels[:, None]
    label = logits.gather(1, index)[:, 0]
    return label - logits.scatter(1, index, -torch.inf).amax(1)


def pgd(network, images, labels, eps=0.3, alpha=0.02, steps=40, noise=0.0):
    """L-inf PGD on the cross-entropy (Madry et al. 2018, arXiv 1706.06083).
    Moves images (N, 1, 28, 28) in [0, 1] away from their labels (N,) and returns them. eps, the
    step alpha and the random start's noise are in pixel values."""
    adv = images + noise * (2 * torch.rand_like(images) - 1)
    for _ in range(steps):
        adv.requires_grad_()
        loss = F.cross_entropy(network(adv), labels)
        (gradient,) = grad(loss, adv)
        adv = adv.detach() + alpha * gradient.sign()
        adv = adv.clamp(images - eps, images + eps).clamp(0, 1)
    return adv


def carlini_wagner(network, images, wanted, searches=6, steps=150, lr=0.05):
    """The smallest L2 change that a search finds (Carlini & Wagner 2017, arXiv 1608.04644): Adam
    on ||change||^2 + c * hinge on the margin of the wanted classes (N,), in tanh space; each search
    bisects c for each image. An upper bound: more steps find slightly less; changes below some
    7 * lr are overshot. Images (N, 1, 28, 28) in [0, 1] return unchanged where all fail."""
    best = images.clone()
    smallest = images.new_full(wanted.shape, torch.inf)
    low = torch.zeros_like(smallest)
    high = smallest.clone()
    c = torch.ones_like(smallest)
    bar = common.progress(desc="Carlini & Wagner, in steps", total=searches * steps)
    for _ in range(searches):
        free = torch.atanh((2 * images - 1) * 0.999999).requires_grad_()
        adam = Adam([free], lr)
        succeeded = torch.zeros_like(wanted, dtype=torch.bool)
        for _ in range(steps):
            adv = (free.tanh() + 1) / 2
            size = (adv - images).square().flatten(1).sum(1)
            lead = margin(network(adv), wanted) - 0.1  # survives rounding to 8 bits
            loss = size + c * (-lead).relu()
            adam.zero_grad()
            loss.sum().backward()
            success = lead > 0
            better = success & (size < smallest)
            best[better] = adv.detach()[better]
            smallest[better] = size.detach()[better]
            succeeded |= success
            adam.step()
            bar.update()
        low = torch.where(succeeded, low, c)
        high = torch.where(succeeded, c, high)
        c = torch.where(high.isinf(), 10 * c, (low + high) / 2)
    bar.close()
    return best


def load_networks(out, dataset, images, labels, original, critic):
    """All `Networks`; classifiers come from `out`, or are trained on these images and labels."""
    device = images.device
    torch.manual_seed(RANDOM_TARGET_SEED)
    random_target = model_a().eval().requires_grad_(False)
    networks = [original, critic, random_target.to(device)]
    for name, (make, arguments, training, attack) in CLASSIFIERS.items():
        torch.manual_seed(training["seed"])
        network = make(*arguments).to(device)
        recipe = {
            "network": str(network),
            "dataset": dataset,
            "images": len(images),
            **training,
            "attack": attack,
        }
        if attack:
            attack = partial(pgd, **attack)
        path = out / f"{name}.pt"
        network = acwgan.cached_classifier(path, network, images, labels, recipe, attack)
        networks.append(network)
    return Networks(*networks)


def measure_classifiers(networks, images, labels):
    """The accuracy of each classifier on test images, of the judges also under PGD."""
    rates = {}
    for name in CLASSIFIERS:
        network = getattr(networks, name)
        rates[name] = acwgan.accuracy(network, images, labels)
        if "judge" in name:
            adv = pgd(network, images[:500], labels[:500])
            rates[f"{name}_under_pgd"] = acwgan.accuracy(network, adv, labels[:500])
    return rates


class FeatureBank:
    """The Frechet distance of generated to real digits in a classifier's features, relative to the
    variance of the real ones. Earlier batches join in: one alone is too small for a covariance."""

    def __init__(self, network, images):
        stream = random_stream(0)
        rows = torch.randperm(len(images), generator=stream)[:2048]
        self.network = network
        self.real = network.features(images[rows])
        self.recent = deque(maxlen=BANK_BATCHES)

    def distance(self, images):
        """A scalar for images (N, 1, 28, 28), which join the bank: the distance of the whole bank,
        multiplied by its number of batches because only the newest one has a gradient."""
        features = self.network.features(images).float()
        bank = torch.cat([features, *self.recent])
        self.recent.append(features.detach())
        distance = common.frechet_distance_torch(bank, self.real) / self.real.var(0).sum()
        return len(bank) / len(features) * distance


def loss_term(term, networks, bank, images, original, labels, wanted):
    """One term of a row's loss, a scalar, for images (N, 1, 28, 28) in [0, 1] of the classes
    `labels` (N,) that should pass for the wanted ones (N,). original: week 1's images of the same
    latents, which the euclidean terms need."""
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
            if term == "noisy euclidean":  # AT-GAN's equation 5
                original = original + 0.1 * torch.randn_like(original)
            return (images - original).square().flatten(1).sum(1).mean()
        case "adversarial hinge":
            return (TARGET_MARGIN - margin(networks.target(images), wanted)).relu().mean()
        case "robust hinge":
            logits = networks.robust_auxiliary(images)
            return (ROBUST_MARGIN - margin(logits, labels)).relu().mean()


def train(name, args, networks, real_images, real_labels):
    """A row's trained generator, for real_images (N, 1, 28, 28) in [0, 1] and real_labels (N,)."""
    variant = VARIANTS[name]
    networks = networks._replace(target=getattr(networks, variant.target))
    steps = variant.rounds * args.steps
    device = real_images.device
    torch.manual_seed(args.seed)
    generator = new_generator(variant, networks.original).to(device)
    if variant.betas:
        optimizer = Adam(generator.parameters(), variant.lr, variant.betas, fused=True)
    else:
        optimizer = SGD(generator.parameters(), variant.lr)
    if variant.critic_trains:
        critic = deepcopy(networks.critic).requires_grad_(True)
        critic_adam = Adam(critic.parameters(), CRITIC_RATE, (0.0, 0.99))
        networks = networks._replace(critic=critic)
    bank = FeatureBank(networks.auxiliary, real_images)
    needs_original = variant.start == "refiner" or "noisy euclidean" in variant.weights
    original = None
    for step in common.progress(range(steps), name, unit="step"):
        weights = dict(variant.weights)
        if variant.scheduled:
            warm_up = min(1, (step + 1) / WARM_UP)
            optimizer.param_groups[0]["lr"] = variant.lr * warm_up * (1 - step / steps)
            weights["euclidean"] *= min(1, step / (RISE * steps))
        latent = torch.randn(BATCH_SIZE, generator.latent, device=device)
        labels = torch.randint(CLASSES, (BATCH_SIZE,), device=device)
        wanted = wanted_classes(variant, labels)
        with autocast(device):
            if needs_original:
                original = networks.original(latent, labels).float()
            if variant.start == "refiner":
                images = generator.refine(original, labels)
            else:
                images = generator(latent, labels).float()
        if variant.critic_trains:
            rows = torch.randint(len(real_images), (BATCH_SIZE,), device=device)
            acwgan.critic_step(
                critic, critic_adam, real_images[rows], real_labels[rows], images.detach()
            )
        loss = 0
        # a new context: the one above cached the critic's weights from before its step
        with autocast(device):
            for term, weight in weights.items():
                value = loss_term(term, networks, bank, images, original, labels, wanted)
                loss += weight * value
        if not loss.isfinite():
            raise Failure(f"{name}: the loss is not finite; lower lr in VARIANTS")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return generator


def load_generator(name, args, made_with, original):
    """A row's finished generator, or None; Failure if it was made with other settings."""
    path = args.out / f"generator-{name}.pt"
    if not path.exists() or (args.force and name in args.variant):
        return None
    checkpoint = common.load_checkpoint(path, "delete it to train again", "transfer")
    if args.force and checkpoint["settings"] != made_with:
        return None  # the report leaves it out
    common.require_same(path, checkpoint["settings"], made_with)
    generator = new_generator(VARIANTS[name], original)
    generator.load_state_dict(checkpoint["generator"])
    return generator


def mean_l2(change):
    """The mean L2 norm of changes (N, 1, 28, 28)."""
    return change.flatten(1).norm(dim=1).mean().item()


def measure(images, original, labels, variant, networks):
    """A row's numbers for images (N, 1, 28, 28) of the classes `labels` (N,), and the classes (N,)
    that are wanted, and that the target and the judges predict. original: week 1's images of the
    same latents."""
    wanted = wanted_classes(variant, labels)
    target = getattr(networks, variant.target)
    predicted = classify(target, images)
    judge = classify(networks.judge, images)
    pgd_judge = classify(networks.pgd_judge, images)
    fooled = predicted == wanted
    judge_reads_y = judge == labels
    pgd_judge_reads_y = pgd_judge == labels
    hits = {
        "fooled_before": classify(target, original) == wanted,
        "target_fooled": fooled,
        "judge_reads_y": judge_reads_y,
        "both": fooled & judge_reads_y,
        "pgd_judge_reads_y": pgd_judge_reads_y,
        "both_by_pgd_judge": fooled & pgd_judge_reads_y,
    }
    counted = labels != wanted  # an image of the wanted class fools nobody
    row = {}
    for name, hit in hits.items():
        row[name] = common.wilson(hit[counted])
    scores = acwgan.predict(lambda batch: networks.critic(batch)[0], images)
    row["critic"] = scores.mean().item()
    change = (images - original)[counted]
    row["l2"] = mean_l2(change)
    row["linf"] = change.abs().flatten(1).amax(1).mean().item()
    classes = {
        "target": wanted,
        "predicted": predicted,
        "judge": judge,
        "pgd_judge": pgd_judge,
    }
    return row, classes


NEXT = "digits 0 to 9; the target classifier should say 1, 2, ..., 9, 0."
GREEN = "Green target: fooled. Green judges: both right (they always name a digit)."
PAGES = {  # the caption and the rows of each
    "synthetic-adversarial-framework": (
        "Approach 1: digits 0 to 9; an untrained target should say 7 (column 7 is not counted).\n"
        f"scratch: frozen critic; scratch-live: it trains. {GREEN}",
        ["scratch", "scratch-live"],
    ),
    "synthetic-adversarial-framework-with-fid": (
        f"Approach 2, and ours: {NEXT}\n{GREEN}",
        [name for name in VARIANTS if "scratch" not in name],
    ),
    "closest": (
        f"Ours and Carlini & Wagner's search: {NEXT}\n{GREEN} Changes: from -0.5 to 0.5.",
        ["original", "ours", "ours: change", "carlini-wagner", "carlini-wagner: change"],
    ),
}


def write_predictions(ink, top, classes):
    """Write under the first ten digits, of the classes 0 to 9, what the classifiers predict."""
    for y in range(10):
        x = 197 + 86 * y
        predicted = classes["predicted"][y]
        colour = "green" if predicted == classes["target"][y] else "firebrick"
        ink.text((x, top), f"target: {predicted}", colour, font_size=14)
        judges = [classes["judge"][y], classes["pgd_judge"][y]]
        colour = "green" if judges == [y, y] else "firebrick"
        text = "judges: {}, {}".format(*judges)
        ink.text((x, top + 15), text, colour, font_size=14)


def write_figures(out, drawn, predictions):
    """Write the pages of the rows' first ten digits and what the classifiers predict.

    drawn: {row: images (N, 1, 28, 28)}; predictions: {row: the classes that `measure` returns}.
    """
    lines = {}
    for name, images in drawn.items():
        lines[name] = images[:10]
        change = images[:10] - lines["original"]
        lines[f"{name}: change"] = (change + 0.5).clamp(0, 1)
    for title, (caption, names) in PAGES.items():
        names = [name for name in names if name in lines]
        if not names:  # such as those of approach 1, with --variant ours
            (out / f"{title}.png").unlink(missing_ok=True)
            continue
        page = Image.new("RGB", (1060, 62 + 124 * len(names)), "white")
        ink = ImageDraw.Draw(page)
        ink.text((8, 8), caption, "black", font_size=17)
        for i, name in enumerate(names):
            top = 62 + 124 * i
            page.paste(acwgan.grid(lines[name], 10), (192, top))
            ink.text((8, top + 44), name, "black", anchor="lm", font_size=17)
            if name in predictions:
                write_predictions(ink, top + 86, predictions[name])
        common.save_png(out / f"{title}.png", page)


COLUMNS = {  # of the report: heading, key in results.json
    "before": "fooled_before",
    "fooled": "target_fooled",
    "judge": "judge_reads_y",
    "both": "both",
    "pgd": "pgd_judge_reads_y",
    "pgd both": "both_by_pgd_judge",
    "score": "critic",
    "L2": "l2",
    "L2/C&W": "l2_over_cw",
    "L-inf": "linf",
}


def print_report(dataset, accuracies, rows):
    """Print the tables of the classifiers and of the rows, and what their columns mean."""
    print(f"""
Week 2 on {dataset}. The target is attacked, the auxiliaries help to train, and the judges only
measure. Under PGD: on digits that PGD has changed by up to 0.3 (L-inf). A judge that is right on
fewer than half of these learnt from too few digits (--limit), and its answers mean little.
""")
    common.print_table(["classifier", "test accuracy"], accuracies.items())
    print("""
Each row draws digits of a class y, which the target should take for the next class, y + 1; in
scratch and scratch-live, an untrained classifier should take them for 7. In % of n digits (95 %
intervals are in results.json):
  before             the classifier does so for week 1's digits of the same latents: a baseline
  fooled             it does so for these digits
  judge, pgd         judge or pgd_judge answers y; whether a person would was not measured
  both, pgd both     the target is fooled, and this judge still answers y: the aim
score: by week 1's critic, on average; it is higher for digits that seem real to the critic.
L2, L-inf: how far a digit is from week 1's original, on average. carlini-wagner: a search for the
least L2 change that fools the target; L2/C&W: L2 relative to that search's, on the same digits.
""")
    lines = []
    for name, row in rows.items():
        line = [name, row["both"]["n"]]
        for key in COLUMNS.values():
            value = row[key]
            # rounded, so that a line fits into 100 columns
            if isinstance(value, dict):
                value = round(100 * value["rate"], 1)
            elif value is not None:
                value = round(value, 2)
            line.append(value)
        lines.append(line)
    common.print_table(["row", "n", *COLUMNS], lines)


def main(argv=None):
    """Train, draw, measure and compare the rows; returns the record that results.json holds."""
    args = parse_args(argv)
    device = common.pick_device(args.device)
    out = args.out
    with common.hold(args, "samples"):
        original, critic, facts = load_week_1(args.generator, args.dataset, device)
        dataset = facts["dataset"]
        _, real_images, real_labels = common.load_digits(
            dataset, args.data, limit=args.limit, device=device
        )
        facts.update(
            dataset_size=len(real_images),
            batch_size=BATCH_SIZE,
            target_margin=TARGET_MARGIN,
            robust_margin=ROBUST_MARGIN,
            version=VERSION,
            seed=args.seed,
            steps=args.steps,
        )
        made_with = {}
        generators = {}
        for name, variant in VARIANTS.items():
            made_with[name] = {**facts, **variant._asdict()}
            generator = load_generator(name, args, made_with[name], original)
            if generator or name in args.variant:
                generators[name] = generator
        networks = load_networks(out, dataset, real_images, real_labels, original, critic)
        _, test_images, test_labels = common.load_digits(
            dataset, args.data, train=False, limit=args.samples, device=device
        )
        rates = measure_classifiers(networks, test_images, test_labels)
        labels = torch.arange(args.samples, device=device) % CLASSES
        drawn = {}
        predictions = {}
        rows = {}
        for name, generator in generators.items():
            if generator is None:
                generator = train(name, args, networks, real_images, real_labels)
                checkpoint = {
                    "kind": "transfer",
                    "settings": made_with[name],
                    "generator": generator.state_dict(),
                }
                common.save(out / f"generator-{name}.pt", checkpoint)
            generator.to(device).eval()
            images = acwgan.generate(generator, labels, args.seed)
            drawn[name] = images
            rows[name], predictions[name] = measure(
                images, drawn["original"], labels, VARIANTS[name], networks
            )
            acwgan.save_samples(
                out / f"samples-{name}.npz", images, labels, **predictions[name]
            )
        labels = labels[:CW_DIGITS]
        start = drawn["original"][:CW_DIGITS]
        least = carlini_wagner(networks.target, start, (labels + 1) % CLASSES)
        least = (least * 255).round() / 255
        name = "carlini-wagner"
        drawn[name] = least
        rows[name], predictions[name] = measure(
            least, start, labels, VARIANTS["original"], networks
        )
        # the others failed, or needed no change
        succeeded = (least != start).flatten(1).any(1)
        for name, row in rows.items():
            row["l2_over_cw"] = None
            if succeeded.any():
                l2 = mean_l2((drawn[name][:CW_DIGITS] - start)[succeeded])
                row["l2_over_cw"] = l2 / mean_l2((least - start)[succeeded])
        write_figures(out, drawn, predictions)
        record = common.write_results(args, device, facts, accuracy=rates, rows=rows)
    print_report(dataset, rates, rows)
    return record


if __name__ == "__main__":
    common.run(main)

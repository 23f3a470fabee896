"""Week 2: from a conditional GAN to a generator of adversarial digits.

Approach 1 trained a new generator against a finished critic, an auxiliary and a target classifier;
its samples "remained just noise images". Approach 2 retrained week 1's generator, as AT-GAN does
(Wang, He & Hopcroft 2019, arXiv 1904.07793), with an FID as the distance; the digits degraded.
This script repeats both, changes one thing per row, and ends with digits that the target classifier
takes for the next class, while independent judges still read their own.

    python acwgan.py && python transfer.py      train week 1's generator, then every row
    python transfer.py --variant ours --force   train one again; the others stay in the report

Writes generator-, history- and samples-<row>, figures, results.json and classifiers into --out.
"""

import copy
import functools
import hashlib
import sys
import time
from collections import deque, namedtuple
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from PIL import ImageDraw, ImageFont
from torch import nn
from torchvision.transforms.functional import to_pil_image

import acwgan
import common
from acwgan import CLASSES


class Variant(NamedTuple):
    """One row of the experiment: how its generator is trained."""

    start: str  # what the generator starts from, see `new_generator`
    weights: dict  # weight of each term of the loss, see `loss_term`
    rounds: float = 1  # generator steps, in multiples of --steps
    lr: float = (
        3e-3  # the learning rate; times 800: a quarter of the log's 1e-4 times 94,000
    )
    betas: tuple = (0.0, 0.9)  # of Adam, as in the log
    scheduled: bool = False  # the learning rate falls, the euclidean weight rises
    target: str = "target"  # the classifier to be fooled
    wanted: int | None = None  # the class to be mistaken for; None: the next class
    critic_trains: bool = False  # the critic goes on learning


APPROACH_1 = {"critic": 1, "auxiliary": 1, "adversarial": 1}  # alpha, beta, gamma
SCRATCH = Variant("untrained", APPROACH_1, lr=2e-3, target="random_target", wanted=7)
OURS = {"adversarial hinge": 1, "robust hinge": 1, "euclidean": 0.16}
VARIANTS = {
    "original": Variant("original", {}, rounds=0),
    # approach 1 as logged: nobody loaded the target's weights; then the critic goes on learning
    "scratch": SCRATCH,
    "scratch-live": SCRATCH._replace(critic_trains=True),
    # approach 2 as logged: gamma was 0, so nothing asked for adversarial digits, and the FID was
    # detached, so it moved no weight; then gamma = 1, an FID with a gradient, AT-GAN's distance
    "as-logged": Variant("pretrained", {"auxiliary": 1}),
    "adversarial": Variant("pretrained", {"auxiliary": 1, "adversarial": 1}),
    "fid": Variant("pretrained", {"frechet": 1, "auxiliary": 1, "adversarial": 1}),
    "euclidean": Variant(
        "pretrained", {"noisy euclidean": 0.05, "auxiliary": 1, "adversarial": 1}
    ),
    "ours": Variant(
        "refiner", OURS, rounds=6, lr=2e-3, betas=(0.9, 0.99), scheduled=True
    ),
}
WARM_UP = 50  # steps in which a scheduled learning rate rises at first
RISE = 0.7  # share of the steps in which a scheduled weight rises
TARGET_MARGIN = 1.5  # by which the wanted class should lead, see "adversarial hinge"
ROBUST_MARGIN = 2.0  # by which the digit's own class should lead, see "robust hinge"
CRITIC_RATE = 1e-3  # learning rate of a critic that goes on learning
BANK_BATCHES = 7  # earlier batches that join the newest one in the Frechet distance


def settings(argv=None):
    """Parse the flags."""
    datasets = ("auto", "mnist", "glyphs")
    about = "the digits; auto: those that the generator was trained on"
    limit = "train on the first N images only"
    parser = common.parser(__doc__, Path("runs/transfer"), datasets, about, limit)
    add = parser.add_argument
    add(
        "--generator",
        type=Path,
        default="runs/acwgan/checkpoint.pt",
        help="week 1's checkpoint",
    )
    rows = list(VARIANTS)
    add("--variant", nargs="+", choices=rows, default=rows, help="rows to train")
    add(
        "--steps",
        type=common.number(int, 1),
        default=800,
        help="generator steps; ours: 6 x N",
    )
    add("--batch-size", type=common.number(int, 2), default=64, help="digits per step")
    add(
        "--samples",
        type=common.number(int, 20),
        default=10_000,
        help="digits drawn per row",
    )
    args = parser.parse_args(argv)
    if args.limit == 1:
        parser.error("--limit 1: a Frechet distance needs at least 2 images")
    args.variant = ["original", *args.variant]  # the others are compared with it
    return args


class Classifier(nn.Module):
    """Images (N, 1, 28, 28) in [0, 1] -> logits (N, 10); `features` are what the head sees."""

    def __init__(self, layers):
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(128, CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.head(self.features(images)).float()


def model_a():
    """Model A of Tramer et al. 2018 (arXiv 1705.07204), here with a stride of 2."""
    layers = [nn.Conv2d(1, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 5, 2), nn.ReLU()]
    layers += [
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(6400, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
    ]
    return Classifier(layers)


class Contrast(nn.Module):
    """Darken dark pixels and brighten bright ones, which robust classifiers learn slowly."""

    def forward(self, images):
        return torch.sigmoid(10 * images - 5)


def convolutional(convolutions, outputs, contrast=False):
    """A classifier of convolutions (channels in, out, kernel size, stride), the last of which
    returns `outputs` numbers; `contrast` adds `Contrast` and batch norm."""
    layers = [nn.PixelUnshuffle(2)]
    if contrast:
        layers.insert(0, Contrast())
    for c_in, c_out, size, stride in convolutions:
        layers.append(nn.Conv2d(c_in, c_out, size, stride, 1, bias=not contrast))
        if contrast:
            layers.append(nn.BatchNorm2d(c_out))
        layers.append(nn.ReLU())
    layers += [nn.Flatten(), nn.Linear(outputs, 128), nn.ReLU()]
    return Classifier(layers)


AUXILIARY = ([(4, 32, 3, 1), (32, 64, 3, 2), (64, 128, 3, 2)], 2048)
JUDGE = ([(4, 32, 3, 1), (32, 64, 4, 2), (64, 64, 3, 1)], 3136)
PGD_JUDGE = ([(4, 32, 5, 1), (32, 64, 5, 2)], 1600, True)
# adversarial training by FGSM (Wong et al. 2020, arXiv 2001.03994) or PGD, from a random start
FGSM = {"steps": 1, "alpha": 0.375, "noise": 0.3}
PGD = {"steps": 3, "alpha": 0.15, "noise": 0.3}
CLASSIFIERS = {  # network, its arguments, its training, the attack if that is adversarial
    "target": (model_a, (), {"seed": 1, "epochs": 3, "lr": 1e-3}, None),
    # these help to train the generators
    "auxiliary": (
        convolutional,
        AUXILIARY,
        {"seed": 3, "epochs": 3, "lr": 3e-3, "shift": 2},
        None,
    ),
    "robust_auxiliary": (
        convolutional,
        AUXILIARY,
        {"seed": 4, "epochs": 4, "lr": 3e-3},
        FGSM,
    ),
    # the judges are in no loss, and their architecture and training are their own
    "judge": (convolutional, JUDGE, {"seed": 5, "epochs": 7, "lr": 4e-3}, FGSM),
    "pgd_judge": (convolutional, PGD_JUDGE, {"seed": 6, "epochs": 4, "lr": 5e-3}, PGD),
}
# what generators are trained against and measured with, frozen; original: week 1's generator
Networks = namedtuple("Networks", ("original", "critic", "random_target", *CLASSIFIERS))


def relu_convolution(c_in, c_out):
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c_out, 3, padding=1))


class Refiner(nn.Module):
    """`ours`: a U-Net that adds a residual to the digits of week 1's generator, which is frozen.
    Latent (N, latent), labels (N,) -> images (N, 1, 28, 28) in [0, 1]; it needs no target."""

    def __init__(self, original):
        super().__init__()
        self.latent = original.latent
        self.original = copy.deepcopy(original)
        self.first = nn.Conv2d(4, 40, 3, padding=1)
        self.classes = nn.Linear(CLASSES, 40)
        self.encoder = relu_convolution(40, 40)
        layers = [nn.ReLU(), nn.Conv2d(40, 80, 2, 2), relu_convolution(80, 80)]
        layers += [relu_convolution(80, 80), nn.ReLU(), nn.ConvTranspose2d(80, 40, 2, 2)]
        self.coarse = nn.Sequential(*layers)
        self.decoder = nn.Sequential(relu_convolution(40, 40), relu_convolution(40, 4))
        for weight in self.decoder[-1].parameters():  # first draws the original's
            nn.init.zeros_(weight)
        self.to(memory_format=torch.channels_last)

    def forward(self, latent, labels):
        images = self.original(latent, labels).float()
        maps = F.pixel_unshuffle(2 * images - 1, 2)
        maps = self.first(maps.contiguous(memory_format=torch.channels_last))
        classes = self.classes(F.one_hot(labels, CLASSES).float())
        fine = self.encoder(maps + classes[:, :, None, None])
        residual = F.pixel_shuffle(self.decoder(fine + self.coarse(fine)), 2)
        return (images + residual.float()).clamp(0, 1)


def load_week_1(path, dataset, device=None):
    """Week 1's generator and critic, frozen, and its settings with a hash of their "weights".
    Raises Failure if they do not fit, or draw other digits than `dataset`, unless that is auto."""
    advice = f"train one with: python acwgan.py --out {path.parent}"
    checkpoint = common.load_checkpoint(path, advice, "acwgan")
    acwgan.require_finite(path, checkpoint, advice)
    try:
        week_1 = dict(checkpoint["settings"])
        generator = acwgan.Generator(week_1["latent"], week_1["width"], 28)
        critic = acwgan.Critic(week_1["width"], 28)
        generator.load_state_dict(checkpoint["average"])
        critic.load_state_dict(checkpoint["critic"])
        unfinished = checkpoint["steps"] < checkpoint["total_steps"]
    except (KeyError, RuntimeError) as problem:
        raise common.Failure(
            f"{path} does not fit 28 pixels; {advice} ({problem})"
        ) from None
    if dataset not in ("auto", week_1["dataset"]):
        raise common.Failure(
            f"{path} draws {week_1['dataset']}, not {dataset}; {advice}", 2
        )
    if unfinished:
        print(f"{path} is unfinished: python acwgan.py --resume --out {path.parent}")
    digest = hashlib.sha256()  # of the weights: the file also holds times, which differ
    for network in (generator, critic):
        for weight in network.state_dict().values():
            digest.update(weight.numpy().tobytes())
        network.eval().requires_grad_(False).to(device)
    week_1["weights"] = digest.hexdigest()[:12]
    return generator, critic, week_1


def new_generator(variant, original):
    """The generator that a row starts from, on the device of the `original`."""
    if variant.start == "refiner":
        return Refiner(original).to(next(original.parameters()).device)
    generator = copy.deepcopy(original).requires_grad_(True)
    for module in generator.modules():
        if variant.start == "untrained" and hasattr(module, "reset_parameters"):
            module.reset_parameters()
        # as the log's generators, these normalise by the batch, also when they draw
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
    """The logit of each label less the largest other one, (N,): above 0, it is the answer."""
    label = logits.gather(1, labels[:, None])[:, 0]
    return label - logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def pgd(
    network, images, classes, targeted=False, eps=0.3, alpha=0.02, steps=40, noise=0.0
):
    """L-inf PGD on the cross-entropy (Madry et al. 2018, arXiv 1706.06083).
    Moves images (N, 1, 28, 28) in [0, 1] away from the classes (N,), or to them if `targeted`, and
    returns them. eps, the step alpha and the random start's noise are in pixel values."""
    adv = images + noise * (2 * torch.rand_like(images) - 1)
    for _ in range(steps):
        adv.requires_grad_()
        loss = F.cross_entropy(network(adv), classes)
        if targeted:
            loss = -loss
        (gradient,) = torch.autograd.grad(loss, adv)
        adv = adv.detach() + alpha * gradient.sign()
        adv = adv.clamp(images - eps, images + eps).clamp(0, 1)
    return adv


def carlini_wagner(network, images, wanted, searches=6, steps=150, lr=0.05):
    """The smallest L2 change that a search finds (Carlini & Wagner 2017, arXiv 1608.04644): Adam
    on ||change||^2 + c * hinge on the margin of the wanted classes (N,), in tanh space; each search
    bisects c for each image. An upper bound: 2.4 % less with twice the steps; changes below some
    7 * lr are overshot. Images (N, 1, 28, 28) in [0, 1] return unchanged where nothing succeeds."""
    best = images.clone()
    smallest = images.new_full((len(images),), torch.inf)
    low = torch.zeros_like(smallest)
    high = smallest.clone()
    c = torch.ones_like(smallest)
    for _ in range(searches):
        free = torch.atanh((2 * images - 1) * (1 - 1e-6)).requires_grad_()
        adam = torch.optim.Adam([free], lr)
        succeeded = torch.zeros_like(wanted, dtype=torch.bool)
        for _ in range(steps):
            adv = (free.tanh() + 1) / 2
            size = (adv - images).square().flatten(1).sum(1)
            lead = margin(network(adv), wanted) - 0.1  # outlasts rounding to 8 bits
            loss = size + c * (-lead).relu()
            (free.grad,) = torch.autograd.grad(loss.sum(), free)
            success = lead > 0
            better = success & (size < smallest)
            best[better] = adv.detach()[better]
            smallest[better] = size.detach()[better]
            succeeded = succeeded | success
            adam.step()
        low = torch.where(succeeded, low, c)
        high = torch.where(succeeded, c, high)
        c = torch.where(high.isinf(), 10 * c, (low + high) / 2)
    return best


# attack, its settings, how many digits it attacks
ATTACKS = {
    "pgd": (pgd, {"targeted": True}, 500),
    "carlini-wagner": (carlini_wagner, {}, 200),
}


def attack_in_batches(name, attack, options, network, images, classes):
    """attack(network, images, classes, **options), ten images at a time, so that a bar moves."""
    batches = []
    starts = range(0, len(images), 10)
    for i in common.progress(starts, name, unit="image", unit_scale=10):
        batch = images[i : i + 10]
        batches.append(attack(network, batch, classes[i : i + 10], **options))
    return torch.cat(batches)


def load_networks(out, dataset, images, labels, original, critic):
    """All `Networks`; classifiers come from `out`, or are trained on these images and labels."""
    torch.manual_seed(7)
    random_target = model_a().eval().requires_grad_(False)
    networks = [original, critic, random_target.to(images.device)]
    for name, (make, arguments, training, attack) in CLASSIFIERS.items():
        torch.manual_seed(training["seed"])
        network = make(*arguments).to(images.device)
        made_with = {"network": str(network), "dataset": dataset, "images": len(images)}
        made_with.update(training, attack=attack)
        if attack:
            attack = functools.partial(pgd, **attack)
        path = out / f"{name}.pt"
        network = acwgan.cached_classifier(
            path, network, images, labels, made_with, attack
        )
        networks.append(network)
    return Networks._make(networks)


def classify(network, images):
    """The classes (N,) int64 that `network` reads from images (N, 1, 28, 28)."""
    return acwgan.predict(network, images).argmax(1)


def measure_classifiers(networks, images, labels):
    """The accuracy of each classifier on test images, of the judges also under PGD."""
    rates = {}
    for name in CLASSIFIERS:
        network = getattr(networks, name)
        hits = classify(network, images) == labels
        rates[name] = common.wilson(hits.sum(), len(hits))
        if "judge" in name:
            few = labels[:1000]
            adv = attack_in_batches(
                f"PGD on {name}", pgd, {}, network, images[:1000], few
            )
            hits = classify(network, adv) == few
            rate = common.wilson(hits.sum(), len(hits))
            rates[f"{name}_under_pgd"] = rate
            if rate["rate"] < 0.5:
                text = f"WARNING: {name} is weak under PGD: right on {common.cell(rate)}"
                print(f"{text}; it needs more digits than --limit", file=sys.stderr)
    return rates


class FeatureBank:
    """The Frechet distance of generated to real digits in a classifier's features, relative to the
    variance of the real ones. Earlier batches join a batch, too small alone for a covariance."""

    def __init__(self, network, images):
        stream = torch.Generator().manual_seed(0)
        rows = torch.randperm(len(images), generator=stream)[:2048].to(images.device)
        self.network = network
        self.real = network.features(images[rows]).float()
        self.recent = deque(maxlen=BANK_BATCHES)

    def distance(self, images):
        """A scalar, differentiable in images (N, 1, 28, 28), which join the bank."""
        features = self.network.features(images).float()
        bank = torch.cat([features, *self.recent])
        self.recent.append(features.detach())
        distance = common.frechet_distance_torch(bank, self.real) / self.real.var(0).sum()
        # only the newest batch has a gradient: scaled up to the whole bank's; the bracket is 0
        scale = len(bank) / len(features)
        return distance.detach() + scale * (distance - distance.detach())


def loss_term(term, networks, bank, images, latent, labels, wanted):
    """One term of a row's loss, a scalar, for images (N, 1, 28, 28) in [0, 1], drawn from latent
    (N, latent) and labels (N,), that should pass for the wanted classes (N,)."""
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
            if term == "noisy euclidean":  # AT-GAN's equation 5
                original = original + 0.1 * torch.randn_like(original)
            return (images - original).square().flatten(1).sum(1).mean()
        case "adversarial hinge":
            return (TARGET_MARGIN - margin(networks.target(images), wanted)).relu().mean()
        case "robust hinge":
            logits = networks.robust_auxiliary(images)
            return (ROBUST_MARGIN - margin(logits, labels)).relu().mean()


def train(name, args, networks, real_images, real_labels):
    """Train a row's generator; real_images (N, 1, 28, 28) in [0, 1], real_labels (N,) int64.
    Returns it, frozen, and its history, the terms of the loss at every 50th step."""
    variant = VARIANTS[name]
    networks = networks._replace(target=getattr(networks, variant.target))
    steps = int(variant.rounds * args.steps)
    device = real_images.device
    autocast = torch.autocast(
        device.type, torch.bfloat16, enabled=common.has_bf16(device)
    )
    torch.manual_seed(args.seed)
    generator = new_generator(variant, networks.original)
    adam = torch.optim.Adam(generator.parameters(), variant.lr, variant.betas, fused=True)
    if variant.critic_trains:
        critic = copy.deepcopy(networks.critic).requires_grad_(True)
        critic_adam = torch.optim.Adam(critic.parameters(), CRITIC_RATE, (0.0, 0.99))
        networks = networks._replace(critic=critic)
    bank = FeatureBank(networks.auxiliary, real_images)
    history = []
    for step in common.progress(range(steps), name, unit="step"):
        weights = dict(variant.weights)
        if variant.scheduled:
            warm_up = min(1, (step + 1) / WARM_UP)
            adam.param_groups[0]["lr"] = variant.lr * warm_up * (1 - step / steps)
            weights["euclidean"] *= min(1, step / (RISE * steps))
        latent = torch.randn(args.batch_size, generator.latent, device=device)
        labels = torch.randint(CLASSES, (args.batch_size,), device=device)
        wanted = wanted_classes(variant, labels)
        with autocast:
            images = generator(latent, labels).float()
        if variant.critic_trains:
            rows = torch.randint(len(real_images), (args.batch_size,), device=device)
            real = real_images[rows]
            fake = images.detach()
            with autocast:
                loss, _ = acwgan.critic_loss(
                    critic, real, real_labels[rows], fake, 10.0, 0.5
                )
            critic_adam.zero_grad()
            loss.backward()
            critic_adam.step()
        terms = {}
        loss = 0
        # entered anew: the context above cached the critic's weights from before its step
        with autocast:
            for term, weight in weights.items():
                terms[term] = loss_term(
                    term, networks, bank, images, latent, labels, wanted
                )
                loss = loss + weight * terms[term]
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % 50 == 0 or step == steps - 1:
            if not loss.isfinite():
                raise common.Failure(f"{name}: the loss is no number; lower its lr")
            row = {"step": step + 1}
            for term, value in terms.items():
                row[term] = value.item()
            history.append(row)
    return generator.eval().requires_grad_(False), history


def load_generator(name, args, made_with, original):
    """A row's finished generator, or None; Failure if it was made with other settings."""
    path = args.out / f"generator-{name}.pt"
    if not path.exists() or (args.force and name in args.variant):
        return None
    advice = "delete it to train again"
    checkpoint = common.load_checkpoint(path, advice, "transfer")
    acwgan.require_finite(path, checkpoint, advice)
    if args.force and checkpoint["settings"] != made_with:
        return None  # the report leaves it out
    common.require_same(path, checkpoint["settings"], made_with)
    generator = new_generator(VARIANTS[name], original)
    generator.load_state_dict(checkpoint["generator"])
    return generator.eval().requires_grad_(False)


def measure(images, original, labels, variant, networks):
    """A row's numbers for images (N, 1, 28, 28) of the classes `labels` (N,), and the classes (N,)
    that are wanted and read by the target. original: week 1's images of the same latents."""
    wanted = wanted_classes(variant, labels)
    predicted = classify(getattr(networks, variant.target), images)
    fooled = predicted == wanted
    judge_right = classify(networks.judge, images) == labels
    pgd_judge_right = classify(networks.pgd_judge, images) == labels
    hits = {
        "target_fooled": fooled,
        "judge_reads_y": judge_right,
        "both": fooled & judge_right,
    }
    hits["pgd_judge_reads_y"] = pgd_judge_right
    hits["both_by_pgd_judge"] = fooled & pgd_judge_right
    counts = labels != wanted  # an image of the wanted class fools nobody
    row = {}
    for name, hit in hits.items():
        row[name] = common.wilson(hit[counts].sum(), counts.sum())
    change = (images - original)[counts].flatten(1)
    row["l2"] = change.norm(dim=1).mean().item()
    row["linf"] = change.abs().amax(1).mean().item()
    return row, {"target": wanted, "predicted": predicted}


def write_figures(out, drawn):
    """Write three pages of the rows' first ten digits; drawn: {row: images (N, 1, 28, 28)}."""
    lines = [(name, images[:10].cpu()) for name, images in drawn.items()]
    framework = lines[:1] + [line for line in lines if "scratch" in line[0]]
    with_fid = [
        line for line in lines if "scratch" not in line[0] and line[0] in VARIANTS
    ]
    closest = lines[:1]
    for name, images in lines:
        if name in ("ours", "carlini-wagner"):
            change = images - lines[0][1] + 0.5
            closest += [(name, images), ("its change", change.clamp(0, 1))]
    title = "synthetic-adversarial-framework"
    pages = {title: framework, f"{title}-with-fid": with_fid, "closest": closest}
    for title, lines in pages.items():
        large = F.interpolate(torch.cat([images for _, images in lines]), scale_factor=2)
        grid = torchvision.utils.make_grid(large, 10, pad_value=0.3)
        page = to_pil_image(F.pad(grid, (120, 0), value=1.0))  # room for the names
        draw = ImageDraw.Draw(page)
        for i, (name, _) in enumerate(lines):
            y = (i + 0.5) * page.height / len(lines)
            draw.text((8, y), name, "black", ImageFont.load_default(14), "lm")
        with common.whole_file(out / f"{title}.png") as file:
            page.save(file, "png")


def print_rows(dataset, rows):
    """Print the table of the rows, after a word on its columns."""
    print(f"""
Week 2 on {dataset}: digits of class y, to be taken for y + 1 by the target classifier; in scratch
and scratch-live, for 7 by an untrained one. In % of the digits: fooled, it does; judge 1, judge 2,
a robust classifier that took no part reads y; both, fooled and read so. L2, L-inf: mean change.""")
    rates = [
        "target_fooled",
        "judge_reads_y",
        "both",
        "pgd_judge_reads_y",
        "both_by_pgd_judge",
    ]
    lines = []
    for name, row in rows.items():
        line = [name]
        for key in rates:
            line.append(100 * row[key]["rate"])
        line += [row["l2"], row["l2_over_cw"], row["linf"], row["digits_per_second"]]
        lines.append(line)
    head = ["row", "fooled", "judge 1", "both 1", "judge 2", "both 2"]
    common.print_table([*head, "L2", "L2/C&W", "L-inf", "digits/s"], lines)


def timed(function, *args):
    """The images that `function` returns, and how many of them it makes per second."""
    began = time.perf_counter()
    images = function(*args)
    images.sum().item()  # a GPU is done only now
    return images, len(images) / (time.perf_counter() - began)


def main(argv=None):
    """Train, draw, measure and compare the rows; returns the record that results.json holds."""
    args = settings(argv)
    device = common.pick_device(args.device)
    out = args.out
    with common.hold(out):
        original, critic, week_1 = load_week_1(args.generator, args.dataset, device)
        dataset = week_1["dataset"]
        _, images, digits = common.load_digits(dataset, args.data, limit=args.limit)
        images = images.to(device)
        digits = digits.to(device)
        facts = {"dataset": dataset, "dataset_size": len(images)}
        made_with = {}
        generators = {}
        for name, variant in VARIANTS.items():
            made_with[name] = {"week_1": week_1["weights"], **facts, **variant._asdict()}
            made_with[name].update(
                seed=args.seed, steps=args.steps, batch_size=args.batch_size
            )
            generators[name] = load_generator(name, args, made_with[name], original)
        networks = load_networks(out, dataset, images, digits, original, critic)
        _, test_images, test_digits = common.load_digits(
            dataset, args.data, False, args.samples
        )
        rates = measure_classifiers(
            networks, test_images.to(device), test_digits.to(device)
        )
        for name in args.variant:
            if generators[name] is None:
                generators[name], history = train(name, args, networks, images, digits)
                if history:
                    common.write_csv(out / f"history-{name}.csv", history)
                checkpoint = {"kind": "transfer", "settings": made_with[name]}
                checkpoint["generator"] = generators[name].state_dict()
                with common.whole_file(out / f"generator-{name}.pt") as file:
                    torch.save(checkpoint, file)
        labels = torch.arange(args.samples, device=device) % CLASSES
        drawn = {}
        rows = {}
        for name, generator in common.progress(generators.items(), "drawing", unit="row"):
            if generator is not None:
                drawn[name], speed = timed(acwgan.generate, generator, labels, args.seed)
                start = drawn["original"]
                rows[name], classes = measure(
                    drawn[name], start, labels, VARIANTS[name], networks
                )
                rows[name]["digits_per_second"] = speed
                path = out / f"samples-{name}.npz"
                acwgan.save_samples(path, drawn[name], labels, **classes)
        variant = VARIANTS["original"]
        for name, (attack, options, n) in ATTACKS.items():
            start = drawn["original"][:n]
            wanted = wanted_classes(variant, labels[:n])
            images, speed = timed(
                attack_in_batches, name, attack, options, networks.target, start, wanted
            )
            drawn[name] = (images * 255).round() / 255
            rows[name], _ = measure(drawn[name], start, labels[:n], variant, networks)
            rows[name]["digits_per_second"] = speed
        n = len(drawn["carlini-wagner"])
        cw_l2 = max(1e-9, rows["carlini-wagner"]["l2"])  # 0 where it finds nothing
        for name, row in rows.items():
            change = (drawn[name][:n] - drawn["original"][:n]).flatten(1)
            row["l2_over_cw"] = change.norm(dim=1).mean().item() / cw_l2
        write_figures(out, drawn)
        facts.update(device=str(device), accuracy=rates)
        record = common.write_results(args, {"rows": rows}, **facts)
    common.print_table(["classifier", "right on test images"], rates.items())
    print_rows(dataset, rows)
    return record


if __name__ == "__main__":
    common.run(main)

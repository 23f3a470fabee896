"""Week 2: from a conditional GAN to a generator of adversarial digits.

The log tried two ways and both failed. Approach 1 trained a new generator against week 1's finished critic and
auxiliary classifier and a target classifier; its samples "remained just noise images". Approach 2 retrained week 1's
generator, as AT-GAN does (Wang, He & Hopcroft 2019, arXiv 1904.07793), with an FID in place of AT-GAN's Euclidean
distance; the digits dissolved. This script repeats both, undoes the choice that made each fail, and sets beside them a
generator whose digits the target takes for the next class while a judge in no loss still reads the class asked for.

    python acwgan.py && python transfer.py     week 1's generator, then every variant and the table
    python transfer.py --variant ours          one of them (or several); --approach 1 or 2: the log's own
    python transfer.py --target 3              every class is to be taken for a 3
    python transfer.py --resume                goes on with the variants that are not finished yet

Writes into --out: per variant generator-<variant>.pt and samples-<variant>.npz; the two figures of the log;
results.json; and the classifiers it trained.
"""

from pathlib import Path

import common

VARIANTS = {  # name: what it is; the log's approach, or None
    "scratch": ("an untrained generator against a frozen critic, as logged", 1),
    "scratch-live": ("the same, but the critic goes on training, and the generator steps twice as far", None),
    "fid-detached": ("the pre-trained generator, FID without a gradient, as logged", 2),
    "fid": ("the same, but the FID has its gradient", None),
    "euclidean": ("AT-GAN: distance to the original sample of the same (z, y)", None),
    "ours": ("a refiner behind the generator, held to y by a robust classifier", None),
}


def settings(argv=None):
    """The flags; alpha, beta and gamma are the log's, whose values were 1."""
    p = common.parser(__doc__, "transfer", "auto", ("auto", "mnist", "glyphs"),
        "auto: the one that the generator was made with")  # fmt: skip
    add, whole = p.add_argument, common.whole
    add("--generator", type=Path, default=Path("runs/acwgan/checkpoint.pt"), help="week 1's checkpoint")
    add("--variant", nargs="+", choices=(*VARIANTS, "all"), help="which to train and measure; None: all")
    add("--approach", type=int, choices=(1, 2), help="only the log's own approach 1 (scratch) or 2 (fid-detached)")
    add("--target", type=whole(0, 9), metavar="K", help="class every digit is to be taken for; None: the next digit")
    add("--target-model", choices=("A", "D"), default="A", help="architecture attacked; the other one tests transfer")
    add("--steps", type=whole(1), default=1500, help="training steps of each variant; ours takes twice as many")
    add("--batch-size", type=whole(2), default=64, help="samples per step")
    add("--alpha", type=float, default=1.0, help="weight of the critic's loss (approach 1), of the distance (2)")
    add("--beta", type=float, default=1.0, help="weight of the auxiliary classifier's loss")
    add("--gamma", type=float, default=1.0, help="weight of the adversarial loss")
    add("--samples", type=whole(20), default=10_000, help="digits behind every number of the table")
    add("--resume", action="store_true", help="keep the variants in --out that are finished")
    args = p.parse_args(argv)
    if args.variant and args.approach:
        p.error("--approach names variants, and so does --variant: give one of them")
    if not all(0 <= weight < float("inf") for weight in (args.alpha, args.beta, args.gamma)):
        p.error("--alpha, --beta and --gamma must be finite and not below 0")
    logged = [name for name, (_, approach) in VARIANTS.items() if approach == args.approach]
    args.variant = logged if args.approach else list(VARIANTS) if "all" in (args.variant or ["all"]) else args.variant
    return args


if __name__ == "__main__":
    common.before_torch(settings)

import collections
import copy
import functools
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

import acwgan
from acwgan import CLASSES

# ------------------------------------------------------------------------------------------------------------ networks


class Classifier(nn.Module):
    """Images (N, 1, 28, 28) in [0, 1] -> logits (N, 10); `features` are what its last layer sees."""

    def __init__(self, features, width):
        super().__init__()
        self.features, self.head = nn.Sequential(*features), nn.Linear(width, CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.head(self.features(images)).float()


class ModelA(Classifier):
    """The default target: Model A of Tramer et al. 2018 (arXiv 1705.07204), the kind that AT-GAN attacks; its second
    convolution has a stride of 2, for a quarter of the arithmetic."""

    def __init__(self):
        convolutions = [nn.Conv2d(1, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 5, 2), nn.ReLU(), nn.Dropout(0.25)]
        super().__init__([*convolutions, nn.Flatten(), nn.Linear(6400, 128), nn.ReLU(), nn.Dropout(0.5)], 128)


class ModelD(Classifier):
    """The other target: Model D of the same paper, four dense layers."""

    def __init__(self):
        layers = [nn.Flatten()]
        for inputs in (784, 300, 300, 300):
            layers += [nn.Linear(inputs, 300), nn.ReLU(), nn.Dropout(0.5)]
        super().__init__(layers, 300)


class Auxiliary(Classifier):
    """What `ours` is held by: trained adversarially, it must read y; trained plainly, with batch norm and without, its
    features are those of the Frechet distance, in `fid` too."""

    def __init__(self, batch_norm=False):
        layers = [nn.PixelUnshuffle(2)]
        for inputs, outputs, stride in ((4, 32, 1), (32, 64, 2), (64, 128, 2)):
            norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), *norm, nn.ReLU()]
        super().__init__([*layers, nn.Flatten(), nn.Linear(2048, 128), nn.ReLU()], 128)


class Judge(Classifier):
    """Reads the digits in place of an eye: trained adversarially, of its own architecture and seed, in no loss."""

    def __init__(self):
        c = [nn.Conv2d(4, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1)]
        super().__init__([nn.PixelUnshuffle(2), *c, nn.ReLU(), nn.Flatten(), nn.Linear(3136, 128), nn.ReLU()], 128)


class Refiner(nn.Module):
    """`ours`: week 1's generator, frozen, and behind it a small U-Net that adds a residual to the digit it draws.

    Called as the generator is: latent (N, latent), labels (N,) -> images (N, 1, 28, 28) in [0, 1]. The last layer
    starts at zero, so training starts from the original digits.
    """

    def __init__(self, original, width=40):
        super().__init__()
        self.original, self.latent = copy.deepcopy(original), original.latent
        self.original.eval().requires_grad_(False)
        self.see = nn.Sequential(nn.Conv2d(8 + CLASSES, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1))
        self.down = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.ReLU())
        self.up = nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        self.draw = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, 4, 3, 1, 1))
        nn.init.zeros_(self.draw[-1].weight)
        nn.init.zeros_(self.draw[-1].bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, latent, labels):
        image = F.pixel_unshuffle(self.original(latent, labels).float(), 2)
        label = F.one_hot(labels, CLASSES).to(image)[:, :, None, None].expand(-1, -1, *image.shape[2:])
        seen = torch.cat([2 * image - 1, (image > 0.5).to(image), label], 1)
        fine = self.see(seen.contiguous(memory_format=torch.channels_last))
        residual = self.draw(fine + self.up(self.middle(self.down(fine))))
        return F.pixel_shuffle(image + residual.float(), 2).clamp(0, 1)


# -------------------------------------------------------------------------------------------------------------- losses

EUCLIDEAN_WEIGHT = 0.05
EUCLIDEAN_NOISE = 0.1  # standard deviation of what AT-GAN adds to the original sample
RECENT = 7  # batches of features that stand beside a new one in a Frechet distance
RATE = 1e-3  # Adam's step size, of every generator (scratch-live: twice that) and of the critic that goes on training


def hinge(logits, labels, margin):
    """max(0, margin - (logit of the label - the largest other logit)), (N,): nothing more to gain once it is read."""
    label = logits.gather(1, labels[:, None])[:, 0]
    other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return (margin - label + other).relu()


def squared_distance(x, y):
    """Squared L2 distance of each image (N, C, H, W) to its partner, (N,)."""
    return (x - y).square().flatten(1).sum(1)


def relative_frechet(network, images, reference, recent):
    """Frechet distance of the images' features to `reference`, real digits' (M, D), over the latter's total variance:
    so a weight of 1 means the same whatever the scale of the features.

    A batch alone is too few samples for a covariance: `recent`, a deque of earlier batches' features, stands in for the
    rest of the crowd, and the gradient is scaled up to that of a crowd all of whose samples move.
    """
    features = network.features(images).float()
    crowd = torch.cat([features, *recent])
    recent.append(features.detach())
    distance = common.frechet_distance_torch(crowd, reference) / reference.var(0).sum()
    return distance.detach() + len(crowd) / len(features) * (distance - distance.detach())


def composition(variant, args, nets, images, labels, wanted, original):
    """The variant's loss as {term: (weight, value)}; what the generator descends is the sum of weight * value.

    images: its samples (N, 1, 28, 28) for labels (N,), to be taken for `wanted` (N,); original: the samples of week
    1's generator for the same (z, y).
    """
    logits = nets["target"](images)
    if variant == "ours":
        frechet = [relative_frechet(nets[role], images, *nets["crowd"][role]) for role in nets["crowd"]]
        return {
            "adversarial": (1.0, hinge(logits, wanted, 1.0).mean()),
            "auxiliary": (2.0, hinge(nets["robust auxiliary"](images), labels, 3.0).mean()),
            "distance": (4.0, sum(frechet)),
            "euclidean": (0.03, squared_distance(images, original).mean()),
        }
    adversarial = {"adversarial": (args.gamma, F.cross_entropy(logits, wanted))}
    if variant == "euclidean":
        noisy = original + EUCLIDEAN_NOISE * torch.randn_like(original)
        return {"distance": (EUCLIDEAN_WEIGHT, squared_distance(images, noisy).mean()), **adversarial}
    score, classes = nets["critic"](images)
    auxiliary = {"auxiliary": (args.beta, F.cross_entropy(classes, labels)), **adversarial}
    if variant.startswith("scratch"):
        return {"critic": (args.alpha, -score.mean()), **auxiliary}
    distance = relative_frechet(nets["auxiliary"], images, *nets["crowd"]["auxiliary"])
    return {"distance": (args.alpha, distance.detach() if variant == "fid-detached" else distance), **auxiliary}


# ------------------------------------------------------------------------------------------------------------ training


def fast_gradient(network, images, labels, eps=0.3):
    """FGSM from a random start, step 1.25 eps: one-step adversarial training (Wong et al. 2020, arXiv 2001.03994)."""
    start = (2 * torch.rand_like(images) - 1) * eps
    moved = (images + start).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(moved), labels), moved)
    return (images + (start + 1.25 * eps * gradient.sign()).clamp(-eps, eps)).clamp(0, 1)


def pgd(network, images, labels, sign, eps=0.3, alpha=0.02, steps=40):
    """L-inf PGD (Madry et al. 2018, arXiv 1706.06083) on the cross-entropy: sign -1 towards `labels`, +1 away."""
    moved = images.clone()
    for _ in range(steps):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(moved), labels), moved)
        moved = moved.detach() + sign * alpha * gradient.sign()
        moved = moved.clamp(images - eps, images + eps).clamp(0, 1)
    return moved


def classifiers(args, dataset, images, labels, device):
    """Every classifier of the experiment, kept in --out: {role: network}, all frozen and in eval mode."""
    target, other = (ModelA, ModelD) if args.target_model == "A" else (ModelD, ModelA)
    plan = {  # role: (architecture, seed, how it is trained)
        "target": (target, 1, {"epochs": 4, "rate": 1e-3}),
        "transfer target": (other, 2, {"epochs": 4, "rate": 1e-3}),
        "auxiliary": (Auxiliary, 3, {"epochs": 3, "rate": 3e-3, "shift": 2}),
        "batch-norm auxiliary": (functools.partial(Auxiliary, True), 6, {"epochs": 3, "rate": 3e-3, "shift": 2}),
        "robust auxiliary": (Auxiliary, 4, {"epochs": 4, "rate": 3e-3, "attack": fast_gradient}),
        "judge": (Judge, 5, {"epochs": 10, "rate": 4e-3, "attack": fast_gradient}),
    }
    nets = {}
    for role, (architecture, seed, how) in plan.items():
        how = {"shift": 0, "smoothing": 0.0} | how
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            network = architecture().to(device)
            kind = f"{type(network).__name__}-{seed}-{dataset}-{len(images)}"
            fit = functools.partial(acwgan.train_classifier, images=images, labels=labels, seed=seed, **how)
            nets[role] = acwgan.kept_classifier(args.out / f"{kind}.pt", kind, network, fit)
    return nets


def wanted_class(labels, target):
    """The class that digits of `labels` (N,) are to be taken for: `target`, or the next digit (9 -> 0) if None."""
    return (labels + 1) % CLASSES if target is None else torch.full_like(labels, target)


def new_generator(variant, nets, shape, device):
    """The generator that the variant starts from."""
    if variant.startswith("scratch"):
        return acwgan.Generator(shape["latent"], shape["width"]).to(device)
    if variant == "ours":
        return Refiner(nets["original"]).to(device)
    # batch norm stays in eval mode: a sample depends on its (z, y) alone, so it has its original to compare with
    return copy.deepcopy(nets["original"]).requires_grad_(True)


def train(variant, args, nets, shape, images, labels, device):
    """Train the variant's generator; returns it and what each term of its loss ended at, {term: (weight, value)}."""
    torch.manual_seed(args.seed)
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=common.has_bf16(device))  # noqa: E731
    generator, rate = new_generator(variant, nets, shape, device), (2 if variant == "scratch-live" else 1) * RATE
    adam = torch.optim.Adam([p for p in generator.parameters() if p.requires_grad], rate, (0.0, 0.99))
    nets = dict(nets)
    nets["crowd"] = {role: (x, collections.deque(maxlen=RECENT)) for role, x in nets["reference"].items()}
    if variant == "scratch-live":
        nets["critic"] = copy.deepcopy(nets["critic"]).requires_grad_(True)
        critic_adam = torch.optim.Adam(nets["critic"].parameters(), RATE, (0.0, 0.99))
    ended = {}
    steps = args.steps * (2 if variant == "ours" else 1)  # its Frechet distance goes on falling
    for step in tqdm(range(steps), variant, unit="step", disable=None):
        adam.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * (1 - step / steps)
        latent = torch.randn(args.batch_size, generator.latent, device=device)
        asked = torch.randint(CLASSES, (args.batch_size,), device=device)
        with autocast():
            with torch.no_grad():
                original = nets["original"](latent, asked).float()
            drawn = generator(latent, asked).float()
            if variant == "scratch-live":
                batch = torch.randint(len(images), (args.batch_size,), device=device)
                loss, _ = acwgan.critic_loss(nets["critic"], images[batch], labels[batch], drawn.detach(), share=0.5)
                critic_adam.zero_grad()
                loss.backward()
                critic_adam.step()
            terms = composition(variant, args, nets, drawn, asked, wanted_class(asked, args.target), original)
        total = sum(weight * value for weight, value in terms.values())
        if not total.isfinite():
            raise common.Failure(f"{variant}: the loss is not a number any more; lower --alpha, --beta or --gamma")
        adam.zero_grad()
        total.backward()
        adam.step()
        for name, (weight, value) in terms.items():
            ended[name] = (weight, 0.95 * ended.get(name, (0, value.item()))[1] + 0.05 * value.item())
    return generator.eval(), ended


UNUSED = {"data", "out", "device", "variant", "approach", "samples", "resume", "generator", "dataset"}  # by any weight
PGD = "pgd"  # the table's row of the first 1,000 of the original generator's digits, perturbed


def finished(variant, args, nets, shape, images, labels, device):
    """The variant trained, or with --resume the one that stands finished in --out; as `train` returns it."""
    kind, path = f"transfer-{variant}", args.out / f"generator-{variant}.pt"
    made = {name: str(value) for name, value in vars(args).items() if name not in UNUSED} | {"trained_on": str(shape)}
    if args.resume and path.exists():
        generator, ended = new_generator(variant, nets, shape, device), {}

        def take(there):
            generator.load_state_dict(there["generator"])
            ended.update({name: (float(weight), float(value)) for name, (weight, value) in there["ended"].items()})

        common.load_run(path, kind, made, take)
        return generator.eval().requires_grad_(False), ended
    generator, ended = train(variant, args, nets, shape, images, labels, device)
    state = {"kind": kind, "shape": made, "generator": generator.state_dict(), "ended": ended}
    common.save_checkpoint(path, state)
    return generator.requires_grad_(False), ended


# ----------------------------------------------------------------------------------------------------------- measuring


@torch.no_grad()
def predict(network, images):
    """Labels (N,) int64 that `network` reads from images (N, 1, 28, 28)."""
    return torch.cat([network(part).argmax(1) for part in images.split(1000)])


def measure(images, original, asked, target, nets, real):
    """The table's row for images (N, 1, 28, 28) of classes asked (N,), beside `original`, those of the same (z, y).

    Images whose class is the one wanted don't count as attacked. `real`: moments of real digits' features.
    """
    wanted = wanted_class(asked, target)
    counts = asked != wanted
    n = counts.sum().item()
    seen = {role: predict(nets[role], images) for role in ("target", "transfer target", "judge")}
    fooled, read = seen["target"] == wanted, seen["judge"] == asked
    change = (images - original).flatten(1)[counts]

    def rate(hits):
        return common.wilson((hits & counts).sum().item(), n)

    return seen["target"], {
        "target_fooled": rate(fooled),
        "judge_reads_asked": rate(read),
        "adversarial": rate(fooled & read),
        "transfer_fooled": rate(seen["transfer target"] == wanted),
        "transfer_misread": rate(seen["transfer target"] != asked),
        "frechet_distance": common.frechet_distance(*acwgan.moments(acwgan.read(nets["reader"], images)[0]), *real),
        "mean_l2": change.norm(dim=1).mean().item(),
        "mean_linf": change.abs().amax(1).mean().item(),
    }


def speed(generators, nets, asked, target, seed):
    """Seconds for digits of classes asked (N,): of each generator, the best of three, and, once, of 40-step PGD from
    the original generator's digits. Returns them by name, and what PGD made, (N, 1, 28, 28), as 8 bits hold it."""
    original = acwgan.generate(nets["original"], asked, seed)

    def seconds(make):
        begin = time.perf_counter()
        made = make()
        made.sum().item()  # on a GPU: wait for it
        return time.perf_counter() - begin, made

    times = {
        name: min(seconds(lambda g=generator: acwgan.generate(g, asked, seed))[0] for _ in range(3))
        for name, generator in generators.items()
    }
    attack = functools.partial(pgd, nets["target"], original, wanted_class(asked, target), -1)
    times[PGD], made = seconds(attack)
    return times, (made * 255).round() / 255


# -------------------------------------------------------------------------------------------------------------- report


COLUMNS = {  # of the table: the number's name in the record
    "target fooled": "target_fooled", "judge reads y": "judge_reads_asked", "both": "adversarial",
    "other target": "transfer_fooled", "Frechet": "frechet_distance", "L2": "mean_l2", "Linf": "mean_linf",
    "samples/s": "samples_per_second",
}  # fmt: skip


def sheet(rows, title, columns=16, cell=56):
    """A page of digits: `rows` is [(name, images (N, 1, 28, 28))], a line of `columns` images each; `title` on top."""
    left, top = 120, 34
    page = Image.new("L", (left + columns * (cell + 4), top + len(rows) * (cell + 6)))
    ink = ImageDraw.Draw(page)
    ink.text((8, 8), title, 255, ImageFont.load_default(16))
    for r, (name, images) in enumerate(rows):
        y = top + r * (cell + 6)
        ink.text((8, y + cell // 2 - 8), name, 200, ImageFont.load_default(14))
        for i, image in enumerate(images[:columns, 0].cpu()):
            digit = Image.fromarray((image * 255).round().byte().numpy()).resize((cell, cell), Image.NEAREST)
            page.paste(digit, (left + i * (cell + 4), y))
    return page


def framework(page, ended):
    """The log's drawing above `page`: (y, z) -> generator -> critic, auxiliary and target classifier -> the total.

    Beside each weight the value its term ended at, for the variants in `ended`, {variant: {term: (weight, value)}}.
    """
    high, font = 200, ImageFont.load_default(14)
    whole = Image.new("L", (page.width, page.height + high))
    whole.paste(page, (0, high))
    ink, runs = ImageDraw.Draw(whole), {name: terms for name, terms in ended.items() if name.startswith("scratch")}

    def box(x, y, width, text):
        ink.rectangle((x, y, x + width, y + 30), outline=255)
        ink.text((x + width / 2, y + 15), text, 255, font, "mm")

    box(8, 90, 50, "y, z")
    ink.line((58, 105, 80, 105), 255)
    box(80, 90, 90, "generator")
    terms = {"critic": ("critic", "alpha"), "auxiliary": ("auxiliary classifier", "beta")}
    terms["adversarial"] = ("target classifier", "gamma")
    for i, (name, run) in enumerate(runs.items()):
        total = sum(weight * value for weight, value in run.values())
        ink.text((480 + 180 * i, 10), f"{name} ended at", 200, font)
        ink.text((480 + 180 * i, 175), f"{total:,.2f}", 255, font)
        for row, term in enumerate(terms):
            ink.text((480 + 180 * i, 47 + 50 * row), f"{run[term][1]:,.2f}", 255, font)
    for row, (term, (network, weight)) in enumerate(terms.items()):
        y = 40 + 50 * row
        ink.line((170, 105, 200, y + 15), 255)
        box(200, y, 150, network)
        ink.text((360, y + 7), f"{weight} = {next(iter(runs.values()))[term][0]:g}", 255, font)
    ink.text((360, 175), "total", 255, font)
    return whole


def write_figures(out, drawn, ended):
    """The log's two figures, of what there is in `drawn`, {variant: images (N, 1, 28, 28) of the same (z, y)}."""
    anew = {name: images for name, images in drawn.items() if name.startswith("scratch")}
    transferred = {name: images for name, images in drawn.items() if name not in anew}
    blocks = slice(0, 16), slice(16, 32)
    if anew:
        page = sheet([(name, images[block]) for name, images in anew.items() for block in blocks], "approach 1")
        page = framework(page, ended)
        common.write_whole(out / "synthetic-adversarial-framework.png", lambda file: page.save(file, "png"))
    if len(transferred) > 1:
        rows = [(name, images[block]) for block in blocks for name, images in transferred.items()]
        below = sheet(rows, "the same z and y in each column: approach 2 as logged and as meant, AT-GAN, ours")
        common.write_whole(
            out / "synthetic-adversarial-framework-with-fid.png", lambda file: below.save(file, "png", optimize=True)
        )


def load_generator(path, dataset):
    """Week 1's checkpoint at `path`, whose networks are 28 pixels wide, for `dataset` (auto: the one it was made with).

    Returns (generator, critic, the settings they were trained with), frozen. Raises Misuse for what doesn't fit.
    """
    again = f"make one with: python acwgan.py --out {path.parent}"
    if not path.exists():
        raise common.Misuse(f"there is no generator at {path}; {again}")
    there = common.load_checkpoint(path, "acwgan", again)
    try:
        shape = there["shape"]
        if shape["image_size"] != 28:
            raise common.Misuse(f"{path} draws {shape['image_size']} pixels, the classifiers here see 28; {again}")
        if dataset not in ("auto", shape["dataset"]):
            raise common.Misuse(f"{path} was trained on {shape['dataset']}, not on --dataset {dataset}; {again}")
        generator, critic = acwgan.Generator(shape["latent"], shape["width"]), acwgan.Critic(shape["width"])
        generator.load_state_dict(there["average"])
        critic.load_state_dict(there["critic"])
        if there["steps"] < (total := shape["epochs"] * (shape["dataset_size"] // shape["batch_size"])):
            print(f"{path} is unfinished, step {there['steps']:,} of {total:,}; acwgan.py --resume would go on with it")
    except (KeyError, TypeError, AttributeError, RuntimeError) as problem:
        raise common.Failure(f"{path} does not fit this version ({problem!r:.99}); {again}") from None
    return generator.eval().requires_grad_(False), critic.eval().requires_grad_(False), shape


def main(argv=None):
    """Train, measure and draw the variants; returns what results.json holds."""
    args = settings(argv)
    original, critic, shape = load_generator(args.generator, args.dataset)
    device = common.pick_device(args.device)
    common.make_folder(args.out)
    dataset, images, labels = common.load_digits(shape["dataset"], args.data, True, args.limit)
    _, test_images, test_labels = common.load_digits(dataset, args.data, False)
    images, labels, test_images, test_labels = (x.to(device) for x in (images, labels, test_images, test_labels))
    test_images, test_labels = test_images[: args.samples], test_labels[: args.samples]
    original, critic = original.to(device), critic.to(device)

    nets = classifiers(args, dataset, images, labels, device) | {"original": original, "critic": critic}
    nets["reader"] = acwgan.digit_reader(args.out, dataset, images, labels)
    accuracy = {
        role: common.wilson((predict(nets[role], test_images) == test_labels).sum().item(), len(test_labels))
        for role in nets
        if role not in ("original", "critic")
    }
    few, theirs = test_images[:1000], test_labels[:1000]
    robust = (predict(nets["judge"], pgd(nets["judge"], few, theirs, 1)) == theirs).sum().item()
    accuracy["judge under PGD"] = common.wilson(robust, len(few))
    print("right on test images: " + ", ".join(f"{role} {common.percent(r)}" for role, r in accuracy.items()))
    sample = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:2048].to(device)
    with torch.no_grad():
        spaces = ("auxiliary", "batch-norm auxiliary")
        nets["reference"] = {role: nets[role].features(images[sample]).float() for role in spaces}

    asked = torch.arange(args.samples, device=device) % CLASSES
    real = acwgan.moments(acwgan.read(nets["reader"], test_images)[0])
    drawn = {"original": acwgan.generate(original, asked, args.seed)}
    generators, rows, ended = {"original": original}, {}, {}
    score = functools.partial(measure, target=args.target, nets=nets, real=real)
    _, rows["original"] = score(drawn["original"], drawn["original"], asked)
    for variant in args.variant:
        generator, ended[variant] = finished(variant, args, nets, shape, images, labels, device)
        generators[variant], drawn[variant] = generator, acwgan.generate(generator, asked, args.seed)
        predicted, rows[variant] = score(drawn[variant], drawn["original"], asked)
        arrays = {
            "images": (drawn[variant][:, 0] * 255).round().byte(),
            "labels": asked,
            "target": wanted_class(asked, args.target),
            "predicted": predicted,
        }
        arrays = {name: array.cpu().numpy() for name, array in arrays.items()}
        common.write_whole(args.out / f"samples-{variant}.npz", lambda file, a=arrays: np.savez_compressed(file, **a))
    few = slice(1000)  # half a minute of PGD
    seconds, perturbed = speed(generators, nets, asked[few], args.target, args.seed)
    _, rows[PGD] = score(perturbed, drawn["original"][few], asked[few])
    for name, row in rows.items():
        row["samples_per_second"] = len(perturbed) / seconds[name]
    print(f"every y is to be taken for {'y + 1' if args.target is None else args.target}; n = {args.samples:,}")
    common.print_table(["variant", *COLUMNS], [[name, *map(row.get, COLUMNS.values())] for name, row in rows.items()])
    write_figures(args.out, drawn, ended)
    facts = {"dataset": dataset, "dataset_size": len(images), "device": str(device)}
    numbers = {"accuracy": accuracy, "rows": rows, "ended": ended, "seconds_for_up_to_1000_digits": seconds}
    return common.write_results(args, numbers, **facts)


if __name__ == "__main__":
    common.run(main)

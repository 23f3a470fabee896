"""Week 2: from a conditional GAN to a generator of adversarial digits.

Both ways that the log tried failed. Approach 1 trained a new generator against a finished critic,
an auxiliary and a target classifier; its samples "remained just noise images". Approach 2 retrained
week 1's generator, as AT-GAN does (Wang, He & Hopcroft 2019, arXiv 1904.07793), with an FID as the
distance; the digits degraded. This script repeats both as they were run, changes one thing a row,
and ends at digits that the target takes for the next class, and a judge in no loss for their own.

    python acwgan.py && python transfer.py     week 1's generator, then every row and the table
    python transfer.py --variant ours          one row, or several (the log's: scratch, as-logged)
    python transfer.py --target 3              every digit is to be taken for a 3
    python transfer.py --resume                train the rows that are not finished yet

Writes into --out: for each row generator-<variant>.pt, history-<variant>.csv (its losses) and
samples-<variant>.npz; the log's two figures; results.json; and the classifiers it trained.
"""

import collections
import copy
import functools
import hashlib
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import acwgan
import common
from acwgan import CLASSES

# --- settings


class Variant(NamedTuple):
    """A row of the experiment: how its generator is made."""

    change: str  # against the row above
    start: str  # see `new_generator`
    weights: dict  # of the terms of its loss, see `loss_term`
    rounds: int = 1  # of --steps steps
    rate: float = 1e-2  # Adam's step size; x 1,500 steps it is 1.6 times the log's 1e-4 x 94,000
    beta2: float = 0.9  # Adam's second beta; the first is 0
    decay: bool = False  # warm up over 50 steps, then decay to 0
    attacked: str = "target"  # or random_target: approach 1 never loaded its weights
    wanted: int | None = None  # the class to be taken for, unless --target says; None: the next
    critic_trains: bool = False


HELD = {"auxiliary": 1, "adversarial": 1}  # the log's beta and gamma
RANDOM = {"attacked": "random_target", "wanted": 7, "rate": 2e-3}
# fmt: off
VARIANTS = {
    "original": Variant("week 1's generator", "original", {}, rounds=0),
    "scratch": Variant("approach 1 as logged", "untrained", {"critic": 1, **HELD}, **RANDOM),
    "scratch-live": Variant("the critic trains, too", "untrained", {"critic": 1, **HELD}, **RANDOM,
        critic_trains=True),
    # gamma was 0: nothing asked for adversarial digits
    "as-logged": Variant("approach 2 as logged", "pretrained", {"logged fid": 1, "auxiliary": 1}),
    "adversarial": Variant("gamma = 1", "pretrained", {"logged fid": 1, **HELD}),
    "fid": Variant("the FID has a gradient", "pretrained", {"frechet": 1, **HELD}),
    "euclidean": Variant("AT-GAN's distance", "pretrained", {"noisy euclidean": 0.05, **HELD}),
    "ours": Variant("refiner, hinges, robustness", "refiner",
        {"adversarial hinge": 1, "frechet": 4, "batch-norm frechet": 4, "robust hinge": 2,
         "euclidean": 0.03}, rounds=2, rate=1e-3, beta2=0.99, decay=True),
}
# fmt: on
ANEW = "delete it, and it is trained anew"

CRITIC_RATE = 1e-3  # Adam's step size for the critic that trains, too; its betas are (0, 0.99)
AT_GAN_NOISE = 0.1  # standard deviation of what AT-GAN adds to the original sample
RECENT_BATCHES = 7  # whose features stand beside the newest batch's in a Frechet distance
REFERENCE = 2048  # real digits in a Frechet distance
SHAPING = ("seed", "steps", "batch_size", "target", "target_model")  # flags: of every training
ONE_RUN = ("out", "device", "resume", "force")  # flags that --resume does not restore


def settings(argv=None):
    """The flags, with every default resolved; with --resume those of the newest generator."""
    datasets, hint = ("auto", "mnist", "glyphs"), "auto: the one the generator was trained on"
    where, limit = Path("runs/transfer"), "train on N images"
    p = common.parser(__doc__, where, "auto", datasets, hint, limit, True)
    add, whole, week1 = p.add_argument, common.whole, Path("runs/acwgan/checkpoint.pt")
    add("--generator", type=Path, default=week1, help="week 1's checkpoint")
    add("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="rows to train")
    add("--target", type=int, choices=range(CLASSES), help="wanted class; otherwise y + 1, or 7")
    add("--target-model", choices=("A", "D"), default="A", help="attacked; the other: transfer")
    add("--steps", type=whole(1), default=1500, help="training steps; ours takes twice as many")
    add("--batch-size", type=whole(2), default=64, help="samples per step")
    add("--samples", type=whole(20), default=10_000, help="digits behind every number")
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


# --- networks


class Classifier(nn.Module):
    """Images (N, 1, 28, 28) in [0, 1] -> logits (N, 10); `features` feed its last layer."""

    def __init__(self, features, width):
        super().__init__()
        self.features, self.head = nn.Sequential(*features), nn.Linear(width, CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.head(self.features(images)).float()


def model_a():
    """The default target: Model A of Tramer et al. 2018 (arXiv 1705.07204), with a stride of 2."""
    layers = [nn.Conv2d(1, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 5, 2), nn.ReLU(), nn.Dropout(0.25)]
    layers += [nn.Flatten(), nn.Linear(6400, 128), nn.ReLU(), nn.Dropout(0.5)]
    return Classifier(layers, 128)


def model_d():
    """The other target: Model D of the same paper, four dense layers."""
    layers = [nn.Flatten()]
    for inputs in (784, 300, 300, 300):
        layers += [nn.Linear(inputs, 300), nn.ReLU(), nn.Dropout(0.5)]
    return Classifier(layers, 300)


def convolutional(layers, inputs, batch_norm=False):
    """A classifier of layers (channels in, out, kernel size, stride), whose last has `inputs`."""
    network = [nn.PixelUnshuffle(2)]
    for c_in, c_out, size, stride in layers:
        norm = [nn.BatchNorm2d(c_out)] if batch_norm else []
        network += [nn.Conv2d(c_in, c_out, size, stride, 1), *norm, nn.ReLU()]
    return Classifier([*network, nn.Flatten(), nn.Linear(inputs, 128), nn.ReLU()], 128)


class Refiner(nn.Module):
    """`ours`: week 1's generator, frozen, and a small U-Net that adds a residual to its digit.

    Called as the generator is. The last layer starts at zero: the first digits are the original's.
    """

    def __init__(self, original, width=40):
        super().__init__()
        self.original, self.latent = copy.deepcopy(original), original.latent
        first = nn.Conv2d(8 + CLASSES, width, 3, 1, 1)
        self.encoder = nn.Sequential(first, nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1))
        down = nn.Conv2d(width, 2 * width, 4, 2, 1)
        middle = nn.Conv2d(2 * width, 2 * width, 3, 1, 1)
        up = nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        self.coarse = nn.Sequential(nn.ReLU(), down, nn.ReLU(), middle, nn.ReLU(), up)
        fine, last = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, 4, 3, 1, 1)
        self.decoder = nn.Sequential(nn.ReLU(), fine, nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, latent, labels):
        image = F.pixel_unshuffle(self.original(latent, labels).float(), 2)
        label = F.one_hot(labels, CLASSES).to(image)[:, :, None, None]
        maps = [2 * image - 1, (image > 0.5).to(image), label.expand(-1, -1, *image.shape[2:])]
        fine = self.encoder(torch.cat(maps, 1).contiguous(memory_format=torch.channels_last))
        residual = self.decoder(fine + self.coarse(fine))
        return F.pixel_shuffle(image + residual.float(), 2).clamp(0, 1)


class Networks(NamedTuple):
    """What a generator is trained against and measured with; all frozen and in eval mode."""

    original: nn.Module  # week 1's generator
    critic: nn.Module  # and its critic
    target: nn.Module  # the classifier that is attacked
    random_target: nn.Module  # model A, untrained
    other_target: nn.Module  # never attacked: do the digits transfer?
    auxiliary: nn.Module  # plain classifiers
    batch_norm_auxiliary: nn.Module
    robust_auxiliary: nn.Module  # trained adversarially
    judge: nn.Module  # stands in for an eye: trained adversarially, in no loss
    reader: nn.Module  # week 1's, for its Frechet distance


def load_generator(path, dataset):
    """Week 1's generator and critic, frozen, and their settings, with a hash as "weights".

    dataset: the one they must have been trained on, or auto. Raises Failure if they don't fit.
    """
    advice = f"make one with: python acwgan.py --out {path.parent}"
    if not path.exists():
        raise common.Failure(f"there is no generator at {path}; {advice}", 2)
    checkpoint = common.load_checkpoint(path, "acwgan", advice)
    with common.advise(f"{path} does not fit", advice):
        made, steps = dict(checkpoint["settings"]), checkpoint["steps"]
        size, source = made["image_size"], made["dataset"]
        if size != 28 or dataset not in ("auto", source):
            text = f"{path} draws {source} at {size} pixels, here is needed {dataset} at 28"
            raise common.Failure(f"{text}; {advice}", 2)
        generator = acwgan.Generator(made["latent"], made["width"])
        critic = acwgan.Critic(made["width"])
        generator.load_state_dict(checkpoint["average"])
        critic.load_state_dict(checkpoint["critic"])
        total = made["epochs"] * (made["dataset_size"] // made["batch_size"])
    if steps < total:
        print(f"{path} is unfinished, step {steps:,} of {total:,}; acwgan.py --resume continues it")
    weights = [*generator.state_dict().values(), *critic.state_dict().values()]
    content = b"".join(tensor.numpy().tobytes() for tensor in weights)
    made["weights"] = hashlib.sha256(content).hexdigest()[:12]
    return generator.eval().requires_grad_(False), critic.eval().requires_grad_(False), made


def new_generator(start, original):
    """The generator that a variant starts from, given week 1's, original.

    untrained, pretrained: batch norm normalises by the batch, when drawing, too, as the log's did.
    """
    if start == "refiner":
        return Refiner(original).to(next(original.parameters()).device)
    generator = copy.deepcopy(original).requires_grad_(True)
    for module in generator.modules():
        if start == "untrained" and hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if start != "original" and isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    return generator


def fast_gradient(network, images, labels, eps=0.3):
    """FGSM from a random start, for adversarial training (Wong et al. 2020, arXiv 2001.03994)."""
    start = (2 * torch.rand_like(images) - 1) * eps
    moved = (images + start).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(moved), labels), moved)
    return (images + (start + 1.25 * eps * gradient.sign()).clamp(-eps, eps)).clamp(0, 1)


def pgd(network, images, labels, sign, eps=0.3, alpha=0.02, steps=40):
    """L-inf PGD (Madry et al. 2018, arXiv 1706.06083) on the cross-entropy of the labels (N,).

    sign: -1 towards the labels, +1 away from them. Returns images in [0, 1], within eps.
    """
    moved = images.clone()
    for _ in range(steps):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(moved), labels), moved)
        moved = moved.detach() + sign * alpha * gradient.sign()
        moved = moved.clamp(images - eps, images + eps).clamp(0, 1)
    return moved


AUXILIARY = functools.partial(convolutional, ((4, 32, 3, 1), (32, 64, 3, 2), (64, 128, 3, 2)), 2048)
JUDGE = functools.partial(convolutional, ((4, 32, 3, 1), (32, 64, 4, 2), (64, 64, 3, 1)), 3136)
PLAIN = {"epochs": 4, "rate": 1e-3, "shift": 0, "smoothing": 0.0}
MOVED = {"epochs": 3, "rate": 3e-3, "shift": 2, "smoothing": 0.0}
ROBUST = {"epochs": 4, "rate": 3e-3, "shift": 0, "smoothing": 0.0, "attack": fast_gradient}
CLASSIFIERS = {  # network, seed, arguments of `acwgan.train_classifier`
    "model_a": (model_a, 1, PLAIN),
    "model_d": (model_d, 2, PLAIN),
    "auxiliary": (AUXILIARY, 3, MOVED),
    "batch_norm_auxiliary": (functools.partial(AUXILIARY, batch_norm=True), 6, MOVED),
    "robust_auxiliary": (AUXILIARY, 4, ROBUST),
    "judge": (JUDGE, 5, ROBUST | {"epochs": 10, "rate": 4e-3}),
}


def classifier(name, out, dataset, images, labels):
    """One of CLASSIFIERS, trained on these images (N, 1, 28, 28), or the one kept in `out`."""
    make, seed, how = CLASSIFIERS[name]
    torch.manual_seed(seed)
    network = make().to(images.device)
    fit = functools.partial(acwgan.train_classifier, images=images, labels=labels, seed=seed, **how)
    made = {"network": str(network), "dataset": dataset, "images": len(images), "seed": seed, **how}
    if "attack" in how:
        made["attack"] = how["attack"].__name__
    return acwgan.kept_classifier(out / f"{name}.pt", made, network, fit)


def load_networks(args, original, critic, dataset, images, labels):
    """All `Networks`; classifiers that --out does not hold yet are trained on the images."""
    kept = {name: classifier(name, args.out, dataset, images, labels) for name in CLASSIFIERS}
    a, d = kept.pop("model_a"), kept.pop("model_d")
    target, other = (a, d) if args.target_model == "A" else (d, a)
    torch.manual_seed(7)
    random_target = model_a().to(images.device).eval().requires_grad_(False)
    reader = acwgan.digit_reader(args.out, dataset, images, labels)
    return Networks(original, critic, target, random_target, other, reader=reader, **kept)


# --- losses


class FeatureBank:
    """The Frechet distance of generated digits to real ones in one classifier's features.

    A batch alone is too few samples for a covariance: the features of recent batches join it. The
    distance is over the total variance of the real features, whatever their scale.
    """

    def __init__(self, network, images):
        """network: a `Classifier`; images (M, 1, 28, 28): real digits, for the reference."""
        self.network, rng = network, torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(images), generator=rng)[:REFERENCE].to(images.device)
        with torch.no_grad():
            self.reference = network.features(images[chosen]).float()
        self.recent = collections.deque(maxlen=RECENT_BATCHES)

    def distance(self, images):
        """A scalar, differentiable in images (N, 1, 28, 28), whose features join the bank."""
        features = self.network.features(images).float()
        bank = torch.cat([features, *self.recent])
        self.recent.append(features.detach())
        distance = common.frechet_distance_torch(bank, self.reference)
        distance = distance / self.reference.var(0).sum()
        # Of the bank only the newest batch depends on the generator, so the distance moves by an
        # eighth of what it will once eight batches have followed: the gradient makes up for that.
        batches = len(bank) / len(features)
        distance.register_hook(lambda gradient: batches * gradient)
        return distance


def hinge(logits, labels, margin):
    """max(0, margin - (logit of the label - largest other logit)), (N,): 0 once the label leads."""
    label = logits.gather(1, labels[:, None])[:, 0]
    other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return (margin - label + other).relu()


def loss_term(term, networks, banks, images, latent, labels, wanted):
    """One term of a variant's loss, a scalar, of images (N, 1, 28, 28) that the generator drew.

    latent (N, latent), labels (N,): what it drew them from; wanted (N,): the target's goal.
    """
    match term:
        case "critic":
            return -networks.critic(images)[0].mean()
        case "auxiliary":
            return F.cross_entropy(networks.auxiliary(images), labels)
        case "adversarial":
            return F.cross_entropy(networks.target(images), wanted)
        case "logged fid":
            # The log's FID took all activations for one long vector of scalars, and was detached:
            # it adds to the loss and moves no weight.
            with torch.no_grad():
                x, y = networks.auxiliary.features(images).float(), banks["frechet"].reference
                return (x.mean() - y.mean()).square() + (x.std() - y.std()).square()
        case "frechet" | "batch-norm frechet":
            return banks[term].distance(images)
        case "euclidean" | "noisy euclidean":
            with torch.no_grad():
                original = networks.original(latent, labels).float()
            if term == "noisy euclidean":  # as in AT-GAN's equation 5
                original = original + AT_GAN_NOISE * torch.randn_like(original)
            return (images - original).square().flatten(1).sum(1).mean()
        case "adversarial hinge":
            return hinge(networks.target(images), wanted, 1.0).mean()
        case "robust hinge":
            return hinge(networks.robust_auxiliary(images), labels, 3.0).mean()


# --- training


def wanted_class(labels, variant, args):
    """The classes that digits of `labels` (N,) are to be taken for, (N,)."""
    target = variant.wanted if args.target is None else args.target
    return (labels + 1) % CLASSES if target is None else torch.full_like(labels, target)


def train(name, args, networks, images, labels):
    """Train a variant's generator on real images (N, 1, 28, 28) in [0, 1] of labels (N,) int64.

    Returns it, frozen, and its history: each term's running mean every 50 steps. Raises Failure
    once the loss is not a number.
    """
    variant, device, began = VARIANTS[name], images.device, time.time()
    steps, size = variant.rounds * args.steps, args.batch_size
    bf16 = common.has_bf16(device)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    torch.manual_seed(args.seed)
    generator = new_generator(variant.start, networks.original)
    moving = [weight for weight in generator.parameters() if weight.requires_grad]
    adam = torch.optim.Adam(moving, variant.rate, (0.0, variant.beta2))
    if variant.critic_trains:
        networks = networks._replace(critic=copy.deepcopy(networks.critic).requires_grad_(True))
        critic_adam = torch.optim.Adam(networks.critic.parameters(), CRITIC_RATE, (0.0, 0.99))
    spaces = {"frechet": networks.auxiliary, "batch-norm frechet": networks.batch_norm_auxiliary}
    banks = {term: FeatureBank(network, images) for term, network in spaces.items()}
    means, history = {}, []
    bar = common.progress(range(steps), name, unit="step")
    for step in bar:
        if variant.decay:
            adam.param_groups[0]["lr"] = variant.rate * min(1, (step + 1) / 50) * (1 - step / steps)
        latent = torch.randn(size, generator.latent, device=device)
        asked = torch.randint(CLASSES, (size,), device=device)
        wanted = wanted_class(asked, variant, args)
        with autocast():
            drawn = generator(latent, asked).float()
        if variant.critic_trains:
            chosen = torch.randint(len(images), (size,), device=device)
            real = (images[chosen], labels[chosen])
            with autocast():
                loss, _ = acwgan.critic_loss(networks.critic, *real, drawn.detach(), share=0.5)
            critic_adam.zero_grad()
            loss.backward()
            critic_adam.step()
        # a context of its own: in the one above, autocast's bfloat16 copies of the critic's weights
        # would be those from before its step
        with autocast():
            batch = (drawn, latent, asked, wanted)
            terms = {term: loss_term(term, networks, banks, *batch) for term in variant.weights}
        loss = sum(weight * terms[term] for term, weight in variant.weights.items())
        if not loss.isfinite():
            raise common.Failure(f"{name}: the loss is not a number; lower its rate in VARIANTS")
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():  # tensors, since a number of each would wait for the GPU
            means = {term: 0.95 * means.get(term, x) + 0.05 * x for term, x in terms.items()}
        if step % 50 == 0 or step == steps - 1:
            row = {"step": step + 1, "seconds": round(time.time() - began, 2)}
            row |= {term: mean.item() for term, mean in means.items()}
            history.append(row)
            bar.set_postfix({term: f"{row[term]:.3g}" for term in terms}, refresh=False)
    return generator.eval().requires_grad_(False), history


def finished(name, args, networks, made, kept, images, labels):
    """A variant's generator, frozen: out of the checkpoint `kept`, or trained and saved."""
    path = args.out / f"generator-{name}.pt"
    if kept:
        generator = new_generator(made["start"], networks.original)
        with common.advise(path, ANEW):
            generator.load_state_dict(kept["generator"])
        return generator.eval().requires_grad_(False)
    generator, history = train(name, args, networks, images, labels)
    if history:
        acwgan.write_history(args.out / f"history-{name}.csv", history)
    flags = {flag: value for flag, value in vars(args).items() if flag not in ONE_RUN}
    flags |= {"data": str(args.data), "generator": str(args.generator)}
    content = {"kind": "transfer", "settings": made, "flags": flags}
    common.save_checkpoint(path, content | {"generator": generator.state_dict()})
    return generator


# --- measuring


def classify(network, images):
    """The classes (N,) int64 that `network` reads from images (N, 1, 28, 28)."""
    return acwgan.predict(network, images).argmax(1)


def measure(images, original, asked, wanted, networks, test_images):
    """The classes (N,) that the target reads from images (N, 1, 28, 28), and their row's numbers.

    original: week 1's images of the same (z, y). Rates leave out images asked for the wanted class.
    """
    counts = asked != wanted
    predicted = classify(networks.target, images)
    other = classify(networks.other_target, images)
    fooled, legible = predicted == wanted, classify(networks.judge, images) == asked
    change = (images - original).flatten(1)[counts]

    def rate(hits):
        return common.wilson((hits & counts).sum(), counts.sum())

    return predicted, {
        "target_fooled": rate(fooled),
        "judge_reads_y": rate(legible),
        "both": rate(fooled & legible),
        "other_fooled": rate(other == wanted),
        "other_misread": rate(other != asked),
        "frechet": acwgan.reader_distance(networks.reader, images, test_images),
        "l2": change.norm(dim=1).mean().item(),
        "linf": change.abs().amax(1).mean().item(),
    }


def timed(make, *args):
    """The images that `make(*args)` returns, and how many it makes in a second."""
    began = time.perf_counter()
    images = make(*args)
    images.sum().item()  # on a GPU: wait for it
    return images, len(images) / (time.perf_counter() - began)


RATES = ("target_fooled", "judge_reads_y", "both")
OTHERS = ("change", "other_fooled", "frechet", "l2", "digits_per_second")
FIGURES = {  # two lines of ten digits for each variant
    "synthetic-adversarial-framework.png": ("original", "scratch", "scratch-live"),
    "synthetic-adversarial-framework-with-fid.png": [x for x in VARIANTS if "scratch" not in x],
}


def main(argv=None):
    """Train, measure and draw the variants; returns what results.json holds."""
    args = settings(argv)
    original, critic, week1 = load_generator(args.generator, args.dataset)
    device = common.pick_device(args.device)
    common.make_folder(args.out)
    dataset, images, labels = common.load_digits(week1["dataset"], args.data, True, args.limit)
    _, *test = common.load_digits(dataset, args.data, train=False, limit=args.samples)
    tensors = (images, labels, *test)
    images, labels, test_images, test_labels = (x.to(device) for x in tensors)
    original, critic = original.to(device), critic.to(device)
    facts = {"dataset": dataset, "dataset_size": len(images)}
    shared = {"week_1": week1["weights"], **facts, **{flag: vars(args)[flag] for flag in SHAPING}}
    made, kept = {}, {}
    for name in args.variant:  # other settings in --out are refused before any training
        made[name] = shared | VARIANTS[name]._asdict()
        path = args.out / f"generator-{name}.pt"
        kept[name] = acwgan.starting_point(path, "transfer", made[name], args)
    networks = load_networks(args, original, critic, dataset, images, labels)
    roles = [role for role in Networks._fields if role not in ("original", "critic")]
    right = {role: classify(getattr(networks, role), test_images) == test_labels for role in roles}
    perturbed = pgd(networks.judge, test_images[:1000], test_labels[:1000], sign=1)
    right["judge_under_pgd"] = classify(networks.judge, perturbed) == test_labels[:1000]
    accuracy = {role: common.wilson(hits.sum(), len(hits)) for role, hits in right.items()}
    common.print_table(["classifier", "right on test images"], accuracy.items())
    asked = torch.arange(args.samples, device=device) % CLASSES
    drawn, rows = {}, {}
    for name in args.variant:
        variant = VARIANTS[name]
        wanted = wanted_class(asked, variant, args)
        attacked = networks._replace(target=getattr(networks, variant.attacked))
        generator = finished(name, args, attacked, made[name], kept[name], images, labels)
        drawn[name], speed = timed(acwgan.generate, generator, asked, args.seed)
        pair = (drawn[name], drawn["original"])
        predicted, row = measure(*pair, asked, wanted, attacked, test_images)
        rows[name] = {"change": variant.change, **row, "digits_per_second": speed}
        pixels = (drawn[name][:, 0] * 255).round().byte()
        arrays = {"images": pixels, "labels": asked, "target": wanted, "predicted": predicted}
        arrays = {key: array.cpu().numpy() for key, array in arrays.items()}
        save = functools.partial(np.savez_compressed, **arrays)
        common.write_file(args.out / f"samples-{name}.npz", save)

    few, asked = drawn["original"][:1000], asked[:1000]
    wanted = wanted_class(asked, VARIANTS["original"], args)
    perturbed, speed = timed(pgd, networks.target, few, wanted, -1)
    perturbed = (perturbed * 255).round() / 255
    _, row = measure(perturbed, few, asked, wanted, networks, test_images)
    rows["pgd"] = {"change": "40 steps from original", **row, "digits_per_second": speed}
    print("wanted: y + 1, or --target; scratch, scratch-live: 7, of a target that is random")
    for columns in (RATES, OTHERS):
        lines = [[name, *map(row.get, columns)] for name, row in rows.items()]
        common.print_table(["variant", *columns], lines)
    for figure, names in FIGURES.items():
        pages = [drawn[name][:20] for name in names if name in drawn]
        if len(pages) > 1:
            acwgan.save_grid(args.out / figure, torch.cat(pages), columns=10)
    numbers = {"accuracy": accuracy, "rows": rows}
    return common.write_results(args, numbers, **facts, device=str(device))


if __name__ == "__main__":
    common.run(main)

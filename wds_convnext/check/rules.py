"""What `doctor` looks for in data and options: a rule finds, says why it matters, and what to do.

A rule is a function of a case; its docstring states what holds where it finds nothing. These need
no torch; those that do are in `machine`.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np

from wds_convnext.check.case import Case, Finding, Rule
from wds_convnext.check.labelmix import classes_per_batch, expected_classes
from wds_convnext.check.measure import available_memory
from wds_convnext.errors import listing, printable
from wds_convnext.shards.spec import total_bytes
from wds_convnext.training.schedule import lr_warning


def shared_images(case: Case) -> Iterator[Finding]:
    """No image is in two splits."""
    image, split = case.copies["image"], case.copies["split"]
    for first, second in combinations(range(len(case.splits)), 2):
        common = np.intersect1d(image[split == first], image[split == second])
        if len(common):
            num = np.count_nonzero((split == second) & np.isin(image, common))
            samples = case.samples_of(common)
            one, other = case.splits[first], case.splits[second]
            example = next(x for x in samples[0] if x["split"] == other.name)
            yield Finding(
                f"Images of {other.name} that are in {one.name}, too: {num:,} of "
                f"{len(other.dataset):,}, e.g. key {_key(example)}.",
                f"A model that was fitted to {one.name} knows them: {other.name} looks too good.",
                "Leave them out of one of the two; --json lists them.",
                samples,
            )


def duplicates(case: Case) -> Iterator[Finding]:
    """No image comes twice within a split."""
    for place, split in enumerate(case.splits):
        own = case.copies["image"][case.copies["split"] == place]
        images, counts = np.unique(own, return_counts=True)
        images = images[counts > 1]
        if len(images):
            num = int(counts[counts > 1].sum() - len(images))
            samples = case.samples_of(images)
            first, second, *_ = (x for x in samples[0] if x["split"] == split.name)
            yield Finding(
                f"Repeated images in {split.name}: {num:,} of {len(split.dataset):,}, e.g. "
                f"{_key(second)} is {_key(first)}.",
                "They count twice, and a split that is drawn from this one would share them.",
                "Keep one of each; --json lists them.",
                samples,
            )


def label_conflicts(case: Case) -> Iterator[Finding]:
    """Equal images have equal labels."""
    pairs = np.unique(case.copies[["image", "label"]])
    images, counts = np.unique(pairs["image"], return_counts=True)
    images = images[counts > 1]
    if len(images):
        samples = case.samples_of(images)
        first = samples[0][0]
        other = next(x for x in samples[0] if x["class"] != first["class"])
        yield Finding(
            f"Images with two labels: {len(images):,}, e.g. {_key(first)} is {_class(first)}, "
            f"{_key(other)} is {_class(other)}.",
            "One of the labels is wrong, and no model can get both right.",
            "Correct the label or leave the image out; --json lists them.",
            samples,
        )


def unusable_images(case: Case) -> Iterator[Finding]:
    """Every image has a header that can be read, and its end."""
    reasons = sum((split.survey.unusable for split in case.splits), Counter[str]())
    if reasons:
        (reason, num), *others = reasons.most_common()
        more = f"; {len(others)} other reasons" if others else ""
        yield Finding(
            f"Images that cannot be used: {reasons.total():,} ({num:,} {printable(reason)}{more}).",
            f"More than {case.config.max_bad_samples:.1%} of an epoch's samples end a run.",
            "wds-convnext verify --deep names them; write the shards without them.",
        )


def missing_classes(case: Case) -> Iterator[Finding]:
    """Every split has samples of every class."""
    for split in case.splits:
        missing = np.flatnonzero(split.class_counts == 0)
        if len(missing):
            names = listing(
                [printable(split.dataset.class_names[i], limit=30) for i in missing], limit=3
            )
            is_train = split is case.train
            yield Finding(
                f"Classes without a sample in {split.name}: {len(missing):,} of "
                f"{split.dataset.num_classes:,}: {names}.",
                "The model cannot learn them." if is_train else "How well they do stays unknown.",
                "Add samples of them, or leave the classes out."
                if is_train
                else "Draw the split by class, so that each has its share.",
            )


def class_imbalance(case: Case) -> Iterator[Finding]:
    """No class has ten times as many training samples as another."""
    counts, names = case.train.class_counts, case.train.dataset.class_names
    smallest, largest = np.where(counts, counts, len(case.train.dataset)).argmin(), counts.argmax()
    ratio = counts[largest] / counts[smallest]
    if ratio >= 10:
        share = counts[largest] / counts.sum()
        small, large = (printable(names[i], limit=30) for i in (smallest, largest))
        yield Finding(
            f"Class {large} has {counts[largest]:,} samples, class {small} {counts[smallest]:,}.",
            f"Top-1 hides the small classes: {large} alone is {share:.0%} of the samples.",
            "Add samples of small classes, or let them come more often: --balance sqrt.",
        )


def label_mix(case: Case) -> Iterator[Finding]:
    """The shuffle buffer mixes the classes as a uniform order would."""
    order = case.order
    if order.shuffle_buffer >= order.num_samples:
        return
    labels = case.train.survey.labels
    copies = None
    if order.weighting:
        copies = order.weighting.epoch(0).copies(np.arange(len(labels)))
    counts = np.bincount(labels, weights=copies).astype(np.int64)
    mixed = classes_per_batch(labels, order)
    uniform = expected_classes(counts.tolist(), order.global_batch_size)
    if mixed < 0.8 * uniform:
        yield Finding(
            f"With --shuffle-buffer {order.shuffle_buffer} a batch has {mixed:.1f} classes, "
            f"uniformly {uniform:.1f}.",
            "Batches of few classes pull the model to and fro, and BatchNorm's statistics.",
            f"--shuffle-buffer {order.num_samples} costs no memory; or shuffle the shards.",
        )


def image_sizes(case: Case) -> Iterator[Finding]:
    """Most images are as large as --image-size, and not many times larger."""
    sides, size = case.train.survey.images.short_sides, case.config.image_size
    assert size is not None  # `with_pretrained` filled it in
    if not sides:
        return
    median = case.train.survey.images.median_side
    share = sum(num for side, num in sides.items() if side < size) / sides.total()
    if share > 0.1:
        yield Finding(
            f"Smaller than --image-size {size}: {share:.0%} of the images (median {median} px).",
            "They are enlarged, and the step pays for pixels in which nothing is new.",
            f"--image-size {max(32, median // 32 * 32)} is near the median."
            if median < size
            else "Leave the smallest out, or take a smaller --image-size.",
        )
    elif median > 4 * size:
        yield Finding(
            f"The median image has {median} px, more than four times --image-size {size}.",
            "Most of the loader's time goes into decoding pixels that are then averaged.",
            f"Store the images with a short side of about {2 * size} px.",
        )


def rotations(case: Case) -> Iterator[Finding]:
    """No image is turned by its EXIF alone."""
    if num := case.count("unusual", "EXIF-rotated"):
        yield Finding(
            f"Images that EXIF turns or mirrors: {num:,} of {case.num_samples:,}.",
            "The loader ignores EXIF, so the model sees them lying on their side.",
            "Turn the pixels before you write shards (Pillow's ImageOps.exif_transpose).",
        )


def color_modes(case: Case) -> Iterator[Finding]:
    """No image is in CMYK, and gray images are few or all."""
    if num := case.count("modes", "CMYK"):
        yield Finding(
            f"Images in CMYK: {num:,} of {case.num_samples:,}.",
            "They become RGB without their color profile, so their colors are off.",
            "Convert them with their profile before you write shards.",
        )
    gray = case.count("modes", "L") / case.num_samples
    if 0.05 < gray < 1:
        yield Finding(
            f"Gray images: {gray:.0%}; the others have colors.",
            "Where classes differ in that, the model learns color in place of shape.",
            "Look at them by class (wds-convnext inspect --sheet); perhaps make all gray.",
        )


def page_cache(case: Case) -> Iterator[Finding]:
    """The shards fit into the free memory, and so into the page cache."""
    num_bytes = sum(total_bytes(split.dataset.shards) for split in case.splits[:2])
    free = available_memory()
    if free is not None and num_bytes > free:
        is_uniform = case.order.shuffle_buffer >= case.order.num_samples
        yield Finding(
            f"The shards have {num_bytes / 1e9:,.1f} GB, this machine {free / 1e9:,.1f} GB of "
            "free memory.",
            f"Each epoch reads them from the disk{', in random places' if is_uniform else ''}.",
            "Keep them on a local SSD"
            + (", or --shuffle-buffer 10000 to read nearby places." if is_uniform else "."),
        )


def learning_rate(case: Case) -> Iterator[Finding]:
    """The learning rate is one for the global batch."""
    if warning := lr_warning(case.config, case.order.global_batch_size):
        found, _, advice = warning.partition(": ")
        yield Finding(
            f"{found}.",
            "With another batch the same rate learns too slowly, or does not converge.",
            advice,
        )


def warmup(case: Case) -> Iterator[Finding]:
    """The warm-up is at most a third of the run."""
    warmup_epochs, epochs = case.config.warmup_epochs or 0.0, case.config.epochs
    if 3 * warmup_epochs > epochs:
        yield Finding(
            f"--warmup-epochs {warmup_epochs:g} of --epochs {epochs}.",
            f"The learning rate rises for {min(1.0, warmup_epochs / epochs):.0%} of the run, with "
            "little time to come down.",
            f"--warmup-epochs {epochs / 10:g} is a tenth of the run.",
        )


def _key(sample: dict[str, Any]) -> str:
    return printable(sample["key"], limit=24)


def _class(sample: dict[str, Any]) -> str:
    return printable(sample["class"], limit=24)


DATA_RULES: tuple[Rule, ...] = (
    shared_images,
    duplicates,
    label_conflicts,
    unusable_images,
    missing_classes,
    class_imbalance,
    label_mix,
    image_sizes,
    rotations,
    color_modes,
    page_cache,
    learning_rate,
    warmup,
)

"""What `explain` says: a step's batches and samples, or a sample's steps, as text and JSON."""

from dataclasses import asdict, dataclass

from wds_convnext.errors import printable
from wds_convnext.shards.decode import Box
from wds_convnext.training.augment import MixDraw
from wds_convnext.training.recorded import RecordedRun


@dataclass(frozen=True)
class DrawnSample:
    """A sample as a step gets it. All lengths are in pixels."""

    position: int  # in its batch
    number: int  # in the data set
    shard: str
    key: str
    label: int
    class_name: str
    epoch: int
    copy: int  # which of its copies in the epoch, from 0
    image_size: tuple[int, int]  # height, width; of the image when it is cropped
    crop: Box
    is_flipped: bool
    operations: list[tuple[str, float]]  # of the policy, with magnitudes, in their order
    color_factors: dict[str, float]  # in the order they are applied in
    erasure: tuple[int, ...] | None  # top, left, height, width; and the key of the noise
    partner: int | None  # position of the sample it is mixed with
    in_place_of: list[dict]  # samples that do not decode: shard, key, reason

    def __str__(self) -> str:
        height, width = self.image_size
        box = self.crop
        words = [
            f"{self.position:4d}  {self.shard}  {self.key}  {self.label} {self.class_name}",
            f"epoch {self.epoch}" + f", copy {self.copy}" * (self.copy > 0),
            f"crop {box.width}x{box.height} at {box.left},{box.top} of {width}x{height}",
        ]
        words += ["flipped"] * self.is_flipped
        words += [f"{name} {magnitude:.3f}" for name, magnitude in self.operations]
        words += [f"{name} {factor:.3f}" for name, factor in self.color_factors.items()]
        if self.erasure is not None:
            top, left, height, width, _ = self.erasure
            words.append(f"erased {width}x{height} at {left},{top}")
        words += [f"with {self.partner}"] * (self.partner is not None)
        words += [f"in place of {bad['key']}: {bad['reason']}" for bad in self.in_place_of]
        return printable("  ".join(words), limit=2000)

    def to_json(self) -> dict:
        return asdict(self) | {"crop": self.crop._asdict()}


@dataclass(frozen=True)
class DrawnBatch:
    """One batch of one rank."""

    rank: int
    micro_batch: int  # of the step; 0 unless batches are accumulated
    mix: MixDraw
    samples: list[DrawnSample]

    @property
    def mixing(self) -> str:
        """How the batch is mixed: none, mixup or cutmix."""
        if self.mix.box:
            return "cutmix"
        return "mixup" if self.mix.share < 1 else "none"

    def title(self) -> str:
        """Rank, batch and mixing in one line."""
        return f"rank {self.rank}, batch {self.micro_batch}: {self.mix}"

    def captions(self) -> list[tuple[str, str]]:
        """What stands under each picture: its class, and what its partner adds to the label."""
        lines = []
        for sample in self.samples:
            mixed = ""
            if sample.partner is not None:
                other = self.samples[sample.partner].class_name
                mixed = f"{1 - self.mix.share:.0%} {other}"
            lines.append((f"{sample.position} {sample.class_name}", mixed))
        return lines

    def to_json(self) -> dict:
        return {
            "rank": self.rank,
            "micro_batch": self.micro_batch,
            "mixing": self.mixing,
            "lambda": self.mix.share,
            "box": self.mix.box and dict(zip(("top", "bottom", "left", "right"), self.mix.box)),
            "samples": [sample.to_json() for sample in self.samples],
        }


@dataclass(frozen=True)
class StepExplanation:
    """All batches of one optimizer step."""

    run: RecordedRun
    step: int
    batches: list[DrawnBatch]

    def lines(self) -> list[str]:
        """The explanation as text."""
        order = self.run.order
        done = "done" if self.step < self.run.steps_done else "to come"
        lines = [
            f"Step {self.step} of 0 to {self.run.num_steps - 1}, {done}: epoch "
            f"{order.epoch_of(self.step)}, {order.global_batch_size} samples of "
            f"{self.run.dataset.name}, {self.run.dataset.split} split.",
            self.run.layout(),
        ]
        for batch in self.batches:
            lines += [batch.title(), *map(str, batch.samples)]
        return lines

    def to_json(self) -> dict:
        return {
            **_run_to_json(self.run),
            "step": self.step,
            "is_done": self.step < self.run.steps_done,
            "epoch": self.run.order.epoch_of(self.step),
            "batches": [batch.to_json() for batch in self.batches],
        }


@dataclass(frozen=True)
class Visit:
    """A step that gets a sample."""

    epoch: int
    step: int
    rank: int
    micro_batch: int
    position: int  # in its batch
    is_done: bool


@dataclass(frozen=True)
class SampleExplanation:
    """In which steps of a run a sample comes: once per epoch."""

    run: RecordedRun
    number: int
    shard: str
    key: str
    label: int
    visits: list[Visit]

    @property
    def class_name(self) -> str:
        return self.run.dataset.class_names[self.label]

    def lines(self) -> list[str]:
        """The explanation as text."""
        head = f"Sample {self.number}: {self.shard}, key {self.key}, {self.label} {self.class_name}"
        lines = [printable(head, limit=2000), self.run.layout()]
        lines += ["  epoch      step   rank  batch  position"]
        return lines + [
            f"{v.epoch:7d} {v.step:9d} {v.rank:6d} {v.micro_batch:6d} {v.position:9d}  "
            f"{'came' if v.is_done else 'will come'}"
            for v in self.visits
        ]

    def to_json(self) -> dict:
        return {
            **_run_to_json(self.run),
            "number": self.number,
            "shard": self.shard,
            "key": self.key,
            "label": self.label,
            "class_name": self.class_name,
            "visits": [asdict(visit) for visit in self.visits],
        }


def _run_to_json(run: RecordedRun) -> dict:
    return {
        "checkpoint": str(run.path),
        "steps_done": run.steps_done,
        "num_steps": run.num_steps,
        "num_ranks": run.num_ranks,
        "accumulate": run.config.accumulate,
        "batch_size": run.facts.batch_size,
        "global_batch_size": run.order.global_batch_size,
    }

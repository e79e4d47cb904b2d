"""The measurements as data: models by their sizes, and presets that name the variants to run.

Models have random weights, since time and memory do not depend on the values of weights. Sizes are those of the
published configurations (arXiv:2307.09288 for Llama 2, arXiv:2407.21783 for Llama 3). The scaled models keep what
determines the ratios, the share of blocks in all FLOPs: 96 % in `llama-8x1024`, 98 % in Llama-2-7B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from dropbp.errors import ConfigError

T = TypeVar("T")

DROP_RATES = (0.5, 0.75, 0.875)  # the paper's
TINY_MODEL = "llama-4x64"  # too small to be worth compiling: its graphs are captured and run as they are
ENDLESS = 1 << 20  # a length that no current machine reaches


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


MODELS: Mapping[str, ModelShape] = {
    "llama-4x64": ModelShape(4, 64, 2, 2, 192, 256),
    "llama-8x512": ModelShape(8, 512, 8, 8, 1408, 2048),
    "llama-8x1024": ModelShape(8, 1024, 16, 16, 2816, 4096),
    "llama2-7b": ModelShape(32, 4096, 32, 32, 11008, 32000),
    "llama2-7b-4-layers": ModelShape(4, 4096, 32, 32, 11008, 32000),
    "llama2-13b": ModelShape(40, 5120, 40, 40, 13824, 32000),
    "llama2-70b": ModelShape(80, 8192, 64, 8, 28672, 32000),
    "llama3-8b": ModelShape(32, 4096, 32, 8, 14336, 128256),
}


@dataclass(frozen=True)
class Training:
    """One way of training: the part of a run's configuration without drop rates and input sizes."""

    tuning: str = "full"
    dtype: str = "bf16"
    checkpointing: bool = False
    compiled: bool = False
    loss: str = "plain"
    kernels: str = "torch"

    @property
    def name(self) -> str:
        """The name in file names and tables."""
        flags = [("checkpointing", self.checkpointing), ("compiled", self.compiled), ("chunked", self.loss != "plain")]
        kernels = [] if self.kernels == "torch" else [self.kernels]
        return "-".join([self.tuning, self.dtype, *(name for name, on in flags if on), *kernels])

    def configuration(self) -> dict[str, Any]:
        """The configuration in result files, which name kernels that are not torch's."""
        fields = asdict(self)
        if self.kernels == "torch":
            del fields["kernels"]
        return fields


@dataclass(frozen=True)
class ThroughputPreset:
    """Runs of `throughput`: one per model and training, with all drop rates interleaved in it.

    Attributes:
        growth: trainings for which the largest micro-batch that fits at each rate is measured too, and the throughput
            there.
        growth_budget_micro_batches: on CPU, memory is limited to what plain training needs for this many micro-batches
            of `batch_size`; an accelerator has its own limit.
    """

    model: str
    trainings: tuple[Training, ...]
    drop_rates: tuple[float, ...] = DROP_RATES
    batch_size: int = 2
    sequence_length: int = 512
    rounds: int = 20
    warmup_rounds: int = 3
    growth: tuple[Training, ...] = ()
    growth_budget_micro_batches: float = 1.0
    growth_rounds: int = 5


@dataclass(frozen=True)
class SeqlenPreset:
    """Runs of `seqlen`: one per training, with all drop rates in it.

    Attributes:
        budget_gib: available memory in GiB; None uses the whole device.
        step: only multiples of this are tried as lengths.
        max_length: the longest sequence to try.
        counted: count tensor bytes on shapes, on the meta device, whatever the model's size.
    """

    model: str
    trainings: tuple[Training, ...]
    drop_rates: tuple[float, ...] = DROP_RATES
    budget_gib: float | None = None
    step: int = 128
    max_length: int = ENDLESS
    counted: bool = False
    masks: int = 4


def _trainings(
    tunings: str, dtypes: str = "bf16", checkpointing: str = "no", loss: str = "plain"
) -> tuple[Training, ...]:
    """All combinations of space-separated words."""
    return tuple(
        Training(tuning, dtype, again == "yes", False, kind)
        for dtype in dtypes.split()
        for tuning in tunings.split()
        for again in checkpointing.split()
        for kind in loss.split()
    )


def _with_compiled(trainings: tuple[Training, ...]) -> tuple[Training, ...]:
    return (*trainings, *(replace(training, compiled=True) for training in trainings))


# bf16: all of full, LoRA and QLoRA, with and without checkpointing, compiled and not. On CPU, the most common of them
# run at the paper's sequence and micro-batch, the others on shorter sequences.
_CPU_TRAININGS = (*_trainings("full lora qlora"), Training("full", checkpointing=True))
_CPU_GRID = tuple(
    training
    for training in _with_compiled(_trainings("full lora qlora", checkpointing="no yes"))
    if training not in _CPU_TRAININGS
)
_CPU_FP32 = (*_trainings("full lora", "fp32"), Training("full", "fp32", checkpointing=True))
_BOTH_LOSSES = "plain chunked"

THROUGHPUT: Mapping[str, ThroughputPreset] = {
    "smoke": ThroughputPreset(
        "llama-4x64", _trainings("full lora", "fp32"), (0.875,), batch_size=1, sequence_length=32, rounds=2,
        warmup_rounds=1, growth=_trainings("full", "fp32"), growth_budget_micro_batches=2.0, growth_rounds=1,
    ),
    # Every run of the GPU plan, with a tiny model.
    "rehearsal": ThroughputPreset(
        "llama-4x64",
        (
            *_with_compiled(_trainings("full lora", "bf16", "no yes")),
            *_trainings("qlora", "bf16", "no yes"),
            *(Training("full", kernels=kernels) for kernels in ("liger", "flash")),
        ),
        (0.875,), batch_size=1, sequence_length=16, rounds=2, warmup_rounds=1, growth=_trainings("full lora"),
        growth_budget_micro_batches=2.0, growth_rounds=1,
    ),
    "cpu-small": ThroughputPreset(
        "llama-8x512",
        (*_CPU_TRAININGS, *_CPU_GRID, *_CPU_FP32),
        batch_size=2, sequence_length=256, rounds=7, warmup_rounds=1, growth=_trainings("full", "fp32"),
    ),
    "cpu": ThroughputPreset("llama-8x1024", _CPU_TRAININGS, rounds=7, warmup_rounds=1),
    "cpu-grid": ThroughputPreset("llama-8x1024", _CPU_GRID, sequence_length=256, rounds=5),
    "cpu-more": ThroughputPreset("llama-8x1024", _CPU_FP32, rounds=7, warmup_rounds=1),
    "cpu-growth": ThroughputPreset(
        "llama-8x1024", (), batch_size=2, sequence_length=256, growth=_trainings("full"), growth_rounds=4
    ),
    "llama2-7b": ThroughputPreset(
        "llama2-7b", _with_compiled(_trainings("full lora", "bf16", "no yes")), growth=_trainings("full lora")
    ),
    "llama2-13b": ThroughputPreset("llama2-13b", _trainings("lora", "bf16", "no yes")),
    "llama2-70b-qlora": ThroughputPreset("llama2-70b", _with_compiled(_trainings("qlora", "bf16", "no yes")), rounds=8),
    # At the paper's micro-batch of 2 the plain step needs 81.7 GiB; at 1 it needs 58.3, and 36.7 with checkpointing.
    "llama2-70b-qlora-1x512": ThroughputPreset(
        "llama2-70b", _with_compiled(_trainings("qlora", "bf16", "no yes")), batch_size=1, rounds=8
    ),
    "llama2-7b-kernels": ThroughputPreset(
        "llama2-7b",
        tuple(Training(tuning, kernels=kernels) for kernels in ("liger", "flash") for tuning in ("full", "lora")),
        rounds=8,
    ),
    "llama3-8b": ThroughputPreset("llama3-8b", _trainings("lora", "bf16", "no yes"), growth=_trainings("lora")),
    # The published protocols: sequence 512, micro-batch 2, no checkpointing.
    "a100": ThroughputPreset("llama2-7b", _trainings("full lora"), growth=_trainings("full lora")),
    "gaudi2": ThroughputPreset("llama2-7b", _trainings("full lora"), growth=_trainings("full lora")),
}  # fmt: skip

SEQLEN: Mapping[str, SeqlenPreset] = {
    "smoke": SeqlenPreset(
        "llama-4x64", _trainings("full", "fp32"), (0.875,), budget_gib=0.02, step=32, max_length=8192, counted=True
    ),
    "cpu": SeqlenPreset(
        "llama-8x1024", _trainings("full lora", "bf16", "no yes", _BOTH_LOSSES), budget_gib=4.0, counted=True
    ),
    "llama2-7b-80gib": SeqlenPreset(
        "llama2-7b", _trainings("full lora", "bf16", "no", _BOTH_LOSSES), (0.875,), budget_gib=79.0, step=64,
        counted=True, masks=2,
    ),
    "llama2-70b-qlora-80gib": SeqlenPreset(
        "llama2-70b", _trainings("qlora", "bf16", "no", _BOTH_LOSSES), (0.875,), budget_gib=79.0, step=64,
        counted=True, masks=2,
    ),
    # Tried on the device until memory runs out. A try of a long sequence takes seconds, so steps are larger.
    "llama2-7b": SeqlenPreset("llama2-7b", _trainings("full lora", "bf16", "no yes", _BOTH_LOSSES), (0.875,), step=256),
    "llama2-7b-rates": SeqlenPreset("llama2-7b", _trainings("full lora", "bf16", "no", _BOTH_LOSSES), step=256),
    "llama2-70b-qlora": SeqlenPreset("llama2-70b", _trainings("qlora", "bf16", "no", _BOTH_LOSSES), (0.875,)),
    "a100": SeqlenPreset("llama2-7b", _trainings("full", "bf16", "no", _BOTH_LOSSES)),
    "rehearsal": SeqlenPreset(
        "llama-4x64", _trainings("full lora qlora", "bf16", "no", _BOTH_LOSSES), (0.5, 0.875), step=16, max_length=32
    ),
}  # fmt: skip

# The presets of the whole bench when none is named, by kind of device. On CPU, all of it with the other parts of `all`
# should take less than 40 minutes on two cores; `cpu-more` and `cpu-small` take longer.
DEFAULT_THROUGHPUT: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu", "cpu-grid", "cpu-growth"),
    "cuda": ("llama2-7b", "llama2-13b", "llama3-8b", "llama2-70b-qlora-1x512"),
    "hpu": ("gaudi2",),
}
DEFAULT_SEQLEN: Mapping[str, tuple[str, ...]] = {
    "cpu": ("cpu", "llama2-7b-80gib", "llama2-70b-qlora-80gib"),
    "cuda": ("llama2-7b", "llama2-70b-qlora"),
    "hpu": ("llama2-7b",),
}


def chosen(kind: str, table: Mapping[str, T], name: str) -> T:
    """The entry with that name.

    Raises:
        ConfigError: there is none; the message lists the known ones.
    """
    if name not in table:
        raise ConfigError(f"{kind} {name!r} is unknown; known are {', '.join(table)}.")
    return table[name]

"""What a run is told (settings) and what its checkpoints must carry to predict (the spec): plain data, JSON-able."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

FORMAT = "vmamba-medseg-1"
SMALL = {"dims": [32, 64, 128, 256], "depths": [2, 2, 2, 2], "depths_decoder": [2, 2, 2, 1], "drop_path_rate": 0.0}
PRESETS: dict[str, dict[str, Any]] = {"published": {}, "small": SMALL}


@dataclass
class Settings:
    """Everything that decides a training's result; stored as RUN/config.json and compared on --resume."""

    data: str | None = None
    recipe: str = "plain"
    model: str = "vmunet"
    preset: str = "published"
    network: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    epochs: int = 300
    batch_size: int = 32
    lr: float = 1e-3
    min_lr: float = 1e-5
    weight_decay: float = 1e-2
    size: list[int] | None = None
    patch: list[int] | None = None
    axis: int = 2
    normalisation: str = "zscore"
    augmentation: str = "standard"
    val_fraction: float = 0.2
    seed: int = 42
    precision: str = "32-true"
    max_minutes: float | None = None

    def network_options(self) -> dict[str, Any]:
        """The preset's options, overridden by those given one by one."""
        return {**PRESETS[self.preset], **self.network}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Settings":
        """Settings from config.json (unknown keys refused)."""
        strange = set(data) - {f.name for f in fields(cls)}
        if strange:
            raise ValueError(f"unknown settings {', '.join(sorted(strange))}")
        return cls(**data)


@dataclass
class Spec:
    """What prediction needs beside the weights; the hyper-parameters of every checkpoint."""

    model: str
    network: dict[str, Any]
    channels: int
    values: list[int]
    classes: list[str]
    patch: list[int]
    axis: int
    normalisation: str
    statistics: list[list[float]] | None = None
    files_per_case: int = 1
    suffix: bool = False
    size: list[int] | None = None
    resize: str = "zoom"
    sigmoid: bool = False
    format: str = FORMAT

    @property
    def outputs(self) -> int:
        """Channels of the network: one for each class, or a single one for two classes."""
        return 1 if self.sigmoid else len(self.values)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the checkpoint."""
        return asdict(self)

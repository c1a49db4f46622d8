"""The base model of a run with everything that trains on it."""

from dataclasses import dataclass

from torch.amp import GradScaler
from torch.optim import Optimizer

from sd3pipe.memory.streaming import BlockStreamer
from sd3pipe.training.objective import Objective
from sd3pipe.training.trained_weights import TrainedWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """The objective with base and adapter, what keeps the base's blocks, what is trained and what trains it."""

    objective: Objective
    streamer: BlockStreamer
    weights: TrainedWeights
    optimizer: Optimizer
    scaler: GradScaler | None = None

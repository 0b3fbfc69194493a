"""Adapters: a modality or a thought becomes context tokens that the student's ports attend to."""

from nexus.adapters.audio import AudioAdapter, AudioAdapterConfig, log_mel
from nexus.adapters.base import Adapter, Alignment, Features
from nexus.adapters.reasoning import ReasoningAdapter, ReasoningAdapterConfig
from nexus.adapters.vision import VisionAdapter, VisionAdapterConfig

__all__ = [
    "Adapter",
    "Alignment",
    "AudioAdapter",
    "AudioAdapterConfig",
    "Features",
    "ReasoningAdapter",
    "ReasoningAdapterConfig",
    "VisionAdapter",
    "VisionAdapterConfig",
    "log_mel",
]

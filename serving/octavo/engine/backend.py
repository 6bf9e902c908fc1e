"""Which device and which kernels a model runs with; decided once, before its weights are read.

`auto` takes a card if there is one that can do what is asked, and says so in one line of the log if there is one that
cannot. A device that was asked for by name is never replaced.
"""

from __future__ import annotations

import logging

import torch

from octavo.kernels.choose import NoSuchKernels, choose
from octavo.kernels.interface import CacheSpec, Kernels, LimitsShapes
from octavo.models.config import ModelConfig
from octavo.quantization.scheme import FLOAT_TYPES
from octavo.settings import Settings

LOG = logging.getLogger(__name__)
CPU = torch.device("cpu")


def device_of(settings: Settings) -> torch.device:
    """`auto` is a card if there is one, unless kernels for processors are asked for by name."""
    if settings.device == "auto" and settings.kernels in ("auto", "gpu") and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("cuda" if settings.device == "cuda" else "cpu")


def kernels_for(settings: Settings, config: ModelConfig) -> Kernels:
    """The kernels that the settings ask for, of a device that can do what the model needs. Raises NoSuchKernels."""
    device = device_of(settings)
    try:
        kernels = choose(settings.kernels, device=device, num_threads=settings.num_threads)
        check_shape(kernels, settings, config)
        return kernels
    except NoSuchKernels as error:
        if device == CPU or (settings.device, settings.kernels) != ("auto", "auto"):
            raise
        LOG.warning("the card is not used, the model runs on the processor: %s", error)
        return choose("auto", device=CPU, num_threads=settings.num_threads)


def check_shape(kernels: Kernels, settings: Settings, config: ModelConfig) -> None:
    """Raise NoSuchKernels for heads or a cache that kernels of a card do not serve."""
    if not isinstance(kernels, LimitsShapes):
        return
    spec = CacheSpec(config.num_kv_heads, config.head_dim, cache_dtype(settings, config))
    reason = kernels.refuses(spec, num_heads=config.num_heads)
    if reason:
        raise NoSuchKernels(reason)


def cache_dtype(settings: Settings, config: ModelConfig) -> torch.dtype:
    """Of K and V as they are kept."""
    if settings.use_cache_kv_int8:
        return torch.int8
    return FLOAT_TYPES[config.dtype if settings.dtype == "auto" else settings.dtype]

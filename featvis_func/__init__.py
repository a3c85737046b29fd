"""Feature visualisation as pure functions: every filter of a layer, batched, compiled and reproducible.

The names below are imported when they are first used, so that ``featvis --help`` does not wait for torch.
"""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featvis_func import color as color
    from featvis_func import image as image
    from featvis_func import objective as objective
    from featvis_func import optimizer as optimizer
    from featvis_func import random as random
    from featvis_func import transform as transform
    from featvis_func import zoo as zoo
    from featvis_func.backbone.features import Features as Features
    from featvis_func.backbone.features import compiled_weights as compiled_weights
    from featvis_func.backbone.features import make_features as make_features
    from featvis_func.backbone.listing import list_layers as list_layers
    from featvis_func.cpu.malloc import kept_memory as kept_memory
    from featvis_func.dataset import Examples as Examples
    from featvis_func.dataset import examples_key as examples_key
    from featvis_func.dataset import top_examples as top_examples
    from featvis_func.dataset.image_statistics import image_statistics as image_statistics
    from featvis_func.engine.batching import RunResult as RunResult
    from featvis_func.engine.batching import run_batched as run_batched
    from featvis_func.engine.run import run as run
    from featvis_func.engine.snapshots import snapshot_steps as snapshot_steps
    from featvis_func.engine.step import Ascent as Ascent
    from featvis_func.engine.step import compile_step as compile_step
    from featvis_func.engine.step import filter_keys as filter_keys
    from featvis_func.engine.step import make_ascent as make_ascent
    from featvis_func.gallery import build_gallery as build_gallery
    from featvis_func.image import alpha as alpha
    from featvis_func.image import cppn as cppn
    from featvis_func.image import fourier as fourier
    from featvis_func.image import from_image as from_image
    from featvis_func.image import laplacian_pyramid as laplacian_pyramid
    from featvis_func.image import phase as phase
    from featvis_func.image import pixel as pixel
    from featvis_func.image import shared as shared
    from featvis_func.io.animation import animate as animate
    from featvis_func.io.dictionary import Dictionary as Dictionary
    from featvis_func.io.dictionary import read_dictionary as read_dictionary
    from featvis_func.models import IMAGE_INPUT as IMAGE_INPUT
    from featvis_func.models import Model as Model
    from featvis_func.models import load_model as load_model
    from featvis_func.objective import Objective as Objective
    from featvis_func.objective import channel as channel
    from featvis_func.objective import directions as directions
    from featvis_func.objective import facets as facets
    from featvis_func.objective import layer as layer
    from featvis_func.objective import logits as logits
    from featvis_func.objective import neuron as neuron
    from featvis_func.objective import neurons as neurons
    from featvis_func.objective import sae as sae
    from featvis_func.rendering.accentuate import accentuate as accentuate
    from featvis_func.rendering.activations import activations_of as activations_of
    from featvis_func.rendering.api import render as render
    from featvis_func.rendering.loggers import tensorboard_logger as tensorboard_logger
    from featvis_func.rendering.loggers import wandb_logger as wandb_logger
    from featvis_func.rendering.optimizers import activation_optimizer as activation_optimizer
    from featvis_func.rendering.optimizers import default_optimizer as default_optimizer
    from featvis_func.rendering.optimizers import published_optimizer as published_optimizer
    from featvis_func.rendering.options import RenderOptions as RenderOptions
    from featvis_func.rendering.plan import make_renderer as make_renderer
    from featvis_func.rendering.presets import named_transform as named_transform
    from featvis_func.rendering.renderer import Renderer as Renderer
    from featvis_func.rendering.result import Result as Result
    from featvis_func.rendering.result import read_result as read_result
    from featvis_func.types import Best as Best
    from featvis_func.types import Image as Image
    from featvis_func.types import Info as Info
    from featvis_func.types import Optimizer as Optimizer
    from featvis_func.types import State as State
    from featvis_func.types import Transform as Transform

_MODULES = ("color", "image", "objective", "optimizer", "random", "transform", "zoo")
_HOMES = {
    "rendering.accentuate": ("accentuate",),
    "io.animation": ("animate",),
    "io.dictionary": ("Dictionary", "read_dictionary"),
    "dataset": ("Examples", "examples_key", "top_examples"),
    "backbone.features": ("Features", "compiled_weights", "make_features"),
    "backbone.listing": ("list_layers",),
    "gallery": ("build_gallery",),
    "image": ("alpha", "cppn", "fourier", "from_image", "laplacian_pyramid", "phase", "pixel", "shared"),
    "rendering.activations": ("activations_of",),
    "rendering.loggers": ("tensorboard_logger", "wandb_logger"),
    "cpu.malloc": ("kept_memory",),
    "models": ("IMAGE_INPUT", "Model", "load_model"),
    "objective": ("Objective", "channel", "directions", "facets", "layer", "logits", "neuron", "neurons", "sae"),
    "rendering.optimizers": ("activation_optimizer", "default_optimizer", "published_optimizer"),
    "rendering.presets": ("named_transform",),
    "rendering.plan": ("make_renderer",),
    "rendering.renderer": ("Renderer",),
    "rendering.api": ("render",),
    "rendering.options": ("RenderOptions",),
    "rendering.result": ("Result", "read_result"),
    "engine.batching": ("RunResult", "run_batched"),
    "engine.snapshots": ("snapshot_steps",),
    "dataset.image_statistics": ("image_statistics",),
    "engine.run": ("run",),
    "engine.step": ("Ascent", "compile_step", "filter_keys", "make_ascent"),
    "types": ("Best", "Image", "Info", "Optimizer", "State", "Transform"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


# Earlier names of the same functions and classes.
_RENAMED = {"Outcome": "RunResult", "run_all": "run_batched", "views": "named_transform"}
_REPLACED = {"make_step": "make_ascent(...).step", "init_state": "make_ascent(...).init"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _RENAMED:
        warnings.warn(f"featvis_func.{name} is now called {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        return __getattr__(_RENAMED[name])
    if name in _REPLACED:
        raise AttributeError(f"featvis_func.{name} was replaced by featvis_func.{_REPLACED[name]}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_HOME_OF})

"""The one-call door: from a model and a layer to one image per filter."""

from collections.abc import Iterable

import torch
from torch import nn

from featvis_func.backbone.features import Features
from featvis_func.models import Model
from featvis_func.objective import Objective
from featvis_func.rendering.renderer import make_renderer
from featvis_func.rendering.result import Result
from featvis_func.types import Image, Optimizer, Transform


def render(
    model: str | nn.Module | Model,
    objective: str | Objective,
    filters: Iterable[int] | int | None = None,
    *,
    steps: int = 32,
    size: int | tuple[int, int] | None = None,
    seed: int = 0,
    views: str | Transform = "default",
    lr: float | None = None,
    image: str | Image = "fourier",
    optimizer: str | Optimizer = "default",
    batch_size: int | str = "auto",
    tolerance: float | None = None,
    redirect: int | None = None,
    device: torch.device | str | None = None,
    precision: str = "auto",
    features: Features | None = None,
    compile: bool | str = "auto",
    deterministic: bool = False,
    saliency: bool = False,
    snapshots: int | None = None,
    progress: bool | None = None,
) -> Result:
    """One image per filter: what each looks for.

    A filter's image depends on the seed, the model, the layer, the filter and the options below, but not on which other
    filters are rendered, in which order or in which batches (up to the rounding of the backbone).

    Args:
        model: a module, a name (``"texturenet"``, ``"torchvision:NAME[@WEIGHTS]"``, ``"timm:NAME"``, ...) or a
            :class:`~featvis_func.Model`; see :func:`~featvis_func.load_model`. Left exactly as it was.
        objective: the name of a layer, or the unique end of one, for the mean of each channel; also with its filters,
            as in ``"layer:97"``, ``"layer:10-20"`` and ``"layer:*"``. Or an
            :class:`~featvis_func.Objective`.
        filters: filter numbers; ``None`` means all of the layer (for an objective that names its own channels: one
            image; numbers then give variants).
        steps: steps of ascent, at least 1; more give more activation at less saturation.
        size: pixels of the images, ``h = w`` or ``(h, w)``. Default: the model's input size.
        seed: in ``[0, 2**64)``.
        views: ``"default"``, ``"published"``, ``"lucid"``, ``"maco"``, ``"none"``, or a :class:`Transform` from the
            image to the model's input size, in ``[0, 1]``; normalisation is added.
        lr: learning rate; default: what the optimiser's preset says.
        image: ``"fourier"``, ``"pixel"``, ``"phase"``, ``"laplacian_pyramid"``, ``"cppn"``, ``"alpha"`` (see
            :mod:`featvis_func.image`), or an :class:`Image`. One with a channel more than the model takes has an
            opacity; views that go by name lay it over random backgrounds.
        optimizer: ``"default"``, ``"published"``, ``"adam"``, ``"adamw"``, ``"nadam"`` or ``"sgd"`` (see
            :mod:`featvis_func.rendering.presets`), or an :class:`Optimizer`.
        batch_size: filters rendered at once, or all if there are fewer; the last batch is padded to the shape of the
            others. ``"auto"``: what measured fastest on a CPU (8), or fills the memory of a CUDA device (8 where the
            run shall be deterministic). Where memory runs out, half as many go on.
        tolerance: stops a filter once its best score has risen by no more than this share of itself over 8 steps; the
            next one takes its place in the batch. ``None``: every filter takes all steps.
        redirect: in how many first steps of each filter gradients are redirected past rectifiers that let none through,
            see :mod:`featvis_func.backbone.redirected_relu`; not for a model that cannot be exported. Default: 16 with the default
            optimiser, where that can be; else 0.
        device: where to compute, such as ``"cuda"``. Default: where the model is.
        precision: of the backbone alone, one of :data:`~featvis_func.backbone.verify.PRECISIONS`. ``"auto"``: bfloat16 for
            a float32 model where the hardware has it.
        features: the model's, from :func:`~featvis_func.make_features`, so that a second call on a layer
            need not trace the model again. They hold the weights as they were, in their own precision.
        compile: whether to pass the step through ``torch.compile(fullgraph=True)``: ``True`` or ``"yes"``, ``False``
            or ``"no"``, ``"cudagraphs"`` (and replay it as a CUDA graph), or ``"auto"``: on CUDA, and on a CPU where
            the run is long enough to win back the compile time; eagerly where compiling fails.
        deterministic: bit-equal reruns on CUDA, too: samples the views by a slower route, under
            ``torch.use_deterministic_algorithms(True)``, which names what the model has that cannot be repeated. Holds
            for equal batch sizes. On a CPU reruns are bit-equal without it.
        saliency: whether to add up, over the steps, how much the score's gradient was at each pixel, a map of what
            the run cared for: :attr:`Result.saliency`.
        progress: a progress bar on the standard error. Default: if that is a terminal.

    Returns:
        A :class:`~featvis_func.Result`, on the CPU.

    Raises:
        ValueError: bad input, with what was given, what was expected and what exists.

    >>> result = render("texturenet", "head", [3, 5], steps=2, size=32)
    >>> result.images.shape, result.filters
    (torch.Size([2, 3, 32, 32]), (3, 5))
    """
    renderer = make_renderer(
        model,
        objective,
        filters,
        steps=steps,
        size=size,
        seed=seed,
        views=views,
        lr=lr,
        image=image,
        optimizer=optimizer,
        batch_size=batch_size,
        tolerance=tolerance,
        redirect=redirect,
        device=device,
        precision=precision,
        features=features,
        compile=compile,
        deterministic=deterministic,
        saliency=saliency,
        snapshots=snapshots,
    )
    return renderer(progress=progress)

"""The one-call interface: from a model and a layer to one image per filter."""

from collections.abc import Iterable

import torch
from torch import nn

from featvis_func.backbone.features import Features
from featvis_func.models import Model
from featvis_func.objective import Objective
from featvis_func.rendering.compose import compose
from featvis_func.rendering.options import RenderOptions
from featvis_func.rendering.plan import plan
from featvis_func.rendering.resolve import resolve
from featvis_func.rendering.result import Result
from featvis_func.types import Image, Optimizer, Transform


def render(
    model: str | nn.Module | Model,
    objective: str | Objective,
    filters: Iterable[int] | int | None = None,
    *,
    steps: int = 48,
    size: int | tuple[int, ...] | None = None,
    seed: int = 0,
    transforms: str | Transform = "default",
    lr: float | None = None,
    image: str | Image | None = None,
    optimizer: str | Optimizer = "default",
    batch_size: int | str = "auto",
    tolerance: float | None = None,
    redirect: int | None = None,
    smooth_pools: bool | str = "auto",
    device: torch.device | str | None = None,
    precision: str = "auto",
    compile: bool | str = "auto",
    deterministic: bool = False,
    saliency: bool = False,
    snapshots: int = 0,
    bands: tuple[int, ...] | None = None,
    retain_memory: bool = False,
    features: Features | None = None,
    progress: bool | None = None,
    views: str | Transform | None = None,
) -> Result:
    """Render one image per filter that shows what the filter responds to; for a model of videos a video, for a model of
    signals a signal.

    A filter's image depends on the seed, the model, the layer, the filter and the options below, but not on which other
    filters are rendered, in which order or in which batches (up to the rounding of the backbone).

    Args:
        model: a module, a name (``"texturenet"``, ``"torchvision:NAME[@WEIGHTS]"``, ``"timm:NAME"``, ...) or a
            :class:`~featvis_func.Model`; see :func:`~featvis_func.load_model`. It is left exactly as it was.
        objective: the name of a layer, or the unique end of one, for the mean of each channel; also with its filters,
            as in ``"layer:97"``, ``"layer:10-20"`` and ``"layer:*"``. Or an :class:`~featvis_func.Objective`, also a
            family of objectives; or text for one, such as ``"directions:layer:dictionary.safetensors:0-9"``, see
            :mod:`featvis_func.rendering.spec`.
        filters: filter numbers, of a family the numbers of members; ``None`` means all (for an objective that names
            its own channels: one image; numbers then give variants).
        steps: number of gradient ascent steps, at least 1; more average over more random transforms: modern
            networks need 128.
        size: image size in pixels, one number for a square or height and width; frames, height and width of a video,
            length of a signal: ``N``, ``(h, w)``, ``(t, h, w)`` or ``(t,)``. For a video, ``N`` and ``(h, w)`` leave
            the number of frames to the model. Default: the model's input size. Images of another size are resized to
            it by the random transforms; of another aspect ratio they are stretched, with a warning. Where the input
            size of a module is not known, this is the input size as well.
        seed: seed of all randomness; another seed gives other images. In ``[0, 2**64)``.
        transforms: random transforms of the image before each step: default, small, published, lucid, maco, none; or a
            :class:`Transform` from the image to the model's input size, in ``[0, 1]``. Normalisation is added. For
            signals there are default and none. See :func:`~featvis_func.named_transform`.
        lr: learning rate. Default: that of the optimizer.
        image: parameterisation of the image: fourier, pixel, phase, laplacian_pyramid, cppn, alpha; or an
            :class:`Image`, see :mod:`featvis_func.image`. One with a channel more than the model takes has an opacity;
            named transforms show it over random backgrounds. For signals there are all but alpha. Default: fourier,
            or phase with the transforms maco.
        optimizer: optimizer: default, activation, published, adam, adamw, nadam, sgd; or an :class:`Optimizer`, see
            :mod:`featvis_func.rendering.optimizers`. With ``"activation"`` and the transforms ``"small"`` the
            activation rises soonest; the defaults show more of what the unit looks for.
        batch_size: largest number of filters that are rendered at the same time; the last batch is padded to the shape
            of the others. ``"auto"``: what measured fastest on a CPU (16; 8 compiled, and with inputs of more than
            256 x 256 pixels), or fills the memory of a CUDA device (64 with ``deterministic``). Where memory runs out,
            it is halved.
        tolerance: stop a filter whose best score rises by no more than this fraction in 8 steps; the next filter takes
            its place in the batch. ``None``: every filter takes all steps.
        redirect: number of first steps in which gradients are redirected past rectifiers that block them, see
            :mod:`featvis_func.backbone.redirected_relu`; only for a model that can be exported. Default: 16 with the
            optimizers default and activation where that is possible, else 0.
        smooth_pools: whether strided max pools pass gradients to all positive values of a window: auto, yes, no; also
            ``True`` and ``False``. The images are smoother than where only the largest value gets the gradient, see
            :mod:`featvis_func.backbone.smoothed_pools`. For pools over images without dilation and indices, in a model
            that can be exported. ``"auto"``: with the optimizer default.
        device: device to compute on, such as cuda. Default: for a model given by name cuda, if there is one; otherwise
            where the model is.
        precision: precision of the backbone: auto, float32, bfloat16. ``"auto"``: bfloat16 for a float32 model where
            the hardware has it.
        compile: whether the step is compiled: auto, yes, no, cudagraphs; also ``True`` and ``False``. ``"cudagraphs"``:
            on CUDA it is captured as a CUDA graph instead, without being compiled; elsewhere as yes. ``"auto"``:
            compiled where the run is long enough to win back the time that compiling takes, otherwise captured on CUDA
            and eager elsewhere; what fails is replaced by the eager step, with a warning.
        deterministic: bit-equal reruns on CUDA, where they are slower: images are sampled in another way, under
            ``torch.use_deterministic_algorithms(True)``, which names operations of the model that cannot be repeated.
            Holds for equal batch sizes. On a CPU reruns are always bit-equal.
        saliency: accumulate the magnitude of the score's gradient at each pixel over the steps, which shows where the
            objective depended on the image: :attr:`Result.saliency`.
        snapshots: number of images of each filter to keep over its run, at most ``steps + 1``, evenly spaced from the
            first to the last step: :attr:`Result.snapshots`.
        bands: channels that pictures show: one as grey, or three as red, green and blue, numbered from 0, as in
            ``(3, 2, 1)``. Pictures of images and videos only, in files, grids and galleries: the tensors keep all
            channels. Default: the first three (grey if there is one channel, side by side in grey if there are two).
            Multispectral channels are often in the order blue, green, red.
        retain_memory: keep the memory that a step on the CPU frees for the next step, by settings of the whole process,
            see :func:`~featvis_func.kept_memory`. Saves up to a fifth of a step; the command line and sweeps do so.
        features: those of the model, from :func:`~featvis_func.make_features`, so that a second call on a layer need
            not trace the model again. They hold the weights as they were, in their own precision.
        progress: whether to show a progress bar on the standard error. Default: if that is a terminal.
        views: another name of ``transforms``.

    Returns:
        A :class:`~featvis_func.Result`, on the CPU.

    Raises:
        ValueError: bad input, with what was given, what was expected and what exists.

    >>> result = render("texturenet", "head", [3, 5], steps=2, size=32)
    >>> result.images.shape, result.filters
    (torch.Size([2, 3, 32, 32]), (3, 5))
    """
    arguments = locals()
    others = ("model", "objective", "filters", "features", "progress")
    options = RenderOptions.of({k: v for k, v in arguments.items() if k not in others}, function="render")
    resolved = resolve(model, objective, filters, options, features)
    return plan(resolved, compose(resolved))(progress=progress)

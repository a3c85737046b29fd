"""Models of timm by name, from a folder, and from the Hugging Face hub in timm's format."""

import contextlib
from typing import Any

import torch

from featvis_func.models.base import Model, Request, digest, needed, place, same_random_weights
from featvis_func.validation import first_line, suggest


def from_timm(request: Request) -> Model:
    """``NAME[.TAG][@none]`` or ``FOLDER``; see :func:`~featvis_func.load_model`.

    Raises:
        ValueError: timm is missing, an unknown model or tag, or weights that cannot be fetched.
    """
    timm = needed("timm", "timm", request.spec)
    folder, name, wanted = place(request.rest)
    if wanted not in ("", "none"):
        raise ValueError(
            f"timm names weights by a tag behind a dot, as in 'timm:resnet50.a1_in1k', got '@{wanted}';"
            f" 'timm:{name}@none' has random ones"
        )
    random = request.own_weights or wanted == "none"
    if folder is not None:
        files = sorted(p for s in ("*.safetensors", "*.bin", "*.pth") for p in folder.glob(s))
        found = _created(timm, request, f"local-dir:{folder.resolve()}", random)
        return found._replace(weights="" if random else digest(files))
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {name!r}{suggest(architecture, timm.list_models())}")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(f"{architecture} has no weights {tag!r} in timm; it has {', '.join(tags) or 'none'}")
    return _created(timm, request, name, random)


def from_hub(request: Request) -> Model:
    """``ORG/NAME[@REVISION]``; see :func:`~featvis_func.load_model`.

    Raises:
        ValueError: timm is missing, or what the hub has cannot be fetched, or is no model of timm's.
    """
    timm = needed("timm", "timm", request.spec)
    name, _, revision = request.rest.partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"expected 'hf-hub:ORG/NAME[@REVISION]', got {request.spec!r}")
    if revision == "none":
        raise ValueError(f"what architecture {name} has only the hub knows; for random weights say 'timm:NAME@none'")
    return _created(timm, request, f"hf-hub:{request.rest}", request.own_weights)


def _created(timm: Any, request: Request, name: str, random: bool) -> Model:
    try:
        with same_random_weights():
            module = _built(timm, request, name, random)
    except Exception as error:  # the hub, the network, files: each fails in its own way
        raise ValueError(
            f"could not load {request.spec} ({first_line(error)});"
            f" give a file of weights or a folder ('timm:./folder'), or 'timm:NAME@none' for random ones"
        ) from error
    module.eval()
    config = timm.data.resolve_model_data_config(module)
    preset: Any = module.pretrained_cfg
    size = request.size or tuple(config["input_size"][-2:])
    named = "" if random else str(preset.get("hf_hub_id") or preset.get("url") or name)
    return Model(
        module,
        request.spec,
        tuple(config["mean"]),
        tuple(config["std"]),
        size,
        () if random else _categories(timm, module),
        f"{named}.{preset['tag']}" if named and preset.get("tag") and not named.endswith(preset["tag"]) else named,
    )


def _built(timm: Any, request: Request, name: str, random: bool) -> torch.nn.Module:
    if request.size is not None:
        # Models of a fixed size take it when they are built; others take images of any size, and no such argument.
        with contextlib.suppress(TypeError):
            return timm.create_model(name, pretrained=not random, img_size=request.size)
    return timm.create_model(name, pretrained=not random)


def _categories(timm: Any, module: torch.nn.Module) -> tuple[str, ...]:
    """The names of the classes, where the weights come with them or are ImageNet's."""
    preset: Any = module.pretrained_cfg
    count = getattr(module, "num_classes", 0)
    names = preset.get("label_names") or ()
    subset = None if names else timm.data.infer_imagenet_subset(module)
    if subset is not None:
        info = timm.data.ImageNetInfo(subset)
        names = [info.index_to_description(i) for i in range(info.num_classes())]
    return tuple(names) if len(names) == count else ()

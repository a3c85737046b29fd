"""Load timm models by name, from a folder, and from the Hugging Face hub."""

import contextlib
from typing import Any

import torch

from featvis_func.models.base import LoadRequest, Model, file_digest, import_optional, parse_source, seeded_init
from featvis_func.validation import first_line, suggest


def from_timm(request: LoadRequest) -> Model:
    """Load ``timm:NAME[.TAG][@none]`` or ``timm:FOLDER[@none]``; see :func:`~featvis_func.load_model`.

    Raises:
        ValueError: If timm is not installed, the model or the tag is unknown, or the download fails.
    """
    timm = import_optional("timm", "timm", request.spec)
    folder, name, revision = parse_source(request.source)
    if revision not in ("", "none"):
        raise ValueError(
            f"timm selects weights by a tag after a dot, as in 'timm:resnet50.a1_in1k', got '@{revision}';"
            f" use 'timm:{name}@none' for random weights"
        )
    random = request.skip_pretrained or revision == "none"
    if folder is not None:
        files = sorted(p for s in ("*.safetensors", "*.bin", "*.pth") for p in folder.glob(s))
        model = _load(timm, request, f"local-dir:{folder.resolve()}", random)
        return model._replace(weights="" if random else file_digest(files))
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model {name!r}{suggest(architecture, timm.list_models())}")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(f"{architecture} has no weights {tag!r} in timm; it has {', '.join(tags) or 'none'}")
    return _load(timm, request, name, random)


def from_hub(request: LoadRequest) -> Model:
    """Load ``hf-hub:ORG/NAME[@REVISION]``; see :func:`~featvis_func.load_model`.

    Raises:
        ValueError: If timm is not installed, the download fails, or the repository does not hold a timm model.
    """
    timm = import_optional("timm", "timm", request.spec)
    name, _, revision = request.source.partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"expected 'hf-hub:ORG/NAME[@REVISION]', got {request.spec!r}")
    if revision == "none":
        raise ValueError(
            f"the architecture of {name} is known only to the hub; use 'timm:NAME@none' for random weights"
        )
    return _load(timm, request, f"hf-hub:{request.source}", request.skip_pretrained)


def _load(timm: Any, request: LoadRequest, name: str, random: bool) -> Model:
    """Create a timm model and read its preset."""
    try:
        with seeded_init():
            module = _create_module(timm, request, name, random)
    except Exception as error:  # The hub, the network and files raise many types of exceptions.
        raise ValueError(
            f"could not load {request.spec} ({first_line(error)});"
            f" give a weights file or a folder ('timm:./folder'), or 'timm:NAME@none' for random weights"
        ) from error
    module.eval()
    config = timm.data.resolve_model_data_config(module)
    preset: Any = module.pretrained_cfg
    size = request.size or tuple(config["input_size"][-2:])
    weights = "" if random else str(preset.get("hf_hub_id") or preset.get("url") or name)
    if weights and preset.get("tag") and not weights.endswith(preset["tag"]):
        weights = f"{weights}.{preset['tag']}"
    return Model(
        module,
        request.spec,
        tuple(config["mean"]),
        tuple(config["std"]),
        size,
        () if random else _categories(timm, module),
        weights,
    )


def _create_module(timm: Any, request: LoadRequest, name: str, random: bool) -> torch.nn.Module:
    if request.size is not None:
        # Only architectures with a fixed input size take `img_size`; the others accept images of any size.
        with contextlib.suppress(TypeError):
            return timm.create_model(name, pretrained=not random, img_size=request.size)
    return timm.create_model(name, pretrained=not random)


def _categories(timm: Any, module: torch.nn.Module) -> tuple[str, ...]:
    """Return the class names if the preset holds them or the classes are a subset of ImageNet's, else ``()``."""
    preset: Any = module.pretrained_cfg
    count = getattr(module, "num_classes", 0)
    names = preset.get("label_names") or ()
    subset = None if names else timm.data.infer_imagenet_subset(module)
    if subset is not None:
        info = timm.data.ImageNetInfo(subset)
        names = [info.index_to_description(i) for i in range(info.num_classes())]
    return tuple(names) if len(names) == count else ()

"""The layouts of libraries of sparse autoencoders.

Each layout is written by hand, with the names and settings that the library writes, and compared with a formula. Where
a library is installed, a file that it wrote is compared with what it computes.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import featvis_func as fv
from featvis_func.io.dictionary import Dictionary, read_dictionary

N, D = 10, 6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def activations(seed: int = 9) -> Tensor:
    return random(32, D, seed=seed)


def weights(**more: Tensor) -> dict[str, Tensor]:
    """What SAELens, ViT-Prisma and saev share."""
    return {
        "W_enc": random(D, N, seed=1), "b_enc": random(N, seed=2), "W_dec": random(N, D, seed=3),
        "b_dec": random(D, seed=4), **more,
    }  # fmt: skip


def pre_activations(dictionary: Dictionary, x: Tensor) -> Tensor:
    assert dictionary.encoder is not None
    if dictionary.normalize == "layer_norm":
        x = (x - x.mean(-1, keepdim=True)) / ((x - x.mean(-1, keepdim=True)).std(-1, keepdim=True) + 1e-5)
    elif dictionary.normalize == "constant_norm_rescale":
        x = x / x.norm(dim=-1, keepdim=True) * x.shape[-1] ** 0.5
    x = x if dictionary.center is None else x - dictionary.center
    bias = 0 if dictionary.encoder_bias is None else dictionary.encoder_bias
    return x @ dictionary.encoder.T + bias


def codes(dictionary: Dictionary, x: Tensor) -> Tensor:
    """What the library's encoder returns."""
    pre = pre_activations(dictionary, x)
    if dictionary.activation == "relu":
        return pre.relu()
    if dictionary.activation == "jumprelu":
        assert dictionary.threshold is not None
        return pre.relu() * (pre > dictionary.threshold)
    assert dictionary.activation == "topk"
    assert dictionary.k is not None
    top = pre.topk(dictionary.k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


def assert_close(actual: Any, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.detach().float(), rtol=1e-5, atol=1e-5)


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


# SAELens


def write_saelens(folder: Path, state: dict[str, Tensor], **config: Any) -> Path:
    """A folder as ``save_model`` of SAELens 6.54.12 writes it."""
    folder.mkdir(exist_ok=True)
    settings = {
        "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "metadata": {"sae_lens_version": "6.54.12"},
        "architecture": "standard", **config,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(settings))
    safetensors.torch.save_file(state, folder / "sae_weights.safetensors")
    return folder


def test_saelens_standard(tmp_path: Path) -> None:
    state, x = weights(), activations()
    dictionary = read_dictionary(write_saelens(tmp_path, state), width=D)
    assert torch.equal(dictionary.directions, state["W_dec"])
    assert dictionary.encoder is not None
    assert torch.equal(dictionary.encoder, state["W_enc"].T)
    assert dictionary.encoder.is_contiguous()
    assert (dictionary.format, dictionary.source) == ("SAELens", f"{tmp_path}:W_dec")
    assert (dictionary.activation, dictionary.k, dictionary.threshold) == ("relu", None, None)
    assert_close(pre_activations(dictionary, x), (x - state["b_dec"]) @ state["W_enc"] + state["b_enc"])
    of_weights = read_dictionary(tmp_path / "sae_weights.safetensors")
    assert_close(of_weights.encoder, state["W_enc"].T)


def test_saelens_settings_before_version_6(tmp_path: Path) -> None:
    old = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    path = write_saelens(tmp_path, weights(), **old, normalize_activations=None)
    dictionary = read_dictionary(path)
    assert (dictionary.activation, dictionary.k) == ("topk", 3)
    write_saelens(tmp_path, weights(), activation_fn="tanh-relu")
    with refused("architecture 'standard' with activation 'tanh-relu' is not supported; expected standard, topk, jump"):
        read_dictionary(path)


def test_saelens_without_the_decoder_bias(tmp_path: Path) -> None:
    state, x = weights(), activations()
    dictionary = read_dictionary(write_saelens(tmp_path, state, apply_b_dec_to_input=False))
    assert dictionary.center is None
    assert_close(pre_activations(dictionary, x), x @ state["W_enc"] + state["b_enc"])


@pytest.mark.parametrize("log", [True, False])
def test_saelens_jumprelu(log: bool, tmp_path: Path) -> None:
    threshold = random(N, seed=5).abs()
    stored = {"log_threshold": threshold.log()} if log else {"threshold": threshold}
    dictionary = read_dictionary(write_saelens(tmp_path, weights(**stored), architecture="jumprelu"))
    assert dictionary.activation == "jumprelu"
    assert_close(dictionary.threshold, threshold)


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk"])
def test_saelens_topk(architecture: str, rescaled: bool, tmp_path: Path) -> None:
    state, x = weights(topk_threshold=torch.tensor(0.25, dtype=torch.float64)), activations()
    config = {"architecture": architecture, "k": 3, "rescale_acts_by_decoder_norm": rescaled}
    dictionary = read_dictionary(write_saelens(tmp_path, state, **config))
    norms = state["W_dec"].norm(dim=1) if rescaled else torch.ones(N)
    assert_close(dictionary.directions, state["W_dec"] / norms[:, None])
    assert_close(pre_activations(dictionary, x), ((x - state["b_dec"]) @ state["W_enc"] + state["b_enc"]) * norms)
    if architecture == "topk":
        assert (dictionary.activation, dictionary.k) == ("topk", 3)
    else:
        assert dictionary.activation == "jumprelu"
        assert_close(dictionary.threshold, torch.full((N,), 0.25))


def gated(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    x = x - state["b_dec"]
    gate = x @ state["W_enc"] + state["b_gate"] > 0
    return gate * (x @ (state["W_enc"] * state["r_mag"].exp()) + state["b_mag"]).relu()


def gated_weights() -> dict[str, Tensor]:
    return weights(r_mag=random(N, seed=6), b_mag=random(N, seed=7), b_gate=random(N, seed=8))


def test_a_gated_autoencoder_is_jumprelu_with_other_thresholds(tmp_path: Path) -> None:
    state, x = gated_weights(), activations()
    del state["b_enc"]
    dictionary = read_dictionary(write_saelens(tmp_path, state, architecture="gated"))
    expected = gated(x, state)
    assert 0.1 < (expected > 0).float().mean() < 0.6
    assert_close(codes(dictionary, x), expected)


def test_saelens_finetuning_scales_the_decoder(tmp_path: Path) -> None:
    state = weights(scaling_factor=random(N, seed=5).abs())
    path = write_saelens(tmp_path, state, finetuning_scaling_factor=True)
    assert_close(read_dictionary(path).directions, state["W_dec"] * state["scaling_factor"][:, None])
    write_saelens(tmp_path, state, finetuning_scaling_factor=False)
    with refused("there is a scaling_factor, but finetuning_scaling_factor is not set"):
        read_dictionary(path)
    write_saelens(tmp_path, weights(scaling_factor=torch.ones(N)))
    assert_close(read_dictionary(path).directions, state["W_dec"])


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_activations_are_normalised_first(normalize: str, tmp_path: Path) -> None:
    dictionary = read_dictionary(write_saelens(tmp_path, weights(), normalize_activations=normalize))
    assert dictionary.normalize == normalize
    assert dictionary.encoder is not None
    options: dict[str, Any] = {"center": dictionary.center, "normalize": normalize, "activation": "relu"}
    objective = fv.sae("a", dictionary.encoder, dictionary.encoder_bias, **options)
    x = activations()
    scores = [objective({"a": x}, torch.tensor(i)) for i in range(N)]
    assert_close(torch.stack(scores), codes(dictionary, x).mean(0))


@pytest.mark.parametrize("scaling", ["expected_average_only_in", True])
def test_an_encoder_that_sees_other_activations_is_left_out(scaling: Any, tmp_path: Path) -> None:
    path = write_saelens(tmp_path, weights(), normalize_activations=scaling)
    message = (
        f"dictionary '{path}': SAELens: the encoder is left out, because normalize_activations={scaling!r} changes"
    )
    with pytest.warns(UserWarning, match=re.escape(message)) as warned:
        dictionary = read_dictionary(path)
    assert warned[0].filename == __file__
    assert torch.equal(dictionary.directions, weights()["W_dec"])
    assert (dictionary.encoder, dictionary.encoder_bias, dictionary.center) == (None, None, None)
    assert (dictionary.activation, dictionary.format) == ("none", "SAELens")


def test_files_of_saelens_that_are_refused(tmp_path: Path) -> None:
    path = write_saelens(tmp_path / "a", weights(), architecture="transcoder")
    with refused(f"dictionary '{path}': architecture 'transcoder' with activation 'relu' is not supported"):
        read_dictionary(path)
    assert torch.equal(read_dictionary(path, "W_dec").directions, weights()["W_dec"])
    with refused("k must be a whole number of at least 1, got None"):
        read_dictionary(write_saelens(tmp_path / "b", weights(), architecture="topk"))
    with refused("there is no tensor 'threshold'; the file has W_dec, W_enc, b_dec, b_enc"):
        read_dictionary(write_saelens(tmp_path / "c", weights(), architecture="jumprelu"))
    with refused("the weights of SAELens must have W_enc and W_dec; the file has W_enc"):
        read_dictionary(write_saelens(tmp_path / "d", {"W_enc": random(D, N)}))
    with refused("topk_threshold is (10,), but must be one number"):
        read_dictionary(write_saelens(tmp_path / "e", weights(topk_threshold=random(N)), architecture="batchtopk"))
    (path / "cfg.json").write_text("[]")
    with refused("must be a JSON object, got a list"):
        read_dictionary(path)
    (path / "cfg.json").write_text("{")
    with refused("cfg.json' cannot be read: "):
        read_dictionary(path)


def test_transposed_matrices_are_refused(tmp_path: Path) -> None:
    turned = {**weights(), "W_dec": random(D, N), "W_enc": random(N, D)}
    with refused("W_dec is (6, 10), but must be (n, 6), with the members as rows"):
        read_dictionary(write_saelens(tmp_path / "a", turned))
    with refused("W_enc is (10, 6), but must be (6, 10)"):
        read_dictionary(write_saelens(tmp_path / "b", {**weights(), "W_enc": random(N, D)}))
    with refused(
        ":W_dec' is (10, 6), 10 directions of 6 numbers, but layer 'mlp' has 10 channels: expected (n, 10)"
    ) as e:
        read_dictionary(write_saelens(tmp_path / "c", weights()), width=10, layer="mlp")
    assert "its members are columns" not in str(e.value)  # The layout defines the orientation.


def test_square_matrices_are_read_as_the_layout_defines(tmp_path: Path) -> None:
    state = {"W_enc": random(D, D, seed=1), "b_enc": random(D), "W_dec": random(D, D, seed=3), "b_dec": random(D)}
    dictionary = read_dictionary(write_saelens(tmp_path, state, d_sae=D), width=D)
    assert_close(dictionary.directions, state["W_dec"])
    assert_close(dictionary.encoder, state["W_enc"].T)


def test_numbers_of_the_encoder_are_checked(tmp_path: Path) -> None:
    state = weights(b_enc=random(N).index_fill(0, torch.tensor([4]), torch.nan))
    with refused("has NaN or infinite numbers in 1 of 10 rows of encoder bias, the first of which is row 4"):
        read_dictionary(write_saelens(tmp_path, state))


def test_weights_without_settings_are_several_matrices(tmp_path: Path) -> None:
    safetensors.torch.save_file(weights(), tmp_path / "sae_weights.safetensors")
    with refused("which tensor holds the directions is not clear; name one with tensor=: W_dec (10, 6), W_enc (6, 10)"):
        read_dictionary(tmp_path)


# ViT-Prisma


@pytest.fixture
def as_library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type]:
    """Make a class that is pickled as one of a library, which need not be installed, for this test alone."""

    def make(path: str, base: type = object) -> type:
        *parts, name = path.split(".")
        made = type(name, (base,), {"__module__": ".".join(parts)})
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            if module not in sys.modules:
                monkeypatch.setitem(sys.modules, module, ModuleType(module))
        monkeypatch.setattr(sys.modules[made.__module__], name, made, raising=False)
        return made

    return make


def prisma_config(**config: Any) -> dict[str, Any]:
    """The settings of ViT-Prisma 2.0.0 that matter here."""
    return {
        "architecture": "standard", "d_in": D, "expansion_factor": 2, "activation_fn_str": "relu",
        "activation_fn_kwargs": {}, "normalize_activations": "none", "is_transcoder": False, "_device": "cpu",
        "_dtype": "float32", **config,
    }  # fmt: skip


@pytest.mark.parametrize("beside", [True, False])
def test_prisma(beside: bool, tmp_path: Path, as_library: Callable[..., type]) -> None:
    """The settings are an object in the checkpoint, or lie beside it."""
    state, x, path = weights(), activations(), tmp_path / "n_images_5.pt"
    if beside:
        (tmp_path / "config.json").write_text(json.dumps(prisma_config()))
        torch.save(state, path)
    else:
        config = as_library("vit_prisma.sae.config.VisionModelSAERunnerConfig")()
        vars(config).update(prisma_config())
        torch.save({"cfg": config, "state_dict": state}, path)
    torch.save(random(N), tmp_path / "n_images_5_log_feature_sparsity.pt")
    for given in (path, tmp_path):
        dictionary = read_dictionary(given, width=D)
        assert (dictionary.format, dictionary.source) == ("ViT-Prisma", f"{given}:W_dec")
        assert torch.equal(dictionary.directions, state["W_dec"])
        assert dictionary.activation == "relu"
        assert_close(pre_activations(dictionary, x), (x - state["b_dec"]) @ state["W_enc"] + state["b_enc"])


def test_prisma_topk_and_gated(tmp_path: Path) -> None:
    path, x = tmp_path / "sae.pt", activations()
    config = prisma_config(activation_fn_str="topk", activation_fn_kwargs={"k": 4})
    torch.save({"cfg": config, "state_dict": weights()}, path)
    dictionary = read_dictionary(path)
    assert (dictionary.activation, dictionary.k) == ("topk", 4)
    torch.save({"cfg": prisma_config(architecture="gated"), "state_dict": gated_weights()}, path)
    assert_close(codes(read_dictionary(path), x), gated(x, gated_weights()))


def test_files_of_prisma_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sae.pt"
    for config, message in (
        ({"is_transcoder": True}, "architecture 'transcoder' with activation 'relu' is not supported"),
        ({"architecture": "jumprelu"}, "architecture 'jumprelu' with activation 'relu' is not supported"),
        ({"activation_fn_str": "topk"}, "activation_fn_kwargs['k'] must be a whole number of at least 1, got None"),
    ):
        torch.save({"cfg": prisma_config(**config), "state_dict": weights()}, path)
        with refused(message):
            read_dictionary(path)


def test_prisma_normalises_by_default(tmp_path: Path) -> None:
    config = prisma_config()
    del config["normalize_activations"]
    torch.save({"cfg": config, "state_dict": weights()}, tmp_path / "sae.pt")
    assert read_dictionary(tmp_path / "sae.pt").normalize == "layer_norm"


# saev


def write_saev(path: Path, header: dict[str, Any], state: dict[str, Tensor]) -> Path:
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(state, file)
    return path


def saev_header(schema: int, activation: str, **params: Any) -> dict[str, Any]:
    config = {"d_model": D, "d_sae": N, "activation": {"cls": activation, "params": params}}
    return {"schema": schema, "cfg": config, "commit": "unknown", "lib": "0.1.0"}


def test_saev_before_schemas(tmp_path: Path) -> None:
    state, x = weights(), activations()
    header = {"d_vit": D, "exp_factor": 2, "sparsity_coeff": 4e-4, "ghost_grads": False, "seed": 0}
    dictionary = read_dictionary(write_saev(tmp_path / "sae.pt", header, state), width=D)
    assert (dictionary.format, dictionary.activation) == ("saev", "relu")
    assert torch.equal(dictionary.directions, state["W_dec"])
    assert_close(pre_activations(dictionary, x), (x - state["b_dec"]) @ state["W_enc"] + state["b_enc"])


@pytest.mark.parametrize("schema", [1, 2, 5])
@pytest.mark.parametrize("activation", ["Relu", "TopK", "BatchTopK"])
def test_saev(schema: int, activation: str, tmp_path: Path) -> None:
    state, x = weights(), activations()
    params = {} if activation == "Relu" else {"top_k": 3}
    if activation == "BatchTopK":
        state["activation.threshold"] = torch.tensor(0.25)
    dictionary = read_dictionary(write_saev(tmp_path / "sae.pt", saev_header(schema, activation, **params), state))
    assert dictionary.center is None
    assert_close(pre_activations(dictionary, x), x @ state["W_enc"] + state["b_enc"])
    assert dictionary.activation == {"Relu": "relu", "TopK": "topk", "BatchTopK": "jumprelu"}[activation]
    assert dictionary.k == (3 if activation == "TopK" else None)
    if activation == "BatchTopK":
        assert_close(dictionary.threshold, torch.full((N,), 0.25))


def test_saev_first_form_of_schema_1(tmp_path: Path) -> None:
    header = {"schema": 1, "cfg": {"d_vit": D, "exp_factor": 2, "top_k": 4}, "cls": "TopK", "commit": "", "lib": ""}
    dictionary = read_dictionary(write_saev(tmp_path / "sae.pt", header, weights()))
    assert (dictionary.activation, dictionary.k) == ("topk", 4)


def test_files_of_saev_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sae.pt"
    with refused("activation 'Gelu' is not supported; expected Relu, TopK or BatchTopK"):
        read_dictionary(write_saev(path, saev_header(5, "Gelu"), weights()))
    with refused("there is no tensor 'activation.threshold'"):
        read_dictionary(write_saev(path, saev_header(5, "BatchTopK"), weights()))
    with refused("the first line has no settings 'cfg'"):
        read_dictionary(write_saev(path, {"schema": 5}, weights()))
    with refused("W_enc is (10, 6), but must be (6, 10)"):
        read_dictionary(write_saev(path, saev_header(5, "Relu"), {**weights(), "W_enc": random(N, D)}))


# Overcomplete


def overcomplete_state(**more: Tensor) -> dict[str, Tensor]:
    """The state dict of an ``SAE`` of Overcomplete 0.3.0."""
    return {
        "encoder.final_block.0.weight": random(N, D, seed=1),
        "encoder.final_block.0.bias": random(N, seed=2),
        "dictionary._weights": nn.functional.normalize(random(N, D, seed=3)),
        "dictionary.multiplier": torch.tensor(0.5),
        **more,
    }


def test_overcomplete_state_dict(tmp_path: Path) -> None:
    state, x, path = overcomplete_state(), activations(), tmp_path / "sae.pth"
    torch.save({"model": state, "epoch": 3}, path)
    dictionary = read_dictionary(path, width=D)
    assert (dictionary.format, dictionary.source) == ("Overcomplete", f"{path}:dictionary._weights")
    assert_close(dictionary.directions, state["dictionary._weights"] * torch.tensor(0.5).exp())
    expected = x @ state["encoder.final_block.0.weight"].T + state["encoder.final_block.0.bias"]
    assert_close(pre_activations(dictionary, x), expected)
    assert (dictionary.activation, dictionary.center) == ("relu", None)


def test_overcomplete_jumprelu_stores_logarithms(tmp_path: Path) -> None:
    thresholds = random(N, seed=5)
    torch.save(overcomplete_state(thresholds=thresholds), tmp_path / "sae.pth")
    dictionary = read_dictionary(tmp_path / "sae.pth")
    assert dictionary.activation == "jumprelu"
    assert_close(dictionary.threshold, thresholds.exp())


def test_overcomplete_normalisation_is_not_in_a_state_dict(tmp_path: Path) -> None:
    rows = random(N, D, seed=3)
    torch.save(overcomplete_state(**{"dictionary._weights": rows}), tmp_path / "sae.pth")
    with pytest.warns(UserWarning, match="Overcomplete: the directions are scaled to unit length, the default of the"):
        dictionary = read_dictionary(tmp_path / "sae.pth")
    assert_close(dictionary.directions, nn.functional.normalize(rows) * torch.tensor(0.5).exp())


def test_overcomplete_encoders_that_are_left_out(tmp_path: Path) -> None:
    for more, message in (
        ({"encoder.final_block.1.weight": random(N)}, "because it is more than one linear layer"),
        ({"encoder.mlp_blocks.0.0.weight": random(D, D)}, "because it is more than one linear layer"),
        ({"Q": random(4)}, "because its activations are quantised"),
    ):
        torch.save(overcomplete_state(**more), tmp_path / "sae.pth")
        with pytest.warns(UserWarning, match=message):
            assert read_dictionary(tmp_path / "sae.pth").encoder is None


def test_overcomplete_tied_encoder(tmp_path: Path) -> None:
    state = overcomplete_state()
    del state["encoder.final_block.0.weight"], state["encoder.final_block.0.bias"]
    state |= {"encoder.tied_to._weights": state["dictionary._weights"], "encoder.bias": random(N, seed=2)}
    torch.save(state, tmp_path / "sae.pth")
    dictionary = read_dictionary(tmp_path / "sae.pth")
    assert_close(dictionary.encoder, dictionary.directions)
    assert_close(dictionary.encoder_bias, random(N, seed=2))


@pytest.fixture
def saved_module(tmp_path: Path, as_library: Callable[..., type]) -> Callable[..., Path]:
    """Save a whole module of Overcomplete, as its own tests do."""

    def save(kind: str, normalisation: str = "normalize_l2", last: nn.Module | None = None, **attributes: Any) -> Path:
        model = as_library(f"overcomplete.sae.made_here.{kind}", nn.Module)()
        model.encoder = as_library("overcomplete.sae.made_here.MLPEncoder", nn.Module)()
        model.encoder.final_block = nn.Sequential(nn.Linear(D, N), nn.Identity())
        model.encoder.final_block[0].weight.data = random(N, D, seed=1)
        model.encoder.final_activation = last or nn.ReLU()
        model.dictionary = as_library("overcomplete.sae.made_here.DictionaryLayer", nn.Module)()
        model.dictionary._weights = nn.Parameter(random(N, D, seed=3))
        model.dictionary.normalization = as_library(f"overcomplete.sae.made_here.{normalisation}")
        vars(model).update(attributes)
        torch.save(model, tmp_path / "sae.pth")
        return tmp_path / "sae.pth"

    return save


def test_overcomplete_module(saved_module: Callable[..., Path]) -> None:
    dictionary = read_dictionary(saved_module("TopKSAE", top_k=3), width=D)
    assert (dictionary.format, dictionary.activation, dictionary.k) == ("Overcomplete", "topk", 3)
    assert_close(dictionary.directions, nn.functional.normalize(random(N, D, seed=3)))
    assert_close(dictionary.encoder, random(N, D, seed=1))
    dictionary = read_dictionary(saved_module("SAE", "normalize_max_l2"))
    rows = random(N, D, seed=3)
    assert_close(dictionary.directions, rows / rows.norm(dim=1).amax())
    threshold = read_dictionary(saved_module("BatchTopKSAE", running_threshold=torch.tensor(0.25))).threshold
    assert_close(threshold, torch.full((N,), 0.25))
    assert threshold is not None
    assert bool((threshold < 0.25).all())  # What equals the threshold is kept.


def test_overcomplete_modules_that_are_not_read_whole(saved_module: Callable[..., Path]) -> None:
    with pytest.warns(UserWarning, match="the encoder is left out, because its activation is GELU, not ReLU"):
        assert read_dictionary(saved_module("SAE", last=nn.GELU())).encoder is None
    assert read_dictionary(saved_module("MpSAE")).encoder is None
    with refused("the BatchTopKSAE has no running threshold, because it was never trained"):
        read_dictionary(saved_module("BatchTopKSAE", running_threshold=None))
    with refused("the normalisation 'normalize_l3' of the dictionary is not known"):
        read_dictionary(saved_module("SAE", "normalize_l3"))


def test_overcomplete_archetypal_dictionary(tmp_path: Path) -> None:
    mix = random(N, 20, seed=5).softmax(1)
    state = {"C": random(20, D, seed=6), "W": mix, "Relax": random(N, D, seed=7) / 9, "multiplier": torch.tensor(0.1)}
    torch.save(state, tmp_path / "layer.pth")
    dictionary = read_dictionary(tmp_path / "layer.pth")
    assert dictionary.format == "Overcomplete"
    assert_close(dictionary.directions, (mix @ state["C"] + state["Relax"]) * torch.tensor(0.1).exp())


def test_overcomplete_convex_nmf(tmp_path: Path) -> None:
    torch.save({"W": random(N, 40), "D": random(N, D)}, tmp_path / "nmf.pth")
    dictionary = read_dictionary(tmp_path / "nmf.pth", width=D)
    assert (dictionary.format, dictionary.encoder) == ("Overcomplete", None)
    assert torch.equal(dictionary.directions, random(N, D))


# The libraries themselves


def library(name: str) -> Any:
    """Import a module of a library, or skip the test; the libraries are no dependencies of the tests."""
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", ["Standard", "TopK", "JumpReLU", "Gated"])
def test_with_saelens(kind: str, normalised: bool, tmp_path: Path) -> None:
    sae_lens = library("sae_lens")
    options = {"k": 3, "rescale_acts_by_decoder_norm": True} if kind == "TopK" else {}
    config = getattr(sae_lens, f"{kind}SAEConfig")(
        d_in=D, d_sae=N, normalize_activations="layer_norm" if normalised else "none", **options
    )
    sae = getattr(sae_lens, f"{kind}SAE")(config)
    for seed, (name, value) in enumerate(sae.named_parameters()):
        value.data = random(*value.shape, seed=seed) / (4 if name == "threshold" else 1)
    sae.save_model(tmp_path)
    dictionary = read_dictionary(tmp_path, width=D)
    assert dictionary.format == "SAELens"
    assert_close(nn.functional.normalize(dictionary.directions), nn.functional.normalize(sae.W_dec))
    x = activations()
    expected = sae.encode(x)
    assert_close(codes(dictionary, x).relu(), expected)
    assert dictionary.activation == {"Standard": "relu", "TopK": "topk"}.get(kind, "jumprelu")
    if not normalised:
        assert_close(codes(dictionary, x).relu() @ dictionary.directions + sae.b_dec, sae.decode(expected))
    if kind != "Gated":
        pre: list[Tensor] = []
        sae.hook_sae_acts_pre.register_forward_hook(lambda *arguments: pre.append(arguments[-1]))
        sae.encode(x)
        scale = sae.W_dec.norm(dim=1) if kind == "TopK" else 1
        assert_close(pre_activations(dictionary, x), pre[0] * scale)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_with_saelens_while_training(kind: str, tmp_path: Path) -> None:
    """A checkpoint of the training class equals what the library saves for inference."""
    sae_lens = library("sae_lens")
    options = {"matryoshka_widths": [4, N]} if kind.startswith("Matryoshka") else {}
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=N, k=3, **options)
    sae = getattr(sae_lens, f"{kind}TrainingSAE")(config)
    for seed, value in enumerate(sae.parameters()):
        value.data = random(*value.shape, seed=seed)
    sae.topk_threshold.fill_(0.25)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    training, inference = read_dictionary(tmp_path / "training"), read_dictionary(tmp_path / "inference")
    for name in ("directions", "encoder", "encoder_bias", "center", "threshold"):
        assert_close(getattr(training, name), getattr(inference, name))
    assert training.activation == inference.activation == "jumprelu"
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    assert_close(codes(training, activations()), loaded.encode(activations()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE", "RATopKSAE", "RAJumpSAE", "tied"])
def test_with_overcomplete(kind: str, whole: bool, tmp_path: Path) -> None:
    sae = library("overcomplete.sae")
    options: dict[str, Any] = {"top_k": 3} if "TopK" in kind else {}
    if kind.startswith("RA"):
        options |= {"points": random(20, D), "delta": 0.5}
    else:
        options |= {"dictionary_params": {"use_multiplier": True}}
    model = sae.SAE(D, N).tied(bias=True) if kind == "tied" else getattr(sae, kind)(D, N, **options)
    for seed, (name, value) in enumerate(model.named_parameters()):
        value.data = random(*value.shape, seed=seed) / 4
        if name == "dictionary.W":
            value.data = value.data.softmax(-1)
    x = activations()
    model(x)  # The running threshold, and the rows' lengths as the library leaves them.
    model.eval()
    path = tmp_path / "sae.pth"
    torch.save(model if whole else model.state_dict(), path)
    dictionary = read_dictionary(path, width=D)
    pre, expected, _ = model(x)
    assert dictionary.format == "Overcomplete"
    assert_close(dictionary.directions, model.get_dictionary())
    assert_close(pre_activations(dictionary, x), pre)
    if whole or "TopK" not in kind:
        assert_close(codes(dictionary, x).relu(), expected)
    assert (dictionary.activation == "relu") is (kind in ("SAE", "tied") or ("TopK" in kind and not whole))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("normalisation", ["l2", "max_l2", "l1", "max_l1", "identity"])
def test_with_dictionary_layers_of_overcomplete(normalisation: str, tmp_path: Path) -> None:
    layer = library("overcomplete.sae").DictionaryLayer(D, N, normalization=normalisation).eval()
    torch.save(layer, tmp_path / "layer.pth")
    dictionary = read_dictionary(tmp_path / "layer.pth", width=D)
    assert_close(dictionary.directions, layer.get_dictionary())
    assert dictionary.encoder is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["NMF", "SemiNMF", "ConvexNMF"])
def test_with_factorisations_of_overcomplete(kind: str, whole: bool, tmp_path: Path) -> None:
    model = getattr(library("overcomplete.optimization"), kind)(nb_concepts=4)
    model.fit(random(30, D).abs(), max_iter=3)
    torch.save(model if whole else model.state_dict(), tmp_path / "nmf.pth")
    dictionary = read_dictionary(tmp_path / "nmf.pth", width=D)
    assert_close(dictionary.directions, model.get_dictionary())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["QSAE", "MpSAE", "mlp_ln_1", "mlp_bn_3"])
def test_with_encoders_of_overcomplete_that_are_not_linear(kind: str, tmp_path: Path) -> None:
    sae = library("overcomplete.sae")
    model = sae.SAE(D, N, encoder_module=kind) if kind.startswith("mlp") else getattr(sae, kind)(D, N)
    torch.save(model.eval(), tmp_path / "sae.pth")
    dictionary = read_dictionary(tmp_path / "sae.pth", width=D)
    assert_close(dictionary.directions, model.get_dictionary())
    assert (dictionary.encoder, dictionary.activation) == (None, "none")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["relu", "topk", "gated", "layer_norm"])
def test_with_prisma(kind: str, tmp_path: Path) -> None:
    prisma = library("vit_prisma.sae.sae")
    config = library("vit_prisma.sae.config").VisionModelSAERunnerConfig(
        d_in=D,
        expansion_factor=2,
        _device="cpu",
        architecture="gated" if kind == "gated" else "standard",
        activation_fn_str="topk" if kind == "topk" else "relu",
        activation_fn_kwargs={"k": 3} if kind == "topk" else {},
        normalize_activations="layer_norm" if kind == "layer_norm" else "none",
    )
    sae = (prisma.GatedSparseAutoencoder if kind == "gated" else prisma.StandardSparseAutoencoder)(config)
    for seed, value in enumerate(sae.parameters()):
        value.data = random(*value.shape, seed=seed)
    sae.save_model(str(tmp_path / "n_images_5.pt"))
    dictionary = read_dictionary(tmp_path / "n_images_5.pt", width=D)
    assert dictionary.format == "ViT-Prisma"
    assert_close(dictionary.directions, sae.W_dec)
    x = activations()
    assert_close(codes(dictionary, x).relu(), sae.encode(x)[1])
    if kind != "gated":
        assert_close(pre_activations(dictionary, x), sae.encode(x, return_hidden_pre=True)[2])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_with_saev_0_1_0(tmp_path: Path) -> None:
    nets, config = library("saev.nn"), library("saev.config")
    if not hasattr(nets, "safe_mse") or not hasattr(config, "SparseAutoencoder"):
        pytest.skip("this saev writes schemas")
    sae = nets.SparseAutoencoder(config.SparseAutoencoder(d_vit=D, exp_factor=2))
    for seed, value in enumerate(sae.parameters()):
        value.data = random(*value.shape, seed=seed)
    nets.dump(str(tmp_path / "sae.pt"), sae)
    dictionary = read_dictionary(tmp_path / "sae.pt", width=D)
    assert dictionary.format == "saev"
    assert_close(dictionary.directions, sae.W_dec)
    assert_close(codes(dictionary, activations()), sae(activations())[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Relu", "TopK", "BatchTopK"])
def test_with_saev_of_schema_5(kind: str, tmp_path: Path) -> None:
    nets = library("saev.nn.modeling")
    activation = getattr(nets, kind)(**({} if kind == "Relu" else {"top_k": 3}))
    sae = nets.SparseAutoencoder(nets.SparseAutoencoderConfig(d_model=D, d_sae=N, activation=activation)).eval()
    for seed, value in enumerate(sae.parameters()):
        value.data = random(*value.shape, seed=seed)
    if kind == "BatchTopK":
        sae.activation.threshold.fill_(0.25)
    nets.dump(tmp_path / "sae.pt", sae)
    dictionary = read_dictionary(tmp_path / "sae.pt", width=D)
    output = sae.encode(activations())
    assert_close(dictionary.directions, sae.W_dec)
    assert_close(pre_activations(dictionary, activations()), output.h_x)
    assert_close(codes(dictionary, activations()), output.f_x)

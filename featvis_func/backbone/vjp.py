"""Run a forward pass in ordinary autograd, behind a boundary that ``torch.func`` can differentiate.

``torch.func`` refuses much of what trains: custom functions without ``setup_context``, operators of C++ extensions,
reentrant checkpointing. Here the forward pass and its vector-Jacobian product both run outside of ``torch.func``, as
they would in a training loop.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from featvis_func.types import Weights

Run = Callable[[Weights, Tensor], dict[str, Tensor]]


def differentiable(run: Run, *, accumulate: bool = False) -> Run:
    """Wrap a function so that ``torch.func.grad``, ``vjp`` and ``vmap`` can differentiate it, once, to the images.

    Args:
        run: (weights, images ``(n, ...)``) -> tensors by name.
        accumulate: whether the gradient is computed by ``torch.autograd.backward``, which reentrant checkpointing
            needs. It also adds to the ``grad`` of parameters that require a gradient.

    Returns:
        The same function, which runs in one thread at a time. Its gradient with respect to the weights, and its second
        derivative, raise RuntimeError.

    >>> f = differentiable(lambda weights, images: {"square": images**2})
    >>> torch.func.grad(lambda x: f({}, x)["square"].sum())(torch.ones(2))
    tensor([2., 2.])
    """

    lock = threading.RLock()  # hooks in one forward pass must not see another thread's

    def apply(weights: Weights, images: Tensor) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            with lock:
                return run(weights, images)
        call = _Call(run, tuple(weights), accumulate, lock)
        outputs = _Forward.apply(call, images, *weights.values())
        return dict(zip(call.names, outputs, strict=True))  # type: ignore[arg-type]

    return apply


class _Call:
    """One forward pass: what its backward pass needs."""

    def __init__(self, run: Run, weights: tuple[str, ...], accumulate: bool, lock: Any) -> None:
        self.run = run
        self.lock = lock
        self.weights = weights
        self.accumulate = accumulate
        self.names: tuple[str, ...] = ()
        self.images = torch.empty(0)
        self.outputs: tuple[Tensor, ...] = ()
        self.mapped = False
        """Whether ``vmap`` has merged its axis with that of the images."""


class _Forward(Function):
    @staticmethod
    def forward(call: _Call, images: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        with torch.enable_grad(), call.lock:
            call.images = images.detach().requires_grad_()
            outputs = call.run(dict(zip(call.weights, weights, strict=True)), call.images)
        call.names, call.outputs = tuple(outputs), tuple(outputs.values())
        return tuple(output.detach() for output in call.outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if any(ctx.needs_input_grad[2:]):
            raise RuntimeError(
                "a model that runs with a forward hook is differentiable with respect to the images only"
            )
        ctx.call = inputs[0]
        ctx.count = len(inputs)
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, _Backward.apply(ctx.call, *ctx.saved_tensors, *grads), *(None,) * (ctx.count - 2)  # type: ignore[return-value]

    @staticmethod
    def vmap(  # type: ignore[override]
        info: Any, in_dims: tuple[Any, ...], call: _Call, images: Tensor, *weights: Tensor
    ) -> Any:
        if any(dim is not None for dim in in_dims[2:]):
            raise RuntimeError("the weights of a model that runs with a forward hook cannot be mapped over")
        call.mapped = True
        outputs = _Forward.apply(call, images.movedim(in_dims[1], 0).flatten(0, 1), *weights)
        return tuple(o.unflatten(0, (info.batch_size, -1)) for o in outputs), (0,) * len(outputs)  # type: ignore


class _Backward(Function):
    """The vector-Jacobian product. It takes the images so that ``torch.func`` sees that it depends on them."""

    @staticmethod
    def forward(call: _Call, images: Tensor, *grads: Tensor) -> Tensor:  # type: ignore[override]
        pairs = [(o, g) for o, g in zip(call.outputs, grads, strict=True) if o.requires_grad]
        if not pairs:
            return torch.zeros_like(call.images)
        outputs, given = zip(*pairs, strict=True)
        with call.lock:
            if call.accumulate:
                call.images.grad = None
                _in_new_thread(lambda: torch.autograd.backward(outputs, given, retain_graph=True))
                gradient = call.images.grad
            else:
                (gradient,) = torch.autograd.grad(outputs, call.images, given, retain_graph=True, allow_unused=True)
        return torch.zeros_like(call.images) if gradient is None else gradient.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("a model that runs with a forward hook can be differentiated once only")

    @staticmethod
    def vmap(  # type: ignore[override]
        info: Any, in_dims: tuple[Any, ...], call: _Call, images: Tensor, *grads: Tensor
    ) -> Any:
        size = info.batch_size
        mapped = [
            g.movedim(dim, 0) if dim is not None else g.expand(size, *g.shape)
            for g, dim in zip(grads, in_dims[2:], strict=True)
        ]
        if call.mapped:
            # The images themselves are read from the call.
            merged = images.movedim(in_dims[1], 0).flatten(0, 1) if in_dims[1] is not None else images
            return _Backward.apply(call, merged, *(g.flatten(0, 1) for g in mapped)).unflatten(0, (size, -1)), 0  # type: ignore
        return torch.stack([_Backward.apply(call, images, *(g[i] for g in mapped)) for i in range(size)]), 0  # type: ignore


def _in_new_thread(function: Callable[[], object]) -> None:
    """Run a function outside of the backward pass that this thread may be in.

    Reentrant checkpointing refuses to run inside a backward pass with respect to given inputs, as that of
    ``torch.func`` is.
    """
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    errors: list[BaseException] = []

    def target() -> None:
        try:
            with torch.cuda.stream(stream):  # does nothing for None
                function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]

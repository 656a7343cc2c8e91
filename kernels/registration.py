"""How a launcher becomes an operation of PyTorch: compiled, traced, captured and differentiated.

    @operation("norm(Tensor x, Tensor gain, float eps, bool centred) -> (Tensor, Tensor)", outputs)
    def norm_op(x, gain, eps, centred, n, stats): ...                     # fills n and stats

This is torch.library's define, impl and register_fake, for about a third of what custom_op costs a call. `outputs`
takes the same inputs and makes the results, unwritten; the body takes both and fills them: shapes stand in one place,
and the fake is `outputs` alone (but under kernels/launching.py's recording, where the launches are what is wanted).
Operations know nothing of autograd. That is a torch.autograd.Function around them:

    @differentiable
    class Norm(torch.autograd.Function):        # forward(*inputs), setup_context(ctx, inputs, outputs), backward

becomes a function of the inputs. PyTorch binds the arguments of a Function with a setup_context by inspecting its
signature, 14 us a call; functorch (torch.func) takes no other. So calls go to a twin whose forward keeps its own
context, and to the class as written only inside of a functorch transform.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from . import checks, launching

LIBRARY = torch.library.Library("igpt", "FRAGMENT")


def operation(schema: str, outputs: Callable) -> Callable[[Callable], torch._ops.OpOverload]:
    """Register the decorated body as igpt::<schema>; what it becomes is the operation. One output comes alone; an
    operation that only writes to its arguments has None."""
    name = schema.partition("(")[0]

    def register(body: Callable) -> torch._ops.OpOverload:
        def run(*inputs):
            made = outputs(*inputs)
            body(*inputs, *(made if isinstance(made, tuple) else () if made is None else (made,)))
            return made

        def fake(*inputs):
            return run(*inputs) if launching.is_recording() else outputs(*inputs)

        LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"igpt::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.igpt, name).default

    return register


def differentiable(function: type[torch.autograd.Function]) -> Callable:
    """A function that applies this autograd function. A second derivative raises: its operations have none."""
    backward = function.backward
    refusing = function.backward = once_differentiable(backward)

    def forward(ctx, *inputs):
        outputs = function.forward(*inputs)
        function.setup_context(ctx, inputs, outputs)
        return outputs

    def first_backward(ctx, *gradients):
        return (refusing if torch.is_grad_enabled() else backward)(ctx, *gradients)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(first_backward)}
    quick = type(function.__name__, (torch.autograd.Function,), methods)  # the name that profiles and grad_fn show

    def apply(*inputs):
        chosen = function if checks.is_transformed() else quick
        if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(kind := inputs[0].device.type):
            # A product of the vendor's would come in another dtype than its operands', which backward multiplies it by.
            with torch.autocast(kind, enabled=False):
                return chosen.apply(*inputs)
        return chosen.apply(*inputs)

    apply.__doc__ = function.__doc__
    return apply

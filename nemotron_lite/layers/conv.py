"""The causal convolution as a module: taps under their published names, and the operation.

A mixer calls it in three ways, and hooks on it run in all of them:

    b t c                 a sequence, after the inputs that `state` holds
    b t c, draft          the same, and the inputs that a draft's `accept` needs come back
    b c                   one token per row
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron_lite import ops
from nemotron_lite.dtypes import cast
from nemotron_lite.layers.context import ForwardContext


class CausalConv1d(nn.Conv1d):
    """`ops.causal_conv1d` with one learned filter of k taps per channel."""

    def __init__(self, channels: int, taps: int, bias: bool) -> None:
        super().__init__(channels, channels, taps, groups=channels, bias=bias)

    def forward(  # type: ignore[override]  # it is called with a state too
        self,
        input: Float[Tensor, "b *t c"],
        state: Float[Tensor, "b km1 c"] | None = None,
        context: ForwardContext = ForwardContext(),
    ) -> tuple[Float[Tensor, "b *t c"], Float[Tensor, "b _ c"]]:
        """Convolve, then SiLU.

        Args:
            input: tokens of a sequence or a draft, or without a time axis one token per row.
            state: the k-1 inputs before; zeros when None. A step and a draft need it.

        Returns:
            The outputs, and the last k-1 real inputs of each row; of a draft all inputs, those of
            `state` in front.
        """
        taps = self.weight.squeeze(1)
        if input.ndim == 2:
            assert state is not None
            return ops.causal_conv1d_step(state, input, taps, self.bias)
        if context.draft:
            assert state is not None
            window = torch.cat([state, input], dim=1)  # the wider dtype of both
            return cast(ops.causal_conv1d_window(window, taps, self.bias), input.dtype), window
        return ops.causal_conv1d(
            input,
            taps,
            self.bias,
            initial_state=state,
            seq_idx=context.seq_idx,
            lengths=context.lengths,
        )

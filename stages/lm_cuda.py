"""One stream on a GPU: CUDA graphs, sampling on the device, one step ahead of the host.

While the host looks at a token, the device already runs it and chooses the next one, as if the
host were going to ask for just that; nearly always it does. Otherwise nothing is lost but that
step: what it wrote to the cache lies beyond the stream's end, and a draw depends on nothing but
seed and position.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stages.llama_weights import LlamaConfig, Weights
from stages.lm_runner import PREFILL_ROWS, Runner
from stages.lm_sampling import Sampling
from stages.lm_static import LAST_CHOSEN, Row, StaticNetwork


def static_network(
    config: LlamaConfig, weights: Weights, capacity: int, slots: int, rows: int
) -> StaticNetwork:
    """The fastest network for where the weights are."""
    if weights.embedding.device.type == "cuda":
        from stages.lm_triton import TritonNetwork, usable

        if usable(weights.embedding.device):
            return TritonNetwork(config, weights, capacity, slots, rows)
    return StaticNetwork(config, weights, capacity, slots, rows)


class CudaEngine:
    """An :class:`stages.lm.Engine` over a network of one slot."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        capacity: int,
        network: StaticNetwork | None = None,
    ) -> None:
        self._given = config, weights, capacity
        network = network or static_network(config, weights, capacity, 1, PREFILL_ROWS[-1])
        self.runner = Runner(network, batches=[1])
        self._capacity = capacity
        self._ahead: Sampling | None = None  # how a token was chosen from the logits held
        self.held = -1

    def feed(self, ids: Sequence[int], start: int) -> None:
        """Run ``ids`` after the first ``start`` tokens. Does not wait for the device."""
        self._ahead, self.held = None, start + len(ids)
        if len(ids) == 1:
            self.runner.step([Row(ids[0], 0, start)])  # what it chooses is not looked at
        else:
            self.runner.prefill(0, ids, start)

    def logits(self) -> Tensor:
        """The logits held, float32 ``[vocab_size]`` on the device."""
        if self.held < 0:
            raise RuntimeError("no logits are held: feed the last token first")
        return self.runner.logits(0)

    def decode(
        self, ids: Sequence[int], start: int, sampling: Sampling, mask: Tensor | None
    ) -> int:
        """:meth:`feed` ``ids``, if there are any; the token chosen from the logits held, which runs
        on the device from now on."""
        is_new = self.runner.allow(0, mask)
        if len(ids) == 1:
            self.held = start + 1
            self.runner.step([self._row(ids[0], sampling)])
        else:
            if ids:
                self.feed(ids, start)
            if is_new or self._ahead != sampling:
                self.runner.choose([self._row(LAST_CHOSEN, sampling)])
        token = self.runner.collect(1)[0]
        self._run_ahead(sampling)
        return token

    def forget(self) -> None:
        """Hold no logits any more."""
        self._ahead, self.held = None, -1

    def another(self) -> CudaEngine:
        """An engine over the same weights, with its own cache and graphs."""
        return CudaEngine(*self._given)

    def close(self) -> None:
        """Nothing to give back."""

    def _run_ahead(self, sampling: Sampling) -> None:
        """Run the token just chosen, and choose the next one in the same way."""
        self._ahead = None
        if self.held < self._capacity:
            self.held += 1
            self.runner.step([self._row(LAST_CHOSEN, sampling)])
            self._ahead = sampling

    def _row(self, token: int, sampling: Sampling) -> Row:
        """``token``, the last one of those held."""
        return Row(token, 0, self.held - 1, sampling, sampling.draw(self.held))

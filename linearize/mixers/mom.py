"""Mixture of memories: every token writes to a few of several states, and to a shared one.

    r_t = softmax(W k_t) over M memories, of which the largest `top` count, g_t = those, made to sum to one
    S^m_t = update of the inner mixer where m is among them, else S^m_{t-1};  S^0_t takes every token
    o_t = read(S^0_t) + sum_m g_m(q_t) read(S^m_t)

Source: MoM, arXiv 2502.13685, equations 5 to 9, around any other mixer. W is a parameter over all keys of the
layer's linear heads and starts as random orthonormal rows; queries, averaged over their group, are routed by the same
W, because a query reads tokens that are not its own.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.mixer import Mixer, Scan, Site
from linearize.mixers.registry import build_mixer


class MixtureOfMemories(Mixer):
    """S^m_t = update of the inner mixer if token t is routed to memory m, else S^m_{t-1}

    The state is [1 + M, *inner state]: a shared memory, which every token writes to, and M routed ones.

    Args:
        inner: name of the mixer of each memory, with its default options.
        memories: M, the routed memories.
        top: routed memories that a token writes to.
    """

    # one router reads the keys of all heads
    independent_heads = False

    def __init__(self, site: Site, inner: str = "mamba2", memories: int = 4, top: int = 2):
        super().__init__(site)
        self.inner = build_mixer(inner, site, {})
        self.memories, self.top = memories, top
        self.rotary, self.normalization = self.inner.rotary, self.inner.normalization
        self.log_unit = self.inner.log_unit
        self.router = nn.Parameter(torch.empty(memories, len(site.heads) * site.head_dim))

    def reset_parameters(self) -> None:
        self.inner.reset_parameters()
        generator = torch.Generator(device="cpu").manual_seed(self.site.layer)
        rows = torch.randn(self.router.shape[1], self.memories, generator=generator, device="cpu")
        self.router.copy_(torch.linalg.qr(rows).Q.T)

    def state_shape(self, value_dim: int) -> tuple[int, ...]:
        return (1 + self.memories, *self.inner.state_shape(value_dim))

    def _routes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Route tokens by keys or queries, [..., J, K]. The shared memory comes first and has weight 1.

        Returns:
            weights of the memories, zero but for the `top` largest, [..., 1 + M]; True at these, [..., 1 + M].
        """
        weights = (x.flatten(-2) @ self.router.to(x.dtype).T).softmax(-1)
        chosen = weights.topk(self.top, dim=-1)
        shares = chosen.values / chosen.values.sum(-1, keepdim=True)
        routed = torch.zeros_like(weights).scatter(-1, chosen.indices, shares)
        is_chosen = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, chosen.indices, True)
        return F.pad(routed, (1, 0), value=1.0), F.pad(is_chosen, (1, 0), value=True)

    def update(self, state: Tensor, k: Tensor, v: Tensor, *logits: Tensor) -> Tensor:
        updated = [self.inner.update(memory, k, v, *logits) for memory in state.unbind(2)]
        written = self._routes(k)[1].unbind(-1)
        pairs = zip(written, updated, state.unbind(2))
        return torch.stack([torch.where(w[:, None, None, None], new, old) for w, new, old in pairs], dim=2)

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = self._routes(q.mean(2))[0].unbind(-1)
        written = self._routes(k)[1].unbind(-1)
        output = q.new_zeros(())
        for weight, w, old, new in zip(weights, written, before.unbind(2), after.unbind(2)):
            w = w[:, None, None]
            output = output + weight[:, None, None, None] * self.inner.read(old, new, q, k * w, v * w)
        return output

    def chunked(self, q: Tensor, k: Tensor, v: Tensor, *logits: Tensor, scan: Scan) -> tuple[Tensor, Tensor]:
        weights, _ = self._routes(q.unflatten(2, (k.shape[2], -1)).mean(3))
        _, written = self._routes(k)
        if scan.write_mask is not None:
            written = written & scan.write_mask[..., None]
        inner_scan = Scan(
            written.movedim(-1, 0).flatten(0, 1),
            None if scan.initial_state is None else scan.initial_state.movedim(2, 0).flatten(0, 1),
            None if scan.segments is None else self._to_each(scan.segments.expand(q.shape[0], -1)),
        )
        output, states = self.inner.chunked(*(self._to_each(x) for x in (q, k, v, *logits)), scan=inner_scan)
        read = (self._memories(output) * weights.movedim(-1, 0)[..., None, None]).sum(0)
        return read, self._memories(states).movedim(0, 2)

    def _to_each(self, x: Tensor) -> Tensor:
        """Repeat the batch for every memory: [B, ...] -> [(1 + M) B, ...]."""
        return x.expand(1 + self.memories, *x.shape).flatten(0, 1)

    def _memories(self, x: Tensor) -> Tensor:
        """Undo `_to_each`: [(1 + M) B, ...] -> [1 + M, B, ...]."""
        return x.unflatten(0, (1 + self.memories, -1))

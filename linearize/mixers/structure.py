"""What every gated structure is: a recurrence twice told, token by token as its paper does and chunk by chunk.

Shapes: B batch, T tokens, H query heads, J key/value heads (H = J * G, head h reads state h // G), K head dim, V value
dim (K, or K + 1 where a column of ones carries the normaliser).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# the logarithm of a weight of nothing, finite so that gradients stay so
NEVER = -1e30


@dataclass(frozen=True)
class Site:
    """The place of a structure in a model.

    Attributes:
        heads: the key/value heads that it serves, of `total_heads` in the layer.
        group: query heads for each of them.
        layer: index of the layer, of `layers`.
    """

    heads: tuple[int, ...]
    total_heads: int
    group: int
    head_dim: int
    layer: int
    layers: int

    @classmethod
    def of(cls, config: dict[str, Any], heads: tuple[int, ...], layer: int, layers: int) -> "Site":
        """In a model with this config, its family's defaults filled in."""
        total = config["num_key_value_heads"]
        return cls(heads, total, config["num_attention_heads"] // total, config["head_dim"], layer, layers)


class Structure(nn.Module):
    """A recurrence over keys and values that is read by queries.

    A subclass says what one token does to the state (`update`) and how a query reads it (`read`), after its paper;
    `forward` computes the same for whole sequences, fast. Inputs and states are float32, or float64.

    Class attributes:
        gates: the gate logits it needs, each "channel" (one per key channel) or "head" (one number). They are the
            key itself and its mean over the head (Liger's pooling), plus what a learned gate adds.
        rotary: whether queries and keys come after rotary.
        positive: whether the weights it gives to past tokens are never negative, so that they can share a normaliser.
        log_unit: logarithm of the sum of weights that a thousand tokens of text come to (SmolLM2-135M, scripts/
            mass_units.py); the mix `outside` counts the past's mass from there.
        normalization: what the paper does to the output: "none", "sum" (divide by the sum of the weights) or "rms".
        log_normaliser: whether its output comes divided by the sum of the weights, with the logarithm of that sum as one more
            column: of weights that are exponentials of scores, which float32 cannot hold.
    """

    gates: tuple[str, ...] = ()
    rotary = False
    positive = False
    normalization = "none"
    log_unit = 0.0
    log_normaliser = False

    def __init__(self, site: Site):
        super().__init__()
        self.site = site

    def reset_parameters(self) -> None:
        """Gives the structure's own parameters their first values; the same in every process."""

    def fit(self, q: Tensor, q_rotary: Tensor, k: Tensor, scale: float) -> None:
        """Finds the structure's own parameters in what the base model's heads see of N tokens.

        Args:
            q, q_rotary: queries before and after rotary, [N, H, K]. k: keys before rotary, [N, J, K].
            scale: of the base model's scores.
        """

    def arrive(self, k: Tensor) -> Tensor | None:
        """What a structure behind rotary notes of a token when it arrives, from its key before rotary: [..., J, K] ->
        [..., J, width]. It comes back to `forward` as `offset`."""
        return None

    def arrival_bytes(self) -> int:
        """Bytes per token and key/value head that a cache keeps of what `arrive` notes."""
        return 0

    def pack(self, arrived: Tensor) -> Tensor:
        """What `arrive` noted as a cache keeps it, without loss: uint8 [..., J, arrival_bytes()]."""
        raise NotImplementedError

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Undoes `pack`."""
        raise NotImplementedError

    def gate_width(self) -> int:
        """Numbers per token and key/value head that a learned gate has to supply."""
        return sum(self.site.head_dim if gate == "channel" else 1 for gate in self.gates)

    def state_shape(self, value_dim: int) -> tuple[int, ...]:
        """Shape of one key/value head's state."""
        return (self.site.head_dim, value_dim)

    def gate_logits(self, k: Tensor, offset: Tensor | None) -> list[Tensor]:
        """The logits of every gate, [..., J, K] or [..., J, 1], from keys [..., J, K] and offsets [..., J, width]."""
        pooled = [k if gate == "channel" else k.mean(-1, keepdim=True) for gate in self.gates]
        if offset is None:
            return pooled
        parts = offset.split([logits.shape[-1] for logits in pooled], dim=-1)
        return [logits + part for logits, part in zip(pooled, parts)]

    def update(self, state: Tensor, k: Tensor, v: Tensor, *logits: Tensor) -> Tensor:
        """The state after one token: state [B, J, ...], k [B, J, K], v [B, J, V], logits [B, J, K or 1]."""
        raise NotImplementedError

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What queries [B, J, G, K] read, [B, J, G, V or V + 1], given the state before and after their token and its k and v."""
        raise NotImplementedError

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        offset: Tensor | None = None,
        write_mask: Tensor | None = None,
        initial_state: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs the recurrence over a sequence.

        Args:
            q: [B, T, H, K]. k: [B, T, J, K]. v: [B, T, J, V].
            offset: [B, T, J, gate_width()], added to the gate logits.
            write_mask: [B, T] bool; where False the token leaves the state as it is. Its query still reads.
            initial_state: [B, J, *state_shape(V)], zero when absent.
            segments: [B, T] document number of each token; the state is zeroed where it changes.

        Returns:
            output [B, T, H, V], or with `log_normaliser` [B, T, H, V + 1]; final state.
        """
        raise NotImplementedError

    def naive(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        offset: Tensor | None = None,
        write_mask: Tensor | None = None,
        initial_state: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same function as `forward`, token by token; also the decoding step."""
        B, T, J, _ = k.shape
        state = k.new_zeros(B, J, *self.state_shape(v.shape[-1])) if initial_state is None else initial_state
        per_head = (slice(None), *(None,) * (state.dim() - 1))  # [B] -> [B, 1, ...]
        outputs = []
        for t in range(T):
            if segments is not None and t > 0:
                state = state * (segments[:, t] == segments[:, t - 1]).to(state.dtype)[per_head]
            key, value = k[:, t], v[:, t]
            logits = self.gate_logits(key, None if offset is None else offset[:, t])
            after = self.update(state, key, value, *logits)
            if write_mask is not None:
                written = write_mask[:, t].expand(B)
                after = torch.where(written[per_head], after, state)
                key, value = key * written[:, None, None], value * written[:, None, None]
            outputs.append(self.read(state, after, q[:, t].unflatten(1, (J, -1)), key, value).flatten(1, 2))
            state = after
        output = torch.stack(outputs, dim=1) if T else q.new_zeros(B, 0, q.shape[2], v.shape[-1] + self.log_normaliser)
        return output, state


def read_state(state: Tensor, q: Tensor) -> Tensor:
    """o = S^T q: [B, J, K, V], [B, J, G, K] -> [B, J, G, V]."""
    return q @ state


def outer(k: Tensor, v: Tensor) -> Tensor:
    """k v^T: [B, J, K], [B, J, V] -> [B, J, K, V]."""
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def with_one(x: Tensor) -> Tensor:
    """A column of ones behind the last."""
    return F.pad(x, (0, 1), value=1.0)


def hold(write_mask: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """Zeroes writes and log-decays [B, T, J, ...] of tokens that must leave the state alone."""
    if write_mask is None:
        return list(tensors)
    return [x * write_mask.view(*write_mask.shape, *(1,) * (x.dim() - 2)) for x in tensors]

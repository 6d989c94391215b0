"""The base class of every mixer: one recurrence, written token by token as in its paper and chunk by chunk for speed.

Shapes: B batch, T tokens, H query heads, J key/value heads (H = J * G, query head h reads state h // G), K head dim,
V value dim (K, or K + 1 where a column of ones carries the normaliser).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.entry import MixerEntry

# the logarithm of a zero weight: finite, so that gradients stay finite
NEVER = -1e30


@dataclass(frozen=True)
class Site:
    """The place of a mixer in a model.

    Attributes:
        heads: indices of the key/value heads that the mixer serves, out of `total_heads` in the layer.
        group: query heads per key/value head.
        layer: index of the layer, out of `layers`.
    """

    heads: tuple[int, ...]
    total_heads: int
    group: int
    head_dim: int
    layer: int
    layers: int

    @classmethod
    def of(cls, config: dict[str, Any], heads: tuple[int, ...], layer: int, layers: int) -> "Site":
        """Return the site in a model with this config, in which the family's defaults are filled in."""
        total = config["num_key_value_heads"]
        return cls(heads, total, config["num_attention_heads"] // total, config["head_dim"], layer, layers)


class RecurrentInputs(NamedTuple):
    """The inputs that a mixer reads for each token besides the window's keys and values; None where it needs none.

    Attributes:
        keys: [B, T, J, K], keys before rotary. None for a mixer behind rotary, which reads the window's own keys.
        gate_offset: [B, T, J, gate_width()], added to the gate logits by a learned gate.
        assignment: [B, T, J, ·], computed by `Mixer.assign` when the token arrived. A cache stores it encoded, as
            uint8 [B, T, J, assignment_bytes()].
    """

    keys: Tensor | None = None
    gate_offset: Tensor | None = None
    assignment: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "RecurrentInputs":
        """Apply a function to every tensor."""
        return RecurrentInputs(*(None if x is None else function(x) for x in self))

    def joined(self, later: "RecurrentInputs") -> "RecurrentInputs":
        """Append the inputs of later tokens. Fields that are None here start with the later tokens."""
        return RecurrentInputs(
            *(new if past is None or new is None else torch.cat([past, new], dim=1) for past, new in zip(self, later))
        )


class Scan(NamedTuple):
    """Rules for the state while a mixer runs over a sequence.

    Attributes:
        write_mask: [B, T] bool; a token with False leaves the state as it is. Its query still reads.
        initial_state: [B, J, *state_shape(V)], zero if None.
        segments: [B, T] document number of each token; the state is zeroed where it changes.
    """

    write_mask: Tensor | None = None
    initial_state: Tensor | None = None
    segments: Tensor | None = None

    def mask_writes(self, *tensors: Tensor) -> list[Tensor]:
        """Zero the writes and log-decays, [B, T, J, ...], of tokens that must leave the state as it is."""
        if self.write_mask is None:
            return list(tensors)
        return [x * self.write_mask.view(*self.write_mask.shape, *(1,) * (x.dim() - 2)) for x in tensors]


class Mixer(nn.Module):
    """A recurrence over keys and values that queries read from. Inputs and states are float32 or float64.

    A subclass states the recurrence of its paper in three methods; `logits` stands for one tensor per entry of `gates`:

        update(state, k, v, *logits) -> state
            The state after one token. state [B, J, ...], k [B, J, K], v [B, J, V], logits [B, J, K] or [B, J, 1].
        read(before, after, q, k, v) -> output
            The output of queries [B, J, G, K], as [B, J, G, V], from the state before and after their own token, whose
            key and value are k and v.
        chunked(q, k, v, *logits, scan) -> output, state
            The same recurrence for a whole sequence, fast. Shapes as in `forward`.

    Attributes from its entry in the registry, set by `with_facts`:
        gates: its gates. The logits of a "channel" gate are the key, those of a "head" gate its mean over the head
            (Liger's pooling), plus the offset of a learned gate.
        positive: true if window and past can share a normaliser.

    Class attributes:
        rotary: true if it reads queries and keys after rotary.
        normalization: the paper's treatment of the output: "none", "sum" (divide by the sum of the weights) or "rms".
        log_unit: logarithm of the sum of weights over a thousand tokens of text (SmolLM2-135M, scripts/mass_units.py).
            The mix `outside` counts the past's mass from there.
        log_normaliser: true if the output is divided by the sum of the weights and carries the logarithm of that sum as
            one more column. Weights that are exponentials of scores need this: float32 cannot hold their sum.
        assigns: true if it computes an assignment for each token from the key before rotary (see `assign`).
        starts_unfitted: true if its first parameters are of no use until `fit` has run.
        independent_heads: true if a head computes the same whichever other heads are linear.
    """

    gates: tuple[str, ...] = ()
    positive: bool = False
    rotary: bool = False
    normalization: str = "none"
    log_unit: float = 0.0
    log_normaliser: bool = False
    assigns: bool = False
    starts_unfitted: bool = False
    independent_heads: bool = True

    update: Callable[..., Tensor]
    chunked: Callable[..., tuple[Tensor, Tensor]]

    def __init__(self, site: Site):
        super().__init__()
        self.site = site

    def with_facts(self, entry: MixerEntry, options: dict[str, Any]) -> "Mixer":
        """Take the facts of an entry of the registry for these options; return the mixer itself."""
        self.gates, self.positive = entry.gates_with(options), entry.shares_normaliser(options)
        return self

    def reset_parameters(self) -> None:
        """Set the mixer's own parameters to their first values, the same in every process."""

    def fit(self, q: Tensor, q_rotary: Tensor, k: Tensor, scale: float) -> None:
        """Fit the mixer's own parameters to N tokens of the base model's heads.

        Args:
            q, q_rotary: queries before and after rotary, [N, H, K].
            k: keys before rotary, [N, J, K].
            scale: the factor of the base model's scores.
        """

    def assign(self, k: Tensor) -> Tensor:
        """Compute the assignment of arriving tokens from their keys before rotary: [..., J, K] -> [..., J, width].

        It comes back to `forward` as `assignment`.
        """
        raise NotImplementedError

    def assignment_bytes(self) -> int:
        """Return the bytes per token and key/value head that a cache stores of an assignment."""
        return 0

    def encode_assignment(self, assignment: Tensor) -> Tensor:
        """Encode an assignment for a cache, without loss, as uint8 [..., J, assignment_bytes()]."""
        raise NotImplementedError

    def decode_assignment(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:
        """Undo `encode_assignment`."""
        raise NotImplementedError

    def gate_width(self) -> int:
        """Return the numbers per token and key/value head that a learned gate has to supply."""
        return sum(self.site.head_dim if gate == "channel" else 1 for gate in self.gates)

    def state_shape(self, value_dim: int) -> tuple[int, ...]:
        """Return the shape of one key/value head's state."""
        return (self.site.head_dim, value_dim)

    def update_inputs(self, k: Tensor, gate_offset: Tensor | None, assignment: Tensor | None) -> list[Tensor]:
        """Return the inputs of `update` and `chunked` after k and v: the logits of every gate.

        Args:
            k: keys [..., J, K].
            gate_offset: [..., J, gate_width()], added to the logits.
            assignment: unused here.

        Returns:
            one tensor per gate, [..., J, K] or [..., J, 1].
        """
        pooled = [k if gate == "channel" else k.mean(-1, keepdim=True) for gate in self.gates]
        if gate_offset is None:
            return pooled
        offsets = gate_offset.split([logits.shape[-1] for logits in pooled], dim=-1)
        return [logits + offset for logits, offset in zip(pooled, offsets)]

    def read(self, before: Tensor, after: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Read the state as queries do; see the class."""
        raise NotImplementedError

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        gate_offset: Tensor | None = None,
        assignment: Tensor | None = None,
        write_mask: Tensor | None = None,
        initial_state: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence over a sequence, chunk by chunk.

        Args:
            q: [B, T, H, K]. k: [B, T, J, K]. v: [B, T, J, V].
            gate_offset, assignment: as in `RecurrentInputs`.
            write_mask, initial_state, segments: as in `Scan`.

        Returns:
            output [B, T, H, V], or with `log_normaliser` [B, T, H, V + 1]; final state.
        """
        scan = Scan(write_mask, initial_state, segments)
        return self.chunked(q, k, v, *self.update_inputs(k, gate_offset, assignment), scan=scan)

    def naive(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        gate_offset: Tensor | None = None,
        assignment: Tensor | None = None,
        write_mask: Tensor | None = None,
        initial_state: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence token by token: the reference for `forward`, and the decoding step."""
        B, T, J, _ = k.shape
        state = k.new_zeros(B, J, *self.state_shape(v.shape[-1])) if initial_state is None else initial_state
        per_head = (slice(None), *(None,) * (state.dim() - 1))  # [B] -> [B, 1, ...]
        outputs = []
        for t in range(T):
            if segments is not None and t > 0:
                state = state * (segments[:, t] == segments[:, t - 1]).to(state.dtype)[per_head]
            key, value = k[:, t], v[:, t]
            offset, assigned = (None if x is None else x[:, t] for x in (gate_offset, assignment))
            after = self.update(state, key, value, *self.update_inputs(key, offset, assigned))
            if write_mask is not None:
                written = write_mask[:, t].expand(B)
                after = torch.where(written[per_head], after, state)
                key, value = key * written[:, None, None], value * written[:, None, None]
            outputs.append(self.read(state, after, q[:, t].unflatten(1, (J, -1)), key, value).flatten(1, 2))
            state = after
        output = torch.stack(outputs, dim=1) if T else q.new_zeros(B, 0, q.shape[2], v.shape[-1] + self.log_normaliser)
        return output, state


def read_state(state: Tensor, q: Tensor) -> Tensor:
    """Return S^T q: [B, J, K, V], [B, J, G, K] -> [B, J, G, V]."""
    return q @ state


def outer(k: Tensor, v: Tensor) -> Tensor:
    """Return k v^T: [B, J, K], [B, J, V] -> [B, J, K, V]."""
    return k.unsqueeze(-1) * v.unsqueeze(-2)


def with_one(x: Tensor) -> Tensor:
    """Append a column of ones to the last dimension."""
    return F.pad(x, (0, 1), value=1.0)
